"""Faults of what a launch asks of the device, and of what it does when it is refused."""

from __future__ import annotations

from ..mutation import Mutant, mutants_of

ASKED_ONCE = "test_launches.py::test_a_device_is_asked_once[(1300, 30)-batch_of]"
SHARED = "test_launches.py::test_shared_memory_is_allowed_on_every_device[batch_of]"

mutant = mutants_of("cuda/simt.cuh", unit="cuda/bisect_temperature.cu")

MUTANTS = [
    Mutant(
        "kept-for-one-launch",
        "cuda/kept.h",
        "if (ask(answer)) answers_[key] = answer;",
        "ask(answer);",
        ASKED_ONCE,
        "assert",
        unit="cuda/bisect_temperature.cu",
    ),
    mutant(
        "one-device-for-all",
        "return kept.get(number, [&]",
        "return kept.get(0, [&]",
        "test_launches.py::test_each_device_has_its_own_answers",
        "assert",
    ),
    mutant(
        "shared-memory-of-one-device",
        "return kept.get({current_device(), kernel},",
        "return kept.get({0, kernel},",
        SHARED,
        "assert",
    ),
    mutant(
        "kernel-not-asked-for",
        "  (void)blocks_a_multiprocessor(kernel, grid.threads);\n",
        "",
        SHARED,
        "assert",
    ),
    Mutant(
        "refused-batch",
        "cuda/batch.cuh",
        "return error != 0 && plan.grid.blocks > 1 ? attempt(one_block<Shape>()) : error;",
        "return error;",
        "test_launches.py::test_one_block_takes_what_is_refused[grid-batch_of]",
        "refused",
        unit="cuda/bisect_temperature.cu",
    ),
    Mutant(
        "refused-batch-with-its-cache",
        "cuda/batch.cuh",
        "? attempt(one_block<Shape>()) : error;",
        "? attempt({{1, Shape::kThreads}, plan.cached_matrices}) : error;",
        "test_launches.py::test_one_block_takes_what_is_refused[cluster-loss_of]",
        "of a shared array of",
        unit="cuda/bmtard_loss.cu",
    ),
    Mutant(
        "refused-row",
        "cuda/rows.cuh",
        "return attempt(plan_rows<Shape>(groups, span, kept, 1));",
        "return error;",
        "test_launches.py::test_a_block_takes_the_row_of_a_refused_cluster[entropy_of]",
        "refused",
        unit="cuda/softmax_entropy.cu",
    ),
]
