"""An existing TRADES training loop: only the import of the loss has changed.

Before: ``from trades import trades_loss``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bmtard.dropin import trades_loss


def train_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    """One pass over ``loader``; returns the last loss."""
    model.train()
    loss = torch.zeros(())
    for data, target in loader:
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        loss = trades_loss(
            model=model,
            x_natural=data,
            y=target,
            optimizer=optimizer,
            step_size=0.003,
            epsilon=0.031,
            perturb_steps=10,
            beta=6.0,
        )
        loss.backward()
        optimizer.step()
    return loss.item()
