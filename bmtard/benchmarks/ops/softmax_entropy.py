"""The entropy of softmax(logits / 2) of each row, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import oracle
from ..shapes import LogitsOp, draw
from ..spec import EXP_FLOPS, Inputs, Outputs, Spec


@dataclass(kw_only=True)
class EntropyInputs(Inputs):
    logits: Tensor
    temperature: float = 2.0


class SoftmaxEntropy(LogitsOp):
    name = "softmax_entropy"
    passes = ("forward", "backward", "both")
    sweeps = "NC"

    def inputs(self, spec: Spec, seed: int) -> EntropyInputs:
        logits = draw(spec, seed, 3.0).requires_grad_()
        wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
        upstream = torch.linspace(0.5, 1.5, len(logits), device=spec.device, dtype=wide)
        return EntropyInputs(logits=logits, leaves=(logits,), upstream=(upstream,))

    def oracle(self, inputs: EntropyInputs) -> tuple[Tensor, Tensor]:
        value = oracle.entropy(inputs.logits, inputs.temperature)
        grad = oracle.entropy_gradient(inputs.logits, inputs.temperature, inputs.upstream[0])
        return value, grad

    def verify(
        self,
        expected: tuple[Tensor, Tensor],
        inputs: EntropyInputs,
        outputs: Outputs,
        grads: Sequence[Tensor] | None,
    ) -> str:
        rtol, of_largest = oracle.TOLERANCE[inputs.logits.dtype]
        problem = oracle.differs("entropy", outputs[0], expected[0], rtol=rtol)
        if grads is not None and not problem:
            problem = oracle.differs("gradient", grads[0], expected[1], of_largest=of_largest)
        return problem

    def ideal_bytes(self, spec: Spec, pass_: str) -> int:
        moves = {"forward": 1, "backward": 2, "both": 3}[pass_]
        return moves * self.count(spec.shape) * spec.dtype.itemsize

    def flops(self, spec: Spec, pass_: str) -> int:
        each = {"forward": EXP_FLOPS + 7, "backward": EXP_FLOPS + 6, "both": 2 * EXP_FLOPS + 13}
        return each[pass_] * self.count(spec.shape)


OPS = [SoftmaxEntropy()]
