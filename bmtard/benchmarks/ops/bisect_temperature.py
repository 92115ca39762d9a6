"""The temperature at which an entropy is half of log C: one for each row, or one for the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import oracle
from ..shapes import LogitsOp, draw
from ..spec import EXP_FLOPS, Inputs, Outputs, Spec

EVALUATIONS = 4
"""Of the entropy in the fastest search: it gives the number of operations."""


@dataclass(kw_only=True)
class SearchInputs(Inputs):
    logits: Tensor
    target: float
    """Nats."""
    bounds: tuple[float, float] = (1e-2, 1e2)
    tolerance: float = 1e-5
    """Nats; that of scikit-learn, which cannot be changed."""


class BisectTemperature(LogitsOp):
    name = "bisect_temperature"
    sweeps = "NC"
    default = ("digits", *LogitsOp.default)

    def inputs(self, spec: Spec, seed: int) -> SearchInputs:
        target = 0.5 * math.log(spec.shape.dims[1])
        return SearchInputs(logits=draw(spec, seed, 3.0), target=target)

    def oracle(self, inputs: SearchInputs) -> Tensor:
        """Whether the target is reached inside the bounds: rows whose largest logits are nearly
        equal need less than the lowest temperature. The entropy at what a provider found is
        evaluated instead of the search repeated."""
        lowest = torch.full_like(inputs.logits[:, 0], inputs.bounds[0], dtype=torch.float64)
        return self.averaged(inputs, self.entropies(inputs, lowest)) <= inputs.target

    def averaged(self, inputs: SearchInputs, entropy: Tensor) -> Tensor:
        return entropy if self.result_shape(inputs) else entropy.mean()

    def entropies(self, inputs: SearchInputs, temperature: Tensor) -> Tensor:
        def of(z: Tensor, t: Tensor) -> Tensor:
            log_p = torch.log_softmax(z / t, -1)
            return -(log_p.exp() * log_p).sum(-1)

        return oracle.by_rows(of, inputs.logits, temperature.unsqueeze(-1))

    def verify(
        self,
        expected: Tensor,
        inputs: SearchInputs,
        outputs: Outputs,
        grads: Sequence[Tensor] | None,
    ) -> str:
        (temperature,) = outputs
        shape = self.result_shape(inputs)
        if temperature.shape != shape:
            return f"temperature has shape {list(temperature.shape)}, not {list(shape)}"
        entropy = self.entropies(inputs, temperature.expand(len(inputs.logits)))
        error = (self.averaged(inputs, entropy) - inputs.target).abs()
        clamped = ~expected & (temperature <= 1.001 * inputs.bounds[0])
        error = torch.where(clamped, 0.0, error).max()
        # Twice the tolerance: float32 sums stop the search a little off.
        if float(error) <= 2 * inputs.tolerance:
            return ""
        return (
            f"an entropy is {float(error):.3g} nats off the target, "
            f"more than twice the tolerance {inputs.tolerance}"
        )

    def result_shape(self, inputs: SearchInputs) -> torch.Size:
        return inputs.logits.shape[:1]

    def ideal_bytes(self, spec: Spec, pass_: str) -> int:
        return self.count(spec.shape) * spec.dtype.itemsize

    def flops(self, spec: Spec, pass_: str) -> int:
        return (EVALUATIONS * (EXP_FLOPS + 9) + 4) * self.count(spec.shape)


class BisectTemperatureBatch(BisectTemperature):
    name = "bisect_temperature_batch"
    presets = ("default", "full")
    default = ("cifar10", "tiny-imagenet", "imagenet", "llm32k")
    sweeps = ""

    def result_shape(self, inputs: SearchInputs) -> torch.Size:
        return torch.Size(())


OPS = [BisectTemperature(), BisectTemperatureBatch()]
