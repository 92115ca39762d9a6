"""One step of projected gradient ascent: contract, fake kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmtard import reference
from bmtard.ops._checks import check_floating, is_number, same_kind, two_numbers
from bmtard.ops._dispatch import (
    derived,
    in_transform,
    mark_overwritten,
    native,
    register_fake,
    use_native,
    varies,
)


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    step_size: float,
    epsilon: float,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    norm: str = "linf",
) -> Tensor:
    """One step of projected gradient ascent, in place and in one pass over memory.

    "linf": x_adv + step_size * sign(grad), clipped to [x - epsilon, x + epsilon], then to bounds.
    "l2": x_adv + step_size * grad / ||grad||, its distance from x scaled down to at most epsilon,
    then clipped to bounds; norms are per sample. A gradient of norm 0, NaN or infinity moves
    nothing. Equivalent, for "linf", to
    ``min(max(x_adv + step_size * grad.sign(), x - epsilon), x + epsilon).clamp(*bounds)``.

    Args:
        x_adv: [N, ...], overwritten; any layout in which each value has its own memory.
        grad: the gradient of the attacked loss by ``x_adv``, same shape.
        x: the clean images, same shape.
        step_size, epsilon: in pixel units (8/255 where an image lies in [0, 1]), >= 0.
        bounds: (lowest, highest) pixel value, or None.
        norm: "linf" or "l2".

    Returns:
        ``x_adv``. Not differentiable: x_adv must not require grad while grad mode is on.

    Raises:
        TypeError: not a floating-point tensor. ValueError: shapes, devices or numbers that do
        not fit.

    Source: Madry et al., ICLR 2018. Arithmetic is float32 for half types, rounded once at the end;
    tensors of different dtypes are promoted to a common one first.
    """
    op = "pgd_step_"
    if not same_kind(x_adv, (x_adv, grad, x)) or x_adv.dim() == 0:
        for name, tensor in (("x_adv", x_adv), ("grad", grad), ("x", x)):
            check_floating(op, name, tensor)
            if tensor.shape != x_adv.shape or tensor.dim() == 0:
                raise ValueError(
                    f"{op}: {name} must have the shape of x_adv, [N, ...], here "
                    f"{list(x_adv.shape)}, got {list(tensor.shape)}"
                )
            if tensor.device != x_adv.device:
                raise ValueError(
                    f"{op}: {name} must be on the device of x_adv, {x_adv.device}, "
                    f"got {tensor.device}"
                )
    if x_adv.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: x_adv requires grad, so it cannot be overwritten here; "
            "call it under torch.no_grad() or pass x_adv.detach()"
        )
    strides = zip(x_adv.shape, x_adv.stride(), strict=True)
    if x_adv.numel() and any(size > 1 and step == 0 for size, step in strides):
        raise ValueError(
            f"{op}: x_adv must not be expanded, as it is overwritten, got strides "
            f"{list(x_adv.stride())} for shape {list(x_adv.shape)}; pass x_adv.contiguous()"
        )
    for name, value in (("step_size", step_size), ("epsilon", epsilon)):
        if not (is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{op}: {name} must be finite and >= 0, got {value}")
    step_size, epsilon = float(step_size), float(epsilon)
    low, high = (-math.inf, math.inf) if bounds is None else two_numbers(op, "bounds", bounds)
    if not low <= high:
        raise ValueError(f"{op}: bounds must be (lowest, highest), got {bounds}")
    if norm not in ("linf", "l2"):
        raise ValueError(f"{op}: norm must be 'linf' or 'l2', got {norm!r}")

    native_path = use_native(x_adv) and not varies(step_size, epsilon)
    if not native_path and in_transform():
        for name, tensor in (("x_adv", x_adv), ("grad", grad), ("x", x)):
            if derived(tensor):
                raise ValueError(
                    f"{op}: {name} carries a derivative, and the step has none; pass .detach()"
                )
    if torch.is_grad_enabled():
        grad, x = grad.detach(), x.detach()
    if not grad.dtype == x.dtype == x_adv.dtype:
        # Not in the dtype of x_adv: a float32 gradient may be 0 in float16.
        dtype = torch.promote_types(x_adv.dtype, torch.promote_types(grad.dtype, x.dtype))
        grad, x = grad.to(dtype), x.to(dtype)
        if x_adv.dtype != dtype:
            return x_adv.copy_(
                pgd_step_(
                    x_adv.detach().to(dtype), grad, x,
                    step_size=step_size, epsilon=epsilon, bounds=bounds, norm=norm,
                )
            )  # fmt: skip
    if not native_path:
        return reference.pgd_step_(
            x_adv, grad, x,
            step_size=step_size, epsilon=epsilon, low=low, high=high, norm=norm,
        )  # fmt: skip
    native.pgd_step_(x_adv, grad, x, step_size, epsilon, low, high, norm == "l2")
    mark_overwritten(x_adv)
    return x_adv


@register_fake("pgd_step_")
def _(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    epsilon: float,
    low: float,
    high: float,
    l2: bool,
) -> None:
    torch._check(x_adv.shape == grad.shape == x.shape, lambda: "expected equal shapes")
