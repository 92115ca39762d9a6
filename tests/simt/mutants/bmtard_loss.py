"""Faults of bmtard_loss."""

from __future__ import annotations

from ..mutation import GLOBAL_RACE, RACE, UNWRITTEN, WRONG, Mutant, mutants_of

LOSS = "test_bmtard_loss.py::test_steps_of_a_small_batch_in_one_launch[{}]"
LOSS_BLOCK = LOSS.format("(37, 10)-float32-bisect")
LOSS_CLUSTER = LOSS.format("(128, 200)-float32-bisect")
LOSS_GRID = "test_bmtard_loss.py::test_steps_of_a_large_batch[(40, 1001)-float32-bisect]"
LOSS_GRID_OF_14 = "test_bmtard_loss.py::test_steps_of_a_large_batch[(14, 3000)-float32-bisect]"
LOSS_OF_16 = "test_bmtard_loss.py::test_as_many_teachers_as_there_can_be"

mutant = mutants_of("cuda/bmtard_loss.cu")

MUTANTS = [
    mutant(
        "loss-first-barrier",
        "    searching.set(thread, true);\n  }\n  simt::block_barrier();",
        "    searching.set(thread, true);\n  }",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
    ),
    mutant(
        "loss-barrier-of-a-round",
        "next.set(0, decided);\n    }\n    simt::block_barrier();",
        "next.set(0, decided);\n    }",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
    ),
    mutant(
        "loss-barrier-before-it-settles",
        "stopped = simt::any(simt::kFullWarp, stopped);\n  simt::block_barrier();",
        "stopped = simt::any(simt::kFullWarp, stopped);",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
    ),
    mutant(
        "loss-barrier-after-it-settles",
        "simt::block_id() == 0);\n  simt::block_barrier();",
        "simt::block_id() == 0);",
        LOSS_BLOCK,
        f"{RACE}|{UNWRITTEN}",
    ),
    mutant(
        "loss-every-block-writes-the-state",
        "settle<R>(args, board, step, stopped, simt::block_id() == 0);",
        "settle<R>(args, board, step, stopped, true);",
        LOSS_CLUSTER,
        GLOBAL_RACE,
    ),
    mutant(
        "loss-every-thread-settles",
        "if (thread == 0) settle<R>",
        "settle<R>",
        LOSS_BLOCK,
        RACE,
    ),
    mutant(
        "loss-every-lane-leaves-statistics",
        "    if (group.lane == 0) {\n      R* const to",
        "    {\n      R* const to",
        LOSS_BLOCK,
        GLOBAL_RACE,
    ),
    mutant(
        "loss-one-teacher-more",
        "const bool owns = thread < args.teachers;",
        "const bool owns = thread <= args.teachers;",
        LOSS_OF_16,
        "of a shared array of",
    ),
    mutant(
        "loss-highest-of-a-few",
        "int distance = simt::kWarp / 2; distance > 0;",
        "int distance = simt::kWarp / 8; distance > 0;",
        LOSS_OF_16,
        WRONG,
    ),
    mutant(
        "loss-shuffle-mask",
        "simt::shuffle_xor(simt::kFullWarp, target",
        "simt::shuffle_xor(0xffffu, target",
        LOSS_BLOCK,
        "leaves (it )?out",
    ),
    mutant(
        "loss-vote-mask",
        "return simt::any(simt::kFullWarp, open)",
        "return simt::any(0xffffu, open)",
        LOSS_BLOCK,
        "leaves (it )?out",
    ),
    mutant(
        "loss-votes-of-all-threads",
        "if (thread < simt::kWarp) stopped = simt::any",
        "if (owns) stopped = simt::any",
        LOSS_BLOCK,
        "deadlock|waits? |another",
    ),
    mutant(
        "loss-statistics-swapped",
        "simt::load(from + 2 * plane), simt::load(from + 3 * plane)",
        "simt::load(from + 3 * plane), simt::load(from + 2 * plane)",
        LOSS_BLOCK,
        WRONG,
    ),
    mutant(
        "loss-statistics-among-the-slots",
        "slots + 2 * kMaxSlots * args.teachers * kSums",
        "slots",
        LOSS_GRID,
        f"{GLOBAL_RACE}|{WRONG}",
    ),
    mutant(
        "loss-cache-that-was-never-filled",
        "entropy_pass(args.teacher[k], k, phase == kTarget,",
        "entropy_pass(args.teacher[k], k, false,",
        LOSS_CLUSTER,
        "before it is written",
    ),
    mutant(
        "loss-packed-whatever-the-gradient",
        "    alignment.add(args.grad_student[k], args.classes);\n",
        "",
        "test_layouts.py::test_bmtard_loss[shifted-0-1102-float32]",
        "misaligned",
    ),
    mutant(
        "loss-scale-in-the-gradients",
        "weight * args.gradient_scale",
        "weight * args.scale",
        "test_bmtard_loss.py::test_gradients_have_a_scale_of_their_own[float32]",
        WRONG,
    ),
    mutant(
        "loss-finite-if-the-last-is",
        "finite = finite && is_finite(losses[k])",
        "finite = is_finite(losses[k])",
        "test_bmtard_loss.py::"
        "test_a_batch_that_is_not_finite_leaves_the_state[student nan-16-float32-bisect]",
        "assert",
    ),
    mutant(
        "loss-weights-of-the-first-block-alone",
        "if (args.update && finite) {",
        "if (args.update && finite && writes) {",
        LOSS.format("(129, 10)-float32-bisect"),
        WRONG,
    ),
    mutant(
        "loss-step-read-at-the-end",
        "settle<R>(args, board, step, stopped,",
        "settle<R>(args, board, simt::load(args.state.step), stopped,",
        LOSS_CLUSTER,
        GLOBAL_RACE,
    ),
    Mutant(
        "loss-entropy-without-eps",
        "cuda/kl_row.cuh",
        "weighted(probability, entropy_eps > R(0) ? log(probability + entropy_eps) : log_p);",
        "weighted(probability, log_p);",
        LOSS.format("(37, 10)-float32-sign"),
        WRONG,
        unit="cuda/bmtard_loss.cu",
    ),
    Mutant(
        "sign-step-past-the-upper-bound",
        "core/balance.h",
        "t < low ? low : (t > high ? high : t);",
        "t < low ? low : t;",
        "test_bmtard_loss.py::test_the_sign_rule_stops_at_the_upper_bound",
        WRONG,
        unit="cuda/bmtard_loss.cu",
    ),
]
