"""Faults of pgd_step."""

from __future__ import annotations

from ..mutation import OUTSIDE, WRONG, mutants_of

LINF = "test_pgd_step.py::test_linf[{}]"
L2_SCALES = "test_pgd_step.py::test_l2_step_along_any_gradient[{}]"
L2_DISTANCES = "test_pgd_step.py::test_l2_projects_any_perturbation[{}]"
L2 = "test_pgd_step.py::test_l2[{}]"

mutant = mutants_of("cuda/pgd_step.cu")
core = mutants_of("core/pgd_step.h", unit="cuda/pgd_step.cu")

MUTANTS = [
    mutant(
        "l2-square-of-the-gradient",
        "const R unit = norm_unit(sums[0]);",
        "const R unit = 1;",
        L2_SCALES.format("1e-30-float32"),
        WRONG,
    ),
    mutant(
        "l2-square-of-the-distance",
        "const R distance_unit = norm_unit(squared);",
        "const R distance_unit = 1;",
        L2_DISTANCES.format("1e+25-float32"),
        WRONG,
    ),
    mutant(
        "l2-distance-by-another-unit",
        "if (moves && (unit != R(1) || !is_finite(squared)))",
        "if (moves && !is_finite(squared))",
        L2_SCALES.format("1e+30-float32"),
        WRONG,
    ),
    mutant(
        "l2-distance-of-infinite-parts",
        "if (moves && (unit != R(1) || !is_finite(squared)))",
        "if (moves && unit != R(1))",
        L2_DISTANCES.format("1e+25-float32"),
        WRONG,
    ),
    core(
        "linf-around-nan",
        "return select(x == x, inside, x);",
        "return inside;",
        "test_pgd_step.py::test_linf_around_nan[float32]",
        "assert",
    ),
    core(
        "l2-scale-of-a-large-norm",
        "squared_norm > std::numeric_limits<real>::max() ? real(1 / unit) : real(1)",
        "real(1)",
        L2_SCALES.format("1e+30-float32"),
        WRONG,
    ),
    mutant(
        "linf-last-chunk",
        "window_of<Shape>(out, chunk.size,",
        "window_of<Shape>(out, Shape::kMaxClasses,",
        LINF.format("0-(3, 10)-float32"),
        f"{OUTSIDE}|{WRONG}",
    ),
    mutant(
        "linf-chunk-of-the-next-block",
        "args.sample_size, simt::block_id(), packing",
        "args.sample_size, simt::block_id() + 1, packing",
        LINF.format("1-(1, 4097)-float32"),
        WRONG,
    ),
    mutant(
        "l2-tail-in-the-norm",
        "if (!in_row(window, class_of<Shape>(window, tile, i))) continue;",
        "",
        L2.format("0.05-(3, 10)-float32"),
        WRONG,
        count=2,
    ),
    mutant(
        "l2-step-without-a-direction",
        "moves ? x_adv + step * (unit * gradient) : x_adv",
        "x_adv + step * (unit * gradient)",
        "test_pgd_step.py::test_l2_makes_no_step_without_a_direction[float32]",
        WRONG,
    ),
    mutant(
        "l2-norm-without-a-direction",
        "moves ? sums[1] + step * (2 * sums[2] + step * sums[0]) : sums[1];",
        "sums[1] + step * (2 * sums[2] + step * sums[0]);",
        "test_pgd_step.py::test_l2_projects_without_a_direction[float32]",
        WRONG,
    ),
    mutant(
        "l2-norm-of-one-thread",
        "  group.sum(sums);\n\n",
        "\n",
        L2.format("0.05-(2, 3072)-float32"),
        WRONG,
    ),
    mutant(
        "pgd-packed-whatever-the-gradient",
        "  alignment.add(args.grad, stride);\n",
        "",
        "test_layouts.py::test_pgd_step[40-False-grad-float32]",
        "misaligned",
    ),
    mutant(
        "l2-packed-whatever-the-sample",
        "const int64_t stride = args.l2 ? args.sample_size : 0;",
        "const int64_t stride = 0;",
        L2.format("0.05-(3, 2047)-float32"),
        WRONG,
    ),
    core(
        "step-by-nan",
        "select(grad > T(0), step_size, select(grad < T(0), -step_size, T(0)))",
        "select(grad > T(0), step_size, -step_size)",
        LINF.format("0-(3, 10)-float32"),
        WRONG,
    ),
    core(
        "step-along-nothing",
        "is_finite(norm) && norm > real(0) ?",
        "is_finite(norm) ?",
        "test_pgd_step.py::test_l2_makes_no_step_without_a_direction[float32]",
        WRONG,
    ),
    core(
        "linf-bounds-before-the-ball",
        "clamped(clamped(moved, x - epsilon, x + epsilon), low, high);",
        "clamped(clamped(moved, low, high), x - epsilon, x + epsilon);",
        "test_pgd_step.py::test_linf_bounds_come_last[float32]",
        "Arrays are not equal",
    ),
    core(
        "l2-squares-that-are-subnormal",
        "lowest = is_double ? 0x1p-900 : 0x1p-80,",
        "lowest = is_double ? 0x1p-1074 : 0x1p-149,",
        L2_SCALES.format("1e-21-float32"),
        WRONG,
    ),
]
