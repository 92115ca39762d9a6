"""Introspective Adversarial Distillation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bmtard import losses
from bmtard.attacks import Mode, RandomStart
from bmtard.training.methods.base import Method, Network


class _IAD(Method):
    start: ClassVar[RandomStart] = "uniform"
    clip_start: ClassVar[bool | None] = False
    attack_mode: ClassVar[Mode] = "train"


class IAD1(_IAD):
    """See :func:`bmtard.losses.iad_loss`. Attacks the labels."""

    needs = ("robust",)

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        options = self.config.loss
        return losses.iad_loss(
            student_adversarial_logits=student(x_adv),
            student_clean_logits=student(x),
            teacher_clean_logits=self.teach("robust", x),
            teacher_adversarial_logits=self.teach("robust", x_adv),
            labels=labels,
            temperature=options.iad_temperature,
            alpha=options.iad1_alpha,
            beta=options.iad_beta,
            introspect=self.progress >= options.iad1_begin,
            label_smoothing=options.label_smoothing,
        )


class IAD2(_IAD):
    """See :func:`bmtard.losses.iad2_loss`. Attacks the labels; both teachers see these images."""

    needs = ("robust", "clean")

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        options = self.config.loss
        introspect = self.progress >= options.iad2_begin
        adversarial = student(x_adv)
        return losses.iad2_loss(
            student_adversarial_logits=adversarial,
            # Without introspection the loss does not look at the clean logits.
            student_clean_logits=student(x) if introspect else adversarial,
            robust_teacher_logits=self.teach("robust", x_adv),
            clean_teacher_logits=self.teach("clean", x_adv),
            labels=labels,
            temperature=options.iad_temperature,
            alpha1=options.iad2_alpha_robust,
            alpha2=options.iad2_alpha_clean,
            beta=options.iad_beta,
            introspect=introspect,
            label_smoothing=options.label_smoothing,
        )
