"""A kernel with one edit, compiled into a module of its own, and what the tests say of it.

Only the translation unit that the edit is for is compiled again; the other objects are those of
the build that harness.py makes. The module lies in ``build/mutants/<name>`` and is kept for as
long as nothing that goes into it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import harness

CSRC = harness.ROOT / "csrc"
MUTANTS = harness.ROOT / "build" / "mutants"
# Ends a test that hangs, and decides no verdict: whatever runs out of it has failed. The machine
# itself reports threads that wait for ever.
HANG_SECONDS = 3600

# How a test says what went wrong.
WRONG = "Not equal to tolerance|Arrays are not equal"
RACE = "race: "
GLOBAL_RACE = "race in global memory"
UNWRITTEN = "before it is written|that its block has not touched"
LEFT = "of a block that threads have left|leaves while others wait"
OUTSIDE = "a kernel wrote (past|before) an output"


@dataclass(frozen=True)
class Mutant:
    """Replace ``old``, which ``file`` has ``count`` times, by ``new``: then ``tests`` fail, and
    what they say matches ``caught``."""

    name: str
    file: str  # below csrc
    old: str
    new: str
    tests: str  # of tests/simt, separated by " test_"
    caught: str  # a regular expression
    unit: str = ""  # the .cu to compile, if `file` is a header
    count: int = 1

    @property
    def source(self) -> str:
        return self.unit or self.file


def mutants_of(file: str, unit: str = "") -> Callable[..., Mutant]:
    """A short form of :class:`Mutant` for the mutants of one file."""

    def mutant(
        name: str, old: str, new: str, tests: str, caught: str, *, unit: str = unit, count: int = 1
    ) -> Mutant:
        return Mutant(name, file, old, new, tests, caught, unit, count)

    return mutant


class Drift(AssertionError):
    """The text that a mutant replaces is not there as often as it says."""


def tests_of(tests: str) -> list[str]:
    """The names, which may have spaces in their brackets."""
    return re.split(r" (?=test_)", tests)


def mutated(mutant: Mutant) -> str:
    text = (CSRC / mutant.file).read_text()
    if text.count(mutant.old) != mutant.count:
        raise Drift(
            f"mutant {mutant.name}: csrc/{mutant.file} has {text.count(mutant.old)} times, not "
            f"{mutant.count}, the text\n{mutant.old}\nAdapt the mutant to the kernel"
        )
    return text.replace(mutant.old, mutant.new)


def build(source: str, name: str, mutant: Mutant | None = None, base: Path = harness.BUILD) -> Path:
    """The folder of a module whose ``source`` is compiled anew, with the edit or as it is."""
    text = mutated(mutant) if mutant else ""
    entries = json.loads((base / "compile_commands.json").read_text())
    objects = {Path(e["file"]).resolve(): Path(e["directory"], e["output"]) for e in entries}
    unit = CSRC / source
    entry = next(e for e in entries if Path(e["file"]).resolve() == unit)
    others = [str(path) for file, path in objects.items() if file != unit]
    known = [
        *sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh")),
        *sorted(harness.SOURCE.glob("*.[ch]*")),
        unit,
    ]
    digest = hashlib.sha256(f"{entry['command']}\0{mutant}\0{text}".encode())
    for path in [*known, Path(__file__)]:
        digest.update(path.read_bytes())
    folder = MUTANTS / name
    stamp = folder / "stamp"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for path in known:
        if path.is_relative_to(CSRC):
            copy = folder / "csrc" / path.relative_to(CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    if mutant:
        (folder / "csrc" / mutant.file).write_text(text)

    command = shlex.split(entry["command"])
    first = next(i for i, word in enumerate(command) if word.startswith("-I"))
    command[first:first] = [f"-I{folder / 'csrc'}", f"-I{folder / 'csrc' / 'cuda'}"]
    command[command.index("-o") + 1] = str(folder / "unit.o")
    command[command.index("-c") + 1] = str(folder / "csrc" / source)
    # Quick to compile; an edit may leave a variable unused.
    command += ["-O0", "-w"]
    # The linker keeps the first of equal inline functions: that of the mutant.
    sanitize = [word for word in command if word.startswith("-fsanitize=")]
    module = folder / next(base.glob("bmtard_simt*.so")).name
    link = [command[0], "-shared", *(sanitize or ["-s"]), "-o", str(module), str(folder / "unit.o")]
    for words in (command, [*link, *others]):
        done = subprocess.run(words, capture_output=True, text=True, cwd=base, check=False)
        if done.returncode != 0:
            raise harness.BuildError(f"{name} does not compile:\n{done.stderr}")
    (folder / "unit.o").unlink()
    stamp.write_text(digest.hexdigest())
    return folder


def run_python(arguments: list[str], **environment: str) -> tuple[int, str]:
    """Returns the status of another Python, and what it wrote."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", cwd=harness.ROOT, env={**kept, **environment},
            timeout=HANG_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return -1, f"hangs, stopped after {HANG_SECONDS} s\n{error.output!r}"
    return done.returncode, done.stdout


def run_tests(module: Path, tests: str, **environment: str) -> tuple[int, str]:
    """Runs tests of tests/simt on a module in another process; returns its status and output."""
    arguments = ["-m", "pytest", "-x", "-q", "--tb=short", "--capture=sys"]
    # torch, which the other tests want, takes longer to load than these tests take.
    arguments += ["--confcutdir", str(harness.SOURCE), "-p", "no:cacheprovider"]
    arguments += [str(harness.SOURCE / test) for test in tests_of(tests)]
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return run_python(arguments, BMTARD_SIMT_MODULE=str(module), **environment)
