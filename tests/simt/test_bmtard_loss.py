from __future__ import annotations

import copy

import numpy as np
import pytest
from scipy.optimize import brentq

from . import harness as h

UPDATED, SKIPPED, OUT_OF_BOUNDS = range(3)
LOW, HIGH = 1.0, 10.0
STUDENT_TEMPERATURE = 1.25
TOLERANCE = 1e-6


def new_state(k, *, temperature_lr=0.05, weight_lr=0.025):
    return {
        "temperatures": np.full(k, LOW),
        "weights": np.full(k, 1 / k),
        "initial_losses": np.zeros(k),
        "entropies": np.zeros(k),
        "losses": np.zeros(k),
        "temperature_lr": np.float64(temperature_lr).reshape(()),
        "weight_lr": np.float64(weight_lr).reshape(()),
        "step": np.zeros((), np.int64),
        "status": np.full((), -1, np.int32),
    }


def call(students, teachers, state, dtype, *, sign, scale, wants=None, shift=0, **settings):
    """One step. The state is overwritten; returns the loss and the gradients."""
    out = h.Outputs()
    k, (n, c) = len(students), students[0].shape
    loss = out.new((), h.real(dtype))
    wants = [True] * k if wants is None else wants
    gradients = [out.new((n, c), dtype, shift=shift) if want else None for want in wants]
    guarded = {name: out.copy(np.atleast_1d(value)) for name, value in state.items()}
    defaults = {
        "update": True,
        "low": LOW,
        "high": HIGH,
        "temperature_momentum": 0.0,
        "loss_exponent": 1.0,
        "student_temperature": STUDENT_TEMPERATURE,
        "eps": 0.0,
        "tolerance": TOLERANCE,
        "max_iterations": 32,
    }
    h.simt().bmtard_loss(
        students=students,
        teachers=teachers,
        state=guarded,
        sign=sign,
        scale=scale,
        loss=loss,
        grad_students=gradients,
        **{**defaults, **settings},
    )
    out.check()
    for name, value in guarded.items():
        state[name] = value.reshape(state[name].shape).copy()
    return float(loss), gradients


class Oracle:
    """The balance in float64, from its description."""

    def __init__(
        self, k, *, sign, scale, eps=0.0, momentum=0.0, exponent=1.0, high=HIGH, lr=(0.05, 0.025)
    ):
        self.k, self.sign, self.scale, self.eps = k, sign, scale, eps
        self.momentum, self.exponent, (self.temperature_lr, self.weight_lr) = momentum, exponent, lr
        self.high = high
        self.temperatures, self.weights = np.full(k, LOW), np.full(k, 1 / k)
        self.initial, self.entropies, self.losses = None, np.zeros(k), np.zeros(k)

    def balanced(self, teachers):
        """The temperatures of one mean entropy: the highest of those at the lower bound."""
        target = max(h.entropy(z, LOW).mean() for z in teachers)
        found = []
        for z in teachers:
            gap = lambda x, z=z: h.entropy(z, np.exp(x)).mean() - target  # noqa: E731
            if gap(np.log(LOW)) >= -TOLERANCE:
                found.append(LOW)
            elif gap(np.log(self.high)) <= 0:
                found.append(self.high)
            else:
                found.append(np.exp(brentq(gap, np.log(LOW), np.log(self.high), xtol=1e-13)))
        log = self.momentum * np.log(self.temperatures) + (1 - self.momentum) * np.log(found)
        return np.exp(log)

    def step(self, students, teachers):
        """Returns the loss and the gradients."""
        if not self.sign:
            self.temperatures = self.balanced(teachers)
        losses, gradients, entropies = [], [], []
        for s, t, temperature in zip(students, teachers, self.temperatures, strict=True):
            log_p, log_q = h.log_softmax(t, temperature), h.log_softmax(s, STUDENT_TEMPERATURE)
            p = np.exp(log_p)
            with np.errstate(invalid="ignore", divide="ignore"):
                kl = np.where(p > 0, p * (np.log(p + self.eps) - log_q), 0).sum()
            losses.append(self.scale * kl)
            gradients.append(self.scale * (np.exp(log_q) - p) / STUDENT_TEMPERATURE)
            entropies.append(h.entropy(t, temperature, self.eps if self.sign else 0.0).mean())
        self.losses, self.entropies = np.array(losses), np.array(entropies)
        if self.initial is None:
            self.initial = self.losses
        relative = (self.losses / self.initial) ** self.exponent
        weights = self.weights - self.weight_lr * (self.weights - relative / relative.sum())
        weights = np.maximum(weights, 0)
        self.weights = weights / weights.sum()
        if self.sign and self.k > 1:
            others = (self.entropies.sum() - self.entropies) / (self.k - 1)
            moved = self.temperatures - self.temperature_lr * np.sign(self.entropies / others - 1)
            self.temperatures = np.clip(moved, LOW, self.high)
        loss = float(self.weights @ self.losses)
        return loss, [w * g for w, g in zip(self.weights, gradients, strict=True)]


def batch(seed, k, n, c, dtype):
    """Students alike, teachers of different sharpness."""
    students = [h.draw(seed + 10 * i, n, c, dtype, scale=1.5) for i in range(k)]
    teachers = [h.draw(seed + 10 * i + 5, n, c, dtype, scale=2 + 1.5 * i) for i in range(k)]
    return students, teachers


def put(matrices, dtype, **layout):
    return [h.place(z, dtype, **layout) for z in matrices]


def assert_state(state, oracle, dtype, *, status=UPDATED):
    single = dtype != "float64"
    # The search stops within its tolerance in nats, so all that depends on it is as exact.
    rtol = 2e-5 if single else (1e-9 if oracle.sign else 2e-6)
    np.testing.assert_allclose(state["temperatures"], oracle.temperatures, rtol=rtol)
    np.testing.assert_allclose(state["entropies"], oracle.entropies, rtol=rtol, atol=2e-6)
    np.testing.assert_allclose(state["losses"], oracle.losses, rtol=rtol, atol=1e-9)
    np.testing.assert_allclose(state["initial_losses"], oracle.initial, rtol=rtol, atol=1e-9)
    np.testing.assert_allclose(state["weights"], oracle.weights, rtol=rtol)
    assert state["status"] == status


def assert_gradients(got, want, scale, dtype):
    rough = 2e-5 if dtype != "float64" else 2e-6
    eps = h.EPS[dtype] if dtype in ("float16", "bfloat16") else 0.0
    smallest = 6e-8 if dtype == "float16" else 0.0
    for a, b in zip(got, want, strict=True):
        values = h.decode(a)
        np.testing.assert_allclose(values, b, rtol=eps + rough, atol=rough * scale + smallest)


SHAPES = [(1, 1), (1, 10), (3, 2), (37, 10), (129, 10), (13, 31), (9, 32), (17, 33), (128, 200)]
SHAPES += [(5, 127), (3, 1000), (3, 1001), (5, 1024), (3, 1025), (2, 3000)]


@pytest.mark.parametrize("sign", [True, False], ids=["sign", "bisect"])
@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_of_a_small_batch_in_one_launch(shape, dtype, sign):
    n, c = shape
    k = 1 + (n + c) % 3
    eps = 1e-5 if sign else 0.0
    scale = 1.0 / n
    oracle = Oracle(k, sign=sign, scale=scale, eps=eps)
    state = new_state(k)
    layouts = [{}, {"extra": 8}, {"extra": 1, "shift": 1}]
    for step in range(2 if n * c > 5000 else 3):
        students, teachers = batch(100 * step, k, n, c, dtype)
        # By turns one block, a cluster, a cluster whose rows stay in shared memory.
        cluster = [1, 8, 4][(n + step) % 3]
        shared = 1 << 20 if cluster == 4 else 1 << 14
        h.simt().configure(seed=step + 1, max_cluster=cluster, max_shared_bytes=shared)
        h.simt().take_counters()
        loss, got = call(
            put(students, dtype, **layouts[step]),
            put(teachers, dtype, **layouts[step]),
            state,
            dtype,
            sign=sign,
            scale=scale,
            eps=eps,
            shift=layouts[step].get("shift", 0),
        )
        counters = h.simt().take_counters()
        assert counters["launches"] == 1
        assert counters["blocks"] <= cluster
        assert (counters["blocks"] > 1) == (counters["remote_accesses"] > 0)
        if cluster > 1 and c > 32 and n >= 33:
            assert counters["blocks"] == cluster
        if c == 1:  # nothing to learn and nothing to balance
            np.testing.assert_allclose(loss, np.log1p(eps), rtol=1e-2, atol=1e-7)
            assert state["step"] == step + 1
            np.testing.assert_allclose(state["weights"], 1 / k)
            continue
        want, gradients = oracle.step(students, teachers)
        np.testing.assert_allclose(loss, want, rtol=2e-5 if dtype != "float64" else 2e-6)
        assert_gradients(got, gradients, scale, dtype)
        assert_state(state, oracle, dtype)
        assert state["step"] == step + 1


@pytest.mark.parametrize("sign", [True, False], ids=["sign", "bisect"])
@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", [(3400, 10), (400, 100), (40, 1001), (14, 3000)], ids=str)
def test_steps_of_a_large_batch(shape, dtype, sign):
    """A cooperative grid; the decisions are those of one block, to rounding."""
    n, c = shape
    scale = 1.0 / (n * c)
    oracle = Oracle(2, sign=sign, scale=scale, eps=1e-5)
    state = new_state(2)
    for step in range(2):
        students, teachers = batch(100 * step, 2, n, c, dtype)
        arguments = put(students, dtype), put(teachers, dtype)
        again = copy.deepcopy(state)
        shared = [1 << 14, 1 << 20][step]
        h.simt().configure(seed=6 + step, multiprocessors=2, max_shared_bytes=shared)
        h.simt().take_counters()
        settings = {"sign": sign, "scale": scale, "eps": 1e-5, "max_iterations": 10}
        loss, got = call(*arguments, state, dtype, **settings)
        counters = h.simt().take_counters()
        assert counters["launches"] == 1
        assert counters["blocks"] > 1
        if step == 1 and c > 32:  # every value was written once and read in every round
            assert counters["shared_bytes"] > (6 if sign else 8) * n * c * h.STORAGE[dtype].itemsize
        want, gradients = oracle.step(students, teachers)
        np.testing.assert_allclose(loss, want, rtol=2e-5 if dtype != "float64" else 2e-6)
        assert_gradients(got, gradients, scale, dtype)
        assert_state(state, oracle, dtype)
        assert state["step"] == step + 1
        # Bit for bit the same in another order of threads and blocks.
        if step == 0:
            h.simt().configure(seed=77, multiprocessors=2)
            repeated, other = call(*arguments, again, dtype, **settings)
            assert repeated == loss
            for a, b in zip(got, other, strict=True):
                np.testing.assert_array_equal(a, b)
            for name, value in state.items():
                np.testing.assert_array_equal(value, again[name])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_momentum_and_exponent(dtype, momentum, exponent):
    k, n, c = 3, 40, 10
    oracle = Oracle(k, sign=False, scale=1.0, momentum=momentum, exponent=exponent, lr=(0.05, 0.3))
    state = new_state(k, weight_lr=0.3)
    for step in range(5):
        students, teachers = batch(100 * step, k, n, c, dtype)
        settings = {"temperature_momentum": momentum, "loss_exponent": exponent}
        loss, _ = call(
            put(students, dtype), put(teachers, dtype), state, dtype, sign=False, scale=1.0,
            **settings,
        )  # fmt: skip
        want, _ = oracle.step(students, teachers)
        np.testing.assert_allclose(loss, want, rtol=2e-5 if dtype != "float64" else 2e-6)
        assert_state(state, oracle, dtype)
    assert len(set(np.round(state["weights"], 4))) == k


@pytest.mark.parametrize("sign", [True, False], ids=["sign", "bisect"])
@pytest.mark.parametrize("n", [16, 3300])
def test_without_update_nothing_of_the_state_changes(sign, n):
    """Also which gradients are wanted makes no difference to anything else."""
    students, teachers = batch(0, 2, n, 10, "float32")
    state = new_state(2)
    state["temperatures"][:] = [1.5, 2.5]
    state["weights"][:] = [0.3, 0.7]
    before = copy.deepcopy(state)
    arguments = put(students, "float32"), put(teachers, "float32"), state, "float32"
    loss, got = call(*arguments, sign=sign, scale=1.0 / n, update=False)
    oracle = Oracle(2, sign=True, scale=1.0 / n, lr=(0.0, 0.0))
    oracle.temperatures, oracle.weights = before["temperatures"], before["weights"]
    want, gradients = oracle.step(students, teachers)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert_gradients(got, gradients, 1 / n, "float32")
    for name, value in before.items():
        np.testing.assert_array_equal(state[name], value)
    for wants in ([True, False], [False, True], [False, False]):
        again, some = call(*arguments, sign=sign, scale=1.0 / n, update=False, wants=wants)
        assert again == loss
        for a, b in zip(some, got, strict=True):
            assert a is None or np.array_equal(a, b)


@pytest.mark.parametrize("sign", [True, False], ids=["sign", "bisect"])
@pytest.mark.parametrize(("n", "dtype"), [*((16, dtype) for dtype in h.DTYPES), (3300, "float32")])
@pytest.mark.parametrize("bad", ["student nan", "teacher nan", "teacher inf", "impossible"])
def test_a_batch_that_is_not_finite_leaves_the_state(bad, n, dtype, sign):
    """One teacher is enough, the first or the last."""
    one = int(n > 16)
    students, teachers = batch(0, 2, n, 10, dtype)
    state = new_state(2)
    settings = {"sign": sign, "scale": 1.0 / n, "max_iterations": 8}
    call(put(students, dtype), put(teachers, dtype), state, dtype, **settings)
    before = copy.deepcopy(state)
    which = students if bad in ("student nan", "impossible") else teachers
    value = {"nan": np.nan, "inf": np.inf, "impossible": -np.inf}[bad.split()[-1]]
    which[one][n - 1, 3] = value
    loss, got = call(put(students, dtype), put(teachers, dtype), state, dtype, **settings)
    assert np.isnan(loss) or loss == np.inf
    assert state["status"] == SKIPPED
    for name, saved in before.items():
        if name != "status":
            np.testing.assert_array_equal(state[name], saved)
    # The gradient of every other row is that of the weights as they are.
    assert np.isfinite(h.decode(got[1 - one])).all()
    assert np.isfinite(h.decode(got[one])[:-1]).all()
    if bad != "impossible":
        assert np.isnan(h.decode(got[one])[-1]).all()


def test_empty_batch():
    """The mean of nothing is no number: the state stays."""
    for scale, want in [(np.inf, np.nan), (1.0, 0.0)]:
        for sign in (True, False):
            state = new_state(2)
            empty = put([np.zeros((0, 10))] * 2, "float32")
            loss, _ = call(empty, empty, state, "float32", sign=sign, scale=scale)
            assert loss == want or np.isnan([loss, want]).all()
            assert state["status"] == SKIPPED
            assert state["step"] == 0


def test_a_target_that_no_temperature_reaches():
    """The second teacher is so sharp that even the upper bound leaves it below the first."""
    students, teachers = batch(0, 2, 8, 10, "float32")
    teachers[1] = teachers[1] * 100
    state = new_state(2)
    call(
        put(students, "float32"), put(teachers, "float32"), state, "float32", sign=False, scale=1.0
    )
    assert state["status"] == OUT_OF_BOUNDS
    np.testing.assert_allclose(state["temperatures"], [LOW, HIGH], rtol=1e-5)


def test_masked_classes():
    students, teachers = batch(0, 2, 8, 40, "float32")
    for z in (*students, *teachers):
        z[:, 30:] = -np.inf
    cut = [[np.ascontiguousarray(z[:, :30]) for z in side] for side in (students, teachers)]
    results = []
    for side in ((students, teachers), cut):
        state = new_state(2)
        loss, _ = call(*(put(z, "float32") for z in side), state, "float32", sign=False, scale=0.1)
        results.append((loss, *state["temperatures"], *state["weights"]))
        assert state["status"] == UPDATED
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_as_many_teachers_as_there_can_be():
    k = 16
    students, teachers = batch(0, k, 12, 10, "float32")
    for sign in (True, False):
        oracle, state = Oracle(k, sign=sign, scale=0.5, high=1000.0), new_state(k)
        loss, got = call(
            put(students, "float32"), put(teachers, "float32"), state, "float32", sign=sign,
            scale=0.5, high=1000.0,
        )  # fmt: skip
        want, gradients = oracle.step(students, teachers)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        assert_gradients(got, gradients, 0.5, "float32")
        assert_state(state, oracle, "float32")


def test_sign_rule_comes_to_rest_where_bisect_jumps():
    students, teachers = batch(3, 2, 32, 10, "float64")
    arguments = put(students, "float64"), put(teachers, "float64")
    jumped, walked = new_state(2), new_state(2, temperature_lr=0.02)
    call(*arguments, jumped, "float64", sign=False, scale=1.0)
    for _ in range(250):
        call(*arguments, walked, "float64", sign=True, scale=1.0, wants=[False, False])
    np.testing.assert_allclose(walked["temperatures"], jumped["temperatures"], atol=0.021)
    assert jumped["temperatures"].max() > 1.5


def test_the_sign_rule_stops_at_the_upper_bound():
    high = 1.08
    oracle, state = Oracle(2, sign=True, scale=1.0, high=high), new_state(2)
    for step in range(3):
        students, teachers = batch(100 * step, 2, 8, 10, "float64")
        call(
            put(students, "float64"), put(teachers, "float64"), state, "float64", sign=True,
            scale=1.0, high=high,
        )  # fmt: skip
        oracle.step(students, teachers)
        assert_state(state, oracle, "float64")
    assert state["temperatures"].max() == high


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", [(64, 200), (3, 3000)], ids=str)
def test_rows_in_shared_memory_or_read_again(shape, dtype):
    """To the bit: all matrices kept, only the teachers', none."""
    n, c = shape
    students, teachers = batch(1, 2, n, c, dtype)
    arguments = put(students, dtype), put(teachers, dtype)
    outcomes, moved = [], []
    # What the kernel declares itself, and of four matrices none, half, all.
    share = -(-n // 4) * (256 if c == 200 else 4096) * h.STORAGE[dtype].itemsize
    for limit in (0, 2 * share, 4 * share):
        h.simt().configure(seed=3, max_cluster=4, max_shared_bytes=limit + 8 * 1024)
        h.simt().take_counters()
        state = new_state(2)
        loss, got = call(*arguments, state, dtype, sign=False, scale=1 / n)
        outcomes.append((loss, *got, *state.values()))
        moved.append(h.simt().take_counters()["shared_bytes"])
    one = n * c * h.STORAGE[dtype].itemsize
    assert moved[1] - moved[0] > 4 * 2 * one  # at least three rounds of two teachers
    assert moved[2] - moved[1] > 2 * 2 * one
    for outcome in outcomes[1:]:
        for a, b in zip(outcome, outcomes[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_have_a_scale_of_their_own(dtype):
    students, teachers = batch(1, 2, 9, 40, dtype)
    arguments = put(students, dtype), put(teachers, dtype)
    once, loss = {}, {}
    for factor in (1, 8):
        loss[factor], once[factor] = call(
            *arguments, new_state(2), dtype, sign=True, scale=0.1, gradient_scale=0.1 * factor
        )
    assert loss[1] == loss[8]
    for a, b in zip(once[1], once[8], strict=True):
        np.testing.assert_array_equal(8 * a, b)
