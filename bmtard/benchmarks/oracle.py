"""Float64 formulas that every provider is checked against, and how close it must come.

Written from the definitions, in rows of a few million numbers at a time, without autograd and
without bmtard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 21
"""Numbers converted to float64 at a time."""

# (of a value, of a gradient relative to the largest). Half types round what they return, and a
# provider that computes in them loses a few roundings more.
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (1e-2, 2e-3),
}


def chunks(rows: int, classes: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(classes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def by_rows(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` of float64 rows [n, C], chunk by chunk, joined."""
    rows, classes = tensors[0].shape
    parts = [
        function(*(t[part].detach().double() for t in tensors)) for part in chunks(rows, classes)
    ]
    return torch.cat(parts)


def entropy(logits: Tensor, temperature: float, eps: float = 0.0) -> Tensor:
    """[N], in nats; with ``eps`` inside the logarithm as the published code has it."""

    def of(z: Tensor) -> Tensor:
        log_p = torch.log_softmax(z / temperature, -1)
        p = log_p.exp()
        return -(p * ((p + eps).log() if eps else log_p)).sum(-1)

    return by_rows(of, logits)


def entropy_gradient(logits: Tensor, temperature: float, upstream: Tensor) -> Tensor:
    """[N, C]: - upstream p (log p + H) / temperature."""

    def of(z: Tensor, up: Tensor) -> Tensor:
        log_p = torch.log_softmax(z / temperature, -1)
        p = log_p.exp()
        h = -(p * log_p).sum(-1, keepdim=True)
        return -up * p * (log_p + h) / temperature

    return by_rows(of, logits, upstream.unsqueeze(-1))


def kl(student: Tensor, teacher: Tensor, temperature: float, eps: float = 0.0) -> Tensor:
    """[N]: sum p (log(p + eps) - log q), p = softmax(teacher / temperature)."""

    def of(s: Tensor, t: Tensor) -> Tensor:
        log_p = torch.log_softmax(t / temperature, -1)
        p = log_p.exp()
        return (p * (((p + eps).log() if eps else log_p) - torch.log_softmax(s, -1))).sum(-1)

    return by_rows(of, student, teacher)


def kl_gradient(student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
    """[N, C] by the student: scale (q - p)."""

    def of(s: Tensor, t: Tensor) -> Tensor:
        return scale * (torch.softmax(s, -1) - torch.softmax(t / temperature, -1))

    return by_rows(of, student, teacher)


def differs(
    name: str, got: Tensor, expected: Tensor, *, rtol: float = 0.0, of_largest: float = 0.0
) -> str:
    """Where ``got`` is off by more than rtol |expected| + of_largest max |expected|, or "".

    NaN is off. The dtype's smallest number is allowed on top: a float16 gradient of a mean over
    many numbers is hardly larger, unless the loss is scaled. Compared in float64, in chunks.
    """
    if got.shape != expected.shape:
        return f"{name} has shape {list(got.shape)}, not {list(expected.shape)}"
    if not got.numel():
        return ""
    got = got.detach()
    largest = float(expected.abs().max())
    info = torch.finfo(got.dtype)
    smallest = info.smallest_normal * info.eps
    worst, where = 0.0, 0
    flat_got, flat_expected = got.reshape(-1), expected.reshape(-1)
    for part in chunks(flat_got.numel(), 1):
        wanted = flat_expected[part].double()
        allowed = rtol * wanted.abs() + of_largest * largest
        excess = (flat_got[part].double() - wanted).abs() / (allowed + smallest).clamp(min=1e-300)
        excess = torch.where(excess.isnan(), torch.inf, excess)
        top, index = excess.max(0)
        if float(top) > worst:
            worst, where = float(top), part.start + int(index)
    if worst <= 1:
        return ""
    return (
        f"{name} is {float(flat_got[where]):.9g} at {where}, not {float(flat_expected[where]):.9g} "
        f"({worst:.3g} times the tolerance)"
    )


def first_problem(*problems: str) -> str:
    return next(filter(None, problems), "")
