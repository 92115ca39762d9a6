"""Builds the kernels for the CPU, and runs each test with threads in order and in disorder."""

from __future__ import annotations

import pytest

from . import harness

# These build modules of their own.
collect_ignore = ["test_mutants.py", "test_sanitizers.py"] if harness.PREBUILT else []


@pytest.fixture(scope="session", autouse=True)
def _module() -> None:
    """Builds bmtard_simt where it is missing or older than its sources."""
    if harness.PREBUILT:
        return
    try:
        harness.build()
    except harness.BuildError as error:
        pytest.exit(str(error), returncode=1)


@pytest.fixture(autouse=True)
def _defaults(_module: None) -> None:
    harness.simt().configure(seed=1)
