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
from torch import Tensor

from ..ops import pgd_step
from ..ops.bisect_temperature import SearchInputs
from ..ops.bmtard_loss import BOUNDS, EPS, WEIGHT_LR, HeadInputs
from ..ops.multi_teacher_kl import KLInputs
from ..ops.pgd_step import StepInputs
from ..ops.softmax_entropy import EntropyInputs
from ..published import PublishedHead, PublishedStep, wide
from ..spec import Function, Outputs, Provider, Spec

HALVINGS = 24
"""Of a bracket 9.2 wide in log temperature: 24 leave the entropy within 1e-5 nats."""


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
