"""TRADES."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmtard import losses
from bmtard.attacks import AttackLoss, kl_from
from bmtard.training.methods.base import Method, Network


class TRADES(Method):
    """Attacks the student's own clean logits; see :func:`bmtard.losses.trades_loss`."""

    def objective(self, student: nn.Module, x: Tensor, labels: Tensor) -> AttackLoss:
        # The first time that the loss is taken the student is in the attack's mode already.
        objectives: list[AttackLoss] = []

        def loss(logits: Tensor, x_adv: Tensor) -> Tensor:
            if not objectives:
                with torch.no_grad():
                    objectives.append(kl_from(student(x)))
            return objectives[0](logits, x_adv)

        return loss

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        options = self.config.loss
        return losses.trades_loss(
            clean_logits=student(x),
            adversarial_logits=student(x_adv),
            labels=labels,
            beta=options.trades_beta,
            label_smoothing=options.label_smoothing,
        )
