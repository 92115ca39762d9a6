"""A fuzzer of the ops: random calls against a NumPy oracle. ``python -m tests.fuzz --help``."""
