"""Faults of multi_teacher_kl."""

from __future__ import annotations

from ..mutation import GLOBAL_RACE, OUTSIDE, WRONG, Mutant, mutants_of

KL = "test_multi_teacher_kl.py::test_forward_and_backward[{}]"
KL_FAR = "test_multi_teacher_kl.py::test_logits_further_apart_than_the_largest_number[{}]"
KL_WITHOUT_WEIGHT = "test_multi_teacher_kl.py::test_rows_without_weight_have_no_gradient[{}]"
KL_MASKED = "test_multi_teacher_kl.py::test_masked_and_non_finite_rows[{}]"
KL_SHARED = "test_multi_teacher_kl.py::test_shared_student_or_teacher[{}]"
KL_GRADIENTS = "test_multi_teacher_kl.py::test_gradients_with_the_forward_pass[{}]"

mutant = mutants_of("cuda/multi_teacher_kl.cu")
kl_row = mutants_of("cuda/kl_row.cuh", unit="cuda/multi_teacher_kl.cu")

MUTANTS = [
    kl_row(
        "kl-of-far-logits",
        "if (found.kl > std::numeric_limits<R>::max()) {",
        "if (false) {",
        KL_FAR.format("0.0-10-float32"),
        WRONG,
    ),
    kl_row(
        "kl-center-of-far-logits",
        "  found.center = eps > R(0) ? found.kl + share : found.kl;\n",
        "",
        KL_FAR.format("1e-05-1025-float32"),
        WRONG,
    ),
    mutant(
        "kl-gradient-of-a-row-without-weight",
        "    if (coefficient == R(0)) return;  // the row may hold NaN\n",
        "",
        KL_WITHOUT_WEIGHT.format("10"),
        "nan",
    ),
    mutant(
        "forward-gradient-of-a-row-without-weight",
        "by_logit == R(0) ? R(0) : by_logit * difference;",
        "by_logit * difference;",
        KL_WITHOUT_WEIGHT.format("1025"),
        "nan",
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
    mutant(
        "kl-past-the-last-row",
        "if (n >= args.rows) return;",
        "if (false) return;",
        KL.format("0.0-10-float32"),
        f"{OUTSIDE}|{WRONG}|{GLOBAL_RACE}",
        count=2,
    ),
    mutant(
        "kl-rows-of-the-next-teacher",
        "group.number(group.block_id() % blocks_a_teacher);",
        "group.number(group.block_id());",
        KL.format("0.0-10-float32"),
        WRONG,
        count=2,
    ),
    mutant(
        "kl-one-cache-for-two-rows",
        "place * cached_values<Shape>(window.span),",
        "0 * place,",
        KL.format("1e-05-1025-bfloat16"),
        WRONG,
    ),
    mutant(
        "kl-cache-for-one-row",
        "twice ? 2 : 0;",
        "twice ? 1 : 0;",
        KL.format("1e-05-1025-bfloat16"),
        "of a shared array of",
    ),
    mutant(
        "kl-packed-whatever-the-teacher",
        "    alignment.add(args.teacher[k]);\n",
        "",
        "test_layouts.py::test_multi_teacher_kl[False-strided-3-1102-float32]",
        "misaligned",
    ),
    mutant(
        "kl-packed-whatever-the-gradient",
        "alignment.add(gradient, args.classes);",
        "",
        "test_layouts.py::test_multi_teacher_kl[False-strided-None-1102-float32]",
        "misaligned",
    ),
    mutant(
        "kl-gradient-of-the-last-teacher",
        "store_tile<Streamed>(to, window, tile, grad_s);\n            grad_s = {};",
        "store_tile<Streamed>(to, window, tile, grad_s);",
        KL_SHARED.format("0-shared1-10-float32"),
        WRONG,
    ),
    mutant(
        "kl-shared-without-the-last-teacher",
        "end * args.teachers,",
        "end * args.teachers - 1,",
        KL_SHARED.format("0-shared0-1100-float32"),
        WRONG,
    ),
    mutant(
        "kl-shared-one-tile-of-many",
        "        ++tile;\n",
        "",
        KL_SHARED.format("0-shared0-1100-float32"),
        WRONG,
    ),
    mutant(
        "kl-shared-always-the-first-teacher",
        "          next.move(args.teachers);\n",
        "",
        KL_SHARED.format("0-shared0-10-float32"),
        WRONG,
    ),
    mutant(
        "kl-shared-from-the-first-block",
        "Place next{first, 0}, here{first, 0};",
        "Place next{0, 0}, here{0, 0};",
        "test_clusters.py::test_shared_student[float32]",
        f"{WRONG}|{GLOBAL_RACE}",
    ),
    mutant(
        "kl-shared-gradient-too-early",
        "const bool last = k + 1 == args.teachers;",
        "const bool last = true;",
        KL_SHARED.format("0-shared0-10-float32"),
        WRONG,
    ),
    mutant(
        "kl-temperature-without-a-guard",
        "by_temperature += probability > R(0) ? by_scaled * p.scaled(teacher) : by_scaled;",
        "by_temperature += by_scaled * p.scaled(teacher);",
        KL_MASKED.format("0.0-10-float32"),
        WRONG,
    ),
    mutant(
        "kl-coefficient-strides-swapped",
        "k * args.coefficient_teacher_stride + n * args.coefficient_row_stride",
        "n * args.coefficient_teacher_stride + k * args.coefficient_row_stride",
        KL.format("0.0-10-float32"),
        WRONG,
    ),
    mutant(
        "forward-coefficient-of-another-teacher",
        "k * args.coefficient_teacher_stride +\n",
        "n + k * 0 * args.coefficient_teacher_stride +\n",
        KL_GRADIENTS.format("0.0-33-float32"),
        WRONG,
    ),
    mutant(
        "forward-gradient-of-another-row",
        "static_cast<T*>(args.grad_student[k]) + n * args.classes;",
        "static_cast<T*>(args.grad_student[k]) + (n ^ 1) * args.classes;",
        KL_GRADIENTS.format("0.0-33-float32"),
        f"{WRONG}|{GLOBAL_RACE}|{OUTSIDE}|misaligned",
    ),
    mutant(
        "forward-gradient-not-asked-for-alignment",
        "alignment.add(args.grad_student[k], args.classes);",
        "",
        "test_multi_teacher_kl.py::test_an_unaligned_gradient_with_the_forward_pass",
        "misaligned",
    ),
    mutant(
        "forward-without-student-temperature",
        "found.q.inverse_temperature;",
        "R(1);",
        KL_GRADIENTS.format("0.0-33-float32"),
        WRONG,
    ),
    kl_row(
        "kl-online-maxima-of-one-thread",
        "  group.reduce(maxima, Max{});\n",
        "",
        KL.format("0.0-1025-float32"),
        WRONG,
    ),
    kl_row(
        "kl-online-nothing-seen-yet",
        "student_max == new_student_max ? R(0) : (student_max",
        "(student_max",
        "test_multi_teacher_kl.py::test_a_part_of_a_row_is_masked[3000-float32]",
        "array.*nan, nan",
    ),
    kl_row(
        "kl-online-infinite-without-weight",
        "difference = weight == R(0) ? R(0) : scale",
        "difference = scale",
        KL.format("0.0-1025-float32") + " " + KL_MASKED.format("0.0-1100-float32"),
        WRONG,
    ),
    mutant(
        "forward-gradient-reads-again",
        "const bool twice = args.eps > 0 || args.coefficient;",
        "const bool twice = args.eps > 0;",
        KL_GRADIENTS.format("0.0-1025-float32"),
        "assert",
    ),
    mutant(
        "kl-teachers-shared-as-students",
        "gradient_row<T>(args.grad_teacher, args.teacher_shared, k, n, args.classes)",
        "gradient_row<T>(args.grad_teacher, args.student_shared, k, n, args.classes)",
        KL_SHARED.format("0-shared0-10-float32"),
        WRONG,
    ),
    kl_row(
        "kl-of-far-logits-without-a-log-sum",
        "found.kl = near + found.q.log_sum - far",
        "found.kl = near - far",
        "test_multi_teacher_kl.py::test_a_far_logit_of_little_weight[0.0-10-float32]",
        WRONG,
    ),
    kl_row(
        "kl-center-without-eps",
        "sums[0], has_eps ? sums[1] : sums[0], sums[2]}",
        "sums[0], sums[0], sums[2]}",
        KL.format("1e-05-10-float32"),
        WRONG,
    ),
    kl_row(
        "kl-online-shift-by-the-student-alone",
        "if (student_top > sums.student_max || top > sums.max) {",
        "if (student_top > sums.student_max) {",
        KL.format("0.0-3000-float32"),
        WRONG,
    ),
    kl_row(
        "kl-online-weight-of-the-old-maximum",
        "weight = scale * teacher.s0;",
        "weight = teacher.s0;",
        KL.format("0.0-3000-float32"),
        WRONG,
    ),
]
