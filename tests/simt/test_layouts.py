"""Where the rows of each matrix begin: every mixture of aligned and not, and far apart."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from . import harness as h
from . import test_bisect_temperature as bisect
from . import test_bmtard_loss as loss
from . import test_multi_teacher_kl as kl
from . import test_softmax_entropy as entropy

N = 3
# Rows of which no two neighbours begin at a multiple of 16 bytes, in each kind of kernel.
CLASSES = [10, 110, 1102]


def aligned(z, dtype):
    """All rows at multiples of 16 bytes."""
    return h.place(z, dtype, extra=-z.shape[1] % (16 // h.STORAGE[dtype].itemsize))


def shifted(z, dtype):
    """Strides that are multiples of 16 bytes, but not the first row."""
    width = 16 // h.STORAGE[dtype].itemsize
    return h.place(z, dtype, extra=-z.shape[1] % width, shift=width // 2)


def strided(z, dtype):
    """The first row at a multiple of 16 bytes, but not the second. 8 bytes are not enough."""
    width = 16 // h.STORAGE[dtype].itemsize
    return h.place(z, dtype, extra=(width // 2 - z.shape[1]) % width)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [*CLASSES, 1104])
@pytest.mark.parametrize("layout", [aligned, shifted, strided])
@pytest.mark.parametrize("shift", [0, 1])
def test_softmax_entropy(layout, shift, c, dtype):
    z = h.draw(c, N, c, dtype)
    logits, grad = layout(z, dtype), np.ones(N, h.real(dtype))
    got, statistics = entropy.forward(logits, 2.0, dtype)
    h.assert_close(got, h.entropy(z, 2.0), h.computed(dtype))
    by_logits, _ = entropy.backward(logits, 2.0, dtype, got, statistics, grad, shift=shift)
    want, _ = entropy.expected_gradients(z, np.full(N, 2.0), np.ones(N))
    h.assert_close(by_logits, want, dtype)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [*CLASSES, 1104])
@pytest.mark.parametrize("odd", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("layout", [shifted, strided])
@pytest.mark.parametrize("shared", [False, True])
def test_multi_teacher_kl(shared, layout, odd, c, dtype):
    """At most one of the four matrices is not aligned."""
    z = [h.draw(c + i, N, c, dtype) for i in range(4)]
    placed = [layout(x, dtype) if i == odd else aligned(x, dtype) for i, x in enumerate(z)]
    students, teachers = placed[:2], placed[2:]
    if shared:
        students, z[1] = [students[0]] * 2, z[0]
    temperature, ones = np.array([1.0, 2.0]), np.ones((2, N), h.real(dtype))
    got, statistics = kl.forward(students, teachers, temperature, dtype, 0.0)
    arguments = students, teachers, temperature, dtype, 0.0, statistics, ones
    by_student, by_teacher, _ = kl.backward(*arguments, student_shared=shared)
    want = [kl.expected(z[i], z[2 + i], temperature[i], 0.0) for i in range(2)]
    for i in range(2):
        h.assert_close(got[i], want[i][0], h.computed(dtype), floor=4)
        h.assert_close(by_teacher[i], want[i][2], dtype, floor=4)
    if shared:
        h.assert_close(by_student[0], want[0][1] + want[1][1], dtype, floor=4)
    else:
        h.assert_close(by_student[1], want[1][1], dtype)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("layout", [shifted, strided])
@pytest.mark.parametrize("per_sample", [False, True])
def test_bisect_temperature(per_sample, layout, c, dtype):
    z = h.draw(c, N, c, dtype)
    targets = np.full(N, 1.5) if per_sample else 1.5
    want = bisect.search(aligned(z, dtype), targets, dtype, per_sample=per_sample)
    got = bisect.search(layout(z, dtype), targets, dtype, per_sample=per_sample)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert (got[3] == bisect.CONVERGED).all()


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("odd", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", [shifted, strided])
def test_bmtard_loss(layout, odd, c, dtype):
    students, teachers = loss.batch(0, 2, N, c, dtype)
    results = []
    for which in (None, odd):
        both = [
            layout(x, dtype) if i == which else aligned(x, dtype)
            for i, x in enumerate([*students, *teachers])
        ]
        state = loss.new_state(2)
        value, gradients = loss.call(both[:2], both[2:], state, dtype, sign=False, scale=1.0)
        results.append([np.array(value), *map(h.decode, gradients)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=2e-5)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("odd", ["x_adv", "grad", "x"])
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("d", [40, 44])
def test_pgd_step(d, l2, odd, dtype):
    rng = np.random.default_rng(0)
    values = {k: h.rounded(rng.uniform(0, 1, (N, d)), dtype) for k in ("x_adv", "grad", "x")}
    settings = {"step_size": 0.1, "epsilon": 0.2, "low": 0.0, "high": 1.0, "l2": l2}
    results = []
    for name in ("", odd):
        arrays = {k: h.place(v, dtype, shift=int(k == name)) for k, v in values.items()}
        h.simt().pgd_step(**arrays, **settings)
        results.append(h.decode(arrays["x_adv"]))
    h.assert_close(results[1], results[0], dtype)


# Rows so far apart that their distance, or that of the last one, has more than 32 bits. The
# memory between them is never touched, so nothing lies behind it.
STRIDES = [2**30, 2**32]


@pytest.fixture(params=STRIDES)
def far(request) -> Iterator[NDArray]:
    """A bfloat16 matrix [4 or 2, 1100] in a file with holes."""
    n = 4 if request.param < 2**32 else 2
    c = 1100
    size = 2 * ((n - 1) * request.param + c)
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
        flat = np.frombuffer(memory, np.uint16)
        yield np.lib.stride_tricks.as_strided(flat, (n, c), (2 * request.param, 2))


def test_rows_longer_than_an_int_can_count_are_refused():
    c = 2**32 + 10  # an int takes it for 10
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * c)
        row = np.frombuffer(mmap.mmap(file.fileno(), 2 * c), np.uint16).reshape(1, c)
        one = np.ones((), np.float32)
        state = loss.new_state(1)
        for refused in (
            lambda: entropy.forward(row, 2.0, "bfloat16"),
            lambda: kl.forward([row], [row], 2.0, "bfloat16", 0.0),
            lambda: bisect.search(row, one, "bfloat16", per_sample=False),
            lambda: loss.call(
                [row], [row], state, "bfloat16", sign=False, scale=1.0, wants=[False]
            ),
            lambda: h.simt().pgd_step(
                x_adv=row, grad=row, x=row, step_size=1.0, epsilon=1.0, low=0.0, high=1.0, l2=True
            ),
        ):
            with pytest.raises(RuntimeError, match="invalid value"):
                refused()


@pytest.mark.parametrize("c", [10, 100, 1100])
def test_rows_far_apart(far, c):
    dtype = "bfloat16"
    n = far.shape[0]
    z = h.draw(c, n, c, dtype)
    near, logits = h.place(z, dtype), far[:, :c]
    logits[...] = near
    ones = np.ones((1, n), np.float32)
    teacher = h.place(h.draw(1, n, c, dtype), dtype)
    results = []
    for rows in (near, logits):
        got, statistics = entropy.forward(rows, 2.0, dtype)
        by_logits, _ = entropy.backward(rows, 2.0, dtype, got, statistics, ones[0])
        results.append([got, by_logits])
        for pair in (rows, teacher), (teacher, rows):
            value, statistics = kl.forward([pair[0]], [pair[1]], 2.0, dtype, 0.0)
            arguments = [pair[0]], [pair[1]], 2.0, dtype, 0.0, statistics, ones
            by_student, by_teacher, _ = kl.backward(*arguments)
            results[-1] += [value, by_student[0], by_teacher[0]]
        results[-1] += bisect.search(rows, np.full(n, 1.0), dtype, per_sample=True)[:3]
        results[-1] += bisect.search(rows, 1.0, dtype, per_sample=False)[:3]
        value, gradients = loss.call(
            [rows], [teacher], loss.new_state(1), dtype, sign=False, scale=1.0
        )
        results[-1] += [np.array(value), gradients[0]]
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(h.decode(got), h.decode(want), rtol=2e-2, atol=1e-4)
