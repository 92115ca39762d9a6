"""The tests of this folder fail where a kernel is wrong: each mutant is one fault in the text of a
real kernel, and must be caught, for the reason that is given. The mutants are in mutants/."""

from __future__ import annotations

import re

import pytest

from . import mutation
from .mutants import MUTANTS
from .mutation import Mutant


def unmutated() -> dict[str, str]:
    """By .cu file, all tests that its mutants name."""
    tests: dict[str, set[str]] = {}
    for mutant in MUTANTS:
        tests.setdefault(mutant.source, set()).update(mutation.tests_of(mutant.tests))
    return {source: " ".join(sorted(names)) for source, names in sorted(tests.items())}


@pytest.mark.parametrize(("source", "tests"), unmutated().items(), ids=unmutated())
def test_without_a_fault_they_pass(source, tests):
    """Built the same way: what a mutant does is due to its edit."""
    module = mutation.build(source, f"unmutated-{source.rsplit('/', 1)[-1]}")
    status, output = mutation.run_tests(module, tests)
    assert status == 0, output


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant):
    module = mutation.build(mutant.source, mutant.name, mutant)
    status, output = mutation.run_tests(module, mutant.tests)
    assert status == 1, f"mutant {mutant.name} survives {mutant.tests}:\n{output}"
    assert re.search(mutant.caught, output), f"caught, but not by /{mutant.caught}/:\n{output}"


def test_names_are_their_own():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_an_edit_that_no_longer_fits_is_an_error():
    fitting = MUTANTS[0]
    gone = Mutant("gone", fitting.file, "no such text", "", fitting.tests, "", fitting.unit)
    with pytest.raises(mutation.Drift, match=r"gone: csrc.cuda.rows\.cuh has 0 times, not 1"):
        mutation.mutated(gone)
    often = Mutant("often", fitting.file, "BMTARD_UNROLL", "", fitting.tests, "", fitting.unit)
    with pytest.raises(mutation.Drift, match="Adapt the mutant"):
        mutation.mutated(often)
