"""The published loss functions, argument for argument: change the import and nothing else.

``from bmtard.dropin import trades_loss, mart_loss`` replaces the functions of the same names in
the TRADES and MART repositories. Attack and loss run on the fused ops; the logits-level losses
are in :mod:`bmtard.losses`, the attacks in :mod:`bmtard.attacks`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmtard import losses
from bmtard.attacks import pgd


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
) -> Tensor:
    """TRADES: attacks with KL(S(x) || S(x')) from a 0.001 Gaussian start, then the TRADES loss.

    As published, the attack runs in eval mode, and the model is in train mode and its gradients
    are zeroed on return. S(x) is computed once for the attack rather than once a step: in eval
    mode it is the same value. Only ``distance="l_inf"``; for others, see bmtard.attacks.pgd.
    """
    _check_distance("trades_loss", distance)
    model.eval()
    with torch.no_grad():
        target = model(x_natural)
    x_adv = pgd(
        model,
        x_natural,
        epsilon=epsilon,
        step_size=step_size,
        steps=perturb_steps,
        loss="kl",
        target_logits=target,
        random_start="gaussian",
    )
    model.train()
    optimizer.zero_grad()
    return losses.trades_loss(model(x_natural), model(x_adv), y, beta=beta)


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
    """MART: attacks with the cross entropy from a 0.001 Gaussian start, then the MART loss.

    Modes and gradients as in :func:`trades_loss`.
    """
    _check_distance("mart_loss", distance)
    model.eval()
    x_adv = pgd(
        model,
        x_natural,
        y,
        epsilon=epsilon,
        step_size=step_size,
        steps=perturb_steps,
        random_start="gaussian",
    )
    model.train()
    optimizer.zero_grad()
    return losses.mart_loss(model(x_natural), model(x_adv), y, beta=beta)


def _check_distance(op: str, distance: str) -> None:
    if distance != "l_inf":
        raise ValueError(f"{op}: distance must be 'l_inf', got {distance!r}")
