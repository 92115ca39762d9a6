"""Decoupled Knowledge Distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from bmtard.losses._rows import Rows, wide
from bmtard.ops._checks import check_temperature


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    reduction: str = "batchmean",
    ignore_index: int | None = None,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) (Zhao et al., CVPR 2022); at least 2 classes.

    TCKD: KL of (p_y, 1 - p_y), teacher || student. NCKD: KL of the distributions over the other
    classes. All at temperature T; defaults of the published CIFAR-100 runs. The published code
    takes the label out by -1000 and the logarithm of 1 - p_y, which can be -inf; here both are
    formed from the logits. The teacher gets no gradient.
    """
    if reduction == "mean":
        raise ValueError("dkd_loss: reduction must be 'none', 'sum' or 'batchmean', got 'mean'")
    check_temperature("dkd_loss", "temperature", temperature)
    rows = Rows(
        "dkd_loss", "student_logits", student_logits, labels,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    if rows.classes < 2:
        raise ValueError(
            f"dkd_loss: student_logits must have 2 classes or more, got {rows.classes}"
        )
    binary, others = [], []
    (student,) = rows.flat(student_logits=student_logits)
    (teacher,) = rows.taught(teacher_logits=teacher_logits)
    for logits in (student, teacher):
        scaled = wide(logits) / temperature
        label = rows.at_label(scaled)
        rest = scaled.scatter(1, rows.labels.unsqueeze(1), -torch.inf)
        binary.append(torch.stack([label, rest.logsumexp(1)], 1))
        others.append(rest)
    loss = alpha * rows.divergence(*binary) + beta * rows.divergence(*others)
    return rows.shaped(temperature**2 * loss)
