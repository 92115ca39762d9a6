"""One whole B-MTARD training step: PGD-10, teachers, student, head, optimizer.

On the CPU the networks are small and the images are CIFAR's size; on a GPU a ResNet-18 learns from
WRN-34-10 and ResNet-56, as in the paper. The weights are random, which changes nothing about the
work. Every provider starts from the same weights and seeds, and must arrive where the published
step does, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmtard.models import build_model

from .. import oracle
from ..published import PublishedStep
from ..spec import Op, Outputs, Shape, Spec
from ..training_step import TrainingInputs

CLASSES = 10
MODELS = {
    "cpu": ("cnn-8", "cnn-16", "cnn-8"),
    "cuda": ("resnet-18", "wrn-34-10", "resnet-56"),
}
"""Student, robust teacher, clean teacher."""
CHECKED_STEPS = 2
"""The weights of the balance move from the second step on."""
SEED = 17
"""Of the random start of the attack."""


class BmtardStep(Op):
    """Outputs: the loss, temperatures and weights, the adversarial images, the student; and the
    type of autocast, if any."""

    name = "bmtard_step"
    passes = ("step",)
    rank = 4
    dtypes = ("float32",)
    presets = ()
    capturable = False

    def shapes(self, preset: str, device: torch.device) -> list[Shape]:
        return [Shape(name="cifar10", dims=(32 if preset == "quick" else 128, 3, 32, 32))]

    def inputs(self, spec: Spec, seed: int) -> TrainingInputs:
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
        return TrainingInputs(
            x=x.to(device), labels=labels.to(device), student=student, robust=robust, clean=clean
        )

    def trials(self, inputs: TrainingInputs) -> Sequence[TrainingInputs]:
        torch.manual_seed(SEED)
        return [inputs] * CHECKED_STEPS

    def oracle(self, inputs: TrainingInputs) -> Outputs:
        """The published step, in the dtype of the run: float64 would flip signs of gradients."""
        step = PublishedStep()
        for trial in self.trials(inputs):
            outputs = step(trial)
        return outputs

    def verify(
        self,
        expected: Outputs,
        inputs: TrainingInputs,
        outputs: Outputs,
        grads: Sequence[Tensor] | None,
    ) -> str:
        # Under autocast a step says so at its end. There one pixel in six moves another way.
        half = torch.bfloat16 in outputs[5:]
        rtol, pixels, of_largest = (5e-2, 0.35, 0.4) if half else (1e-4, 1e-3, 1e-3)
        names = ("loss", "temperatures", "weights")
        problems = [
            oracle.differs(
                name, torch.as_tensor(got).double().cpu(), torch.as_tensor(want).double().cpu(),
                rtol=rtol,
            )
            for name, got, want in zip(names, outputs, expected, strict=False)
        ]  # fmt: skip
        # A gradient that is 0 to rounding may have either sign, which moves its pixel.
        moved = (outputs[3] - expected[3]).abs() > 1e-6
        if float(moved.float().mean()) > pixels:
            problems.append(f"{int(moved.sum())} of {moved.numel()} adversarial pixels differ")
        for (name, got), want in zip(
            outputs[4].named_parameters(), expected[4].parameters(), strict=True
        ):
            problems.append(oracle.differs(name, got, want, of_largest=of_largest))
        return oracle.first_problem(*problems)

    def ideal_bytes(self, spec: Spec, pass_: str) -> int:
        return 0

    def flops(self, spec: Spec, pass_: str) -> int:
        return 0

    def memory(self, spec: Spec) -> int:
        batch = spec.shape.dims[0]
        return batch * ((64 << 20) if spec.device.type == "cuda" else (4 << 20))


OPS = [BmtardStep()]
