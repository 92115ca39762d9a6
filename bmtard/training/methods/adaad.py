"""Adaptive Adversarial Distillation."""

from __future__ import annotations

from torch import Tensor, nn

from bmtard import losses
from bmtard.attacks import AttackLoss, kl_from_model
from bmtard.training.methods.base import Method, Network


class AdaAD(Method):
    """Attacks through student and teacher; see :func:`bmtard.losses.adaad_loss`."""

    needs = ("robust",)

    def objective(self, student: nn.Module, x: Tensor, labels: Tensor) -> AttackLoss:
        return kl_from_model(self._teachers["robust"])

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        options = self.config.loss
        adversarial, taught = student(x_adv), self.teach("robust", x_adv)
        # With alpha = 1 the loss does not look at the clean logits.
        clean, taught_clean = adversarial, taught
        if options.adaad_alpha != 1.0:
            clean, taught_clean = student(x), self.teach("robust", x)
        loss = losses.adaad_loss(
            student_adversarial_logits=adversarial,
            student_clean_logits=clean,
            teacher_adversarial_logits=taught,
            teacher_clean_logits=taught_clean,
            alpha=options.adaad_alpha,
        )
        return options.distillation_scale * loss
