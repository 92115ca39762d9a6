"""The suite on tiny inputs."""

from __future__ import annotations

import pytest
import torch

from bmtard.benchmarks.spec import catalogue
from bmtard.benchmarks.suite import Selection, run


@pytest.fixture(autouse=True)
def _one_thread():
    """Two that other processes interrupt would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measured():
    """Runs a selection in milliseconds; a dict of providers replaces or adds some."""

    def measure(extra=None, /, **selection):
        ops, known = catalogue()
        defaults = {"preset": "quick", "seconds": 0.01, "shapes": ("16x10",)}
        return run(
            Selection(**{**defaults, **selection}), ops, {**known, **(extra or {})},
            command="test",
        )  # fmt: skip

    return measure
