"""What torch.compile and meta tensors see of the native ops: the shapes and dtypes of results.

Each repeats the arguments of its schema in csrc/ops.cpp and the contract of the binding there.
Importing this module registers them; it needs the compiled library.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from bmtard.reference import accumulation_dtype


def _rows_of(logits: Tensor) -> int:
    torch._check(logits.dim() == 2, lambda: f"expected [N, C], got {logits.dim()}-d")
    return logits.shape[0]


@register_fake("bmtard::softmax_entropy")
def _(logits: Tensor, temperature: Tensor | None, value: float) -> Any:
    n, acc = _rows_of(logits), accumulation_dtype(logits.dtype)
    return logits.new_empty(n, dtype=acc), logits.new_empty((2, n), dtype=acc)


@register_fake("bmtard::softmax_entropy_backward")
def _(grad, logits, temperature, value, entropy, statistics, wants_logits, wants_temperature):
    n = _rows_of(logits)
    return (
        logits.new_empty((n, logits.shape[1]) if wants_logits else (0,)),
        entropy.new_empty((n,) if wants_temperature else (0,)),
    )


@register_fake("bmtard::bisect_temperature")
def _(logits, target, initial, low, high, per_sample, tolerance, max_iterations, bisection):
    n, acc = _rows_of(logits), accumulation_dtype(logits.dtype)
    shape = (n,) if per_sample else ()
    reals = [logits.new_empty(shape, dtype=acc) for _ in range(3)]
    return (*reals, *(logits.new_empty(shape, dtype=torch.int32) for _ in range(2)))


@register_fake("bmtard::multi_teacher_kl")
def _(students, teachers, temperature, value, student_temperature, eps, with_statistics):
    n, acc = _rows_of(students[0]), accumulation_dtype(students[0].dtype)
    k = max(len(students), len(teachers))
    kl = students[0].new_empty((k, n), dtype=acc)
    return kl, kl.new_empty((5, k, n) if with_statistics else (0,))


@register_fake("bmtard::multi_teacher_kl_with_gradients")
def _(students, teachers, temperature, value, student_temperature, eps, coefficient):
    n, c = _rows_of(students[0]), students[0].shape[1]
    acc = accumulation_dtype(students[0].dtype)
    kl = students[0].new_empty((len(students), n), dtype=acc)
    return kl, [students[0].new_empty((n, c)) for _ in students]


@register_fake("bmtard::multi_teacher_kl_backward")
def _(grad, students, teachers, temperature, value, student_temperature, eps, statistics,
      wants_students, wants_teachers, wants_temperature):  # fmt: skip
    n, c = _rows_of(students[0]), students[0].shape[1]
    k = max(len(students), len(teachers))
    return (
        [students[0].new_empty((n, c)) for _ in range(wants_students.bit_count())],
        [teachers[0].new_empty((n, c)) for _ in range(wants_teachers.bit_count())],
        grad.new_empty((k, n) if wants_temperature else (0, n)),
    )


@register_fake("bmtard::bmtard_loss")
def _(students, teachers, *rest):
    n, c = _rows_of(students[0]), students[0].shape[1]
    wants_grad = rest[-1]
    acc = accumulation_dtype(students[0].dtype)
    return (
        students[0].new_empty((), dtype=acc),
        students[0].new_empty((len(students) if wants_grad else 0, n, c)),
    )


@register_fake("bmtard::pgd_step_")
def _(x_adv, grad, x, step_size, epsilon, low, high, l2):
    torch._check(x_adv.shape == grad.shape == x.shape, lambda: "expected equal shapes")


@register_fake("bmtard::scale_")
def _(buffers, factor):
    torch._check(factor.numel() == 1, lambda: "expected one factor")
