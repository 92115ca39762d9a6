"""Introspective Adversarial Distillation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bmtard.losses._rows import Rows, wide


def iad_loss(
    *,
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    teacher_clean_logits: Tensor,
    teacher_adversarial_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.1,
    introspect: bool = True,
    target_logits: Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """IAD-I (Zhu et al., ICLR 2022): trust the teacher less where it is wrong on x'.

    alpha T^2 batchmean KL(T(x)^T || S(x')^T) + alpha / N sum_i (1 - A_i) KL_i(S(x) || S(x'))
    + (1 - alpha) CE(S(x), y), with the trust A_i = T(x')_y ** beta. The second term has
    temperature 1 and its target S(x) is not detached; as in the released code, A_i does not weight
    the first term. The published loop leaves the second term out before epoch 60:
    ``introspect=False``. target_logits: S(x) of the second term from a forward pass of its own, as
    the published loop has it; by default ``student_clean_logits``.
    """
    if target_logits is None:
        target_logits = student_clean_logits
    rows = Rows(
        "iad_loss", "student_adversarial_logits", student_adversarial_logits, labels,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    adversarial, clean, target = rows.flat(
        student_adversarial_logits=student_adversarial_logits,
        student_clean_logits=student_clean_logits,
        target_logits=target_logits,
    )
    taught_clean, taught_adversarial = rows.taught(
        teacher_clean_logits=teacher_clean_logits,
        teacher_adversarial_logits=teacher_adversarial_logits,
    )
    distilled = rows.divergence(
        adversarial, taught_clean, temperature=temperature, student_temperature="teacher"
    )
    loss = alpha * temperature**2 * distilled
    if introspect:
        doubt = 1 - _trust(rows, taught_adversarial, beta)
        loss = loss + alpha * rows.divergence(adversarial, target, sample_weight=doubt)
    if alpha != 1.0:
        loss = loss + (1 - alpha) * rows.cross_entropy(clean)
    return rows.shaped(loss)


def iad2_loss(
    *,
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    robust_teacher_logits: Tensor,
    clean_teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    alpha1: float = 0.5,
    alpha2: float = 0.25,
    beta: float = 0.1,
    introspect: bool = True,
    reduction: str = "batchmean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """IAD-II (Zhu et al., ICLR 2022): a robust and a clean teacher, both on x'.

    (1 - alpha1 - alpha2) CE(S(x'), y) + alpha1 T^2 / N sum_i [A_i KL_i(R(x')^T || S(x')^T)
    + (1 - A_i) KL_i(S(x) || S(x'))] + alpha2 T^2 batchmean KL(N(x')^T || S(x')^T), with the trust
    A_i = R(x')_y ** beta. The target S(x) is not detached. ``introspect=False``, as in the first
    40 published epochs, sets every A_i to 1.
    """
    rows = Rows(
        "iad2_loss", "student_adversarial_logits", student_adversarial_logits, labels,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    adversarial, clean = rows.flat(
        student_adversarial_logits=student_adversarial_logits,
        student_clean_logits=student_clean_logits,
    )
    robust_taught, clean_taught = rows.taught(
        robust_teacher_logits=robust_teacher_logits, clean_teacher_logits=clean_teacher_logits
    )
    both: dict[str, Any] = {"temperature": temperature, "student_temperature": "teacher"}
    trust = _trust(rows, robust_taught, beta) if introspect else None
    robust = rows.divergence(adversarial, robust_taught, sample_weight=trust, **both)
    if trust is not None:
        robust = robust + rows.divergence(adversarial, clean, sample_weight=1 - trust)
    natural = rows.divergence(adversarial, clean_taught, **both)
    hard = rows.cross_entropy(adversarial)
    scale = temperature**2
    loss = (1 - alpha1 - alpha2) * hard + scale * (alpha1 * robust + alpha2 * natural)
    return rows.shaped(loss)


def _trust(rows: Rows, teacher_logits: Tensor, beta: float) -> Tensor:
    """The teacher's probability of the label, to the power beta: [N]."""
    return rows.at_label(wide(teacher_logits).softmax(1)) ** beta
