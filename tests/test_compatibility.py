"""What docs/compatibility.md says and no other file tests."""

from __future__ import annotations

import concurrent.futures
import copy
import os
import warnings

import oracles
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracles import leaf, randn

import bmtard
from bmtard import BMTARDLoss, EntropyBalance, losses
from bmtard.attacks import pgd

pytest_plugins = ["paths"]

MODES = ["bisect", "sign"]


def batch(seed, rows=16, classes=10, **options):
    return tuple(
        [
            randn(rows, classes, scale=1 + k, seed=50 * seed + 10 * side + k, **options)
            for k in (0, 1)
        ]
        for side in (0, 1)
    )


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# --- Gradient scaler -------------------------------------------------------------------------


def trained_in_float16(device, mode, skipped, half):
    """The way of the weights, and the state. In float32 the steps in ``skipped`` are left out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = torch.nn.Linear(12, 10).to(device)
    start = student.weight.detach().clone()
    criterion = BMTARDLoss(balance=mode, temperature_lr=0.05).to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, enabled=half)
    for step in range(40):
        x = randn(16, 12, dtype=torch.float32, device=device, scale=1.0, seed=step)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16, enabled=half):
            logits = student(x)
            loss = criterion([logits, logits], [2 * x[:, :10], x[:, 2:]])
        if half:
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped.append(scaler.get_scale() < scale)
        elif not skipped[step]:
            loss.backward()
            optimizer.step()
    return student.weight.detach() - start, criterion.state_dict()


@pytest.mark.parametrize("mode", MODES)
def test_grad_scaler(device, mode):
    """As in float32, to rounding; the balance moves also where the scaler skips a step."""
    skipped = []
    way, state = trained_in_float16(device, mode, skipped, half=True)
    assert 5 < sum(skipped) < 35
    expected, wanted = trained_in_float16(device, mode, skipped, half=False)
    assert (way - expected).abs().max() < 0.02 * expected.abs().max()
    assert state["step"] == 40
    for name in ("temperatures", "weights"):
        torch.testing.assert_close(state[name], wanted[name], rtol=2e-3, atol=2e-3)


# --- torch.compile and export -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_compiled_calls_of_one_step(mode):
    oracles.require_native()
    torch.compiler.reset()
    eager, traced = (BMTARDLoss(balance=mode, temperature_lr=0.05) for _ in range(2))
    fast = torch.compile(lambda s, t: traced(s, t), backend="aot_eager", fullgraph=True)
    for step in range(3):
        with eager.one_step(), traced.one_step():
            for part in range(3):
                students, teachers = batch(10 * step + part)
                one, two = ([leaf(s) for s in students] for _ in range(2))
                expected, actual = eager(one, teachers), fast(two, teachers)
                torch.testing.assert_close(actual, expected)
                for a, b in zip(
                    torch.autograd.grad(actual, two),
                    torch.autograd.grad(expected, one),
                    strict=True,
                ):
                    torch.testing.assert_close(a, b)
        for name, value in snapshot(traced).items():
            torch.testing.assert_close(value, eager.state_dict()[name])
    assert traced.step == 3


class Head(torch.nn.Module):
    """Everything that is not random, on the logits of two students and two teachers."""

    def __init__(self):
        super().__init__()
        self.criterion = BMTARDLoss(balance="sign", temperature_lr=0.05)

    def forward(self, students, teachers):
        return (
            self.criterion(students, teachers),
            losses.kd_loss(students[0], teachers[0], 4.0),
            bmtard.multi_teacher_kl(students, teachers, 2.0, student_temperature="teacher"),
            bmtard.softmax_entropy(teachers[0], 2.0),
            bmtard.bisect_temperature(teachers[0], 1.2).temperature,
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export():
    """With a batch of any size; the exported program moves the balance as the module does."""
    oracles.require_native()
    rows = torch.export.Dim("rows", min=2)
    given = batch(0, dtype=torch.float32)
    shapes = tuple([{0: rows}, {0: rows}] for _ in range(2))
    head = Head()
    program = torch.export.export(copy.deepcopy(head), given, dynamic_shapes=shapes).module()
    for seed, size in ((1, 16), (2, 5)):
        given = batch(seed, size, dtype=torch.float32)
        for actual, expected in zip(program(*given), head(*given), strict=True):
            torch.testing.assert_close(actual, expected)
    state = dict(program.named_buffers())
    for name, value in head.named_buffers():
        torch.testing.assert_close(state[name], value)
    assert head.criterion.step == 2


# --- Determinism, threads, processes -----------------------------------------------------------


def everything(device, dtype=torch.float32):
    """Values and gradients of every op and of losses with labels."""
    students, teachers = batch(0, 33, dtype=dtype, device=device)
    students = [leaf(s) for s in students]
    labels = torch.arange(33, device=device) % 10
    criterion = BMTARDLoss().to(device)
    images = randn(4, 3, 8, 8, dtype=dtype, device=device).sigmoid()
    total = criterion(students, teachers)
    total = total + bmtard.multi_teacher_kl(students, teachers, student_temperature="teacher").sum()
    total = total + bmtard.softmax_entropy(students[0], reduction="mean")
    total = total + bmtard.bisect_temperature(students[0], 1.0).temperature
    total = total + losses.mart_loss(
        clean_logits=students[0], adversarial_logits=students[1], labels=labels
    )
    total = total + losses.dkd_loss(students[0], teachers[0], labels)
    total = total + losses.jsd_loss(students[1], teachers[1])
    step = bmtard.pgd_step_(images.clone(), images - 0.5, images, step_size=0.1, epsilon=0.2)
    grads = torch.autograd.grad(total, students)
    return [total.detach(), *grads, step, *criterion.state_dict().values()]


def test_deterministic_algorithms(device, path):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = everything(device), everything(device)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_threads(device, path):
    """Python threads, each with tensors and modules of its own."""
    expected = everything(device)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: everything(device), range(8)):
            for actual, wanted in zip(results, expected, strict=True):
                assert torch.equal(actual, wanted)


class Softened(torch.utils.data.Dataset):
    """What a data set may do in the processes of a DataLoader."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        logits = randn(300, 10, seed=index)
        return bmtard.softmax_entropy(logits), bmtard.bisect_temperature(logits, 1.0).temperature


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_of_a_data_loader(path, start):
    """Forked after the kernels ran on several threads here, or started afresh."""
    if (path, start) == ("reference", "spawn"):
        pytest.skip("a fresh process loads the library again")
    expected = [Softened()[index] for index in range(6)]
    loader = torch.utils.data.DataLoader(
        Softened(), batch_size=1, num_workers=2, multiprocessing_context=start
    )
    for (entropy, temperature), wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(entropy[0], wanted[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(temperature[0], wanted[1], rtol=1e-14, atol=0)


def test_side_streams(device):
    """Kernels run on the current stream: behind what waits there, not on the default one."""
    if device.type != "cuda":
        pytest.skip("only CUDA has streams")
    expected = everything(device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        results = everything(device)
    stream.synchronize()
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_two_gpus(device):
    """Each call on the device of its tensors, whichever is current."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    expected = everything(first)
    with torch.cuda.device(first):
        results = everything(second)
        for actual, wanted in zip(results, expected, strict=True):
            assert actual.device == second
            assert torch.equal(actual.cpu(), wanted.cpu())
    students, teachers = batch(0, device=first)
    with pytest.raises(ValueError, match="must be on the device of student_logits, cuda:0"):
        bmtard.multi_teacher_kl(students, [t.to(second) for t in teachers])


# --- States of earlier versions ----------------------------------------------------------------

STATE_OF_0_1_0 = {
    "temperatures": [1.0, 1.75],
    "weights": [0.375, 0.625],
    "initial_losses": [0.5, 0.25],
    "entropies": [1.5, 1.25],
    "losses": [0.25, 0.25],
    "temperature_lr": 0.001,
    "weight_lr": 0.5,
    "step": 7,
    "status": 0,
}


def test_state_of_version_0_1_0(path):
    """Loads as it was written then, and its next step is this one."""
    state = {
        name: torch.tensor(value, dtype={"step": torch.int64, "status": torch.int32}.get(
            name, torch.float64
        ))
        for name, value in STATE_OF_0_1_0.items()
    }  # fmt: skip
    criterion = BMTARDLoss(balance="sign")
    criterion.load_state_dict(state, strict=True)
    students, teachers = batch(0)
    loss = criterion(students, teachers)
    each = [
        float(oracles.kl(s, t, temperature).mean()) / 10
        for s, t, temperature in zip(students, teachers, (1.0, 1.75), strict=True)
    ]
    speed = [each[0] / 0.5, each[1] / 0.25]
    weights = [
        0.5 * old + 0.5 * one / sum(speed) for old, one in zip((0.375, 0.625), speed, strict=True)
    ]
    assert loss.item() == pytest.approx(weights[0] * each[0] + weights[1] * each[1], rel=1e-9)
    assert criterion.step == 8
    sharper = float(oracles.entropy(teachers[0]).mean()) < float(
        oracles.entropy(teachers[1], 1.75).mean()
    )
    expected = [1.0 + 0.001 * sharper, 1.75 - 0.001 if sharper else 1.75 + 0.001]
    assert criterion.temperatures.tolist() == pytest.approx(expected, rel=1e-12)
    balance = EntropyBalance(mode="sign")
    names = ("temperatures", "entropies", "temperature_lr", "step", "status")
    balance.load_state_dict({name: state[name] for name in names}, strict=True)


# --- Several ranks -----------------------------------------------------------------------------

RANKS, ROWS, STEPS = 2, 16, 3

several_ranks = pytest.mark.skipif(
    not dist.is_available(), reason="torch without torch.distributed"
)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
    ).double()


def inputs(step, rows):
    x = randn(ROWS, 12, scale=1.0, seed=step).sigmoid()
    y = torch.arange(ROWS) % 10
    return x[rows], y[rows]


def train(student, attacked, mode, rows, group=None, parts=1, quiet=None):
    """Steps on some rows of each batch -> the state of the balance.

    In ``parts`` micro-batches; ``quiet`` is the context of all but the last backward.
    """
    criterion = BMTARDLoss(balance=mode, temperature_lr=0.2, weight_lr=0.3, process_group=group)
    teachers = [2 * randn(12, 10, seed=k, scale=1.0) for k in (1, 2)]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for step in range(STEPS):
        x, y = inputs(step, rows)
        x_adv = pgd(attacked, x, y, epsilon=0.1, step_size=0.05, steps=2, start=x, clip_start=False)
        taught = [x_adv @ teachers[0], 0.3 * x @ teachers[1]]
        optimizer.zero_grad()
        if parts == 1:
            criterion([student(x_adv), student(x)], taught).backward()
        else:
            with criterion.one_step():
                with torch.no_grad():
                    criterion([attacked(x_adv), attacked(x)], taught)
                size = len(x) // parts
                for part in range(parts):
                    own = slice(part * size, (part + 1) * size)
                    with quiet() if part < parts - 1 else torch.enable_grad():
                        loss = criterion(
                            [student(x_adv[own]), student(x[own])], [t[own] for t in taught]
                        )
                        (loss / parts).backward()
        optimizer.step()
    return criterion.state_dict()


def alone(mode):
    student = network()
    state = train(student, student, mode, slice(None))
    assert state["temperatures"].max() > 1.1
    return {**state, **student.state_dict()}


def assert_ranks_equal(results, mode):
    first, second = results
    assert_same(first, second)
    for name, value in alone(mode).items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-7, msg=name)


def own_rows(rank):
    return slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)


def ddp(rank, mode, parts):
    student = network()
    wrapped = torch.nn.parallel.DistributedDataParallel(student)
    state = train(wrapped, student, mode, own_rows(rank), dist.group.WORLD, parts, wrapped.no_sync)
    return {**state, **student.state_dict()}


def ddp_with_a_criterion_inside(rank, mode):
    """Buffers of a module inside of DDP follow those of rank 0, without a process group."""

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.criterion = network(), BMTARDLoss(balance=mode, temperature_lr=0.2)

        def forward(self, x, taught):
            return self.criterion([self.student(x), self.student(2 * x)], taught)

    warnings.simplefilter("ignore", RuntimeWarning)  # of the missing group
    whole = torch.nn.parallel.DistributedDataParallel(Whole())
    for step in range(3):
        x, _ = inputs(step, own_rows(rank))
        whole(x, [x[:, :10], 3 * x[:, 2:]]).backward()
    x, _ = inputs(9, own_rows(rank))
    whole.eval()
    whole(x, [x[:, :10], 3 * x[:, 2:]])
    return whole.module.criterion.state_dict()


def uneven(rank):
    """Rank 0 has one batch less."""
    from torch.distributed.algorithms.join import Join

    student = torch.nn.parallel.DistributedDataParallel(network())
    criterion = BMTARDLoss(balance="sign", process_group=dist.group.WORLD)
    done, told = 0, ""
    try:
        with Join([student], throw_on_early_termination=True):
            for step in range(2 + rank):
                x, _ = inputs(step, own_rows(rank))
                logits = student(x)
                criterion([logits, logits], [x[:, :10], x[:, 2:]]).backward()
                done += 1
    except RuntimeError as error:
        told = str(error)
    return {"done": done, "told": told, "step": criterion.step}


def fsdp(rank, mode):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    student = network()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (student[0], student[2], student):
        fully_shard(layer, mesh=mesh)
    state = train(student, student, mode, own_rows(rank), dist.group.WORLD)
    weights = {name: value.full_tensor() for name, value in student.state_dict().items()}
    return {**state, **weights}


def refusal(call):
    try:
        call()
    except TypeError as error:
        return str(error)
    return ""


def distributed_tensors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    students, teachers = batch(0)
    sharded = [distribute_tensor(s, mesh, [Shard(0)]) for s in students]
    calls = (
        lambda: bmtard.multi_teacher_kl(sharded, teachers),
        lambda: bmtard.multi_teacher_kl(students, sharded),
        lambda: bmtard.softmax_entropy(sharded[0]),
        lambda: bmtard.bisect_temperature(sharded[0], 1.0),
        lambda: bmtard.pgd_step_(sharded[0], sharded[0], sharded[0], step_size=0.1, epsilon=0.1),
        lambda: BMTARDLoss(process_group=dist.group.WORLD)(students, sharded),
        lambda: EntropyBalance(process_group=dist.group.WORLD)(sharded),
        lambda: losses.kd_loss(sharded[0], teachers[0]),
    )
    full = [s.full_tensor() for s in sharded]
    local = bmtard.multi_teacher_kl(
        [s.to_local() for s in sharded], [t[own_rows(rank)] for t in teachers]
    )
    dist.all_reduce(local)
    return {
        "told": [refusal(call) for call in calls],
        "whole": bmtard.multi_teacher_kl(students, teachers),
        "full": bmtard.multi_teacher_kl(full, teachers),
        "mean of local": local / RANKS,
    }


WORKS = {
    f"{name}, {mode}": (work, mode, *arguments)
    for mode in MODES
    for name, (work, *arguments) in {
        "ddp": (ddp, 1),
        "no_sync": (ddp, 4),
        "inside": (ddp_with_a_criterion_inside,),
        "fsdp": (fsdp,),
    }.items()
} | {"uneven": (uneven,), "dtensor": (distributed_tensors,)}


def run_all(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    results = {name: work(rank, *arguments) for name, (work, *arguments) in WORKS.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the works returned on each rank; one start of processes serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
        mp.spawn(run_all, args=(str(folder),), nprocs=RANKS)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    return {name: [result[name] for result in results] for name in WORKS}


@several_ranks
@pytest.mark.parametrize("mode", MODES)
def test_ddp_equals_one_process(ranks, mode):
    """Attack on the module inside, loss through DDP."""
    assert_ranks_equal(ranks[f"ddp, {mode}"], mode)


@several_ranks
@pytest.mark.parametrize("mode", MODES)
def test_ddp_no_sync_equals_one_process(ranks, mode):
    """Four micro-batches, of which the last one synchronises the gradients."""
    assert_ranks_equal(ranks[f"no_sync, {mode}"], mode)


@several_ranks
@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_inside_of_ddp_follows_rank_0(ranks, mode):
    first, second = ranks[f"inside, {mode}"]
    assert first["step"] == 3
    assert_same(first, second)


@several_ranks
@pytest.mark.parametrize("mode", MODES)
def test_fsdp2_equals_one_process(ranks, mode):
    """fully_shard of the student, which is also what the attack calls."""
    assert_ranks_equal(ranks[f"fsdp, {mode}"], mode)


@several_ranks
def test_uneven_numbers_of_batches_end_on_all_ranks(ranks):
    """The balance averages over all ranks in every step, so they must end together."""
    for rank in ranks["uneven"]:
        assert rank["done"] == rank["step"] == 2
        assert "exhausted" in rank["told"]


@several_ranks
def test_dtensor_logits_are_refused_with_advice(ranks):
    """And what the advice gives equals the loss of the whole batch."""
    for rank in ranks["dtensor"]:
        assert len(rank["told"]) == 8
        for message in rank["told"]:
            assert "must be a tensor of this rank, got a DTensor; pass .to_local()" in message
        torch.testing.assert_close(rank["full"], rank["whole"])
        torch.testing.assert_close(rank["mean of local"], rank["whole"])
