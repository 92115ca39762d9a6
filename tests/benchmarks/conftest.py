"""The suite on tiny inputs, and a simulated machine with a clock of its own."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from bmtard.benchmarks import suite, timing, training_step
from bmtard.benchmarks.spec import Provider, catalogue
from bmtard.benchmarks.suite import Selection, run


@pytest.fixture(autouse=True)
def _one_thread():
    """Two that other processes interrupt would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measured():
    """Runs a selection in milliseconds; a dict of providers replaces or adds some."""

    def measure(extra=None, /, **selection):
        ops, known = catalogue()
        defaults = {"preset": "quick", "seconds": 0.01, "shapes": ("16x10",)}
        return run(
            Selection(**{**defaults, **selection}), ops, {**known, **(extra or {})},
            command="test",
        )  # fmt: skip

    return measure


class Machine:
    """Its clock moves by the work that it is given, and not otherwise."""

    def __init__(self, seed=0):
        self.now, self.random = 0.0, random.Random(seed)
        self.speed = 1.0
        self.drift = 0.0
        """What each second of the clock adds to the time of the same work, relative."""
        self.busy = 0.0
        """How likely another process takes the core during a piece of work."""
        self.slice_seconds = 4e-3
        """What that takes, in the mean."""

    def clock(self):
        return self.now

    def work(self, seconds):
        self.now += seconds * (1 + self.drift * self.now) / self.speed
        if self.random.random() < self.busy:
            self.now += self.random.expovariate(1 / self.slice_seconds)

    def block(self, seconds):
        """A block function of a call that takes ``seconds`` on an idle machine."""

        def run(calls):
            start = self.now
            for _ in range(calls):
                self.work(seconds)
            return self.now - start

        return run


@pytest.fixture
def machine(monkeypatch):
    """Takes the place of the clock in every module that measures."""
    simulated = Machine()
    clocks = SimpleNamespace(perf_counter=simulated.clock, process_time=simulated.clock)
    for module in (timing, suite, training_step):
        monkeypatch.setattr(module, "time", clocks)
    for name in ("copy_bandwidth", "peak_flops"):  # these wait for the clock to move
        monkeypatch.setattr(suite, name, lambda *_, **__: 1e10)
    return simulated


@pytest.fixture
def providers(machine):
    """Of right results, in the given seconds of the simulated machine."""

    class Simulated(Provider):
        title = "simulated"

        def __init__(self, name, seconds):
            self.name, self.seconds, self.right = name, seconds, catalogue()[1]["eager"]

        def offers(self, op):
            return self.right.offers(op)

        def build(self, op, spec):
            function = self.right.build(op, spec)

            def run(inputs):
                machine.work(self.seconds)
                return function(inputs)

            return run

    return lambda **seconds: {name: Simulated(name, value) for name, value in seconds.items()}
