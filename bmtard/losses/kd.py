"""Distillation from one teacher: forward and reverse KL, and the Jensen-Shannon divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmtard.losses._rows import Rows, wide
from bmtard.ops import multi_teacher_kl
from bmtard.ops._checks import check_temperature


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    scale_by_temperature: bool = True,
) -> Tensor:
    """T^2 KL(teacher^T || student^T), both sides at temperature T (Hinton et al., 2015).

    temperature: 1e-36 to 1e36, a float or a 0-d tensor, which may require grad. mask: bool [...],
    True for the rows that count (for token labels: ``labels != -100``); with it "batchmean" divides
    by their number. Returns 0-d, or [...] with reduction "none". The teacher gets no gradient.
    """
    rows, student, teacher = _pair("kd_loss", student_logits, teacher_logits, mask, reduction)
    return _tempered(rows, student, teacher, temperature, scale_by_temperature)


def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    scale_by_temperature: bool = True,
) -> Tensor:
    """T^2 KL(student^T || teacher^T), the mode-seeking direction (as in Gu et al., ICLR 2024).

    Arguments and result as in :func:`kd_loss`.
    """
    rows, student, teacher = _pair(
        "reverse_kl_loss", student_logits, teacher_logits, mask, reduction
    )
    return _tempered(rows, teacher, student, temperature, scale_by_temperature)


def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    scale_by_temperature: bool = False,
) -> Tensor:
    """Generalised Jensen-Shannon divergence (Agarwal et al., ICLR 2024).

    beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, P the teacher's and Q
    the student's probabilities at ``temperature``. beta: 0 to 1; as in Liger-Kernel and TRL, 0 is
    KL(P || Q), 1 is KL(Q || P), and neither multiplies by T^2. Otherwise as :func:`kd_loss`.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"jsd_loss: beta must be 0 to 1, got {beta}")
    rows, student, teacher = _pair("jsd_loss", student_logits, teacher_logits, mask, reduction)
    if beta in (0, 1):
        pair = (student, teacher) if beta == 0 else (teacher, student)
        return _tempered(rows, *pair, temperature, scale_by_temperature)
    _check_temperature(rows.op, temperature)
    student, teacher = wide(student) / temperature, wide(teacher) / temperature
    middle = torch.logaddexp(
        teacher.log_softmax(1) + math.log(beta), student.log_softmax(1) + math.log1p(-beta)
    )
    sides = multi_teacher_kl(middle, [teacher, student], reduction="none")
    loss = rows.reduced(beta * sides[0] + (1 - beta) * sides[1])
    return rows.shaped(loss * temperature**2 if scale_by_temperature else loss)


def _pair(
    op: str, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, reduction: str
) -> tuple[Rows, Tensor, Tensor]:
    """The rows, and both logits as [N, C]."""
    rows = Rows(op, "student_logits", student_logits, mask=mask, reduction=reduction)
    (student,) = rows.flat(student_logits=student_logits)
    (teacher,) = rows.taught(teacher_logits=teacher_logits)
    return rows, student, teacher


def _tempered(
    rows: Rows, student: Tensor, target: Tensor, temperature: float | Tensor, scale: bool
) -> Tensor:
    """KL(target^T || student^T), times T^2 if ``scale``."""
    _check_temperature(rows.op, temperature)
    loss = rows.divergence(student, target, temperature=temperature, student_temperature="teacher")
    if isinstance(temperature, Tensor):
        temperature = wide(temperature)
    return rows.shaped(loss * temperature**2 if scale else loss)


def _check_temperature(op: str, temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.dim():
            raise ValueError(
                f"{op}: temperature must be a float or 0-d, got {list(temperature.shape)}"
            )
    else:
        check_temperature(op, "temperature", temperature)
