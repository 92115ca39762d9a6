"""One whole B-MTARD training step: PGD-10, teachers, student, head, optimizer.

On the CPU small networks on CIFAR-sized images; on a GPU the ResNet-18 student with WRN-34-10 and
ResNet-56 teachers of the paper. The networks have random weights: the work is that of trained
ones. Both providers start from the same weights and seeds; what the published step gives is what
bmtard's must give, to rounding.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmtard.models import build_model

from .. import oracle
from ..spec import Inputs, Op, Outputs, Shape, Spec
from ..timing import cpu_clock

CLASSES = 10
STEPS = 10
STEP_SIZE = 2 / 255
EPSILON = 8 / 255
MODELS = {
    "cpu": ("cnn-8", "cnn-16", "cnn-8"),
    "cuda": ("resnet-18", "wrn-34-10", "resnet-56"),
}
"""Student, robust teacher, clean teacher."""
PHASES = ("attack", "teachers", "student", "head", "student backward", "optimizer")
CHECKED_STEPS = 2
"""The weights move from the second step on."""
SEED = 17
"""Of the random start of the attack."""


@dataclass(kw_only=True)
class StepInputs(Inputs):
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
        self.student: nn.Module | None = None

    def start(self, inputs: StepInputs) -> None:
        self.student = copy.deepcopy(inputs.student)
        self.optimizer = make_optimizer(self.student)

    @abstractmethod
    def attack(self, student: nn.Module, inputs: StepInputs) -> Tensor: ...

    @abstractmethod
    def head(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """The loss, the state moved."""

    @abstractmethod
    def state(self) -> tuple[Any, Any]:
        """Temperatures and weights."""

    def __call__(self, inputs: StepInputs, mark: Callable[[str], None] | None = None) -> Outputs:
        """``mark`` is called at the end of each phase, with its name."""
        if self.student is None:
            self.start(inputs)
        student = self.student
        assert student is not None
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

    def phases(self, inputs: StepInputs, seconds: float) -> dict[str, float]:
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


class BmtardStep(Op):
    """Outputs: the loss, temperatures and weights, the adversarial images, the student."""

    name = "bmtard_step"
    passes = ("step",)
    rank = 4
    dtypes = ("float32",)
    presets = ()
    capturable = False

    def shapes(self, preset: str, device: torch.device) -> list[Shape]:
        return [Shape(name="cifar10", dims=(32 if preset == "quick" else 128, 3, 32, 32))]

    def inputs(self, spec: Spec, seed: int) -> StepInputs:
        # Without it convolutions on a GPU differ from run to run; the published script sets it.
        torch.backends.cudnn.deterministic = True
        device, dims = spec.device, spec.shape.dims
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            networks = [
                build_model(name, num_classes=CLASSES, mean=(0.5,) * dims[1], std=(0.25,) * dims[1])
                for name in MODELS["cuda" if device.type == "cuda" else "cpu"]
            ]
            x, labels = torch.rand(dims), torch.randint(CLASSES, dims[:1])
        student, robust, clean = (network.to(device) for network in networks)
        student.train()
        for teacher in (robust, clean):
            teacher.eval().requires_grad_(False)
        return StepInputs(
            x=x.to(device), labels=labels.to(device), student=student, robust=robust, clean=clean
        )

    def trials(self, inputs: StepInputs) -> Sequence[StepInputs]:
        torch.manual_seed(SEED)
        return [inputs] * CHECKED_STEPS

    def oracle(self, inputs: StepInputs) -> Outputs:
        """The published step, in the dtype of the run: float64 would flip signs of gradients."""
        from ..providers.eager import PublishedStep

        step = PublishedStep()
        for trial in self.trials(inputs):
            outputs = step(trial)
        return outputs

    def verify(
        self,
        expected: Outputs,
        inputs: StepInputs,
        outputs: Outputs,
        grads: Sequence[Tensor] | None,
    ) -> str:
        names = ("loss", "temperatures", "weights")
        problems = [
            oracle.differs(
                name, torch.as_tensor(got).double().cpu(), torch.as_tensor(want).double().cpu(),
                rtol=1e-4,
            )
            for name, got, want in zip(names, outputs, expected, strict=False)
        ]  # fmt: skip
        # A gradient that is 0 to rounding may have either sign, which moves its pixel.
        moved = (outputs[3] - expected[3]).abs() > 1e-6
        if float(moved.float().mean()) > 1e-3:
            problems.append(f"{int(moved.sum())} of {moved.numel()} adversarial pixels differ")
        for (name, got), want in zip(
            outputs[4].named_parameters(), expected[4].parameters(), strict=True
        ):
            problems.append(oracle.differs(name, got, want, of_largest=1e-3))
        return oracle.first_problem(*problems)

    def ideal_bytes(self, spec: Spec, pass_: str) -> int:
        return 0

    def flops(self, spec: Spec, pass_: str) -> int:
        return 0

    def memory(self, spec: Spec) -> int:
        batch = spec.shape.dims[0]
        return batch * ((64 << 20) if spec.device.type == "cuda" else (4 << 20))


OPS = [BmtardStep()]
