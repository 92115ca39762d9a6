"""Faults of batch.cuh: rounds over the batch."""

from __future__ import annotations

from ..mutation import GLOBAL_RACE, LEFT, OUTSIDE, RACE, UNWRITTEN, WRONG, mutants_of
from .bisect_temperature import BISECT_BATCH, BISECT_GRID, BISECT_ROUNDING, BISECT_STEPS
from .bmtard_loss import LOSS_BLOCK, LOSS_CLUSTER, LOSS_GRID, LOSS_GRID_OF_14

SUMS = "test_bisect_temperature.py::test_the_mean_of_equal_rows[float64]"

mutant = mutants_of("cuda/batch.cuh", unit="cuda/bisect_temperature.cu")

MUTANTS = [
    mutant(
        "team-grid-barrier",
        "        simt::grid_barrier();\n",
        "",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    mutant(
        "team-grid-barrier-of-the-block",
        "simt::grid_barrier();",
        "simt::block_barrier();",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    mutant(
        "team-cluster-barrier",
        "        simt::cluster_barrier();\n        add_up_cluster",
        "        add_up_cluster",
        LOSS_CLUSTER,
        f"{RACE}|{UNWRITTEN}",
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "team-cluster-barrier-of-the-block",
        "        simt::cluster_barrier();\n        add_up_cluster",
        "        simt::block_barrier();\n        add_up_cluster",
        LOSS_CLUSTER,
        f"{RACE}|{UNWRITTEN}",
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "team-block-barrier",
        "    simt::block_barrier();\n  }\n\n  BMTARD_DEVICE double total",
        "  }\n\n  BMTARD_DEVICE double total",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "team-leaves-too-early",
        "if (in_cluster()) simt::cluster_barrier();",
        "",
        LOSS_CLUSTER,
        LEFT,
        unit="cuda/bmtard_loss.cu",
    ),
    mutant("team-slots-by-turns", "turn_ ^= 1;", "", BISECT_GRID, GLOBAL_RACE),
    mutant(
        "team-cluster-by-turns", "turn_ ^= 1;", "", LOSS_CLUSTER, RACE, unit="cuda/bmtard_loss.cu"
    ),
    mutant(
        "team-slots-of-the-last-round",
        "simt::load(slot(from, set) + i);",
        "simt::load(memory_.slots + (((turn_ ^ 1) * kMaxSlots + from) * sets_ + set) * kSums + i);",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    mutant(
        "team-slots-of-one-set",
        "(turn_ * kMaxSlots + block) * sets_ + set) * kSums;",
        "(turn_ * kMaxSlots + block) * sets_) * kSums;",
        LOSS_GRID,
        f"{WRONG}|{GLOBAL_RACE}",
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "team-every-thread-gives",
        "    block_.reduce(sums, Add{});\n    if (simt::thread_id() != 0) return;",
        "    block_.reduce(sums, Add{});",
        BISECT_GRID,
        GLOBAL_RACE,
    ),
    mutant(
        "team-every-thread-adds-up",
        "if (simt::thread_id() != 0) continue;",
        "",
        BISECT_GRID,
        RACE,
    ),
    mutant(
        "team-every-lane-gives",
        "    if (group.lane != 0) {\n      BMTARD_UNROLL\n"
        "      for (int i = 0; i < kSums; ++i) sums[i] = 0;\n    }\n",
        "",
        BISECT_BATCH,
        f"{WRONG}|assert",
    ),
    mutant(
        "team-drops-a-block",
        "from < simt::grid_blocks(); from += threads",
        "from < simt::grid_blocks() - 1; from += threads",
        BISECT_GRID,
        f"{WRONG}|assert",
    ),
    mutant(
        "sums-in-single-precision",
        "memory_.totals.set(set * kSums + i, sums[i]);",
        "memory_.totals.set(set * kSums + i, static_cast<float>(sums[i]));",
        SUMS,
        WRONG,
        count=2,
    ),
    mutant(
        "share-past-the-last-row",
        "end_(first_ + rows_ < rows ? first_ + rows_ : rows)",
        "end_(first_ + rows_)",
        LOSS_GRID_OF_14,
        f"{WRONG}|{GLOBAL_RACE}|{OUTSIDE}|workspace",
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "share-without-the-last-rows",
        "rows_((rows + simt::grid_blocks() - 1) / simt::grid_blocks())",
        "rows_(rows / simt::grid_blocks())",
        LOSS_GRID_OF_14,
        WRONG,
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "share-one-place-for-all-matrices",
        "(matrix * rows_ + n - first_) *",
        "(n - first_) *",
        LOSS_CLUSTER,
        WRONG,
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "share-one-matrix-more",
        "matrix >= cached_matrices_ ?",
        "matrix > cached_matrices_ ?",
        LOSS_GRID,
        "of a shared array of",
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "loss-workspace-half-as-large",
        "return 2 * kMaxSlots * sets * kSums;",
        "return kMaxSlots * sets * kSums;",
        LOSS_GRID,
        "past its workspace",
        unit="cuda/bmtard_loss.cu",
    ),
    mutant(
        "log-count-of-one-lane",
        "      group.sum(count);\n",
        "",
        BISECT_STEPS.format("100-2.0-False"),
        WRONG,
    ),
    mutant(
        "mean-of-another-moment",
        "sums[2] += found.third_moment;",
        "sums[2] += found.variance;",
        BISECT_STEPS.format("10-None-False"),
        WRONG,
    ),
    mutant(
        "tolerance-below-rounding",
        "return tolerance > floor ? tolerance : floor;",
        "return tolerance;",
        BISECT_ROUNDING.format("False-float32"),
        "Arrays are not equal",
    ),
    mutant(
        "team-cluster-of-the-first-block",
        "memory_.mine.get_from(rank, turn_",
        "memory_.mine.get_from(0, turn_",
        LOSS_CLUSTER,
        WRONG,
        unit="cuda/bmtard_loss.cu",
    ),
]
