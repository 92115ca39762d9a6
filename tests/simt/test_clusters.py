"""Rows that the blocks of a cluster share: few and long, or too long for one shared memory."""

from __future__ import annotations

import numpy as np
import pytest

from . import harness as h
from . import test_bisect_temperature as bisect
from . import test_multi_teacher_kl as kl
from . import test_pgd_step as pgd
from . import test_softmax_entropy as entropy

SHAPES = [(1, 9001), (3, 8192)]


def configure(seed, cluster, **settings):
    h.simt().configure(seed=seed, max_cluster=cluster, multiprocessors=64, **settings)
    h.simt().take_counters()


def assert_split(n, launches=1):
    """The launches since configure() had clusters."""
    counters = h.simt().take_counters()
    assert counters["launches"] == launches
    assert counters["blocks"] > n * launches
    return counters


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cluster", [2, 8])
@pytest.mark.parametrize("layout", [{}, {"extra": 3, "shift": 1}], ids=["packed", "loose"])
def test_softmax_entropy(shape, dtype, cluster, layout):
    n, c = shape
    z = h.draw(c, n, c, dtype)
    logits = h.place(z, dtype, **layout)
    temperature = np.linspace(0.7, 3, n).astype(h.real(dtype))
    t = temperature.astype(np.float64)
    grad = np.linspace(-1, 2, n).astype(h.real(dtype))
    configure(1, cluster)
    found, statistics = entropy.forward(logits, temperature, dtype)
    assert assert_split(n)["remote_accesses"] > 0
    h.assert_close(found, h.entropy(z, t[:, None]), h.computed(dtype))
    np.testing.assert_array_equal(statistics[0], z.max(-1))
    shift = layout.get("shift", 0)
    arguments = logits, temperature, dtype, found, statistics, grad
    got = entropy.backward(*arguments, shift=shift)
    assert assert_split(n)["remote_accesses"] > 0
    want = entropy.expected_gradients(z, t, grad.astype(np.float64))
    h.assert_close(got[0], want[0], dtype)
    h.assert_close(got[1], want[1], h.computed(dtype), ulp=128)
    # Without a sum over the row no block waits for another.
    only, _ = entropy.backward(*arguments, shift=shift, wants=(True, False))
    assert assert_split(n)["remote_accesses"] == 0
    np.testing.assert_array_equal(only, got[0])
    configure(9, cluster)
    again, _ = entropy.forward(logits, temperature, dtype)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("cached", [False, True])
def test_multi_teacher_kl(shape, dtype, eps, cached):
    n, c = shape
    s = [h.draw(i, n, c, dtype, scale=2) for i in range(2)]
    t = [h.draw(10 + i, n, c, dtype, scale=4) for i in range(2)]
    students, teachers = ([h.place(z, dtype) for z in side] for side in (s, t))
    temperature = np.array([1.5, 3.0])
    coefficient = np.linspace(-1, 2, 2 * n).reshape(2, n).astype(h.real(dtype))
    configure(1, 8, max_shared_bytes=1 << 17 if cached else 1 << 12)
    found, statistics = kl.forward(students, teachers, temperature, dtype, eps)
    assert assert_split(2 * n)["remote_accesses"] > 0
    got = kl.backward(students, teachers, temperature, dtype, eps, statistics, coefficient)
    assert assert_split(2 * n)["remote_accesses"] > 0
    for i in range(2):
        want = kl.expected(s[i], t[i], temperature[i], eps)
        factor = coefficient[i].astype(np.float64)
        h.assert_close(found[i], want[0], h.computed(dtype), floor=4)
        h.assert_close(got[0][i], want[1] * factor[:, None], dtype)
        h.assert_close(got[1][i], want[2] * factor[:, None], dtype, floor=4)
        h.assert_close(got[2][i], want[3] * factor, h.computed(dtype), ulp=256, floor=4)


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_shared_student(dtype):
    n, c, k = 2, 6145, 3
    s, t = h.draw(0, n, c, dtype), [h.draw(1 + i, n, c, dtype) for i in range(k)]
    students, teachers = [h.place(s, dtype)] * k, [h.place(z, dtype) for z in t]
    configure(1, 4)
    _, statistics = kl.forward(students, teachers, 2.0, dtype, 0.0)
    assert_split(k * n)
    coefficient = np.ones((k, n), h.real(dtype))
    got = kl.backward(
        students, teachers, 2.0, dtype, 0.0, statistics, coefficient, student_shared=True
    )
    assert_split(n)
    want = [kl.expected(s, z, 2.0, 0.0) for z in t]
    h.assert_close(got[0][0], sum(w[1] for w in want), dtype, floor=8)
    for i in range(k):
        h.assert_close(got[2][i], want[i][3], h.computed(dtype), ulp=256, floor=4)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("method", [bisect.HALLEY, bisect.BISECTION])
def test_bisect_by_sample(dtype, method):
    """Many rows, of which none fits into the shared memory of one block."""
    n, c = 5, 8200
    z = h.draw(0, n, c, dtype, scale=4)
    target = (np.linspace(0.1, 0.9, n) * np.log(c)).astype(h.real(dtype))
    moved = []
    for limit in (1 << 12, 1 << 17):
        configure(1, 8, max_shared_bytes=limit)
        found = bisect.search(h.place(z, dtype), target, dtype, per_sample=True, method=method)
        moved.append(assert_split(n)["shared_bytes"])
        assert (found[3] == bisect.CONVERGED).all()
        for i in range(n):
            bisect.assert_solved(
                z[i : i + 1], float(target[i]), *(float(x[i]) for x in found[:3]), dtype
            )
    assert moved[1] - moved[0] > c * h.STORAGE[dtype].itemsize * int((2 + found[4]).sum())


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_pgd_step_l2(dtype):
    n, d = 2, 20000
    x_adv, grad, x = pgd.draw(2, n, d, dtype)
    settings = {"step_size": 0.5, "epsilon": 0.4, "low": 0.0, "high": 1.0, "l2": True}
    norm = np.linalg.norm(grad, axis=-1, keepdims=True)
    delta = x_adv + 0.5 * grad / norm - x
    length = np.linalg.norm(delta, axis=-1, keepdims=True)
    want = np.clip(x + delta * np.minimum(1, 0.4 / length), 0, 1)
    moved = []
    for limit in (1 << 12, 1 << 18):
        configure(1, 8, max_shared_bytes=limit)
        h.assert_close(pgd.step(x_adv, grad, x, dtype, **settings), want, dtype)
        moved.append(assert_split(n)["shared_bytes"])
    assert moved[1] - moved[0] >= 3 * 3 * n * d * h.STORAGE[dtype].itemsize  # one write, two reads
