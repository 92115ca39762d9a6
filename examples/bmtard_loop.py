"""The B-MTARD loop: temperatures, loss weights and their state are one module.

What the published script does with ``.item()`` and Python floats after each loss happens inside
``BMTARDLoss``, on the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import bmtard
from bmtard.attacks import pgd


def train_epoch(
    student: nn.Module,
    robust_teacher: nn.Module,
    clean_teacher: nn.Module,
    criterion: bmtard.BMTARDLoss,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    """One pass over ``loader``; returns the last loss.

    ``criterion`` keeps the balance from epoch to epoch: save its ``state_dict()`` with the
    student's. ``BMTARDLoss(balance="sign", eps=1e-5)`` is the published arithmetic.
    """
    robust_teacher.eval()
    clean_teacher.eval()
    student.train()
    loss = torch.zeros(())
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        adversarial = pgd(
            student,
            images,
            labels,
            epsilon=8 / 255,
            step_size=2 / 255,
            steps=10,
            random_start="gaussian",
        )
        with torch.no_grad():
            teacher_logits = [robust_teacher(adversarial), clean_teacher(images)]
        optimizer.zero_grad()
        loss = criterion([student(adversarial), student(images)], teacher_logits)
        loss.backward()
        optimizer.step()
    return loss.item()
