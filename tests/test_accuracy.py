"""How exact the compiled kernels are in float32 and the half types: errors in ulp, against float64.

Sizes stand on both sides of every change of path: whole vectors or not, columns or rows (128
classes), one or several blocks (2048), float or recomputed gradients of half types (2**18 values).
"""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from oracles import HALF, randn

import bmtard

ULP = torch.finfo(torch.float32).eps
SHAPES = [(1, 3), (37, 10), (33, 16), (16, 31), (17, 33), (5, 128), (5, 129), (4, 1000), (3, 4099)]


@pytest.fixture(autouse=True)
def _native() -> None:
    oracles.require_native()


def spread(rows: int, classes: int, depth: float, dtype: torch.dtype = torch.float32):
    """Logits whose probabilities reach down to exp(-depth)."""
    logits = torch.linspace(-depth, 0, rows * classes, dtype=torch.float64)
    order = torch.randperm(rows * classes, generator=torch.Generator().manual_seed(0))
    return logits[order].view(rows, classes).to(dtype)


def one_hot(logits):
    """Teacher logits of probability 1 for the first class."""
    teacher = torch.full_like(logits, -math.inf)
    teacher[:, 0] = 0
    return teacher


def gradient(kind: str, student, teacher):
    student = student.clone().requires_grad_()
    if kind == "multi_teacher_kl":
        loss = bmtard.multi_teacher_kl(student, teacher, reduction="sum").sum()
    else:
        loss = bmtard.BMTARDLoss(1, balance="sign", reduction="sum")([student], [teacher])
    loss.backward()
    return student.grad.double()


@pytest.mark.parametrize("kind", ["multi_teacher_kl", "BMTARDLoss"])
@pytest.mark.parametrize("depth", [1.0, 20.0, 85.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_probabilities(shape, depth, kind):
    # With a teacher that is certain, the gradient is q itself for the classes but the first.
    logits = spread(*shape, depth)
    q = gradient(kind, logits, one_hot(logits))[:, 1:]
    expected = torch.log_softmax(logits.double(), 1)[:, 1:]
    usual = expected > -87  # below, float has no normal numbers, and the kernels 0
    # exp() adds 1 ulp, each sum, product and division half of one; an exponent rounded at
    # magnitude m adds m / 2 of them.
    slack = (6 + expected.abs()) * ULP
    error = (q / expected.exp() - 1).abs()
    assert (error <= slack)[usual].all(), (error / slack)[usual].max()
    assert (q[~usual] <= math.exp(-86.9)).all()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropies(shape, scale):
    logits = randn(*shape, dtype=torch.float32, scale=scale)
    error = (bmtard.softmax_entropy(logits).double() - oracles.entropy(logits)).abs().max()
    assert error <= 4 * ULP * math.log(shape[1]), error / ULP


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divergences(shape, scale, eps):
    student, teacher = (randn(*shape, dtype=torch.float32, scale=scale, seed=s) for s in (1, 2))
    found = bmtard.multi_teacher_kl(student, teacher, reduction="none", eps=eps)[0].double()
    expected = oracles.kl(student, teacher, eps=eps)
    # The sums hold terms as large as the cross entropy, whose rounding is left in a small KL.
    slack = 4 * ULP * (expected.abs() + oracles.entropy(teacher) + math.log(shape[1]))
    error = (found - expected).abs()
    assert (error <= slack).all(), (error / slack).max()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2049, 128), (2033, 129), (263, 1000)], ids=str)
def test_gradients_of_half_types_are_rounded_once(shape, dtype):
    student, teacher = (randn(*shape, dtype=dtype, seed=s) for s in (1, 2))
    found = gradient("BMTARDLoss", student, teacher)
    expected = torch.softmax(student.double(), 1) - torch.softmax(teacher.double(), 1)
    info = torch.finfo(dtype)
    # Half an ulp of the type, and float's error before it, where the difference may cancel.
    slack = (0.5 * info.eps + 32 * ULP) * expected.abs() + 8 * ULP + info.smallest_normal * info.eps
    error = (found - expected).abs()
    assert (error <= slack).all(), (error / slack).max()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_number_survives(dtype):
    # pgd_step_ with steps and bounds that leave x_adv as it is loads and stores each number once.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for padding in (0, 1, 7, 15):  # the last ones beyond whole vectors
        x = torch.cat([numbers, numbers[:padding]])
        x_adv = x.clone()
        bmtard.pgd_step_(x_adv, torch.zeros_like(x), x, step_size=0, epsilon=0, bounds=None)
        assert torch.equal(x_adv.isnan(), x.isnan())
        assert torch.equal(x_adv[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_floats_are_rounded_to_the_nearest_half(dtype):
    # The L2 step moves every number by its own amount, in float, and rounds the result.
    x = randn(1, 4099, dtype=dtype)
    grad = randn(1, 4099, dtype=dtype, seed=1)
    x_adv = x.clone()
    bmtard.pgd_step_(x_adv, grad, x, step_size=2.0, epsilon=100.0, bounds=None, norm="l2")
    scale = 2.0 / grad.double().norm()
    exact = x.double() + scale * grad.double()
    # A few may lie so close to a tie that float's own rounding decides.
    wrong = (x_adv != exact.to(dtype)).sum()
    assert wrong <= 4099 * 2e-3
    torch.testing.assert_close(x_adv.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
