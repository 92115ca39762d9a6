"""Faults of softmax_entropy."""

from __future__ import annotations

from ..mutation import GLOBAL_RACE, OUTSIDE, WRONG, Mutant, mutants_of

ENTROPY = "test_softmax_entropy.py::test_forward_and_backward[{}]"
ENTROPY_MASKED = "test_softmax_entropy.py::test_masked_and_non_finite_rows[{}]"

WINDOW = (
    "  const T* const data = row_of<T>(args.logits, row);\n"
    "  const Window window = "
    "window_of<Shape>(data, static_cast<int>(args.classes), group.lane, packing);\n"
    "  const R inverse = inverse_temperature(temperature_of<R>(args, row));\n"
)

mutant = mutants_of("cuda/softmax_entropy.cu")

MUTANTS = [
    Mutant(
        "temperature-out-of-range",
        "core/common.h",
        "return allowed ? real(1) / temperature : std::numeric_limits<real>::quiet_NaN();",
        "return real(1) / temperature;",
        "test_softmax_entropy.py::test_temperatures_out_of_range",
        "assert",
        unit="cuda/softmax_entropy.cu",
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
    mutant(
        "entropy-past-the-last-row",
        "  if (row >= args.rows) return;\n" + WINDOW + "  const Row",
        WINDOW + "  const Row",
        ENTROPY.format("10-float32"),
        f"{OUTSIDE}|{WRONG}|{GLOBAL_RACE}",
    ),
    mutant(
        "entropy-backward-past-the-last-row",
        "  if (row >= args.rows) return;\n" + WINDOW + "  const R entropy",
        WINDOW + "  const R entropy",
        ENTROPY.format("10-float32"),
        OUTSIDE,
    ),
    mutant(
        "entropy-last-row-missing",
        "if (row >= args.rows) return;",
        "if (row + 1 >= args.rows) return;",
        ENTROPY.format("10-float32"),
        WRONG,
        count=2,
    ),
    mutant(
        "entropy-temperature-stride",
        "row * args.temperature_stride)",
        "row)",
        "test_softmax_entropy.py::test_scalar_arguments_and_missing_outputs[10-float32]",
        WRONG,
    ),
    mutant(
        "entropy-gradient-stride",
        "row * args.grad_entropy_stride)",
        "row)",
        ENTROPY_MASKED.format("10-float32")
        + " test_softmax_entropy.py::test_large_logits_keep_their_precision[32]",
        WRONG,
    ),
    mutant(
        "entropy-packed-whatever-the-gradient",
        "  alignment.add(args.grad_logits, args.classes);\n",
        "",
        "test_layouts.py::test_softmax_entropy[0-aligned-1102-float32]",
        "misaligned",
    ),
    mutant(
        "entropy-variance-of-one-lane",
        "    group.sum(variance);\n",
        "",
        ENTROPY.format("10-float32"),
        WRONG,
    ),
    mutant(
        "entropy-gradient-by-the-stride-of-the-logits",
        "static_cast<T*>(args.grad_logits) + row * args.classes",
        "static_cast<T*>(args.grad_logits) + row * args.logits.row_stride",
        ENTROPY.format("10-float32"),
        f"{OUTSIDE}|{WRONG}",
    ),
    mutant(
        "entropy-gradient-by-one-statistic",
        "(values.value[i] - max) * inverse - log_sum;",
        "values.value[i] * inverse - (max * inverse + log_sum);",
        "test_softmax_entropy.py::test_large_logits_keep_their_precision[32]",
        WRONG,
    ),
]
