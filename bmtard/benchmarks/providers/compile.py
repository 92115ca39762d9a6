"""torch.compile of what the eager provider computes, with its state in tensors: one graph, no
waiting for the host. A new compilation for each shape and dtype (``dynamic=False``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from ..ops import pgd_step
from ..ops.bisect_temperature import SearchInputs
from ..ops.bmtard_loss import BOUNDS, TEMPERATURE_LR, HeadInputs
from ..ops.multi_teacher_kl import KLInputs
from ..ops.pgd_step import StepInputs
from ..ops.softmax_entropy import EntropyInputs
from ..published import published_losses
from ..spec import Function, Outputs, Provider, Spec, missing_package
from .eager import (
    BisectHead,
    balanced,
    divergence,
    entropy,
    halve_batch,
    halve_rows,
    search,
)


class TensorHead:
    """The published head with its state in tensors."""

    def __init__(self, spec: Spec, compile_: Callable[..., Any]) -> None:
        count = spec.shape.teachers
        dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
        self.temperatures = torch.ones(count, dtype=dtype, device=spec.device)
        self.weights = torch.full_like(self.temperatures, 1 / count)
        self.initial = torch.zeros_like(self.temperatures)
        self.step = torch.zeros((), dtype=torch.int64, device=spec.device)
        self.compiled = compile_(self.head)

    @staticmethod
    def head(
        students: list[Tensor],
        teachers: list[Tensor],
        temperatures: Tensor,
        weights: Tensor,
        initial: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        losses, entropies = published_losses(students, teachers, temperatures)
        loss, h = torch.stack(losses), torch.stack(entropies).detach()
        value = loss.detach()
        initial = torch.where(step == 0, value, initial)
        weights = balanced(weights, value / initial)
        if len(h) > 1:
            ratio = h / ((h.sum() - h) / (len(h) - 1))
            temperatures = (temperatures - TEMPERATURE_LR * (ratio - 1).sign()).clamp(*BOUNDS)
        return (weights * loss).sum(), temperatures, weights, initial, step + 1

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        loss, self.temperatures, self.weights, self.initial, self.step = self.compiled(
            students, teachers, self.temperatures, self.weights, self.initial, self.step
        )
        return loss


class Compile(Provider):
    name = "compile"
    title = "torch.compile"
    mode: str | None = None

    def absent(self, device: torch.device) -> str:
        if device.type == "cuda":
            return missing_package("triton")
        compilers = (os.environ.get("CXX", "g++"), "clang++", "c++")
        if not any(map(shutil.which, compilers)):
            return f"Inductor needs a C++ compiler, none of {', '.join(compilers)} is found"
        return ""

    def build(self, op: str, spec: Spec) -> Function:
        # Dynamo compiles a function for a handful of shapes at most.
        torch._dynamo.reset()
        if spec.device.type == "cuda":
            # A graph of backwards alone runs the same backward several times.
            torch._functorch.config.donated_buffer = False
        return super().build(op, spec)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(
            function, fullgraph=True, dynamic=False, mode=self.mode
        )
        return compiled

    def softmax_entropy(self, spec: Spec) -> Function:
        compiled = self.compiled(entropy)

        def run(i: EntropyInputs) -> Outputs:
            return (compiled(i.logits, i.temperature),)

        return run

    def multi_teacher_kl(self, spec: Spec) -> Function:
        def kl(students: list[Tensor], teachers: list[Tensor], temperature: float) -> Tensor:
            pairs = zip(students, teachers, strict=True)
            return torch.stack([divergence(s, t, temperature) for s, t in pairs])

        compiled = self.compiled(kl)

        def run(i: KLInputs) -> Outputs:
            return (compiled(i.students, i.teachers, i.temperature),)

        return run

    def bisect_temperature(self, spec: Spec) -> Function:
        halve = self.compiled(halve_rows)

        def run(i: SearchInputs) -> Outputs:
            return (search(halve, i.logits, i.target, i.bounds, i.logits.shape[:1]),)

        return run

    def bisect_temperature_batch(self, spec: Spec) -> Function:
        halve = self.compiled(halve_batch)

        def run(i: SearchInputs) -> Outputs:
            return (search(halve, i.logits, i.target, i.bounds, torch.Size(())),)

        return run

    def bmtard_loss_sign(self, spec: Spec) -> Function:
        head = TensorHead(spec, self.compiled)

        def run(i: HeadInputs) -> Outputs:
            return head(i.students, i.teachers), head.temperatures, head.weights

        return run

    def bmtard_loss_bisect(self, spec: Spec) -> Function:
        head = BisectHead(spec, self.compiled(halve_batch), self.compiled)

        def run(i: HeadInputs) -> Outputs:
            return head(i.students, i.teachers), head.temperatures, head.weights

        return run

    def pgd_step_(self, spec: Spec) -> Function:
        def step(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
            moved = x_adv + pgd_step.STEP_SIZE * grad.sign()
            delta = torch.clamp(moved - x, min=-pgd_step.EPSILON, max=pgd_step.EPSILON)
            return torch.clamp(x + delta, min=0, max=1)

        compiled = self.compiled(step)

        def run(i: StepInputs) -> Outputs:
            return (compiled(i.x_adv, i.grad, i.x),)

        return run


class CompileMaxAutotune(Compile):
    """Without Inductor's own CUDA graphs: the suite captures every provider alike."""

    name = "compile-max-autotune"
    title = "torch.compile, max-autotune"
    mode = "max-autotune-no-cudagraphs"

    def absent(self, device: torch.device) -> str:
        return super().absent(device) if device.type == "cuda" else "measured on CUDA only"


PROVIDERS = [Compile(), CompileMaxAutotune()]
