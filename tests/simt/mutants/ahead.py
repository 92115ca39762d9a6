"""Faults of rows.cuh: tiles that are asked for before they are used."""

from __future__ import annotations

from ..mutation import OUTSIDE, WRONG, mutants_of
from .multi_teacher_kl import KL, KL_GRADIENTS
from .softmax_entropy import ENTROPY, ENTROPY_MASKED

MANY_TILES = "test_softmax_entropy.py::test_rows_of_many_tiles[{}]"
PACK_OF_LOADS = "if (is_pack<Shape>(window, first)) {\n    out"

mutant = mutants_of("cuda/rows.cuh", unit="cuda/softmax_entropy.cu")

MUTANTS = [
    mutant(
        "ahead-the-same-tile-twice",
        "fetched[slot] = fetch(i + ahead);",
        "fetched[slot] = fetch(i);",
        MANY_TILES.format("4-float32"),
        WRONG,
    ),
    mutant(
        "ahead-starts-with-one-tile",
        "int group = first - ahead;",
        "int group = first - 1;",
        MANY_TILES.format("2-float32"),
        WRONG,
    ),
    mutant(
        "ahead-of-the-last-tile",
        "if (i + ahead < end) fetched",
        "if (i + ahead + 1 < end) fetched",
        MANY_TILES.format("5-float32"),
        WRONG,
    ),
    mutant(
        "ahead-without-the-last-tile",
        "if (i >= end) break;",
        "if (i + 1 >= end) break;",
        MANY_TILES.format("3-float32"),
        WRONG,
    ),
    mutant(
        "ahead-past-the-last-tile",
        "if (i >= end) break;",
        "",
        MANY_TILES.format("4-float32"),
        WRONG,
    ),
    mutant(
        "ahead-before-the-first-tile",
        "if (i >= first) use(",
        "use(",
        MANY_TILES.format("2-float32"),
        WRONG,
    ),
    mutant(
        "ahead-in-one-row-of-two",
        "raw.of[i] = rows[i]->fetch(tile);",
        "raw.of[i] = rows[0]->fetch(tile);",
        KL.format("0.0-1025-float32"),
        WRONG,
        unit="cuda/multi_teacher_kl.cu",
    ),
    mutant(
        "kept-row-read-again",
        "return cached_ ? memory_",
        "return !this ? memory_",
        KL_GRADIENTS.format("0.0-1025-float32"),
        "assert",
        unit="cuda/multi_teacher_kl.cu",
    ),
    mutant(
        "kept-halves-by-values",
        "offset_ + tile * (Shape::kSpan / kValues<T>)",
        "offset_ + tile * Shape::kSpan",
        KL_GRADIENTS.format("0.0-3000-bfloat16"),
        "of a shared array of",
        unit="cuda/multi_teacher_kl.cu",
    ),
    mutant(
        "ahead-into-the-next-block",
        "return end < all ? end : all;",
        "return all;",
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
        "? value.bits : word | static_cast<uint32_t>(value.bits) << 16;",
        "? static_cast<uint32_t>(value.bits) << 16 : word | value.bits;",
        ENTROPY.format("127-float16"),
        WRONG,
    ),
    mutant(
        "halves-behind-the-row",
        "in_row(window, j) ? simt::load(row + j) : masked<T>()",
        "simt::load(row + j)",
        ENTROPY.format("100-bfloat16"),
        WRONG,
    ),
    mutant(
        "halves-masked-by-a-nan",
        "uint16_t{0xfc00}",
        "uint16_t{0xff80}",
        ENTROPY.format("100-float16"),
        WRONG,
    ),
    mutant(
        "half-packs-over-the-head",
        PACK_OF_LOADS,
        "if (window.packed && first + Shape::kWidth <= window.classes) {\n    out",
        ENTROPY.format("127-bfloat16"),
        f"{OUTSIDE}|{WRONG}",
    ),
    mutant(
        "half-packs-over-the-tail",
        PACK_OF_LOADS,
        "if (window.packed && first >= 0 && first < window.classes) {\n    out",
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
