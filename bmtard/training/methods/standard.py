"""Natural training and standard adversarial training."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from bmtard.attacks import RandomStart
from bmtard.training.methods.base import Method, Network


class Natural(Method):
    """Cross entropy on clean images."""

    def perturb(self, student: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return x

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        return self.cross_entropy(student(x), labels)


class SAT(Method):
    """Standard adversarial training: cross entropy on PGD images (Madry et al., ICLR 2018)."""

    start: ClassVar[RandomStart] = "uniform"

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        return self.cross_entropy(student(x_adv), labels)
