"""Faults of bisect_temperature."""

from __future__ import annotations

from ..mutation import GLOBAL_RACE, OUTSIDE, RACE, UNWRITTEN, WRONG, Mutant, mutants_of

BISECT = "test_bisect_temperature.py::test_by_sample[{}]"
BISECT_BATCH = "test_bisect_temperature.py::test_of_the_batch[0-(37, 10)-float32]"
BISECT_GRID = "test_bisect_temperature.py::test_of_a_batch_for_many_blocks[(331, 100)-float32]"

mutant = mutants_of("cuda/bisect_temperature.cu")

MUTANTS = [
    Mutant(
        "bisect-flat-is-equal",
        "core/temperature_search.h",
        "      if (temperature > low && iterations < max_iterations) return;\n",
        "",
        "test_bisect_temperature.py::"
        "test_a_variance_that_underflows_is_not_taken_for_equal_logits[1e+30-True-0]",
        "assert",
        unit="cuda/bisect_temperature.cu",
    ),
    Mutant(
        "bisect-flat-at-the-upper-bound",
        "core/temperature_search.h",
        "flat = !low_known && ",
        "flat = ",
        "test_bisect_temperature.py::"
        "test_a_variance_that_underflows_is_not_taken_for_equal_logits[None-True-1]",
        "assert",
        unit="cuda/bisect_temperature.cu",
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
]
