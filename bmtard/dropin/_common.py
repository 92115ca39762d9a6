"""The attacks that the published functions share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard.attacks import GAUSSIAN_START, AttackLoss, pgd


def gaussian(x: Tensor) -> Tensor:
    """0.001 N(0, 1) in the shape of ``x``, drawn on the CPU whatever the device, as published."""
    return (GAUSSIAN_START * torch.randn(x.shape)).to(x)


def linf_attack(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    loss: AttackLoss,
    *,
    step_size: float,
    epsilon: float,
    steps: int,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """PGD from ``start`` in the mode that the model is in; inside ``bounds`` also with 0 steps."""
    if steps < 1:
        return start.clamp(*bounds)
    return pgd(
        model, x, epsilon=epsilon, step_size=step_size, steps=steps, loss=loss, start=start,
        bounds=bounds, mode="keep",
    )  # fmt: skip


def l2_attack(
    model: nn.Module, x: Tensor, loss: AttackLoss, *, step_size: float, epsilon: float, steps: int
) -> Tensor:
    """TRADES' l_2 attack: a start and a projection of its own, so not :func:`bmtard.pgd_step_`.

    Steps along the normalised gradient (a random direction where it is 0), clips to [0, 1], then
    shrinks to the ball.
    """
    delta = gaussian(x)
    for _ in range(steps):
        delta.requires_grad_()
        with torch.enable_grad():
            x_adv = x + delta
            (grad,) = torch.autograd.grad(loss(model(x_adv), x_adv), delta)
        norms = grad.flatten(1).norm(p=2, dim=1)
        grad = grad / norms.view(-1, *(1,) * (x.dim() - 1))
        still = norms == 0
        if still.any():
            # Their step descends, along -grad or along the random direction itself.
            grad[still] = -torch.randn_like(grad[still])
        delta = delta.detach() + step_size * grad
        delta = (delta + x).clamp(0, 1) - x
        delta = delta.renorm(p=2, dim=0, maxnorm=epsilon)
    return (x + delta.detach()).clamp(0, 1)


def mean_cross_entropy(labels: Tensor) -> AttackLoss:
    """The mean and not the sum: as published, also where a gradient of a sum would round."""
    return lambda logits, x_adv: F.cross_entropy(logits, labels)


def check_distance(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
