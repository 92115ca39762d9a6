"""What the ops return and keep: status codes, search results, the state of the balance."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class SearchStatus(enum.IntEnum):
    """How a temperature search ended."""

    CONVERGED = 0
    """The entropy is the target, to the tolerance or to rounding."""
    CLAMPED_LOW = 1
    """The target lies below the entropy at the lower bound, which is the result."""
    CLAMPED_HIGH = 2
    """The target lies above the entropy at the upper bound, which is the result."""
    DEGENERATE = 3
    """The temperature does not matter: the result is ``initial``, else 1, clamped."""
    NON_FINITE = 4
    """An entropy or the target is NaN or infinite; the result is ``initial``, else 1, clamped."""
    MAX_ITERATIONS = 5
    """The evaluations ran out; the result is the last temperature tried."""


class BalanceStatus(enum.IntEnum):
    """What a step of the balance did to its state."""

    UPDATED = 0
    """As it should."""
    SKIPPED_NON_FINITE = 1
    """A loss or an entropy was not finite: but for this, the state is as it was before."""
    TARGET_OUT_OF_BOUNDS = 2
    """Updated, but a temperature stopped at a bound without reaching the common entropy."""


class TemperatureSearch(NamedTuple):
    """Result of :func:`bmtard.bisect_temperature`: 0-d tensors, or one entry a row."""

    temperature: Tensor
    """Differentiable in the logits and the target."""
    entropy: Tensor
    """In nats, at that temperature; not differentiable."""
    status: Tensor
    """A :class:`SearchStatus`, int32."""
    iterations: Tensor
    """Entropy evaluations used, int32."""


@dataclass(frozen=True, slots=True)
class Share:
    """Part ``index`` of the ``count`` equal parts in a row that processes make of a batch."""

    index: int = 0
    count: int = 1

    def rows(self, total: int) -> slice:
        """Its rows of a batch of ``total``, a multiple of ``count``."""
        size = total // self.count
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Share()


class BalanceState(NamedTuple):
    """The state of the balance between K teachers, on the device. Floats are float64."""

    temperatures: Tensor
    """[K]"""
    weights: Tensor
    """[K], sum 1"""
    initial_losses: Tensor
    """[K], of the first step"""
    entropies: Tensor
    """[K], in nats, of the last step"""
    losses: Tensor
    """[K], of the last step"""
    temperature_lr: Tensor
    """0-d"""
    weight_lr: Tensor
    """0-d"""
    step: Tensor
    """0-d int64, steps done"""
    status: Tensor
    """0-d int32, a :class:`BalanceStatus`"""
