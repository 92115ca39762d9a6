"""One step of the balanced loss: contract, autograd, fake kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmtard.ops._checks import check_pair
from bmtard.ops._dispatch import (
    AttachGradients,
    all_rows,
    derived,
    distinct,
    fake_rows,
    in_transform,
    mark_overwritten,
    native,
    once_differentiable,
    register_fake,
    save,
    saved,
    times_incoming,
    wants_gradient,
)
from bmtard.reference import accumulation_dtype
from bmtard.types import BalanceState


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
    students, teachers = map(
        all_rows, balanced_pairs(student_logits, teacher_logits, state.weights)
    )
    first = students[0]
    wants_grad = wants_gradient(*students)
    inputs = (
        teachers, *state, update, mode == "sign", *bounds, temperature_momentum, loss_exponent,
        student_temperature, eps,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        # The op changes the state, so it runs outside of autograd. It returns the gradients with
        # the loss; AttachGradients hands them to autograd.
        loss, grads, factor = torch.ops.bmtard.bmtard_loss_of_any_size.default(
            [s.detach() for s in students] if wants_grad else students,
            *inputs, reduction, tolerance, max_iterations, wants_grad,
        )  # fmt: skip
        if not wants_grad:
            return loss
        # The powers of two cancel. Backward, they divide the incoming gradient.
        loss = loss * factor
        attached = AttachGradients.apply("BMTARDLoss", loss, *grads.unbind(), *distinct(students))
        return attached / factor
    scale, headroom = _factors(first, reduction, student_temperature)
    arguments = (*inputs, scale, scale * headroom, tolerance, max_iterations, wants_grad)
    if wants_grad:
        loss = _BMTARDLoss.apply(headroom, arguments, *students)
    else:
        loss, _ = native.bmtard_loss(students, *arguments)
    if update:
        mark_overwritten(*state[:5], state.step, state.status)
    return loss


class _BMTARDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, headroom: float, arguments: tuple[Any, ...], *students: Tensor) -> Tensor:
        loss, grads = native.bmtard_loss(students, *arguments)
        ctx.headroom, ctx.given_away = headroom, False
        # The students are saved for create_graph alone: a second derivative by them must raise.
        save(ctx, grads, *students)
        return loss

    @staticmethod
    @once_differentiable("BMTARDLoss")
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (None, None, *times_incoming(ctx, saved(ctx)[0].unbind(), grad))


def _factors(logits: Tensor, reduction: str, student_temperature: float) -> tuple[float, float]:
    """Of the loss, and what its gradients get beyond that."""
    classes = logits.shape[-1]
    rows = logits.numel() // classes
    divisor = {"mean": rows * classes, "batchmean": rows, "sum": 1}[reduction]
    if not divisor:
        return math.nan, 1.0  # the mean of nothing
    headroom = 1.0
    if logits.dtype == torch.float16:
        # The gradients of a mean would underflow before they meet the large factor of a grad
        # scaler. So the op returns them larger: none exceeds 2^13. 2^100 times is float32 still.
        headroom = 2.0 ** min(13 + math.floor(math.log2(divisor * student_temperature)), 100)
    return 1.0 / divisor, headroom


def _loss_of_any_size(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, student_temperature, eps, reduction, tolerance, max_iterations, wants_grad = arguments
    scale, headroom = _factors(inputs[0][0], reduction, student_temperature)
    loss, grads = native.bmtard_loss(
        *inputs, student_temperature, eps, scale, scale * headroom, tolerance, max_iterations,
        wants_grad,
    )  # fmt: skip
    return loss, grads, torch.full_like(loss, headroom)


if native:
    # For torch.compile, which compiles again for each value of a float argument: here those that
    # follow from the size of the batch are computed inside.
    _library = torch.library.Library("bmtard", "FRAGMENT")
    _library.define(
        "bmtard_loss_of_any_size(Tensor[] student_logits, Tensor[] teacher_logits, "
        "Tensor(a!) temperatures, Tensor(b!) weights, Tensor(c!) initial_losses, "
        "Tensor(d!) entropies, Tensor(e!) losses, Tensor temperature_lr, Tensor weight_lr, "
        "Tensor(f!) step, Tensor(g!) status, bool update, bool sign, float low, float high, "
        "float temperature_momentum, float loss_exponent, float student_temperature, float eps, "
        "str reduction, float tolerance, int max_iterations, bool wants_grad) "
        "-> (Tensor, Tensor, Tensor)"
    )
    for _key in ("CPU", "CUDA"):
        _library.impl("bmtard_loss_of_any_size", _loss_of_any_size, _key)


def balanced_pairs(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], weights: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Checks the inputs of :class:`BMTARDLoss` and returns both as lists of K tensors."""
    op, count = "BMTARDLoss", weights.numel()
    students, teachers = check_pair(op, student_logits, teacher_logits)
    for name, side, given in (
        ("student_logits", students, student_logits),
        ("teacher_logits", teachers, teacher_logits),
    ):
        if len(side) != count:
            came = f"one Tensor {list(given.shape)}" if isinstance(given, Tensor) else len(side)
            raise ValueError(
                f"{op}: {name} must be a sequence of {count} tensors, one for each teacher, "
                f"got {came}"
            )
    transform = in_transform()
    if transform or torch.is_grad_enabled():
        for k, logits in enumerate(teachers):
            if transform or logits.requires_grad:
                check_constant(op, k, logits)
    if weights.device != students[0].device:
        raise ValueError(
            f"{op}: the module's state must be on the device of student_logits, "
            f"{students[0].device}, got {weights.device}; move the module with .to()"
        )
    return students, teachers


def check_constant(op: str, k: int, teacher_logits: Tensor) -> None:
    """Refuses logits of teacher ``k`` that require a gradient: the balance gives them none."""
    if derived(teacher_logits):
        raise ValueError(
            f"{op}: teacher_logits[{k}] requires grad, but the balance treats the teachers as "
            "constants; run them under torch.no_grad() or pass .detach()"
        )


@register_fake("bmtard_loss")
def _fake(students: Sequence[Tensor], teachers: Sequence[Tensor], *rest: Any) -> Any:
    n, c = fake_rows(students[0]), students[0].shape[1]
    wants_grad = rest[-1]
    acc = accumulation_dtype(students[0].dtype)
    return (
        students[0].new_empty((), dtype=acc),
        students[0].new_empty((len(students) if wants_grad else 0, n, c)),
    )


@register_fake("bmtard_loss_of_any_size")
def _(students: Sequence[Tensor], teachers: Sequence[Tensor], *rest: Any) -> Any:
    loss, grads = _fake(students, teachers, *rest)
    return loss, grads, torch.empty_like(loss)
