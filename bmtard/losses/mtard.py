"""Multi-Teacher Adversarial Robustness Distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bmtard.ops import multi_teacher_kl


def mtard_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """sum_k w_k KL(T_k || S_k), temperature 1 (Zhao et al., ECCV 2022).

    Entry k of both sequences comes from teacher k's own images: ``[student(x_adv), student(x)]``
    and ``[robust(x_adv), clean(x)]``. weights: [K], numbers or a tensor, which gets no gradient;
    MTARD takes them from :class:`bmtard.NormalizationLossBalance`, which needs the losses of
    ``bmtard.multi_teacher_kl`` without ``weight``. log(p + eps) for the teachers; "mean" divides
    by N * C, and the published CIFAR-100 script multiplies that by 10.
    """
    return multi_teacher_kl(
        student_logits,
        _constant(teacher_logits),
        weight=_constant(weights),
        reduction=reduction,
        eps=eps,
    )


def _constant(value: Any) -> Any:
    """Tensors in it without gradient; all else as it is, for the op to judge."""
    if isinstance(value, (list, tuple)):
        return [_constant(one) for one in value]
    return value.detach() if isinstance(value, Tensor) else value
