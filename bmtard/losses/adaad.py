"""Adaptive Adversarial Distillation."""

from __future__ import annotations

from torch import Tensor

from bmtard.losses._rows import Rows


def adaad_loss(
    *,
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    teacher_adversarial_logits: Tensor,
    teacher_clean_logits: Tensor,
    alpha: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """alpha KL(T(x') || S(x')) + (1 - alpha) KL(T(x) || S(x)) (Huang et al., CVPR 2023).

    reduction: "mean" (by N * C) in the CIFAR-10 code, "batchmean" in the CIFAR-100 code. The
    attack, :func:`bmtard.attacks.kl_from_model`, does send gradient through the teacher. With
    ``alpha=1`` the clean logits are not looked at.
    """
    rows = Rows(
        "adaad_loss", "student_adversarial_logits", student_adversarial_logits,
        mask=mask, reduction=reduction,
    )  # fmt: skip
    loss = alpha * rows.divergence(
        *rows.flat(student_adversarial_logits=student_adversarial_logits),
        *rows.taught(teacher_adversarial_logits=teacher_adversarial_logits),
    )
    if alpha != 1.0:
        clean = rows.divergence(
            *rows.flat(student_clean_logits=student_clean_logits),
            *rows.taught(teacher_clean_logits=teacher_clean_logits),
        )
        loss = loss + (1 - alpha) * clean
    return rows.shaped(loss)
