"""How time is taken, and how sure a ratio of times is.

Providers run in turns in one process: a block of calls each, in a new order every round. So a
drift of the machine slows all of them alike, and no provider always finds the caches as the same
other one left them. The ratio of two providers is the median over rounds of the ratio within a
round. Its interval assumes nothing about the noise.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .spec import Function, Inputs, Outputs

CONFIDENCE = 0.99
"""Of the interval of a ratio; a run has about a hundred ratios."""
BLOCK_SECONDS = 1e-3
"""A block has as many calls as fit, and at least one."""
WARM_UP_ROUNDS = 2
MAX_ROUNDS = 1000
FEWEST_ROUNDS = 8
"""The fewest that give an interval: the range of 8 ratios holds the median in 99.2 % of cases."""
PATIENCE = 5
"""After so many times its seconds, a measurement makes do with ``FEWEST_ROUNDS``..."""
LAST = 20
"""... and after so many it ends, even if its intervals are wide."""

Clock = Callable[[], float]

Block = Callable[[int], float]
"""Seconds that so many calls took."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A provider's time over bmtard's, with the ends of its interval."""

    median: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        return self.low <= 1 <= self.high

    def within(self, tolerance: float) -> bool:
        """Whether the interval is narrow enough to tell a change by ``tolerance``."""
        return self.high <= (1 + tolerance) * self.low


def gradients(outputs: Outputs, inputs: Inputs, *, retain: bool = False) -> Sequence[Any]:
    """The gradients by the leaves, from ``inputs.upstream`` at the first outputs."""
    return torch.autograd.grad(
        outputs[: len(inputs.upstream)], inputs.leaves, inputs.upstream, retain_graph=retain
    )


def call(function: Function, inputs: Inputs, pass_: str) -> Callable[[], Any]:
    """One call of a pass that is not "backward"."""
    if pass_ == "both":
        return lambda: gradients(function(inputs), inputs)
    return lambda: function(inputs)


def cpu_clock() -> tuple[str, Clock]:
    """The clock for the CPU, and the measure that it gives.

    With one thread the clock counts the time that the process had a core ("cpu_time"): on an idle
    machine that is the wall clock's, on a busy one it leaves out the time of other processes.
    Several threads wait for each other, so with them it is the wall clock ("wall").
    """
    if torch.get_num_threads() == 1:
        return "cpu_time", time.process_time
    return "wall", time.perf_counter


def plain_block(
    function: Function,
    inputs: Inputs,
    pass_: str,
    clock: Clock,
    synchronize: Callable[[], None] | None = None,
) -> Block:
    """Blocks of a pass, called as a user calls it.

    "forward" is timed without autograd. "backward" is timed call by call: each call runs a forward
    first, which is not timed.
    """
    once = call(function, inputs, pass_)

    def block(calls: int) -> float:
        with torch.set_grad_enabled(pass_ != "forward"):
            if pass_ != "backward":
                start = clock()
                for _ in range(calls):
                    once()
                if synchronize:
                    synchronize()
                return clock() - start
            total = 0.0
            for _ in range(calls):
                outputs = function(inputs)
                if synchronize:
                    synchronize()
                start = clock()
                gradients(outputs, inputs)
                if synchronize:
                    synchronize()
                total += clock() - start
            return total

    return block


def interleave(
    blocks: Mapping[str, Block],
    *,
    seconds: float,
    min_rounds: int,
    precise: Callable[[dict[str, list[float]]], bool] = lambda times: True,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds a call of each block function, one value a round, in rounds of shuffled order.

    Goes on for ``seconds``, for ``min_rounds``, and until the values so far are ``precise``. A long
    one makes do with ``FEWEST_ROUNDS``, and ends after ``LAST`` times ``seconds`` or
    ``MAX_ROUNDS``, precise or not.
    """
    calls, warm_up = {}, 0
    for name, block in blocks.items():
        once = block(1)
        if once < 0.1:
            warm_up, once = WARM_UP_ROUNDS, block(1)
        calls[name] = max(1, round(BLOCK_SECONDS / max(once, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in blocks}
    names, order = list(blocks), random.Random(seed)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, next_look = time.perf_counter(), 0
        for done in range(-warm_up, MAX_ROUNDS):
            if done == 0:
                times = {name: [] for name in blocks}
            spent = time.perf_counter() - start
            enough = min_rounds if spent < PATIENCE * seconds else FEWEST_ROUNDS
            if done >= enough and spent >= seconds:
                if spent >= LAST * seconds:
                    break
                if done >= next_look:
                    if precise(times):
                        break
                    next_look = done + done // 4 + 1  # looking costs time
            order.shuffle(names)
            for name in names:
                times[name].append(blocks[name](calls[name]) / calls[name])
    finally:
        if collects:
            gc.enable()
    return times


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def paired_ratio(values: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Median of the rounds' ratios, and the order statistics that hold the true median with
    ``CONFIDENCE``, whatever the distribution (all of them where the rounds are few)."""
    ratios = sorted(a / b for a, b in zip(values, reference, strict=True))
    count = len(ratios)
    # P(the k-th smallest lies above the median) = P(Binomial(n, 1/2) < k).
    below, rank = 0.0, 0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count
        if below > (1 - CONFIDENCE) / 2:
            break
        rank += 1
    rank = max(rank - 1, 0)
    return Ratio(median=quantile(ratios, 0.5), low=ratios[rank], high=ratios[count - 1 - rank])


def copy_bandwidth(device: torch.device, *, nbytes: int = 1 << 28, seconds: float = 0.3) -> float:
    """Bytes a second, read and written, of a copy between two buffers of ``nbytes``."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _median_seconds(lambda: target.copy_(source), device, seconds)


def peak_flops(device: torch.device, *, size: int = 768, seconds: float = 0.3) -> float:
    """Float32 operations a second of a matrix product: what the arithmetic units can do."""
    size = size * (8 if device.type == "cuda" else 1)
    a, b = (torch.ones(size, size, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device, seconds)


def _median_seconds(function: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median of single calls."""
    times: list[float] = []
    clock = time.perf_counter if device.type == "cuda" else cpu_clock()[1]
    end = time.perf_counter() + seconds
    while len(times) < 7 or time.perf_counter() < end:
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return quantile(times[2:], 0.5)


def free_memory(device: torch.device) -> int:
    """Bytes that are free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
