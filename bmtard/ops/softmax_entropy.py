"""Entropy of a softmax: contract, autograd, fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmtard import reference
from bmtard.ops._checks import check_companion, check_logits, check_temperature
from bmtard.ops._dispatch import (
    fake_rows,
    flat,
    native,
    once_differentiable,
    register_fake,
    rows_of,
    save,
    saved,
    split,
    use_native,
    wants_gradient,
)
from bmtard.reference import accumulation_dtype


def softmax_entropy(
    logits: Tensor, temperature: float | Tensor = 1.0, *, reduction: str = "none"
) -> Tensor:
    """Shannon entropy of ``softmax(logits / temperature)`` over the last dimension, in nats.

    Args:
        logits: [..., C], float64, float32, bfloat16 or float16, any strides. -inf masks a class.
        temperature: 1e-36 to 1e36, dimensionless: a float, a 0-d tensor, or a tensor of shape
            ``logits.shape[:-1]``. The values of a tensor are not read on the host: where one
            lies outside of that range, that entropy is NaN.
        reduction: "none", "mean" or "sum" over the rows.

    Returns:
        [...] with "none", else 0-d; each entropy in [0, log C] up to rounding. float64 for
        float64 logits, else float32. Differentiable once, in ``logits`` and ``temperature``.

    Raises:
        TypeError: another dtype. ValueError: a bad shape, temperature or reduction.

    Source: the entropy of B-MTARD (Zhao et al., TPAMI 2024). The published code averages
    p log(p + 1e-5) over N * C, so its sign and scale differ.
    """
    op = "softmax_entropy"
    check_logits(op, "logits", logits)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    rows_shape = logits.shape[:-1]
    if isinstance(temperature, Tensor):
        check_companion(op, "temperature", temperature, logits)
        if temperature.dim() and temperature.shape != rows_shape:
            raise ValueError(
                f"{op}: temperature must be a float, 0-d, or of shape {list(rows_shape)} for "
                f"logits {list(logits.shape)}, got {list(temperature.shape)}"
            )
    else:
        check_temperature(op, "temperature", temperature)

    if not use_native(logits):
        entropy = reference.softmax_entropy(logits, temperature)
    else:
        tensor, value = split(temperature, accumulation_dtype(logits.dtype), logits)
        if wants_gradient(logits, tensor):
            entropy = _SoftmaxEntropy.apply(logits, tensor, value)
        else:
            entropy = native.softmax_entropy(rows_of(logits), flat(tensor), value)[0]
            entropy = entropy if logits.dim() == 2 else entropy.view(rows_shape)
    if reduction == "none":
        return entropy
    return entropy.mean() if reduction == "mean" else entropy.sum()


class _SoftmaxEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: Tensor | None, value: float) -> Tensor:
        entropy, statistics = native.softmax_entropy(rows_of(logits), flat(temperature), value)
        ctx.value = value
        save(ctx, logits, temperature, entropy, statistics)
        return entropy if logits.dim() == 2 else entropy.view(logits.shape[:-1])

    @staticmethod
    @once_differentiable("softmax_entropy")
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, temperature, entropy, statistics = saved(ctx)
        wants_logits, wants_temperature, _ = ctx.needs_input_grad
        grad_logits, grad_temperature = native.softmax_entropy_backward(
            flat(grad), rows_of(logits), flat(temperature), ctx.value, entropy, statistics,
            wants_logits, wants_temperature,
        )  # fmt: skip
        grad_logits = grad_logits.view(logits.shape) if wants_logits else None
        if not wants_temperature:
            grad_temperature = None
        elif temperature.dim() == 0:
            grad_temperature = grad_temperature.sum()
        else:
            grad_temperature = grad_temperature.view(temperature.shape)
        return grad_logits, grad_temperature, None


@register_fake("softmax_entropy")
def _(logits: Tensor, temperature: Tensor | None, value: float) -> Any:
    n, acc = fake_rows(logits), accumulation_dtype(logits.dtype)
    return logits.new_empty(n, dtype=acc), logits.new_empty((2, n), dtype=acc)


@register_fake("softmax_entropy_backward")
def _(
    grad: Tensor,
    logits: Tensor,
    temperature: Tensor | None,
    value: float,
    entropy: Tensor,
    statistics: Tensor,
    wants_logits: bool,
    wants_temperature: bool,
) -> Any:
    n = fake_rows(logits)
    return (
        logits.new_empty((n, logits.shape[1]) if wants_logits else (0,)),
        entropy.new_empty((n,) if wants_temperature else (0,)),
    )
