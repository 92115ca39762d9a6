"""Losses of adversarial training and robustness distillation, on the fused ops.

Each equals its published code to rounding and takes logits [N, C], so it drops into a loop that
already has its forward passes. What each docstring names, because results depend on it:

- the reduction. "batchmean" divides a Kullback-Leibler divergence by N, "mean" by N * C;
- the ``eps`` in log(p + eps) of the target probabilities p;
- the temperatures, and whether the loss is multiplied by the temperature squared;
- which logits receive gradient. Teacher logits never do: they are detached here.

``labels`` are [N] int64. KL(p || q) is in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bmtard.ops import multi_teacher_kl


def trades_loss(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, *, beta: float = 6.0
) -> Tensor:
    """CE(S(x), y) + beta * batchmean KL(S(x) || S(x')) (Zhang et al., ICML 2019).

    Gradients flow to both logits; the target S(x) of the divergence is not detached.
    """
    robust = _kl(adversarial_logits, clean_logits, reduction="batchmean")
    return _cross_entropy(clean_logits, labels) + beta * robust


def mart_loss(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, *, beta: float = 6.0
) -> Tensor:
    """Boosted cross entropy + weighted divergence (Wang et al., ICLR 2020).

    CE(S(x'), y) - mean log(1.0001 - p'_j + 1e-12), where j is the most probable wrong class of x',
    + beta / N * sum_i KL_i(S(x) || S(x')) * (1.0000001 - p_y(x)). Gradients flow to both logits,
    also through the weight. The published divergence takes log(p' + 1e-12); here it is log p',
    which needs no such guard and differs only where p' is of that size.
    """
    probabilities = _wide(adversarial_logits).softmax(1)
    wrong = probabilities.scatter(1, labels.unsqueeze(1), -1.0).argmax(1, keepdim=True)
    wrong_probability = probabilities.gather(1, wrong).squeeze(1)
    margin = -(1.0001 - wrong_probability + 1e-12).log().mean()
    true_probability = _wide(clean_logits).softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    robust = _kl(
        adversarial_logits,
        clean_logits,
        sample_weight=1.0000001 - true_probability,
        reduction="batchmean",
    )
    return _cross_entropy(adversarial_logits, labels) + margin + beta * robust


def ard_loss(
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    teacher_clean_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 30.0,
    alpha: float = 1.0,
) -> Tensor:
    """alpha T^2 mean KL(T(x)^T || S(x')^T) + (1 - alpha) CE(S(x), y) (Goldblum et al., AAAI 2020).

    Both sides at temperature T; "mean" divides by N * C. The teacher sees clean images.
    """
    distilled = _kl(
        student_adversarial_logits,
        teacher_clean_logits.detach(),
        temperature=temperature,
        student_temperature=temperature,
        reduction="mean",
    )
    loss = alpha * temperature**2 * distilled
    if alpha != 1.0:
        loss = loss + (1 - alpha) * _cross_entropy(student_clean_logits, labels)
    return loss


def rslad_loss(
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    teacher_clean_logits: Tensor,
    *,
    adversarial_weight: float = 5 / 6,
    eps: float = 1e-5,
) -> Tensor:
    """a mean KL(T(x) || S(x')) + (1 - a) mean KL(T(x) || S(x)) (Zi et al., ICCV 2021).

    a = ``adversarial_weight``; log(p + eps) for the teacher; "mean" divides by N * C, and the
    published CIFAR-100 script multiplies that by 10.
    """
    robust, clean = multi_teacher_kl(
        [student_adversarial_logits, student_clean_logits],
        teacher_clean_logits.detach(),
        reduction="mean",
        eps=eps,
    )
    return adversarial_weight * robust + (1 - adversarial_weight) * clean


def iad_loss(
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    teacher_clean_logits: Tensor,
    teacher_adversarial_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.1,
    introspect: bool = True,
) -> Tensor:
    """IAD-I (Zhu et al., ICLR 2022): trust the teacher less where it is wrong on x'.

    alpha T^2 batchmean KL(T(x)^T || S(x')^T) + alpha / N sum_i (1 - A_i) KL_i(S(x) || S(x'))
    + (1 - alpha) CE(S(x), y), with the trust A_i = T(x')_y ** beta. The second term has
    temperature 1 and its target S(x) is not detached; as in the released code, A_i does not weight
    the first term. The published loop leaves the second term out before epoch 60:
    ``introspect=False``.
    """
    distilled = _kl(
        student_adversarial_logits,
        teacher_clean_logits.detach(),
        temperature=temperature,
        student_temperature=temperature,
        reduction="batchmean",
    )
    loss = alpha * temperature**2 * distilled
    if introspect:
        trust = _trust(teacher_adversarial_logits, labels, beta)
        loss = loss + alpha * _kl(
            student_adversarial_logits,
            student_clean_logits,
            sample_weight=1 - trust,
            reduction="batchmean",
        )
    if alpha != 1.0:
        loss = loss + (1 - alpha) * _cross_entropy(student_clean_logits, labels)
    return loss


def iad2_loss(
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    robust_teacher_logits: Tensor,
    clean_teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    alpha1: float = 0.5,
    alpha2: float = 0.25,
    beta: float = 0.1,
    introspect: bool = True,
) -> Tensor:
    """IAD-II (Zhu et al., ICLR 2022): a robust and a clean teacher, both on x'.

    (1 - alpha1 - alpha2) CE(S(x'), y) + alpha1 T^2 / N sum_i [A_i KL_i(R(x')^T || S(x')^T)
    + (1 - A_i) KL_i(S(x) || S(x'))] + alpha2 T^2 batchmean KL(N(x')^T || S(x')^T), with the trust
    A_i = R(x')_y ** beta. The target S(x) is not detached. ``introspect=False``, as in the first
    40 published epochs, sets every A_i to 1.
    """
    scale = temperature**2
    trust = _trust(robust_teacher_logits, labels, beta) if introspect else None
    kl_options = {"temperature": temperature, "student_temperature": temperature}
    robust = _kl(
        student_adversarial_logits,
        robust_teacher_logits.detach(),
        sample_weight=trust,
        reduction="batchmean",
        **kl_options,
    )
    if trust is not None:
        robust = robust + _kl(
            student_adversarial_logits,
            student_clean_logits,
            sample_weight=1 - trust,
            reduction="batchmean",
        )
    clean = _kl(
        student_adversarial_logits,
        clean_teacher_logits.detach(),
        reduction="batchmean",
        **kl_options,
    )
    hard = _cross_entropy(student_adversarial_logits, labels)
    return (1 - alpha1 - alpha2) * hard + scale * (alpha1 * robust + alpha2 * clean)


def adaad_loss(
    student_adversarial_logits: Tensor,
    student_clean_logits: Tensor,
    teacher_adversarial_logits: Tensor,
    teacher_clean_logits: Tensor,
    *,
    alpha: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """alpha KL(T(x') || S(x')) + (1 - alpha) KL(T(x) || S(x)) (Huang et al., CVPR 2023).

    reduction: "mean" (by N * C) in the CIFAR-10 code, "batchmean" in the CIFAR-100 code. The
    attack, :func:`bmtard.attacks.kl_from_model`, does send gradient through the teacher.
    """
    loss = alpha * _kl(
        student_adversarial_logits, teacher_adversarial_logits.detach(), reduction=reduction
    )
    if alpha != 1.0:
        clean = _kl(student_clean_logits, teacher_clean_logits.detach(), reduction=reduction)
        loss = loss + (1 - alpha) * clean
    return loss


def mtard_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    weights: Tensor,
    *,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """sum_k w_k KL(T_k || S_k), temperature 1 (Zhao et al., ECCV 2022).

    Entry k of both sequences comes from teacher k's own images: ``[student(x_adv), student(x)]``
    and ``[robust(x_adv), clean(x)]``. weights [K] get no gradient; MTARD takes them from
    :class:`bmtard.NormalizationLossBalance`, which needs the losses of
    ``bmtard.multi_teacher_kl`` without ``weight``. log(p + eps) for the teachers; "mean" divides
    by N * C, and the published CIFAR-100 script multiplies that by 10.
    """
    return multi_teacher_kl(
        student_logits,
        [logits.detach() for logits in teacher_logits],
        weight=weights.detach(),
        reduction=reduction,
        eps=eps,
    )


def _kl(student_logits: Tensor, target_logits: Tensor, **options: Any) -> Tensor:
    """One divergence, KL(target || student), as a scalar."""
    return multi_teacher_kl(student_logits, target_logits, **options)[0]


def _wide(logits: Tensor) -> Tensor:
    """Half types as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_wide(logits), labels)


def _trust(teacher_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """The teacher's probability of the label, to the power beta: [N], no gradient."""
    probabilities = _wide(teacher_logits.detach()).softmax(1)
    return probabilities.gather(1, labels.unsqueeze(1)).squeeze(1) ** beta
