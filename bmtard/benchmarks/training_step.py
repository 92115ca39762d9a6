"""The training step that is timed: its inputs, its constants, and its phases.

A provider subclasses ``TrainingStep`` with its attack and its head.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .spec import Inputs, Outputs
from .timing import cpu_clock

STEPS = 10
STEP_SIZE = 2 / 255
EPSILON = 8 / 255
PHASES = ("attack", "teachers", "student", "head", "student backward", "optimizer")


@dataclass(kw_only=True)
class TrainingInputs(Inputs):
    x: Tensor
    labels: Tensor
    student: nn.Module
    robust: nn.Module
    clean: nn.Module


def make_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """That of the published script."""
    return torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)


class TrainingStep(ABC):
    """A student of its own, and the phases of a step on it.

    The loss is differentiated to the logits within "head" and from there on in "student backward",
    which is the same work as one ``loss.backward()``.
    """

    def __init__(self) -> None:
        self.inputs: TrainingInputs | None = None

    def start(self, inputs: TrainingInputs) -> TrainingInputs:
        """What the steps work on, the student included."""
        student = copy.deepcopy(inputs.student)
        self.optimizer = make_optimizer(student)
        return replace(inputs, student=student)

    @abstractmethod
    def attack(self, student: nn.Module, inputs: TrainingInputs) -> Tensor: ...

    @abstractmethod
    def head(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """The loss, the state moved."""

    @abstractmethod
    def state(self) -> tuple[Any, Any]:
        """Temperatures and weights."""

    def __call__(
        self, inputs: TrainingInputs, mark: Callable[[str], None] | None = None
    ) -> Outputs:
        """``mark`` is called at the end of each phase, with its name."""
        if self.inputs is None:
            self.inputs = self.start(inputs)
        inputs = self.inputs
        student = inputs.student
        done = mark or (lambda phase: None)
        x_adv = self.attack(student, inputs)
        done("attack")
        with torch.no_grad():
            teachers = [inputs.robust(x_adv), inputs.clean(inputs.x)]
        done("teachers")
        self.optimizer.zero_grad()
        students = [student(x_adv), student(inputs.x)]
        done("student")
        loss = self.head(students, teachers)
        grads = torch.autograd.grad(loss, students)
        done("head")
        torch.autograd.backward(students, list(grads))
        done("student backward")
        self.optimizer.step()
        done("optimizer")
        return loss.detach(), *self.state(), x_adv, student

    def phases(self, inputs: TrainingInputs, seconds: float) -> dict[str, float]:
        """Milliseconds of each phase, the median over steps, each phase waited for."""
        times: dict[str, list[float]] = {phase: [] for phase in PHASES}
        clock = time.perf_counter if inputs.x.is_cuda else cpu_clock()[1]
        last = clock()

        def mark(phase: str) -> None:
            nonlocal last
            if inputs.x.is_cuda:
                torch.cuda.synchronize(inputs.x.device)
            now = clock()
            times[phase].append(1e3 * (now - last))
            last = now

        end = time.perf_counter() + seconds
        while len(times["attack"]) < 3 or time.perf_counter() < end:
            mark("attack")
            times["attack"].pop()  # what passed between two steps
            self(inputs, mark)
        return {phase: sorted(values)[len(values) // 2] for phase, values in times.items()}
