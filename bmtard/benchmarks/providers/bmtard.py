"""The ops under test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import bmtard
from bmtard.attacks import GAUSSIAN_START, pgd
from bmtard.models.fold import FoldedBatchNorm

from .. import training_step
from ..ops import bmtard_loss, pgd_step
from ..ops.bisect_temperature import SearchInputs
from ..ops.bmtard_loss import HeadInputs
from ..ops.multi_teacher_kl import KLInputs
from ..ops.pgd_step import StepInputs
from ..ops.softmax_entropy import EntropyInputs
from ..spec import Function, Outputs, Provider, Spec
from ..training_step import TrainingInputs, TrainingStep


class FusedStep(TrainingStep):
    """The loop of examples/b_mtard.py in the published mode, with options of the trainer.

    channels_last: the memory format of images and networks. folded: FoldedBatchNorm for the attack
    and the teachers. bfloat16: the networks under autocast.
    """

    def __init__(
        self, *, channels_last: bool = True, folded: bool = True, bfloat16: bool = False
    ) -> None:
        super().__init__()
        self.channels_last, self.folded, self.bfloat16 = channels_last, folded, bfloat16
        self.balance = bmtard.BMTARDLoss(balance="sign", eps=bmtard_loss.EPS)

    def start(self, inputs: TrainingInputs) -> TrainingInputs:
        inputs = super().start(inputs)
        self.balance.to(inputs.x.device)
        robust, clean, x = copy.deepcopy((inputs.robust, inputs.clean, inputs.x))
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            for network in (inputs.student, robust, clean):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.attacked: nn.Module = inputs.student
        if self.folded:
            self.attacked = FoldedBatchNorm(inputs.student)
            robust, clean = (FoldedBatchNorm(network).eval() for network in (robust, clean))
        return replace(inputs, x=x, robust=robust, clean=clean)

    def __call__(
        self, inputs: TrainingInputs, mark: Callable[[str], None] | None = None
    ) -> Outputs:
        with torch.autocast(inputs.x.device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs = super().__call__(inputs, mark)
        return (*outputs, torch.bfloat16) if self.bfloat16 else outputs

    def attack(self, student: nn.Module, inputs: TrainingInputs) -> Tensor:
        if isinstance(self.attacked, FoldedBatchNorm):
            self.attacked.refresh()
        # Drawn in the published order, whatever the memory format.
        noise = torch.randn(inputs.x.shape, device=inputs.x.device)
        return pgd(
            self.attacked,
            inputs.x,
            inputs.labels,
            epsilon=training_step.EPSILON,
            step_size=training_step.STEP_SIZE,
            steps=training_step.STEPS,
            start=torch.empty_like(inputs.x).copy_(noise).mul_(GAUSSIAN_START).add_(inputs.x),
        )

    def head(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        return self.balance(students, teachers)

    def state(self) -> tuple[Any, Any]:
        return self.balance.temperatures, self.balance.weights


class Bmtard(Provider):
    name = "bmtard"
    title = "bmtard"

    def absent(self, device: torch.device) -> str:
        if device.type == "cuda" and not bmtard.build_info().cuda:
            return "bmtard was built without CUDA kernels"
        return ""

    def softmax_entropy(self, spec: Spec) -> Function:
        def run(i: EntropyInputs) -> Outputs:
            return (bmtard.softmax_entropy(i.logits, i.temperature),)

        return run

    def multi_teacher_kl(self, spec: Spec) -> Function:
        def run(i: KLInputs) -> Outputs:
            return (bmtard.multi_teacher_kl(i.students, i.teachers, i.temperature),)

        return run

    def bisect_temperature(self, spec: Spec) -> Function:
        return self._search(per_sample=True)

    def bisect_temperature_batch(self, spec: Spec) -> Function:
        return self._search(per_sample=False)

    def _search(self, *, per_sample: bool) -> Function:
        def run(i: SearchInputs) -> Outputs:
            found = bmtard.bisect_temperature(
                i.logits, i.target, bounds=i.bounds, per_sample=per_sample, tolerance=i.tolerance
            )
            return (found.temperature,)

        return run

    def bmtard_loss_sign(self, spec: Spec) -> Function:
        return self._head("sign", spec)

    def bmtard_loss_bisect(self, spec: Spec) -> Function:
        return self._head("bisect", spec)

    def _head(self, balance: str, spec: Spec) -> Function:
        loss = bmtard.BMTARDLoss(
            spec.shape.teachers,
            balance=balance,
            temperature_bounds=bmtard_loss.BOUNDS,
            temperature_lr=bmtard_loss.TEMPERATURE_LR,
            weight_lr=bmtard_loss.WEIGHT_LR,
            eps=bmtard_loss.EPS,
        ).to(spec.device)

        def run(i: HeadInputs) -> Outputs:
            return loss(i.students, i.teachers), loss.temperatures, loss.weights

        return run

    def pgd_step_(self, spec: Spec) -> Function:
        def run(i: StepInputs) -> Outputs:
            moved = bmtard.pgd_step_(
                i.x_adv, i.grad, i.x, step_size=pgd_step.STEP_SIZE, epsilon=pgd_step.EPSILON
            )
            return (moved,)

        return run

    def bmtard_step(self, spec: Spec) -> Function:
        return FusedStep()


PROVIDERS = [Bmtard()]
