"""Learnable Boundary Guided Adversarial Training: dvlab-research/LBGAT, lbgat.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard.attacks import kl_from
from bmtard.dropin._common import check_distance, gaussian, linf_attack
from bmtard.ops import multi_teacher_kl


def lbgat_loss(
    model: nn.Module,
    model_teacher: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
) -> Tensor:
    """LBGAT (Cui et al., ICCV 2021): MSE(S(x'), T(x)) + CE(T(x), y) + beta KL(S(x) || S(x')).

    The teacher learns too: it gets gradient, stays in its mode, and belongs to ``optimizer``. The
    attack is TRADES' own, in eval mode. Then the student is in train mode, the gradients are
    zeroed, and S(x'), S(x) and T(x) run in this order. distance: "l_inf"; with "l_2" the published
    code raises an error inside PyTorch, and any other word is "no attack" there. Here both are a
    ValueError.
    """
    check_distance("lbgat_loss", "distance", distance, ("l_inf",))
    x_natural = x_natural.detach()
    model.eval()
    start = x_natural + gaussian(x_natural)
    with torch.no_grad():
        attacked = kl_from(model(x_natural))
    x_adv = linf_attack(
        model, x_natural, start, attacked,
        step_size=step_size, epsilon=epsilon, steps=perturb_steps,
    )  # fmt: skip
    model.train()
    optimizer.zero_grad()
    adversarial, clean, taught = model(x_adv), model(x_natural), model_teacher(x_natural)
    guided = F.mse_loss(adversarial, taught) + F.cross_entropy(taught, y)
    return guided + beta * multi_teacher_kl(adversarial, clean)[0]
