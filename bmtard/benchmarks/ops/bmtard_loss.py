"""The whole B-MTARD head: losses, balance of temperatures and weights, gradient to the students.

In mode "sign" the published rule of fixed steps, in mode "bisect" the temperatures of equal
entropy. Every call is a training step: it moves the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import oracle
from ..shapes import LogitsOp, draw_pairs
from ..spec import EXP_FLOPS, Inputs, Outputs, Spec

EPS = 1e-5
TEMPERATURE_LR = 1e-3
WEIGHT_LR = 0.025
BOUNDS = (1.0, 10.0)
ENTROPY_TOLERANCE = 5e-5
"""Nats between the teachers' entropies after "bisect": what the peers' 24 halvings reach."""


@dataclass(kw_only=True)
class HeadInputs(Inputs):
    students: list[Tensor]
    teachers: list[Tensor]


class HeadSign(LogitsOp):
    """Outputs: the loss, then the temperatures and the weights [K] after the step."""

    name = "bmtard_loss_sign"
    passes = ("forward", "backward", "both")
    quick = ("cifar10", "imagenet")
    sweeps = "NCK"
    tensors = 2

    def inputs(self, spec: Spec, seed: int) -> HeadInputs:
        students, teachers = draw_pairs(spec, seed)
        wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
        upstream = torch.ones((), device=spec.device, dtype=wide)
        return HeadInputs(
            students=students, teachers=teachers, leaves=tuple(students), upstream=(upstream,)
        )

    def trials(self, inputs: HeadInputs) -> Sequence[HeadInputs]:
        """Other students first, so that the losses have changed when the weights are looked at."""
        students = [(2.0 * s.detach()).requires_grad_() for s in inputs.students[::-1]]
        first = replace(inputs, students=students, leaves=tuple(students))
        return [first, inputs]

    def preset_passes(self, preset: str) -> tuple[str, ...]:
        """A training step is the whole of it; nobody takes the loss without its gradient."""
        return self.passes if preset == "full" else ("both",)

    def oracle(self, inputs: HeadInputs) -> list[float]:
        """Temperatures after the first step."""
        return self.moved(inputs, [1.0] * len(inputs.teachers))

    def moved(self, inputs: HeadInputs, temperatures: list[float]) -> list[float]:
        entropies = [
            float(oracle.entropy(t, temperature, EPS).mean())
            for t, temperature in zip(inputs.teachers, temperatures, strict=True)
        ]
        if len(entropies) < 2:
            return temperatures
        moved = []
        for k, (h, temperature) in enumerate(zip(entropies, temperatures, strict=True)):
            others = [other for j, other in enumerate(entropies) if j != k]
            mean = sum(others) / len(others)
            step = TEMPERATURE_LR * ((h > mean) - (h < mean))
            moved.append(min(max(temperature - step, BOUNDS[0]), BOUNDS[1]))
        return moved

    def used_temperatures(
        self, expected: list[float], inputs: HeadInputs, found: list[float]
    ) -> tuple[list[float], list[float], str]:
        """Those of the first and of the second trial, and what is wrong with those found."""
        after = self.moved(inputs, expected)
        wanted = torch.tensor(after, dtype=torch.float64)
        problem = oracle.differs("temperatures", torch.tensor(found), wanted, rtol=1e-6)
        return [1.0] * len(found), expected, problem

    def verify(
        self,
        expected: list[float],
        inputs: HeadInputs,
        outputs: Outputs,
        grads: Sequence[Tensor] | None,
    ) -> str:
        loss, *state = outputs
        temperatures, weights = (torch.as_tensor(values).double().cpu() for values in state)
        rtol, of_largest = oracle.TOLERANCE[inputs.students[0].dtype]
        first, second, problem = self.used_temperatures(expected, inputs, temperatures.tolist())
        if problem:
            return problem
        classes = inputs.students[0].shape[1]
        earlier, _ = self.trials(inputs)
        relative, losses = [], []
        for k, teacher in enumerate(inputs.teachers):
            before = oracle.kl(earlier.students[k], teacher, first[k], EPS).mean() / classes
            losses.append(oracle.kl(inputs.students[k], teacher, second[k], EPS).mean() / classes)
            relative.append(losses[k] / before)
        count = len(losses)
        wanted = (1 - WEIGHT_LR) / count + WEIGHT_LR * torch.stack(relative) / sum(relative)
        total = (wanted * torch.stack(losses)).sum()
        problem = oracle.first_problem(
            oracle.differs("weights", weights, wanted.cpu(), rtol=1e-5),
            oracle.differs("loss", loss, total, rtol=rtol),
        )
        for k, grad in enumerate(grads or ()):
            if problem:
                break
            scale = float(wanted[k]) / inputs.students[k].numel()
            gradient = oracle.kl_gradient(inputs.students[k], inputs.teachers[k], second[k], scale)
            problem = oracle.differs(f"gradient {k}", grad, gradient, of_largest=of_largest)
        return problem

    def ideal_bytes(self, spec: Spec, pass_: str) -> int:
        moves = {"forward": 2, "backward": 3, "both": 3}[pass_]
        return moves * self.count(spec.shape) // 2 * spec.dtype.itemsize

    def flops(self, spec: Spec, pass_: str) -> int:
        # Two exponentials a pair, and the logarithm of p + eps.
        each = {"forward": 1.5 * EXP_FLOPS + 9, "backward": 2, "both": 1.5 * EXP_FLOPS + 11}
        return int(each[pass_] * self.count(spec.shape))


class HeadBisect(HeadSign):
    name = "bmtard_loss_bisect"
    presets = ("default", "full")
    default = ("cifar10", "tiny-imagenet", "imagenet", "llm32k")
    sweeps = "CK"

    def oracle(self, inputs: HeadInputs) -> list[float]:
        """The entropy that all teachers shall have, the largest at temperature 1, as one entry."""
        return [max(float(oracle.entropy(t, BOUNDS[0]).mean()) for t in inputs.teachers)]

    def used_temperatures(
        self, expected: list[float], inputs: HeadInputs, found: list[float]
    ) -> tuple[list[float], list[float], str]:
        (target,) = expected
        for k, (teacher, temperature) in enumerate(zip(inputs.teachers, found, strict=True)):
            if not temperature > 0:
                return found, found, f"temperature {k} is {temperature}"
            error = abs(float(oracle.entropy(teacher, temperature).mean()) - target)
            if error > ENTROPY_TOLERANCE:
                return (
                    found,
                    found,
                    f"entropy {k} is {error:.3g} nats off the common one",
                )
        return found, found, ""

    def flops(self, spec: Spec, pass_: str) -> int:
        search = 0 if pass_ == "backward" else 2 * (EXP_FLOPS + 9) * self.count(spec.shape)
        return super().flops(spec, pass_) + search


OPS = [HeadSign(), HeadBisect()]
