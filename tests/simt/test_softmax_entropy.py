from __future__ import annotations

import numpy as np
import pytest

from . import harness as h


def forward(logits, temperature, dtype):
    out = h.Outputs()
    n = logits.shape[0]
    entropy = out.new((n,), h.real(dtype))
    statistics = out.new((2, n), h.real(dtype))
    h.simt().softmax_entropy(
        logits=logits, temperature=temperature, entropy=entropy, statistics=statistics
    )
    out.check()
    return entropy, statistics


def backward(logits, temperature, dtype, entropy, statistics, grad, *, shift=0, wants=(True, True)):
    out = h.Outputs()
    n, c = logits.shape
    grad_logits = out.new((n, c), dtype, shift=shift) if wants[0] else None
    grad_temperature = out.new((n,), h.real(dtype)) if wants[1] else None
    h.simt().softmax_entropy_backward(
        logits=logits,
        temperature=temperature,
        entropy=entropy,
        statistics=statistics,
        grad_entropy=grad,
        grad_logits=grad_logits,
        grad_temperature=grad_temperature,
    )
    out.check()
    return grad_logits, grad_temperature


def expected_gradients(z, temperature, grad):
    log_p = h.log_softmax(z, temperature[:, None])
    p = np.exp(log_p)
    entropy = h.entropy(z, temperature[:, None])[:, None]
    log_p = np.where(p == 0, 0, log_p)
    by_logits = -p * (log_p + entropy) / temperature[:, None] * grad[:, None]
    variance = (p * (log_p + entropy) ** 2).sum(-1)
    return by_logits, grad * variance / temperature


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", h.CLASSES)
def test_forward_and_backward(c, dtype):
    rng = np.random.default_rng(c)
    for n, extra, shift in [(0, 0, 0), (1, 0, 0), (3, 0, 0), (37, 0, 0), (3, 16, 0), (5, 3, 1)]:
        if n == 37 and c > 600:
            n = 6
        z = h.draw(c + n, n, c, dtype)
        temperature = np.asarray(rng.uniform(0.5, 5, n), h.real(dtype))
        grad = np.asarray(rng.standard_normal(n), h.real(dtype))
        logits = h.place(z, dtype, extra=extra, shift=shift)
        t = temperature.astype(np.float64)
        entropy, statistics = forward(logits, temperature, dtype)
        h.assert_close(entropy, h.entropy(z, t[:, None]), h.computed(dtype))
        if n:
            np.testing.assert_array_equal(statistics[0], z.max(-1))
            log_sum = np.log(np.exp((z - z.max(-1, keepdims=True)) / t[:, None]).sum(-1))
            h.assert_close(statistics[1], log_sum, h.computed(dtype))

        by_logits, by_temperature = backward(
            logits, temperature, dtype, entropy, statistics, grad, shift=shift
        )
        want_logits, want_temperature = expected_gradients(z, t, grad.astype(np.float64))
        h.assert_close(by_logits, want_logits, dtype)
        # p and log p carry the rounding of log p, up to |log p| ulp.
        h.assert_close(by_temperature, want_temperature, h.computed(dtype), ulp=128)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("tiles", range(1, 9))
def test_rows_of_many_tiles(tiles, dtype):
    """Long rows are read some tiles ahead, whether or not their number is a multiple of that."""
    width = 16 // h.STORAGE[dtype].itemsize * (128 if dtype == "float64" else 256)
    n, c = 2, tiles * width - 8
    z = h.draw(tiles, n, c, dtype)
    temperature, grad = np.full(n, 2.0, h.real(dtype)), np.ones(n, h.real(dtype))
    logits = h.place(z, dtype)
    entropy, statistics = forward(logits, temperature, dtype)
    h.assert_close(entropy, h.entropy(z, 2.0), h.computed(dtype))
    gradient, _ = backward(logits, temperature, dtype, entropy, statistics, grad)
    h.assert_close(gradient, expected_gradients(z, np.full(n, 2.0), np.ones(n))[0], dtype)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [10, 100, 1100])
def test_scalar_arguments_and_missing_outputs(c, dtype):
    z = h.draw(0, 5, c, dtype)
    logits = h.place(z, dtype)
    by_value, statistics = forward(logits, 2.0, dtype)
    by_array, _ = forward(logits, np.asarray(2.0, h.real(dtype)), dtype)
    np.testing.assert_array_equal(by_value, by_array)
    h.assert_close(by_value, h.entropy(z, 2.0), h.computed(dtype))
    one = np.asarray(1.0, h.real(dtype))
    both = backward(logits, 2.0, dtype, by_value, statistics, one)
    for wants in [(True, False), (False, True)]:
        some = backward(logits, 2.0, dtype, by_value, statistics, one, wants=wants)
        for got, want in zip(some, both, strict=True):
            assert got is None or np.array_equal(got, want)
    h.simt().take_counters()
    backward(logits, 2.0, dtype, by_value, statistics, one, wants=(False, False))
    assert h.simt().take_counters()["launches"] == 0


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [10, 100, 1100, 2500])
def test_masked_and_non_finite_rows(c, dtype):
    z = h.draw(1, 6, c, dtype)
    z[0, ::2] = -np.inf
    z[1, 1:] = -np.inf
    z[2] = -np.inf
    z[3, c // 2] = np.nan
    z[4, c - 1] = np.inf
    logits = h.place(z, dtype)
    entropy, statistics = forward(logits, 1.0, dtype)
    assert np.isnan(entropy[2:5]).all()
    finite = [0, 1, 5]
    h.assert_close(entropy[finite], h.entropy(z[finite]), h.computed(dtype))
    assert entropy[1] == 0
    grad = np.ones(6, h.real(dtype))
    by_logits, _ = backward(logits, 1.0, dtype, entropy, statistics, grad)
    want, _ = expected_gradients(z[finite], np.ones(3), np.ones(3))
    h.assert_close(by_logits[finite], want, dtype)
    assert np.isnan(h.decode(by_logits)[2:5]).all()


@pytest.mark.parametrize("c", [32, 1024, 3000])
def test_large_logits_keep_their_precision(c):
    """At 1e4 a float32 has 1e-3 left; the entropy still has all its digits."""
    z = h.rounded(1e4 + np.random.default_rng(2).standard_normal((3, c)), "float32")
    entropy, statistics = forward(h.place(z, "float32"), 1.0, "float32")
    h.assert_close(entropy, h.entropy(z), "float32")
    one = np.ones((), np.float32)
    by_logits, _ = backward(h.place(z, "float32"), 1.0, "float32", entropy, statistics, one)
    want, _ = expected_gradients(z, np.ones(3), np.ones(3))
    h.assert_close(by_logits, want, "float32", floor=0.01)


@pytest.mark.parametrize("c", [10, 100, 1025])
def test_every_schedule_gives_the_same_bits(c):
    logits = h.place(h.draw(3, 20, c, "float32"), "float32")
    results = []
    for seed in range(4):
        h.simt().configure(seed=seed)
        results.append(np.concatenate([x.ravel() for x in forward(logits, 1.5, "float32")]))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_temperatures_out_of_range():
    temperature = np.array([9e-37, 1e-36, 1, 1e36, 1.1e36, 0, -1, np.inf, np.nan], np.float32)
    logits = h.place(h.draw(0, len(temperature), 10, "float32"), "float32")
    out = h.Outputs()
    entropy = out.new((len(temperature),), np.float32)
    h.simt().softmax_entropy(
        logits=logits, temperature=temperature, entropy=entropy, statistics=None
    )
    out.check()
    assert np.isnan(entropy).tolist() == [True, False, False, False] + 5 * [True]
