"""How much of rows that begin anywhere moves in packs: accesses of several values at once."""

from __future__ import annotations

import numpy as np
import pytest

from . import harness as h
from . import test_bisect_temperature as bisect
from . import test_bmtard_loss as loss
from . import test_multi_teacher_kl as kl
from . import test_pgd_step as pgd
from . import test_softmax_entropy as entropy

CLASSES = [10, 100, 1000, 21841, 50257]
N = 3
# The smallest part of contiguous rows that moves in packs. The rest are the ends of rows.
LEAST = {10: 1.0, 100: 0.96, 1000: 1.0, 21841: 0.9995, 50257: 0.9995}


def width(c, dtype):
    """Values of a pack."""
    return 2 if c <= 32 else 16 // h.STORAGE[dtype].itemsize


def packed(n, c, dtype, shift=0, values=None):
    """Bytes of packs that lie wholly in one of n rows of c values each, the first of which begins
    `shift` values behind a multiple of 16 bytes."""
    values = width(c, dtype) if values is None else values
    heads = (-(shift + c * np.arange(n))) % values
    return int((np.maximum(c - heads, 0) // values).sum()) * values * h.STORAGE[dtype].itemsize


def moved():
    return h.simt().take_counters()["packed_bytes"]


def one_matrix(z, dtype):
    return len(z) * z.shape[1] * h.STORAGE[dtype].itemsize


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("shift", [0, 1])
def test_softmax_entropy(shift, c, dtype):
    z = h.draw(c, N, c, dtype)
    logits, temperature = h.place(z, dtype, shift=shift), np.full(N, 2.0, h.real(dtype))
    want = packed(N, c, dtype, shift)
    if shift == 0:
        assert want >= LEAST[c] * one_matrix(z, dtype)
    h.simt().take_counters()
    found = entropy.forward(logits, 2.0, dtype)
    counters = h.simt().take_counters()
    assert counters["packed_bytes"] == want
    results = 3 * N * h.real(dtype).itemsize
    assert counters["single_bytes"] == one_matrix(z, dtype) - want + results
    h.assert_close(found[0], h.entropy(z, 2.0), h.computed(dtype))
    ones = np.ones(N, h.real(dtype))
    gradient, _ = entropy.backward(logits, temperature, dtype, *found, ones, shift=shift)
    assert moved() == 2 * want
    h.assert_close(gradient, entropy.expected_gradients(z, np.full(N, 2.0), np.ones(N))[0], dtype)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [31, 511, 1017, 1018, 1021, 1022, 1023])
def test_rows_that_just_fit_into_registers(c, dtype):
    """Or do not, together with the values before them; then they move value by value."""
    z, slack = h.draw(c, N, c, dtype), width(c, dtype) - 1
    longest = 512 if dtype == "float64" else 1024
    fits = c > longest or c + slack <= longest
    h.simt().take_counters()
    found = entropy.forward(h.place(z, dtype), 2.0, dtype)
    assert moved() == (packed(N, c, dtype) if fits else 0)
    h.assert_close(found[0], h.entropy(z, 2.0), h.computed(dtype))


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_rows_that_end_with_a_tile(dtype):
    """Aligned, no row has values before it; shifted, the last value of each is in one tile more."""
    c = 4096
    z = h.draw(c, N, c, dtype)
    for shift in (0, 1):
        h.simt().take_counters()
        found = entropy.forward(h.place(z, dtype, shift=shift), 2.0, dtype)
        assert moved() == packed(N, c, dtype, shift)
        h.assert_close(found[0], h.entropy(z, 2.0), h.computed(dtype))


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", CLASSES)
def test_multi_teacher_kl(c, dtype):
    s, t = h.draw(c, N, c, dtype), h.draw(c + 1, N, c, dtype)
    arguments = [h.place(s, dtype)], [h.place(t, dtype)], 2.0, dtype, 0.0
    want = packed(N, c, dtype)
    h.simt().take_counters()
    found, statistics = kl.forward(*arguments)
    assert moved() == 2 * want
    expected = kl.expected(s, t, 2.0, 0.0)
    h.assert_close(found[0], expected[0], h.computed(dtype), floor=4)
    h.simt().take_counters()
    got = kl.backward(*arguments, statistics, np.ones((1, N), h.real(dtype)))
    assert moved() == 4 * want
    h.assert_close(got[0][0], expected[1], dtype)
    h.assert_close(got[1][0], expected[2], dtype, floor=4)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_bisect_temperature(per_sample, c, dtype):
    z = h.draw(c, N, c, dtype, scale=4)
    target = h.rounded(np.full(N, 0.6 * np.log(c)), h.computed(dtype))
    target = target if per_sample else float(target[0])
    h.simt().configure(seed=1, max_shared_bytes=1 << 15)
    h.simt().take_counters()
    found = bisect.search(h.place(z, dtype), target, dtype, per_sample=per_sample)
    assert (found[3] == bisect.CONVERGED).all()
    passes, rest = divmod(moved(), packed(N, c, dtype))
    # A row of another number of evaluations makes another number of passes.
    assert passes >= 1
    assert rest == 0 or (per_sample and c > 1024)
    rows = range(N) if per_sample else [slice(None)]
    for i, row in enumerate(rows):
        part = z[i : i + 1] if per_sample else z[row]
        bisect.assert_solved(
            part, float(np.ravel(target)[i]), *(float(np.ravel(x)[i]) for x in found[:3]), dtype
        )


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("sign", [True, False])
def test_bmtard_loss(sign, c, dtype):
    students, teachers = loss.batch(0, 2, N, c, dtype)
    scale = 1.0 / N
    oracle = loss.Oracle(2, sign=sign, scale=scale)
    h.simt().configure(seed=1, max_shared_bytes=1 << 15)
    h.simt().take_counters()
    state = loss.new_state(2)
    arguments = loss.put(students, dtype), loss.put(teachers, dtype), state, dtype
    value, gradients = loss.call(*arguments, sign=sign, scale=scale)
    passes, rest = divmod(moved(), packed(N, c, dtype))
    assert passes >= 2 * (2 + 1)  # each matrix is read once at least, and two are written
    assert rest == 0
    want, expected = oracle.step(students, teachers)
    np.testing.assert_allclose(value, want, rtol=2e-5)
    loss.assert_gradients(gradients, expected, scale, dtype)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("d", CLASSES)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_pgd_step(shift, d, dtype):
    x_adv, grad, x = pgd.draw(2, N, d, dtype)
    values = 16 // h.STORAGE[dtype].itemsize
    settings = {"step_size": 0.5, "low": 0.0, "high": 1.0, "shift": shift}
    h.simt().configure(seed=1, max_shared_bytes=1 << 12)
    h.simt().take_counters()
    got = pgd.step(x_adv, grad, x, dtype, epsilon=0.4, l2=True, **settings)
    # One read, or two where the rows do not stay in shared memory, and a write.
    assert moved() in [times * packed(N, d, dtype, shift, values) for times in (4, 7)]
    norm = np.linalg.norm(grad, axis=-1, keepdims=True)
    delta = x_adv + 0.5 * grad / norm - x
    length = np.linalg.norm(delta, axis=-1, keepdims=True)
    h.assert_close(got, np.clip(x + delta * np.minimum(1, 0.4 / length), 0, 1), dtype)
    # linf takes the batch as one row.
    pgd.step(x_adv, grad, x, dtype, epsilon=0.4, l2=False, **settings)
    assert moved() == 4 * packed(1, N * d, dtype, shift, values)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("size", CLASSES)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_scale(shift, size, dtype):
    out = h.Outputs()
    buffers = [out.new((size,), dtype, shift=shift) for _ in range(2)]
    for buffer in buffers:
        buffer[...] = h.encode(np.ones(1), dtype)
    h.simt().take_counters()
    h.simt().scale(buffers=buffers, factor=np.array(2, h.real(dtype)))
    out.check()
    values = 16 // h.STORAGE[dtype].itemsize
    assert moved() == 4 * packed(1, size, dtype, shift, values)
    for buffer in buffers:
        np.testing.assert_array_equal(h.decode(buffer), 2)
