"""Rounds, intervals and the CUDA path on a stand-in for torch.cuda."""

import contextlib
import random
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bmtard.benchmarks import suite, timing
from bmtard.benchmarks.cuda import CudaTimer, copies_for_cold, count_events, per_call
from bmtard.benchmarks.providers.bmtard import Bmtard
from bmtard.benchmarks.spec import Shape, Spec, catalogue
from bmtard.benchmarks.suite import cold_inputs, graph_blocks, measure_group
from bmtard.benchmarks.table import worst_step
from bmtard.benchmarks.timing import interleave, paired_ratio, quantile


def test_rounds_are_shuffled_and_paired():
    order = []

    def block(name):
        def run(calls):
            order.append(name)
            return calls * 1e-3

        return run

    names = ["a", "b", "c"]
    times = interleave({n: block(n) for n in names}, seconds=0.02, min_rounds=20)
    assert len(times["a"]) == len(times["b"]) >= 20
    assert all(value == pytest.approx(1e-3) for value in times["a"])
    rounds = [
        order[i : i + 3] for i in range(6, len(order), 3)
    ]  # after two calls each to calibrate
    assert all(sorted(r) == names for r in rounds)
    assert len({tuple(r) for r in rounds}) > 3


def test_fast_functions_get_more_calls_in_a_block():
    calls = Counter()

    def fast(count):
        calls["fast"] = max(calls["fast"], count)
        return count * 1e-5

    def slow(count):
        calls["slow"] = max(calls["slow"], count)
        return count * 0.5

    interleave({"fast": fast, "slow": slow}, seconds=0.0, min_rounds=3)
    assert calls == {"fast": 100, "slow": 1}


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [
        (40.0, 20),  # of 2 s
        (6.0, 15),  # min_rounds
        (4.0, 10),  # PATIENCE * 4 s
        (1.0, timing.FEWEST_ROUNDS),
        (4000.0, timing.MAX_ROUNDS),
    ],
)
def test_rounds_within_the_time(machine, seconds, rounds):
    times = interleave({"slow": machine.block(2.0)}, seconds=seconds, min_rounds=15)
    assert len(times["slow"]) == rounds


def test_rounds_go_on_until_they_are_precise(machine):
    looks = []

    def precise(times):
        looks.append(len(times["slow"]))
        return looks[-1] >= 25

    times = interleave({"slow": machine.block(2.0)}, seconds=20.0, min_rounds=5, precise=precise)
    assert looks == [10, 13, 17, 22, 28]
    assert len(times["slow"]) == 28
    never = interleave(
        {"slow": machine.block(2.0)}, seconds=20.0, min_rounds=5, precise=lambda times: False
    )
    assert len(never["slow"]) == timing.LAST * 20 / 2


def test_warm_up_is_not_counted(machine):
    blocks = iter([1e-3, 1e-3, 9.0, 9.0, *[1e-3] * 100])

    def block(calls):
        machine.work(1.0)
        return next(blocks)

    times = interleave({"fast": block}, seconds=30.0, min_rounds=3)
    assert set(times["fast"]) == {1e-3}
    assert len(times["fast"]) == 28


@pytest.mark.parametrize("busy", [0.0, 0.4])
def test_busy_machine_is_measured_longer(machine, busy):
    machine.busy = busy
    blocks = {"bmtard": machine.block(2e-3), "eager": machine.block(6e-3)}
    measures = suite.collect(blocks, replace(suite.PRESETS["quick"], seconds=0.1))
    ratio = measures["eager"].ratio
    assert ratio.within(0.1)
    assert ratio.low <= 3 <= ratio.high
    rounds = measures["eager"].rounds
    assert rounds == 11 if busy == 0 else rounds > 30


def test_hopeless_noise_ends(machine):
    machine.busy = 0.9
    blocks = {"bmtard": machine.block(2e-3), "eager": machine.block(6e-3)}
    measures = suite.collect(blocks, replace(suite.PRESETS["quick"], seconds=0.1))
    assert not measures["eager"].ratio.within(0.1)
    assert machine.now < 1.1 * timing.LAST * 0.1


def test_interval_holds_the_median_as_often_as_it_says():
    random.seed(1)
    missed = 0
    for _ in range(400):
        values = [random.lognormvariate(0.0, 0.3) for _ in range(40)]
        ratio = paired_ratio(values, [1.0] * 40)
        assert ratio.low <= ratio.median <= ratio.high
        missed += not ratio.low <= 1 <= ratio.high
    assert missed <= 12  # 1 % of 400 is 4; 12 has probability 1e-3


def test_interval_excludes_what_differs():
    random.seed(2)
    values = [1.2 * random.lognormvariate(0.0, 0.1) for _ in range(60)]
    ratio = paired_ratio(values, [random.lognormvariate(0.0, 0.1) for _ in range(60)])
    assert not ratio.tie
    assert ratio.median == pytest.approx(1.2, rel=0.1)
    assert paired_ratio(values, values).tie


def test_few_rounds_give_the_whole_range():
    ratio = paired_ratio([1.0, 3.0, 2.0], [1.0, 1.0, 1.0])
    assert (ratio.low, ratio.median, ratio.high) == (1.0, 2.0, 3.0)


def test_fewest_rounds_are_enough_for_the_confidence():
    """The range of n values misses the median where all lie on one side of it."""
    missed = [2 / 2**n for n in (timing.FEWEST_ROUNDS - 1, timing.FEWEST_ROUNDS)]
    assert missed[0] > 1 - timing.CONFIDENCE >= missed[1]


def test_width_of_an_interval():
    ratio = timing.Ratio(low=2.0, median=2.1, high=2.2)
    assert ratio.within(0.1)
    assert not ratio.within(0.09)


def test_drift_that_hits_all_cancels():
    drift = [1 + 0.05 * i for i in range(30)]
    ratio = paired_ratio([2 * d for d in drift], drift)
    assert (ratio.low, ratio.high) == (pytest.approx(2.0), pytest.approx(2.0))


def test_quantiles():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)
    assert quantile([7.0], 0.8) == 7.0


def test_block_times_what_its_pass_says(machine):
    x = torch.ones(4, requires_grad=True)
    inputs = SimpleNamespace(leaves=(x,), upstream=(torch.ones(4),))

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            machine.work(5.0)
            return 2 * value

        @staticmethod
        def backward(ctx, grad):
            machine.work(7.0)
            return 2 * grad

    seconds = {
        p: timing.plain_block(lambda _: (Double.apply(x),), inputs, p, machine.clock)(3)
        for p in ("forward", "backward", "both")
    }
    assert seconds == {"forward": 15.0, "backward": 21.0, "both": 36.0}


def test_block_waits_for_the_device(machine):
    launched = []

    def synchronize():
        machine.work(2.0 * len(launched))
        launched.clear()

    block = timing.plain_block(
        lambda _: launched.append(1), None, "forward", machine.clock, synchronize
    )
    assert block(3) == 6.0


def test_one_thread_is_timed_without_the_time_of_others():
    assert timing.cpu_clock() == ("cpu_time", time.process_time)
    torch.set_num_threads(2)  # the fixture sets it back
    assert timing.cpu_clock() == ("wall", time.perf_counter)


def test_worst_step_finds_a_cliff():
    assert worst_step([(1, 10.0), (2, 10.0), (4, 20.0)])[2] == 1.0
    assert worst_step([(8, 10.0), (16, 20.0), (17, 42.5), (32, 80.0)])[:2] == (16, 17)
    assert worst_step([(5, 1.0)]) == (0, 0, 0.0)


def test_copy_bandwidth_and_peak_count_bytes_and_operations(monkeypatch):
    cpu = torch.device("cpu")
    seconds = iter(range(1000))  # a clock that each look moves by one
    ticking = SimpleNamespace(
        perf_counter=lambda: next(seconds), process_time=lambda: next(seconds)
    )
    monkeypatch.setattr(timing, "time", ticking)
    assert timing.copy_bandwidth(cpu, nbytes=1 << 20, seconds=50) == 2 << 20
    assert timing.peak_flops(cpu, size=64, seconds=50) == 2 * 64**3
    assert timing.free_memory(cpu) > 1 << 20


# --- CUDA, on a stand-in ----------------------------------------------------------------------


class FakeGraph:
    def __init__(self):
        self.work = 0
        self.replays = 0

    def replay(self):
        self.replays += 1


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = FakeEvent.clock

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


class FakeCuda:
    """Runs what is captured once, and lets a replay take 1 ms of its clock."""

    def __init__(self, l2_bytes=1 << 20):
        self.l2_bytes, self.graphs, self.capturing = l2_bytes, [], False

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=self.l2_bytes)

    def Stream(self, device):
        return object()

    def stream(self, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):
        graph = FakeGraph()
        replay = graph.replay

        def timed():
            FakeEvent.clock += 1.0
            replay()

        graph.replay = timed
        self.graphs.append(graph)
        return graph

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    Event = FakeEvent

    def synchronize(self, device):
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    def reset_peak_memory_stats(self, device):
        self.peak = 100

    def memory_allocated(self, device):
        return 100

    def max_memory_allocated(self, device):
        return 164


def entropy_case():
    op = catalogue()[0]["softmax_entropy"]
    case = Spec(
        shape=Shape(name="test", dims=(8, 10)), dtype=torch.float32, device=torch.device("cpu")
    )
    return op, case, op.inputs(case, 0), Bmtard().build("softmax_entropy", case)


@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
def test_graph_block_divides_by_the_calls_it_holds(pass_):
    op, case, inputs, function = entropy_case()
    calls = []
    counted = lambda i: calls.append(1) or function(i)  # noqa: E731
    timer = CudaTimer(torch.device("cpu"), FakeCuda())
    block = timer.graph_block(counted, [inputs, op.inputs(case, 1)], pass_, 1e-5)
    # 2 sets of inputs, 10 rounds to reach 20 calls; a backward graph holds no forward.
    assert len(calls) == (2 if pass_ == "backward" else 3 + 20)
    assert block(1) == pytest.approx(1e-3 / 20)
    assert block(200) == pytest.approx(10e-3)
    assert timer.cuda.graphs[0].replays == 11
    calls.clear()
    slow = timer.graph_block(counted, [inputs], pass_, 1.0)
    assert len(calls) == (1 if pass_ == "backward" else 3 + 1)
    assert slow(1) == pytest.approx(1e-3)


def test_cold_inputs_outgrow_the_cache():
    assert copies_for_cold(100, 1000) == 30
    assert copies_for_cold(10_000, 1000) == 1
    op, case, inputs, _ = entropy_case()
    group = SimpleNamespace(op=op, spec=case)
    nbytes = sum(t.nbytes for t in inputs.tensors())
    timer = CudaTimer(torch.device("cpu"), FakeCuda(l2_bytes=2 * nbytes))
    sets = cold_inputs(group, inputs, timer)
    assert len(sets) == 6
    assert len({s.logits.data_ptr() for s in sets}) == 6
    assert cold_inputs(group, inputs, CudaTimer(torch.device("cpu"), FakeCuda(1 << 30))) == []


def record(waits):
    wall = SimpleNamespace(median_us=10.0)
    return SimpleNamespace(waits=waits, notes=[], measures={"wall": wall})


def test_what_cannot_be_captured_is_said():
    _, _, inputs, function = entropy_case()
    timer = CudaTimer(torch.device("cpu"), FakeCuda())

    def waits(i):
        timer.synchronize()
        return function(i)

    records = {
        name: record(waits=float(name == "counted")) for name in ("fine", "counted", "fails")
    }
    functions = {"fine": function, "counted": function, "fails": waits}
    blocks = graph_blocks(functions, records, [inputs], "graph_hot", "forward", timer)
    assert set(blocks) == {"fine"}
    assert "waits for the device" in records["counted"].notes[0]
    assert "capture failed: RuntimeError: operation not permitted" in records["fails"].notes[0]
    assert graph_blocks({"fine": function}, records, [], "graph_cold", "forward", timer) == {}
    assert "too small" in records["fine"].notes[0]


def test_group_on_the_stand_in_fills_every_column(monkeypatch):
    op, case, _, _ = entropy_case()
    timer = CudaTimer(torch.device("cpu"), FakeCuda(l2_bytes=400))
    counts = SimpleNamespace(kernels=1.0, copies=0.0, waits=0.0)
    monkeypatch.setattr(timer, "counts", lambda once: once() and counts)
    preset = replace(suite.PRESETS["quick"], seconds=0.01)
    group = suite.Group(op=op, spec=case, dtype="float32", passes=("forward", "both"),
                        providers=("bmtard", "eager"), preset=preset)  # fmt: skip
    records = measure_group(group, catalogue()[1], 1 << 30, timer)
    assert len(records) == 4
    for record in records:
        assert record.status == "ok", record.reason
        assert set(record.measures) == {"wall", "graph_hot", "graph_cold"}
        assert record.best_measure == "graph_cold"
        assert (record.kernels, record.waits, record.peak_bytes) == (1.0, 0.0, 64)


def event(name, device):
    return SimpleNamespace(name=name, device_type=device)


def test_profile_events_are_told_apart():
    events = [
        event("void row_kernel<float>", "DeviceType.CUDA"),
        event("Memcpy DtoH (Device -> Pageable)", "DeviceType.CUDA"),
        event("Memset (Device)", "DeviceType.CUDA"),
        event("cudaLaunchKernel", "DeviceType.CPU"),
        event("cudaStreamSynchronize", "DeviceType.CPU"),
        event("aten::item", "DeviceType.CPU"),
        SimpleNamespace(name="## Call", device_type="DeviceType.CUDA", is_user_annotation=True),
    ]
    assert count_events(events) == {"kernels": 1, "copies": 2, "waits": 1}
    # The profiler waits once itself, whatever it profiles.
    counts = per_call(Counter(kernels=3, waits=2), Counter(kernels=15, waits=6), 4)
    assert (counts.kernels, counts.copies, counts.waits) == (3.0, 0.0, 1.0)
