"""The public ops: contracts, the choice of native or reference path, autograd.

Every argument is checked here, once; the compiled kernels trust what they get. The autograd
functions stand outside the ops because the stable ABI knows no autograd, and because a Python
``autograd.Function`` around a stable op costs less than one registered with the dispatcher.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bmtard import _library, reference
from bmtard.reference import accumulation_dtype
from bmtard.types import BalanceState, TemperatureSearch

MAX_TEACHERS = 16
"""The largest K: the kernels take the K pointers by value."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = ("none", "sum", "mean", "batchmean")


class _Native:
    """The compiled ops as overloads, looked up once: each call saves a search by argument types."""

    def __init__(self) -> None:
        for name in (
            "softmax_entropy", "softmax_entropy_backward", "bisect_temperature",
            "multi_teacher_kl", "multi_teacher_kl_with_gradients", "multi_teacher_kl_backward",
            "bmtard_loss", "pgd_step_", "scale_",
        ):  # fmt: skip
            setattr(self, name, getattr(torch.ops.bmtard, name).default)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"bmtard's compiled op {name} is not loaded")


if _library.NATIVE:
    from bmtard import _fakes  # noqa: F401  (registers them)

_native: Any = _Native() if _library.NATIVE else None


def softmax_entropy(
    logits: Tensor, temperature: float | Tensor = 1.0, *, reduction: str = "none"
) -> Tensor:
    """Shannon entropy of ``softmax(logits / temperature)`` over the last dimension, in nats.

    Args:
        logits: [..., C], float64, float32, bfloat16 or float16, any strides. -inf masks a class.
        temperature: > 0, dimensionless: a float, a 0-d tensor, or a tensor of shape
            ``logits.shape[:-1]``. The values of a tensor are not read on the host: where one is
            not > 0, that entropy is NaN.
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
    _check_logits(op, "logits", logits)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    rows_shape = logits.shape[:-1]
    if isinstance(temperature, Tensor):
        _check_companion(op, "temperature", temperature, logits)
        if temperature.dim() and temperature.shape != rows_shape:
            raise ValueError(
                f"{op}: temperature must be a float, 0-d, or of shape {list(rows_shape)} for "
                f"logits {list(logits.shape)}, got {list(temperature.shape)}"
            )
    else:
        _check_positive(op, "temperature", temperature)

    if not use_native(logits):
        entropy = reference.softmax_entropy(logits, temperature)
    else:
        tensor, value = _split(temperature, accumulation_dtype(logits.dtype))
        if _wants_grad(logits, tensor):
            entropy = _SoftmaxEntropy.apply(logits, tensor, value)
        else:
            entropy = _native.softmax_entropy(_rows(logits), _flat(tensor), value)[0]
            entropy = entropy if logits.dim() == 2 else entropy.view(rows_shape)
    if reduction == "none":
        return entropy
    return entropy.mean() if reduction == "mean" else entropy.sum()


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
        bounds: (lowest, highest) temperature, 0 < lowest < highest.
        initial: where to start, shaped as ``target_entropy``; the temperature of the previous
            batch saves evaluations. Default: estimated from the variance of the logits.
        per_sample: one temperature for each row, instead of one for their mean entropy.
        tolerance: nats; 4 ulp of log C where that is more.
        max_iterations: entropy evaluations at most.
        method: "halley", a bracketed Halley iteration (3 to 4 evaluations are typical), or
            "bisection" (about 25).

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
    _check_logits(op, "logits", logits)
    rows_shape = logits.shape[:-1] if per_sample else torch.Size(())
    low, high = _check_bounds(op, bounds)
    if not (_is_number(tolerance) and math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"{op}: tolerance must be finite and >= 0, got {tolerance!r}")
    whole = isinstance(max_iterations, int) and not isinstance(max_iterations, bool)
    if not (whole and max_iterations >= 1):
        raise ValueError(f"{op}: max_iterations must be an integer >= 1, got {max_iterations!r}")
    if method not in ("halley", "bisection"):
        raise ValueError(f"{op}: method must be 'halley' or 'bisection', got {method!r}")
    dtype = accumulation_dtype(logits.dtype)
    target = _per_row(op, "target_entropy", target_entropy, logits, rows_shape, dtype)
    start = None
    if initial is not None:
        if not isinstance(initial, Tensor):
            _check_positive(op, "initial", initial)
        start = _per_row(op, "initial", initial, logits, rows_shape, dtype).detach()

    if not use_native(logits):
        expand = (lambda t: t.expand(rows_shape).flatten()) if per_sample else (lambda t: t)
        found = reference.bisect_temperature(
            _rows(logits),
            expand(target),
            low=low,
            high=high,
            initial=None if start is None else expand(start),
            per_sample=per_sample,
            tolerance=float(tolerance),
            max_iterations=max_iterations,
        )
        temperature, *rest = (field.view(rows_shape) for field in found)
        if temperature.requires_grad:
            temperature = _OnceDifferentiable.apply(op, temperature, logits, target)
        return TemperatureSearch(temperature, *rest)
    arguments = (
        low, high, bool(per_sample), float(tolerance), max_iterations, method == "bisection",
    )  # fmt: skip
    if _wants_grad(logits, target):
        return TemperatureSearch(*_BisectTemperature.apply(logits, target, start, *arguments))
    fields = _native.bisect_temperature(_rows(logits), _flat(target), _flat(start), *arguments)
    temperature, entropy, _, status, iterations = (field.view(rows_shape) for field in fields)
    return TemperatureSearch(temperature, entropy, status, iterations)


def multi_teacher_kl(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float = 1.0,
    weight: Tensor | Sequence[float] | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "batchmean",
    scale_by_temperature: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """KL of K teachers to a student, L_k = KL(p_k || q_k), computed from the logits.

    p_k = softmax(teacher_logits[k] / temperature_k) and
    q_k = softmax(student_logits[k] / student_temperature). Equivalent, for one teacher, to
    ``F.kl_div(log_softmax(student / student_temperature), softmax(teacher / temperature))``, but
    never NaN for a target probability of 0, and finite for any finite logits.

    Args:
        student_logits: [..., C], or a sequence of K: entry k is compared with teacher k.
        teacher_logits: [..., C], or a sequence of K. A single tensor serves all of the other.
        temperature: of the teachers, > 0: a float, a 0-d tensor or [K]. The values of a tensor
            are not read on the host.
        student_temperature: > 0.
        weight: [K]; the result is then sum_k weight_k L_k.
        sample_weight: one factor for each row: of the rows' shape, or [K, *rows].
        reduction: "none" keeps the rows; "sum" adds them; "batchmean" divides the sum by the
            number of rows N; "mean" divides it by N * C, as the published B-MTARD, ARD and RSLAD
            code does.
        scale_by_temperature: multiplies L_k by temperature_k ** 2.
        eps: inside log(p + eps); the published B-MTARD code has 1e-5.

    Returns:
        [K] ([K, *rows] with "none"), or with ``weight`` a 0-d tensor ([*rows] with "none"), in
        nats; float64 for float64 logits, else float32. Differentiable once, in whichever of
        student, teacher, temperature, weight and sample_weight require it. Logits of different
        dtypes are promoted to a common one; each gradient has the dtype of its tensor.

    Raises:
        TypeError: another dtype. ValueError: shapes, devices or numbers that do not fit.
    """
    op = "multi_teacher_kl"
    students, teachers = _pair(op, student_logits, teacher_logits)
    count, first = max(len(students), len(teachers)), students[0]
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    if isinstance(temperature, Tensor):
        _check_companion(op, "temperature", temperature, first)
        if temperature.shape not in (torch.Size(()), torch.Size((count,))):
            raise ValueError(
                f"{op}: temperature must be a float, 0-d or [{count}] for {count} teachers, "
                f"got {list(temperature.shape)}"
            )
    else:
        _check_positive(op, "temperature", temperature)
    _check_positive(op, "student_temperature", student_temperature)
    _check_eps(op, eps)
    rows_shape = first.shape[:-1]
    if weight is not None:
        if not isinstance(weight, Tensor):
            if not (isinstance(weight, (list, tuple)) and all(map(_is_number, weight))):
                raise TypeError(
                    f"{op}: weight must be a tensor or a sequence of numbers, got {weight!r}"
                )
            weight = torch.tensor(
                weight, dtype=accumulation_dtype(first.dtype), device=first.device
            )
        _check_companion(op, "weight", weight, first)
        if weight.shape != (count,):
            raise ValueError(
                f"{op}: weight must be [{count}] for {count} teachers, got {list(weight.shape)}"
            )
    if sample_weight is not None:
        if not isinstance(sample_weight, Tensor):
            raise TypeError(
                f"{op}: sample_weight must be a tensor, got {type(sample_weight).__name__}"
            )
        _check_companion(op, "sample_weight", sample_weight, first)
        if sample_weight.shape not in (rows_shape, (count, *rows_shape)):
            raise ValueError(
                f"{op}: sample_weight must be {list(rows_shape)} or {[count, *rows_shape]}, "
                f"got {list(sample_weight.shape)}"
            )

    dtype = accumulation_dtype(first.dtype)
    divisor = None  # of the sum over the rows; None: no sum
    if reduction != "none":
        classes = first.shape[-1]
        rows = first.numel() // classes
        divisor = {"sum": 1, "batchmean": rows, "mean": rows * classes}[reduction]
    # Without weights in between, the sum needs no node of its own in the graph.
    inner = divisor if sample_weight is None else None
    if not use_native(first):
        kl = reference.multi_teacher_kl(
            students if len(students) == count else students * count,
            teachers if len(teachers) == count else teachers * count,
            temperature,
            student_temperature=student_temperature,
            eps=eps,
        )
        if inner is not None:
            kl = _reduced(kl.flatten(1), inner)
    else:
        tensor, value = _split(temperature, torch.float64)
        wants_grad = _wants_grad(tensor, *students, *teachers)
        if (
            wants_grad
            and weight is not None
            and divisor
            # Its range asks for the gradient of the loss first, which a scaler makes large.
            and first.dtype != torch.float16
            and len(students) == count
            and all(s.requires_grad for s in students)
            and not _wants_grad(tensor, weight, sample_weight, *teachers)
        ):
            # All that the gradients need is known already: they come from the same launch.
            coefficient = weight.to(dtype) / divisor
            if scale_by_temperature:
                coefficient = coefficient * (temperature * temperature)
            coefficient = coefficient.to(dtype).view(count, 1).expand(count, rows)
            if sample_weight is not None:
                coefficient = coefficient * sample_weight.to(dtype).view(-1, rows)
            kl, grads = _native.multi_teacher_kl_with_gradients(
                [_rows(s.detach()) for s in students], [_rows(t) for t in teachers],
                tensor, value, student_temperature, eps, coefficient,
            )  # fmt: skip
            loss = (kl * coefficient).sum()
            return _AttachGradients.apply(op, 1.0, loss, *grads, *map(_rows, students))
        if wants_grad:
            kl = _MultiTeacherKL.apply(
                tensor, value, student_temperature, eps, len(students), inner,
                *students, *teachers,
            )  # fmt: skip
        else:
            kl = _native.multi_teacher_kl(
                [_rows(s) for s in students], [_rows(t) for t in teachers],
                tensor, value, student_temperature, eps, False,
            )[0]  # fmt: skip
            if inner is not None:
                kl = _reduced(kl, inner)
            elif first.dim() != 2:
                kl = kl.view(count, *rows_shape)

    if sample_weight is not None:
        kl = kl * sample_weight.to(dtype)
        if divisor is not None:
            kl = _reduced(kl.flatten(1), divisor)
    if scale_by_temperature:
        squared = temperature * temperature
        if isinstance(squared, Tensor):
            squared = squared.to(dtype)
            if squared.dim():
                squared = squared.view(count, *(1,) * (kl.dim() - 1))
        kl = kl * squared
    if weight is not None:
        # Not tensordot: autocast would run it in a half type.
        kl = (weight.to(dtype).view(count, *(1,) * (kl.dim() - 1)) * kl).sum(0)
    return kl


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
        x_adv: [N, ...], overwritten; any dense or strided layout.
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

    Source: Madry et al., ICLR 2018. Arithmetic is float32 for half types, rounded once at the end.
    """
    op = "pgd_step_"
    if not _same_kind(x_adv, (x_adv, grad, x)) or x_adv.dim() == 0:
        for name, tensor in (("x_adv", x_adv), ("grad", grad), ("x", x)):
            _check_floating(op, name, tensor)
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
    for name, value in (("step_size", step_size), ("epsilon", epsilon)):
        if not (_is_number(value) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{op}: {name} must be finite and >= 0, got {value}")
    low, high = (-math.inf, math.inf) if bounds is None else _two_numbers(op, "bounds", bounds)
    if not low <= high:
        raise ValueError(f"{op}: bounds must be (lowest, highest), got {bounds}")
    if norm not in ("linf", "l2"):
        raise ValueError(f"{op}: norm must be 'linf' or 'l2', got {norm!r}")

    if torch.is_grad_enabled():
        grad, x = grad.detach(), x.detach()
    if not use_native(x_adv):
        return reference.pgd_step_(
            x_adv, grad, x,
            step_size=step_size, epsilon=epsilon, low=low, high=high, norm=norm,
        )  # fmt: skip
    if not grad.dtype == x.dtype == x_adv.dtype:
        grad, x = grad.to(x_adv.dtype), x.to(x_adv.dtype)
    _native.pgd_step_(x_adv, grad, x, step_size, epsilon, low, high, norm == "l2")
    _mark_overwritten(x_adv)
    return x_adv


def bmtard_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    state: BalanceState,
    *,
    update: bool,
    mode: str,
    bounds: tuple[float, float],
    temperature_momentum: float,
    loss_exponent: float,
    student_temperature: float,
    eps: float,
    reduction: str,
    tolerance: float = 1e-6,
    max_iterations: int = 32,
) -> Tensor:
    """One step of the balanced loss in one native op, on the buffers of :class:`BMTARDLoss`.

    Both sequences hold K tensors [..., C]. Updates ``state`` in place where ``update``. Returns
    the 0-d loss, differentiable once in the student logits.
    """
    students, teachers = balanced_pairs(student_logits, teacher_logits, state.weights)
    first = students[0]
    if first.dim() != 2:
        students, teachers = [_rows(s) for s in students], [_rows(t) for t in teachers]
    rows, classes = students[0].shape
    divisor = {"mean": rows * classes, "batchmean": rows, "sum": 1}[reduction]
    scale = 1.0 / divisor if divisor else math.nan  # the mean of nothing

    headroom = 1.0
    if first.dtype == torch.float16 and divisor:
        # The gradients of a mean would be lost below its smallest number, before the gradient of
        # the loss, which a scaler makes large, can save them. As it is, none exceeds 2^13.
        headroom = 2.0 ** (13 + math.floor(math.log2(divisor * student_temperature)))
    wants_grad = _wants_grad(*students)
    # The op changes the state, so it stands outside of autograd; the gradients that it has
    # already computed are attached afterwards.
    loss, grads = _native.bmtard_loss(
        [s.detach() for s in students] if wants_grad else students, teachers, *state,
        update, mode == "sign", *bounds, temperature_momentum, loss_exponent,
        student_temperature, eps, scale, scale * headroom, tolerance, max_iterations, wants_grad,
    )  # fmt: skip
    if update:
        _mark_overwritten(*state[:5], state.step, state.status)
    if not wants_grad:
        return loss
    return _AttachGradients.apply("BMTARDLoss", headroom, loss, *grads.unbind(), *students)


def balanced_pairs(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], weights: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The contract of :class:`BMTARDLoss` on its inputs; both as lists of K."""
    op, count = "BMTARDLoss", weights.numel()
    students, teachers = _pair(op, student_logits, teacher_logits)
    for name, side in (("student_logits", students), ("teacher_logits", teachers)):
        if len(side) != count:
            raise ValueError(
                f"{op}: {name} must be a sequence of {count} tensors, one for each teacher, "
                f"got {len(side)}"
            )
    if torch.is_grad_enabled():
        for k, logits in enumerate(teachers):
            check_constant(op, k, logits)
    if weights.device != students[0].device:
        raise ValueError(
            f"{op}: the module's state must be on the device of student_logits, "
            f"{students[0].device}, got {weights.device}; move the module with .to()"
        )
    return students, teachers


def check_constant(op: str, k: int, teacher_logits: Tensor) -> None:
    """Refuses logits of teacher ``k`` that expect a gradient, as they would get none."""
    if teacher_logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: teacher_logits[{k}] requires grad, but the balance treats the teachers as "
            "constants; run them under torch.no_grad() or pass .detach()"
        )


# --- Autograd -------------------------------------------------------------------------------


def _once_differentiable(op: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A ``backward`` whose results raise, in the name of ``op`` or of ``ctx.op``, when they are
    differentiated again.

    torch's own decorator of that name raises a RuntimeError, and costs a grad-mode guard also in
    the usual case, where no graph of the gradients is wanted.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grad_outputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grad_outputs)
            with torch.no_grad():
                grads = backward(ctx, *grad_outputs)
            sources = (*grad_outputs, *ctx.saved_tensors)
            return _NoDoubleBackward.apply(op or ctx.op, len(grads), *grads, *sources)

        return wrapper

    return decorate


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.op = op
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(f"bmtard.{ctx.op} has no double backward")


class _OnceDifferentiable(torch.autograd.Function):
    """Passes ``value`` on; its gradient refuses to be differentiated by the inputs."""

    @staticmethod
    def forward(ctx: Any, op: str, value: Tensor, *inputs: Tensor) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(*inputs)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            (grad,) = _NoDoubleBackward.apply(ctx.op, 1, grad, *ctx.saved_tensors)
        return (None, grad, *(None,) * len(ctx.saved_tensors))


class _SoftmaxEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: Tensor | None, value: float) -> Tensor:
        entropy, statistics = _native.softmax_entropy(_rows(logits), _flat(temperature), value)
        ctx.value = value
        ctx.save_for_backward(logits, temperature, entropy, statistics)
        return entropy if logits.dim() == 2 else entropy.view(logits.shape[:-1])

    @staticmethod
    @_once_differentiable("softmax_entropy")
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, temperature, entropy, statistics = ctx.saved_tensors
        wants_logits, wants_temperature, _ = ctx.needs_input_grad
        grad_logits, grad_temperature = _native.softmax_entropy_backward(
            _flat(grad), _rows(logits), _flat(temperature), ctx.value, entropy, statistics,
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


class _BisectTemperature(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, initial: Tensor | None, *arguments: Any
    ) -> Any:
        temperature, entropy, slope, status, iterations = _native.bisect_temperature(
            _rows(logits), _flat(target), _flat(initial), *arguments
        )
        ctx.per_sample = arguments[2]
        ctx.save_for_backward(logits, target, temperature, slope, status)
        outputs = (temperature, entropy, status, iterations)
        if ctx.per_sample and logits.dim() != 2:
            outputs = tuple(field.view(logits.shape[:-1]) for field in outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @_once_differentiable("bisect_temperature")
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        logits, target, temperature, slope, status = ctx.saved_tensors
        # Implicit function theorem: d temperature / d target = temperature / slope,
        # d temperature / d logits = -(d entropy / d logits) temperature / slope.
        by_target = _flat(grad) * temperature / slope
        by_target = torch.where((status == 0) & (slope > 0), by_target, 0.0)
        grad_logits = grad_target = None
        if ctx.needs_input_grad[0]:
            rows = _rows(logits)
            by_row = -by_target if ctx.per_sample else -by_target / rows.shape[0]
            grad_logits = _native.softmax_entropy_backward(
                by_row, rows, temperature, 0.0,
                *_native.softmax_entropy(rows, temperature, 0.0), True, False,
            )[0].view(logits.shape)  # fmt: skip
        if ctx.needs_input_grad[1]:
            grad_target = by_target.sum() if target.dim() == 0 else by_target
            grad_target = grad_target.view(target.shape)
        return (grad_logits, grad_target, *(None,) * 7)


class _MultiTeacherKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        temperature: Tensor | None,
        value: float,
        student_temperature: float,
        eps: float,
        num_students: int,
        divisor: int | None,
        *logits: Tensor,
    ) -> Tensor:
        rows = [_rows(x) for x in logits]
        kl, statistics = _native.multi_teacher_kl(
            rows[:num_students], rows[num_students:],
            temperature, value, student_temperature, eps, True,
        )  # fmt: skip
        ctx.options = (value, student_temperature, eps)
        ctx.num_students, ctx.divisor = num_students, divisor
        ctx.save_for_backward(temperature, statistics, *logits)
        if divisor is not None:
            return _reduced(kl, divisor)
        return kl if logits[0].dim() == 2 else kl.view(kl.shape[0], *logits[0].shape[:-1])

    @staticmethod
    @_once_differentiable("multi_teacher_kl")
    def backward(ctx: Any, grad: Tensor) -> Any:
        temperature, statistics, *logits = ctx.saved_tensors
        wants_temperature, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        n = ctx.num_students
        rows = [_rows(x) for x in logits]
        if ctx.divisor is None:
            grad = grad.flatten(1)
        else:
            grad = grad if ctx.divisor == 1 else grad / ctx.divisor
            grad = grad.unsqueeze(1).expand(-1, rows[0].shape[0])
        grad_students, grad_teachers, grad_temperature = _native.multi_teacher_kl_backward(
            grad, rows[:n], rows[n:], temperature, *ctx.options, statistics,
            _mask(wants[:n]), _mask(wants[n:]), wants_temperature,
        )  # fmt: skip
        computed = iter([*grad_students, *grad_teachers])
        grad_logits = [
            next(computed).view(x.shape) if wanted else None
            for x, wanted in zip(logits, wants, strict=True)
        ]
        if not wants_temperature:
            grad_temperature = None
        else:
            grad_temperature = grad_temperature.sum(1).to(temperature.dtype)
            if temperature.dim() == 0:
                grad_temperature = grad_temperature.sum()
        return (grad_temperature, None, None, None, None, None, *grad_logits)


class _AttachGradients(torch.autograd.Function):
    """Gives a loss the gradients that were computed with it, as many as the students after them.

    They are ``headroom`` times too large.
    """

    @staticmethod
    def forward(ctx: Any, op: str, headroom: float, loss: Tensor, *tensors: Tensor) -> Tensor:
        ctx.op = op
        ctx.headroom = headroom
        ctx.given_away = False
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    @_once_differentiable()
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors
        grads = saved[: len(saved) // 2]
        if ctx.headroom != 1.0:
            grad = grad / ctx.headroom
        # The usual gradient of 1 costs a look, on the host or on the device, instead of a pass
        # over memory. What may be asked for again, or was given away, must stay as it is.
        if grad.is_cpu and not torch.compiler.is_compiling() and grad.item() == 1.0:
            ctx.given_away = True
        elif torch.compiler.is_compiling() or ctx.given_away or _graph_is_kept():
            grads = [(g.to(grad.dtype) * grad).to(g.dtype) for g in grads]
        else:
            _native.scale_(grads, grad)
        return (None, None, None, *(None,) * len(grads), *grads)


# Of torch itself, which asks it before it reuses the buffers of a compiled backward.
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


# --- Contracts ------------------------------------------------------------------------------


def use_native(tensor: Tensor) -> bool:
    """Whether compiled kernels serve the tensor's device; where none do, warns once."""
    if not _library.NATIVE:
        return False
    if tensor.is_cpu or (tensor.is_cuda and _library.has_cuda()):
        return True
    kind = tensor.device.type
    if kind not in _warned and not torch.compiler.is_compiling():
        _warned.add(kind)
        warnings.warn(
            f"bmtard has no compiled kernels for device '{kind}' here; "
            "using the slower plain-torch path",
            RuntimeWarning,
            stacklevel=4,
        )
    return False


_warned: set[str] = set()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_positive(op: str, name: str, value: float) -> None:
    if not _is_number(value):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be finite and > 0, got {value}")


def _check_eps(op: str, eps: float) -> None:
    if not (_is_number(eps) and math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps must be finite and >= 0, got {eps}")


def _two_numbers(op: str, name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2
    if not (pair and all(map(_is_number, bounds))):
        raise ValueError(f"{op}: {name} must be two numbers, (lowest, highest), got {bounds!r}")
    return float(bounds[0]), float(bounds[1])


def _check_bounds(
    op: str, bounds: tuple[float, float], name: str = "bounds"
) -> tuple[float, float]:
    low, high = _two_numbers(op, name, bounds)
    if not (0 < low < high and math.isfinite(high)):
        raise ValueError(f"{op}: {name} must satisfy 0 < lowest < highest, got {bounds}")
    return low, high


def _check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")


def _check_logits(op: str, name: str, logits: Tensor) -> None:
    _check_floating(op, name, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must be [..., C] with C >= 1, got {list(logits.shape)}")


def _check_companion(op: str, name: str, tensor: Tensor, logits: Tensor) -> None:
    """A floating-point tensor beside the logits, on their device."""
    _check_floating(op, name, tensor)
    if tensor.device != logits.device:
        raise ValueError(
            f"{op}: {name} must be on the device of the logits, {logits.device}, "
            f"got {tensor.device}"
        )


def _alike(students: Any, teachers: Any) -> bool:
    """Whether the logits keep the contract of :func:`_pair` as they are.

    The usual case, of which it costs a few microseconds less to be sure than to look for faults.
    """
    if type(students) not in (list, tuple) or type(teachers) not in (list, tuple):
        return False
    k, n = len(students), len(teachers)
    if not (0 < k <= MAX_TEACHERS and 0 < n <= MAX_TEACHERS and (k == n or 1 in (k, n))):
        return False
    first = students[0]
    return _same_kind(first, (*students, *teachers)) and bool(first.shape) and first.shape[-1] > 0


def _same_kind(first: Any, tensors: Sequence[Any]) -> bool:
    """Whether ``tensors`` are what the kernels take, and alike in shape, dtype and device."""
    if not isinstance(first, Tensor) or first.dtype not in _DTYPES:
        return False
    shape, dtype, device = first.shape, first.dtype, first.device
    for tensor in tensors:
        if not (
            isinstance(tensor, Tensor)
            and tensor.shape == shape
            and tensor.dtype is dtype
            and tensor.layout is torch.strided
            and tensor.device == device
        ):
            return False
    return True


def _pair(
    op: str, student_logits: Tensor | Sequence[Tensor], teacher_logits: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides as lists of 1 or K tensors of one shape, device and dtype."""
    given = [[x] if isinstance(x, Tensor) else x for x in (student_logits, teacher_logits)]
    if _alike(*given):
        return list(given[0]), list(given[1])
    sides: list[list[Tensor]] = []
    first, same_dtype = None, True
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        side = [logits] if isinstance(logits, Tensor) else logits
        if not isinstance(side, (list, tuple)):
            raise TypeError(
                f"{op}: {name} must be a tensor or a sequence of tensors, "
                f"got {type(logits).__name__}"
            )
        if not 1 <= len(side) <= MAX_TEACHERS:
            raise ValueError(f"{op}: {name} must hold 1 to {MAX_TEACHERS} tensors, got {len(side)}")
        for k, entry in enumerate(side):
            if first is None:
                _check_logits(op, name if side[0] is logits else f"{name}[0]", entry)
                first, shape, dtype, device = entry, entry.shape, entry.dtype, entry.device
            elif (
                not isinstance(entry, Tensor)
                or entry.dtype != dtype
                or entry.layout != torch.strided
            ):
                _check_logits(op, f"{name}[{k}]", entry)
                same_dtype = False
            if entry.shape != shape:
                raise ValueError(
                    f"{op}: {name}[{k}] must have the shape of student_logits, {list(shape)}, "
                    f"got {list(entry.shape)}"
                )
            if entry.device != device:
                raise ValueError(
                    f"{op}: {name}[{k}] must be on the device of student_logits, {device}, "
                    f"got {entry.device}"
                )
        sides.append(list(side))
    assert first is not None
    students, teachers = sides
    if len(students) != len(teachers) and 1 not in (len(students), len(teachers)):
        raise ValueError(
            f"{op}: student_logits and teacher_logits must hold equally many tensors, or one of "
            f"them a single one, got {len(students)} and {len(teachers)}"
        )
    if not same_dtype:
        dtype = first.dtype
        for entry in students + teachers:
            dtype = torch.promote_types(dtype, entry.dtype)
        students, teachers = [s.to(dtype) for s in students], [t.to(dtype) for t in teachers]
    return students, teachers


def _per_row(
    op: str,
    name: str,
    value: float | Tensor,
    logits: Tensor,
    rows_shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    """``value`` as a tensor of the rows' shape, or 0-d."""
    if not isinstance(value, Tensor):
        if not _is_number(value):
            raise TypeError(
                f"{op}: {name} must be a number or a tensor, got {type(value).__name__}"
            )
        return torch.full((), float(value), dtype=dtype, device=logits.device)
    _check_companion(op, name, value, logits)
    if value.dim() and value.shape != rows_shape:
        wanted = f"a float, 0-d or {list(rows_shape)}" if rows_shape else "a float or 0-d"
        raise ValueError(f"{op}: {name} must be {wanted}, got {list(value.shape)}")
    return value.to(dtype)


def _split(temperature: float | Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return temperature.to(dtype), 0.0
    return None, float(temperature)


def _wants_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _mark_overwritten(*tensors: Tensor) -> None:
    """Lets autograd notice that tensors which it may have saved were overwritten by an op."""
    if not (torch.compiler.is_compiling() or tensors[0].is_inference()):
        torch.autograd.graph.increment_version(tensors)


def _reduced(kl: Tensor, divisor: int) -> Tensor:
    """[K, N] -> [K], the sum over the rows by ``divisor``; the mean of no rows is 0 / 0 = NaN."""
    total = kl.sum(1)
    return total if divisor == 1 else total / divisor


def _mask(wanted: Sequence[bool]) -> int:
    """Bit k for entry k."""
    return sum(1 << k for k, one in enumerate(wanted) if one)


def _rows(logits: Tensor) -> Tensor:
    """[..., C] -> [N, C]."""
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def _flat(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() < 2 else tensor.flatten()
