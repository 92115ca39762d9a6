"""The temperature of a given entropy: contract, autograd, fake kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bmtard import reference
from bmtard.ops._checks import (
    check_bounds,
    check_companion,
    check_logits,
    check_temperature,
    is_integer,
    is_number,
)
from bmtard.ops._dispatch import (
    NoDoubleBackward,
    as_tensor,
    fake_rows,
    flat,
    in_transform,
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
from bmtard.types import TemperatureSearch


def bisect_temperature(
    logits: Tensor,
    target_entropy: float | Tensor,
    *,
    bounds: tuple[float, float] = (1e-2, 1e2),
    initial: float | Tensor | None = None,
    per_sample: bool = False,
    tolerance: float = 1e-6,
    max_iterations: int = 32,
    method: str = "halley",
) -> TemperatureSearch:
    """Finds the temperature at which the softmax entropy of the rows has a given value.

    The entropy grows with the temperature, so the solution is unique and can be bracketed. The
    search runs on the device of the logits and never waits for it.

    Args:
        logits: [..., C], float64, float32, bfloat16 or float16, any strides. -inf masks a class.
        target_entropy: nats. A float or 0-d tensor; with ``per_sample`` also a tensor of shape
            ``logits.shape[:-1]``.
        bounds: (lowest, highest) temperature, 1e-36 <= lowest < highest <= 1e36.
        initial: where to start, shaped as ``target_entropy``; the temperature of the previous
            batch saves evaluations. Default: estimated from the variance of the logits.
        per_sample: one temperature for each row, instead of one for their mean entropy.
        tolerance: nats; 4 ulp of log C where that is more.
        max_iterations: entropy evaluations at most, 1 to 2**31 - 1.
        method: "halley", a bracketed Halley iteration (3 to 4 evaluations are typical), or
            "bisection" (20 to 26).

    Returns:
        TemperatureSearch(temperature, entropy, status, iterations): device tensors, 0-d or, with
        ``per_sample``, of shape ``logits.shape[:-1]``. float64 for float64 logits, else float32.
        ``status`` holds a :class:`bmtard.SearchStatus`. ``temperature`` is differentiable once in
        ``logits`` and ``target_entropy`` (by the implicit function theorem; 0 where the search
        did not converge); ``entropy`` is not differentiable.

    Raises:
        TypeError: another dtype. ValueError: a bad shape or an impossible setting.

    Source: the fixed point of B-MTARD's temperature rule. The reference path always bisects.
    """
    op = "bisect_temperature"
    check_logits(op, "logits", logits)
    low, high = check_bounds(op, bounds)
    if not (is_number(tolerance) and 0 <= tolerance < math.inf):
        raise ValueError(f"{op}: tolerance must be finite and >= 0, got {tolerance!r}")
    if not (is_integer(max_iterations) and 1 <= max_iterations < 2**31):
        raise ValueError(
            f"{op}: max_iterations must be an integer >= 1 and < 2**31, got {max_iterations!r}"
        )
    if method not in ("halley", "bisection"):
        raise ValueError(f"{op}: method must be 'halley' or 'bisection', got {method!r}")
    dtype = accumulation_dtype(logits.dtype)
    _check_per_row(op, "target_entropy", target_entropy, logits, per_sample)
    start = None
    if initial is not None:
        if not isinstance(initial, Tensor):
            check_temperature(op, "initial", initial)
        _check_per_row(op, "initial", initial, logits, per_sample)
        start = as_tensor(initial, dtype, logits).detach()

    if not use_native(logits):
        target = as_tensor(target_entropy, dtype, logits)
        transform = in_transform()
        newton_steps = 1 if wants_gradient(logits, target) else 0
        if transform:
            # n steps have the derivatives up to the order 2^n - 1. Each transform may take one;
            # so may a dual level and autograd around them.
            newton_steps = (_transforms() + 2).bit_length()
        rows_shape = _rows_shape(logits, per_sample)
        expand = (lambda t: t.expand(rows_shape).flatten()) if per_sample else (lambda t: t)
        found = reference.bisect_temperature(
            rows_of(logits),
            expand(target),
            low=low,
            high=high,
            initial=None if start is None else expand(start),
            per_sample=per_sample,
            tolerance=float(tolerance),
            max_iterations=int(max_iterations),
            newton_steps=newton_steps,
        )
        temperature, *rest = (field.reshape(rows_shape) for field in found)
        if temperature.requires_grad and not transform:
            temperature = _OnceDifferentiable.apply(op, temperature, logits, target)
        return TemperatureSearch(temperature, *rest)
    if logits.is_cpu:
        tensor, value = split(target_entropy, dtype, logits)
    else:  # the kernel reads it on the device
        tensor, value = as_tensor(target_entropy, dtype, logits), 0.0
    arguments = (
        low, high, bool(per_sample), float(tolerance), int(max_iterations), method == "bisection",
    )  # fmt: skip
    if wants_gradient(logits, tensor):
        return TemperatureSearch(
            *_BisectTemperature.apply(logits, tensor, value, start, *arguments)
        )
    fields = native.bisect_temperature(
        rows_of(logits), flat(tensor), value, flat(start), *arguments
    )
    if per_sample and logits.dim() != 2:
        fields = [field.view(logits.shape[:-1]) for field in fields]
    temperature, entropy, _, status, iterations = fields
    return TemperatureSearch(temperature, entropy, status, iterations)


# Private to torch: how many torch.func transforms are active, or None.
_current_level = getattr(torch._C._functorch, "maybe_current_level", lambda: None)


def _transforms() -> int:
    return _current_level() or 0


_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _rows_shape(logits: Tensor, per_sample: bool) -> torch.Size:
    """Of the results."""
    return logits.shape[:-1] if per_sample else torch.Size(())


def _check_per_row(
    op: str, name: str, value: float | Tensor, logits: Tensor, per_sample: bool
) -> None:
    """For a number, or a tensor that is 0-d or has the shape of the results."""
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(
                f"{op}: {name} must be a number or a tensor, got {type(value).__name__}"
            )
        return
    check_companion(op, name, value, logits)
    rows_shape = _rows_shape(logits, per_sample)
    if value.dim() and value.shape != rows_shape:
        wanted = f"a float, 0-d or {list(rows_shape)}" if rows_shape else "a float or 0-d"
        raise ValueError(f"{op}: {name} must be {wanted}, got {list(value.shape)}")


class _BisectTemperature(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor | None,
        value: float,
        initial: Tensor | None,
        *arguments: Any,
    ) -> Any:
        temperature, entropy, slope, status, iterations = native.bisect_temperature(
            rows_of(logits), flat(target), value, flat(initial), *arguments
        )
        ctx.per_sample = arguments[2]
        save(ctx, logits, target, temperature, slope, status)
        outputs = (temperature, entropy, status, iterations)
        if ctx.per_sample and logits.dim() != 2:
            outputs = tuple(field.view(logits.shape[:-1]) for field in outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable("bisect_temperature")
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        logits, target, temperature, slope, status = saved(ctx)
        # Implicit function theorem: d temperature / d target = temperature / slope,
        # d temperature / d logits = -(d entropy / d logits) temperature / slope.
        by_target = flat(grad) * temperature / slope
        by_target = torch.where((status == 0) & (slope > 0), by_target, 0.0)
        grad_logits = grad_target = None
        if ctx.needs_input_grad[0]:
            rows = rows_of(logits)
            by_row = -by_target if ctx.per_sample else -by_target / rows.shape[0]
            grad_logits = native.softmax_entropy_backward(
                by_row, rows, temperature, 0.0,
                *native.softmax_entropy(rows, temperature, 0.0), True, False,
            )[0].view(logits.shape)  # fmt: skip
        if ctx.needs_input_grad[1]:
            grad_target = by_target.sum() if target.dim() == 0 else by_target
            grad_target = grad_target.view(target.shape)
        return (grad_logits, grad_target, *(None,) * 8)


class _OnceDifferentiable(torch.autograd.Function):
    """Returns ``value``. A second derivative by the inputs raises."""

    @staticmethod
    def forward(ctx: Any, op: str, value: Tensor, *inputs: Tensor) -> Tensor:
        ctx.op = op
        save(ctx, *inputs)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            (grad,) = NoDoubleBackward.apply(ctx.op, 1, grad, *ctx.saved_tensors)
        return (None, grad, *(None,) * len(ctx.saved_tensors))


@register_fake("bisect_temperature")
def _(
    logits: Tensor,
    target: Tensor | None,
    value: float,
    initial: Tensor | None,
    low: float,
    high: float,
    per_sample: bool,
    tolerance: float,
    max_iterations: int,
    bisection: bool,
) -> Any:
    n, acc = fake_rows(logits), accumulation_dtype(logits.dtype)
    shape = (n,) if per_sample else ()
    reals = [logits.new_empty(shape, dtype=acc) for _ in range(3)]
    return (*reals, *(logits.new_empty(shape, dtype=torch.int32) for _ in range(2)))
