"""MTARD: zhaoshiji123/MTARD, mtard/mtard_loss.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmtard.dropin._common import gaussian, linf_attack, mean_cross_entropy


def mtard_inner_loss_ce(
    model: nn.Module,
    teacher_adv_model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
) -> tuple[Tensor, Tensor]:
    """MTARD (Zhao et al., ECCV 2022): S(x') and the robust teacher's T(x'), without gradient.

    x' maximises the cross entropy of the student in eval mode from a 0.001 Gaussian start; then the
    student is in train mode and its gradients are zeroed. ``beta`` is not used, as published. The
    outer loss is :func:`bmtard.losses.mtard_loss` or, balanced, :class:`bmtard.BMTARDLoss`.
    """
    x_natural = x_natural.detach()
    model.eval()
    x_adv = linf_attack(
        model, x_natural, x_natural + gaussian(x_natural), mean_cross_entropy(y),
        step_size=step_size, epsilon=epsilon, steps=perturb_steps,
    )  # fmt: skip
    model.train()
    optimizer.zero_grad()
    student_logits = model(x_adv)
    with torch.no_grad():
        teacher_logits = teacher_adv_model(x_adv)
    return student_logits, teacher_logits
