"""The compiled kernels of a device: small calls of each variant, and CUDA graphs.

The small calls are also what compute-sanitizer watches (tools/gpu_check.py), so they are few. On a
CPU a "graph" is the call itself, repeated on the same tensors: the tests run everywhere, and what
they expect of a graph is held against kernels that nobody captured.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from oracles import leaf, randn, require_native
from torch import Tensor

import bmtard
from bmtard import _library

Function = Callable[[], list[Tensor]]

# Rows by kernel variant, aligned to 16 bytes and not. The last of GRAPH is more than one block
# takes.
SMALL = [(5, 8), (5, 10), (3, 128), (3, 130), (2, 1200), (2, 1201)]
GRAPH = [(8, 10), (7, 130), (3, 2056), (300, 128)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 2e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-3},
}


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    require_native()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other on one busy core
    yield
    torch.set_num_threads(threads)


def logits(n, c, dtype, device, seed, count=2):
    return [
        randn(n, c, dtype=dtype, device=device, scale=1 + k, seed=100 * seed + k)
        for k in range(count)
    ]


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, bmtard runs on its reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "NATIVE", False)
        yield


# --- Small calls ----------------------------------------------------------------------------


def entropy_call(s, t, temperature):
    entropy = bmtard.softmax_entropy(s[0], temperature[0])
    return [entropy, *torch.autograd.grad(entropy.sum(), [s[0], temperature])]


def pairs_call(s, t, temperature):
    kl = bmtard.multi_teacher_kl(s, t, temperature, reduction="none", eps=1e-5)
    return [kl, *torch.autograd.grad(kl.sum(), [*s, *t, temperature])]


def shared_call(s, t, temperature):
    kl = bmtard.multi_teacher_kl(s[0], t, temperature, reduction="none")
    return [kl, *torch.autograd.grad(kl.sum(), [s[0], *t, temperature])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("call", [entropy_call, pairs_call, shared_call], ids=lambda f: f.__name__)
def test_small_calls(device, call, shape, dtype):
    def values(dtype_, device_):
        s, t = (logits(*shape, dtype, "cpu", seed) for seed in (1, 2))
        s, t = ([leaf(x.to(device_, dtype_)) for x in xs] for xs in (s, t))
        temperature = torch.tensor([1.5, 2.5], dtype=torch.float64, device=device_)
        return call(s, t, leaf(temperature))

    with plain_torch():
        expected = values(torch.float64, "cpu")
    for actual, wanted in zip(values(dtype, device), expected, strict=True):
        torch.testing.assert_close(actual.cpu().double(), wanted.double(), **TOLERANCE[dtype])


@pytest.mark.parametrize("per_sample", [True, False], ids=["rows", "batch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, (300, 128)], ids=str)  # the last: a launch a round
def test_small_searches(device, shape, dtype, per_sample):
    x = randn(*shape, dtype=dtype)
    options = {"per_sample": per_sample, "bounds": (0.05, 50.0), "tolerance": 1e-5}
    found = bmtard.bisect_temperature(x.to(device), 1.2, **options)
    log_p = (x.double() / found.temperature.cpu().double().view(-1, 1)).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    entropy = entropy if per_sample else entropy.mean(0)
    torch.testing.assert_close(entropy, torch.full_like(entropy, 1.2), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 75, 4099])  # of an image: aligned, ragged, several blocks
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_small_attack_steps(device, norm, size, dtype):
    # In steps of 1/256, which bfloat16 holds exactly below 1.
    x, x_adv = (randn(3, size, scale=40, seed=s).round().abs().clamp(max=255) / 256 for s in (3, 4))
    grad = randn(3, size, seed=5)

    def moved(dtype_, device_):
        out = x_adv.to(device_, dtype_, copy=True)
        gradient = grad.to(dtype).to(device_, dtype_)
        options = {"step_size": 2 / 256, "epsilon": 8 / 256, "norm": norm}
        bmtard.pgd_step_(out, gradient, x.to(device_, dtype_), **options)
        return out.cpu().double()

    with plain_torch():
        expected = moved(torch.float64, "cpu")
    tolerance = {"rtol": 0, "atol": 1 / 256} if dtype == torch.bfloat16 else TOLERANCE[dtype]
    torch.testing.assert_close(moved(dtype, device), expected, **tolerance)


@pytest.mark.parametrize("mode", ["bisect", "sign"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, (300, 128)], ids=str)  # the last: a launch a round
def test_small_loss_steps(device, shape, dtype, mode):
    """Beside the CPU kernels in float64: the searches of plain torch take seconds."""
    native, wide = (bmtard.BMTARDLoss(balance=mode, temperature_lr=0.05) for _ in range(2))
    native.to(device)
    for step in range(2):
        s, t = (logits(*shape, dtype, device, 10 * step + side) for side in (1, 2))
        s = [leaf(x) for x in s]
        total = native(s, t)
        wide_s = [leaf(x.detach().cpu().double()) for x in s]
        wanted = wide(wide_s, [x.cpu().double() for x in t])
        actual = [total, *torch.autograd.grad(total, s), *native.buffers()]
        expected = [wanted, *torch.autograd.grad(wanted, wide_s), *wide.buffers()]
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu().double(), e.double(), **TOLERANCE[dtype])


# --- CUDA graphs ----------------------------------------------------------------------------


class Captured:
    """A function's outputs, and ``replay()``, which computes them again where they lie.

    The function has run once before, and the state that it keeps has moved once.
    """

    def __init__(self, function: Function, device: torch.device) -> None:
        self.outputs: list[Tensor]
        if device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()  # what is made at first use is made outside of the graph
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs = function()
            self.replay = graph.replay
        else:
            self.outputs = [x.detach().clone() for x in function()]

            def replay() -> None:
                for old, new in zip(self.outputs, function(), strict=True):
                    old.copy_(new.detach())

            self.replay = replay


def assert_replays(
    device: torch.device,
    inputs: list[Tensor],
    fresh: Callable[[int], list[Tensor]],
    function: Callable[[list[Tensor]], list[Tensor]],
    eager: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> None:
    """Replays on changing inputs give the bits that eager calls on them give."""
    captured = Captured(lambda: function(inputs), device)
    before: list[Tensor] = []
    for seed in range(1, 5):
        with torch.no_grad():
            for old, new in zip(inputs, fresh(seed), strict=True):
                old.copy_(new)
        captured.replay()
        found = [x.detach().clone() for x in captured.outputs]
        copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        for a, e in zip(found, (eager or function)(copies), strict=True):
            torch.testing.assert_close(a, e.detach(), rtol=0, atol=0)
        assert any(not torch.equal(a, b) for a, b in zip(found, before, strict=False)) or not before
        before = found


def entropy_graph(x):
    entropy = bmtard.softmax_entropy(x[0], x[4][0])
    return [entropy, *torch.autograd.grad(entropy, [x[0], x[4]], torch.ones_like(entropy))]


def bisect_graph(per_sample):
    def function(x):
        found = bmtard.bisect_temperature(
            x[0], x[5], per_sample=per_sample, initial=x[4][0].detach(), bounds=(0.05, 50.0)
        )
        grads = torch.autograd.grad(
            found.temperature, [x[0], x[5]], torch.ones_like(found.temperature)
        )
        return [found.temperature, found.entropy, found.status, found.iterations, *grads]

    return function


def kl_graph(shared):
    def function(x):
        student = x[0] if shared else x[:2]
        kl = bmtard.multi_teacher_kl(student, x[2:4], x[4], reduction="none", eps=1e-5)
        by = [x[0], *x[2:5]] if shared else x[:5]
        return [kl, *torch.autograd.grad(kl, by, torch.ones_like(kl))]

    return function


OP_GRAPHS = {
    "softmax_entropy": entropy_graph,
    "bisect_temperature-rows": bisect_graph(True),
    "bisect_temperature-batch": bisect_graph(False),
    "multi_teacher_kl-pairs": kl_graph(False),
    "multi_teacher_kl-shared": kl_graph(True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GRAPH, ids=str)
@pytest.mark.parametrize("name", list(OP_GRAPHS))
def test_graph_of_an_op_replays(device, name, shape, dtype):
    def fresh(seed):
        temperature = torch.tensor([1.0, 2.0], dtype=torch.float64, device=device) + 0.1 * seed
        target = torch.tensor(1.0 + 0.1 * seed, dtype=torch.float32, device=device)
        return [*logits(*shape, dtype, device, seed, count=4), temperature, target]

    inputs = [leaf(x) for x in fresh(0)]
    assert_replays(device, inputs, fresh, OP_GRAPHS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_graph_of_an_attack_replays(device, norm, dtype):
    """Three steps, each from where the one before has moved the image."""

    def fresh(seed):
        x = randn(4, 3, 5, 7, scale=0.3, seed=seed).abs().clamp(max=1).to(device, dtype)
        grads = [randn(4, 3, 5, 7, dtype=dtype, device=device, seed=9 * seed + i) for i in range(3)]
        return [x, *grads]

    def function(x):
        x_adv = x[0].clone()
        for grad in x[1:]:
            bmtard.pgd_step_(x_adv, grad, x[0], step_size=0.1, epsilon=0.2, norm=norm)
        return [x_adv]

    assert_replays(device, fresh(0), fresh, function)


@pytest.mark.parametrize("mode", ["bisect", "sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GRAPH, ids=str)  # one launch, and a launch a round
def test_graph_of_the_loss_replays_training_steps(device, shape, dtype, mode):
    """Several steps: the state moves in the graph as it does eagerly, and loss, gradients, state
    are equal to the bit."""
    replayed, eager = (
        bmtard.BMTARDLoss(balance=mode, temperature_lr=0.05).to(device) for _ in range(2)
    )

    def fresh(seed):
        return logits(*shape, dtype, device, seed, count=4)

    def step(loss):
        def function(x):
            total = loss(x[:2], x[2:])
            return [total, *torch.autograd.grad(total, x[:2]), *loss.buffers()]

        return function

    inputs = fresh(0)
    inputs[:2] = [leaf(x) for x in inputs[:2]]
    step(eager)(inputs)  # as the captured one before its capture
    assert_replays(device, inputs, fresh, step(replayed), step(eager))
    assert int(replayed.step) == 5


@pytest.mark.parametrize("mode", ["bisect", "sign"])
def test_graph_of_the_balances_replays(device, mode):
    entropies, losses = bmtard.EntropyBalance(mode=mode), bmtard.NormalizationLossBalance()
    twins = bmtard.EntropyBalance(mode=mode), bmtard.NormalizationLossBalance()
    for module in (entropies, losses, *twins):
        module.to(device)

    def fresh(seed):
        return [
            *logits(8, 10, torch.float32, device, seed),
            randn(2, device=device, seed=seed).abs(),
        ]

    def step(entropies, losses):
        def function(x):
            return [entropies(x[:2]), losses(x[2]), *entropies.buffers(), *losses.buffers()]

        return function

    inputs = fresh(0)
    step(*twins)(inputs)
    assert_replays(device, inputs, fresh, step(entropies, losses), step(*twins))


FIRST_CALL = """
import contextlib, sys, torch, bmtard
device = torch.device(sys.argv[1])
z = torch.randn(300, 128, device=device, requires_grad=True)
x, grad = torch.rand(2, 1000, device=device)

def calls():
    losses = [bmtard.softmax_entropy(z).sum(), bmtard.multi_teacher_kl(z, [z.detach() / 3]).sum()]
    found = bmtard.bisect_temperature(z.detach(), 2.0).temperature
    x_adv = bmtard.pgd_step_(x.clone(), grad, x, step_size=0.1, epsilon=0.2)
    return [*losses, *torch.autograd.grad(losses, z), found, x_adv]

if device.type == "cuda":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = calls()
    graph.replay()
else:
    first = calls()
assert all(torch.equal(a, b) for a, b in zip(first, calls(), strict=True))
"""


def test_the_first_call_of_a_process_may_be_captured(device):
    """It loads the kernels and asks the device, of which a graph must not take notice."""
    command = [sys.executable, "-c", FIRST_CALL, str(device)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
