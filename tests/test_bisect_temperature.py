"""bisect_temperature against Brent's method and an independent decision of the status."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from oracles import DTYPES, LAYOUTS, accumulation, leaf, randn
from torch.autograd import gradcheck

import bmtard
from bmtard import SearchStatus

pytest_plugins = ["paths"]

METHODS = ["halley", "bisection"]
LOW, HIGH = 1e-2, 1e2
CONVERGED = int(SearchStatus.CONVERGED)


def reachable(logits, fraction, bounds=(LOW, HIGH)):
    """Entropies [...] at a fraction of the way between those at the bounds."""
    low, high = (oracles.entropy(logits, bound) for bound in bounds)
    return low + fraction * (high - low)


# --- Against Brent's method -----------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (129, 10), (17, 100), (5, 1001)], ids=str)
def test_matches_brent(device, path, shape, fraction, method):
    logits = randn(*shape, device=device)
    target = float(reachable(logits, fraction).mean())
    found = bmtard.bisect_temperature(
        logits, target, tolerance=1e-13, max_iterations=100, method=method
    )
    assert found.status == CONVERGED
    expected = oracles.temperature_of(logits, target)
    torch.testing.assert_close(found.temperature.item(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.entropy.item(), target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 10), (33, 2), (33, 10), (9, 1001)], ids=str)
def test_per_sample_matches_brent(device, path, shape, method):
    logits = randn(*shape, device=device)
    target = reachable(logits, torch.linspace(0.02, 0.98, shape[0])).to(device)
    found = bmtard.bisect_temperature(
        logits, target, per_sample=True, tolerance=1e-13, max_iterations=100, method=method
    )
    assert (found.status == CONVERGED).all()
    for n in range(shape[0]):
        expected = oracles.temperature_of(logits[n : n + 1], float(target[n]))
        torch.testing.assert_close(found.temperature[n].item(), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (129, 10), (4, 3, 100), (10,), (3, 32000)], ids=str)
def test_every_dtype_reaches_the_target(device, path, shape, dtype, per_sample, method):
    logits = randn(*shape, dtype=dtype, device=device)
    target = reachable(logits, 0.4)
    target = target if per_sample else target.mean()
    found = bmtard.bisect_temperature(
        logits, target.to(device), per_sample=per_sample, method=method
    )
    rows = shape[:-1] if per_sample else ()
    acc = accumulation(dtype)
    for field, wanted in zip(found, (acc, acc, torch.int32, torch.int32), strict=True):
        assert field.shape == rows
        assert field.dtype == wanted
        assert field.device == logits.device
    assert (found.status == CONVERGED).all()
    entropy = oracles.entropy(logits, found.temperature)
    reached = entropy if per_sample else entropy.mean()
    # float32 keeps an entropy to some ulp of log C.
    slack = 1e-6 if acc == torch.float64 else 1e-6 + 16 * 1.2e-7 * math.log(shape[-1])
    torch.testing.assert_close(reached, target, rtol=0, atol=1.01 * slack)
    torch.testing.assert_close(found.entropy.cpu().double(), reached, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_layouts(device, path, per_sample, layout):
    logits = randn(2, 5, 33, dtype=torch.float32, device=device)
    results = []
    for x in (logits, oracles.in_layout(logits, layout)):
        x = leaf(x)
        found = bmtard.bisect_temperature(x, 1.5, per_sample=per_sample)
        found.temperature.sum().backward()
        results.append((found.temperature, x.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("per_sample", "shape"), [(False, ()), (True, ()), (True, (9,))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_as_target_is_a_tensor_of_it(device, path, dtype, per_sample, shape):
    target = torch.full(shape, 1.2, dtype=accumulation(dtype), device=device)
    results = []
    for value in (1.2, target):
        logits = leaf(randn(9, 10, dtype=dtype, device=device))
        found = bmtard.bisect_temperature(logits, value, per_sample=per_sample)
        found.temperature.sum().backward()
        results.append((*found, logits.grad))
    assert all(map(torch.equal, *results))


def test_two_classes_in_closed_form(device, path):
    # A margin m at temperature t gives the odds exp(m / t).
    margin, odds = 3.0, 4.0
    p = odds / (1 + odds)
    target = -p * math.log(p) - (1 - p) * math.log(1 - p)
    logits = torch.tensor([[margin, 0.0]], dtype=torch.float64, device=device)
    found = bmtard.bisect_temperature(logits, target, tolerance=1e-12, max_iterations=100)
    torch.testing.assert_close(found.temperature.item(), margin / math.log(odds))


@pytest.mark.parametrize("factor", [1e-3, 0.5, 40.0])
def test_scaling_logits_scales_the_temperature(device, path, factor):
    logits = randn(9, 10, device=device)
    settings_ = {"tolerance": 1e-13, "max_iterations": 100, "bounds": (1e-6, 1e6)}
    one = bmtard.bisect_temperature(logits, 1.2, **settings_)
    scaled = bmtard.bisect_temperature(factor * logits, 1.2, **settings_)
    torch.testing.assert_close(scaled.temperature, factor * one.temperature, rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 10, 16, 33, 127, 128, 129])
def test_neighbours_do_not_disturb_a_row(device, classes, dtype, method):
    # Searches of few classes run side by side; each must end as it does alone, whichever way.
    oracles.require_native()
    logits = randn(37, classes, dtype=dtype, device=device)
    logits[3] = 2.0  # equal
    logits[5, 0] = math.nan
    logits[8, -1] = math.inf
    if classes > 2:
        logits[11, 1:-1] = -math.inf
    logits[20] *= 1e-3
    logits[21] *= 30.0
    target = torch.linspace(-0.1, 1.1, 37, dtype=torch.float64, device=device) * math.log(classes)
    target[30] = math.nan
    options = {"per_sample": True, "method": method, "max_iterations": 40}
    together = bmtard.bisect_temperature(logits, target, **options)
    for n in range(37):
        alone = bmtard.bisect_temperature(logits[n : n + 1], target[n : n + 1], **options)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[n : n + 1].isnan(), b.isnan())
            assert torch.equal(a[n : n + 1].nan_to_num(), b.nan_to_num())


# --- Any logits, any target -----------------------------------------------------------------


def expected_statuses(logits, target, tolerance, low, high):
    """What the float64 entropies at the bounds allow, with room for rounding in ``logits``' dtype.

    logits [N, C] as one batch.
    """
    info = torch.finfo(accumulation(logits.dtype))
    count = (logits > -math.inf).sum(-1).double()
    tolerance = max(tolerance, 4 * info.eps * float(count.log().mean()))
    slack = 32 * info.eps * (1 + math.log(logits.shape[-1]))
    at_low, at_high = (float(oracles.entropy(logits, t).mean()) for t in (low, high))
    allowed = set()
    if target < at_low - tolerance + slack:
        allowed.add(SearchStatus.CLAMPED_LOW)
    if target > at_high + tolerance - slack:
        allowed.add(SearchStatus.CLAMPED_HIGH)
    if at_low - tolerance - slack <= target <= at_high + tolerance + slack:
        allowed.add(SearchStatus.CONVERGED)
    # All logits equal, to the rounding of the entropy: any temperature is as good.
    if at_low >= float(count.log().mean()) - tolerance - slack:
        allowed.add(SearchStatus.DEGENERATE)
    return {int(s) for s in allowed}, tolerance + slack


def finite_logits(dtype):
    width = 64 if dtype == torch.float64 else 32
    everything = st.floats(allow_nan=False, allow_infinity=False, width=width)
    usual = st.floats(-20, 20, width=width)
    ties = st.sampled_from([0.0, 1.0, -3.0])
    masked = st.one_of(usual, st.just(-math.inf))
    numbers = st.sampled_from(
        [usual, ties, masked, everything, st.floats(0, 2.0**-100, width=width)]
    )

    def array(elements):
        shape = st.tuples(st.integers(1, 4), st.integers(1, 12))
        return st_numpy.arrays(f"float{width}", shape, elements=elements)

    def keep_one_class(values):
        values[:, 0] = np.where(np.isinf(values).all(-1), 0, values[:, 0])
        return torch.from_numpy(values)

    return numbers.flatmap(array).map(keep_one_class)


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    logits = draw(finite_logits(dtype))
    target = draw(st.floats(-0.5, 1.2)) * max(math.log(logits.shape[1]), 0.1)
    low = 10 ** draw(st.floats(-4, 1))
    high = low * 10 ** draw(st.floats(0.1, 4))
    return logits, target, (low, high)


def for_any(path, check, **strategies):
    """Checks drawn problems; fewer on plain torch, where a search takes 1000 times longer."""
    examples = 200 if path == "native" else 15
    health = [HealthCheck.too_slow]
    settings(max_examples=examples, suppress_health_check=health)(given(**strategies)(check))()


@pytest.mark.parametrize("method", METHODS)
def test_any_logits_and_any_target(path, method):
    def check(problem):
        logits, target, (low, high) = problem
        found = bmtard.bisect_temperature(
            logits, target, bounds=(low, high), max_iterations=64, method=method
        )
        temperature = float(found.temperature)
        rounding = 1e-6 if logits.dtype == torch.float32 else 1e-14
        assert low * (1 - rounding) <= temperature <= high * (1 + rounding)
        assert 1 <= int(found.iterations) <= 64
        allowed, tolerance = expected_statuses(logits, target, 1e-6, low, high)
        assert int(found.status) in allowed
        if found.status == SearchStatus.CONVERGED:
            # Where the entropy is steep, two neighbouring temperatures enclose the target.
            steps = temperature * np.array([1 - rounding, 1 + rounding])
            below, above = (float(oracles.entropy(logits, t).mean()) for t in steps)
            assert below - tolerance <= target <= above + tolerance
        elif found.status == SearchStatus.CLAMPED_LOW:
            assert temperature == pytest.approx(low, rel=rounding)
        elif found.status == SearchStatus.CLAMPED_HIGH:
            assert temperature == pytest.approx(high, rel=rounding)

    for_any(path, check, problem=problems())


@pytest.mark.parametrize("method", METHODS)
def test_any_row_alone_equals_per_sample(path, method):
    def check(problem):
        logits, target, bounds = problem
        options = {"bounds": bounds, "max_iterations": 64, "method": method}
        rows = bmtard.bisect_temperature(logits, target, per_sample=True, **options)
        for n in range(len(logits)):
            alone = bmtard.bisect_temperature(logits[n : n + 1], target, **options)
            assert rows.status[n] == alone.status
            torch.testing.assert_close(rows.temperature[n], alone.temperature, rtol=1e-4, atol=0)

    for_any(path, check, problem=problems())


def test_monotone_in_the_target(path):
    def check(problem, other):
        logits, target, bounds = problem
        targets = sorted([target, other * max(math.log(logits.shape[1]), 0.1)])
        one, two = (
            bmtard.bisect_temperature(logits, h, bounds=bounds, max_iterations=64) for h in targets
        )
        if SearchStatus.DEGENERATE in (one.status, two.status):
            return
        # Two targets closer than the tolerance may share, or swap, their temperatures.
        if targets[1] - targets[0] > 1e-4:
            assert one.temperature <= two.temperature

    for_any(path, check, problem=problems(), other=st.floats(-0.5, 1.2))


def test_methods_agree_and_a_warm_start_changes_nothing(path):
    def check(problem):
        logits, target, bounds = problem
        options = {"bounds": bounds, "max_iterations": 64}
        halley, bisection = (
            bmtard.bisect_temperature(logits, target, method=m, **options) for m in METHODS
        )
        warm = bmtard.bisect_temperature(logits, target, initial=halley.temperature, **options)
        allowed, tolerance = expected_statuses(logits, target, 1e-6, *bounds)
        for found in (bisection, warm):
            if len(allowed) == 1:
                assert found.status == halley.status
            if int(halley.status) == int(found.status) == CONVERGED:
                torch.testing.assert_close(
                    found.entropy, halley.entropy, rtol=0, atol=2 * tolerance + 1e-5
                )

    for_any(path, check, problem=problems())


# --- Ends of the search ---------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("target", "status", "temperature"),
    [
        (-1.0, SearchStatus.CLAMPED_LOW, LOW),
        (1e-9, SearchStatus.CLAMPED_LOW, LOW),
        (math.log(10) - 1e-9, SearchStatus.CLAMPED_HIGH, HIGH),
        (math.log(10), SearchStatus.CLAMPED_HIGH, HIGH),
        (50.0, SearchStatus.CLAMPED_HIGH, HIGH),
    ],
)
def test_clamped_at_the_bounds(device, path, target, status, temperature, method, per_sample):
    # Near-ties keep an entropy of some 1e-2 nats at the lowest temperature.
    logits = randn(1, 10, device=device).expand(4, 10).clone()
    logits[:, :2] = torch.tensor([20.0, 19.97], dtype=torch.float64, device=device)
    found = bmtard.bisect_temperature(
        logits, target, method=method, per_sample=per_sample, tolerance=1e-12
    )
    assert (found.status == status).all()
    assert (found.temperature == temperature).all()
    torch.testing.assert_close(
        found.entropy.cpu().mean(), oracles.entropy(logits, temperature).mean()
    )


@pytest.mark.parametrize("initial", [None, 3.0, 1e6])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", [1, 10])
def test_equal_logits_keep_the_initial_temperature(device, path, classes, method, initial):
    logits = torch.full((5, classes), 2.0, device=device)
    found = bmtard.bisect_temperature(
        logits, math.log(classes) - 0.5, initial=initial, method=method
    )
    assert found.status == SearchStatus.DEGENERATE
    assert found.temperature == {None: 1.0, 3.0: 3.0, 1e6: HIGH}[initial]
    torch.testing.assert_close(found.entropy.item(), math.log(classes), rtol=0, atol=1e-6)
    converged = bmtard.bisect_temperature(logits, math.log(classes), method=method)
    assert converged.status == SearchStatus.CONVERGED


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("initial", [None, 3.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_input_ends_at_once(device, path, dtype, method, initial, bad):
    logits = randn(5, 10, dtype=dtype, device=device)
    logits[3, 7] = bad
    found = bmtard.bisect_temperature(logits, 1.0, initial=initial, method=method)
    assert found.status == SearchStatus.NON_FINITE
    assert found.temperature == (1.0 if initial is None else initial)
    assert found.iterations <= 1
    rows = bmtard.bisect_temperature(logits, 1.0, initial=initial, method=method, per_sample=True)
    assert (rows.status == SearchStatus.NON_FINITE).tolist() == [False, False, False, True, False]
    assert (rows.status[[0, 1, 2, 4]] == CONVERGED).all()

    finite = randn(5, 10, dtype=dtype, device=device)
    target = torch.tensor(bad, device=device)
    found = bmtard.bisect_temperature(finite, target, initial=initial, method=method)
    assert found.status == SearchStatus.NON_FINITE
    assert found.temperature == (1.0 if initial is None else initial)


def test_initial_that_is_not_a_number_or_out_of_bounds_is_harmless(device, path):
    logits = randn(5, 10, device=device)
    expected = bmtard.bisect_temperature(logits, 1.0, tolerance=1e-12, max_iterations=100)
    for start in (math.nan, -1.0, 0.0, math.inf, 1e-30, 1e30):
        initial = torch.tensor(start, dtype=torch.float64, device=device)
        found = bmtard.bisect_temperature(
            logits, 1.0, initial=initial, tolerance=1e-12, max_iterations=100
        )
        assert found.status == CONVERGED
        torch.testing.assert_close(found.temperature, expected.temperature, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_iterations", [1, 2, 3])
def test_stops_when_the_evaluations_run_out(device, path, max_iterations, method):
    logits = randn(5, 10, device=device)
    found = bmtard.bisect_temperature(
        logits, 0.3, tolerance=0, max_iterations=max_iterations, method=method, initial=50.0
    )
    assert found.status == SearchStatus.MAX_ITERATIONS
    assert found.iterations == max_iterations
    assert LOW <= found.temperature <= HIGH
    torch.testing.assert_close(
        found.entropy.cpu(), oracles.entropy(logits, found.temperature.cpu()).mean()
    )


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_masked_classes_equal_dropping_them(device, path, temperature):
    logits = randn(9, 6, device=device)
    masked = torch.full((9, 8), -math.inf, dtype=torch.float64, device=device)
    masked[:, 1:7] = logits
    target = float(oracles.entropy(logits, temperature).mean())
    for per_sample in (False, True):
        results = []
        for x in (leaf(masked), leaf(logits)):
            found = bmtard.bisect_temperature(
                x, target, per_sample=per_sample, tolerance=1e-12, max_iterations=100
            )
            (grad,) = torch.autograd.grad(found.temperature.sum(), x)
            results.append((found, grad))
        (wide, wide_grad), (short, short_grad) = results
        assert torch.equal(wide.status, short.status)
        torch.testing.assert_close(wide.temperature, short.temperature)
        torch.testing.assert_close(wide_grad[:, 1:7], short_grad)
        assert (wide_grad[:, [0, 7]] == 0).all()


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_logits(device, path, dtype, scale):
    logits = randn(9, 10, dtype=dtype, device=device, scale=scale)
    found = bmtard.bisect_temperature(logits, 1.0, bounds=(scale / 1e3, scale * 1e3))
    assert found.status == CONVERGED
    torch.testing.assert_close(
        oracles.entropy(logits, found.temperature.cpu()).mean().item(), 1.0, rtol=0, atol=1e-5
    )
    clamped = bmtard.bisect_temperature(logits, 1.0)
    assert clamped.status == SearchStatus.CLAMPED_HIGH


def test_no_rows(device, path):
    logits = torch.empty(0, 10, device=device)
    found = bmtard.bisect_temperature(logits, 1.0, per_sample=True)
    assert all(field.shape == (0,) for field in found)
    found = bmtard.bisect_temperature(logits, 1.0, initial=2.0)
    assert found.status == SearchStatus.NON_FINITE  # the mean of nothing
    assert found.temperature == 2.0


# --- Implicit gradients ---------------------------------------------------------------------

EXACT = {"tolerance": 1e-14, "max_iterations": 70, "bounds": (1e-3, 1e3)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(device, path, per_sample, rows, method):
    logits = randn(*rows, 5, device=device, scale=2.0).requires_grad_()
    target = torch.tensor(1.1, dtype=torch.float64, device=device, requires_grad=True)

    def op(z, h):
        return bmtard.bisect_temperature(
            z, h, per_sample=per_sample, method=method, **EXACT
        ).temperature

    assert gradcheck(op, (logits, target))
    if per_sample:
        each = (1.1 + randn(*rows, device=device, scale=0.1)).requires_grad_()
        assert gradcheck(op, (logits, each))


def test_analytic_gradient(device, path):
    logits = randn(5, 10, device=device).requires_grad_()
    target = torch.tensor(1.2, dtype=torch.float64, device=device, requires_grad=True)
    temperature = bmtard.bisect_temperature(logits, target, **EXACT).temperature
    by_logits, by_target = torch.autograd.grad(temperature, [logits, target])
    # PERFORMANCE: d temperature / d z_i = p_i (log p_i + H) / sum of the rows' variances.
    temperature = temperature.detach()
    p = oracles.probabilities(logits, temperature)
    log_p = np.log(p)
    h = -(p * log_p).sum(-1, keepdims=True)
    variance = (p * (log_p + h) ** 2).sum()
    torch.testing.assert_close(by_logits.cpu().numpy(), p * (log_p + h) / variance)
    expected = 5 * float(temperature) / variance
    torch.testing.assert_close(by_target.item(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient_in_every_dtype(device, path, per_sample, dtype):
    logits = randn(2, 9, 10, dtype=dtype, device=device).requires_grad_()
    target = torch.tensor(1.2, dtype=torch.float64, device=device, requires_grad=True)
    exact = [leaf(logits, torch.float64), leaf(target)]
    grads = []
    for x in ([logits, target], exact):
        found = bmtard.bisect_temperature(
            *x, per_sample=per_sample, tolerance=0, max_iterations=100
        )
        grads.append(torch.autograd.grad(found.temperature.mean(), x))
    for actual, expected, like in zip(*grads, (logits, target), strict=True):
        assert actual.dtype == like.dtype
        tolerance = {"rtol": 1.6e-2, "atol": 1e-4} if dtype in oracles.HALF else {}
        if dtype == torch.float32:
            tolerance = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(actual.double(), expected, **tolerance)


@pytest.mark.parametrize("target", [-1.0, 50.0, math.nan])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient_is_zero_where_the_search_did_not_converge(device, path, per_sample, target):
    logits = randn(3, 5, device=device).requires_grad_()
    target = torch.tensor(target, dtype=torch.float64, device=device, requires_grad=True)
    temperature = bmtard.bisect_temperature(logits, target, per_sample=per_sample).temperature
    for grad in torch.autograd.grad(temperature.sum(), [logits, target]):
        assert (grad == 0).all()


def test_gradients_only_to_what_requires_them(device, path):
    for wants_logits, wants_target in [(True, False), (False, True), (False, False)]:
        logits = randn(3, 5, device=device).requires_grad_(wants_logits)
        target = torch.tensor(0.9, device=device, requires_grad=wants_target)
        found = bmtard.bisect_temperature(logits, target)
        assert found.temperature.requires_grad == (wants_logits or wants_target)
        assert not any(field.requires_grad for field in found[1:])
        if found.temperature.requires_grad:
            found.temperature.backward()
        assert (logits.grad is not None) == wants_logits
        assert (target.grad is not None) == wants_target


def test_no_gradient_to_the_initial_temperature(device, path):
    logits = randn(3, 5, device=device).requires_grad_()
    initial = torch.tensor(2.0, device=device, requires_grad=True)
    bmtard.bisect_temperature(logits, 0.9, initial=initial).temperature.backward()
    assert initial.grad is None
    assert logits.grad is not None


def test_backward_scales_with_the_incoming_gradient_and_repeats(device, path):
    logits = randn(3, 5, device=device).requires_grad_()
    temperature = bmtard.bisect_temperature(logits, 0.9, per_sample=True).temperature
    incoming = torch.tensor([0.0, -2.0, 1e3], dtype=torch.float64, device=device)
    (first,) = torch.autograd.grad(temperature, logits, incoming, retain_graph=True)
    (second,) = torch.autograd.grad(temperature, logits, incoming, retain_graph=True)
    (ones,) = torch.autograd.grad(temperature, logits, torch.ones_like(incoming))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, incoming[:, None] * ones)


def test_double_backward_is_refused(device, path):
    logits = randn(3, 5, device=device).requires_grad_()
    temperature = bmtard.bisect_temperature(logits, 0.9).temperature
    (grad,) = torch.autograd.grad(temperature, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"bisect_temperature has no double backward"):
        torch.autograd.grad(grad.sum(), logits)


# --- Number of evaluations ------------------------------------------------------------------


def families(classes, rows, seed):
    """Kinds of logits, from nearly flat to one class far ahead, [rows, classes] each."""
    normal = randn(rows, classes, scale=1.0, seed=seed)
    ahead = torch.zeros(rows, classes, dtype=torch.float64)
    ahead[:, seed % classes] = 1.0
    heavy = torch.distributions.StudentT(2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tails = heavy.sample((rows, classes)).double()
    return {
        "flat": 0.05 * normal,
        "normal": normal,
        "wide": 5 * normal,
        "ahead by 6": normal + 6 * ahead,
        "ahead by 14": normal + 14 * ahead,
        "heavy tails": 2 * tails,
    }


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_halley_needs_few_evaluations(dtype, classes):
    oracles.require_native()
    counts = {}
    for name, logits in families(classes, 64, seed=3).items():
        for fraction in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
            found = bmtard.bisect_temperature(
                logits.to(dtype), fraction * math.log(classes),
                bounds=(1e-8, 1e8), per_sample=True,
            )  # fmt: skip
            assert (found.status == CONVERGED).all()
            counts[name, fraction] = found.iterations.double()
    every = torch.cat(list(counts.values()))
    assert every.mean() <= 4.25
    assert every.max() <= 12
    bisection = bmtard.bisect_temperature(
        families(classes, 64, seed=3)["normal"].to(dtype), 0.5 * math.log(classes),
        bounds=(1e-8, 1e8), per_sample=True, method="bisection",
    )  # fmt: skip
    assert bisection.iterations.double().mean() > 2 * every.mean()


def test_warm_start_needs_fewer_evaluations(device):
    oracles.require_native()
    cold, warm, initial = 0, 0, None
    for step in range(20):
        logits = randn(128, 10, dtype=torch.float32, device=device, seed=step)
        found = bmtard.bisect_temperature(logits, 1.2)
        cold += int(found.iterations)
        if initial is not None:
            again = bmtard.bisect_temperature(logits, 1.2, initial=initial)
            torch.testing.assert_close(again.temperature, found.temperature, rtol=1e-4, atol=0)
            warm += int(again.iterations)
        initial = found.temperature
    assert warm / 19 <= 3.5
    assert warm / 19 <= cold / 20


def test_exact_initial_temperature_needs_one_evaluation(device):
    oracles.require_native()
    logits = randn(33, 10, device=device)
    found = bmtard.bisect_temperature(logits, 1.2)
    again = bmtard.bisect_temperature(logits, 1.2, initial=found.temperature)
    assert again.iterations == 1
    assert torch.equal(again.temperature, found.temperature)


@pytest.mark.parametrize("method", ["halley", "bisection"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_widest_bounds_with_a_masked_class(device, path, dtype, per_sample, method):
    logits = 3 * randn(5, 10, device=device)
    logits[:, 2] = -math.inf
    logits = logits.to(dtype)
    found = bmtard.bisect_temperature(
        logits, 1.0, bounds=(1e-36, 1e36), per_sample=per_sample, max_iterations=200, method=method
    )
    assert (found.status == bmtard.SearchStatus.CONVERGED).all()
    log_p = torch.log_softmax(logits.double() / found.temperature.double().view(-1, 1), -1)
    entropy = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0).sum(-1)
    entropy = entropy if per_sample else entropy.mean()
    torch.testing.assert_close(entropy, torch.ones_like(entropy), rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["halley", "bisection"])
def test_as_many_iterations_as_there_can_be(device, path, method):
    logits = randn(3, 10, device=device)
    options = {"tolerance": 0.0, "max_iterations": 2**31 - 1, "method": method}
    found = bmtard.bisect_temperature(logits, 1.0, **options)
    assert found.status == bmtard.SearchStatus.CONVERGED
    assert 0 < found.iterations < 100
