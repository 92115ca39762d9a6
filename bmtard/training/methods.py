"""The training methods: what each attacks to make its images, and its loss from the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard import losses
from bmtard.attacks import AttackLoss, cross_entropy, kl_from, kl_from_model, pgd
from bmtard.balance import BMTARDLoss, NormalizationLossBalance
from bmtard.ops import multi_teacher_kl
from bmtard.training.config import BalanceConfig, TrainConfig
from bmtard.training.teachers import default_images

Network = Callable[[Tensor], Tensor]


class Method(nn.Module):
    """One training method. Its buffers are state that belongs in the checkpoint.

    A subclass names the teachers that it needs and gives the attacked loss and the training loss.
    ``teachers`` maps a role ("clean", "robust") to a frozen network in eval mode; they are no
    submodules, so that they are not saved again with each student.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def roles(cls, given: Sequence[str]) -> tuple[str, ...]:
        """The teachers that it takes where those ``given`` are there, in its own order."""
        return cls.needs

    def __init__(self, config: TrainConfig, teachers: dict[str, nn.Module]) -> None:
        super().__init__()
        roles = self.roles(tuple(teachers))
        if missing := [role for role in roles if role not in teachers]:
            options = " and ".join(f"--teacher-{role} CHECKPOINT" for role in missing)
            raise ValueError(f"method {config.method} needs {options}")
        self.config = config
        self._teachers = {role: teachers[role] for role in roles}
        self._images = {
            role: config.teachers[role].images if role in config.teachers else default_images(role)
            for role in roles
        }

    def seen(self) -> list[list[str]]:
        """Each teacher's role and the images that it sees where a method lets one choose."""
        return [[role, images] for role, images in self._images.items()]

    def teach(self, role: str, x: Tensor) -> Tensor:
        """The logits of a teacher."""
        with torch.no_grad():
            return self._teachers[role](x)

    def perturb(self, student: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        """The images of the adversarial terms."""
        attack = self.config.attack
        return pgd(
            student,
            x,
            epsilon=attack.epsilon,
            step_size=attack.step_size,
            steps=attack.steps,
            loss=self.objective(student, x, labels),
            norm=attack.norm,
            random_start=attack.random_start,
            mode=attack.batch_norm,
        )

    def objective(self, student: nn.Module, x: Tensor, labels: Tensor) -> AttackLoss:
        """What the attack maximises."""
        return cross_entropy(labels)

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        """The training loss, 0-d."""
        raise NotImplementedError

    def set_balance_factor(self, factor: float) -> None:
        """Scales the learning rates of the balance, where there is one."""

    def observed(self) -> dict[str, Tensor]:
        """State worth a plot: tensors [K], one entry a teacher in the order of ``roles``."""
        return {}


class Natural(Method):
    """Cross entropy on clean images."""

    def perturb(self, student: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return x

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student(x).float(), labels)


class SAT(Method):
    """Standard adversarial training: cross entropy on PGD images (Madry et al., ICLR 2018)."""

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student(x_adv).float(), labels)


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
        beta = self.config.loss.trades_beta
        return losses.trades_loss(
            clean_logits=student(x),
            adversarial_logits=student(x_adv),
            labels=labels,
            beta=beta,
        )


class ARD(Method):
    """See :func:`bmtard.losses.ard_loss`."""

    needs = ("robust",)

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
        )
        return options.distillation_scale * loss


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


class MTARD(Method):
    """Teachers at temperature 1, weighted by :class:`bmtard.NormalizationLossBalance`.

    A robust teacher on adversarial and a clean one on clean images; or any K of two or more, each
    on the images that the configuration names.
    """

    needs = ("robust", "clean")

    @classmethod
    def roles(cls, given: Sequence[str]) -> tuple[str, ...]:
        if len(given) < 2:
            return cls.needs
        return (*(r for r in cls.needs if r in given), *(r for r in given if r not in cls.needs))

    def __init__(self, config: TrainConfig, teachers: dict[str, nn.Module]) -> None:
        super().__init__(config, teachers)
        self.balance = self.build_balance(config.balance)

    def build_balance(self, options: BalanceConfig) -> NormalizationLossBalance | BMTARDLoss:
        return NormalizationLossBalance(len(self._teachers), weight_lr=options.weight_lr)

    def logits(
        self, student: Network, x: Tensor, x_adv: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of the student and of the teachers, each teacher on its own images."""
        images = {"adversarial": x_adv, "clean": x}
        taught = [self.teach(role, images[kind]) for role, kind in self._images.items()]
        # The student answers once to each kind, in the order of the teachers.
        answers = {kind: student(images[kind]) for kind in dict.fromkeys(self._images.values())}
        return [answers[kind] for kind in self._images.values()], taught

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        students, taught = self.logits(student, x, x_adv)
        kl = multi_teacher_kl(students, taught, reduction="mean", eps=self.config.balance.eps)
        weights = self.balance(kl.detach())
        return self.config.loss.distillation_scale * (weights.to(kl.dtype) * kl).sum()

    def set_balance_factor(self, factor: float) -> None:
        self.balance.weight_lr.fill_(factor * self.config.balance.weight_lr)

    def observed(self) -> dict[str, Tensor]:
        return {"weights": self.balance.weights, "losses": self.balance.losses}


class BMTARD(MTARD):
    """Balanced temperatures and weights; see :class:`bmtard.BMTARDLoss`."""

    def build_balance(self, options: BalanceConfig) -> NormalizationLossBalance | BMTARDLoss:
        return BMTARDLoss(
            len(self._teachers),
            balance=options.mode,
            temperature_bounds=options.temperature_bounds,
            temperature_lr=options.temperature_lr,
            temperature_momentum=options.temperature_momentum,
            weight_lr=options.weight_lr,
            loss_exponent=options.loss_exponent,
            eps=options.eps,
        )

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        students, taught = self.logits(student, x, x_adv)
        loss: Tensor = self.balance(students, taught)
        return self.config.loss.distillation_scale * loss

    def set_balance_factor(self, factor: float) -> None:
        super().set_balance_factor(factor)
        assert isinstance(self.balance, BMTARDLoss)
        self.balance.temperature_lr.fill_(factor * self.config.balance.temperature_lr)

    def observed(self) -> dict[str, Tensor]:
        names = ("temperatures", "entropies", "weights", "losses")
        return {name: getattr(self.balance, name) for name in names}


METHODS: dict[str, type[Method]] = {
    "natural": Natural,
    "sat": SAT,
    "trades": TRADES,
    "ard": ARD,
    "rslad": RSLAD,
    "adaad": AdaAD,
    "mtard": MTARD,
    "bmtard": BMTARD,
}
