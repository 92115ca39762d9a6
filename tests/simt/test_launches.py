"""What a launch asks of the device, and what it does when the device refuses it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from . import harness as h
from . import test_bisect_temperature as bisect
from . import test_bmtard_loss as loss
from . import test_multi_teacher_kl as kl
from . import test_pgd_step as pgd
from . import test_softmax_entropy as entropy

DTYPE = "float32"
NUMBERS = itertools.count(1)  # of devices that no kernel has seen


def entropy_of(z):
    logits = h.place(z, DTYPE)
    found = entropy.forward(logits, 2.0, DTYPE)
    ones = np.ones(len(z), np.float32)
    return [*found, *entropy.backward(logits, 2.0, DTYPE, *found, ones)]


def kl_of(z):
    student, teacher = [h.place(z, DTYPE)], [h.place(z[:, ::-1].copy(), DTYPE)]
    found = kl.forward(student, teacher, 2.0, DTYPE, 0.1)
    ones = np.ones((1, len(z)), np.float32)
    by_student, by_teacher, by_temperature = kl.backward(
        student, teacher, 2.0, DTYPE, 0.1, found[1], ones
    )
    return [*found, *by_student, *by_teacher, *by_temperature]


def rows_of(z):
    return bisect.search(h.place(z, DTYPE), np.full(len(z), 1.5), DTYPE, per_sample=True)


def batch_of(z):
    return bisect.search(h.place(z, DTYPE), 1.5, DTYPE, per_sample=False)


def loss_of(z):
    state = loss.new_state(1)
    student, teacher = [h.place(z, DTYPE)], [h.place(z[:, ::-1].copy(), DTYPE)]
    value, gradients = loss.call(student, teacher, state, DTYPE, sign=False, scale=1.0)
    return [np.array(value), *gradients, *state.values()]


def step_of(z):
    settings = {"step_size": 0.5, "epsilon": 0.4, "low": -9.0, "high": 9.0, "l2": True}
    return [pgd.step(z, z[::-1].copy(), z, DTYPE, **settings)]


OPS = [entropy_of, kl_of, rows_of, batch_of, loss_of, step_of]
ROW_OPS = [entropy_of, kl_of, rows_of, step_of]
BATCH_OPS = [batch_of, loss_of]
LARGE, LONG, SMALL = (1300, 30), (2, 9001), (128, 200)  # grid, split rows, cluster


def run(op, shape, **device):
    """The results, and the counters."""
    z = h.draw(shape[1], *shape, DTYPE)
    h.simt().configure(seed=1, **device)
    h.simt().take_counters()
    return op(z), h.simt().take_counters()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [LARGE, LONG], ids=str)
def test_a_device_is_asked_once(op, shape):
    number = next(NUMBERS)
    device = {"multiprocessors": 4, "max_cluster": 8, "max_shared_bytes": 1 << 15, "device": number}
    first = run(op, shape, **device)[1]
    assert first["device_questions"] == 1
    # Each kernel is loaded by a question, so that no launch loads it within a capture.
    assert first["kernel_questions"] == first["launches"]
    again = run(op, shape, **device)[1]
    assert again["launches"] == first["launches"]
    assert again["device_questions"] == again["kernel_questions"] == 0


def test_each_device_has_its_own_answers():
    numbers = [next(NUMBERS) for _ in range(2)]
    devices = [
        {"device": number, "multiprocessors": count, "max_shared_bytes": 1 << 14}
        for number, count in zip(numbers, [2, 7], strict=True)
    ]
    blocks = [run(batch_of, (1300, 60), **device)[1]["blocks"] for device in devices * 2]
    assert blocks == [4, 14, 4, 14]


@pytest.mark.parametrize("op", [batch_of, loss_of])
def test_shared_memory_is_allowed_on_every_device(op):
    """A block may have more than 48 KiB only if its kernel was allowed it, on that device."""
    numbers = [next(NUMBERS) for _ in range(2)]
    for number in numbers * 2:
        device = {"device": number, "multiprocessors": 2, "max_shared_bytes": 1 << 20}
        assert run(op, (100, 1100), **device)[1]["blocks"] == 2  # and not one, as if refused


@pytest.mark.parametrize("op", BATCH_OPS)
@pytest.mark.parametrize(
    ("shape", "refused", "fitting"),
    [
        (LARGE, {"refuses_cooperative": True}, {"cooperative": False}),
        (SMALL, {"refuses_clusters": True, "max_cluster": 8}, {"max_cluster": 1}),
    ],
    ids=["grid", "cluster"],
)
def test_one_block_takes_what_is_refused(op, shape, refused, fitting):
    """The bits are those of a device that never offered more, and the grid's to rounding."""
    got, counters = run(op, shape, max_shared_bytes=1 << 16, **refused)
    assert counters["launches"] == counters["blocks"] == 1
    want, counters = run(op, shape, max_shared_bytes=1 << 16, **fitting)
    assert counters["blocks"] == 1
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    whole, counters = run(op, shape, max_shared_bytes=1 << 16, max_cluster=8)
    assert counters["blocks"] > 1
    for a, b in zip(got, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ROW_OPS)
def test_a_block_takes_the_row_of_a_refused_cluster(op):
    device = {"multiprocessors": 64, "max_shared_bytes": 1 << 17}
    got, counters = run(op, LONG, max_cluster=8, refuses_clusters=True, **device)
    assert counters["blocks"] == LONG[0] * counters["launches"]
    want, _ = run(op, LONG, max_cluster=1, **device)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    _, split = run(op, LONG, max_cluster=8, **device)
    assert split["blocks"] > counters["blocks"]


def test_threads_that_ask_at_once():
    """Each of 8 threads asks for each of 5 answers 1000 times."""
    assert h.simt().run_probe("kept_answers")[:5] == [1] * 5


def test_what_failed_is_asked_again():
    assert h.simt().run_probe("kept_answers")[5:7] == [3, 1]
