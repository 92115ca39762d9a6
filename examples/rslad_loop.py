"""A robustness distillation loop (RSLAD) with its inner attack and its loss on the fused ops.

The lines that replace the hand-written attack and the sums over ``log(p + 1e-5)`` are marked.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bmtard.attacks import pgd
from bmtard.losses import rslad_loss


def train_epoch(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    """One pass over ``loader``; returns the last loss."""
    teacher.eval()
    student.train()
    loss = torch.zeros(())
    for images, _ in loader:
        images = images.to(device)
        with torch.no_grad():
            teacher_logits = teacher(images)
        adversarial = pgd(  # replaces the inner loop; the student is in train mode again after it
            student,
            images,
            epsilon=8 / 255,
            step_size=2 / 255,
            steps=10,
            loss="kl",
            target_logits=teacher_logits,
            random_start="gaussian",
        )
        optimizer.zero_grad()
        loss = rslad_loss(  # replaces 8 lines
            student_adversarial_logits=student(adversarial),
            student_clean_logits=student(images),
            teacher_clean_logits=teacher_logits,
        )
        loss.backward()
        optimizer.step()
    return loss.item()
