"""Robust Soft Label Adversarial Distillation."""

from __future__ import annotations

from torch import Tensor

from bmtard.losses._rows import Rows
from bmtard.ops import multi_teacher_kl


def rslad_loss(
    *,
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    teacher_clean_logits: Tensor,
    adversarial_weight: float = 5 / 6,
    eps: float = 1e-5,
    reduction: str = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """a mean KL(T(x) || S(x')) + (1 - a) mean KL(T(x) || S(x)) (Zi et al., ICCV 2021).

    a = ``adversarial_weight``; log(p + eps) for the teacher; "mean" divides by N * C, and the
    published CIFAR-100 script multiplies that by 10.
    """
    rows = Rows(
        "rslad_loss", "student_adversarial_logits", student_adversarial_logits,
        mask=mask, reduction=reduction,
    )  # fmt: skip
    adversarial, clean = rows.flat(
        student_adversarial_logits=student_adversarial_logits,
        student_clean_logits=student_clean_logits,
    )
    (taught,) = rows.taught(teacher_clean_logits=teacher_clean_logits)
    each = reduction if mask is None else "none"
    kl = multi_teacher_kl([adversarial, clean], taught, reduction=each, eps=eps)
    loss = adversarial_weight * kl[0] + (1 - adversarial_weight) * kl[1]
    return rows.shaped(loss if mask is None else rows.reduced(loss))
