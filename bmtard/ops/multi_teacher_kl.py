"""Divergence of several teachers from a student: contract, autograd, fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bmtard import reference
from bmtard.ops._checks import (
    HIGHEST,
    LOWEST,
    check_companion,
    check_eps,
    check_own_temperature,
    check_pair,
    check_temperature,
    is_number,
)
from bmtard.ops._dispatch import (
    AttachGradients,
    all_rows,
    distinct,
    fake_rows,
    is_batched,
    native,
    once_differentiable,
    recordable,
    register_fake,
    save,
    saved,
    split,
    use_native,
    varies,
    wants_gradient,
)
from bmtard.reference import accumulation_dtype

# In the order of csrc/ops/ops.h. Without sample weights, the last two are the same.
_REDUCTIONS = ("none", "sum", "mean", "batchmean", "weighted_mean")


def multi_teacher_kl(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    temperature: float | Tensor = 1.0,
    *,
    student_temperature: float | Tensor | Literal["teacher"] = 1.0,
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
    never NaN for a target probability of 0, and infinite for finite logits only where the KL itself
    exceeds the largest number of its dtype. (The gradients by teacher and temperature are not
    finite where log q exceeds it.)

    Args:
        student_logits: [..., C], or a sequence of K: entry k is compared with teacher k.
        teacher_logits: [..., C], or a sequence of K. A single tensor serves all of the other.
        temperature: of the teachers, 1e-36 to 1e36: a float, a 0-d tensor or [K]. The values of a
            tensor are not read on the host: outside of that range, L_k is NaN.
        student_temperature: likewise; or "teacher", each teacher's own: with one float for both
            sides that is ``temperature``, as in distillation after Hinton. A tensor costs one more
            pass over the student's logits.
        weight: [K]; the result is then sum_k weight_k L_k.
        sample_weight: one factor for each row, of the rows' shape or [K, *rows]; a bool mask counts
            as 1 where it is True. A row of weight 0 adds 0 to the loss and to every gradient,
            whatever its logits are.
        reduction: "none" keeps the rows; "sum" adds them; "batchmean" divides the sum by the
            number of rows N, masked or not; "weighted_mean" divides it by the sum of
            ``sample_weight``, so it is the mean over the unmasked rows; "mean" divides it by
            N * C, as the published B-MTARD, ARD and RSLAD code does.
        scale_by_temperature: multiplies L_k by temperature_k ** 2.
        eps: inside log(p + eps): 0, or 1e-36 to 1e36; the published B-MTARD code has 1e-5.

    Returns:
        [K] ([K, *rows] with "none"), or with ``weight`` a 0-d tensor ([*rows] with "none"), in
        nats; float64 for float64 logits, else float32. Differentiable once, in whichever of
        student, teacher, both temperatures, weight and sample_weight require it. Logits of
        different dtypes are promoted to a common one; each gradient has the dtype of its tensor.

    Raises:
        TypeError: another dtype. ValueError: shapes, devices or numbers that do not fit.
    """
    op = "multi_teacher_kl"
    students, teachers = check_pair(op, student_logits, teacher_logits)
    count, first = max(len(students), len(teachers)), students[0]
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    temperature = _checked("temperature", temperature, first, count)
    if isinstance(temperature, Tensor) and temperature.dtype in (torch.float16, torch.bfloat16):
        # Once: the parts of its gradient are added before they are rounded.
        temperature = recordable(temperature).to(torch.float32)
    if isinstance(student_temperature, str):
        check_own_temperature(op, student_temperature)
        student_temperature = temperature
    else:
        student_temperature = _checked("student_temperature", student_temperature, first, count)
    check_eps(op, eps)
    eps = float(eps)
    if weight is not None:
        if not isinstance(weight, Tensor):
            if not (isinstance(weight, (list, tuple)) and all(map(is_number, weight))):
                raise TypeError(
                    f"{op}: weight must be a tensor or a sequence of numbers, got {weight!r}"
                )
            weight = torch.tensor(
                weight, dtype=accumulation_dtype(first.dtype), device=first.device
            )
        check_companion(op, "weight", weight, first)
        if weight.shape != (count,):
            raise ValueError(
                f"{op}: weight must be [{count}] for {count} teachers, got {list(weight.shape)}"
            )
    if sample_weight is not None:
        if not isinstance(sample_weight, Tensor):
            raise TypeError(
                f"{op}: sample_weight must be a tensor, got {type(sample_weight).__name__}"
            )
        if sample_weight.dtype == torch.bool:
            sample_weight = sample_weight.to(accumulation_dtype(first.dtype))
        check_companion(op, "sample_weight", sample_weight, first)
        rows_shape = first.shape[:-1]
        if sample_weight.shape not in (rows_shape, (count, *rows_shape)):
            raise ValueError(
                f"{op}: sample_weight must be {list(rows_shape)} or {[count, *rows_shape]}, "
                f"got {list(sample_weight.shape)}"
            )

    if isinstance(student_temperature, Tensor):
        students = _divided(students, student_temperature, sample_weight)
        student_temperature, first = 1.0, students[0]
        teachers = [t.to(first.dtype) for t in teachers]
    dtype = accumulation_dtype(first.dtype)
    rows = first.numel() // first.shape[-1]
    if sample_weight is not None:
        # [1, N] or [K, N]. No -1: it has no meaning where N is 0.
        own = sample_weight.dim() == first.dim()
        sample_weight = recordable(sample_weight).to(dtype).reshape(count if own else 1, rows)
    if weight is not None:
        weight = recordable(weight).to(dtype)
    # Without sample weights, the autograd function of the op divides and adds as well.
    inner = reduction if sample_weight is None else "none"
    squared: float | Tensor = 1.0
    if scale_by_temperature:
        if isinstance(temperature, Tensor):
            squared = recordable(temperature).to(dtype).square()
        else:
            squared = temperature * temperature

    if not use_native(first) or varies(student_temperature, eps):
        kl = reference.multi_teacher_kl(
            students if len(students) == count else students * count,
            teachers if len(teachers) == count else teachers * count,
            temperature,
            student_temperature=student_temperature,
            eps=eps,
            sample_weight=None
            if sample_weight is None
            else sample_weight.view(len(sample_weight), *first.shape[:-1]),
        )
        kl = _reduced(kl.reshape(count, rows), inner, first)
    else:
        tensor, value = split(temperature, torch.float64, first)
        options = (value, student_temperature, eps)
        if not wants_gradient(tensor, *students, *teachers):
            kl, _ = _divergences(students, teachers, tensor, options, inner, False)
        elif (
            weight is not None
            and reduction != "none"
            and rows
            # A float16 gradient may underflow before it meets the large factor of a grad scaler.
            and first.dtype != torch.float16
            and len(students) == count
            and all(s.requires_grad for s in students)
            and not wants_gradient(tensor, weight, sample_weight, *teachers)
        ):
            # The gradients depend on nothing else, so the same launch computes them.
            coefficient = weight / _divisor(reduction, first, sample_weight)
            if scale_by_temperature:
                coefficient = coefficient * squared
            coefficient = coefficient.view(count, 1).expand(count, rows)
            if sample_weight is not None:
                coefficient = coefficient * sample_weight
            kl, grads = native.multi_teacher_kl_with_gradients(
                all_rows([s.detach() for s in students]), all_rows(teachers),
                tensor, *options, coefficient,
            )  # fmt: skip
            if sample_weight is not None:
                kl = _without_ignored(kl, sample_weight)
            loss = (kl * coefficient).sum()
            return AttachGradients.apply(op, loss, *grads, *distinct(all_rows(students)))
        else:
            kl = _MultiTeacherKL.apply(
                tensor, (options, len(students), inner), *distinct([*students, *teachers])
            )

    if sample_weight is not None:
        kl = _without_ignored(kl, sample_weight) * sample_weight
        kl = _reduced(kl, reduction, first, sample_weight)
    if scale_by_temperature:
        if isinstance(squared, Tensor) and squared.dim():
            squared = squared.view(count, *(1,) * (kl.dim() - 1))
        kl = kl * squared
    if weight is not None:
        # Not tensordot: autocast would run it in a half type.
        kl = (weight.view(count, *(1,) * (kl.dim() - 1)) * kl).sum(0)
    if reduction == "none" and first.dim() != 2:
        kl = kl.reshape((*kl.shape[:-1], *first.shape[:-1]))
    return kl


def _checked(name: str, temperature: float | Tensor, logits: Tensor, count: int) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        check_temperature("multi_teacher_kl", name, temperature)
        return float(temperature)
    check_companion("multi_teacher_kl", name, temperature, logits)
    if temperature.shape not in (torch.Size(()), torch.Size((count,))):
        raise ValueError(
            f"multi_teacher_kl: {name} must be a float, 0-d or [{count}] for {count} teachers, "
            f"got {list(temperature.shape)}"
        )
    return temperature


def _divided(
    students: Sequence[Tensor], temperature: Tensor, sample_weight: Tensor | None
) -> list[Tensor]:
    """Logits over a temperature, 0-d or [K], for the kernels, which take a float there.

    In the dtype of the results, and less the row's largest. Neither -inf nor a row of weight 0
    gives the temperature a gradient.
    """
    dtype = accumulation_dtype(students[0].dtype)
    temperature = recordable(temperature).to(dtype)
    allowed = (temperature >= LOWEST) & (temperature <= HIGHEST)
    temperature = temperature.where(allowed, torch.nan)
    count = max(len(students), temperature.numel())
    if sample_weight is not None and sample_weight.dim() == students[0].dim():
        count = len(sample_weight)
    divided = []
    for k in range(count):
        logits = students[k if len(students) > 1 else 0]
        logits = logits.to(dtype) - logits.detach().to(dtype).amax(-1, keepdim=True)
        masked = logits == -torch.inf
        if sample_weight is not None:
            own = sample_weight.dim() == logits.dim()
            ignored = (sample_weight[k] if own else sample_weight) == 0
            logits = logits.masked_fill(ignored.unsqueeze(-1), 0)
        one = temperature[k] if temperature.dim() else temperature
        scaled = logits.masked_fill(masked, 0) / one
        divided.append(scaled.masked_fill(masked, -torch.inf))
    return divided


def _divisor(reduction: str, logits: Tensor, sample_weight: Tensor | None = None) -> int | Tensor:
    """Of the sum over the rows: a number, or for "weighted_mean" [1] or [K]."""
    if reduction == "sum":
        return 1
    if reduction == "weighted_mean" and sample_weight is not None:
        return sample_weight.sum(1)
    classes = logits.shape[-1]
    rows = logits.numel() // classes
    return rows * classes if reduction == "mean" else rows


def _without_ignored(kl: Tensor, sample_weight: Tensor) -> Tensor:
    """0 for a KL that weight 0 would turn into NaN."""
    return kl.masked_fill((sample_weight == 0) & ~kl.isfinite(), 0)


def _reduced(
    kl: Tensor, reduction: str, logits: Tensor, sample_weight: Tensor | None = None
) -> Tensor:
    """[K, N] -> [K], but for "none". The mean of no rows is 0 / 0 = NaN."""
    if reduction == "none":
        return kl
    if reduction == "batchmean":
        return kl.mean(1)
    total = kl.sum(1)
    return total if reduction == "sum" else total / _divisor(reduction, logits, sample_weight)


_Options = tuple[float, float, float]
"""The temperature of the teachers (if there is no tensor), that of the student, and eps."""


def _divergences(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    temperature: Tensor | None,
    options: _Options,
    reduction: str,
    with_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """[K], or [K, N] for "none", and the statistics. On CUDA torch does the reduction."""
    on_cpu = students[0].is_cpu
    kl, statistics = native.multi_teacher_kl(
        all_rows(students), all_rows(teachers), temperature, *options,
        _REDUCTIONS.index(reduction) if on_cpu else 0, with_statistics,
    )  # fmt: skip
    return kl if on_cpu else _reduced(kl, reduction, students[0]), statistics


class _MultiTeacherKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        temperature: Tensor | None,
        settings: tuple[_Options, int, str],
        *logits: Tensor,
    ) -> Tensor:
        options, n, reduction = ctx.settings = settings
        kl, statistics = _divergences(logits[:n], logits[n:], temperature, options, reduction, True)
        save(ctx, temperature, statistics, *logits)
        return kl

    @staticmethod
    @once_differentiable("multi_teacher_kl")
    def backward(ctx: Any, grad: Tensor) -> Any:
        temperature, statistics, *logits = saved(ctx)
        wants_temperature, _, *wants = ctx.needs_input_grad
        if not torch.compiler.is_compiling() and is_batched(grad):
            raise NotImplementedError(
                "bmtard.multi_teacher_kl takes no batch of incoming gradients (is_grads_batched, "
                "vectorize=True, vmap over backward); use torch.func.jacrev"
            )
        options, n, reduction = ctx.settings
        rows, on_cpu = all_rows(logits), logits[0].is_cpu
        if not on_cpu and reduction not in ("none", "sum"):
            # From the shapes: torch.compile cannot keep a size that changes in ctx.
            grad = grad / _divisor(reduction, rows[0])
        computed = iter(
            native.multi_teacher_kl_backward(
                grad, rows[:n], rows[n:], temperature, *options,
                _REDUCTIONS.index(reduction) if on_cpu else 0, statistics,
                _mask(wants[:n]), _mask(wants[n:]), wants_temperature,
            )
        )  # fmt: skip
        grad_logits = [next(computed) if wanted else None for wanted in wants]
        if logits[0].dim() != 2:
            shape = logits[0].shape
            grad_logits = [grad if grad is None else grad.view(shape) for grad in grad_logits]
        grad_temperature = None
        if wants_temperature:
            grad_temperature = next(computed).sum(1).to(temperature.dtype)
            if temperature.dim() == 0:
                grad_temperature = grad_temperature.sum()
        return (grad_temperature, None, *grad_logits)


def _mask(wanted: Sequence[bool]) -> int:
    """The flags as bits: bit k is entry k."""
    bits = 0
    for k, one in enumerate(wanted):
        if one:
            bits |= 1 << k
    return bits


@register_fake("multi_teacher_kl")
def _(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    temperature: Tensor | None,
    value: float,
    student_temperature: float,
    eps: float,
    reduction: int,
    with_statistics: bool,
) -> Any:
    n, acc = fake_rows(students[0]), accumulation_dtype(students[0].dtype)
    k = max(len(students), len(teachers))
    kl = students[0].new_empty((k,) if reduction else (k, n), dtype=acc)
    return kl, kl.new_empty((5, k, n) if with_statistics else (0,))


@register_fake("multi_teacher_kl_with_gradients")
def _(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    temperature: Tensor | None,
    value: float,
    student_temperature: float,
    eps: float,
    coefficient: Tensor,
) -> Any:
    n, c = fake_rows(students[0]), students[0].shape[1]
    acc = accumulation_dtype(students[0].dtype)
    kl = students[0].new_empty((len(students), n), dtype=acc)
    return kl, [students[0].new_empty((n, c)) for _ in students]


@register_fake("multi_teacher_kl_backward")
def _(
    grad: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    temperature: Tensor | None,
    value: float,
    student_temperature: float,
    eps: float,
    reduction: int,
    statistics: Tensor,
    wants_students: int,
    wants_teachers: int,
    wants_temperature: bool,
) -> Any:
    n, c = fake_rows(students[0]), students[0].shape[1]
    k = max(len(students), len(teachers))
    count = wants_students.bit_count() + wants_teachers.bit_count()
    grads = [students[0].new_empty((n, c)) for _ in range(count)]
    return [*grads, grad.new_empty((k, n))] if wants_temperature else grads
