"""Time on a GPU: CUDA graphs with a hot and a cold L2, launches, waits and memory.

The wall clock of small ops is the launch overhead of Python and torch; the replay of a graph is the
GPU's own time. A replayed op finds its inputs in L2 if they fit: "hot". "Cold" calls go round
through copies of the inputs that are together ``COLD_FACTOR`` times the L2.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .spec import Function, Inputs
from .timing import Block, call, gradients

COLD_FACTOR = 3
MAX_COPIES = 1024
"""Of the inputs; smaller ones cannot be made cold this way, and it is said."""
GRAPH_CALLS = 20
"""Calls in a graph, fewer where that takes longer than ``GRAPH_SECONDS``."""
GRAPH_SECONDS = 5e-3

WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
    "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one call."""

    kernels: float
    copies: float
    """Copies and fills of memory."""
    waits: float
    """Times that the host waits for the device."""


def count_events(events: Iterable[Any]) -> Counter[str]:
    """What a profile holds: "kernels", "copies" and "waits"."""
    counter: Counter[str] = Counter()
    for event in events:
        if getattr(event, "is_user_annotation", False):
            continue  # torch.compile and the profiler mark ranges of the device's time
        if "CUDA" in str(event.device_type):
            is_copy = event.name.startswith(("Memcpy", "Memset"))
            counter["copies" if is_copy else "kernels"] += 1
        elif event.name in WAITS:
            counter["waits"] += 1
    return counter


def per_call(few: Counter[str], many: Counter[str], more: int) -> Counts:
    """From profiles that differ by ``more`` calls: the profiler's own events cancel."""
    return Counts(
        **{name: (many[name] - few[name]) / more for name in ("kernels", "copies", "waits")}
    )


def copies_for_cold(nbytes: int, l2_bytes: int) -> int:
    """How many sets of inputs outgrow the L2."""
    return max(1, math.ceil(COLD_FACTOR * l2_bytes / max(nbytes, 1)))


class CudaTimer:
    """Measures on one device. ``cuda`` is torch.cuda, or a stand-in of the tests."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.l2_bytes = int(cuda.get_device_properties(device).L2_cache_size)
        # Autograd runs a backward on the stream of its forward: one stream for it all.
        self.stream = cuda.Stream(device)

    def synchronize(self) -> None:
        self.cuda.synchronize(self.device)

    def counts(self, once: Callable[[], Any], calls: int = 4) -> Counts:
        def profiled(count: int) -> Counter[str]:
            activities = [
                torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA,
            ]  # fmt: skip
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(count):
                    once()
                self.synchronize()
            return count_events(profile.events())

        once()
        profiled(1)  # the first profile of a process sees the profiler's own set-up
        return per_call(profiled(1), profiled(1 + calls), calls)

    def peak_bytes(self, once: Callable[[], Any]) -> int:
        """Memory that a call needs beyond what is there before."""
        self.synchronize()
        self.cuda.reset_peak_memory_stats(self.device)
        before = self.cuda.memory_allocated(self.device)
        once()
        self.synchronize()
        return int(self.cuda.max_memory_allocated(self.device) - before)

    def graph_block(
        self, function: Function, inputs: Sequence[Inputs], pass_: str, seconds: float
    ) -> Block:
        """Replays of a graph with a call for each of ``inputs``, repeated to ``GRAPH_CALLS``.

        A "backward" graph holds the gradients alone, of forwards that are done before. seconds: of
        a call, about.
        """
        calls = min(GRAPH_CALLS, max(1, round(GRAPH_SECONDS / seconds)))
        rounds = max(1, math.ceil(calls / len(inputs)))
        self.synchronize()  # the inputs come from another stream
        with self.cuda.stream(self.stream), torch.set_grad_enabled(pass_ != "forward"):
            if pass_ == "backward":
                forwards = [function(each) for each in inputs]
                once: list[Callable[[], Any]] = [
                    functools.partial(gradients, outputs, each, retain=True)
                    for outputs, each in zip(forwards, inputs, strict=True)
                ]
            else:
                once = [call(function, each, pass_) for each in inputs]
            for _ in range(3):  # allocations, lazily loaded kernels, autotuning
                once[0]()
            self.synchronize()
            graph = self.cuda.CUDAGraph()
            with self.cuda.graph(graph, stream=self.stream):
                for _ in range(rounds):
                    for each in once:
                        each()
        calls_in_graph = rounds * len(inputs)

        def block(calls: int) -> float:
            replays = max(1, round(calls / calls_in_graph))
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            with self.cuda.stream(self.stream):
                start.record(self.stream)
                for _ in range(replays):
                    graph.replay()
                end.record(self.stream)
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 * calls / (replays * calls_in_graph)

        return block
