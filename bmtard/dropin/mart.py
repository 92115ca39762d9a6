"""MART: YisenWang/MART, mart.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmtard import losses
from bmtard.dropin._common import check_distance, gaussian, linf_attack, mean_cross_entropy


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: str = "l_inf",
) -> Tensor:
    """MART (Wang et al., ICLR 2020): attacks with the cross entropy, then the MART loss.

    The attack runs in eval mode from a 0.001 Gaussian start. Then the model is in train mode, its
    gradients are zeroed, and it runs on x and on x'. distance: "l_inf"; the published code takes
    any other word for "no attack", here it is a ValueError.
    """
    check_distance("mart_loss", "distance", distance, ("l_inf",))
    x_natural = x_natural.detach()
    model.eval()
    x_adv = linf_attack(
        model, x_natural, x_natural + gaussian(x_natural), mean_cross_entropy(y),
        step_size=step_size, epsilon=epsilon, steps=perturb_steps,
    )  # fmt: skip
    model.train()
    optimizer.zero_grad()
    return losses.mart_loss(
        clean_logits=model(x_natural), adversarial_logits=model(x_adv), labels=y, beta=beta
    )
