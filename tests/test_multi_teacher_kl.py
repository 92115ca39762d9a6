"""multi_teacher_kl against SciPy and plain torch, both in float64."""

import fractions
import itertools
import math

import numpy as np
import oracles
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from oracles import DTYPES, LAYOUTS, accumulation, assert_matches, leaf, randn
from torch.autograd import gradcheck, gradgradcheck

import bmtard

pytest_plugins = ["paths"]

# Sizes as in test_softmax_entropy.py.
SHAPES = [
    (0, 10), (1, 1), (3, 1), (3, 2), (129, 2), (1, 10), (129, 10), (3, 100), (129, 100),
    (3, 1000), (129, 1001), (3, 32000), (10,), (2, 0, 10), (3, 2, 10), (2, 3, 2, 100),
]  # fmt: skip
SHARING = ["pairs", "one student", "one teacher", "one of each"]


def draw(shape, sharing="pairs", teachers=2, dtype=torch.float64, device="cpu", scale=3.0):
    """Student and teacher lists of 1 or K tensors."""
    count = {
        "pairs": (teachers, teachers),
        "one student": (1, teachers),
        "one teacher": (teachers, 1),
        "one of each": (1, 1),
    }[sharing]
    students, teachers = (
        [
            randn(*shape, dtype=dtype, device=device, scale=scale, seed=10 * side + k)
            for k in range(n)
        ]
        for side, n in enumerate(count)
    )
    return students, teachers


def composed(
    students,
    teachers,
    temperature=1.0,
    *,
    student_temperature=1.0,
    weight=None,
    sample_weight=None,
    reduction="batchmean",
    scale_by_temperature=False,
    eps=0.0,
):
    """The documented equation, row by row of K, in plain torch."""
    count = max(len(students), len(teachers))
    losses = []
    for k in range(count):
        student, teacher = students[k % len(students)], teachers[k % len(teachers)]
        t = temperature
        if isinstance(t, torch.Tensor) and t.dim():
            t = t[k]
        loss = oracles.torch_kl(student, teacher, t, student_temperature, eps)
        if sample_weight is not None:
            own = sample_weight.dim() == student.dim()
            loss = loss * (sample_weight[k] if own else sample_weight)
        classes, rows = student.shape[-1], loss.numel()
        if reduction != "none":
            divisor = {"sum": 1, "mean": rows * classes, "batchmean": rows, "weighted_mean": rows}
            divisor = divisor[reduction]
            if reduction == "weighted_mean" and sample_weight is not None:
                divisor = (sample_weight[k] if own else sample_weight).sum()
            loss = loss.sum() / divisor
        losses.append(loss * t**2 if scale_by_temperature else loss)
    losses = torch.stack(losses)
    return (
        losses if weight is None else sum(w * loss for w, loss in zip(weight, losses, strict=True))
    )


@pytest.mark.parametrize("temperature", [1e-2, 0.3, 1.0, 4.0, 1e2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_scipy(device, path, shape, dtype, temperature):
    students, teachers = draw(shape, dtype=dtype, device=device)
    actual = bmtard.multi_teacher_kl(
        students, teachers, temperature, student_temperature=1.5, reduction="none"
    )
    assert actual.shape == (2, *shape[:-1])
    assert actual.device == students[0].device
    expected = [oracles.kl(s, t, temperature, 1.5) for s, t in zip(students, teachers, strict=True)]
    assert_matches(actual, torch.stack(expected), accumulation(dtype))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_matches_relative_entropy_of_scipy(device, path, temperature):
    students, teachers = draw((33, 10), device=device)
    actual = bmtard.multi_teacher_kl(students, teachers, temperature, reduction="none")
    for k in range(2):
        p = oracles.probabilities(teachers[k], temperature)
        q = oracles.probabilities(students[k])
        expected = scipy.special.rel_entr(p, q).sum(-1)
        assert_matches(actual[k], expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_eps_matches_numpy(device, path, temperature, eps, dtype):
    students, teachers = draw((33, 10), dtype=dtype, device=device)
    actual = bmtard.multi_teacher_kl(students, teachers, temperature, eps=eps, reduction="none")
    expected = [
        oracles.kl(s, t, temperature, eps=eps) for s, t in zip(students, teachers, strict=True)
    ]
    assert_matches(actual, torch.stack(expected), accumulation(dtype))


def test_default_is_kl_div_of_torch(device, path):
    (student,), (teacher,) = draw((33, 10), "one of each", dtype=torch.float32, device=device)
    actual = bmtard.multi_teacher_kl(student, teacher, 4.0, student_temperature=2.0)
    expected = F.kl_div(
        (student / 2).log_softmax(-1), (teacher / 4).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(actual, expected[None])


# --- Every combination of options, values and gradients --------------------------------------

TEMPERATURES = {
    "float": 1.7,
    "0-d": torch.tensor(1.7, dtype=torch.float64),
    "[K]": torch.tensor([0.6, 1.0, 2.5], dtype=torch.float64),
}


@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("kind", TEMPERATURES)
@pytest.mark.parametrize("sharing", SHARING)
def test_teachers_students_and_temperatures(device, path, sharing, kind, teachers):
    sides = draw((2, 5, 10), sharing, teachers, device=device)
    count = max(map(len, sides))
    temperature = TEMPERATURES[kind]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(device)
        temperature = leaf(temperature[:count] if temperature.dim() else temperature)
    inputs = [leaf(x) for side in sides for x in side]
    n = len(sides[0])
    if isinstance(temperature, torch.Tensor):
        inputs.append(temperature)
    both = []
    for function in (bmtard.multi_teacher_kl, composed):
        losses = function(inputs[:n], inputs[n : n + len(sides[1])], temperature, reduction="none")
        assert losses.shape == (count, 2, 5)
        both.append((losses, *oracles.gradients(losses, inputs)))
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected)


OPTIONS = list(
    itertools.product(
        ["none", "sum", "mean", "batchmean", "weighted_mean"],
        [False, True],
        [None, "rows", "teachers and rows"],
        [False, True],
    )
)


@pytest.mark.parametrize(("reduction", "weighted", "sample", "scaled"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_options(device, path, dtype, reduction, weighted, sample, scaled):
    students, teachers = draw((2, 5, 10), dtype=dtype, device=device)
    temperature = torch.tensor([0.8, 2.5], dtype=torch.float32, device=device)
    weight = torch.tensor([0.3, 1.2], dtype=torch.float64, device=device) if weighted else None
    shape = {None: None, "rows": (2, 5), "teachers and rows": (2, 2, 5)}[sample]
    sample_weight = None if shape is None else randn(*shape, device=device, scale=1, seed=7)
    if sample_weight is not None and reduction == "weighted_mean":
        sample_weight = sample_weight.abs()  # a divisor near 0 would magnify rounding
    given = [*students, *teachers, temperature, weight, sample_weight]
    given = [None if x is None else leaf(x) for x in given]
    exact = [None if x is None else leaf(x, torch.float64) for x in given]
    both = []
    for function, x in ((bmtard.multi_teacher_kl, given), (composed, exact)):
        losses = function(
            x[:2], x[2:4], x[4], student_temperature=1.3, weight=x[5], sample_weight=x[6],
            reduction=reduction, scale_by_temperature=scaled, eps=1e-5,
        )  # fmt: skip
        inputs = [t for t in x if t is not None]
        both.append([losses, *oracles.gradients(losses, inputs)])
    shape = () if weighted else (2,)
    assert both[0][0].shape == ((*shape, 2, 5) if reduction == "none" else shape)
    assert_matches(both[0][0], both[1][0], accumulation(dtype))
    wanted = [t.dtype for t in given if t is not None]
    for actual, expected, one in zip(both[0][1:], both[1][1:], wanted, strict=True):
        # A sum over float32 rows, where its tensor is float64.
        one_tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype != torch.float64 else {}
        assert actual.dtype == one
        if one in oracles.HALF:
            assert_matches(actual, expected, one)
        else:
            torch.testing.assert_close(actual, expected, check_dtype=False, **one_tolerance)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("kind", TEMPERATURES)
@pytest.mark.parametrize("sharing", SHARING)
def test_gradcheck_of_logits_and_temperature(device, path, sharing, kind, eps):
    sides = draw((3, 4), sharing, 3, device=device, scale=1.5)
    n, count = len(sides[0]), max(map(len, sides))
    inputs = [leaf(x) for side in sides for x in side]
    temperature = TEMPERATURES[kind]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(device)
        inputs.append(leaf(temperature[:count] if temperature.dim() else temperature))

    def op(*x):
        logits, t = (x[:-1], x[-1]) if kind != "float" else (x, temperature)
        return bmtard.multi_teacher_kl(
            logits[:n], logits[n:], t, student_temperature=0.8, reduction="none", eps=eps
        )

    assert gradcheck(op, inputs)


@pytest.mark.parametrize(("reduction", "weighted", "sample", "scaled"), OPTIONS)
def test_gradcheck_of_options(device, path, reduction, weighted, sample, scaled):
    students, teachers = draw((3, 4), device=device, scale=1.5)
    inputs = [leaf(x) for x in (*students, *teachers)]
    inputs.append(leaf(torch.tensor([0.8, 2.5], dtype=torch.float64, device=device)))
    if weighted:
        inputs.append(leaf(torch.tensor([0.3, 1.2], dtype=torch.float64, device=device)))
    if sample:
        shape = (3,) if sample == "rows" else (2, 3)
        inputs.append(leaf(randn(*shape, device=device, scale=1, seed=7)))

    def op(s0, s1, t0, t1, temperature, *rest):
        return bmtard.multi_teacher_kl(
            [s0, s1], [t0, t1], temperature,
            weight=rest[0] if weighted else None, sample_weight=rest[-1] if sample else None,
            reduction=reduction, scale_by_temperature=scaled,
        )  # fmt: skip

    assert gradcheck(op, inputs)


# --- Shapes, layouts, dtypes ----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 10), (4, 129), (2, 3, 33), (3, 1)], ids=str)
def test_layouts(device, path, shape, dtype, layout):
    students, teachers = draw(shape, dtype=dtype, device=device)
    # The student contiguous and its teacher not, and the other way round.
    given = [
        leaf(oracles.in_layout(x, layout if i in (0, 3) else "contiguous"))
        for i, x in enumerate([*students, *teachers])
    ]
    exact = [leaf(x, torch.float64) for x in given]
    actual = bmtard.multi_teacher_kl(given[:2], given[2:], 1.7, reduction="none")
    expected = composed(exact[:2], exact[2:], 1.7, reduction="none")
    assert_matches(actual, expected, accumulation(dtype))
    grads = zip(oracles.gradients(actual, given), oracles.gradients(expected, exact), strict=True)
    for actual, expected in grads:
        assert actual.shape == shape
        assert_matches(actual, expected, dtype)


def test_rows_expanded_from_one(device, path):
    student, teacher = (randn(1, 10, device=device, seed=k).requires_grad_() for k in (0, 1))
    grads = []
    for function in (bmtard.multi_teacher_kl, composed):
        losses = function([student.expand(7, 10)], [teacher.expand(7, 10)], 2.0)
        grads.append(torch.autograd.grad(losses.sum(), [student, teacher]))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_rows(device, path):
    student = torch.empty(0, 10, device=device, requires_grad=True)
    teacher = torch.empty(0, 10, device=device)
    total = bmtard.multi_teacher_kl(student, teacher, reduction="sum")
    assert total == 0
    total.sum().backward()
    assert student.grad.shape == (0, 10)
    for reduction in ("mean", "batchmean"):
        assert bmtard.multi_teacher_kl(student, teacher, reduction=reduction).isnan().all()


@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_mixed_dtypes_are_promoted(device, path, student_dtype, teacher_dtype):
    student = randn(9, 10, dtype=student_dtype, device=device).requires_grad_()
    teacher = randn(9, 10, dtype=teacher_dtype, device=device, seed=1).requires_grad_()
    losses = bmtard.multi_teacher_kl(student, teacher, 2.0, reduction="none")
    common = accumulation(torch.promote_types(student_dtype, teacher_dtype))
    assert_matches(losses[0], oracles.kl(student, teacher, 2.0), common)
    exact = [leaf(x, torch.float64) for x in (student, teacher)]
    expected = torch.autograd.grad(composed(exact[:1], exact[1:], 2.0).sum(), exact)
    actual = torch.autograd.grad(losses.sum() / 9, [student, teacher])
    assert_matches(actual[0], expected[0], student_dtype)
    assert_matches(actual[1], expected[1], teacher_dtype)


def test_largest_number_of_teachers(device, path):
    students, teachers = draw((3, 10), "one student", 16, device=device)
    actual = bmtard.multi_teacher_kl(students[0], teachers, 2.0)
    torch.testing.assert_close(actual, composed(students, teachers, 2.0))


@pytest.mark.parametrize("layout", ["rows", "teachers and rows"])
def test_sample_weight_of_any_strides(device, path, layout):
    students, teachers = draw((2, 3, 5), device=device)
    students = [leaf(s) for s in students]
    shape = (3, 2, 2) if layout == "teachers and rows" else (3, 2)
    factors = randn(*shape, device=device, seed=7).movedim(0, -1)
    assert not factors.is_contiguous()
    grads = []
    for function in (bmtard.multi_teacher_kl, composed):
        weight = torch.tensor([0.3, 0.7], dtype=torch.float64, device=device)
        loss = function(students, teachers, weight=weight, sample_weight=factors, reduction="sum")
        grads.append((loss, *torch.autograd.grad(loss, students)))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean", "weighted_mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sample", [None, (), (2,)], ids=str)
def test_one_row_without_leading_dimensions(device, path, sample, weighted, reduction):
    students, teachers = draw((10,), device=device)
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64, device=device) if weighted else None
    factors = None if sample is None else randn(*sample, device=device, seed=7).abs()
    results = []
    for function in (bmtard.multi_teacher_kl, composed):
        inputs = [leaf(x) for x in students]
        losses = function(
            inputs, teachers, 2.0, weight=weight, sample_weight=factors, reduction=reduction
        )
        results.append((losses, *oracles.gradients(losses, inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_rows_with_weights(device, path, shape):
    student = torch.empty(0, 10, device=device, requires_grad=True)
    loss = bmtard.multi_teacher_kl(
        [student, student], [student.detach()] * 2, reduction="sum", weight=[0.3, 0.7],
        sample_weight=torch.ones(shape, device=device),
    )  # fmt: skip
    assert loss == 0
    loss.backward()
    assert student.grad.shape == (0, 10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_square_of_a_half_temperature(device, path, dtype, weighted):
    """300 ** 2 is infinite in float16."""
    students, teachers = draw((3, 10), device=device, dtype=torch.float32, scale=300.0)
    students = [leaf(s) for s in students]
    weight = [0.3, 0.7] if weighted else None
    options = {"weight": weight, "scale_by_temperature": True}
    temperature = torch.tensor([300.0, 200.0], device=device)
    actual = bmtard.multi_teacher_kl(students, teachers, temperature.to(dtype), **options)
    expected = bmtard.multi_teacher_kl(students, teachers, temperature.to(dtype).float(), **options)
    torch.testing.assert_close(actual, expected)
    assert actual.isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_bool_mask_as_sample_weight(device, path, own, weighted):
    students, teachers = draw((2, 3, 10), device=device)
    masks = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]], device=device).bool()
    weight = [0.3, 0.7] if weighted else None

    def loss(reduction):
        return bmtard.multi_teacher_kl(
            [leaf(s) for s in students], teachers, weight=weight,
            sample_weight=masks if own else masks[0], reduction=reduction,
        )  # fmt: skip

    kept = [masks[k if own else 0] for k in range(2)]
    means = [
        bmtard.multi_teacher_kl(s[m], t[m])[0]
        for s, t, m in zip(students, teachers, kept, strict=True)
    ]
    sums = [mean * m.sum() for mean, m in zip(means, kept, strict=True)]
    for reduction, wanted in (
        ("weighted_mean", means),
        ("sum", sums),
        ("batchmean", [x / 6 for x in sums]),
        ("mean", [x / 60 for x in sums]),
    ):
        wanted = torch.stack(wanted)
        wanted = wanted if weight is None else 0.3 * wanted[0] + 0.7 * wanted[1]
        torch.testing.assert_close(loss(reduction), wanted)


def test_weighted_mean_of_no_rows_is_nan(device, path):
    student = randn(3, 10, device=device).requires_grad_()
    mask = torch.zeros(3, dtype=torch.bool, device=device)
    for weight in (None, [1.0]):
        loss = bmtard.multi_teacher_kl(
            student, student.detach(), weight=weight, sample_weight=mask, reduction="weighted_mean"
        )
        assert loss.isnan().all()


def test_weight_may_be_a_list(device, path):
    students, teachers = draw((3, 10), device=device)
    losses = bmtard.multi_teacher_kl(students, teachers)
    actual = bmtard.multi_teacher_kl(students, teachers, weight=[0.25, 2])
    torch.testing.assert_close(actual, 0.25 * losses[0] + 2 * losses[1])


# --- Closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_of_a_distribution_to_itself_is_zero(device, path, dtype):
    logits = randn(33, 10, dtype=dtype, device=device).requires_grad_()
    teacher = logits.detach()
    losses = bmtard.multi_teacher_kl(logits, teacher, 1.7, student_temperature=1.7)
    torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_kl_is_not_negative(device, path):
    for scale in (1e-3, 1.0, 30.0):
        students, teachers = draw((129, 10), device=device, scale=scale)
        losses = bmtard.multi_teacher_kl(students, teachers, 2.0, reduction="none")
        assert (losses >= -1e-12).all()
        assert losses.max() > 1e-12


def test_uniform_teacher_and_two_classes(device, path):
    margin = torch.linspace(-5, 5, 11, dtype=torch.float64, device=device)
    student = torch.stack([margin, torch.zeros_like(margin)], -1)
    actual = bmtard.multi_teacher_kl(student, torch.zeros_like(student), reduction="none")[0]
    q = scipy.special.expit(margin.cpu().numpy())
    assert_matches(actual, -math.log(2) - 0.5 * (np.log(q) + np.log(1 - q)), torch.float64)


@pytest.mark.parametrize("factor", [0.125, 3.0, 1e3])
def test_scaling_and_shifting_change_nothing(device, path, factor):
    (student,), (teacher,) = draw((17, 10), "one of each", device=device)
    expected = bmtard.multi_teacher_kl(student, teacher, 1.3, reduction="none")
    scaled = bmtard.multi_teacher_kl(
        factor * student, factor * teacher, factor * 1.3, student_temperature=factor,
        reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(scaled, expected)
    shifted = bmtard.multi_teacher_kl(student + factor, teacher - factor, 1.3, reduction="none")
    torch.testing.assert_close(shifted, expected)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("student_temperature", [0.5, 1.0, 4.0])
def test_analytic_student_gradient(device, path, student_temperature, eps):
    (student,), (teacher,) = draw((17, 10), "one of each", device=device)
    student.requires_grad_()
    losses = bmtard.multi_teacher_kl(
        student, teacher, 2.0, student_temperature=student_temperature, reduction="sum", eps=eps
    )
    (grad,) = torch.autograd.grad(losses.sum(), student)
    p, q = oracles.probabilities(teacher, 2.0), oracles.probabilities(student, student_temperature)
    assert_matches(grad, (q - p) / student_temperature, torch.float64)


# --- Extreme logits -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 100.0])
def test_large_logits_are_finite(device, path, temperature, eps, dtype):
    noise = randn(2, 9, 10, dtype=torch.float32, device=device)
    student, teacher = (
        (noise[k] + 1e4 * randn(9, 10, device=device, seed=1 + k).sign()).to(dtype).requires_grad_()
        for k in (0, 1)
    )
    tensor = torch.tensor(temperature, device=device, requires_grad=True)
    losses = bmtard.multi_teacher_kl(student, teacher, tensor, reduction="none", eps=eps)
    assert_matches(losses[0], oracles.kl(student, teacher, temperature, eps=eps), losses.dtype)
    exact = [leaf(x, torch.float64) for x in (student, teacher)]
    expected = torch.autograd.grad(
        composed(exact[:1], exact[1:], temperature, eps=eps + 1e-300).sum(), exact[:1]
    )
    actual = torch.autograd.grad(losses.sum() / 9, [student, teacher, tensor])
    assert_matches(actual[0], expected[0], dtype)
    assert all(grad.isfinite().all() for grad in actual)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_probability_zero(device, path, dtype, eps):
    # exp(-3000) is 0 in float64 too, and the second class is impossible for the student as well.
    teacher = torch.tensor([[0.0, -3000.0, -1.0]], dtype=dtype, device=device).requires_grad_()
    student = torch.tensor([[1.0, -3000.0, 0.5]], dtype=dtype, device=device).requires_grad_()
    temperature = torch.tensor(1.0, device=device, requires_grad=True)
    losses = bmtard.multi_teacher_kl(student, teacher, temperature, eps=eps)
    short = [leaf(x[:, [0, 2]], torch.float64) for x in (student, teacher)]
    exact_temperature = leaf(temperature, torch.float64)
    expected = composed(short[:1], short[1:], exact_temperature, eps=eps)
    assert_matches(losses, expected, accumulation(dtype))
    actual = torch.autograd.grad(losses.sum(), [student, teacher, temperature])
    expected = torch.autograd.grad(expected.sum(), [*short, exact_temperature])
    for side in (0, 1):
        assert actual[side][0, 1] == 0
        assert_matches(actual[side][:, [0, 2]], expected[side], dtype)
    assert_matches(actual[2], expected[2], torch.float32)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_classes_equal_dropping_them(device, path, dtype, eps):
    kept = [0, 2, 3, 5, 6]
    full = [randn(33, 7, dtype=dtype, device=device, seed=k) for k in (0, 1)]
    masked = []
    for x in full:
        masked.append(torch.full_like(x, -math.inf))
        masked[-1][:, kept] = x[:, kept]
        masked[-1].requires_grad_()
    temperature = torch.tensor([1.7], device=device, requires_grad=True)
    short = [leaf(x[:, kept], torch.float64) for x in full]
    exact_temperature = leaf(temperature, torch.float64)
    losses = bmtard.multi_teacher_kl(*masked, temperature, reduction="none", eps=eps)
    expected = composed(short[:1], short[1:], exact_temperature, reduction="none", eps=eps)
    assert_matches(losses, expected, accumulation(dtype))
    actual = torch.autograd.grad(losses.mean(), [*masked, temperature])
    expected = torch.autograd.grad(expected.mean(), [*short, exact_temperature])
    for side in (0, 1):
        assert (actual[side][:, [1, 4]] == 0).all()
        assert_matches(actual[side][:, kept], expected[side], dtype)
    assert_matches(actual[2], expected[2], torch.float32)


def test_class_impossible_for_the_student_only(device, path):
    student = torch.tensor([[0.0, -math.inf, 1.0]], device=device, requires_grad=True)
    teacher = torch.zeros(1, 3, device=device)
    assert bmtard.multi_teacher_kl(student, teacher).isposinf().all()
    teacher[0, 1] = -math.inf
    losses = bmtard.multi_teacher_kl(student, teacher)
    expected = oracles.kl(student[:, [0, 2]], teacher[:, [0, 2]])
    assert_matches(losses, expected, torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_give_nan_in_their_row_only(device, path, dtype, side, bad):
    (student,), (teacher,) = draw((9, 33), "one of each", dtype=dtype, device=device)
    clean = bmtard.multi_teacher_kl(student, teacher, reduction="none")
    (student if side == "student" else teacher)[4, 20] = bad
    losses = bmtard.multi_teacher_kl(student, teacher, reduction="none")
    assert losses[0, 4].isnan()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(losses[:, others], clean[:, others])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_temperature_tensor_that_is_not_positive_gives_nan(device, path, bad):
    students, teachers = draw((3, 5), dtype=torch.float32, device=device)
    temperature = torch.tensor([1.0, bad], device=device)
    losses = bmtard.multi_teacher_kl(students, teachers, temperature)
    assert losses.isnan().tolist() == [False, True]


# --- Autograd -------------------------------------------------------------------------------


def test_gradients_only_to_what_requires_them_and_in_its_dtype(device, path):
    students, teachers = draw((5, 10), dtype=torch.bfloat16, device=device)
    given = {
        "student 0": students[0],
        "student 1": students[1],
        "teacher 0": teachers[0],
        "teacher 1": teachers[1],
        "temperature": torch.tensor([1.5, 2.0], dtype=torch.float64, device=device),
        "weight": torch.tensor([0.5, 0.7], dtype=torch.float16, device=device),
        "sample_weight": torch.linspace(0.5, 2, 5, dtype=torch.float32, device=device),
    }
    for wanted in [(), *itertools.combinations(given, 1), *itertools.combinations(given, 2)]:
        x = {name: leaf(t) if name in wanted else t for name, t in given.items()}
        s0, s1, t0, t1, temperature, weight, sample_weight = x.values()
        loss = bmtard.multi_teacher_kl(
            [s0, s1], [t0, t1], temperature, weight=weight, sample_weight=sample_weight
        )
        assert loss.requires_grad == bool(wanted)
        if wanted:
            loss.backward()
        for name, tensor in x.items():
            if name in wanted:
                assert tensor.grad.dtype == tensor.dtype
                assert tensor.grad.shape == tensor.shape
                assert tensor.grad.abs().sum() > 0
            else:
                assert tensor.grad is None


def test_backward_scales_with_the_incoming_gradient_and_repeats(device, path):
    students, teachers = draw((5, 10), device=device, dtype=torch.float32)
    students = [leaf(s) for s in students]
    losses = bmtard.multi_teacher_kl(students, teachers, 1.5)
    incoming = torch.tensor([-2.0, 1e3], device=device)
    first = torch.autograd.grad(losses, students, incoming, retain_graph=True)
    second = torch.autograd.grad(losses, students, incoming, retain_graph=True)
    ones = torch.autograd.grad(losses, students, torch.ones_like(losses))
    for k in range(2):
        assert torch.equal(first[k], second[k])
        torch.testing.assert_close(first[k], incoming[k] * ones[k])


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "weighted_mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_incoming_gradient_of_any_stride(device, path, dtype, reduction):
    students, teachers = draw((5, 10), device=device, dtype=dtype)
    students = [leaf(s) for s in students]
    losses = bmtard.multi_teacher_kl(students, teachers, 1.5, reduction=reduction)
    incoming = torch.tensor([0.5, 3.0, -2.0], dtype=losses.dtype, device=device)
    for grad in (incoming[::2], incoming[:1].expand(2)):
        actual = torch.autograd.grad(losses, students, grad, retain_graph=True)
        expected = torch.autograd.grad(losses, students, grad.clone(), retain_graph=True)
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("grad", [False, True])
def test_the_cpu_adds_rows_in_double(grad):
    oracles.require_native()
    students, teachers = draw((4099, 3), dtype=torch.float32)
    students = [s.requires_grad_(grad) for s in students]
    rows = bmtard.multi_teacher_kl(students, teachers, 2.0, reduction="none").double()
    for reduction, divisor in (("sum", 1), ("mean", 4099 * 3), ("batchmean", 4099)):
        actual = bmtard.multi_teacher_kl(students, teachers, 2.0, reduction=reduction)
        torch.testing.assert_close(
            actual, (rows.sum(1) / divisor).float(), rtol=torch.finfo(torch.float32).eps, atol=0
        )


def test_same_tensor_on_both_sides(device, path):
    logits = randn(5, 4, device=device).requires_grad_()
    assert gradcheck(lambda z: bmtard.multi_teacher_kl([z, 2 * z], [z * z, z], 2.0), (logits,))


def test_double_backward_is_right_or_refused(device, path):
    (student,), (teacher,) = draw((3, 4), "one of each", device=device, scale=1.0)
    student.requires_grad_()
    if path == "reference":
        assert gradgradcheck(lambda z: bmtard.multi_teacher_kl(z, teacher), (student,))
        return
    losses = bmtard.multi_teacher_kl(student, teacher)
    (grad,) = torch.autograd.grad(losses.sum(), student, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"multi_teacher_kl has no double backward"):
        grad.sum().backward()


def test_inference_mode_and_no_grad(device, path):
    students, teachers = draw((5, 10), device=device)
    students[0].requires_grad_()
    expected = bmtard.multi_teacher_kl(students, teachers, 2.0).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses = bmtard.multi_teacher_kl(students, teachers, 2.0)
        assert not losses.requires_grad
        torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 10, 33, 1000])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "weighted_mean"])
@pytest.mark.parametrize("rows", ["none", "[N]", "[K, N]"])
def test_a_constant_weight_changes_no_result(path, c, dtype, eps, reduction, rows):
    """Its gradients come with the forward pass, those of a learned one in a pass of their own."""
    students, teachers = draw((2, 7, c), dtype=dtype)
    students = [s.requires_grad_() for s in students]
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    factors = {"none": None, "[N]": randn(2, 7), "[K, N]": randn(2, 2, 7)}[rows]
    settings = {
        "temperature": torch.tensor([1.5, 3.0]),
        "student_temperature": 2.0,
        "eps": eps,
        "reduction": reduction,
        "scale_by_temperature": rows == "[N]",
        "sample_weight": factors,
    }
    outcomes = []
    for learned in (False, True):
        loss = bmtard.multi_teacher_kl(
            students, teachers, weight=weight.clone().requires_grad_(learned), **settings
        )
        outcomes.append((loss, *torch.autograd.grad(-2 * loss, students)))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10)


def test_gradients_may_be_asked_for_again(path):
    student = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 10, dtype=torch.float64)
    loss = bmtard.multi_teacher_kl(student, teacher, weight=[2.0])
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    once = once.clone()
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(student.grad, times * once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_in_place_is_one_multiplication(device, dtype):
    oracles.require_native()
    buffers = [randn(3, 1111, dtype=dtype, device=device, seed=k) for k in range(2)]
    want = [b * 0.3 for b in buffers]
    factor = torch.tensor(0.3, dtype=accumulation(dtype), device=device)
    torch.ops.bmtard.scale_(buffers, factor)
    for a, b in zip(buffers, want, strict=True):
        assert torch.equal(a, b)


# --- At the edge of what a float is -----------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [2, 3, 10, 129, 1100, 5000])
def test_logits_further_apart_than_the_largest_number(device, path, c, dtype, eps):
    """Differences of logits overflow, KL does not. Exact integers serve as the oracle."""
    largest = float(torch.finfo(dtype).max)
    student = torch.full((3, c), -largest, dtype=torch.float64)
    student[0, 0] = largest
    student[1] = torch.linspace(-largest / 2, largest / 2, c, dtype=torch.float64)
    student[2] = 0
    student = student.to(device, dtype)
    # Uniform over the first two classes.
    teacher = torch.full((3, c), -math.inf, dtype=dtype, device=device)
    teacher[:, :2] = 0
    kl = bmtard.multi_teacher_kl(student, teacher, reduction="none", eps=eps)[0]
    exact = [[fractions.Fraction(x) for x in row] for row in student.double().tolist()]
    far = [max(row) - (row[0] + row[1]) / 2 for row in exact[:2]]
    torch.testing.assert_close(
        kl[:2].double().cpu(), torch.tensor([float(x) for x in far], dtype=torch.float64),
        rtol=4e-7 if kl.dtype == torch.float32 else 1e-15, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        kl[2].double().cpu(), torch.tensor(math.log(0.5 + eps) + math.log(c), dtype=torch.float64),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("c", [10, 1100])
def test_far_logits_have_a_student_gradient(device, path, c):
    """q - p, which is finite however large KL is."""
    student = torch.full((2, c), -3e38, device=device)
    student[:, 3] = 3e38
    student.requires_grad_()
    teacher = torch.zeros(2, c, device=device)
    bmtard.multi_teacher_kl(student, teacher, reduction="sum").sum().backward()
    expected = torch.full((2, c), -1 / c, device=device)
    expected[:, 3] += 1
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("temperature", [1e-36, 1e36])
@pytest.mark.parametrize("c", [10, 1100])
def test_extreme_temperatures_with_a_masked_class(device, path, temperature, c):
    student, teacher = randn(4, c, device=device).float(), randn(4, c, seed=1, device=device)
    student[:, 1] = teacher[:, 1] = -math.inf
    options = {"student_temperature": 1.0, "reduction": "none"}
    kl = bmtard.multi_teacher_kl(student, teacher.float(), temperature, **options)[0]
    if temperature > 1:  # all but the masked class are equally likely
        p = (teacher > -math.inf).double() / (c - 1)
    else:
        p = torch.nn.functional.one_hot(teacher.float().argmax(-1), c).double()
    log_q = torch.log_softmax(student.double(), -1)
    expected = torch.where(p > 0, p * (p.log() - log_q), 0.0).sum(-1)
    torch.testing.assert_close(kl, expected.float())


@pytest.mark.parametrize("bad", [9e-37, 1e-40, 1.1e36, math.inf])
def test_temperature_tensor_out_of_range_gives_nan(device, path, bad):
    temperature = torch.tensor([1.0, bad], dtype=torch.float64, device=device)
    logits = randn(3, 5, device=device)
    kl = bmtard.multi_teacher_kl(logits, [logits, logits], temperature)
    assert kl[0].abs() < 1e-6
    assert kl[1].isnan()


@pytest.mark.parametrize("eps", [0.0, 1e-36, 1e-5, 1e36])
def test_smallest_and_largest_eps(device, path, eps):
    """float32 arithmetic against float64, with a class that has no probability."""
    student, teacher = randn(3, 10, device=device).float(), randn(3, 10, seed=1, device=device)
    teacher[:, 2] = -math.inf
    teacher = teacher.float().requires_grad_()
    kl = bmtard.multi_teacher_kl(student, teacher, reduction="none", eps=eps)[0]
    kept = [j for j in range(10) if j != 2]
    exact = teacher.detach()[:, kept].double().requires_grad_()
    p, log_q = torch.softmax(exact, -1), torch.log_softmax(student.double(), -1)[:, kept]
    terms = p * ((p + eps).log() - log_q)
    torch.testing.assert_close(kl, terms.sum(-1).float())
    grads = [torch.autograd.grad(x.sum(), y)[0] for x, y in ((kl, teacher), (terms, exact))]
    torch.testing.assert_close(grads[0][:, kept], grads[1].float())
    assert (grads[0][:, 2] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("constant_weight", [False, True])
@pytest.mark.parametrize("sharing", ["pairs", "student", "teacher"])
@pytest.mark.parametrize("c", [10, 1100])
def test_rows_of_weight_zero_do_not_count(device, path, c, sharing, constant_weight, bad):
    """Whatever they hold: loss and gradients are those without them."""
    students = [randn(5, c, seed=k, device=device) for k in range(2)]
    teachers = [randn(5, c, seed=9 + k, device=device) for k in range(2)]
    if sharing == "student":
        students = students[:1]
    if sharing == "teacher":
        teachers = teachers[:1]
    weight = torch.tensor([0.25, 0.75], dtype=torch.float64, device=device)
    row_weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5], dtype=torch.float64, device=device)
    temperature = torch.tensor([2.0, 3.0], dtype=torch.float64, device=device)
    students[0][1, 3] = bad
    teachers[-1][3] = bad

    def run(rows):
        inputs = [x[rows].clone().requires_grad_() for x in students + teachers]
        rest = [row_weight[rows].clone(), temperature.clone()]
        if constant_weight:
            inputs = [x.detach().requires_grad_(i < len(students)) for i, x in enumerate(inputs)]
        else:
            rest = [x.requires_grad_() for x in rest]
        loss = bmtard.multi_teacher_kl(
            inputs[: len(students)], inputs[len(students) :], rest[1],
            weight=weight, sample_weight=rest[0], reduction="sum",
        )  # fmt: skip
        wanted = [x for x in inputs + rest if x.requires_grad]
        return loss, torch.autograd.grad(loss, wanted)

    kept = torch.tensor([0, 2, 4], device=device)
    loss, grads = run(torch.arange(5, device=device))
    expected_loss, expected = run(kept)
    torch.testing.assert_close(loss, expected_loss)
    for grad, want in zip(grads, expected, strict=True):
        if grad.shape == want.shape:  # of the temperature
            torch.testing.assert_close(grad, want)
        else:
            torch.testing.assert_close(grad[kept], want)
            rest = grad[[1, 3]]  # by a weight of 0, KL is the gradient, if it is a number
            assert rest.isfinite().all() if grad.dim() == 1 else (rest == 0).all()


def test_a_finite_row_of_weight_zero_has_a_gradient_by_its_weight(device, path):
    student, teacher = randn(3, 5, device=device), randn(3, 5, seed=1, device=device)
    weight = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device=device).requires_grad_()
    kl = bmtard.multi_teacher_kl(student, teacher, reduction="none")[0]
    loss = bmtard.multi_teacher_kl(student, teacher, sample_weight=weight, reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), weight)[0], kl)


# --- A student temperature on the device, or the teacher's own --------------------------------


@pytest.mark.parametrize("kind", ["float", "0-d", "[K]"])
@pytest.mark.parametrize("sharing", SHARING)
def test_the_teachers_own_temperature(path, sharing, kind):
    """Values and the gradients of logits and temperature, against the equation in plain torch."""
    students, teachers = draw((5, 10), sharing)
    count = max(len(students), len(teachers))
    given = {"float": 3.0, "0-d": torch.tensor(3.0), "[K]": torch.tensor([3.0, 0.7])[:count]}[kind]
    outcomes = []
    for ours in (True, False):
        inputs = [leaf(x) for x in (*students, *teachers)]
        temperature = given
        if kind != "float":
            temperature = given.double().requires_grad_()
            inputs.append(temperature)
        s, t = inputs[: len(students)], inputs[len(students) : len(students) + len(teachers)]
        if ours:
            losses = bmtard.multi_teacher_kl(
                s, t, temperature, student_temperature="teacher", scale_by_temperature=True
            )
        else:
            each = [temperature[k] if kind == "[K]" else temperature for k in range(count)]
            losses = torch.stack(
                [
                    each[k] ** 2
                    * oracles.torch_kl(s[k % len(s)], t[k % len(t)], each[k], each[k]).mean()
                    for k in range(count)
                ]
            )
        outcomes.append([losses, *oracles.gradients(losses, inputs)])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_student_temperature_in_a_tensor_is_that_float(path, dtype, eps):
    students, teachers = draw((4, 3, 10), dtype=dtype)
    for given, floats in (
        (torch.tensor(2.5), [2.5, 2.5]),
        (torch.tensor([2.5, 0.5]), [2.5, 0.5]),
    ):
        outcomes = []
        for temperatures in ([given], floats):
            inputs = [leaf(x) for x in students]
            losses = torch.cat(
                [
                    bmtard.multi_teacher_kl(
                        inputs, teachers, 2.0, student_temperature=one, eps=eps, reduction="none"
                    )
                    for one in temperatures
                ]
            )
            if len(temperatures) == 2:  # teacher k of the call with float k
                losses = torch.stack([losses[0], losses[3]])
            outcomes.append([losses, *torch.autograd.grad(losses.sum(), inputs)])
        for actual, expected in zip(*outcomes, strict=True):
            assert actual.dtype == expected.dtype
            tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype in oracles.HALF else {}
            torch.testing.assert_close(actual, expected, **tolerance)


def test_a_student_temperature_learns_beside_masked_classes_and_rows(path):
    """Neither a class of logit -inf nor a row of weight 0, whatever it holds, adds to it."""
    (student,), (teacher,) = draw((4, 6), "one of each")
    student[:, 2] = teacher[:, 2] = -math.inf
    kept = [0, 1, 3, 4, 5]
    rows = torch.tensor([True, False, True, True])
    expected, actual = (torch.tensor(1.7, dtype=torch.float64, requires_grad=True) for _ in "ab")
    wanted = oracles.torch_kl(student[rows][:, kept], teacher[rows][:, kept], 3.0, expected).mean()
    wanted.backward()
    student[1] = teacher[1] = math.nan
    inputs = leaf(student)
    loss = bmtard.multi_teacher_kl(
        inputs, teacher, 3.0, student_temperature=actual, sample_weight=rows,
        reduction="weighted_mean",
    )[0]  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(actual.grad, expected.grad)
    assert inputs.grad.isfinite().all()
    assert gradcheck(
        lambda one: bmtard.multi_teacher_kl(
            student[rows], teacher[rows], 3.0, student_temperature=one
        ),
        actual,
    )


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, 1e-37, 1.1e36])
def test_student_temperature_tensor_out_of_range_gives_nan(path, bad):
    (student,), (teacher,) = draw((4, 6), "one of each")
    temperature = torch.tensor(bad, dtype=torch.float64)
    assert bmtard.multi_teacher_kl(student, teacher, student_temperature=temperature).isnan().all()
