"""Robust Soft Label Adversarial Distillation."""

from __future__ import annotations

from torch import Tensor, nn

from bmtard import losses
from bmtard.attacks import AttackLoss, kl_from
from bmtard.training.methods.base import Method, Network


class RSLAD(Method):
    """Attacks the teacher's clean logits; see :func:`bmtard.losses.rslad_loss`."""

    needs = ("robust",)

    def objective(self, student: nn.Module, x: Tensor, labels: Tensor) -> AttackLoss:
        return kl_from(self.teach("robust", x))

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        options = self.config.loss
        loss = losses.rslad_loss(
            student_adversarial_logits=student(x_adv),
            student_clean_logits=student(x),
            teacher_clean_logits=self.teach("robust", x),
            adversarial_weight=options.rslad_adversarial_weight,
        )
        return options.distillation_scale * loss
