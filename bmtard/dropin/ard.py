"""ARD and IAD: goldblum/AdversariallyRobustDistillation, main.py; ZFancy/IAD, IAD-I.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bmtard.attacks import cross_entropy
from bmtard.dropin._common import linf_attack


class AttackPGD(nn.Module):
    """The network with its attack: ``forward(inputs, targets)`` returns S(x') and x'.

    config: "epsilon", "step_size", "num_steps". PGD on the cross entropy from a uniform start,
    which is not clipped to [0, 1] before the first step. The network stays in its mode: in train
    mode batch norm uses and counts the batches of the attack too. The outer losses are
    :func:`bmtard.losses.ard_loss` and :func:`bmtard.losses.iad_loss`.
    """

    def __init__(self, basic_net: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.basic_net = basic_net
        self.step_size = config["step_size"]
        self.epsilon = config["epsilon"]
        self.num_steps = config["num_steps"]

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        inputs = inputs.detach()
        x = inputs + torch.zeros_like(inputs).uniform_(-self.epsilon, self.epsilon)
        if self.num_steps:
            x = linf_attack(
                self.basic_net, inputs, x, cross_entropy(targets),
                step_size=self.step_size, epsilon=self.epsilon, steps=self.num_steps,
            )  # fmt: skip
        return self.basic_net(x), x
