"""Several teachers: MTARD and B-MTARD."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bmtard.balance import BMTARDLoss, NormalizationLossBalance
from bmtard.ops import multi_teacher_kl
from bmtard.training.config import BalanceConfig, TrainConfig
from bmtard.training.methods.base import Method, Network


class MTARD(Method):
    """Teachers at temperature 1, weighted by :class:`bmtard.NormalizationLossBalance`.

    A robust teacher on adversarial and a clean one on clean images; or any K of two or more, each
    on the images that the configuration names.
    """

    needs = ("robust", "clean")
    watched: tuple[str, ...] = ("weights", "losses", "initial_losses")
    """buffers of the balance that metrics.jsonl shows"""

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

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        factor = self.config.optimizer.balance_factor(progress)
        self.balance.weight_lr.fill_(factor * self.config.balance.weight_lr)

    def observed(self) -> dict[str, Tensor]:
        return {name: getattr(self.balance, name) for name in self.watched}


class BMTARD(MTARD):
    """Balanced temperatures and weights; see :class:`bmtard.BMTARDLoss`."""

    watched = ("temperatures", "entropies", *MTARD.watched)

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

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        assert isinstance(self.balance, BMTARDLoss)
        factor = self.config.optimizer.balance_factor(progress)
        self.balance.temperature_lr.fill_(factor * self.config.balance.temperature_lr)

    def moves_after_use(self) -> list[Tensor]:
        assert isinstance(self.balance, BMTARDLoss)
        return [self.balance.temperatures] if self.balance.balance == "sign" else []
