from __future__ import annotations

import numpy as np
import pytest

from . import harness as h

STUDENT_TEMPERATURE = 1.25


def forward(students, teachers, temperature, dtype, eps, **gradients):
    out = h.Outputs()
    k, n = len(students), students[0].shape[0]
    kl, statistics = out.new((k, n), h.real(dtype)), out.new((5, k, n), h.real(dtype))
    h.simt().multi_teacher_kl(
        students=students,
        teachers=teachers,
        temperature=temperature,
        student_temperature=STUDENT_TEMPERATURE,
        eps=eps,
        kl=kl,
        statistics=statistics,
        **gradients,
    )
    out.check()
    return kl, statistics


def backward(
    students, teachers, temperature, dtype, eps, statistics, coefficient, *,
    student_shared=False, teacher_shared=False, wants=(True, True, True), shift=0,
):  # fmt: skip
    """Returns gradients of students, teachers (lists, one entry if shared) and temperature."""
    out = h.Outputs()
    k, (n, c) = len(students), students[0].shape

    def gradients(wanted, shared):
        made = [out.new((n, c), dtype, shift=shift) for _ in range(1 if shared else k)]
        return (made if wanted else [None] * len(made)) + [None] * (k - len(made))

    by_student = gradients(wants[0], student_shared)
    by_teacher = gradients(wants[1], teacher_shared)
    by_temperature = out.new((k, n), h.real(dtype)) if wants[2] else None
    h.simt().multi_teacher_kl_backward(
        students=students,
        teachers=teachers,
        temperature=temperature,
        student_temperature=STUDENT_TEMPERATURE,
        eps=eps,
        statistics=statistics,
        coefficient=coefficient,
        student_shared=student_shared,
        teacher_shared=teacher_shared,
        grad_students=by_student,
        grad_teachers=by_teacher,
        grad_temperature=by_temperature,
    )
    out.check()
    return by_student, by_teacher, by_temperature


def expected(s, t, temperature, eps):
    """KL [N] and its derivatives by student, teacher [N, C] and temperature [N]."""
    log_q = h.log_softmax(s, STUDENT_TEMPERATURE)
    log_p = h.log_softmax(t, temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(p > 0, np.log(p + eps) - log_q, 0)
        kl = (p * ratio).sum(-1)
        a = np.where(p > 0, ratio + p / (p + eps), 0)  # d KL / d p
        center = (p * a).sum(-1, keepdims=True)
        by_scaled = p * (a - center)  # d KL / d (t / temperature)
        by_temperature = -np.where(p > 0, by_scaled * t, 0).sum(-1) / temperature**2
    return kl, (q - p) / STUDENT_TEMPERATURE, by_scaled / temperature, by_temperature


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", h.CLASSES)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_forward_and_backward(c, dtype, eps):
    rng = np.random.default_rng(c)
    for n, k, extra, shift in [
        (0, 2, 0, 0),
        (1, 1, 0, 0),
        (3, 2, 8, 0),
        (37, 3, 0, 0),
        (2, 2, 3, 1),
    ]:
        if n == 37 and c > 300:
            n = 4
        s = [h.draw(100 * c + i, n, c, dtype, scale=2) for i in range(k)]
        t = [h.draw(200 * c + i, n, c, dtype, scale=4) for i in range(k)]
        students = [h.place(x, dtype, extra=extra, shift=shift) for x in s]
        teachers = [h.place(x, dtype, extra=extra, shift=shift) for x in t]
        temperature = rng.uniform(0.7, 4, k)
        coefficient = rng.standard_normal((n, k)).astype(h.real(dtype)).T  # any strides
        kl, statistics = forward(students, teachers, temperature, dtype, eps)
        got = backward(
            students, teachers, temperature, dtype, eps, statistics, coefficient, shift=shift
        )
        for i in range(k):
            want = expected(s[i], t[i], temperature[i], eps)
            factor = coefficient[i].astype(np.float64)
            h.assert_close(kl[i], want[0], h.computed(dtype), floor=4)
            h.assert_close(got[0][i], want[1] * factor[:, None], dtype)
            h.assert_close(got[1][i], want[2] * factor[:, None], dtype, floor=4)
            h.assert_close(got[2][i], want[3] * factor, h.computed(dtype), ulp=256, floor=4)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [1, 10, 32, 33, 512, 513, 1024, 1025, 3000, 9001])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_gradients_with_the_forward_pass(c, dtype, eps):
    """Those of the backward pass, in one launch and without a second read."""
    k, n = 2, 3
    for extra, shift, cluster in [(0, 0, 1), (3, 1, 4)]:
        students = [
            h.place(h.draw(i, n, c, dtype), dtype, extra=extra, shift=shift) for i in range(k)
        ]
        teachers = [
            h.place(h.draw(9 + i, n, c, dtype), dtype, extra=extra, shift=shift) for i in range(k)
        ]
        temperature = np.array([1.5, 3.0])
        coefficient = np.linspace(-1, 2, k * n).reshape(n, k).astype(h.real(dtype)).T
        h.simt().configure(seed=2, max_cluster=cluster, max_shared_bytes=1 << 16)
        h.simt().take_counters()
        kl, statistics = forward(students, teachers, temperature, dtype, eps)
        without = h.simt().take_counters()["shared_bytes"]
        want = backward(
            students, teachers, temperature, dtype, eps, statistics, coefficient, shift=shift,
            wants=(True, False, False),
        )[0]  # fmt: skip
        out = h.Outputs()
        got = [out.new((n, c), dtype, shift=shift) for _ in range(k)]
        h.simt().take_counters()
        again, _ = forward(
            students, teachers, temperature, dtype, eps, coefficient=coefficient, grad_students=got
        )
        out.check()
        counters = h.simt().take_counters()
        assert counters["launches"] == 1
        if c in (1025, 3000):
            # Read for the gradient, for which eps = 0 has to be written and read for KL as well.
            more = (1 if eps else 3) * 2 * k * n * c * h.STORAGE[dtype].itemsize
            assert counters["shared_bytes"] - without >= more
        tolerance = 4 * h.EPS[h.computed(dtype)]  # clusters of another size add in another order
        np.testing.assert_allclose(again, kl, rtol=tolerance, atol=8 * tolerance)
        for a, b in zip(got, want, strict=True):
            h.assert_close(a, h.decode(b), dtype)


def test_an_unaligned_gradient_with_the_forward_pass():
    n, c = 3, 64
    z = [h.draw(i, n, c, "float32") for i in range(2)]
    out = h.Outputs()
    gradient = out.new((n, c), "float32", shift=1)
    students, teachers = ([h.place(x, "float32")] for x in z)
    ones = np.ones((1, n), np.float32)
    forward(students, teachers, 1.0, "float32", 0.0, coefficient=ones, grad_students=[gradient])
    out.check()
    h.assert_close(gradient, expected(z[0], z[1], 1.0, 0.0)[1], "float32")


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [10, 33, 1000, 1100])
@pytest.mark.parametrize("shared", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("extra", [0, 16])
def test_shared_student_or_teacher(c, dtype, shared, extra):
    n, k, eps = 5, 3, 1e-5
    s = [h.draw(0 if shared[0] else i, n, c, dtype, scale=2) for i in range(k)]
    t = [h.draw(10 if shared[1] else 10 + i, n, c, dtype, scale=4) for i in range(k)]
    students = [h.place(x, dtype, extra=extra) for x in s]
    teachers = [h.place(x, dtype, extra=extra) for x in t]
    if shared[0]:
        students = [students[0]] * k
    if shared[1]:
        teachers = [teachers[0]] * k
    temperature = np.array([1.0, 2.0, 3.0])
    coefficient = np.random.default_rng(0).standard_normal((k, n)).astype(h.real(dtype))
    _, statistics = forward(students, teachers, temperature, dtype, eps)
    got = backward(
        students, teachers, temperature, dtype, eps, statistics, coefficient,
        student_shared=shared[0], teacher_shared=shared[1],
    )  # fmt: skip
    want = [expected(s[i], t[i], temperature[i], eps) for i in range(k)]
    for side in (0, 1):
        parts = [want[i][1 + side] * coefficient[i][:, None] for i in range(k)]
        if shared[side]:
            parts = [sum(parts)]
        for i, part in enumerate(parts):
            h.assert_close(got[side][i], part, dtype, floor=8)
    for i in range(k):
        h.assert_close(got[2][i], want[i][3] * coefficient[i], h.computed(dtype), ulp=256, floor=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiles", range(1, 9))
def test_rows_of_many_tiles(tiles, dtype):
    """Rows are read, and copied to shared memory, some tiles ahead, whether or not their number is
    a multiple of that. With a shared student, the rows of all teachers follow each other."""
    k, n, c = 2, 1, tiles * 256 * (16 // h.STORAGE[dtype].itemsize) - 8
    s, t = h.draw(0, n, c, dtype), [h.draw(1 + i, n, c, dtype, scale=4) for i in range(k)]
    students, teachers = [h.place(s, dtype)] * k, [h.place(x, dtype) for x in t]
    temperature, coefficient = np.array([1.0, 2.0]), np.ones((k, n), h.real(dtype))
    for eps, shared_bytes in [(0.0, 1 << 12), (1e-5, 1 << 12), (1e-5, 1 << 18)]:
        h.simt().configure(seed=tiles, max_shared_bytes=shared_bytes)
        kl, statistics = forward(students, teachers, temperature, dtype, eps)
        want = [expected(s, t[i], temperature[i], eps) for i in range(k)]
        for i in range(k):
            h.assert_close(kl[i], want[i][0], h.computed(dtype), floor=4)
        for shared in (False, True):
            got = backward(
                students, teachers, temperature, dtype, eps, statistics, coefficient,
                student_shared=shared,
            )  # fmt: skip
            parts = [sum(w[1] for w in want)] if shared else [w[1] for w in want]
            for by_student, part in zip(got[0], parts, strict=False):
                h.assert_close(by_student, part, dtype, floor=8)
            for i in range(k):
                h.assert_close(got[1][i], want[i][2], dtype, floor=8)
                h.assert_close(got[2][i], want[i][3], h.computed(dtype), ulp=256, floor=4)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [10, 100, 1100])
@pytest.mark.parametrize("shared", [False, True])
def test_only_what_is_wanted(c, dtype, shared):
    """And one temperature, by value or by array, for all teachers."""
    n, k = 4, 2
    z = [h.draw(i, n, c, dtype) for i in range(3)]
    students = [h.place(z[0], dtype)] * 2
    teachers = [h.place(x, dtype) for x in z[1:]]
    one = np.ones((1, 1), h.real(dtype))
    coefficient = np.broadcast_to(one, (k, n))
    kl, statistics = forward(students, teachers, 2.0, dtype, 0.0)
    again, _ = forward(students, teachers, np.array(2.0), dtype, 0.0)
    np.testing.assert_array_equal(kl, again)
    arguments = students, teachers, 2.0, dtype, 0.0, statistics, coefficient
    every = backward(*arguments, student_shared=shared)
    for wants in [(True, False, False), (False, True, False), (False, False, True)]:
        some = backward(*arguments, student_shared=shared, wants=wants)
        for wanted, got, want in zip(wants, some, every, strict=True):
            if wanted:
                pairs = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
                for a, b in pairs:
                    assert a is b is None or np.array_equal(a, b)
    h.simt().take_counters()
    backward(*arguments, student_shared=shared, wants=(False, False, False))
    assert h.simt().take_counters()["launches"] == 0


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [10, 100, 1100])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_masked_and_non_finite_rows(c, dtype, eps):
    s, t = h.draw(1, 7, c, dtype), h.draw(2, 7, c, dtype)
    t[0, ::2] = -np.inf  # masked for the teacher
    s[1, ::2] = t[1, ::2] = -np.inf  # masked for both
    s[2, 1] = -np.inf  # impossible for the student only: infinite
    t[3] = -np.inf
    s[4, c // 2] = np.nan
    t[5, c // 2] = np.inf
    t[6] = 0
    t[6, 0] = 2e4  # probabilities of 0 without a mask
    s[6, 1] = -np.inf
    students, teachers = [h.place(s, dtype)], [h.place(t, dtype)]
    kl, statistics = forward(students, teachers, 1.0, dtype, eps)
    finite = [0, 1, 6]
    want = expected(s[finite], t[finite], 1.0, eps)
    h.assert_close(kl[0][finite], want[0], h.computed(dtype), floor=4)
    assert kl[0][2] == np.inf
    assert np.isnan(kl[0][3:6]).all()
    coefficient = np.ones((1, 7), h.real(dtype))
    got = backward(students, teachers, 1.0, dtype, eps, statistics, coefficient)
    h.assert_close(got[0][0][finite], want[1], dtype)
    h.assert_close(got[1][0][finite], want[2], dtype, floor=4)
    h.assert_close(got[2][0][finite], want[3], h.computed(dtype), ulp=256, floor=8)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("c", [20, 1000, 3000])
def test_a_part_of_a_row_is_masked(c, dtype):
    """So long a part that some threads see nothing else."""
    s, t = h.draw(1, 6, c, dtype), h.draw(2, 6, c, dtype)
    part = c - 3
    s[0, :part] = t[0, :part] = -np.inf
    s[1, 3:] = t[1, 3:] = -np.inf
    t[2, :part] = -np.inf
    s[3, :part] = -np.inf  # impossible for the student: infinite
    s[4, 3:] = -np.inf
    kl, _ = forward([h.place(s, dtype)], [h.place(t, dtype)], 1.0, dtype, 0.0)
    assert (kl[0][3:5] == np.inf).all()
    finite = [0, 1, 2, 5]
    want = expected(s[finite], t[finite], 1.0, 0.0)
    h.assert_close(kl[0][finite], want[0], h.computed(dtype), floor=4)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("c", [10, 1000, 2000])
def test_large_logits_keep_their_precision(c, dtype):
    s, t = (h.draw(seed, 3, c, dtype) for seed in (1, 2))
    s, t = h.rounded(s + 1e4, dtype), h.rounded(t - 1e4, dtype)
    students, teachers = [h.place(s, dtype)], [h.place(t, dtype)]
    kl, statistics = forward(students, teachers, 1.0, dtype, 0.0)
    want = expected(s, t, 1.0, 0.0)
    h.assert_close(kl[0], want[0], dtype, floor=4)
    ones = np.ones((1, 3), h.real(dtype))
    got = backward(students, teachers, 1.0, dtype, 0.0, statistics, ones)
    h.assert_close(got[0][0], want[1], dtype)


def test_a_student_like_its_teacher_has_no_distance():
    z = h.draw(3, 5, 200, "float64")
    kl, _ = forward([h.place(z, "float64")], [h.place(z, "float64")], STUDENT_TEMPERATURE,
                    "float64", 0.0)  # fmt: skip
    assert (kl == 0).all()


@pytest.mark.parametrize("c", [10, 100, 1500])
def test_every_schedule_gives_the_same_bits(c):
    students = [h.place(h.draw(4, 9, c, "float32"), "float32")] * 2
    teachers = [h.place(h.draw(i, 9, c, "float32"), "float32") for i in (5, 6)]
    results = []
    for seed in range(4):
        h.simt().configure(seed=seed, max_shared_bytes=0 if seed % 2 else 1 << 16)
        kl, statistics = forward(students, teachers, 1.5, "float32", 1e-5)
        ones = np.ones((2, 9), np.float32)
        arguments = students, teachers, 1.5, "float32", 1e-5, statistics, ones
        by_student, by_teacher, by_temperature = backward(*arguments, student_shared=True)
        parts = [kl, statistics, by_student[0], *by_teacher, by_temperature]
        results.append(np.concatenate([x.ravel() for x in parts]))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("c", [2, 10, 100, 1025, 3000])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_logits_further_apart_than_the_largest_number(c, dtype, eps):
    """Their differences overflow, the KL does not."""
    kind = {"float64": 1e307, "float32": 2e38, "bfloat16": 2e38}[dtype]
    s = h.rounded(np.full((3, c), -kind), dtype)
    s[0, 0] = -s[0, 0]
    s[1] = h.rounded(np.linspace(-kind / 2, kind / 2, c), dtype)
    s[2, 1] = -s[2, 1]
    if dtype == "float64":
        s *= 16
    t = np.full((3, c), -np.inf)  # uniform over two classes
    t[:, :2] = 0
    students, teachers = [h.place(s, dtype)], [h.place(t, dtype)]
    kl, statistics = forward(students, teachers, 1.0, dtype, eps)
    small = s * 2.0**-10
    want = (small.max(-1) - small[:, :2].mean(-1)) / STUDENT_TEMPERATURE * 2.0**10
    h.assert_close(kl[0], want, h.computed(dtype))
    h.assert_close(statistics[4, 0], want, h.computed(dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("c", [10, 1025])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_far_logit_of_little_weight(c, dtype, eps):
    """The student's difference overflows, but the teacher hardly looks there: the other classes
    have their part in KL and center."""
    size, below = (1.5e308, 690.0) if dtype == "float64" else (3e38, 80.0)
    n = 3
    s = h.rounded(np.full((n, c), size), dtype)
    s[:, 1] = -s[:, 1]
    t = h.draw(5, n, c, dtype)
    t[:, 1] = h.rounded(t.max(-1) - below, dtype)
    kl, statistics = forward([h.place(s, dtype)], [h.place(t, dtype)], 1.0, dtype, eps)
    log_p = h.log_softmax(t)
    p = np.exp(log_p)
    far = p[:, 1] * (s[:, 1] / 8 - s[:, 0] / 8) / STUDENT_TEMPERATURE * 8
    want = (p * np.log(p + eps)).sum(-1) + np.log(c - 1) - far
    h.assert_close(kl[0], want, h.computed(dtype), ulp=2048)
    share = (p * p / (p + eps)).sum(-1) if eps else 0
    h.assert_close(statistics[4, 0], want + share, h.computed(dtype), ulp=2048)


@pytest.mark.parametrize("c", [10, 1025])
def test_rows_without_weight_have_no_gradient(c):
    """Whatever they hold; with the backward pass, of shared rows too, and with the forward pass."""
    dtype, n, k = "float32", 4, 2
    s = [h.draw(i, n, c, dtype) for i in range(k)]
    t = [h.draw(9 + i, n, c, dtype) for i in range(k)]
    s[0][1, 3] = t[1][2, 0] = np.nan
    coefficient = np.ones((k, n), np.float32)
    coefficient[:, 1:3] = 0
    temperature = np.array([2.0, 3.0])
    for shared in (False, True):
        students = [h.place(x, dtype) for x in ([s[0], s[0]] if shared else s)]
        teachers = [h.place(x, dtype) for x in t]
        _, statistics = forward(students, teachers, temperature, dtype, 0.0)
        by_student, by_teacher, by_temperature = backward(
            students, teachers, temperature, dtype, 0.0, statistics, coefficient,
            student_shared=shared,
        )  # fmt: skip
        for gradient in [x for x in by_student + by_teacher if x is not None]:
            np.testing.assert_array_equal(gradient[1:3], 0)
            assert np.isfinite(gradient).all()
            assert (gradient[[0, 3]] != 0).any()
        np.testing.assert_array_equal(by_temperature[:, 1:3], 0)
    out = h.Outputs()
    gradients = [out.new((n, c), dtype) for _ in range(k)]
    students = [h.place(x, dtype) for x in s]
    forward(
        students, teachers, temperature, dtype, 0.0,
        coefficient=coefficient, grad_students=gradients,
    )  # fmt: skip
    out.check()
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[1:3], 0)
        assert np.isfinite(gradient).all()
