"""softmax_entropy against SciPy and plain torch, both in float64."""

import math

import numpy as np
import oracles
import pytest
import scipy.stats
import torch
from oracles import DTYPES, LAYOUTS, accumulation, assert_matches, leaf, randn
from torch.autograd import gradcheck, gradgradcheck

import bmtard

pytest_plugins = ["paths"]

# N: nothing, one row, fewer than a SIMD vector, one more than a power of two. C: one class, two,
# the data sets' 10, 100, 1000, an odd one, and a vocabulary.
SHAPES = [
    (0, 10), (1, 1), (3, 1), (3, 2), (129, 2), (1, 10), (129, 10), (3, 100), (129, 100),
    (3, 1000), (129, 1001), (3, 32000), (10,), (2, 0, 10), (3, 2, 10), (2, 3, 2, 100),
]  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-2, 0.3, 1.0, 4.0, 1e2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_scipy(device, path, shape, dtype, temperature):
    logits = randn(*shape, dtype=dtype, device=device)
    actual = bmtard.softmax_entropy(logits, temperature)
    assert actual.shape == shape[:-1]
    assert actual.device == logits.device
    assert_matches(actual, oracles.entropy(logits, temperature), accumulation(dtype))


@pytest.mark.parametrize("kind", ["0-d", "0-d half", "per row", "per row expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(0,), (129,), (4, 3), ()], ids=str)
def test_temperature_tensors(device, path, rows, dtype, kind):
    logits = randn(*rows, 37, dtype=dtype, device=device)
    if kind == "per row":
        temperature = 10 ** randn(*rows, dtype=accumulation(dtype), device=device, scale=0.7)
        temperature = temperature.clamp(1e-2, 1e2)
    elif kind == "per row expanded":
        temperature = torch.tensor(2.5, device=device).expand(rows)
    else:
        number = torch.float16 if kind == "0-d half" else torch.float64
        temperature = torch.tensor(2.5, dtype=number, device=device)
    actual = bmtard.softmax_entropy(logits, temperature)
    assert_matches(actual, oracles.entropy(logits, temperature), accumulation(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 10), (4, 129), (2, 3, 33), (3, 1)], ids=str)
def test_layouts(device, path, shape, dtype, layout):
    logits = leaf(oracles.in_layout(randn(*shape, dtype=dtype, device=device), layout))
    temperature = torch.full(shape[:-1], 1.7, device=device, requires_grad=True)
    entropy = bmtard.softmax_entropy(logits, temperature)
    assert_matches(entropy, oracles.entropy(logits, 1.7), accumulation(dtype))

    exact, exact_temperature = leaf(logits, torch.float64), leaf(temperature, torch.float64)
    expected = oracles.gradients(
        oracles.torch_entropy(exact, exact_temperature), [exact, exact_temperature]
    )
    actual = oracles.gradients(entropy, [logits, temperature])
    assert actual[0].shape == logits.shape
    assert_matches(actual[0], expected[0], dtype)
    assert_matches(actual[1], expected[1], torch.float32)


def test_rows_expanded_from_one(device, path):
    one = randn(1, 10, dtype=torch.float32, device=device).requires_grad_()
    entropy = bmtard.softmax_entropy(one.expand(7, 10), 2.0)
    assert_matches(entropy, oracles.entropy(one.expand(7, 10), 2.0), torch.float32)
    (actual,) = torch.autograd.grad(entropy.sum(), one)
    exact = leaf(one, torch.float64)
    (expected,) = torch.autograd.grad(7 * oracles.torch_entropy(exact, 2.0).sum(), exact)
    assert_matches(actual, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction(device, path, reduction, dtype):
    logits = leaf(randn(3, 43, 10, dtype=dtype, device=device))
    exact = leaf(logits, torch.float64)
    actual = bmtard.softmax_entropy(logits, 2.0, reduction=reduction)
    expected = getattr(oracles.torch_entropy(exact, 2.0), reduction)()
    assert_matches(actual, expected, accumulation(dtype))
    (actual,) = torch.autograd.grad(actual, logits)
    (expected,) = torch.autograd.grad(expected, exact)
    assert_matches(actual, expected, dtype)


def test_reduction_of_no_rows(device, path):
    logits = torch.empty(0, 10, device=device)
    assert bmtard.softmax_entropy(logits, reduction="sum") == 0
    assert bmtard.softmax_entropy(logits, reduction="mean").isnan()


# --- Closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 10, 1001])
def test_uniform_is_log_c(device, path, classes):
    logits = torch.full((3, classes), 7.0, dtype=torch.float64, device=device)
    expected = torch.full((3,), math.log(classes))
    assert_matches(bmtard.softmax_entropy(logits, 0.3), expected, torch.float64)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_two_classes_is_bernoulli(device, path, temperature):
    margin = torch.linspace(-8, 8, 33, dtype=torch.float64, device=device)
    logits = torch.stack([margin, torch.zeros_like(margin)], -1)
    p = 1 / (1 + np.exp(-margin.cpu().numpy() / temperature))
    expected = scipy.stats.bernoulli(p).entropy()
    assert_matches(bmtard.softmax_entropy(logits, temperature), expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_limit_is_zero(device, path, dtype):
    logits = torch.zeros(3, 10, dtype=dtype, device=device)
    logits[:, 4] = 1e4
    logits.requires_grad_()
    temperature = torch.tensor(1.0, device=device, requires_grad=True)
    entropy = bmtard.softmax_entropy(logits, temperature)
    assert (entropy == 0).all()
    for grad in torch.autograd.grad(entropy.sum(), [logits, temperature]):
        assert (grad == 0).all()


@pytest.mark.parametrize("factor", [0.125, 3.0, 1e3])
def test_scaling_logits_and_temperature_together_changes_nothing(device, path, factor):
    logits = randn(17, 10, device=device)
    torch.testing.assert_close(
        bmtard.softmax_entropy(factor * logits, factor * 1.3), bmtard.softmax_entropy(logits, 1.3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.7])
def test_adding_a_constant_changes_nothing(device, path, dtype, temperature):
    # Multiples of 1/8 stay exact beside 8192, so any difference is the op's own rounding.
    logits = (randn(17, 10, device=device) * 8).round().to(dtype) / 8
    torch.testing.assert_close(
        bmtard.softmax_entropy(logits + 8192, temperature),
        bmtard.softmax_entropy(logits, temperature),
    )


def test_entropy_lies_between_zero_and_log_c_and_grows_with_temperature(device, path):
    logits = randn(64, 100, dtype=torch.float32, device=device)
    ladder = [bmtard.softmax_entropy(logits, t) for t in np.geomspace(1e-2, 1e2, 25)]
    entropies = torch.stack(ladder)
    assert (entropies >= -1e-5).all()
    assert (entropies <= math.log(100) + 1e-5).all()
    assert (entropies.diff(dim=0) > -1e-5).all()
    assert (entropies[-1] - entropies[0] > 1).all()


# --- Extreme logits -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_are_finite(device, path, dtype, temperature):
    logits = randn(9, 10, dtype=torch.float32, device=device)
    logits = (logits + 1e4 * randn(9, 10, device=device, seed=1).sign()).to(dtype).requires_grad_()
    entropy = bmtard.softmax_entropy(logits, temperature)
    assert_matches(entropy, oracles.entropy(logits, temperature), accumulation(dtype))
    (actual,) = torch.autograd.grad(entropy.sum(), logits)
    exact = leaf(logits, torch.float64)
    (expected,) = torch.autograd.grad(oracles.torch_entropy(exact, temperature).sum(), exact)
    assert_matches(actual, expected, dtype)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_classes_equal_dropping_them(device, path, dtype, temperature):
    kept = [0, 2, 3, 5, 6]
    logits = randn(33, 7, dtype=dtype, device=device)
    masked = torch.full_like(logits, -math.inf)
    masked[:, kept] = logits[:, kept]
    masked.requires_grad_()
    temperature = torch.tensor(temperature, dtype=torch.float64, device=device).requires_grad_()
    entropy = bmtard.softmax_entropy(masked, temperature)
    exact = leaf(logits[:, kept], torch.float64)
    exact_temperature = leaf(temperature)
    expected = oracles.torch_entropy(exact, exact_temperature.expand(33))
    assert_matches(entropy, expected, accumulation(dtype))

    actual = torch.autograd.grad(entropy.sum(), [masked, temperature])
    expected = torch.autograd.grad(expected.sum(), [exact, exact_temperature])
    assert_matches(actual[0][:, kept], expected[0], dtype)
    assert (actual[0][:, [1, 4]] == 0).all()
    torch.testing.assert_close(actual[1].cpu(), expected[1].cpu(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_give_nan_in_their_row_only(device, path, dtype, bad):
    logits = randn(9, 33, dtype=dtype, device=device)
    clean = bmtard.softmax_entropy(logits)
    logits[4, 20] = bad
    entropy = bmtard.softmax_entropy(logits)
    assert entropy[4].isnan()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(entropy[others], clean[others])


def test_row_of_masked_classes_only_is_nan(device, path):
    logits = randn(3, 5, dtype=torch.float32, device=device)
    logits[1] = -math.inf
    assert bmtard.softmax_entropy(logits).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_temperature_tensor_that_is_not_positive_gives_nan(device, path, bad):
    logits = randn(3, 5, dtype=torch.float32, device=device)
    temperature = torch.tensor([1.0, bad, 2.0], device=device)
    assert bmtard.softmax_entropy(logits, temperature).isnan().tolist() == [False, True, False]


# --- Gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["float", "0-d", "per row"])
def test_gradcheck(device, path, kind, rows, reduction):
    logits = randn(*rows, 6, device=device).requires_grad_()
    if kind == "float":
        inputs = (logits,)
        assert gradcheck(lambda z: bmtard.softmax_entropy(z, 0.7, reduction=reduction), inputs)
        return
    shape = () if kind == "0-d" else rows
    temperature = (1 + randn(*shape, scale=1.0, device=device).abs()).requires_grad_()
    assert gradcheck(
        lambda z, t: bmtard.softmax_entropy(z, t, reduction=reduction), (logits, temperature)
    )


def test_analytic_gradient(device, path):
    logits = randn(5, 10, device=device).requires_grad_()
    temperature = torch.tensor(1.4, dtype=torch.float64, device=device, requires_grad=True)
    entropy = bmtard.softmax_entropy(logits, temperature)
    by_logits, by_temperature = torch.autograd.grad(entropy.sum(), [logits, temperature])
    p, z = oracles.probabilities(logits, 1.4), oracles.numpy(logits)
    h = scipy.stats.entropy(p, axis=-1)[:, None]
    assert_matches(by_logits, -p * (np.log(p) + h) / 1.4, torch.float64)
    variance = (p * z**2).sum(-1) - (p * z).sum(-1) ** 2
    assert_matches(by_temperature, variance.sum() / 1.4**3, torch.float64)


def test_gradients_only_to_what_requires_them_and_in_its_dtype(device, path):
    logits = randn(5, 10, dtype=torch.bfloat16, device=device)
    temperature = torch.full((5,), 2.0, dtype=torch.float64, device=device)
    assert not bmtard.softmax_entropy(logits, temperature).requires_grad
    for wants_logits, wants_temperature in [(True, False), (False, True), (True, True)]:
        z = leaf(logits) if wants_logits else logits
        t = leaf(temperature) if wants_temperature else temperature
        bmtard.softmax_entropy(z, t).sum().backward()
        for tensor, wanted in [(z, wants_logits), (t, wants_temperature)]:
            assert (tensor.grad is not None) == wanted
            if wanted:
                assert tensor.grad.dtype == tensor.dtype
                assert tensor.grad.abs().sum() > 0


def test_backward_scales_with_the_incoming_gradient_and_repeats(device, path):
    logits = randn(5, 10, device=device, dtype=torch.float32).requires_grad_()
    entropy = bmtard.softmax_entropy(logits, 1.5)
    incoming = torch.tensor([0.0, 1.0, -2.0, 1e3, 0.5], device=device)
    (first,) = torch.autograd.grad(entropy, logits, incoming, retain_graph=True)
    (second,) = torch.autograd.grad(entropy, logits, incoming, retain_graph=True)
    (ones,) = torch.autograd.grad(entropy, logits, torch.ones_like(entropy))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, incoming[:, None] * ones)


def test_double_backward_is_right_or_refused(device, path):
    logits = randn(3, 4, device=device).requires_grad_()
    if path == "reference":
        assert gradgradcheck(lambda z: bmtard.softmax_entropy(z, 1.5), (logits,))
        return
    (grad,) = torch.autograd.grad(bmtard.softmax_entropy(logits).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"softmax_entropy has no double backward"):
        grad.sum().backward()


def test_inference_mode_and_no_grad(device, path):
    logits = randn(5, 10, dtype=torch.float32, device=device).requires_grad_()
    expected = bmtard.softmax_entropy(logits, 2.0).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            entropy = bmtard.softmax_entropy(logits, 2.0)
        assert not entropy.requires_grad
        torch.testing.assert_close(entropy, expected)
