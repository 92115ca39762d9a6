"""With a process group, every rank holds the state that one process has on the whole batch."""

import copy
import os

import oracles
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracles import randn

from bmtard import BMTARDLoss, EntropyBalance, NormalizationLossBalance, _library, balance

RANKS, ROWS, STEPS = 2, 12, 4

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def build(mode, group):
    rate = {"temperature_lr": 0.05, "process_group": group}
    return (
        BMTARDLoss(balance=mode, weight_lr=0.3, **rate),
        EntropyBalance(mode=mode, **rate),
        NormalizationLossBalance(weight_lr=0.3, process_group=group),
    )


def run(modules, rows):
    """The steps on a part of the batch -> state and gradients; one batch of the run is bad."""
    whole, entropies, weights = modules
    gradients = []
    for step in range(STEPS):
        student, teacher = (
            [randn(ROWS, 10, scale=1 + k, seed=100 * step + 10 * side + k) for k in range(2)]
            for side in range(2)
        )
        if step == 2:
            student[0][0, 0] = torch.nan  # on the first rank only
        student, teacher = ([x[rows] for x in side] for side in (student, teacher))
        student = [x.clone().requires_grad_() for x in student]
        total = whole(student, teacher)
        gradients += torch.autograd.grad(total, student)
        entropies(teacher)
        weights(
            torch.stack(
                [(t - s).square().mean().detach() for s, t in zip(*(student, teacher), strict=True)]
            )
        )
        if step == 2:
            assert whole.status == weights.status == 1
        else:
            assert whole.status == 0
    state = {}
    for module in modules:
        state |= {f"{type(module).__name__}.{k}": v for k, v in module.state_dict().items()}
    return state, gradients


def join(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )


def work(rank, native, mode, folder):
    _library.NATIVE = native
    join(rank, folder)
    part = ROWS // RANKS
    result = run(build(mode, dist.group.WORLD), slice(rank * part, (rank + 1) * part))
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["bisect", "sign"])
@pytest.mark.parametrize("path", ["native", "reference"])
def test_two_ranks_equal_one_process(path, mode, tmp_path, monkeypatch):
    if path == "native":
        oracles.require_native()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    mp.spawn(work, args=(path == "native", mode, str(tmp_path)), nprocs=RANKS)
    (one, one_gradients), (two, two_gradients) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)
    )
    for name, value in one.items():
        assert torch.equal(value, two[name]), name

    monkeypatch.setattr(_library, "NATIVE", path == "native")
    expected, gradients = run(build(mode, None), slice(None))
    for name, value in one.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)
    assert float(one["BMTARDLoss.step"]) == STEPS - 1
    assert float(one["BMTARDLoss.temperatures"].max()) > 1.05
    # A rank's loss is the mean over its own rows: twice the share in the mean over all.
    for whole, *parts in zip(gradients, one_gradients, two_gradients, strict=True):
        joined = torch.cat(parts) / RANKS
        torch.testing.assert_close(joined, whole, rtol=1e-6, atol=1e-12, equal_nan=True)


def work_on_unequal_batches(rank, folder):
    join(rank, folder)
    group, logits = dist.group.WORLD, randn(12 - 5 * rank, 10)
    for module, given in (
        (BMTARDLoss(process_group=group), ([logits] * 2, [logits] * 2)),
        (EntropyBalance(process_group=group), ([logits] * 2,)),
    ):
        name = type(module).__name__
        with pytest.raises(ValueError, match=rf"{name}: mode 'bisect' .* one shape on every rank"):
            module(*given)
        assert module.step == 0
    # The ranks are still in step, and the sign rule needs no equal batches.
    signed = BMTARDLoss(balance="sign", process_group=group)
    signed([logits] * 2, [logits] * 2)
    torch.save(signed.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def work_on_given_losses(rank, folder):
    join(rank, folder)
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64) * (1 + rank)
    before = losses.clone()
    weights = NormalizationLossBalance(process_group=dist.group.WORLD)
    weights(losses)
    assert torch.equal(losses, before)
    assert weights.losses.tolist() == [1.5, 3.0]
    dist.destroy_process_group()


def test_averaging_leaves_the_given_losses_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    mp.spawn(work_on_given_losses, args=(str(tmp_path),), nprocs=RANKS)


def test_unequal_batches_are_refused_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    mp.spawn(work_on_unequal_batches, args=(str(tmp_path),), nprocs=RANKS)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def work_without_a_group(rank, folder):
    import warnings

    join(rank, folder)
    logits = [randn(4, 10), randn(4, 10, seed=1)]
    modules = build("sign", None)
    calls = ((logits, logits), (logits,), (randn(2).exp(),))
    told = []
    for module, given in zip(modules, calls, strict=True):
        balance._warned_of_ranks = False
        for training in (False, True, True):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                module.train(training)(*given)
            told.append([str(one.message) for one in caught])
    torch.save(told, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_without_a_group_are_warned_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    mp.spawn(work_without_a_group, args=(str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        told = torch.load(tmp_path / f"{rank}.pt")
        for k, name in enumerate(("BMTARDLoss", "EntropyBalance", "NormalizationLossBalance")):
            evaluating, (first,), second = told[3 * k : 3 * k + 3]
            assert not evaluating
            assert not second
            assert first.startswith(f"{name}: torch.distributed has 2 ranks, but without process_g")


def test_a_copy_shares_the_process_group(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        for module in build("bisect", dist.group.WORLD):
            module.step.fill_(3)
            copied = copy.deepcopy(module)
            assert copied.process_group is module.process_group
            assert copied.step == 3
            copied.step.fill_(4)
            assert module.step == 3
        # Warnings are errors here: the gather has no deprecated name.
        logits = [randn(4, 10), randn(4, 10, seed=1)]
        BMTARDLoss(process_group=dist.group.WORLD)(logits, logits)
    finally:
        dist.destroy_process_group()
