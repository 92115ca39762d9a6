"""Faults of scale."""

from __future__ import annotations

from ..mutation import GLOBAL_RACE, OUTSIDE, WRONG, mutants_of

SCALED = "test_scale.py::test_scale[{}-float32]"
SCALED_BY_ONE = "test_scale.py::test_a_factor_of_one_moves_nothing"

mutant = mutants_of("cuda/scale.cu")

MUTANTS = [
    mutant("scale-always", "if (factor == R(1)) return;", "", SCALED_BY_ONE, "assert"),
    mutant(
        "scale-never", "if (factor == R(1)) return;", "return;", SCALED.format("-2.5-0-5"), WRONG
    ),
    mutant(
        "scale-wrong-buffer",
        "simt::block_id() / blocks_a_buffer",
        "simt::block_id() % blocks_a_buffer",
        SCALED.format("-2.5-0-4097"),
        f"{WRONG}|{GLOBAL_RACE}|{OUTSIDE}",
    ),
    mutant(
        "scale-without-tail",
        "window_of<Shape>(data, chunk.size,",
        "window_of<Shape>(data, Shape::kMaxClasses,",
        SCALED.format("-2.5-0-5"),
        f"{WRONG}|{OUTSIDE}",
    ),
    mutant(
        "scale-one-chunk-for-all",
        "buffer_data + chunk.first",
        "buffer_data",
        SCALED.format("-2.5-0-4097"),
        f"{WRONG}|{GLOBAL_RACE}",
    ),
    mutant(
        "scale-without-the-head",
        "Packing packing = {true, Shape::kWidth - 1};",
        "Packing packing = {true, 0};",
        SCALED.format("-2.5-1-4096"),
        WRONG,
    ),
    mutant(
        "scale-factor-in-the-type-of-the-data",
        "const R factor = at<R>(args.factor, 0);",
        "const R factor = simt::widen(simt::narrow<T>(at<R>(args.factor, 0)));",
        "test_scale.py::test_scale[0.3-0-5-bfloat16]",
        WRONG,
    ),
    mutant(
        "scale-head-of-the-first-buffer",
        "chunk_of<Shape>(buffer_data,",
        "chunk_of<Shape>(args.data[0],",
        "test_scale.py::test_one_buffer_is_not_aligned[0-float32]",
        WRONG,
    ),
]
