"""Microbenchmarks of bmtard's ops against what they replace.

Runs as ``bmtard bench`` and, in a checkout, as ``make bench`` and ``python -m benchmarks``. The
README of the repository's folder benchmarks tells how to read the tables.
"""
