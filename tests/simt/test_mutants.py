"""The tests of this folder fail where a kernel is wrong: each mutant is one fault in the text of a
real kernel, and must be caught, for the reason that is given."""

from __future__ import annotations

import re

import pytest

from . import mutation
from .mutation import Mutant

WRONG = "Not equal to tolerance|Arrays are not equal"
RACE = "race: "
GLOBAL_RACE = "race in global memory"
UNWRITTEN = "before it is written|that its block has not touched"
LEFT = "of a block that threads have left|leaves while others wait"
OUTSIDE = "a kernel wrote (past|before) an output"

ENTROPY = "test_softmax_entropy.py::test_forward_and_backward[{}]"
ENTROPY_SPLIT = "test_clusters.py::test_softmax_entropy[packed-{}-(1, 9001)-float32]"
ENTROPY_MASKED = "test_softmax_entropy.py::test_masked_and_non_finite_rows[{}]"
KL = "test_multi_teacher_kl.py::test_forward_and_backward[{}]"
KL_MASKED = "test_multi_teacher_kl.py::test_masked_and_non_finite_rows[{}]"
KL_SHARED = "test_multi_teacher_kl.py::test_shared_student_or_teacher[{}]"
KL_GRADIENTS = "test_multi_teacher_kl.py::test_gradients_with_the_forward_pass[{}]"
SCALED = "test_scale.py::test_scale[{}-float32]"
SCALED_BY_ONE = "test_scale.py::test_a_factor_of_one_moves_nothing"
KL_SPLIT = "test_clusters.py::test_multi_teacher_kl[True-1e-05-(1, 9001)-float32]"
BISECT = "test_bisect_temperature.py::test_by_sample[{}]"
BISECT_SPLIT = "test_clusters.py::test_bisect_by_sample[0-float32]"
BISECT_BATCH = "test_bisect_temperature.py::test_of_the_batch[0-(37, 10)-float32]"
BISECT_GRID = "test_bisect_temperature.py::test_of_a_batch_for_many_blocks[(331, 100)-float32]"
LOSS = "test_bmtard_loss.py::test_steps_of_a_small_batch_in_one_launch[{}]"
LOSS_BLOCK = LOSS.format("(37, 10)-float32-bisect")
LOSS_CLUSTER = LOSS.format("(128, 200)-float32-bisect")
LOSS_GRID = "test_bmtard_loss.py::test_steps_of_a_large_batch[(40, 1001)-float32-bisect]"
LOSS_GRID_OF_14 = "test_bmtard_loss.py::test_steps_of_a_large_batch[(14, 3000)-float32-bisect]"
LOSS_OF_16 = "test_bmtard_loss.py::test_as_many_teachers_as_there_can_be"
SUMS = "test_bisect_temperature.py::test_the_mean_of_equal_rows[float64]"
LINF = "test_pgd_step.py::test_linf[{}]"
L2 = "test_pgd_step.py::test_l2[{}]"
ROWS_FAR_APART = "test_layouts.py::test_rows_far_apart[{}]"


def rows(name: str, old: str, new: str, tests: str, caught: str, **more) -> Mutant:
    """Of rows.cuh, seen by softmax_entropy."""
    settings = {"unit": "cuda/softmax_entropy.cu", **more}
    return Mutant(name, "cuda/rows.cuh", old, new, tests, caught, **settings)


def entropy(name: str, old: str, new: str, tests: str, caught: str, **more) -> Mutant:
    return Mutant(name, "cuda/softmax_entropy.cu", old, new, tests, caught, **more)


def kl(name: str, old: str, new: str, tests: str, caught: str, **more) -> Mutant:
    return Mutant(name, "cuda/multi_teacher_kl.cu", old, new, tests, caught, **more)


def scale(name: str, old: str, new: str, tests: str, caught: str, **more) -> Mutant:
    return Mutant(name, "cuda/scale.cu", old, new, tests, caught, **more)


def pgd(name: str, old: str, new: str, tests: str, caught: str, **more) -> Mutant:
    return Mutant(name, "cuda/pgd_step.cu", old, new, tests, caught, **more)


def batch(name: str, old: str, new: str, tests: str, caught: str, **more) -> Mutant:
    """Of batch.cuh, seen by bisect_temperature."""
    settings = {"unit": "cuda/bisect_temperature.cu", **more}
    return Mutant(name, "cuda/batch.cuh", old, new, tests, caught, **settings)


def bisect(name: str, old: str, new: str, tests: str, caught: str, **more) -> Mutant:
    return Mutant(name, "cuda/bisect_temperature.cu", old, new, tests, caught, **more)


def loss(name: str, old: str, new: str, tests: str, caught: str, **more) -> Mutant:
    return Mutant(name, "cuda/bmtard_loss.cu", old, new, tests, caught, **more)


IN_LOSS = {"unit": "cuda/bmtard_loss.cu"}
IN_KL = {"unit": "cuda/multi_teacher_kl.cu"}
IN_BISECT = {"unit": "cuda/bisect_temperature.cu"}

REDUCTIONS = [
    rows(
        "block-barrier",
        "    simt::block_barrier();\n    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n"
        "      values[i] = scratch",
        "    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n      values[i] = scratch",
        ENTROPY.format("1025-float32"),
        f"{RACE}|before it is written",
    ),
    rows(
        "scratch-by-turns",
        "turn_ ^= 1;\n    const int base",
        "const int base",
        BISECT.format("0-1025-float32"),
        RACE,
        unit="cuda/bisect_temperature.cu",
    ),
    rows(
        "scratch-half-as-large",
        "scratch, 2 * kWarps * n",
        "scratch, kWarps * n",
        ENTROPY.format("1025-float32"),
        "of a shared array of",
    ),
    rows(
        "scratch-index",
        "thread / simt::kWarp * n + i, values",
        "thread / simt::kWarp + i, values",
        ENTROPY.format("1025-float32"),
        f"{RACE}|before it is written|{WRONG}",
    ),
    rows(
        "scratch-writer",
        "if (thread % simt::kWarp == 0) {",
        "{",
        ENTROPY.format("1025-float32"),
        RACE,
    ),
    rows(
        "block-drops-a-warp",
        "warp < kWarps;",
        "warp < kWarps - 1;",
        ENTROPY.format("1025-float32"),
        WRONG,
    ),
    rows(
        "block-shuffle-distance",
        "int distance = simt::kWarp / 2;",
        "int distance = simt::kWarp / 4;",
        ENTROPY.format("1025-float32"),
        WRONG,
    ),
    rows(
        "block-shuffle-mask",
        "simt::shuffle_xor(simt::kFullWarp, values",
        "simt::shuffle_xor(simt::kFullWarp >> 1, values",
        ENTROPY.format("1025-float32"),
        "leaves (it )?out",
    ),
    rows(
        "group-shuffle-distance",
        "int distance = Shape::kLanes / 2;",
        "int distance = Shape::kLanes / 4;",
        ENTROPY.format("10-float32"),
        WRONG,
    ),
    rows(
        "group-shuffle-ends-early",
        "Shape::kLanes / 2; distance > 0;",
        "Shape::kLanes / 2; distance > 1;",
        ENTROPY.format("33-float64"),
        WRONG,
    ),
    rows(
        "group-shuffle-too-far",
        "int distance = Shape::kLanes / 2;",
        "int distance = Shape::kLanes;",
        ENTROPY.format("10-float32"),
        "which the mask leaves out",
    ),
    rows(
        "group-mask-of-the-first",
        "(simt::kWarp - Shape::kLanes)) << first;",
        "(simt::kWarp - Shape::kLanes));",
        ENTROPY.format("10-float32"),
        "leaves (it )?out",
    ),
    rows(
        "group-mask-of-the-warp",
        "(simt::kFullWarp >> (simt::kWarp - Shape::kLanes)) << first;",
        "simt::kFullWarp;",
        ENTROPY.format("10-float32"),
        "waits for it|a lane that has left|elsewhere|another collective|deadlock",
    ),
    rows(
        "maximum-or-minimum",
        "return b > a ? b : a;",
        "return b < a ? b : a;",
        ENTROPY.format("10-float32"),
        WRONG,
    ),
]

ROWS = [
    rows(
        "load-tail",
        "j < classes ? simt::widen(simt::load(row + j)) : -std::numeric_limits<R>::infinity();",
        "simt::widen(simt::load(row + j));",
        ENTROPY.format("10-float32"),
        WRONG,
    ),
    rows(
        "load-tail-by-one",
        "          j < classes ? simt::widen",
        "          j <= classes ? simt::widen",
        ENTROPY.format("10-float32"),
        WRONG,
    ),
    rows(
        "store-tail",
        "if (j < classes) simt::store",
        "simt::store",
        ENTROPY.format("10-float32"),
        f"{OUTSIDE}|{WRONG}|{GLOBAL_RACE}",
    ),
    rows(
        "store-tail-by-one",
        "if (j < classes) simt::store",
        "if (j <= classes) simt::store",
        ENTROPY.format("10-float32"),
        f"{OUTSIDE}|{WRONG}|{GLOBAL_RACE}",
    ),
    rows(
        "packed-load-over-the-tail",
        "if (packed && first + Shape::kWidth <= classes) {\n    const auto pack",
        "if (packed && first < classes) {\n    const auto pack",
        "test_layouts.py::test_softmax_entropy[0-aligned-10-float32]",
        WRONG,
    ),
    rows(
        "packed-store-over-the-tail",
        "if (packed && first + Shape::kWidth <= classes) {\n    Pack",
        "if (packed && first < classes) {\n    Pack",
        # Only where the last tile of all is a part of one can a packed store go too far.
        LINF.format("0-(3, 10)-float32"),
        OUTSIDE,
        unit="cuda/pgd_step.cu",
    ),
    rows(
        "resident-tail-tile",
        "if (tile * Shape::kSpan < classes) visit(tile);",
        "if ((tile + 1) * Shape::kSpan <= classes) visit(tile);",
        ENTROPY.format("100-float32"),
        WRONG,
    ),
    rows(
        "streamed-tail-tile",
        "return ((classes + Shape::kSpan - 1) / Shape::kSpan",
        "return (classes / Shape::kSpan",
        ENTROPY.format("1025-float32"),
        WRONG,
    ),
    rows(
        "small-up-to-33",
        "classes <= Small::kMaxClasses",
        "classes <= Small::kMaxClasses + 1",
        ENTROPY.format("33-float32"),
        WRONG,
    ),
    rows(
        "medium-up-to-1025",
        "classes <= Medium::kMaxClasses",
        "classes <= Medium::kMaxClasses + 1",
        ENTROPY.format("1025-bfloat16"),
        WRONG,
    ),
    rows(
        "medium-up-to-513-doubles",
        "classes <= Medium::kMaxClasses",
        "classes <= Medium::kMaxClasses + 1",
        ENTROPY.format("513-float64"),
        WRONG,
    ),
    rows(
        "packed-whatever-the-first-row",
        "reinterpret_cast<uintptr_t>(data) % 16 == 0 && ",
        "",
        "test_layouts.py::test_softmax_entropy[0-shifted-10-float32]",
        "misaligned",
    ),
    rows(
        "packed-whatever-the-stride",
        " && row_stride * size % 16 == 0",
        "",
        ENTROPY.format("10-float32"),
        "misaligned",
    ),
    rows(
        "packed-by-8-bytes",
        "row_stride * size % 16 == 0",
        "row_stride * size % 8 == 0",
        "test_layouts.py::test_softmax_entropy[0-strided-1102-bfloat16]",
        "misaligned",
    ),
    rows(
        "packed-by-the-wrong-size",
        "kFloat32 ? 4 : 2;",
        "kFloat32 ? 4 : 4;",
        "test_layouts.py::test_softmax_entropy[0-strided-1102-bfloat16]",
        "misaligned",
    ),
    rows(
        "row-offset-of-32-bits",
        "+ row * matrix.row_stride;",
        "+ static_cast<int32_t>(row * matrix.row_stride);",
        ROWS_FAR_APART.format("4294967296-10"),
        WRONG,
    ),
    rows(
        "row-stride-of-32-bits",
        "+ row * matrix.row_stride;",
        "+ row * static_cast<uint32_t>(matrix.row_stride);",
        ROWS_FAR_APART.format("4294967296-100"),
        WRONG,
    ),
    rows(
        "row-product-of-32-bits",
        "+ row * matrix.row_stride;",
        "+ static_cast<uint32_t>(row * matrix.row_stride);",
        ROWS_FAR_APART.format("4294967296-1100"),
        WRONG,
    ),
    rows(
        "one-row-a-block",
        "return static_cast<int64_t>(block) * Shape::kRows + number();",
        "return static_cast<int64_t>(block) * Shape::kRows;",
        ENTROPY.format("10-float32"),
        GLOBAL_RACE,
    ),
]

STATISTICS = [
    rows(
        "no-maximum-in-the-exponent",
        "accumulate(sums, (values.value[i] - max) * inverse_temperature);",
        "accumulate(sums, values.value[i] * inverse_temperature);",
        "test_softmax_entropy.py::test_large_logits_keep_their_precision[32]",
        WRONG,
    ),
    rows(
        "online-maximum-never-shifts",
        "sums = shifted(sums, (seen - top) * inverse_temperature);",
        "",
        ENTROPY.format("3000-float32"),
        WRONG,
    ),
    rows(
        "online-parts-are-not-aligned",
        "sums = shifted(sums, (seen - max) * inverse_temperature);",
        "",
        ENTROPY.format("1025-float32"),
        WRONG,
    ),
    rows(
        "masked-so-far",
        "const R base = seen == kNothing ? R(0) : seen;",
        "const R base = seen;",
        ENTROPY_MASKED.format("1100-float32"),
        WRONG,
    ),
    Mutant(
        "exponent-without-a-floor",
        "core/softmax_entropy.h",
        "  u = floor_exponent(u);\n  const T e = exp(u);\n  sums.s0 = sums.s0 + e;",
        "  const T e = exp(u);\n  sums.s0 = sums.s0 + e;",
        ENTROPY_MASKED.format("10-float32"),
        WRONG,
        unit="cuda/softmax_entropy.cu",
    ),
    Mutant(
        "gradient-without-a-floor",
        "core/softmax_entropy.h",
        "  log_p = floor_exponent(log_p);\n  return",
        "  return",
        ENTROPY_MASKED.format("10-float32"),
        WRONG,
        unit="cuda/softmax_entropy.cu",
    ),
    Mutant(
        "nan-below-the-floor",
        "core/common.h",
        "return select(u < T(kExpFloor), T(kExpFloor), u);",
        "return select(u > T(kExpFloor), u, T(kExpFloor));",
        ENTROPY_MASKED.format("10-float32"),
        "assert",
        unit="cuda/softmax_entropy.cu",
    ),
    Mutant(
        "nothing-times-infinity",
        "core/multi_teacher_kl.h",
        "return select(p > T(0), p * value, p);",
        "return p * value;",
        KL_MASKED.format("0.0-10-float32"),
        WRONG,
        unit="cuda/multi_teacher_kl.cu",
    ),
]

SOFTMAX_ENTROPY = [
    entropy(
        "entropy-past-the-last-row",
        "  if (row >= args.rows) return;\n  const int classes = static_cast<int>(args.classes);\n"
        "  const R inverse = 1 / temperature_of<R>(args, row);\n  const Row",
        "  const int classes = static_cast<int>(args.classes);\n"
        "  const R inverse = 1 / temperature_of<R>(args, row);\n  const Row",
        ENTROPY.format("10-float32"),
        f"{OUTSIDE}|{WRONG}|{GLOBAL_RACE}",
    ),
    entropy(
        "entropy-backward-past-the-last-row",
        "  if (row >= args.rows) return;\n  const int classes = static_cast<int>(args.classes);\n"
        "  const R inverse = 1 / temperature_of<R>(args, row);\n  const R entropy",
        "  const int classes = static_cast<int>(args.classes);\n"
        "  const R inverse = 1 / temperature_of<R>(args, row);\n  const R entropy",
        ENTROPY.format("10-float32"),
        OUTSIDE,
    ),
    entropy(
        "entropy-last-row-missing",
        "if (row >= args.rows) return;",
        "if (row + 1 >= args.rows) return;",
        ENTROPY.format("10-float32"),
        WRONG,
        count=2,
    ),
    entropy(
        "entropy-temperature-stride",
        "row * args.temperature_stride)",
        "row)",
        "test_softmax_entropy.py::test_scalar_arguments_and_missing_outputs[10-float32]",
        WRONG,
    ),
    entropy(
        "entropy-gradient-stride",
        "row * args.grad_entropy_stride)",
        "row)",
        ENTROPY_MASKED.format("10-float32")
        + " test_softmax_entropy.py::test_large_logits_keep_their_precision[32]",
        WRONG,
    ),
    entropy(
        "entropy-packed-whatever-the-gradient",
        "(!args.grad_logits || packable(args.dtype, args.grad_logits, args.classes));",
        "true;",
        "test_layouts.py::test_softmax_entropy[0-aligned-10-float32]",
        "misaligned",
    ),
    entropy(
        "entropy-variance-of-one-lane",
        "    group.sum(variance);\n",
        "",
        ENTROPY.format("10-float32"),
        WRONG,
    ),
]

MULTI_TEACHER_KL = [
    kl(
        "kl-past-the-last-row",
        "if (n >= args.rows) return;",
        "if (false) return;",
        KL.format("0.0-10-float32"),
        f"{OUTSIDE}|{WRONG}|{GLOBAL_RACE}",
        count=2,
    ),
    kl(
        "kl-rows-of-the-next-teacher",
        "group.number(group.block_id() % blocks_a_teacher);",
        "group.number(group.block_id());",
        KL.format("0.0-10-float32"),
        WRONG,
        count=2,
    ),
    kl(
        "kl-one-cache-for-two-rows",
        "place * cached_values<Shape>(classes),",
        "0 * place,",
        KL.format("1e-05-1025-bfloat16"),
        WRONG,
    ),
    kl(
        "kl-cache-for-one-row",
        "twice ? 2 : 0);",
        "twice ? 1 : 0);",
        KL.format("1e-05-1025-bfloat16"),
        "of a shared array of",
    ),
    rows(
        "cache-without-its-tail",
        "return tiles_of<Shape>(classes, Shape::kSplit ? simt::cluster_blocks() : 1) "
        "* Shape::kSpan;",
        "return classes;",
        KL.format("1e-05-1025-bfloat16"),
        f"{RACE}|misaligned|of a shared array of",
        unit="cuda/multi_teacher_kl.cu",
    ),
    rows(
        "cache-of-the-first-lane",
        "offset_(offset + lane * Shape::kWidth - first_tile",
        "offset_(offset - first_tile",
        KL.format("1e-05-1025-bfloat16"),
        RACE,
        unit="cuda/multi_teacher_kl.cu",
    ),
    kl(
        "kl-packed-whatever-the-teacher",
        "packed && packable(args.dtype, args.student[k]) && packable(args.dtype, args.teacher[k]);",
        "packed && packable(args.dtype, args.student[k]);",
        "test_layouts.py::test_multi_teacher_kl[False-strided-3-1102-float32]",
        "misaligned",
    ),
    kl(
        "kl-packed-whatever-the-gradient",
        "packed = packed && packable(args.dtype, gradient, args.classes);",
        "",
        "test_layouts.py::test_multi_teacher_kl[False-strided-None-10-float32]",
        "misaligned",
    ),
    kl(
        "kl-gradient-of-the-last-teacher",
        "          if (to) store_tile<Streamed>(to, classes, tile, group.lane, packed, grad_s);\n"
        "          grad_s = {};",
        "          if (to) store_tile<Streamed>(to, classes, tile, group.lane, packed, grad_s);",
        KL_SHARED.format("0-shared1-10-float32"),
        WRONG,
    ),
    kl(
        "kl-shared-gradient-too-early",
        "const bool last = k + 1 == args.teachers;",
        "const bool last = true;",
        KL_SHARED.format("0-shared0-10-float32"),
        WRONG,
    ),
    kl(
        "kl-temperature-without-a-guard",
        "by_temperature += probability > R(0) ? by_scaled * p.scaled(teacher) : by_scaled;",
        "by_temperature += by_scaled * p.scaled(teacher);",
        KL_MASKED.format("0.0-10-float32"),
        WRONG,
    ),
    kl(
        "kl-coefficient-strides-swapped",
        "k * args.coefficient_teacher_stride + n * args.coefficient_row_stride",
        "n * args.coefficient_teacher_stride + k * args.coefficient_row_stride",
        KL.format("0.0-10-float32"),
        WRONG,
    ),
]

GRADIENTS_WITH_KL = [
    kl(
        "forward-coefficient-of-another-teacher",
        "k * args.coefficient_teacher_stride +\n",
        "n + k * 0 * args.coefficient_teacher_stride +\n",
        KL_GRADIENTS.format("0.0-33-float32"),
        WRONG,
    ),
    kl(
        "forward-gradient-of-another-row",
        "static_cast<T*>(args.grad_student[k]) + n * args.classes;",
        "static_cast<T*>(args.grad_student[k]) + (n ^ 1) * args.classes;",
        KL_GRADIENTS.format("0.0-33-float32"),
        f"{WRONG}|{GLOBAL_RACE}|{OUTSIDE}",
    ),
    kl(
        "forward-gradient-not-asked-for-alignment",
        "packed = packed && packable(args.dtype, args.grad_student[k], args.classes);",
        "",
        "test_multi_teacher_kl.py::test_an_unaligned_gradient_with_the_forward_pass",
        "misaligned",
    ),
    kl(
        "forward-without-student-temperature",
        "found.q.inverse_temperature;",
        "R(1);",
        KL_GRADIENTS.format("0.0-33-float32"),
        WRONG,
    ),
]

SCALE = [
    scale("scale-always", "if (factor == R(1)) return;", "", SCALED_BY_ONE, "assert"),
    scale(
        "scale-never", "if (factor == R(1)) return;", "return;", SCALED.format("-2.5-0-5"), WRONG
    ),
    scale(
        "scale-wrong-buffer",
        "simt::block_id() / blocks_a_buffer",
        "simt::block_id() % blocks_a_buffer",
        SCALED.format("-2.5-0-4097"),
        f"{WRONG}|{GLOBAL_RACE}|{OUTSIDE}",
    ),
    scale(
        "scale-without-tail",
        "left < Shape::kMaxClasses ? static_cast<int>(left) : Shape::kMaxClasses",
        "Shape::kMaxClasses",
        SCALED.format("-2.5-0-5"),
        f"{WRONG}|{OUTSIDE}",
    ),
    scale(
        "scale-without-alignment",
        "packed = packed && packable(args.dtype, args.data[i], 0);",
        "",
        SCALED.format("-2.5-1-5"),
        "misaligned",
    ),
]

PGD_STEP = [
    pgd(
        "linf-last-chunk",
        "left < Shape::kMaxClasses ? static_cast<int>(left) : Shape::kMaxClasses;",
        "Shape::kMaxClasses; (void)left;",
        LINF.format("0-(3, 10)-float32"),
        f"{OUTSIDE}|{WRONG}",
    ),
    pgd(
        "linf-chunk-by-one",
        "static_cast<int64_t>(simt::block_id()) * Shape::kMaxClasses;",
        "static_cast<int64_t>(simt::block_id()) * (Shape::kMaxClasses - 1);",
        LINF.format("1-(1, 4097)-float32"),
        f"{WRONG}|{GLOBAL_RACE}",
    ),
    pgd(
        "l2-tail-in-the-norm",
        "if (class_of<Shape>(tile, i, group.lane, packed) >= size) continue;",
        "",
        L2.format("0.05-(3, 10)-float32"),
        WRONG,
    ),
    pgd(
        "l2-step-without-a-direction",
        "moves ? values.value[i] + step * gradient.value[i] : values.value[i];",
        "values.value[i] + step * gradient.value[i];",
        "test_pgd_step.py::test_l2_makes_no_step_without_a_direction[float32]",
        WRONG,
    ),
    pgd(
        "l2-norm-without-a-direction",
        "moves ? sums[1] + step * (2 * sums[2] + step * sums[0]) : sums[1];",
        "sums[1] + step * (2 * sums[2] + step * sums[0]);",
        "test_pgd_step.py::test_l2_projects_without_a_direction[float32]",
        WRONG,
    ),
    pgd(
        "l2-norm-of-one-thread",
        "  group.sum(sums);\n  const R step",
        "  const R step",
        L2.format("0.05-(2, 3072)-float32"),
        WRONG,
    ),
    pgd(
        "pgd-packed-whatever-the-gradient",
        "packable(args.dtype, args.grad, stride) &&",
        "",
        "test_layouts.py::test_pgd_step[40-False-grad-float32]",
        "misaligned",
    ),
    pgd(
        "l2-packed-whatever-the-sample",
        "const int64_t stride = args.l2 ? args.sample_size : 0;",
        "const int64_t stride = 0;",
        L2.format("0.05-(3, 10)-float32"),
        "misaligned",
    ),
    Mutant(
        "step-by-nan",
        "core/pgd_step.h",
        "select(grad > T(0), step_size, select(grad < T(0), -step_size, T(0)))",
        "select(grad > T(0), step_size, -step_size)",
        LINF.format("0-(3, 10)-float32"),
        WRONG,
        unit="cuda/pgd_step.cu",
    ),
    Mutant(
        "step-along-nothing",
        "core/pgd_step.h",
        "is_finite(norm) && norm > real(0) ?",
        "is_finite(norm) ?",
        "test_pgd_step.py::test_l2_makes_no_step_without_a_direction[float32]",
        WRONG,
        unit="cuda/pgd_step.cu",
    ),
]

CLUSTERS = [
    rows(
        "cluster-barrier",
        "    simt::cluster_barrier();\n    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n"
        "      values[i] = scratch.get_from",
        "    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n      values[i] = scratch.get_from",
        ENTROPY_SPLIT.format(2),
        f"{RACE}|{UNWRITTEN}",
    ),
    rows(
        "cluster-barrier-of-the-block",
        "    simt::cluster_barrier();\n    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n"
        "      values[i] = scratch.get_from",
        "    simt::block_barrier();\n    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n"
        "      values[i] = scratch.get_from",
        ENTROPY_SPLIT.format(2),
        f"{RACE}|{UNWRITTEN}",
    ),
    rows(
        "cluster-scratch-by-turns",
        "turn_ ^= 1;\n    if (simt::thread_id() == 0) {",
        "if (simt::thread_id() == 0) {",
        BISECT_SPLIT,
        RACE,
        **IN_BISECT,
    ),
    rows(
        "cluster-scratch-half-as-large",
        "BMTARD_SHARED(V, scratch, 2 * n);",
        "BMTARD_SHARED(V, scratch, n);",
        ENTROPY_SPLIT.format(2),
        "of a shared array of",
    ),
    rows(
        "cluster-scratch-writer",
        "    if (simt::thread_id() == 0) {\n      BMTARD_UNROLL\n"
        "      for (int i = 0; i < n; ++i) scratch.set(turn_",
        "    {\n      BMTARD_UNROLL\n      for (int i = 0; i < n; ++i) scratch.set(turn_",
        ENTROPY_SPLIT.format(2),
        RACE,
    ),
    rows(
        "cluster-drops-a-block",
        "rank = 1; rank < simt::cluster_blocks();",
        "rank = 1; rank < simt::cluster_blocks() - 1;",
        ENTROPY_SPLIT.format(2),
        WRONG,
    ),
    rows(
        "cluster-of-one-more",
        "rank = 1; rank < simt::cluster_blocks();",
        "rank = 1; rank <= simt::cluster_blocks();",
        ENTROPY_SPLIT.format(8),
        "reads from block . of a cluster",
    ),
    rows(
        "cluster-leaves-too-early",
        "  BMTARD_DEVICE void leave() const {\n    if constexpr (Shape::kSplit) {\n"
        "      if (simt::cluster_blocks() > 1) simt::cluster_barrier();\n    }\n  }",
        "  BMTARD_DEVICE void leave() const {}",
        ENTROPY_SPLIT.format(2),
        LEFT,
    ),
    # All of them write the same, so only the race shows.
    rows(
        "cluster-writes-in-every-block",
        "return lane == 0 && simt::cluster_rank() == 0;",
        "return lane == 0;",
        ENTROPY_SPLIT.format(2),
        GLOBAL_RACE,
    ),
    rows(
        "cluster-writes-in-every-lane",
        "return lane == 0 && simt::cluster_rank() == 0;\n    return lane == 0;",
        "return simt::cluster_rank() == 0;\n    return lane == 0;",
        ENTROPY_SPLIT.format(2),
        GLOBAL_RACE,
    ),
    rows(
        "group-writes-in-every-lane",
        "simt::cluster_rank() == 0;\n    return lane == 0;",
        "simt::cluster_rank() == 0;\n    return true;",
        ENTROPY.format("10-float32"),
        GLOBAL_RACE,
    ),
    rows(
        "cluster-rows-by-block",
        "return simt::block_id() / simt::cluster_blocks();",
        "return simt::block_id();",
        "test_clusters.py::test_softmax_entropy[packed-2-(3, 8192)-float32]",
        f"{LEFT}|other threads have left|{WRONG}|a grid",
    ),
    rows(
        "cluster-first-tile",
        "return simt::cluster_rank() * tiles_of",
        "return 0 * tiles_of",
        ENTROPY_SPLIT.format(2),
        WRONG,
    ),
    rows(
        "cluster-tail-tile",
        "/ Shape::kSpan + blocks - 1) / blocks;",
        "/ Shape::kSpan) / blocks;",
        ENTROPY_SPLIT.format(2),
        WRONG,
    ),
    rows(
        "cluster-cache-from-the-first-tile",
        "- first_tile<Shape>(classes) * Shape::kSpan),",
        "),",
        KL_SPLIT,
        "of a shared array of",
        **IN_KL,
    ),
]

BATCHES = [
    batch(
        "team-grid-barrier",
        "        simt::grid_barrier();\n",
        "",
        BISECT_GRID,
        f"{GLOBAL_RACE}",
    ),
    batch(
        "team-grid-barrier-of-the-block",
        "simt::grid_barrier();",
        "simt::block_barrier();",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    batch(
        "team-cluster-barrier",
        "        simt::cluster_barrier();\n        add_up_cluster",
        "        add_up_cluster",
        LOSS_CLUSTER,
        f"{RACE}|{UNWRITTEN}",
        **IN_LOSS,
    ),
    batch(
        "team-cluster-barrier-of-the-block",
        "        simt::cluster_barrier();\n        add_up_cluster",
        "        simt::block_barrier();\n        add_up_cluster",
        LOSS_CLUSTER,
        f"{RACE}|{UNWRITTEN}",
        **IN_LOSS,
    ),
    batch(
        "team-block-barrier",
        "    simt::block_barrier();\n  }\n\n  BMTARD_DEVICE double total",
        "  }\n\n  BMTARD_DEVICE double total",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
        **IN_LOSS,
    ),
    batch(
        "team-leaves-too-early",
        "if (in_cluster()) simt::cluster_barrier();",
        "",
        LOSS_CLUSTER,
        LEFT,
        **IN_LOSS,
    ),
    batch("team-slots-by-turns", "turn_ ^= 1;", "", BISECT_GRID, GLOBAL_RACE),
    batch("team-cluster-by-turns", "turn_ ^= 1;", "", LOSS_CLUSTER, RACE, **IN_LOSS),
    batch(
        "team-slots-of-the-last-round",
        "simt::load(slot(from, set) + i);",
        "simt::load(memory_.slots + (((turn_ ^ 1) * kMaxSlots + from) * sets_ + set) * kSums + i);",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    batch(
        "team-slots-of-one-set",
        "(turn_ * kMaxSlots + block) * sets_ + set) * kSums;",
        "(turn_ * kMaxSlots + block) * sets_) * kSums;",
        LOSS_GRID,
        f"{WRONG}|{GLOBAL_RACE}",
        **IN_LOSS,
    ),
    batch(
        "team-every-thread-gives",
        "    block_.reduce(sums, Add{});\n    if (simt::thread_id() != 0) return;",
        "    block_.reduce(sums, Add{});",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    batch(
        "team-every-thread-adds-up",
        "if (simt::thread_id() != 0) continue;",
        "",
        BISECT_GRID,
        RACE,
    ),
    batch(
        "team-every-lane-gives",
        "    if (group.lane != 0) {\n      BMTARD_UNROLL\n"
        "      for (int i = 0; i < kSums; ++i) sums[i] = 0;\n    }\n",
        "",
        BISECT_BATCH,
        f"{WRONG}|assert",
    ),
    batch(
        "team-drops-a-block",
        "from < simt::grid_blocks(); from += threads",
        "from < simt::grid_blocks() - 1; from += threads",
        BISECT_GRID,
        f"{WRONG}|assert",
    ),
    batch(
        "sums-in-single-precision",
        "memory_.totals.set(set * kSums + i, sums[i]);",
        "memory_.totals.set(set * kSums + i, static_cast<float>(sums[i]));",
        SUMS,
        WRONG,
        count=2,
    ),
    batch(
        "share-past-the-last-row",
        "end_(first_ + rows_ < rows ? first_ + rows_ : rows)",
        "end_(first_ + rows_)",
        LOSS_GRID_OF_14,
        f"{WRONG}|{GLOBAL_RACE}|{OUTSIDE}|workspace",
        **IN_LOSS,
    ),
    batch(
        "share-without-the-last-rows",
        "rows_((rows + simt::grid_blocks() - 1) / simt::grid_blocks())",
        "rows_(rows / simt::grid_blocks())",
        LOSS_GRID_OF_14,
        WRONG,
        **IN_LOSS,
    ),
    batch(
        "share-one-place-for-all-matrices",
        "(matrix * rows_ + n - first_) *",
        "(n - first_) *",
        LOSS_CLUSTER,
        WRONG,
        **IN_LOSS,
    ),
    batch(
        "share-one-matrix-more",
        "matrix >= cached_matrices_ ?",
        "matrix > cached_matrices_ ?",
        LOSS_GRID,
        "of a shared array of",
        **IN_LOSS,
    ),
    bisect(
        "bisect-first-barrier",
        "  simt::block_barrier();\n  for (int32_t phase",
        "  for (int32_t phase",
        BISECT_BATCH,
        f"{RACE}|{UNWRITTEN}",
    ),
    bisect(
        "bisect-barrier-of-a-round",
        "    simt::block_barrier();\n  }\n  if (decides && simt::block_id() == 0)",
        "  }\n  if (decides && simt::block_id() == 0)",
        BISECT_BATCH,
        f"{RACE}|{UNWRITTEN}",
    ),
    bisect(
        "bisect-every-block-writes",
        "if (decides && simt::block_id() == 0) {",
        "if (decides) {",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    bisect(
        "bisect-every-thread-writes",
        "if (decides && simt::block_id() == 0) {",
        "if (simt::block_id() == 0) {",
        BISECT_GRID,
        RACE,
    ),
    bisect(
        "bisect-past-the-last-row",
        "if (n >= args.rows) return;",
        "",
        BISECT.format("0-10-float32"),
        f"{OUTSIDE}|{WRONG}|assert",
    ),
]

LOSSES = [
    loss(
        "loss-first-barrier",
        "    searching.set(thread, true);\n  }\n  simt::block_barrier();",
        "    searching.set(thread, true);\n  }",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
    ),
    loss(
        "loss-barrier-of-a-round",
        "next.set(0, decided);\n    }\n    simt::block_barrier();",
        "next.set(0, decided);\n    }",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
    ),
    loss(
        "loss-barrier-before-it-settles",
        "stopped = simt::any(simt::kFullWarp, stopped);\n  simt::block_barrier();",
        "stopped = simt::any(simt::kFullWarp, stopped);",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
    ),
    loss(
        "loss-barrier-after-it-settles",
        "simt::block_id() == 0);\n  simt::block_barrier();",
        "simt::block_id() == 0);",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
    ),
    loss(
        "loss-every-block-writes-the-state",
        "settle<R>(args, board, step, stopped, simt::block_id() == 0);",
        "settle<R>(args, board, step, stopped, true);",
        LOSS_CLUSTER,
        GLOBAL_RACE,
    ),
    loss(
        "loss-every-thread-settles",
        "if (thread == 0) settle<R>",
        "settle<R>",
        LOSS_BLOCK,
        RACE,
    ),
    loss(
        "loss-every-lane-leaves-statistics",
        "    if (group.lane == 0) {\n      R* const to",
        "    {\n      R* const to",
        LOSS_BLOCK,
        GLOBAL_RACE,
    ),
    loss(
        "loss-one-teacher-more",
        "const bool owns = thread < args.teachers;",
        "const bool owns = thread <= args.teachers;",
        LOSS_OF_16,
        "of a shared array of",
    ),
    loss(
        "loss-highest-of-a-few",
        "int distance = simt::kWarp / 2; distance > 0;",
        "int distance = simt::kWarp / 8; distance > 0;",
        LOSS_OF_16,
        WRONG,
    ),
    loss(
        "loss-shuffle-mask",
        "simt::shuffle_xor(simt::kFullWarp, target",
        "simt::shuffle_xor(0xffffu, target",
        LOSS_BLOCK,
        "leaves (it )?out",
    ),
    loss(
        "loss-vote-mask",
        "return simt::any(simt::kFullWarp, open)",
        "return simt::any(0xffffu, open)",
        LOSS_BLOCK,
        "leaves (it )?out",
    ),
    loss(
        "loss-votes-of-all-threads",
        "if (thread < simt::kWarp) stopped = simt::any",
        "if (owns) stopped = simt::any",
        LOSS_BLOCK,
        "deadlock|waits? |another",
    ),
    loss(
        "loss-statistics-swapped",
        "simt::load(from + 2 * plane), simt::load(from + 3 * plane)",
        "simt::load(from + 3 * plane), simt::load(from + 2 * plane)",
        LOSS_BLOCK,
        WRONG,
    ),
    loss(
        "loss-statistics-among-the-slots",
        "slots + 2 * kMaxSlots * args.teachers * kSums",
        "slots",
        LOSS_GRID,
        f"{GLOBAL_RACE}|{WRONG}",
    ),
    batch(
        "loss-workspace-half-as-large",
        "return 2 * kMaxSlots * sets * kSums;",
        "return kMaxSlots * sets * kSums;",
        LOSS_GRID,
        "past its workspace",
        **IN_LOSS,
    ),
    loss(
        "loss-cache-that-was-never-filled",
        "entropy_pass(args.teacher[k], k, phase == kTarget,",
        "entropy_pass(args.teacher[k], k, false,",
        LOSS_CLUSTER,
        "before it is written",
    ),
    loss(
        "loss-packed-whatever-the-gradient",
        "(!args.grad_student[k] || packable(args.dtype, args.grad_student[k], args.classes));",
        "true;",
        "test_layouts.py::test_bmtard_loss[shifted-0-10-float32]",
        "misaligned",
    ),
    Mutant(
        "kl-online-maxima-of-one-thread",
        "cuda/kl_row.cuh",
        "  group.reduce(maxima, Max{});\n",
        "",
        KL.format("0.0-1025-float32"),
        WRONG,
        **IN_KL,
    ),
    Mutant(
        "kl-online-nothing-seen-yet",
        "cuda/kl_row.cuh",
        "student_max == new_student_max ? R(0) : (student_max",
        "(student_max",
        "test_multi_teacher_kl.py::test_a_part_of_a_row_is_masked[3000-float32]",
        "array.*nan, nan",
        **IN_KL,
    ),
    Mutant(
        "kl-online-infinite-without-weight",
        "cuda/kl_row.cuh",
        "difference = weight == R(0) ? R(0) : scale",
        "difference = scale",
        KL.format("0.0-1025-float32") + " " + KL_MASKED.format("0.0-1100-float32"),
        WRONG,
        **IN_KL,
    ),
    loss(
        "loss-scale-in-the-gradients",
        "weight * args.gradient_scale",
        "weight * args.scale",
        "test_bmtard_loss.py::test_gradients_have_a_scale_of_their_own[float32]",
        WRONG,
    ),
]

MUTANTS = [
    *REDUCTIONS,
    *ROWS,
    *STATISTICS,
    *SOFTMAX_ENTROPY,
    *MULTI_TEACHER_KL,
    *GRADIENTS_WITH_KL,
    *SCALE,
    *PGD_STEP,
    *CLUSTERS,
    *BATCHES,
    *LOSSES,
]


def unmutated() -> dict[str, str]:
    """By .cu file, all tests that its mutants name."""
    tests: dict[str, set[str]] = {}
    for mutant in MUTANTS:
        tests.setdefault(mutant.source, set()).update(mutation.tests_of(mutant.tests))
    return {source: " ".join(sorted(names)) for source, names in sorted(tests.items())}


@pytest.mark.parametrize(("source", "tests"), unmutated().items(), ids=unmutated())
def test_without_a_fault_they_pass(source, tests):
    """Built the same way: what a mutant does is due to its edit."""
    module = mutation.build(source, f"unmutated-{source.rsplit('/', 1)[-1]}")
    status, output = mutation.run_tests(module, tests)
    assert status == 0, output


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant):
    module = mutation.build(mutant.source, mutant.name, mutant)
    status, output = mutation.run_tests(module, mutant.tests)
    assert status == 1, f"mutant {mutant.name} survives {mutant.tests}:\n{output}"
    assert re.search(mutant.caught, output), f"caught, but not by /{mutant.caught}/:\n{output}"


def test_names_are_their_own():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_an_edit_that_no_longer_fits_is_an_error():
    fitting = REDUCTIONS[0]
    gone = Mutant("gone", fitting.file, "no such text", "", fitting.tests, "", fitting.unit)
    with pytest.raises(mutation.Drift, match=r"gone: csrc.cuda.rows\.cuh has 0 times, not 1"):
        mutation.mutated(gone)
    often = Mutant("often", fitting.file, "BMTARD_UNROLL", "", fitting.tests, "", fitting.unit)
    with pytest.raises(mutation.Drift, match="Adapt the mutant"):
        mutation.mutated(often)
