"""Faults of rows.cuh where the blocks of a cluster share a row."""

from __future__ import annotations

from ..mutation import GLOBAL_RACE, LEFT, RACE, UNWRITTEN, WRONG, mutants_of
from .softmax_entropy import ENTROPY

ENTROPY_SPLIT = "test_clusters.py::test_softmax_entropy[packed-{}-(1, 9001)-float32]"
KL_SPLIT = "test_clusters.py::test_multi_teacher_kl[True-1e-05-(1, 9001)-float32]"
BISECT_SPLIT = "test_clusters.py::test_bisect_by_sample[0-float32]"

mutant = mutants_of("cuda/rows.cuh", unit="cuda/softmax_entropy.cu")

MUTANTS = [
    mutant(
        "cluster-barrier",
        "    simt::cluster_barrier();\n    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n"
        "      values[i] = scratch.get_from",
        "    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n      values[i] = scratch.get_from",
        ENTROPY_SPLIT.format(2),
        f"{RACE}|{UNWRITTEN}",
    ),
    mutant(
        "cluster-barrier-of-the-block",
        "    simt::cluster_barrier();\n    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n"
        "      values[i] = scratch.get_from",
        "    simt::block_barrier();\n    BMTARD_UNROLL\n    for (int i = 0; i < n; ++i) {\n"
        "      values[i] = scratch.get_from",
        ENTROPY_SPLIT.format(2),
        f"{RACE}|{UNWRITTEN}",
    ),
    mutant(
        "cluster-scratch-by-turns",
        "turn_ ^= 1;\n    if (simt::thread_id() == 0) {",
        "if (simt::thread_id() == 0) {",
        BISECT_SPLIT,
        RACE,
        unit="cuda/bisect_temperature.cu",
    ),
    mutant(
        "cluster-scratch-half-as-large",
        "BMTARD_SHARED(V, scratch, 2 * n);",
        "BMTARD_SHARED(V, scratch, n);",
        ENTROPY_SPLIT.format(2),
        "of a shared array of",
    ),
    mutant(
        "cluster-scratch-writer",
        "    if (simt::thread_id() == 0) {\n      BMTARD_UNROLL\n"
        "      for (int i = 0; i < n; ++i) scratch.set(turn_",
        "    {\n      BMTARD_UNROLL\n      for (int i = 0; i < n; ++i) scratch.set(turn_",
        ENTROPY_SPLIT.format(2),
        RACE,
    ),
    mutant(
        "cluster-drops-a-block",
        "rank = 1; rank < simt::cluster_blocks();",
        "rank = 1; rank < simt::cluster_blocks() - 1;",
        ENTROPY_SPLIT.format(2),
        WRONG,
    ),
    mutant(
        "cluster-of-one-more",
        "rank = 1; rank < simt::cluster_blocks();",
        "rank = 1; rank <= simt::cluster_blocks();",
        ENTROPY_SPLIT.format(8),
        "reads from block . of a cluster",
    ),
    mutant(
        "cluster-leaves-too-early",
        "  BMTARD_DEVICE void leave() const {\n    if constexpr (Shape::kSplit) {\n"
        "      if (simt::cluster_blocks() > 1) simt::cluster_barrier();\n    }\n  }",
        "  BMTARD_DEVICE void leave() const {}",
        ENTROPY_SPLIT.format(2),
        LEFT,
    ),
    # All of them write the same, so only the race shows.
    mutant(
        "cluster-writes-in-every-block",
        "return lane == 0 && simt::cluster_rank() == 0;",
        "return lane == 0;",
        ENTROPY_SPLIT.format(2),
        GLOBAL_RACE,
    ),
    mutant(
        "cluster-writes-in-every-lane",
        "return lane == 0 && simt::cluster_rank() == 0;\n    return lane == 0;",
        "return simt::cluster_rank() == 0;\n    return lane == 0;",
        ENTROPY_SPLIT.format(2),
        GLOBAL_RACE,
    ),
    mutant(
        "group-writes-in-every-lane",
        "simt::cluster_rank() == 0;\n    return lane == 0;",
        "simt::cluster_rank() == 0;\n    return true;",
        ENTROPY.format("10-float32"),
        GLOBAL_RACE,
    ),
    mutant(
        "cluster-rows-by-block",
        "return simt::block_id() / simt::cluster_blocks();",
        "return simt::block_id();",
        "test_clusters.py::test_softmax_entropy[packed-2-(3, 8192)-float32]",
        f"{LEFT}|other threads have left|{WRONG}|a grid",
    ),
    mutant(
        "cluster-first-tile",
        "return simt::cluster_rank() * tiles_of",
        "return 0 * tiles_of",
        ENTROPY_SPLIT.format(2),
        WRONG,
    ),
    mutant(
        "cluster-tail-tile",
        "/ Shape::kSpan + blocks - 1) / blocks;",
        "/ Shape::kSpan) / blocks;",
        ENTROPY_SPLIT.format(2),
        WRONG,
    ),
    mutant(
        "cluster-cache-from-the-first-tile",
        "- first_tile<Shape>(window.span) * Shape::kSpan) /",
        ") /",
        KL_SPLIT,
        "of a shared array of",
        unit="cuda/multi_teacher_kl.cu",
    ),
]
