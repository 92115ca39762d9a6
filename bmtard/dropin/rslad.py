"""RSLAD: zibojia/RSLAD, rslad_loss.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmtard.attacks import kl_from
from bmtard.dropin._common import gaussian, linf_attack


def rslad_inner_loss(
    model: nn.Module,
    teacher_logits: Tensor,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
) -> Tensor:
    """RSLAD (Zi et al., ICCV 2021): S(x') of images that maximise KL(T(x) || S(x')).

    The attack runs in eval mode from a 0.001 Gaussian start; then the model is in train mode and
    its gradients are zeroed. ``y`` and ``beta`` are not used, as published. The outer loss is
    :func:`bmtard.losses.rslad_loss`.
    """
    x_natural = x_natural.detach()
    model.eval()
    x_adv = linf_attack(
        model, x_natural, x_natural + gaussian(x_natural), kl_from(teacher_logits),
        step_size=step_size, epsilon=epsilon, steps=perturb_steps,
    )  # fmt: skip
    model.train()
    optimizer.zero_grad()
    logits: Tensor = model(x_adv)
    return logits
