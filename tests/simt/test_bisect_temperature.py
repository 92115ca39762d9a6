from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq

from . import harness as h

CONVERGED, CLAMPED_LOW, CLAMPED_HIGH, DEGENERATE, NON_FINITE, MAX_ITERATIONS = range(6)
HALLEY, BISECTION = 0, 1
LOW, HIGH = 1e-2, 1e2


def search(logits, target, dtype, *, per_sample, initial=None, method=HALLEY, **settings):
    """Returns temperature, entropy, slope, status, iterations."""
    out = h.Outputs()
    shape = (logits.shape[0],) if per_sample else ()
    results = [out.new(shape, h.real(dtype)) for _ in range(3)]
    results += [out.new(shape, np.int32) for _ in range(2)]
    names = ["temperature", "entropy", "slope", "status", "iterations"]
    h.simt().bisect_temperature(
        logits=logits,
        per_sample=per_sample,
        target_entropy=np.asarray(target, h.real(dtype)),
        initial=None if initial is None else np.asarray(initial, h.real(dtype)),
        **{"low": LOW, "high": HIGH, "tolerance": 1e-6, "max_iterations": 40, **settings},
        method=method,
        **dict(zip(names, results, strict=True)),
    )
    out.check()
    return results


def mean_entropy(z, log_temperature):
    return h.entropy(z, np.exp(log_temperature)).mean()


def solve(z, target):
    """The temperature, by another method."""
    if mean_entropy(z, np.log(LOW)) >= target:
        return LOW
    if mean_entropy(z, np.log(HIGH)) <= target:
        return HIGH
    bracket = np.log(LOW), np.log(HIGH)
    return np.exp(brentq(lambda x: mean_entropy(z, x) - target, *bracket, xtol=1e-13))


def variance(z, temperature):
    log_p = h.log_softmax(z, temperature)
    p = np.exp(log_p)
    log_p = np.where(p == 0, 0, log_p)
    return (p * (log_p - (p * log_p).sum(-1, keepdims=True)) ** 2).sum(-1)


def assert_solved(z, target, temperature, entropy, slope, dtype):
    """z [N, C]; the search met the target at a temperature, and says truly what is there."""
    tolerance = max(1e-6, 16 * h.EPS[h.computed(dtype)] * np.log(z.shape[1]))
    assert abs(entropy - target) <= tolerance * 1.01
    np.testing.assert_allclose(entropy, mean_entropy(z, np.log(temperature)), atol=tolerance)
    want = variance(z, temperature).mean()
    np.testing.assert_allclose(slope, want, rtol=1e-3, atol=1e-5)
    # An error of the entropy is an error of log temperature over the slope.
    error = 2 * tolerance / max(want, 1e-12)
    assert abs(np.log(temperature / solve(z, target))) <= max(error, 1e-12)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", h.CLASSES)
@pytest.mark.parametrize("method", [HALLEY, BISECTION])
def test_by_sample(c, dtype, method):
    rng = np.random.default_rng(c)
    h.simt().configure(seed=c, max_shared_bytes=16 * 1024)
    for n, extra in [(0, 0), (1, 0), (5, 8), (13, 0)]:
        if c > 600 and n == 13:
            n = 3
        z = h.draw(c + n, n, c, dtype, scale=4)
        logits = h.place(z, dtype, extra=extra)
        target = rng.uniform(0.1, 0.9, n) * np.log(c)
        target = target.astype(h.real(dtype)).astype(np.float64)
        cold = search(logits, target, dtype, per_sample=True, method=method)
        guess = rng.uniform(0.5, 2, n)
        warm = search(logits, target, dtype, per_sample=True, method=method, initial=guess)
        for temperature, entropy, slope, status, iterations in (cold, warm):
            if c == 1:
                # One class: entropy and target are 0 at every temperature.
                assert (status == CONVERGED).all()
                continue
            assert (status == CONVERGED).all()
            assert (iterations >= 1).all()
            for i in range(n):
                assert_solved(
                    z[i : i + 1], target[i], float(temperature[i]), float(entropy[i]),
                    float(slope[i]), dtype,
                )  # fmt: skip


def many_rows(shape, dtype):
    n, c = shape
    threads = 256 if dtype == "float64" else 512
    at_once = threads // (
        8 if c <= 32 else 32 if c <= (512 if dtype == "float64" else 1024) else threads
    )
    return n > 2 * at_once


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", [(1, 10), (37, 10), (129, 32), (6, 1000), (3, 3000)], ids=str)
@pytest.mark.parametrize("method", [HALLEY, BISECTION])
def test_of_the_batch(shape, dtype, method):
    """Small: all rounds in one launch."""
    z = h.draw(7, *shape, dtype, scale=4)
    logits = h.place(z, dtype)
    for share in (0.2, 0.8):
        target = float(h.real(dtype).type(share * np.log(shape[1])))
        for initial, cluster in [(None, 1), (1.5, 1), (None, 8), (1.5, 4)]:
            h.simt().configure(seed=cluster, max_cluster=cluster, max_shared_bytes=1 << 16)
            h.simt().take_counters()
            found = search(logits, target, dtype, per_sample=False, method=method, initial=initial)
            counters = h.simt().take_counters()
            assert counters["launches"] == 1
            # Two looks of a block at its share are cheaper than a cluster.
            assert (counters["blocks"] > 1) == (cluster > 1 and many_rows(shape, dtype))
            assert found[3] == CONVERGED
            assert_solved(z, target, *(float(x) for x in found[:3]), dtype)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", [(3400, 10), (331, 100), (40, 1000), (14, 3000)], ids=str)
def test_of_a_batch_for_many_blocks(shape, dtype):
    """A cooperative grid."""
    z = h.draw(8, *shape, dtype, scale=4)
    logits = h.place(z, dtype)
    target = float(h.real(dtype).type(0.6 * np.log(shape[1])))
    h.simt().configure(seed=3, multiprocessors=2)
    h.simt().take_counters()
    found = search(logits, target, dtype, per_sample=False, max_iterations=20)
    counters = h.simt().take_counters()
    assert counters["launches"] == 1
    assert counters["blocks"] > 1
    assert found[3] == CONVERGED
    assert found[4] < 10
    assert_solved(z, target, *(float(x) for x in found[:3]), dtype)
    h.simt().configure(seed=4, multiprocessors=2)
    again = search(logits, target, dtype, per_sample=False, max_iterations=20)
    assert [float(x) for x in again] == [float(x) for x in found]


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [10, 100, 1100])
@pytest.mark.parametrize("method", [HALLEY, BISECTION])
@pytest.mark.parametrize("initial", [None, 2.0])
def test_every_status(c, dtype, method, initial):
    z = h.draw(9, 9, c, dtype)
    start = None if initial is None else initial + np.arange(9) / 8
    keep = np.ones(9) if initial is None else start
    target = np.full(9, 0.5)
    z[0, 0] = np.nan
    z[1, 1] = np.inf
    z[2] = -np.inf
    z[3] = 7.0  # equal logits
    z[4, 1:] = -np.inf  # one class is left
    target[5] = 2 * np.log(c)
    target[6] = np.nan
    z[7] = h.rounded(z[7] * 1e-3, dtype)  # nearly uniform even at the lower bound
    target[7] = 0.01
    target[8] = -1.0
    expected = [NON_FINITE] * 3 + [DEGENERATE] * 2 + [CLAMPED_HIGH, NON_FINITE]
    expected += [CLAMPED_LOW, CLAMPED_LOW]
    kept = [*keep[:5], HIGH, keep[6], LOW, LOW]
    got = search(h.place(z, dtype), target, dtype, per_sample=True, method=method, initial=start)
    np.testing.assert_array_equal(got[3], expected)
    np.testing.assert_allclose(got[0], kept, rtol=1e-6)
    assert (got[4] <= 40).all()
    # The same rows, one a batch.
    for i in range(9):
        logits = h.place(z[i : i + 1], dtype)
        first = None if start is None else start[i]
        one = search(logits, target[i], dtype, per_sample=False, method=method, initial=first)
        assert one[3] == expected[i]
        np.testing.assert_allclose(one[0], kept[i], rtol=1e-6)


def first_temperatures(z, target, initial, count):
    """Those of Halley's iteration on log(H / (log C - H)) over log temperature, H the mean entropy
    of z [N, C]; without an initial temperature it starts from the variance of the logits."""
    log_count = np.log(np.isfinite(z).sum(-1)).mean()
    if initial is None:
        spread = np.mean([np.var(row[np.isfinite(row)]) for row in z])
        initial = np.sqrt(spread / (2 * (log_count - target)))
    temperatures = [initial]
    while len(temperatures) < count:
        u = np.where(np.isfinite(z), z, 0) / temperatures[-1]
        p = np.exp(h.log_softmax(z, temperatures[-1]))
        centered = u - (p * u).sum(-1, keepdims=True)
        slope = (p * centered**2).sum(-1).mean()
        curvature = -2 * slope - (p * centered**3).sum(-1).mean()
        entropy = h.entropy(z, temperatures[-1]).mean()
        room = log_count - entropy
        g = np.log(entropy / room) - np.log(target / (log_count - target))
        q = 1 / entropy + 1 / room
        first, second = slope * q, curvature * q + slope**2 * (room**-2 - entropy**-2)
        step = 2 * g * first / (2 * first**2 - g * second)
        temperatures.append(temperatures[-1] * np.exp(-step))
    return temperatures


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("initial", [None, 2.0])
@pytest.mark.parametrize("c", [10, 100, 1100])
def test_the_first_temperatures_of_halleys_method(c, initial, per_sample):
    """A search finds its end from anywhere, so they alone show what it costs."""
    n = 3
    z = h.draw(14, n, c, "float64", scale=4)
    z[:, 7::9] = -np.inf
    logits, target = h.place(z, "float64"), 0.6 * np.log(c)
    parts = z[:, None] if per_sample else [z]
    want = np.array([first_temperatures(part, target, initial, 2) for part in parts])
    shape = (n,) if per_sample else ()
    for done in (1, 2):
        temperature, *_ = search(
            logits, np.full(shape, target), "float64", per_sample=per_sample, tolerance=0.0,
            initial=None if initial is None else np.full(shape, initial), max_iterations=done,
        )  # fmt: skip
        np.testing.assert_allclose(np.atleast_1d(temperature), want[:, done - 1], rtol=1e-9)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_tolerance_of_nothing_is_that_of_rounding(per_sample, dtype):
    n, c = 20, 10
    logits = h.place(h.draw(15, n, c, dtype), dtype)
    target = np.full(n if per_sample else (), 0.5 * np.log(c))
    rounding = 4 * h.EPS[h.computed(dtype)] * np.log(c)
    settings = {"per_sample": per_sample, "max_iterations": 100}
    below = search(logits, target, dtype, tolerance=0.9 * rounding, **settings)
    nothing = search(logits, target, dtype, tolerance=0.0, **settings)
    for got, want in zip(nothing, below, strict=True):
        np.testing.assert_array_equal(got, want)
    assert (nothing[3] == CONVERGED).all()


@pytest.mark.parametrize("method", [HALLEY, BISECTION])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_temperature_far_from_one(size, method):
    """The product of two such bounds leaves the range of a float."""
    z = h.rounded(size * h.draw(16, 4, 10, "float32"), "float32")
    wide = {"low": 1e-36, "high": 1e36, "max_iterations": 200, "method": method}
    target = np.linspace(0.5, 2, 4)
    got = search(h.place(z, "float32"), target, "float32", per_sample=True, **wide)
    assert (got[3] == CONVERGED).all()
    np.testing.assert_allclose(h.entropy(z, got[0].astype(float)[:, None]), target, atol=4e-6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_runs_out_of_iterations(per_sample):
    z = h.draw(10, 4, 50, "float32")
    target = np.full(4, 1.0) if per_sample else 1.0
    got = search(
        h.place(z, "float32"), target, "float32", per_sample=per_sample, max_iterations=3,
        method=BISECTION,
    )  # fmt: skip
    assert (got[3] == MAX_ITERATIONS).all()
    assert (got[4] == 3).all()


def test_mean_of_nothing():
    logits = h.place(np.zeros((0, 10)), "float32")
    got = search(logits, 1.0, "float32", per_sample=False, initial=3.0)
    assert got[3] == NON_FINITE  # the mean of nothing
    assert got[0] == 3.0
    assert np.isnan(got[1])
    assert got[4] == 1


def test_row_in_shared_memory_or_read_again():
    z = h.draw(11, 3, 1500, "float32")
    results, moved = [], []
    for limit in (1024, 1 << 16):
        h.simt().configure(seed=2, max_shared_bytes=limit)
        h.simt().take_counters()
        results.append(search(h.place(z, "float32"), [1.0, 2.0, 3.0], "float32", per_sample=True))
        moved.append(h.simt().take_counters()["shared_bytes"])
    # Each value written once, and read for the maximum, the range and every evaluation.
    assert moved[1] - moved[0] >= 4 * 1500 * int((3 + results[0][4]).sum())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("c", [100, 1000])
def test_a_batch_in_shared_memory_is_written_once(c):
    """And read in every round."""
    n, dtype = 6, "float32"
    z = h.draw(11, n, c, dtype)
    moved = []
    for limit in (0, 1 << 16):
        h.simt().configure(seed=2, max_shared_bytes=limit)
        h.simt().take_counters()
        found = search(
            h.place(z, dtype), 0.5 * np.log(c), dtype, per_sample=False, initial=1.0,
        )  # fmt: skip
        moved.append(h.simt().take_counters()["shared_bytes"])
    values = n * -(-c // 128) * 128  # whole tiles
    assert moved[1] - moved[0] == 4 * values * (1 + found[4])


def test_the_arrays_of_a_kernel_need_room_too():
    z = h.draw(11, 2, 3000, "float32")
    h.simt().configure(seed=2, max_shared_bytes=3072 * 4)  # as much as a row of whole tiles
    found = search(h.place(z, "float32"), [1.0, 2.0], "float32", per_sample=True)
    assert (found[3] == CONVERGED).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_masked_classes_do_not_count(dtype):
    z = h.draw(12, 6, 40, dtype)
    z[:, 25:] = -np.inf
    full = h.place(np.ascontiguousarray(z[:, :25]), dtype)
    for per_sample in (False, True):
        target = np.full(6, 2.0) if per_sample else 2.0
        a = search(h.place(z, dtype), target, dtype, per_sample=per_sample)
        b = search(full, target, dtype, per_sample=per_sample)
        np.testing.assert_allclose(a[0], b[0], rtol=2e-6)


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_the_mean_of_equal_rows(dtype):
    """However many they are, it is that of one: sums over the batch are double."""
    row = h.draw(13, 1, 10, dtype)
    one = search(h.place(row, dtype), 1.5, dtype, per_sample=False)
    rtol = 1e-12 if dtype == "float64" else 2e-7
    for n, settings in [(701, {}), (4001, {"multiprocessors": 2})]:  # one block, and a grid
        h.simt().configure(seed=1, **settings)
        logits = h.place(np.repeat(row, n, 0), dtype)
        many = search(logits, 1.5, dtype, per_sample=False)
        for got, want in zip(many, one, strict=True):
            np.testing.assert_allclose(got, want, rtol=rtol)


@pytest.mark.parametrize("method", [0, 1])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("initial", [None, 1e30])
def test_a_variance_that_underflows_is_not_taken_for_equal_logits(initial, per_sample, method):
    dtype = "float32"
    z = h.draw(3, 5, 10, dtype)
    z[:, 2] = -np.inf
    target = np.ones(5 if per_sample else (), np.float32)
    start = None if initial is None else np.full_like(target, initial)
    wide = {"low": 1e-36, "high": 1e36, "max_iterations": 200, "method": method, "initial": start}
    _, entropy, _, status, _ = search(
        h.place(z, dtype), target, dtype, per_sample=per_sample, **wide
    )
    assert (status == CONVERGED).all()
    np.testing.assert_allclose(entropy, 1.0, atol=2e-6)


@pytest.mark.parametrize("method", [0, 1])
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_last_evaluation_is_at_a_flat_entropy(per_sample, method):
    # At 1e30 the logits look equal: one evaluation more would tell.
    dtype = "float32"
    target = np.full(5 if per_sample else (), 3.0, np.float32)
    _, _, _, status, iterations = search(
        h.place(h.draw(3, 5, 10, dtype), dtype), target, dtype, per_sample=per_sample,
        low=1e-36, high=1e36, max_iterations=1, method=method, initial=np.full_like(target, 1e30),
    )  # fmt: skip
    assert (status == MAX_ITERATIONS).all()
    assert (iterations == 1).all()
