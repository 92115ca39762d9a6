"""TRADES: yaodongyu/TRADES, trades.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmtard import losses
from bmtard.attacks import kl_from
from bmtard.dropin._common import check_distance, gaussian, l2_attack, linf_attack


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    exact: bool = True,
) -> Tensor:
    """TRADES (Zhang et al., ICML 2019): attacks with KL(S(x) || S(x')), then CE + beta * KL.

    The attack runs in eval mode from a 0.001 Gaussian start. Then the model is in train mode, its
    gradients are zeroed, and it runs three times: S(x) for the cross entropy, S(x'), and S(x) again
    for the divergence. So batch norm counts x twice and x' once, and with dropout the two S(x)
    differ. ``exact=False`` runs S(x) once for both terms and draws the start on the device: a
    training forward and backward pass less and no copy from the host, but other running
    statistics, another dropout and other random numbers than published.

    distance: "l_inf" or "l_2", whose step is 2 * epsilon / perturb_steps whatever ``step_size``.
    The published code takes any other word for "no attack"; here it is a ValueError.
    """
    check_distance("trades_loss", "distance", distance, ("l_inf", "l_2"))
    x_natural = x_natural.detach()
    model.eval()
    noise = gaussian(x_natural) if exact else 0.001 * torch.randn_like(x_natural)
    with torch.no_grad():
        attacked = kl_from(model(x_natural))
    if distance == "l_inf":
        x_adv = linf_attack(
            model, x_natural, x_natural + noise, attacked,
            step_size=step_size, epsilon=epsilon, steps=perturb_steps,
        )  # fmt: skip
    else:
        step_size = epsilon / max(perturb_steps, 1) * 2
        x_adv = l2_attack(
            model, x_natural, attacked, step_size=step_size, epsilon=epsilon, steps=perturb_steps
        )
    model.train()
    optimizer.zero_grad()
    clean = model(x_natural)
    return losses.trades_loss(
        clean_logits=clean,
        adversarial_logits=model(x_adv),
        target_logits=model(x_natural) if exact else clean,
        labels=y,
        beta=beta,
    )
