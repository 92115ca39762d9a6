"""torch.compile, opcheck, autocast, fake tensors and CUDA graphs."""

import contextlib
import warnings

import oracles
import pytest
import torch
from oracles import leaf, randn
from torch._subclasses.fake_tensor import FakeTensorMode

import bmtard
from bmtard import BMTARDLoss, EntropyBalance, NormalizationLossBalance, losses

pytest_plugins = ["paths"]


@pytest.fixture(autouse=True)
def _quiet_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        # Deprecations inside of torch's compiler are not ours.
        warnings.filterwarnings("ignore", module=r"torch\..*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
    torch.compiler.reset()


def pairs(device="cpu", dtype=torch.float32, rows=8, classes=10, seed=0):
    return tuple(
        [
            randn(rows, classes, dtype=dtype, device=device, scale=1 + k, seed=seed + 10 * side + k)
            for k in range(2)
        ]
        for side in range(2)
    )


def entropy(s, t, temperature):
    return bmtard.softmax_entropy(s[0], temperature) + bmtard.softmax_entropy(
        s[1].view(2, 4, 10), 2.0, reduction="mean"
    )


def bisect(s, t, temperature):
    # Few iterations, since torch.compile unrolls those of plain torch.
    options = {"bounds": (0.2, 10.0), "tolerance": 0.02, "max_iterations": 10}
    batch = bmtard.bisect_temperature(s[0], 1.2, **options)
    rows = bmtard.bisect_temperature(s[1], 1.2, per_sample=True, initial=temperature, **options)
    return batch.temperature + rows.temperature


def kl(s, t, temperature):
    return bmtard.multi_teacher_kl(
        s, t, torch.stack([temperature, 2 * temperature]), weight=[0.3, 0.7],
        sample_weight=s[0][:, 0].sigmoid(), reduction="none", scale_by_temperature=True, eps=1e-5,
    )  # fmt: skip


def kl_shared(s, t, temperature):
    return bmtard.multi_teacher_kl(s[0], t, 3.0)


OPS = [entropy, bisect, kl, kl_shared]


def values_and_gradients(function, device, dtype=torch.float32):
    s, t = pairs(device, dtype)
    s = [leaf(x) for x in s]
    temperature = torch.tensor(1.5, device=device, requires_grad=True)
    output = function(s, t, temperature)
    grads = torch.autograd.grad(output.sum(), [*s, temperature], allow_unused=True)
    return [output.detach(), *grads]


def assert_all_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", OPS)
def test_compiled_ops_equal_eager(device, path, function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(function, device)
    assert_all_close(values_and_gradients(compiled, device), expected)


@pytest.mark.parametrize("function", OPS)
def test_compiled_ops_without_gradients(device, path, function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    s, t = pairs(device)
    temperature = torch.tensor(1.5, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(s, t, temperature), function(s, t, temperature))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_compiled_pgd_step(device, path, norm):
    def attack(x, grad):
        x_adv = x.clone()
        for _ in range(2):
            bmtard.pgd_step_(x_adv, grad, x, step_size=0.1, epsilon=0.15, norm=norm)
        return 2 * x_adv

    x, grad = (randn(4, 3, 6, 6, dtype=torch.float32, device=device, seed=k) for k in (0, 1))
    x = x.sigmoid()
    compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grad), attack(x, grad))


def train(loss, device, compile_with=None, steps=6):
    """Losses, weights of a small student, and the state after some training steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = torch.nn.Linear(12, 10).to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teachers = [randn(12, 10, dtype=torch.float32, device=device, seed=k) for k in (1, 2)]

    def step(x_adv, x):
        logits = [student(x_adv), student(x)]
        return loss(logits, [0.2 * x_adv @ teachers[0], x @ teachers[1]])

    if compile_with:
        step = torch.compile(step, fullgraph=True, backend=compile_with)
    losses = []
    for i in range(steps):
        x, noise = (
            randn(16, 12, dtype=torch.float32, device=device, scale=s, seed=100 + 2 * i + j)
            for j, s in enumerate((1.0, 0.1))
        )
        total = step(x + noise, x)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.detach())
    return [*losses, student.weight.detach(), *loss.state_dict().values()]


@pytest.mark.parametrize("mode", ["bisect", "sign"])
def test_compiled_training_step_equals_eager(device, path, mode):
    if (path, mode) == ("reference", "bisect"):
        pytest.skip("compiles 32 unrolled bisections for half a minute; see the op and mode sign")
    expected = train(BMTARDLoss(balance=mode, temperature_lr=0.05).to(device), device)
    loss = BMTARDLoss(balance=mode, temperature_lr=0.05).to(device)
    assert_all_close(train(loss, device, "aot_eager"), expected)
    assert loss.step == 6


def test_compiled_training_step_with_inductor(device, path):
    if path == "reference":
        pytest.skip("inductor compiles plain torch for minutes; aot_eager covers the graph")
    expected = train(BMTARDLoss().to(device), device)
    assert_all_close(train(BMTARDLoss().to(device), device, "inductor"), expected)


@pytest.mark.parametrize("mode", ["bisect", "sign"])
def test_compiled_parts_equal_eager(device, path, mode):
    if (path, mode) == ("reference", "bisect"):
        pytest.skip("compiles 32 unrolled bisections for half a minute; see the op and mode sign")

    def build():
        return (
            EntropyBalance(mode=mode, temperature_lr=0.05).to(device),
            NormalizationLossBalance().to(device),
        )

    def step(parts, s, t):
        temperatures = parts[0](t)
        losses = bmtard.multi_teacher_kl(s, t, temperatures)
        return (parts[1](losses) * losses).sum()

    eager, compiled = build(), build()
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        s, t = pairs(device, seed=seed)
        torch.testing.assert_close(fast(compiled, s, t), step(eager, s, t))
    for one, two in zip(compiled, eager, strict=True):
        assert_all_close(list(one.buffers()), list(two.buffers()))


def test_changing_a_learning_rate_does_not_recompile(device, path):
    loss = BMTARDLoss(balance="sign").to(device)
    compiled = torch.compile(lambda s, t: loss(s, t), fullgraph=True, backend="aot_eager")
    s, t = pairs(device)
    compiled(s, t)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss.weight_lr.mul_(0.1)
        loss.temperature_lr.fill_(0.25)
        compiled(s, t)
    assert float(loss.temperatures.max()) > 1.2


# --- Batches and floats that change ---------------------------------------------------------

LABELS = torch.arange(12) % 10


def _both(student):
    """The student's logits of the losses on clean and adversarial images."""
    return {"student_adversarial_logits": 2 * student, "student_clean_logits": student}


# Each a function of student and teacher [N, 10], labels [N] and a Python float.
CHANGING = {
    "softmax_entropy": lambda s, t, y, x: bmtard.softmax_entropy(s, x, reduction="mean"),
    "bisect_temperature": lambda s, t, y, x: (
        bmtard.bisect_temperature(s, x / 4, tolerance=1e-12).temperature
    ),
    "multi_teacher_kl": lambda s, t, y, x: bmtard.multi_teacher_kl(
        s, t, x, student_temperature=x, reduction="mean", scale_by_temperature=True
    )[0],
    "multi_teacher_kl by rows": lambda s, t, y, x: bmtard.multi_teacher_kl(
        [s, s], [t, s], weight=[0.3, 0.7], reduction="weighted_mean",
        sample_weight=y < 6, eps=1e-5,
    ),
    "multi_teacher_kl with gradients": lambda s, t, y, x: bmtard.multi_teacher_kl(
        [s, 2 * s], [t, -t], x, weight=[0.3, 0.7], sample_weight=t[:, 0].sigmoid()
    ),
    "pgd_step_": lambda s, t, y, x: (
        s * bmtard.pgd_step_(t.clone(), s, t, step_size=x / 10, epsilon=x / 5, bounds=None)
    ),
    "trades_loss": lambda s, t, y, x: losses.trades_loss(
        clean_logits=s, adversarial_logits=2 * s, labels=y, beta=x
    ),
    "mart_loss": lambda s, t, y, x: losses.mart_loss(
        clean_logits=s, adversarial_logits=2 * s, labels=y, beta=x
    ),
    "ard_loss": lambda s, t, y, x: losses.ard_loss(
        **_both(s), teacher_clean_logits=t, labels=y, temperature=x, alpha=0.9
    ),
    "rslad_loss": lambda s, t, y, x: losses.rslad_loss(
        **_both(s), teacher_clean_logits=t, adversarial_weight=x / 4
    ),
    "iad_loss": lambda s, t, y, x: losses.iad_loss(
        **_both(s), teacher_clean_logits=t, teacher_adversarial_logits=-t, labels=y,
        temperature=x, alpha=0.9,
    ),
    "iad2_loss": lambda s, t, y, x: losses.iad2_loss(
        **_both(s), robust_teacher_logits=t, clean_teacher_logits=-t, labels=y, temperature=x
    ),
    "adaad_loss": lambda s, t, y, x: losses.adaad_loss(
        **_both(s), teacher_adversarial_logits=t, teacher_clean_logits=-t, alpha=x / 4
    ),
    "mtard_loss": lambda s, t, y, x: losses.mtard_loss([s, 2 * s], [t, -t], t.new_full((2,), 0.5)),
}  # fmt: skip


def change(function, backend, **options):
    """Runs calls with other sizes and floats, against eager; returns (graphs, graph breaks)."""
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend=backend, **options)
    for rows, number in ((12, 2.0), (7, 2.5), (5, 3.0), (9, 3.5)):
        teacher = randn(rows, 10, dtype=torch.float32, scale=1.0, seed=1)
        results = []
        for one in (function, compiled):
            student = randn(rows, 10, dtype=torch.float32, scale=1.0).requires_grad_()
            output = one(student, teacher, LABELS[:rows].clone(), number)
            results.append((output, torch.autograd.grad(output.sum(), student)[0]))
        for actual, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(actual, expected)
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("name", CHANGING)
def test_batches_and_floats_that_change(name):
    """The second call finds out what changes; from then on one graph serves."""
    oracles.require_native()
    assert change(CHANGING[name], "aot_eager", fullgraph=True) == (2, 0)
    torch.compiler.reset()
    assert change(CHANGING[name], "aot_eager", fullgraph=True, dynamic=True) == (1, 0)


@pytest.mark.parametrize("name", ["multi_teacher_kl", "softmax_entropy"])
def test_batches_and_floats_that_change_in_plain_torch(path, name):
    assert change(CHANGING[name], "aot_eager", fullgraph=True) == (2, 0)


@pytest.mark.parametrize("name", ["multi_teacher_kl", "trades_loss"])
def test_batches_and_floats_that_change_with_inductor(name):
    oracles.require_native()
    assert change(CHANGING[name], "inductor", fullgraph=True) == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["bisect", "sign"])
def test_training_steps_on_batches_that_change(mode, dtype):
    oracles.require_native()
    for options, graphs in ({}, 2), ({"dynamic": True}, 1):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        eager, traced = (BMTARDLoss(balance=mode, temperature_lr=0.05) for _ in range(2))
        step = torch.compile(
            lambda s, t: traced([s, 2 * s], [t, -2 * t]),  # noqa: B023
            backend="aot_eager", fullgraph=True, **options,
        )  # fmt: skip
        for rows in (12, 7, 5, 9):
            students = [randn(rows, 10, dtype=dtype, scale=1.0).requires_grad_() for _ in range(2)]
            teacher = randn(rows, 10, dtype=dtype, scale=1.0, seed=1)
            expected = eager([students[0], 2 * students[0]], [teacher, -2 * teacher])
            actual = step(students[1], teacher)
            torch.testing.assert_close(actual, expected)
            grads = torch.autograd.grad(1024 * actual + 1024 * expected, students)
            torch.testing.assert_close(grads[1], grads[0])
        assert_all_close(list(traced.buffers()), list(eager.buffers()))
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]


def test_float16_with_a_huge_student_temperature():
    oracles.require_native()
    losses = []
    for compiled in (False, True):
        loss = BMTARDLoss(student_temperature=1e36)
        step = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        students, teachers = pairs(dtype=torch.float16)
        losses.append(step([leaf(s) for s in students], list(teachers)))
        losses[-1].backward()
    assert losses[0] > 0
    torch.testing.assert_close(losses[1], losses[0])


def test_one_student_twice_in_a_compiled_step():
    oracles.require_native()
    loss, eager = BMTARDLoss(), BMTARDLoss()
    step = torch.compile(lambda s, t: loss([s, s], [t, 2 * t]), backend="aot_eager", fullgraph=True)
    s, t = pairs()
    torch.testing.assert_close(step(leaf(s[0]), t[0]), eager([s[0]] * 2, [t[0], 2 * t[0]]))


# --- The registration -----------------------------------------------------------------------


def registered(device, dtype):
    """Representative calls of every native op."""
    on_cpu = torch.device(device).type == "cpu"
    s, t = pairs(device, dtype)
    acc = oracles.accumulation(dtype)
    rows = torch.full((8,), 1.5, dtype=acc, device=device)
    scalar = rows[0].clone()
    double = torch.tensor([1.5, 2.0], dtype=torch.float64, device=device)
    for temperature in (None, scalar, rows):
        value = 2.0 if temperature is None else 0.0
        entropies, statistics = torch.ops.bmtard.softmax_entropy(s[0], temperature, value)
        yield "softmax_entropy", (s[0], temperature, value)
        for wants_logits, wants_temperature in ((True, False), (False, True), (True, True)):
            yield "softmax_entropy_backward", (
                entropies, s[0], temperature, value, entropies, statistics,
                wants_logits, wants_temperature,
            )  # fmt: skip
    targets = [(scalar, 0.0), (rows, 0.0)]
    if on_cpu:  # the CUDA kernel reads it on the device
        targets.append((None, 1.5))
    for target, value in targets:
        for initial, per_sample in ((None, target is rows), (rows, True), (scalar, True)):
            for bisection in (False, True):
                yield "bisect_temperature", (
                    s[0], target, value, initial, 0.01, 100.0, per_sample, 1e-6, 32, bisection,
                )  # fmt: skip
    for students, teachers in ((s, t), (s[:1], t), (s, t[:1])):
        for temperature in (None, double[0].clone(), double):
            value = 2.0 if temperature is None else 0.0
            options = (temperature, value, 1.0, 1e-5)
            yield "multi_teacher_kl", (students, teachers, *options, 0, False)
            # On CUDA torch does the reduction.
            for reduction in range(5) if on_cpu and temperature is None else (0,):
                arguments = (students, teachers, *options, reduction, True)
                yield "multi_teacher_kl", arguments
                losses, statistics = torch.ops.bmtard.multi_teacher_kl(*arguments)
                for wants_s, wants_t in ((0b1, 0b0), ((1 << len(students)) - 1, 0b1)):
                    yield "multi_teacher_kl_backward", (
                        losses, students, teachers, *options, reduction, statistics, wants_s,
                        wants_t, temperature is not None,
                    )  # fmt: skip
            if len(students) == len(teachers):
                coefficient = torch.full((1, 1), 0.5, dtype=acc, device=device).expand(2, 8)
                yield "multi_teacher_kl_with_gradients", (
                    students, teachers, *options, coefficient,
                )  # fmt: skip
    yield "scale_", ([x.clone() for x in s], scalar)
    for sign in (False, True):
        for update, wants_grad in ((True, True), (False, True), (True, False)):
            state = BMTARDLoss(balance="sign" if sign else "bisect").to(device).state()
            yield "bmtard_loss", (
                s, t, *state, update, sign, 1.0, 10.0, 0.0, 1.0, 1.0, 0.0, 0.0125, 0.05, 1e-6, 32,
                wants_grad,
            )  # fmt: skip
            for reduction in ("mean", "batchmean", "sum"):
                state = BMTARDLoss(balance="sign" if sign else "bisect").to(device).state()
                yield "bmtard_loss_of_any_size", (
                    s, t, *state, update, sign, 1.0, 10.0, 0.0, 1.0, 1.0, 0.0, reduction, 1e-6, 32,
                    wants_grad,
                )  # fmt: skip
    for l2 in (False, True):
        images = [randn(4, 3, 5, 5, dtype=dtype, device=device, seed=k) for k in range(3)]
        yield "pgd_step_", (*images, 0.1, 0.3, 0.0, 1.0, l2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    oracles.require_native()
    checked = set()
    for name, arguments in registered(device, dtype):
        checked.add(name)
        torch.library.opcheck(
            getattr(torch.ops.bmtard, name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    defined = {
        schema.name.removeprefix("bmtard::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("bmtard::")
    }
    assert checked == defined


@pytest.mark.parametrize("function", OPS)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(device, path, function):
    s, t = pairs(device)
    temperature = torch.tensor(1.5, device=device)
    real = function(s, t, temperature)
    with FakeTensorMode() as mode:
        s, t = ([mode.from_tensor(x) for x in side] for side in (s, t))
        fake = function(s, t, mode.from_tensor(temperature))
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


@pytest.mark.parametrize("function", OPS)
@pytest.mark.filterwarnings("ignore:bmtard uses the slower plain-torch path:RuntimeWarning")
def test_meta_tensors(path, function):
    s, t = pairs("meta")
    real = function(*pairs("cpu"), torch.tensor(1.5))
    meta = function(s, t, torch.tensor(1.5, device="meta"))
    assert meta.device.type == "meta"
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)


# --- Autocast -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("function", OPS)
def test_autocast_changes_nothing(device, path, function, dtype):
    expected = values_and_gradients(function, device, dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = values_and_gradients(function, device, dtype)
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("mode", ["bisect", "sign"])
def test_training_under_autocast(device, path, mode):
    loss = BMTARDLoss(balance=mode).to(device)
    student = torch.nn.Linear(12, 10).to(device)
    x = randn(16, 12, dtype=torch.float32, device=device)
    teachers = pairs(device, rows=16)[1]  # float32, beside the student's bfloat16
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = student(x)
        assert logits.dtype == torch.bfloat16
        total = loss([logits, logits], teachers)
    assert total.dtype == torch.float32
    total.backward()
    assert student.weight.grad.dtype == torch.float32
    assert student.weight.grad.abs().sum() > 0

    plain = BMTARDLoss(balance=mode).to(device)
    expected = plain([logits.float()] * 2, teachers)
    torch.testing.assert_close(total, expected)
    assert_all_close(list(loss.buffers()), list(plain.buffers()))


# --- CUDA graphs ----------------------------------------------------------------------------


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["bisect", "sign"])
def test_cuda_graph_replays_training_steps(device, path, mode):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need CUDA")
    captured, eager = (BMTARDLoss(balance=mode, temperature_lr=0.05).to(device) for _ in range(2))
    s, t = pairs(device)
    s = [leaf(x) for x in s]

    def step(loss, s, t):
        total = loss(s, t)
        return total, *torch.autograd.grad(total, s)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured, s, t)
        step(eager, s, t)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(captured, s, t)
    for seed in range(1, 5):
        fresh_s, fresh_t = pairs(device, seed=100 * seed)
        with torch.no_grad():
            for old, new in zip([*s, *t], [*fresh_s, *fresh_t], strict=True):
                old.copy_(new)
        if seed == 3:  # a schedule under the captured graph
            for loss in (captured, eager):
                loss.weight_lr.mul_(0.1)
                loss.temperature_lr.mul_(0.1)
        graph.replay()
        assert_all_close(replayed, step(eager, [leaf(x) for x in fresh_s], fresh_t))
        assert_all_close(list(captured.buffers()), list(eager.buffers()))


@pytest.mark.parametrize("function", OPS)
def test_ops_do_not_synchronise(device, path, function):
    if device.type != "cuda":
        pytest.skip("only CUDA synchronises")
    values_and_gradients(function, device)
    s, t = pairs(device)
    s = [leaf(x) for x in s]
    temperature = torch.tensor(1.5, device=device, requires_grad=True)
    x = torch.rand(4, 3, 8, 8, device=device)
    loss = BMTARDLoss().to(device)
    torch.cuda.synchronize()
    with no_synchronisation():
        function(s, t, temperature).sum().backward()
        bmtard.pgd_step_(x.clone(), x, x, step_size=0.1, epsilon=0.2, norm="l2")
        loss(s, t).backward()
