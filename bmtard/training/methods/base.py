"""What every training method is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard.attacks import AttackLoss, Mode, RandomStart, cross_entropy, pgd
from bmtard.training.config import TrainConfig
from bmtard.training.ranks import ALONE, Ranks
from bmtard.training.teachers import default_images
from bmtard.types import WHOLE, Share

Network = Callable[[Tensor], Tensor]


class Method(nn.Module):
    """One training method. Its buffers are state that belongs in the checkpoint.

    A subclass names the teachers that it needs and gives the attacked loss and the training loss;
    its buffers move in train mode alone: adversarial weight perturbation takes the loss in eval
    mode beforehand. ``teachers`` maps a role ("clean", "robust") to a frozen network in eval mode;
    they are no submodules, so that they are not saved again with each student.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """roles of the teachers"""
    start: ClassVar[RandomStart] = "gaussian"
    """of the published attack"""
    clip_start: ClassVar[bool | None] = None
    """of the published attack, see :func:`bmtard.attacks.pgd`"""
    attack_mode: ClassVar[Mode] = "eval"
    """of the student in the published attack"""

    progress: float
    """the part of the training that is done, in [0, 1)"""
    share: Share = WHOLE
    """which part of each batch this process has; for :func:`bmtard.attacks.random_like`"""
    ranks: Ranks = ALONE
    """the processes that train together; ``ranks.mean_`` averages state that the images decide"""

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
        self.config, self.progress = config, 0.0
        self._teachers = {role: teachers[role] for role in roles}
        self._images = {
            role: config.teachers[role].images if role in config.teachers else default_images(role)
            for role in roles
        }

    def seen(self) -> list[list[str]]:
        """Each teacher's role and the images that it sees where a method lets one choose."""
        return [[role, images] for role, images in self._images.items()]

    def join(self, ranks: Ranks) -> None:
        """Makes this one of several processes that train together: one state of the balance."""
        self.ranks, self.share = ranks, ranks.share
        for module in self.modules():
            if hasattr(module, "process_group"):
                setattr(module, "process_group", ranks.group)  # noqa: B010 (mypy takes it for a buffer)

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
            random_start=self.start if attack.as_published else attack.random_start,
            clip_start=self.clip_start if attack.as_published else None,
            mode=self.attack_mode if attack.as_published else attack.batch_norm,
            share=self.share,
        )

    def objective(self, student: nn.Module, x: Tensor, labels: Tensor) -> AttackLoss:
        """What the attack maximises."""
        return cross_entropy(labels)

    def loss(self, student: Network, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        """The training loss, 0-d."""
        raise NotImplementedError

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """With the labels, smoothed by ``loss.label_smoothing``; half logits in float32."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels, label_smoothing=self.config.loss.label_smoothing)

    def set_progress(self, progress: float) -> None:
        """Called before every step."""
        self.progress = progress

    def moves_after_use(self) -> list[Tensor]:
        """Buffers that the loss moves after it has used them; the others move before."""
        return []

    def observed(self) -> dict[str, Tensor]:
        """State worth a plot: tensors [K], one entry a teacher in the order of ``roles``."""
        return {}
