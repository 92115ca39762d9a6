"""What the op tests compare against and draw from, independent of ``bmtard.reference``.

Values come from NumPy and SciPy in float64, gradients from torch's autograd in float64, both on
the inputs as rounded to the tested dtype.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from bmtard import _library

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)


def require_native() -> None:
    """Skips the test without compiled kernels; fails it where they were meant to be there."""
    if not _library.NATIVE:
        if os.environ.get("BMTARD_REQUIRE_NATIVE") == "1":
            pytest.fail("BMTARD_REQUIRE_NATIVE=1 but the compiled library is not loaded")
        pytest.skip("the compiled library is not loaded")


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results for logits of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    scale: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, dtype=torch.float64, generator=generator)
    return (scale * numbers).to(device, dtype)


# --- Memory layouts -------------------------------------------------------------------------

LAYOUTS = ["contiguous", "row_slice", "class_stride", "transposed", "row_stride"]


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The values of [..., C] in another memory layout."""
    *rows, classes = x.shape
    if layout == "contiguous":
        view = x.clone()
    elif layout == "row_slice":  # row stride > C, and rows that start at odd addresses
        view = x.new_full((*rows, classes + 4), torch.nan)[..., 1 : classes + 1]
    elif layout == "class_stride":
        view = x.new_full((*rows, 2 * classes), torch.nan)[..., ::2]
    elif layout == "transposed":
        view = x.new_full((classes, *rows), torch.nan).movedim(0, -1)
    elif layout == "row_stride":
        view = x.new_full((2 * rows[0], *rows[1:], classes), torch.nan)[::2]
    else:
        raise ValueError(layout)
    return view.copy_(x)


# --- NumPy and SciPy ------------------------------------------------------------------------


def numpy(x: Tensor | float) -> np.ndarray:
    return x.detach().double().cpu().numpy() if isinstance(x, Tensor) else np.float64(x)


def probabilities(logits: Tensor, temperature: Tensor | float = 1.0) -> np.ndarray:
    """[..., C]; temperature a number, 0-d, or of the rows' shape."""
    return scipy.special.softmax(_scaled(logits, temperature), axis=-1)


def log_probabilities(logits: Tensor, temperature: Tensor | float = 1.0) -> np.ndarray:
    return scipy.special.log_softmax(_scaled(logits, temperature), axis=-1)


def _scaled(logits: Tensor, temperature: Tensor | float) -> np.ndarray:
    logits, temperature = numpy(logits), numpy(temperature)
    top = logits.max(-1, keepdims=True) if logits.size else 0
    with np.errstate(over="ignore"):  # further below the maximum than float64 reaches: p = 0
        return (logits - top) / temperature[..., None]


def entropy(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """[...] float64 on the CPU, in nats."""
    p = probabilities(logits, temperature)
    return torch.as_tensor(np.asarray(scipy.stats.entropy(p, axis=-1)))


def kl(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor | float = 1.0,
    student_temperature: float = 1.0,
    eps: float = 0.0,
) -> Tensor:
    """sum p (log(p + eps) - log q) of one teacher, [...] float64 on the CPU, in nats."""
    p = probabilities(teacher, temperature)
    log_q = log_probabilities(student, student_temperature)
    log_p = np.log(p + eps) if eps else log_probabilities(teacher, temperature)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return torch.as_tensor(np.asarray(terms.sum(-1)))


def temperature_of(
    logits: Tensor, target: float, bounds: tuple[float, float] = (1e-2, 1e2)
) -> float:
    """Where the mean entropy of the rows is the target, by Brent's method."""

    def error(log_temperature: float) -> float:
        return float(entropy(logits, float(np.exp(log_temperature))).mean()) - target

    low, high = np.log(bounds)
    return float(np.exp(scipy.optimize.brentq(error, low, high, xtol=1e-14, rtol=1e-14)))


# --- Plain torch, for gradients -------------------------------------------------------------


def torch_entropy(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """[...]; differentiable, in the dtype that comes."""
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    log_p = torch.log_softmax(logits / temperature, -1)
    return -(log_p.exp() * log_p).sum(-1)


def torch_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor | float = 1.0,
    student_temperature: float = 1.0,
    eps: float = 0.0,
) -> Tensor:
    """KL of one teacher, [...]; differentiable."""
    p = torch.softmax(teacher / temperature, -1)
    log_q = torch.log_softmax(student / student_temperature, -1)
    return (p * ((p + eps).log() - log_q)).sum(-1)


def gradients(output: Tensor, inputs: list[Tensor], seed: int = 1) -> list[Tensor | None]:
    """Of a random combination of the outputs."""
    weight = randn(*output.shape, scale=1.0, seed=seed).to(output)
    return list(torch.autograd.grad((weight * output).sum(), inputs, allow_unused=True))


def leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that requires grad and keeps the strides."""
    if dtype is not None and dtype != x.dtype:
        return x.detach().to(dtype).requires_grad_()
    storage = x.detach().untyped_storage().clone()
    copy = torch.empty(0, dtype=x.dtype, device=x.device)
    return copy.set_(storage, x.storage_offset(), x.shape, x.stride()).requires_grad_()


def assert_matches(actual: Tensor, expected: Tensor | np.ndarray, dtype: torch.dtype) -> None:
    """Equal to the default tolerances of ``dtype``, and in that dtype."""
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.detach().cpu(), torch.as_tensor(expected).detach().to(dtype).cpu()
    )
