"""Microbenchmarks of bmtard's ops against what they replace; see README.md in this folder.

Runs as ``bmtard bench``, ``python -m benchmarks`` and ``make bench``. In the wheel this package is
``bmtard.benchmarks``.
"""
