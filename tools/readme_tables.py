"""Writes the tables of README.md from the files in benchmarks/results.

    python tools/readme_tables.py          # rewrite README.md
    python tools/readme_tables.py --check  # exit 1 if README.md and the files disagree

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bmtard.training.report import accuracy_header, accuracy_rows, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ATTACK = "pgd-sat"


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def demo() -> str:
    result = load("demo-digits.json")
    accuracy, machine = result["accuracy"], result["machine"]
    header = accuracy_header(list(next(iter(accuracy.values()))[0]), ATTACK)
    return (
        f"{markdown_table(header, accuracy_rows(accuracy, ATTACK))}\n\n"
        f"{machine['processor']}, {machine['cores']} cores, no GPU; torch {machine['torch']}; mean "
        f"± standard deviation of {result['seeds']} seeds; {result['seconds']:.0f} s in all; "
        f"{result['date'][:10]}; `{result['command']}`; "
        "[benchmarks/results/demo-digits.json](benchmarks/results/demo-digits.json)."
    )


def head() -> str:
    result = load("head-cpu.json")
    machine = result["machine"]
    names = {
        "bmtard sign": "bmtard, sign",
        "bmtard bisect": "bmtard, bisect",
        "torch.compile": "torch.compile, sign",
        "eager as published": "published code, sign",
    }
    rows = []
    for shape, figures in result["figures"].items():
        base = figures["bmtard sign"]["median_us"]
        rows.append(
            [
                shape.replace("x", " x "),
                *(
                    f"{figures[name]['median_us']:,.0f} ({figures[name]['median_us'] / base:.1f})"
                    for name in names
                ),
            ]
        )
    return (
        f"{markdown_table(['N x C', *names.values()], rows)}\n\n"
        "Microseconds, median (ratio to bmtard, sign); two teachers, float32, forward and "
        f"backward; {machine['processor']}, {result['threads']} thread, kernels "
        f"{machine['kernels']}; torch {machine['torch']}; {result['date']}; `{result['command']}`; "
        "[benchmarks/results/head-cpu.json](benchmarks/results/head-cpu.json)."
    )


def filled(readme: str) -> str:
    """``readme`` with every table as the result files have it."""
    for name, table in (("demo", demo), ("head", head)):
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"README.md must have a table between {begin.strip()} and {end}")
        readme = f"{before}{begin}\n{table()}\n\n{end}{after}"
    return readme


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text()
    after = filled(before)
    if sys.argv[1:] == ["--check"]:
        if before != after:
            print("README.md and benchmarks/results disagree: run tools/readme_tables.py")
        return int(before != after)
    if sys.argv[1:]:
        print(__doc__)
        return 2
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
