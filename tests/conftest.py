"""Devices, seeds and threads for every test."""

from __future__ import annotations

import os
import random

import hypothesis
import numpy as np
import pytest
import torch

# Two threads, so that splitting rows over threads is tested on every machine.
torch.set_num_threads(2)

hypothesis.settings.register_profile("bmtard", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("bmtard")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test may draw from it)
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn. BMTARD_REQUIRE_CUDA=1: a missing GPU or CUDA build is a failure."""
    if request.param == "cuda":
        reason = _why_no_cuda()
        if reason and os.environ.get("BMTARD_REQUIRE_CUDA") == "1":
            pytest.fail(f"BMTARD_REQUIRE_CUDA=1, but {reason}")
        if reason:
            pytest.skip(reason)
    return torch.device(request.param)


def _why_no_cuda() -> str:
    from bmtard._library import has_cuda

    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if has_cuda() else "bmtard was built without CUDA"
