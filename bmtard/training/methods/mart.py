"""MART."""

from __future__ import annotations

from torch import Tensor

from bmtard import losses
from bmtard.training.methods.base import Method, Network


class MART(Method):
    """Attacks the labels; see :func:`bmtard.losses.mart_loss`."""

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        return losses.mart_loss(
            clean_logits=student(x),
            adversarial_logits=student(x_adv),
            labels=labels,
            beta=self.config.loss.mart_beta,
            label_smoothing=self.config.loss.label_smoothing,
        )
