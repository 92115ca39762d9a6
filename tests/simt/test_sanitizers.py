"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and that these see what the
plain module does not. ``make sanitize`` runs every test of this folder so; here is one of a kind.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from . import harness as h
from . import mutation, sanitize
from .mutation import Mutant

# Each kernel in each of its shapes, aligned and not.
TESTS = [
    "test_machine.py",
    "test_layouts.py::test_rows_far_apart",
    "test_softmax_entropy.py::test_every_schedule_gives_the_same_bits",
    "test_multi_teacher_kl.py::test_every_schedule_gives_the_same_bits",
    *(
        f"test_{name}"
        for c in (10, 100, 1025)
        for dtype in ("float32", "bfloat16")
        for name in (
            f"softmax_entropy.py::test_forward_and_backward[{c}-{dtype}]",
            f"multi_teacher_kl.py::test_forward_and_backward[1e-05-{c}-{dtype}]",
            f"bisect_temperature.py::test_by_sample[0-{c}-{dtype}]",
        )
    ),
    *(
        f"test_bmtard_loss.py::test_steps_of_a_small_batch_in_one_launch[{shape}-{dtype}-{mode}]"
        for shape in ("(37, 10)", "(5, 127)", "(3, 1025)")
        for dtype in ("float64", "bfloat16")
        for mode in ("sign", "bisect")
    ),
    "test_pgd_step.py",
    *(
        f"test_packs.py::{name}[{parameters}]"
        for dtype in ("float64", "float32", "bfloat16")
        for name, parameters in (
            ("test_softmax_entropy", f"0-100-{dtype}"),
            ("test_softmax_entropy", f"1-21841-{dtype}"),
            ("test_multi_teacher_kl", f"100-{dtype}"),
            ("test_bisect_temperature", f"True-21841-{dtype}"),
            ("test_bmtard_loss", f"False-21841-{dtype}"),
            ("test_scale", f"3-100-{dtype}"),
        )
    ),
]

DISCARDED = Mutant(
    "load-tail-and-discard",
    "cuda/rows.cuh",
    "      const T value = in_row(window, j) ? simt::load(row + j) : masked<T>();",
    "      const T z = simt::load(row + j);\n"
    "      const T value = in_row(window, j) ? z : masked<T>();",
    "test_softmax_entropy.py::test_forward_and_backward[10-float32]",
    "heap-buffer-overflow|use-after-poison",
    unit="cuda/softmax_entropy.cu",
)
# The pack at the start of a row, of which its first values are another row's.
WHOLE_PACK = Mutant(
    "load-head-as-a-pack",
    "cuda/rows.cuh",
    "  } else {\n    BMTARD_UNROLL\n    for (int i = 0; i < Shape::kWidth; ++i) {\n"
    "      const int j = class_of<Shape>(window, tile, i);\n"
    "      const T value = ",
    "  } else {\n    RawTile<Shape> pack{};\n"
    "    if (window.packed && first < window.classes)\n"
    "      pack = simt::load_pack<Shape::kWidth / kValues<T>>(\n"
    "          reinterpret_cast<const Word<T>*>(row + first));\n"
    "    if (tile < 0) out = pack;\n"
    "    BMTARD_UNROLL\n    for (int i = 0; i < Shape::kWidth; ++i) {\n"
    "      const int j = class_of<Shape>(window, tile, i);\n"
    "      const T value = ",
    "test_softmax_entropy.py::test_forward_and_backward[127-float32]",
    "heap-buffer-overflow|use-after-poison",
    unit="cuda/softmax_entropy.cu",
)
TOO_EARLY = Mutant(
    "temperature-of-no-row",
    "cuda/softmax_entropy.cu",
    "  if (row >= args.rows) return;\n",
    "  const R early = temperature_of<R>(args, row);\n"
    "  if (row >= args.rows + (early > early)) return;\n",
    "test_softmax_entropy.py::test_forward_and_backward[10-float32]",
    "heap-buffer-overflow",
    count=2,
)


@pytest.fixture(scope="module")
def environment():
    sanitize.build()
    return sanitize.environment()


def test_kernels_are_clean(environment):
    status, output = mutation.run_tests(sanitize.FOLDER, " ".join(TESTS), **environment)
    assert status == 0, output


@pytest.mark.parametrize(
    ("probe", "report"),
    [
        ("overflowing_index", "runtime error: signed integer overflow"),
        ("read_past_the_end", "AddressSanitizer: global-buffer-overflow"),
    ],
)
def test_probe_is_seen(probe, report, environment):
    assert h.simt().run_probe(probe)[1:60] == [0] * 59
    script = f"import bmtard_simt; bmtard_simt.run_probe('{probe}')"
    output = mutation.run_python(["-c", script], PYTHONPATH=str(sanitize.FOLDER), **environment)[1]
    assert report in output
    assert probe in output  # where


@pytest.mark.parametrize(
    "mutant", [DISCARDED, WHOLE_PACK, TOO_EARLY], ids=lambda mutant: mutant.name
)
def test_mutant_is_seen(mutant, environment):
    """Reads out of bounds that change no result, so that nothing else could see them."""
    module = mutation.build(mutant.source, mutant.name, mutant)
    status, output = mutation.run_tests(module, mutant.tests)
    assert status == 0, output
    name = f"sanitized-{mutant.name}"
    module = mutation.build(mutant.source, name, mutant, sanitize.FOLDER)
    status, output = mutation.run_tests(module, mutant.tests, **environment)
    assert status == sanitize.REPORTED, output
    assert re.search(f"AddressSanitizer: ({mutant.caught})", output), output
    assert Path(mutant.source).name in output
