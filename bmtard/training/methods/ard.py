"""Adversarially Robust Distillation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bmtard import losses
from bmtard.attacks import Mode, RandomStart
from bmtard.training.methods.base import Method, Network


class ARD(Method):
    """Attacks the labels; see :func:`bmtard.losses.ard_loss`."""

    needs = ("robust",)
    start: ClassVar[RandomStart] = "uniform"
    clip_start: ClassVar[bool | None] = False
    attack_mode: ClassVar[Mode] = "train"

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        options = self.config.loss
        adversarial = student(x_adv)
        # Without the label term the loss does not look at the clean logits.
        clean = student(x) if options.ard_alpha != 1.0 else adversarial
        loss = losses.ard_loss(
            student_adversarial_logits=adversarial,
            student_clean_logits=clean,
            teacher_clean_logits=self.teach("robust", x),
            labels=labels,
            temperature=options.ard_temperature,
            alpha=options.ard_alpha,
            label_smoothing=options.label_smoothing,
        )
        return options.distillation_scale * loss
