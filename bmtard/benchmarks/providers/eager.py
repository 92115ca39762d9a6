"""Eager torch, written as published code writes it. Sources: the losses of ARD, TRADES and IAD
(F.kl_div of log_softmax and softmax), the released training script of B-MTARD (the head),
torchattacks (the step), the t-SNE of several libraries (the search).

Half types are taken to float32 first: under autocast, softmax and log_softmax do that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import pgd_step, step
from ..ops.bisect_temperature import SearchInputs
from ..ops.bmtard_loss import BOUNDS, EPS, TEMPERATURE_LR, WEIGHT_LR, HeadInputs
from ..ops.multi_teacher_kl import KLInputs
from ..ops.pgd_step import StepInputs
from ..ops.softmax_entropy import EntropyInputs
from ..ops.step import StepInputs as TrainingInputs
from ..ops.step import TrainingStep
from ..spec import Function, Outputs, Provider, Spec

HALVINGS = 24
"""Of a bracket in log temperature; 9.2 wide, 24 of them leave an entropy within 1e-5 nats."""


def wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def entropy(logits: Tensor, temperature: float | Tensor) -> Tensor:
    log_p = torch.log_softmax(wide(logits) / temperature, -1)
    return -(log_p.exp() * log_p).sum(-1)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = torch.softmax(wide(teacher) / temperature, dim=1)
    return F.kl_div(torch.log_softmax(wide(student), dim=1), p, reduction="batchmean")


def halve_rows(logits: Tensor, low: Tensor, high: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Log brackets [N] of the rows' temperatures, halved."""
    middle = 0.5 * (low + high)
    below = entropy(logits, middle.exp().unsqueeze(-1)) < target
    return torch.where(below, middle, low), torch.where(below, high, middle)


def halve_batch(
    logits: Tensor, low: Tensor, high: Tensor, target: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The log bracket, 0-d, of the batch's temperature, halved."""
    middle = 0.5 * (low + high)
    below = entropy(logits, middle.exp()).mean() < target
    return torch.where(below, middle, low), torch.where(below, high, middle)


Halve = Callable[..., tuple[Tensor, Tensor]]


def search(
    halve: Halve,
    logits: Tensor,
    target: float | Tensor,
    bounds: tuple[float, float],
    shape: torch.Size,
) -> Tensor:
    """Temperatures of ``shape``, by plain bisection."""
    dtype = wide(logits[:0]).dtype
    low = torch.full(shape, math.log(bounds[0]), dtype=dtype, device=logits.device)
    high = torch.full(shape, math.log(bounds[1]), dtype=dtype, device=logits.device)
    for _ in range(HALVINGS):
        low, high = halve(logits, low, high, target)
    return (0.5 * (low + high)).exp()


def published_losses(
    students: list[Tensor], teachers: list[Tensor], temperatures: list[float] | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """KL and negative entropy of each teacher, means over N * C. The softmax of a teacher is
    computed once for each, as the script does."""
    losses, entropies = [], []
    for k, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        log_q = torch.log_softmax(wide(student), dim=1)
        p = torch.softmax(wide(teacher) / temperatures[k], dim=1)
        losses.append(torch.mean(-log_q * p + torch.log(p + EPS) * p))
        p = torch.softmax(wide(teacher) / temperatures[k], dim=1)
        entropies.append(torch.mean(torch.log(p + EPS) * p))
    return losses, entropies


class PublishedHead:
    """The balance of the released script, state in Python floats, a ``.item()`` for each value.

    The script has two teachers; more are compared with the mean of the others.
    """

    def __init__(self, count: int) -> None:
        self.temperatures = [1.0] * count
        self.weights = [1 / count] * count
        self.initial: list[float] | None = None

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        losses, entropies = published_losses(students, teachers, self.temperatures)
        moved = []
        for k, temperature in enumerate(self.temperatures):
            others = [entropy for j, entropy in enumerate(entropies) if j != k]
            step = 0.0
            if others:
                other = others[0] if len(others) == 1 else torch.stack(others).mean()
                ratio = entropies[k].detach() / other.detach()
                step = TEMPERATURE_LR * torch.sign(ratio - 1).item()
            moved.append(max(min(BOUNDS[1], temperature - step), BOUNDS[0]))
        self.temperatures = moved
        if self.initial is None:
            self.initial = [loss.item() for loss in losses]
        relative = [loss.item() / first for loss, first in zip(losses, self.initial, strict=True)]
        for loss in losses:  # for an average that the script does not use
            loss.item()
        mean = sum(relative) / len(relative)
        relative = [value / mean for value in relative]
        self.weights = [
            max(weight - WEIGHT_LR * (weight - value / sum(relative)), 0.0)
            for weight, value in zip(self.weights, relative, strict=True)
        ]
        total = sum(self.weights)
        self.weights = [weight / total for weight in self.weights]
        loss = self.weights[0] * losses[0]
        for weight, other in zip(self.weights[1:], losses[1:], strict=True):
            loss = loss + weight * other
        return loss


class BisectHead:
    """Temperatures of equal entropy by plain bisection, then the losses and the weights."""

    def __init__(
        self,
        spec: Spec,
        halve: Halve = halve_batch,
        compile_: Callable[..., Any] = lambda function: function,
    ) -> None:
        count = spec.shape.teachers
        dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
        self.halve = halve
        self.temperatures = torch.ones(count, dtype=dtype, device=spec.device)
        self.weights = torch.full_like(self.temperatures, 1 / count)
        self.initial: Tensor | None = None
        self.lowest, self.losses = compile_(self.mean_entropy), compile_(self.stacked_losses)

    @staticmethod
    def mean_entropy(teacher: Tensor) -> Tensor:
        return entropy(teacher, BOUNDS[0]).mean()

    @staticmethod
    def stacked_losses(
        students: list[Tensor], teachers: list[Tensor], temperatures: Tensor
    ) -> Tensor:
        losses = []
        for k, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            p = torch.softmax(wide(teacher) / temperatures[k], dim=1)
            log_q = torch.log_softmax(wide(student), dim=1)
            losses.append(torch.mean(torch.log(p + EPS) * p - log_q * p))
        return torch.stack(losses)

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        with torch.no_grad():
            target = torch.stack([self.lowest(t) for t in teachers]).max()
            found = [search(self.halve, t, target, BOUNDS, torch.Size(())) for t in teachers]
            self.temperatures = torch.stack(found)
        loss = self.losses(students, teachers, self.temperatures)
        with torch.no_grad():
            if self.initial is None:
                self.initial = loss.detach()
            self.weights = balanced(self.weights, loss.detach() / self.initial)
        return (self.weights * loss).sum()


def balanced(weights: Tensor, relative: Tensor) -> Tensor:
    weights = (weights - WEIGHT_LR * (weights - relative / relative.sum())).clamp(min=0)
    return weights / weights.sum()


class PublishedStep(TrainingStep):
    """The training step of the released script and of the attack that it imports.

    The script draws the random start on the host and copies it. Here it is drawn on the device, in
    the script's favour, so that both providers start from the same numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.balance = PublishedHead(2)

    def attack(self, student: nn.Module, inputs: TrainingInputs) -> Tensor:
        x = inputs.x
        student.eval()
        x_adv = x.detach() + 0.001 * torch.randn(x.shape, device=x.device)
        for _ in range(step.STEPS):
            x_adv.requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(student(x_adv), inputs.labels)
            grad = torch.autograd.grad(loss, [x_adv])[0]
            x_adv = x_adv.detach() + step.STEP_SIZE * torch.sign(grad.detach())
            x_adv = torch.min(torch.max(x_adv, x - step.EPSILON), x + step.EPSILON)
            x_adv = torch.clamp(x_adv, 0.0, 1.0)
        student.train()
        return torch.clamp(x_adv, 0.0, 1.0)

    def head(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        return self.balance(students, teachers)

    def state(self) -> tuple[Any, Any]:
        return self.balance.temperatures, self.balance.weights


class Eager(Provider):
    name = "eager"
    title = "eager torch, as published code writes it"

    def softmax_entropy(self, spec: Spec) -> Function:
        def run(i: EntropyInputs) -> Outputs:
            return (entropy(i.logits, i.temperature),)

        return run

    def multi_teacher_kl(self, spec: Spec) -> Function:
        def run(i: KLInputs) -> Outputs:
            pairs = zip(i.students, i.teachers, strict=True)
            return (torch.stack([divergence(s, t, i.temperature) for s, t in pairs]),)

        return run

    def bisect_temperature(self, spec: Spec) -> Function:
        def run(i: SearchInputs) -> Outputs:
            return (search(halve_rows, i.logits, i.target, i.bounds, i.logits.shape[:1]),)

        return run

    def bisect_temperature_batch(self, spec: Spec) -> Function:
        def run(i: SearchInputs) -> Outputs:
            return (search(halve_batch, i.logits, i.target, i.bounds, torch.Size(())),)

        return run

    def bmtard_loss_sign(self, spec: Spec) -> Function:
        head = PublishedHead(spec.shape.teachers)

        def run(i: HeadInputs) -> Outputs:
            return head(i.students, i.teachers), head.temperatures, head.weights

        return run

    def bmtard_loss_bisect(self, spec: Spec) -> Function:
        head = BisectHead(spec)

        def run(i: HeadInputs) -> Outputs:
            return head(i.students, i.teachers), head.temperatures, head.weights

        return run

    def pgd_step_(self, spec: Spec) -> Function:
        def run(i: StepInputs) -> Outputs:
            x_adv = i.x_adv.detach() + pgd_step.STEP_SIZE * i.grad.sign()
            delta = torch.clamp(x_adv - i.x, min=-pgd_step.EPSILON, max=pgd_step.EPSILON)
            return (torch.clamp(i.x + delta, min=0, max=1).detach(),)

        return run

    def bmtard_step(self, spec: Spec) -> Function:
        return PublishedStep()


PROVIDERS = [Eager()]
