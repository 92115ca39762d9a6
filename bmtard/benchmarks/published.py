"""The released training script of B-MTARD in eager torch: its head, and its whole step.

The eager provider times it, and every provider's training step must agree with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import training_step
from .ops.bmtard_loss import BOUNDS, EPS, TEMPERATURE_LR, WEIGHT_LR
from .training_step import TrainingInputs, TrainingStep


def wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def published_losses(
    students: list[Tensor], teachers: list[Tensor], temperatures: list[float] | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """KL and negative entropy of each teacher, means over N * C. The softmax of a teacher is
    computed once for each, as the script does."""
    losses, entropies = [], []
    for k, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        log_q = torch.log_softmax(wide(student), dim=1)
        p = torch.softmax(wide(teacher) / temperatures[k], dim=1)
        losses.append(torch.mean(-log_q * p + torch.log(p + EPS) * p))
        p = torch.softmax(wide(teacher) / temperatures[k], dim=1)
        entropies.append(torch.mean(torch.log(p + EPS) * p))
    return losses, entropies


class PublishedHead:
    """The balance of the released script, state in Python floats, a ``.item()`` for each value.

    The script has two teachers; more are compared with the mean of the others.
    """

    def __init__(self, count: int) -> None:
        self.temperatures = [1.0] * count
        self.weights = [1 / count] * count
        self.initial: list[float] | None = None

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        losses, entropies = published_losses(students, teachers, self.temperatures)
        moved = []
        for k, temperature in enumerate(self.temperatures):
            others = [entropy for j, entropy in enumerate(entropies) if j != k]
            step = 0.0
            if others:
                other = others[0] if len(others) == 1 else torch.stack(others).mean()
                ratio = entropies[k].detach() / other.detach()
                step = TEMPERATURE_LR * torch.sign(ratio - 1).item()
            moved.append(max(min(BOUNDS[1], temperature - step), BOUNDS[0]))
        self.temperatures = moved
        if self.initial is None:
            self.initial = [loss.item() for loss in losses]
        relative = [loss.item() / first for loss, first in zip(losses, self.initial, strict=True)]
        for loss in losses:  # for an average that the script does not use
            loss.item()
        mean = sum(relative) / len(relative)
        relative = [value / mean for value in relative]
        self.weights = [
            max(weight - WEIGHT_LR * (weight - value / sum(relative)), 0.0)
            for weight, value in zip(self.weights, relative, strict=True)
        ]
        total = sum(self.weights)
        self.weights = [weight / total for weight in self.weights]
        loss = self.weights[0] * losses[0]
        for weight, other in zip(self.weights[1:], losses[1:], strict=True):
            loss = loss + weight * other
        return loss


class PublishedStep(TrainingStep):
    """The training step of the released script and of the attack that it imports.

    The script draws the random start on the host and copies it. Here it is drawn on the device, in
    the script's favour, so that both providers start from the same numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.balance = PublishedHead(2)

    def attack(self, student: nn.Module, inputs: TrainingInputs) -> Tensor:
        x = inputs.x
        student.eval()
        x_adv = x.detach() + 0.001 * torch.randn(x.shape, device=x.device)
        for _ in range(training_step.STEPS):
            x_adv.requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(student(x_adv), inputs.labels)
            grad = torch.autograd.grad(loss, [x_adv])[0]
            x_adv = x_adv.detach() + training_step.STEP_SIZE * torch.sign(grad.detach())
            x_adv = torch.min(
                torch.max(x_adv, x - training_step.EPSILON), x + training_step.EPSILON
            )
            x_adv = torch.clamp(x_adv, 0.0, 1.0)
        student.train()
        return torch.clamp(x_adv, 0.0, 1.0)

    def head(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        return self.balance(students, teachers)

    def state(self) -> tuple[Any, Any]:
        return self.balance.temperatures, self.balance.weights
