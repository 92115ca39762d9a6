"""Adversarially Robust Distillation."""

from __future__ import annotations

from torch import Tensor

from bmtard.losses._rows import Rows


def ard_loss(
    *,
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    teacher_clean_logits: Tensor,
    labels: Tensor,
    temperature: float = 30.0,
    alpha: float = 1.0,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """alpha T^2 mean KL(T(x)^T || S(x')^T) + (1 - alpha) CE(S(x), y) (Goldblum et al., AAAI 2020).

    Both sides at temperature T; "mean" divides by N * C. The teacher sees clean images. With
    ``alpha=1`` the clean logits of the student are not looked at.
    """
    rows = Rows(
        "ard_loss", "student_adversarial_logits", student_adversarial_logits, labels,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    (adversarial,) = rows.flat(student_adversarial_logits=student_adversarial_logits)
    (taught,) = rows.taught(teacher_clean_logits=teacher_clean_logits)
    distilled = rows.divergence(
        adversarial, taught, temperature=temperature, student_temperature="teacher"
    )
    loss = alpha * temperature**2 * distilled
    if alpha != 1.0:
        (clean,) = rows.flat(student_clean_logits=student_clean_logits)
        loss = loss + (1 - alpha) * rows.cross_entropy(clean)
    return rows.shaped(loss)
