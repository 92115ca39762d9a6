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

# No limit in seconds: neither for a call nor for the drawing of its arguments.
hypothesis.settings.register_profile(
    "bmtard", deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.load_profile("bmtard")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test may draw from it)
    torch.manual_seed(0)


def _why_no_cuda() -> str:
    from bmtard._library import has_cuda

    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if has_cuda() else "bmtard was built without CUDA"


WHY_NO_CUDA = _why_no_cuda()
CUDA_REQUIRED = os.environ.get("BMTARD_REQUIRE_CUDA") == "1"
DEVICES = ["cpu"]
if CUDA_REQUIRED or not WHY_NO_CUDA:
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


def pytest_report_header() -> str:
    if WHY_NO_CUDA and not CUDA_REQUIRED:
        return (
            f"cuda: {WHY_NO_CUDA}, so no device test is collected (BMTARD_REQUIRE_CUDA=1 insists)"
        )
    return f"cuda: {WHY_NO_CUDA or torch.cuda.get_device_name()}"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn. BMTARD_REQUIRE_CUDA=1: a missing GPU or CUDA build is a failure."""
    if request.param == "cuda" and WHY_NO_CUDA:
        pytest.fail(f"BMTARD_REQUIRE_CUDA=1, but {WHY_NO_CUDA}")
    return torch.device(request.param)
