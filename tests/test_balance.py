"""EntropyBalance, NormalizationLossBalance and BMTARDLoss: what a step computes and keeps."""

import copy
import io
import math
import pickle

import numpy as np
import oracles
import pytest
import torch
from oracles import accumulation, leaf, randn
from torch.autograd import gradcheck

import bmtard
from bmtard import BalanceStatus, BMTARDLoss, EntropyBalance, NormalizationLossBalance

pytest_plugins = ["paths"]

MODES = ["bisect", "sign"]
UPDATED, SKIPPED = int(BalanceStatus.UPDATED), int(BalanceStatus.SKIPPED_NON_FINITE)


def batch(step, teachers=2, rows=16, classes=10, dtype=torch.float64, device="cpu"):
    """Students, and teachers of unlike sharpness."""
    sharpness = [0.7, 2.0, 1.2][:teachers]
    return tuple(
        [
            randn(
                rows, classes, dtype=dtype, device=device, scale=scale, seed=100 * step + k + 50 * s
            )
            for k, scale in enumerate(sharpness)
        ]
        for s in (0, 1)
    )


def snapshot(module):
    return {name: buffer.clone() for name, buffer in module.state_dict().items()}


def assert_same(one, two, *, without=()):
    assert one.keys() == two.keys()
    for name in one.keys() - set(without):
        assert torch.equal(one[name], two[name]), name
        assert one[name].dtype == two[name].dtype


# --- Against NumPy and Brent's method -------------------------------------------------------


def expected_weights(weights, losses, initial, weight_lr, exponent):
    relative = (np.asarray(losses) / np.asarray(initial)) ** exponent
    weights = weights - weight_lr * (weights - relative / relative.sum())
    return weights / weights.sum()


@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("weight_lr", [0.0, 0.025, 1.0])
def test_loss_weights_match_numpy(device, weight_lr, exponent, teachers):
    balance = NormalizationLossBalance(teachers, weight_lr=weight_lr, loss_exponent=exponent)
    balance.to(device)
    weights = np.full(teachers, 1 / teachers)
    losses = np.abs(oracles.numpy(randn(20, teachers))) + 0.1
    for step in range(20):
        returned = balance(torch.from_numpy(losses[step]).to(device))
        weights = expected_weights(weights, losses[step], losses[0], weight_lr, exponent)
        np.testing.assert_allclose(oracles.numpy(returned), weights, rtol=1e-12)
        assert torch.equal(returned, balance.weights)
        assert returned.dtype == torch.float64
        np.testing.assert_array_equal(oracles.numpy(balance.initial_losses), losses[0])
        np.testing.assert_array_equal(oracles.numpy(balance.losses), losses[step])
        assert balance.step == step + 1


def test_start_is_not_rounded_to_float32():
    module = BMTARDLoss(3, temperature_bounds=(1.1, 10.0))
    assert module.temperatures.tolist() == [1.1] * 3
    assert module.weights.tolist() == [1 / 3] * 3


def test_weights_set_by_hand_return_to_sum_one(device, path):
    balance, loss = NormalizationLossBalance(weight_lr=0.5).to(device), BMTARDLoss().to(device)
    for module in (balance, loss):
        module.weights.copy_(torch.tensor([0.9, 0.6]))
    weights = balance(torch.ones(2, device=device))
    assert weights.tolist() == pytest.approx([0.7 / 1.25, 0.55 / 1.25])
    loss(*batch(0, device=device))
    assert float(loss.weights.sum()) == pytest.approx(1, abs=1e-12)


def test_losses_of_zero_and_below(device):
    # Matched from the start counts as relative loss 1; below 0 is rounding and counts as 0.
    balance = NormalizationLossBalance(3, weight_lr=1.0).to(device)
    balance(torch.tensor([0.0, 1.0, 1.0], device=device))
    weights = balance(torch.tensor([5.0, 0.5, -1e-9], device=device))
    torch.testing.assert_close(weights.tolist(), [2 / 3, 1 / 3, 0.0])
    balance(torch.tensor([0.0, 0.0, 0.0], device=device))
    weights = balance(torch.tensor([0.0, 0.0, 0.0], device=device))
    torch.testing.assert_close(weights.tolist(), [1.0, 0.0, 0.0])
    both = NormalizationLossBalance(2, weight_lr=1.0).to(device)
    both(torch.ones(2, device=device))
    assert both(torch.zeros(2, device=device)).tolist() == [0.5, 0.5]


def test_weights_have_no_gradient(device):
    losses = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
    assert not NormalizationLossBalance().to(device)(losses).requires_grad


@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_sign_rule_matches_numpy(device, path, teachers, eps):
    bounds, rate = (1.0, 1.35), 0.04
    balance = EntropyBalance(teachers, mode="sign", bounds=bounds, temperature_lr=rate, eps=eps)
    balance.to(device)
    temperatures = np.ones(teachers)
    for step in range(30):
        _, logits = batch(step, teachers, device=device)
        returned = balance(logits)
        np.testing.assert_allclose(oracles.numpy(returned), temperatures, rtol=1e-12)
        entropies = np.empty(teachers)
        for k, z in enumerate(logits):
            p = oracles.probabilities(z, temperatures[k])
            entropies[k] = -(p * np.log(p + eps)).sum(-1).mean()
        np.testing.assert_allclose(oracles.numpy(balance.entropies), entropies, rtol=1e-9)
        if teachers > 1:
            others = (entropies.sum() - entropies) / (teachers - 1)
            temperatures = np.clip(temperatures - rate * np.sign(entropies / others - 1), *bounds)
        np.testing.assert_allclose(oracles.numpy(balance.temperatures), temperatures, rtol=1e-12)
    if teachers > 1:
        assert temperatures.max() > 1.2


@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bisect_makes_the_entropies_equal(device, path, dtype, teachers):
    balance = EntropyBalance(teachers).to(device)
    for step in range(3):
        _, logits = batch(step, teachers, dtype=dtype, device=device)
        temperatures = balance(logits)
        assert torch.equal(temperatures, balance.temperatures)
        target = max(float(oracles.entropy(z, 1.0).mean()) for z in logits)
        for k, z in enumerate(logits):
            assert float(oracles.entropy(z, float(temperatures[k])).mean()) == pytest.approx(
                target, abs=5e-6
            )
        np.testing.assert_allclose(oracles.numpy(balance.entropies), target, atol=5e-6)
        # The most uncertain one stays at the lower bound.
        assert float(temperatures.min()) == 1.0
        assert balance.status == UPDATED


def test_bisect_says_where_a_temperature_stops_at_its_bound(device, path):
    logits = [randn(16, 10, device=device, scale=s) for s in (0.1, 30.0)]
    balance = EntropyBalance(bounds=(1.0, 10.0)).to(device)
    assert balance(logits).tolist() == [1.0, 10.0]
    assert balance.status == BalanceStatus.TARGET_OUT_OF_BOUNDS
    assert balance.step == 1
    balance(batch(0, device=device)[1])
    assert balance.status == UPDATED
    loss = BMTARDLoss().to(device)
    loss(batch(0, device=device)[0], logits)
    assert loss.status == BalanceStatus.TARGET_OUT_OF_BOUNDS
    assert loss.temperatures.tolist() == [1.0, 10.0]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum_moves_in_log_space(device, path, momentum):
    balance = EntropyBalance(momentum=momentum).to(device)
    before = np.ones(2)
    for step in range(4):
        _, logits = batch(step, device=device)
        target = max(float(oracles.entropy(z, 1.0).mean()) for z in logits)
        solved = np.array([max(1.0, oracles.temperature_of(z, target, (0.5, 20))) for z in logits])
        expected = before**momentum * solved ** (1 - momentum)
        np.testing.assert_allclose(oracles.numpy(balance(logits)), expected, rtol=1e-5)
        before = expected


OPTIONS = [
    {},
    {"loss_exponent": 2.0, "reduction": "batchmean"},
    {"student_temperature": 2.0, "eps": 1e-5},
    {"weight_lr": 0.5, "reduction": "sum", "temperature_bounds": (0.5, 3.0)},
    {"temperature_momentum": 0.8, "temperature_lr": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("teachers", [1, 2, 3])
def test_bisect_step_matches_numpy(device, path, teachers, options):
    loss = BMTARDLoss(teachers, **options).to(device)
    low, high = loss.temperature_bounds
    momentum, exponent = loss.temperature_momentum, loss.loss_exponent
    temperature, weights, first = np.full(teachers, low), np.full(teachers, 1 / teachers), None
    for step in range(4):
        student, teacher = batch(step, teachers, device=device)
        total = loss(student, teacher)
        target = max(float(oracles.entropy(z, low).mean()) for z in teacher)
        for k, z in enumerate(teacher):
            solved = max(low, oracles.temperature_of(z, target, (low / 2, 2 * high)))
            temperature[k] = temperature[k] ** momentum * solved ** (1 - momentum)
        losses = np.array(
            [
                float(
                    oracles.kl(s, t, temperature[k], loss.student_temperature, eps=loss.eps).sum()
                )
                for k, (s, t) in enumerate(zip(student, teacher, strict=True))
            ]
        )
        losses /= {"mean": 160, "batchmean": 16, "sum": 1}[loss.reduction]
        first = losses if first is None else first
        weights = expected_weights(weights, losses, first, float(loss.weight_lr), exponent)
        for name, wanted in [("temperatures", temperature), ("losses", losses),
                             ("weights", weights), ("initial_losses", first)]:  # fmt: skip
            np.testing.assert_allclose(
                oracles.numpy(getattr(loss, name)), wanted, rtol=1e-5, err_msg=name
            )
        assert float(total) == pytest.approx(weights @ losses, rel=1e-5)


# --- The parts against the whole ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_parts_equal_the_whole(device, path, mode, teachers, options, dtype):
    whole = BMTARDLoss(teachers, balance=mode, **options).to(device)
    names = {"temperature_lr": "temperature_lr", "temperature_momentum": "momentum", "eps": "eps",
             "temperature_bounds": "bounds"}  # fmt: skip
    entropy_balance = EntropyBalance(
        teachers, mode=mode, **{names[k]: v for k, v in options.items() if k in names}
    ).to(device)
    names = ("weight_lr", "loss_exponent")
    loss_balance = NormalizationLossBalance(
        teachers, **{k: v for k, v in options.items() if k in names}
    ).to(device)
    # Two float32 sums of a KL may differ by some of their ulp.
    near = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for step in range(5):
        student, teacher = batch(step, teachers, dtype=dtype, device=device)
        students = [[leaf(s) for s in student] for _ in range(2)]
        total = whole(students[0], teacher)

        losses = bmtard.multi_teacher_kl(
            students[1], teacher, entropy_balance(teacher),
            student_temperature=whole.student_temperature, reduction=whole.reduction,
            eps=whole.eps,
        )  # fmt: skip
        composed = (loss_balance(losses) * losses).sum()
        assert total.dtype == accumulation(dtype)
        torch.testing.assert_close(total, composed, check_dtype=False, **near)
        grads = [
            torch.autograd.grad(x, s) for x, s in zip((total, composed), students, strict=True)
        ]
        for actual, expected in zip(*grads, strict=True):
            one = near if dtype != torch.bfloat16 else {}
            torch.testing.assert_close(actual, expected, **one)
        for part, shared in [(entropy_balance, ("temperatures", "entropies", "status")),
                             (loss_balance, ("weights", "losses", "initial_losses"))]:  # fmt: skip
            for name in (*shared, "step"):
                torch.testing.assert_close(getattr(whole, name), getattr(part, name), **near)


@pytest.mark.parametrize("mode", MODES)
def test_one_student_for_all_teachers_and_leading_dimensions(device, path, mode):
    student, teacher = batch(0, device=device)
    flat, deep = (BMTARDLoss(balance=mode).to(device) for _ in range(2))
    one = leaf(student[0])
    expected = flat([one, one], teacher)
    (expected_grad,) = torch.autograd.grad(expected, one)
    view = leaf(oracles.in_layout(student[0].view(2, 8, 10), "row_slice"))
    teacher = [oracles.in_layout(t.view(2, 8, 10), "class_stride") for t in teacher]
    actual = deep([view, view], teacher)
    (grad,) = torch.autograd.grad(actual, view)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grad.reshape(16, 10), expected_grad)
    for name, value in snapshot(flat).items():
        torch.testing.assert_close(snapshot(deep)[name], value)


# --- Gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_with_a_fixed_state(device, path, mode, reduction):
    loss = BMTARDLoss(balance=mode, reduction=reduction, student_temperature=0.7, eps=1e-3)
    loss.to(device)
    student, teacher = batch(0, rows=3, classes=4, device=device)
    loss(student, teacher)
    loss.eval()
    assert gradcheck(lambda *s: loss(s, teacher), [leaf(s) for s in student])


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_constants_to_autograd(device, path, mode):
    loss = BMTARDLoss(balance=mode, weight_lr=0.5).to(device)
    loss(*batch(0, device=device))
    student, teacher = batch(1, device=device)
    student = [leaf(s) for s in student]
    temperatures = loss.temperatures.clone()  # "sign" moves them after use
    grads = torch.autograd.grad(loss(student, teacher), student)
    temperatures = loss.temperatures if mode == "bisect" else temperatures
    for k in range(2):
        p = oracles.probabilities(teacher[k], float(temperatures[k]))
        expected = float(loss.weights[k]) * (oracles.probabilities(student[k]) - p) / p.size
        np.testing.assert_allclose(oracles.numpy(grads[k]), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_only_to_what_requires_them(device, path, dtype):
    for wanted in [(True, False), (False, True), (True, True), (False, False)]:
        student, teacher = batch(0, dtype=dtype, device=device)
        student = [s.requires_grad_(w) for s, w in zip(student, wanted, strict=True)]
        total = BMTARDLoss().to(device)(student, teacher)
        assert total.requires_grad == any(wanted)
        if any(wanted):
            total.backward()
        for s, w in zip(student, wanted, strict=True):
            assert (s.grad is not None) == w
            if w:
                assert s.grad.dtype == dtype
                assert s.grad.abs().sum() > 0


def test_backward_scales_repeats_and_survives_later_steps(device, path):
    loss = BMTARDLoss(weight_lr=0.5).to(device)
    student, teacher = batch(0, device=device)
    student = [leaf(s) for s in student]
    total = loss(student, teacher)
    first = torch.autograd.grad(total, student, retain_graph=True)
    for step in range(1, 4):
        loss(*batch(step, device=device))
    second = torch.autograd.grad(total, student, retain_graph=True)
    scaled = torch.autograd.grad(-8 * total, student)
    for k in range(2):
        assert torch.equal(first[k], second[k])
        torch.testing.assert_close(scaled[k], -8 * first[k])


def test_double_backward_is_refused(device, path):
    if path == "reference":
        pytest.skip("plain torch differentiates its own KL as often as wanted")
    student, teacher = batch(0, device=device)
    student = [leaf(s) for s in student]
    total = BMTARDLoss().to(device)(student, teacher)
    grads = torch.autograd.grad(total, student, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"BMTARDLoss has no double backward"):
        torch.autograd.grad(sum(g.sum() for g in grads), student)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_autograd(device, path, context):
    expected, loss = (BMTARDLoss().to(device) for _ in range(2))
    student, teacher = batch(0, device=device)
    wanted = expected([leaf(s) for s in student], teacher)
    with context():
        total = loss([leaf(s) for s in student], teacher)
    assert not total.requires_grad
    torch.testing.assert_close(total, wanted.detach())
    assert loss.step == 1
    torch.testing.assert_close(loss.weights, expected.weights)


# --- State ----------------------------------------------------------------------------------


def modules(teachers=2):
    """Each module with what one step feeds it."""
    rate = {"temperature_lr": 0.05}
    return {
        "BMTARDLoss bisect": (BMTARDLoss(teachers), lambda s, t: (s, t)),
        "BMTARDLoss sign": (BMTARDLoss(teachers, balance="sign", **rate), lambda s, t: (s, t)),
        "EntropyBalance bisect": (EntropyBalance(teachers), lambda s, t: (t,)),
        "EntropyBalance sign": (EntropyBalance(teachers, mode="sign", **rate), lambda s, t: (t,)),
        "NormalizationLossBalance": (
            NormalizationLossBalance(teachers),
            lambda s, t: (bmtard.multi_teacher_kl(s, t).double(),),
        ),
    }


NAMES = list(modules())


@pytest.fixture(params=NAMES)
def module(request, device):
    chosen, feed = modules()[request.param]
    return chosen.to(device), feed


def run(module, feed, steps, device, dtype=torch.float64):
    return [module(*feed(*batch(step, dtype=dtype, device=device))).clone() for step in steps]


def test_state_is_complete_and_has_no_parameters(module):
    module, _ = module
    assert list(module.parameters()) == []
    common = {"step", "status"}
    expected = {
        EntropyBalance: {"temperatures", "entropies", "temperature_lr"},
        NormalizationLossBalance: {"weights", "initial_losses", "losses", "weight_lr"},
    }
    expected[BMTARDLoss] = expected[EntropyBalance] | expected[NormalizationLossBalance]
    assert module.state_dict().keys() == expected[type(module)] | common


@pytest.mark.parametrize("way", ["state_dict", "torch.save", "deepcopy", "pickle"])
def test_a_copy_continues_bit_for_bit(path, device, module, way):
    module, feed = module
    run(module, feed, range(5), device)
    fresh = modules()[NAMES[0]][0]
    if way in ("state_dict", "torch.save"):
        fresh = next(m for m, _ in modules().values() if repr(m) == repr(module)).to(device)
        state = module.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        fresh.load_state_dict(state)
    elif way == "deepcopy":
        fresh = copy.deepcopy(module)
    else:
        fresh = pickle.loads(pickle.dumps(module))
    assert_same(snapshot(fresh), snapshot(module))
    for one, two in zip(
        run(module, feed, range(5, 10), device), run(fresh, feed, range(5, 10), device), strict=True
    ):
        assert torch.equal(one, two)
    assert_same(snapshot(fresh), snapshot(module))
    assert module.step == 10


def poison(kind, student, teacher):
    side = teacher if kind.startswith("teacher") else student
    side[1][3, 4] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[kind.split()[1]]


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("kind", ["student nan", "student inf", "student -inf", "teacher nan",
                                  "teacher inf"])  # fmt: skip
def test_a_batch_that_is_not_finite_changes_nothing(path, device, module, kind, first):
    module, feed = module
    if isinstance(module, EntropyBalance) and kind.startswith("student"):
        pytest.skip("sees no student")
    clean = copy.deepcopy(module)
    for m in (module, clean):
        run(m, feed, [] if first else range(3), device)
    before = snapshot(module)
    student, teacher = batch(77, device=device)
    poison(kind, student, teacher)
    result = module(*feed(student, teacher))
    if isinstance(module, BMTARDLoss):
        assert not result.isfinite()
    else:
        assert result.isfinite().all()
    assert module.status == SKIPPED
    assert_same(snapshot(module), before, without={"status"})
    for one, two in zip(
        run(module, feed, range(3, 6), device), run(clean, feed, range(3, 6), device), strict=True
    ):
        assert torch.equal(one, two)
    assert module.status == UPDATED
    assert_same(snapshot(module), snapshot(clean))


@pytest.mark.parametrize("mode", MODES)
def test_a_masked_class_is_no_reason_to_skip(device, path, mode):
    loss = BMTARDLoss(balance=mode).to(device)
    student, teacher = batch(0, device=device)
    for x in (*student, *teacher):
        x[:, 7] = -math.inf
    student = [leaf(s) for s in student]
    total = loss(student, teacher)
    assert total.isfinite()
    assert loss.status == UPDATED
    for grad in torch.autograd.grad(total, student):
        assert (grad[:, 7] == 0).all()
        assert grad.isfinite().all()


def test_an_empty_batch_changes_nothing(path, device, module):
    module, feed = module
    run(module, feed, range(2), device)
    before = snapshot(module)
    module(*feed(*batch(9, rows=0, device=device)))
    assert module.status == SKIPPED
    assert_same(snapshot(module), before, without={"status"})


def test_eval_updates_nothing(path, device, module):
    module, feed = module
    run(module, feed, range(3), device)
    module.eval()
    before = snapshot(module)
    outputs = run(module, feed, [8, 8], device)
    assert_same(snapshot(module), before)
    assert torch.equal(*outputs)
    if isinstance(module, BMTARDLoss):
        student, teacher = batch(8, device=device)
        expected = sum(
            float(module.weights[k])
            * float(oracles.kl(student[k], teacher[k], float(module.temperatures[k])).mean())
            / 10
            for k in range(2)
        )
        assert float(outputs[0]) == pytest.approx(expected, rel=1e-9)
    else:
        name = "temperatures" if isinstance(module, EntropyBalance) else "weights"
        assert torch.equal(outputs[0], before[name])
    module.train()
    run(module, feed, [3], device)
    assert module.step == 4


@pytest.mark.parametrize("change", ["half", "bfloat16", "float", "double"])
def test_state_keeps_float64(path, device, module, change):
    module, feed = module
    run(module, feed, range(3), device)
    before = snapshot(module)
    wrapper = torch.nn.Sequential(module)
    getattr(wrapper, change)()
    wrapper.to(torch.float16)
    assert_same(snapshot(module), before)
    run(module, feed, range(3, 5), device, torch.bfloat16)
    floating = [b for b in module.buffers() if b.is_floating_point()]
    assert {b.dtype for b in floating} == {torch.float64}
    assert module.status == UPDATED


@pytest.mark.parametrize("mode", MODES)
def test_learning_rates_are_buffers(device, path, mode):
    loss = BMTARDLoss(balance=mode, temperature_lr=0.05, weight_lr=0.5).to(device)
    run(loss, lambda s, t: (s, t), range(3), device)
    loss.weight_lr.zero_()
    loss.temperature_lr.zero_()
    before = snapshot(loss)
    run(loss, lambda s, t: (s, t), range(3, 6), device)
    torch.testing.assert_close(loss.weights, before["weights"], rtol=1e-15, atol=0)
    if mode == "sign":
        assert torch.equal(loss.temperatures, before["temperatures"])
    loss.weight_lr.fill_(1.0)
    run(loss, lambda s, t: (s, t), [6], device)
    relative = loss.losses / loss.initial_losses
    torch.testing.assert_close(loss.weights, relative / relative.sum())


def test_a_number_sets_a_learning_rate():
    loss = BMTARDLoss()
    buffer = loss.temperature_lr
    loss.temperature_lr, loss.weight_lr = 1e-4, np.float32(0.5)
    assert loss.temperature_lr is buffer  # so a captured graph sees it
    assert (buffer.item(), loss.weight_lr.item()) == (1e-4, 0.5)
    assert buffer.dtype == torch.float64
    with pytest.raises(ValueError, match=r"BMTARDLoss: weight_lr must lie in \[0, 1\], got 2"):
        loss.weight_lr = 2
    with pytest.raises(ValueError, match=r"temperature_lr must lie in \[0, inf\), got -1"):
        EntropyBalance().temperature_lr = -1
    with pytest.raises(TypeError, match=r"BMTARDLoss: weights must be set to a tensor, got 0.5"):
        loss.weights = 0.5
    with pytest.raises(ValueError, match=r"BMTARDLoss: weights must be \[2\], got \[3\]"):
        loss.weights = torch.ones(3)


def test_a_tensor_that_replaces_a_buffer_keeps_float64(path):
    loss, expected = BMTARDLoss(weight_lr=0.5), BMTARDLoss(weight_lr=0.5)
    loss.weights = torch.tensor([0.25, 0.75])
    expected.weights.copy_(torch.tensor([0.25, 0.75]))
    assert loss.weights.dtype == torch.float64
    assert torch.equal(loss(*batch(0)), expected(*batch(0)))


def test_assigning_a_float32_state(path):
    trained, assigned = BMTARDLoss(weight_lr=0.5), BMTARDLoss(weight_lr=0.5)
    trained(*batch(0))
    short = {k: v.float() if v.is_floating_point() else v for k, v in snapshot(trained).items()}
    assigned.load_state_dict(short, assign=True)
    assert {b.dtype for b in assigned.buffers()} == {torch.float64, torch.int64, torch.int32}
    trained.load_state_dict(short)
    assert torch.equal(trained(*batch(1)), assigned(*batch(1)))
    assert_same(snapshot(trained), snapshot(assigned))


def test_returned_values_are_copies(path, device, module):
    module, feed = module
    if isinstance(module, BMTARDLoss):
        pytest.skip("returns a loss")
    for training in (True, False):
        module.train(training)
        before = snapshot(module)
        output = module(*feed(*batch(0, device=device)))
        if not training:
            output.fill_(math.nan)
            assert_same(snapshot(module), before)
    module.train()
    output = module(*feed(*batch(1, device=device)))
    kept = output.clone()
    run(module, feed, range(2, 5), device)
    assert torch.equal(output, kept)


@pytest.mark.parametrize("mode", MODES)
def test_sixteen_teachers(device, path, mode):
    teachers = [randn(4, 5, scale=0.5 + k / 8, seed=k, device=device) for k in range(16)]
    students = [leaf(randn(4, 5, seed=50 + k, device=device)) for k in range(16)]
    loss = BMTARDLoss(16, balance=mode).to(device)
    loss(students, teachers).backward()
    assert loss.status == UPDATED
    torch.testing.assert_close(loss.weights, torch.full_like(loss.weights, 1 / 16))
    assert all(s.grad.abs().sum() > 0 for s in students)
    if mode == "bisect":
        torch.testing.assert_close(
            loss.entropies, loss.entropies.max().expand(16), rtol=0, atol=2e-6
        )


def test_autograd_notices_that_the_state_was_overwritten(device, path):
    """Otherwise a graph through the buffers would use values of a later step in silence."""
    criterion = bmtard.BMTARDLoss().to(device)
    logits = [torch.randn(4, 10, device=device) for _ in range(2)]
    criterion(logits, logits)
    x = torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)
    product = (x * criterion.temperatures).sum()
    criterion(logits, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("loss", ["BMTARDLoss", "multi_teacher_kl"])
def test_float16_under_a_gradient_scaler(device, path, reduction, scale, loss):
    """No gradient is lost below float16's smallest number before the scale reaches it, and the
    scale itself, infinite as a float16, does not become one."""
    shape = (64, 1000)
    students, teachers = (
        [randn(*shape, dtype=torch.float16, device=device, seed=side + k) for k in range(2)]
        for side in (0, 10)
    )
    if reduction == "sum":
        scale = min(scale, 256.0)
    outcomes = []
    for dtype in (torch.float16, torch.float64):
        inputs = [leaf(s.to(dtype)) for s in students]
        targets = [t.to(dtype) for t in teachers]
        if loss == "BMTARDLoss":
            module = BMTARDLoss(reduction=reduction, balance="sign").to(device)
            value = module(inputs, targets)
        else:
            value = bmtard.multi_teacher_kl(inputs, targets, weight=[0.5, 0.5], reduction=reduction)
        outcomes.append(torch.autograd.grad(scale * value, inputs))
    for half, exact in zip(*outcomes, strict=True):
        # One rounding to float16, and half of its smallest number.
        torch.testing.assert_close(half.double(), exact, rtol=2e-3, atol=1e-7)


# --- The temperature of the student ----------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["teacher", "0-d", "[K]", "parameter"])
def test_temperature_of_the_student(path, mode, kind):
    """Against the equation, at the temperatures and weights of the step."""
    given = {
        "teacher": "teacher",
        "0-d": torch.tensor(2.5),
        "[K]": torch.tensor([2.5, 0.7]),
        "parameter": torch.nn.Parameter(torch.tensor([2.5, 0.7], dtype=torch.float64)),
    }[kind]
    loss = BMTARDLoss(
        balance=mode, temperature_lr=0.5, weight_lr=0.5, reduction="batchmean",
        student_temperature=given,
    )  # fmt: skip
    assert [name for name, _ in loss.named_parameters()] == (
        ["student_temperature"] if kind == "parameter" else []
    )
    assert ("student_temperature" in loss.state_dict()) == (kind != "teacher")
    for index in range(3):
        student, teacher = batch(index)
        student = [leaf(s) for s in student]
        before = loss.temperatures.clone()
        total = loss(student, teacher)
        used = before if mode == "sign" else loss.temperatures
        own = given
        if kind == "teacher":
            own = used
        elif kind == "0-d":
            own = given.expand(2)
        expected = sum(
            loss.weights[k] * oracles.torch_kl(student[k], teacher[k], used[k], own[k]).mean()
            for k in range(2)
        )
        torch.testing.assert_close(total, expected)
        inputs = [*student, *loss.parameters()]
        for actual, wanted in zip(
            torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(actual, wanted)
    assert loss.step == 3
    assert loss.temperatures.max() > 1.2
    again = copy.deepcopy(loss)
    assert torch.equal(again(*batch(3)), loss(*batch(3)))


def test_a_temperature_of_integers_is_refused_at_once():
    with pytest.raises(TypeError, match=r"student_temperature must be float32, .* got torch.int64"):
        BMTARDLoss(student_temperature=torch.tensor(2))


# --- Several calls, one step -----------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_equal_the_whole_batch(path, mode, reduction):
    """Value, gradients and state over several steps, on micro-batches of unequal sizes."""
    whole, parts = (
        BMTARDLoss(balance=mode, temperature_lr=0.3, weight_lr=0.4, reduction=reduction)
        for _ in range(2)
    )
    rows = [slice(0, 3), slice(3, 4), slice(4, 16)]
    for index in range(4):
        student, teacher = batch(index)
        expected_inputs, actual_inputs = ([leaf(s) for s in student] for _ in range(2))
        expected = whole(expected_inputs, teacher)
        expected.backward()
        total = 0.0
        with parts.one_step():
            with torch.no_grad():
                seen = parts(student, teacher)
            for part in rows:
                share = 1.0 if reduction == "sum" else (part.stop - part.start) / 16
                loss = share * parts([s[part] for s in actual_inputs], [t[part] for t in teacher])
                loss.backward()
                total += loss.item()
        torch.testing.assert_close(seen, expected.detach(), rtol=1e-14, atol=0)
        assert total == pytest.approx(expected.item(), rel=1e-13)
        for actual, wanted in zip(actual_inputs, expected_inputs, strict=True):
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-11, atol=1e-16)
        assert_same(snapshot(parts), snapshot(whole))
    assert parts.step == 4
    assert parts.temperatures.max() > 1.2


@pytest.mark.parametrize("mode", MODES)
def test_the_first_micro_batch_alone_moves_the_balance(path, mode):
    """The approximation without a look at all rows."""
    whole, parts = (BMTARDLoss(balance=mode, temperature_lr=0.3, weight_lr=0.4) for _ in range(2))
    first, second = batch(0), batch(1)
    before = whole.temperatures.clone()
    expected = whole(*first)
    used = before if mode == "sign" else whole.temperatures
    with parts.one_step():
        assert torch.equal(parts(*first), expected)
        value = parts(*second)
    assert_same(snapshot(parts), snapshot(whole))
    wanted = sum(
        float(whole.weights[k])
        * float(oracles.kl(second[0][k], second[1][k], float(used[k])).mean())
        / 10
        for k in range(2)
    )
    assert value.item() == pytest.approx(wanted, rel=1e-9)
    assert torch.equal(parts(*second), whole(*second))  # outside, every call is a step again
    assert parts.step == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpointed_loss_is_one_step(path, mode, reentrant):
    from torch.utils.checkpoint import checkpoint

    plain, saving = (BMTARDLoss(balance=mode, temperature_lr=0.3, weight_lr=0.4) for _ in range(2))
    calls = []
    saving.register_forward_pre_hook(lambda *_: calls.append(1))
    for index in range(3):
        student, teacher = batch(index)
        one, two = ([leaf(s) for s in student] for _ in range(2))
        expected = plain(one, teacher)
        expected.backward()

        def function(*students):
            return saving(students, teacher)  # noqa: B023

        with saving.one_step():
            loss = checkpoint(function, *two, use_reentrant=reentrant)
            loss.backward()
        assert torch.equal(loss, expected)
        for actual, wanted in zip(two, one, strict=True):
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-13, atol=0)
        assert_same(snapshot(saving), snapshot(plain))
    assert len(calls) == 6


@pytest.mark.parametrize("mode", MODES)
def test_a_closure_of_lbfgs_sees_one_function(path, mode):
    """The line search compares values of a loss whose temperatures and weights stand still."""
    loss = BMTARDLoss(balance=mode, temperature_lr=0.3, weight_lr=0.4)
    (x, _), teacher = batch(0)
    weight = torch.zeros(10, 10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=6, line_search_fn="strong_wolfe")
    values = []

    def closure():
        optimizer.zero_grad()
        value = loss([x @ weight, x @ weight], teacher)
        value.backward()
        values.append((weight.detach().clone(), value.item()))
        return value

    for step in range(2):
        values.clear()
        before = loss.temperatures.clone()
        with loss.one_step():
            optimizer.step(closure)
        assert loss.step == step + 1
        assert len(values) > 3
        used = before if mode == "sign" else loss.temperatures
        for point, value in values:
            wanted = sum(
                float(loss.weights[k])
                * float(oracles.kl(x @ point, teacher[k], float(used[k])).mean())
                / 10
                for k in range(2)
            )
            assert value == pytest.approx(wanted, rel=1e-9)


def test_one_step_is_left_after_an_error_and_not_nested():
    loss = BMTARDLoss()
    student, teacher = batch(0)
    with pytest.raises(ValueError, match="student_logits"), loss.one_step():
        loss(student[:1], teacher)
    nested = pytest.raises(RuntimeError, match=r"one_step\(\) is open already")
    with loss.one_step(), nested, loss.one_step():
        pass
    with loss.one_step():
        loss(student, teacher)
        loss.eval()
        expected = copy.deepcopy(loss)(student, teacher)
        assert torch.equal(loss(student, teacher), expected)
        loss.train()
        loss(student, teacher)
    assert loss.step == 1
    loss(student, teacher)
    assert loss.step == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_first_call_that_is_not_finite_holds_the_old_state(path, mode):
    loss, expected = (BMTARDLoss(balance=mode, temperature_lr=0.3, weight_lr=0.4) for _ in range(2))
    for module in (loss, expected):
        module(*batch(0))
    expected.eval()
    student, teacher = batch(1)
    bad = [s.clone() for s in student]
    bad[0][0, 0] = math.nan
    with loss.one_step():
        assert loss(bad, teacher).isnan()
        assert loss.status == SKIPPED
        assert torch.equal(loss(student, teacher), expected(student, teacher))
    assert loss.step == 1
