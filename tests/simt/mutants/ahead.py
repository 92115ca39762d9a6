"""Faults of ahead.cuh: tiles that are asked for before they are used."""

from __future__ import annotations

from ..mutation import OUTSIDE, WRONG, mutants_of
from .softmax_entropy import ENTROPY, ENTROPY_MASKED

MANY_TILES = "test_softmax_entropy.py::test_rows_of_many_tiles[{}]"

mutant = mutants_of("cuda/ahead.cuh", unit="cuda/softmax_entropy.cu")

MUTANTS = [
    mutant(
        "ahead-the-same-tile-twice",
        "fetch_tile<Shape>(row_, window, tile + kAhead)",
        "fetch_tile<Shape>(row_, window, tile)",
        MANY_TILES.format("4-float32"),
        WRONG,
    ),
    mutant(
        "ahead-starts-with-one-tile",
        "fetch_tile<Shape>(row_, window, first + i)",
        "fetch_tile<Shape>(row_, window, first)",
        MANY_TILES.format("2-float32"),
        WRONG,
    ),
    mutant(
        "ahead-of-the-last-tile",
        "if (tile + kAhead < end) raw[i]",
        "if (tile + kAhead + 1 < end) raw[i]",
        MANY_TILES.format("5-float32"),
        WRONG,
    ),
    mutant(
        "ahead-without-the-last-tile",
        "if (tile >= end) break;",
        "if (tile + 1 >= end) break;",
        MANY_TILES.format("3-float32"),
        WRONG,
    ),
    mutant(
        "ahead-past-the-last-tile",
        "if (tile >= end) break;",
        "",
        MANY_TILES.format("4-float32"),
        WRONG,
    ),
    mutant(
        "ahead-into-the-next-block",
        "const int end = last < all ? last : all;",
        "const int end = all;",
        "test_clusters.py::test_softmax_entropy[packed-2-(1, 9001)-float32]",
        WRONG,
    ),
    mutant(
        "halves-in-the-wrong-order",
        "i % 2 == 0 ? word : word >> 16)",
        "i % 2 == 0 ? word >> 16 : word)",
        ENTROPY.format("100-bfloat16"),
        WRONG,
    ),
    mutant(
        "single-halves-in-the-wrong-order",
        "word = i % 2 == 0 ? bits : word | bits << 16;",
        "word = i % 2 == 0 ? bits << 16 : word | bits;",
        ENTROPY.format("127-float16"),
        WRONG,
    ),
    mutant(
        "halves-behind-the-row",
        "in_row(window, j) ? simt::load(row + j).bits : kMasked<T>",
        "simt::load(row + j).bits",
        ENTROPY.format("100-bfloat16"),
        WRONG,
    ),
    mutant(
        "halves-masked-by-a-nan",
        "? 0xff80 : 0xfc00;",
        "? 0xff80 : 0xff80;",
        ENTROPY.format("100-float16"),
        WRONG,
    ),
    mutant(
        "half-packs-over-the-head",
        "if (is_pack<Shape>(window, first)) {",
        "if (window.packed && first + Shape::kWidth <= window.classes) {",
        ENTROPY.format("127-bfloat16"),
        f"{OUTSIDE}|{WRONG}",
    ),
    mutant(
        "half-packs-over-the-tail",
        "if (is_pack<Shape>(window, first)) {",
        "if (window.packed && first >= 0 && first < window.classes) {",
        ENTROPY.format("127-bfloat16"),
        WRONG,
    ),
    mutant(
        "ahead-maximum-never-shifts",
        "sums = shifted(sums, (seen - top) * inverse_temperature);",
        "",
        ENTROPY.format("3000-float32"),
        WRONG,
    ),
    mutant(
        "ahead-parts-are-not-aligned",
        "sums = shifted(sums, (seen - max) * inverse_temperature);",
        "",
        ENTROPY.format("1025-float32"),
        WRONG,
    ),
    mutant(
        "ahead-masked-so-far",
        "const R base = seen == kNothing ? R(0) : seen;",
        "const R base = seen;",
        ENTROPY_MASKED.format("1100-float32"),
        WRONG,
    ),
]
