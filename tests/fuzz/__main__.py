"""Fuzzes the ops on each instruction set that the machine has, for a time or a number of calls.

A failing case is printed as one line that can be pasted into tests/fuzz/test_fuzz.py. A crash is
found by the number of the case, which each worker notes before it begins it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import one_line, random_case

ROOT = Path(__file__).parents[2]
CAPABILITIES = ("baseline", "avx2", "avx512")
SHOWN = 3  # failures printed of each kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all (default: 60)")
    parser.add_argument("--calls", type=int, help="calls in all, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first case of the sequence")
    parser.add_argument("--capability", choices=CAPABILITIES, action="append")
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)  # of a worker
    options = parser.parse_args()
    if options.progress:
        return work(options)
    capabilities = options.capability or [c for c in CAPABILITIES if runs(c)]
    results = [drive(c, options, 1 / len(capabilities)) for c in capabilities]
    missing = sorted(set(CAPABILITIES) - set(capabilities))
    calls, failures = (sum(r[key] for r in results) for key in ("calls", "failures"))
    seconds = sum(r["seconds"] for r in results)
    print(
        f"{calls} calls in {seconds:.0f} s ({calls / max(seconds, 1e-9):.0f} a second), "
        f"{failures} failures; seed {options.seed}; {', '.join(capabilities)}"
        + (f" (not on this machine: {', '.join(missing)})" if missing else "")
    )
    return 1 if failures else 0


def environment(capability: str) -> dict[str, str]:
    return {**os.environ, "BMTARD_CPU_CAPABILITY": capability, "BMTARD_REQUIRE_NATIVE": "1"}


def runs(capability: str) -> bool:
    command = [sys.executable, "-c", "import bmtard"]
    result = subprocess.run(command, env=environment(capability), cwd=ROOT, capture_output=True,
                            text=True)  # fmt: skip
    if result.returncode and "this processor" not in result.stderr:
        raise SystemExit(result.stderr)
    return not result.returncode


WORKER = (sys.executable, "-m", "tests.fuzz")


def drive(
    capability: str, options: argparse.Namespace, share: float, worker: Sequence[str] = WORKER
) -> dict[str, Any]:
    """Workers, one after the other: a crash ends one, and the next goes on behind it."""
    total: dict[str, Any] = {"calls": 0, "failures": 0, "seconds": 0.0}
    start = options.start
    while True:
        with tempfile.TemporaryDirectory() as folder:
            progress = Path(folder, "progress")
            command = [
                *worker, "--seed", str(options.seed), "--start", str(start),
                "--capability", capability, "--progress", str(progress),
                "--seconds", str(max(0.0, options.seconds * share - total["seconds"])),
            ]  # fmt: skip
            if options.calls:
                command += ["--calls", str(max(1, int(options.calls * share) - total["calls"]))]
            began = time.perf_counter()
            code = subprocess.run(command, env=environment(capability), cwd=ROOT).returncode
            total["seconds"] += time.perf_counter() - began
            report = progress.with_suffix(".json")
            if report.exists():
                found = json.loads(report.read_text())
                total["calls"] += found["calls"]
                total["failures"] += found["failures"]
                return total
            if not progress.exists():
                raise SystemExit(f"{capability}: a worker ended with {code} before its first case")
            at = int.from_bytes(progress.read_bytes(), "little")
            total["failures"] += 1
            total["calls"] += at - start + 1
            print(f"{capability}: exit status {code} in case {at}:")
            print(f"    {one_line(*random_case(options.seed, at))}", flush=True)
            start = at + 1
            if options.calls and total["calls"] >= options.calls * share:
                return total


def work(options: argparse.Namespace) -> int:
    from .check import check, judged, worst  # after the instruction set is chosen

    warnings.simplefilter("error")
    capability = options.capability[0]
    file = os.open(options.progress, os.O_RDWR | os.O_CREAT)
    kinds: Counter[str] = Counter()
    calls = 0
    began = time.perf_counter()
    for index in itertools.count(options.start):
        spent = time.perf_counter() - began
        if (calls >= options.calls) if options.calls else (spent > options.seconds):
            break
        op, arguments = random_case(options.seed, index)
        os.pwrite(file, index.to_bytes(8, "little"), 0)
        try:
            calls += check(op, **arguments)
        except Exception as error:
            calls += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            what = re.sub(r"[\[\d].*", "", str(error), flags=re.DOTALL)[:60]
            group = f"{op}: {type(error).__name__}: {what} ({where})"
            kinds[group] += 1
            if kinds[group] <= SHOWN:
                print(
                    f"{capability}: case {index}: {op}: {type(error).__name__}: {error} ({where})"
                )
                print(f"    {one_line(op, arguments)}", flush=True)
    for kind, count in kinds.most_common():
        print(f"{capability}: {count} x {kind}")
    print(f"{capability}: largest error in parts of its bound:",
          ", ".join(f"{name} {value:.2g}" for name, value in sorted(worst.items())))  # fmt: skip
    print(f"{capability}: {judged['numbers']} numbers compared, "
          f"{judged['undetermined']} of them undetermined", flush=True)  # fmt: skip
    report = {"calls": calls, "failures": sum(kinds.values())}
    options.progress.with_suffix(".json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
