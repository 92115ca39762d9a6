"""One PGD step, L-infinity: sign, projection into the ball around x, clip to [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import oracle
from ..shapes import ImagesOp
from ..spec import Inputs, Outputs, Spec

STEP_SIZE = 2 / 255
EPSILON = 8 / 255


@dataclass(kw_only=True)
class StepInputs(Inputs):
    x_adv: Tensor
    grad: Tensor
    x: Tensor


class PGDStep(ImagesOp):
    name = "pgd_step_"

    def inputs(self, spec: Spec, seed: int) -> StepInputs:
        generator = torch.Generator(device=spec.device).manual_seed(seed)
        x, noise, grad = (torch.empty(spec.shape.dims, device=spec.device) for _ in range(3))
        x.uniform_(generator=generator)
        noise.uniform_(-EPSILON, EPSILON, generator=generator)
        grad.normal_(generator=generator)
        x_adv = (x + noise).clamp_(0, 1)
        return StepInputs(x_adv=x_adv.to(spec.dtype), grad=grad.to(spec.dtype), x=x.to(spec.dtype))

    def trials(self, inputs: StepInputs) -> Sequence[StepInputs]:
        return [replace(inputs, x_adv=inputs.x_adv.clone())]

    def oracle(self, inputs: StepInputs) -> Tensor:
        def of(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
            moved = x_adv + STEP_SIZE * grad.sign()
            return torch.clamp(torch.clamp(moved, x - EPSILON, x + EPSILON), 0, 1)

        rows = (tensor.flatten(1) for tensor in (inputs.x_adv, inputs.grad, inputs.x))
        return oracle.by_rows(of, *rows).view_as(inputs.x)

    def verify(
        self,
        expected: Tensor,
        inputs: StepInputs,
        outputs: Outputs,
        grads: Sequence[Tensor] | None,
    ) -> str:
        # Pixels reach 1: a few roundings there. A chain of ops in a half type rounds each time.
        return oracle.differs(
            "x_adv", outputs[0], expected, of_largest=4 * torch.finfo(inputs.x.dtype).eps
        )

    def ideal_bytes(self, spec: Spec, pass_: str) -> int:
        return 4 * self.count(spec) * spec.dtype.itemsize

    def flops(self, spec: Spec, pass_: str) -> int:
        return 8 * self.count(spec)

    def count(self, spec: Spec) -> int:
        return torch.Size(spec.shape.dims).numel()

    def memory(self, spec: Spec) -> int:
        return self.count(spec) * (8 * spec.dtype.itemsize + 8 * 4)


OPS = [PGDStep()]
