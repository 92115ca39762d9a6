"""Helper-based Adversarial Training: imrahulr/hat, core/utils/hat.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard import losses
from bmtard.attacks import kl_from, module_mode
from bmtard.dropin._common import check_distance, gaussian, l2_attack, linf_attack


def hat_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    h: float = 3.5,
    beta: float = 1.0,
    gamma: float = 1.0,
    attack: str = "linf-pgd",
    hr_model: nn.Module | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """HAT (Rade and Moosavi-Dezfooli, ICLR 2022): TRADES + gamma CE(S(x + h (x' - x)), H(x')).

    H(x') is the class that ``hr_model``, in eval mode, gives to x'. The attack is TRADES' own, in
    eval mode, "linf-pgd" or "l2-pgd" (with this ``step_size``). Then the model is in train mode,
    its gradients are zeroed, and it runs on x, x' and x + h (x' - x). Returns the loss and, read on
    the host as published, "loss", "clean_acc", "adversarial_acc" and "helper_acc".
    """
    check_distance("hat_loss", "attack", attack, ("linf-pgd", "l2-pgd"))
    if hr_model is None:
        raise ValueError("hat_loss: hr_model must be a network, got None")
    x = x.detach()
    model.eval()
    noise = gaussian(x)
    with torch.no_grad():
        attacked = kl_from(model(x))
    if attack == "linf-pgd":
        x_adv = linf_attack(
            model, x, x + noise, attacked,
            step_size=step_size, epsilon=epsilon, steps=perturb_steps,
        )  # fmt: skip
    else:
        x_adv = l2_attack(
            model, x, attacked, step_size=step_size, epsilon=epsilon, steps=perturb_steps
        )
    model.train()
    x_help = x + h * (x_adv - x)
    with module_mode(hr_model, "eval"), torch.no_grad():
        y_help = hr_model(x_adv).argmax(dim=1)

    optimizer.zero_grad()
    clean, adversarial, helped = model(x), model(x_adv), model(x_help)
    loss = losses.trades_loss(
        clean_logits=clean, adversarial_logits=adversarial, labels=y, beta=beta
    )
    loss = loss + gamma * F.cross_entropy(helped, y_help)
    metrics = {
        "loss": loss.item(),
        "adversarial_acc": _accuracy(adversarial, y),
        "helper_acc": _accuracy(helped, y_help),
        "clean_acc": _accuracy(clean, y),
    }
    return loss, metrics


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).float().mean().item()
