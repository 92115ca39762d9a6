"""Faults of bisect_temperature."""

from __future__ import annotations

from ..mutation import GLOBAL_RACE, OUTSIDE, RACE, UNWRITTEN, WRONG, Mutant, mutants_of

BISECT = "test_bisect_temperature.py::test_by_sample[{}]"
BISECT_BATCH = "test_bisect_temperature.py::test_of_the_batch[0-(37, 10)-float32]"
BISECT_STEPS = "test_bisect_temperature.py::test_the_first_temperatures_of_halleys_method[{}]"
BISECT_ROUNDING = "test_bisect_temperature.py::test_a_tolerance_of_nothing_is_that_of_rounding[{}]"
BISECT_GRID = "test_bisect_temperature.py::test_of_a_batch_for_many_blocks[(331, 100)-float32]"

mutant = mutants_of("cuda/bisect_temperature.cu")
search = mutants_of("core/temperature_search.h", unit="cuda/bisect_temperature.cu")

MUTANTS = [
    search(
        "bisect-flat-is-equal",
        "      if (temperature <= low) {\n",
        "      {\n",
        "test_bisect_temperature.py::"
        "test_a_variance_that_underflows_is_not_taken_for_equal_logits[1e+30-True-0]",
        "assert",
    ),
    search(
        "bisect-flat-without-end",
        "      if (iterations >= max_iterations) finish(kMaxIterations);\n      return;\n",
        "      return;\n",
        "test_bisect_temperature.py::test_the_last_evaluation_is_at_a_flat_entropy[True-0]",
        "assert",
    ),
    search(
        "bisect-flat-at-the-upper-bound",
        "flat = !low_known && ",
        "flat = ",
        "test_bisect_temperature.py::"
        "test_a_variance_that_underflows_is_not_taken_for_equal_logits[None-True-1]",
        "assert",
    ),
    mutant(
        "bisect-first-barrier",
        "  simt::block_barrier();\n  for (int32_t phase",
        "  for (int32_t phase",
        BISECT_BATCH,
        f"{RACE}|{UNWRITTEN}",
    ),
    mutant(
        "bisect-barrier-of-a-round",
        "    simt::block_barrier();\n  }\n  if (decides && simt::block_id() == 0)",
        "  }\n  if (decides && simt::block_id() == 0)",
        BISECT_BATCH,
        f"{RACE}|{UNWRITTEN}",
    ),
    mutant(
        "bisect-every-block-writes",
        "if (decides && simt::block_id() == 0) {",
        "if (decides) {",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    mutant(
        "bisect-every-thread-writes",
        "if (decides && simt::block_id() == 0) {",
        "if (simt::block_id() == 0) {",
        BISECT_GRID,
        RACE,
    ),
    mutant(
        "bisect-past-the-last-row",
        "if (n >= args.rows) return;",
        "",
        BISECT.format("0-10-float32"),
        f"{OUTSIDE}|{WRONG}|assert",
    ),
    mutant(
        "bisect-initial-of-the-first-row",
        "at<R>(args.initial, n * args.initial_stride)",
        "at<R>(args.initial, 0)",
        "test_bisect_temperature.py::test_every_status[2.0-0-10-float32]",
        WRONG,
    ),
    search(
        "bisect-midpoint-of-a-product",
        "return sqrt(bracket_low) * sqrt(bracket_high);",
        "return sqrt(bracket_low * bracket_high);",
        "test_bisect_temperature.py::test_a_temperature_far_from_one[1e-30-1]",
        "assert",
    ),
    search(
        "bisect-tolerance-below-rounding",
        "    if (!(tolerance >= floor)) tolerance = floor;\n",
        "",
        BISECT_ROUNDING.format("True-float32"),
        "Arrays are not equal",
    ),
    Mutant(
        "moments-shifted-by-another-binomial",
        "core/softmax_entropy.h",
        "d * (3 * sums.s2 + d * (3 * sums.s1 +",
        "d * (3 * sums.s2 + d * (sums.s1 +",
        BISECT_STEPS.format("100-None-False"),
        WRONG,
        unit="cuda/bisect_temperature.cu",
    ),
    Mutant(
        "third-moment-not-central",
        "core/softmax_entropy.h",
        "sums.s3 / sums.s0 - mean * (real(3) * second - real(2) * mean * mean);",
        "sums.s3 / sums.s0 - mean * (real(3) * second + real(2) * mean * mean);",
        BISECT_STEPS.format("10-None-True"),
        WRONG,
        unit="cuda/bisect_temperature.cu",
    ),
]
