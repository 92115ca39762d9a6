"""Writes the tables of README.md and docs/*.md from the files in benchmarks/results.

    python tools/readme_tables.py          # rewrite them
    python tools/readme_tables.py --check  # exit 1 if they and the files disagree

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, in any of the documents.
Its name is one of TABLES, or ``reproduce-PRESET``: the accuracy table of
benchmarks/results/reproduce-PRESET.json, which is a results.json of ``bmtard reproduce PRESET``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bmtard.benchmarks.report import Record, Report
from bmtard.benchmarks.report import load as load_report
from bmtard.benchmarks.table import duration
from bmtard.training.report import (
    accuracy_header,
    accuracy_rows,
    attack_title,
    markdown_table,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ATTACK = "pgd-sat"


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def accuracy(name: str, folder: str) -> str:
    """Of a result file, whose link is relative to the document in ``folder``."""
    result = load(name)
    accuracy, machine = result["accuracy"], result["machine"]
    attack = result.get("main_attack", ATTACK)
    header = accuracy_header(accuracy, attack)
    count = result["seeds"]
    seeds = f"mean ± standard deviation of {count} seeds" if count > 1 else "one seed"
    return (
        f"{markdown_table(header, accuracy_rows(accuracy, attack))}\n\n"
        f"{machine['processor']}, {machine['cores']} cores, {machine.get('gpu', 'no GPU')}; "
        f"torch {machine['torch']}; {seeds}; "
        f"{result['seconds']:.0f} s in all; "
        f"{result['date'][:10]}; `{result['command']}`; "
        f"{link(name, folder)}."
    )


def link(name: str, folder: str) -> str:
    """To a result file, from a document in ``folder``."""
    above = "../" * len(Path(folder).parts)
    return f"[benchmarks/results/{name}]({above}benchmarks/results/{name})"


def demo(folder: str) -> str:
    return accuracy("demo-digits.json", folder)


SHAPES = ("cifar10", "tiny-imagenet", "imagenet", "llm32k")
PROVIDERS = {"eager": "eager", "compile": "torch.compile", "sklearn": "scikit-learn"}


def whole_op(report: Report, op: str, shape: str) -> dict[str, Record]:
    """The records of an op's longest pass in float32, by provider."""
    records = [
        r
        for r in report.records
        if (r.op, r.shape, r.dtype) == (op, shape, "float32") and r.measures
    ]
    return {r.provider: r for r in records if r.pass_ == records[-1].pass_}


def ratio_cell(record: Record | None) -> str:
    ratio = None if record is None or record.provider == "bmtard" else record.best.ratio
    return "-" if ratio is None else "tie" if ratio.tie else f"{ratio.median:.1f}"


def cells(records: dict[str, Record], providers: Sequence[str]) -> list[str]:
    """bmtard's time, and the times of the others over it."""
    ratios = [ratio_cell(records.get(name)) for name in providers]
    return [duration(records["bmtard"].best.median_us), *ratios]


def source(report: Report, name: str, folder: str) -> str:
    machine = report.machine
    plural = "s" if report.threads > 1 else ""
    clock = {"cpu_time": "CPU time", "wall": "wall clock"}[
        next(record.best_measure for record in report.records if record.measures)
    ]
    return (
        f"float32; {clock}; {machine['processor']}, {report.threads} thread{plural}, kernels "
        f"{machine['kernels']}, load {machine['load']}; torch {machine['torch']}; "
        f"{report.date[:10]}; `{report.command}`; "
        f"{link(name, folder)}."
    )


def head(folder: str) -> str:
    name = "cpu-1-thread.json"
    report = load_report(RESULTS / name)
    others = ("eager", "compile")
    rows = []
    for shape in SHAPES:
        sign, bisect = (whole_op(report, f"bmtard_loss_{m}", shape) for m in ("sign", "bisect"))
        dims = " x ".join(map(str, sign["bmtard"].dims))
        rows.append([dims, *cells(sign, others), *cells(bisect, others)])
    header = ["N x C", "bmtard, sign", "published code", "torch.compile"]
    header += ["bmtard, bisect", "eager", "torch.compile"]
    return (
        f"{markdown_table(header, rows)}\n\n"
        "Time of bmtard, and how many times as long the others take (tie: the 99 % interval of "
        f"that ratio holds 1); two teachers, forward and gradient; {source(report, name, folder)}"
    )


def ops(folder: str) -> str:
    name = "cpu-1-thread.json"
    report = load_report(RESULTS / name)
    rows = []
    for op in ("softmax_entropy", "multi_teacher_kl", "bisect_temperature", "pgd_step_"):
        for shape in ("digits", *SHAPES):
            records = whole_op(report, op, shape)
            if "bmtard" in records:
                ours = records["bmtard"]
                what = f"`{op}`, {ours.pass_}"
                dims = " x ".join(map(str, ours.dims))
                rows.append([what, dims, *cells(records, tuple(PROVIDERS))])
    header = ["", "Shape", "bmtard", *PROVIDERS.values()]
    return (
        f"{markdown_table(header, rows)}\n\n"
        "Time of bmtard, and how many times as long the others take (both: forward and gradient); "
        f"{source(report, name, folder)}"
    )


def step(folder: str) -> str:
    name = "cpu-step.json"
    report = load_report(RESULTS / name)
    rows = []
    for record in report.records:
        if record.phases_ms and record.provider in ("bmtard", "eager"):
            total = sum(record.phases_ms.values())
            phases = [record.phases_ms[phase] for phase in ("attack", "head")]
            rows.append(
                [
                    {"bmtard": "bmtard, both options", "eager": "published code"}[record.provider],
                    duration(record.best.median_us),
                    ratio_cell(record),
                    *(duration(1e3 * milliseconds) for milliseconds in phases),
                    f"{100 * record.phases_ms['head'] / total:.2f} %",
                ]
            )
    header = ["One training step", "Whole", "Over bmtard's", "PGD-10", "Head", "Head's share"]
    batch, *image = report.records[0].dims
    size = " x ".join(map(str, image))
    images = f"{batch} images of {size}"
    return f"{markdown_table(header, rows)}\n\n{images}; {source(report, name, folder)}"


def step_options(folder: str) -> str:
    name = "cpu-step.json"
    report = load_report(RESULTS / name)
    titles = {
        "eager": "published code",
        "ops-alone": "bmtard's ops alone",
        "channels-last": "ops, channels_last",
        "folded": "ops, folded batch norm",
        "bmtard": "ops, both",
        "bfloat16": "ops, both, bfloat16",
    }
    records = {record.provider: record for record in report.records if record.phases_ms}
    if not set(titles) <= set(records):
        return f"Not measured yet: `bmtard bench step --json benchmarks/results/{name}`."
    rows = []
    for provider, title in titles.items():
        record = records[provider]
        milliseconds = (record.phases_ms[phase] for phase in ("attack", "teachers"))
        rows.append(
            [
                title,
                duration(record.best.median_us),
                interval_cell(record),
                *(duration(1e3 * value) for value in milliseconds),
            ]
        )
    header = ["One training step", "Whole", "Over that with both", "PGD-10", "Teachers"]
    batch, *image = report.records[0].dims
    size = " x ".join(map(str, image))
    return (
        f"{markdown_table(header, rows)}\n\n"
        "In brackets the 99 % interval of the ratio; student cnn-8, teachers cnn-16 and cnn-8; "
        f"{batch} images of {size}; {source(report, name, folder)}"
    )


def interval_cell(record: Record) -> str:
    ratio = record.best.ratio
    assert ratio is not None
    if record.provider == "bmtard":
        return "-"
    return f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"


def weighted_accuracy(seeds: Sequence[dict[str, float]], attack: str) -> float:
    return mean((seed["clean"] + seed[attack]) / 2 for seed in seeds)


def numbers(folder: str) -> str:
    """Three of them, for the first screen."""
    speed, evidence = "cpu-1-thread.json", "reproduce-cifar10-small.json"
    report, reproduced = load_report(RESULTS / speed), load(evidence)
    loss = whole_op(report, "bmtard_loss_sign", "imagenet")
    search = whole_op(report, "bisect_temperature", "digits")
    attack = reproduced.get("main_attack", ATTACK)
    ours, theirs = (
        100 * weighted_accuracy(reproduced["accuracy"][method], attack)
        for method in ("bmtard, sign", "mtard")
    )
    rows, classes = loss["bmtard"].dims
    seeds = reproduced["seeds"]
    return (
        f"- **{ratio_cell(loss['eager'])} times as fast** as the published code: the whole loss of "
        f"{rows} x {classes} logits, forward and gradient, on one CPU thread "
        f"({link(speed, folder)}).\n"
        f"- **{ratio_cell(search['sklearn'])} times as fast** as scikit-learn: the temperature of "
        f"a given entropy, for {search['bmtard'].dims[0]} rows (the same file).\n"
        f"- **{ours:.1f} against {theirs:.1f} %** weighted robust accuracy: B-MTARD and MTARD from "
        f"the same teachers, small networks on CIFAR-10, {seeds} seed{'s' if seeds > 1 else ''} "
        f"({link(evidence, folder)})."
    )


def weighted(folder: str) -> str:
    """The weighted robust accuracy of the students under two attacks, the best one first."""
    name = "reproduce-cifar10-small.json"
    students = {k: v for k, v in load(name)["accuracy"].items() if not k.startswith("teacher")}
    best_first = sorted(students, key=lambda k: -weighted_accuracy(students[k], ATTACK))
    students = {k: students[k] for k in best_first}
    attacks = (ATTACK, "autoattack")
    columns = [[row[-1] for row in accuracy_rows(students, attack)] for attack in attacks]
    rows = [list(row) for row in zip(students, *columns, strict=True)]
    return markdown_table(["", *map(attack_title, attacks)], rows)


def wheel(folder: str) -> str:
    """The cells that tools/test_wheel.py has seen."""
    name = "wheel.json"
    results = load(name)
    rows = [
        [row["python"], row["torch"], str(row["passed"]), "a part" if row["short"] else "all"]
        for _, row in sorted(results["cells"].items())
    ]
    table = markdown_table(["Python", "torch", "Tests passed", "Of the op tests"], rows)
    return f"{table}\n\n`{results['wheel']}`, {results['date']}; {link(name, folder)}."


TABLES: dict[str, Callable[[str], str]] = {
    "numbers": numbers,
    "demo": demo,
    "head": head,
    "ops": ops,
    "step": step,
    "step-options": step_options,
    "weighted": weighted,
    "wheel": wheel,
}
BEGIN = re.compile(r"^<!-- begin (\S+) -->$", re.MULTILINE)


def filled(text: str, document: str = "README.md") -> str:
    """``text`` of a document with every table as the result files have it."""
    folder = str(Path(document).parent)
    for name in BEGIN.findall(text):
        if name.startswith("reproduce-"):
            table = accuracy(f"{name}.json", folder)
        elif name in TABLES:
            table = TABLES[name](folder)
        else:
            raise ValueError(f"{document} has a table {name!r}, which nothing writes")
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"{document} must have a table between {begin.strip()} and {end}")
        text = f"{before}{begin}\n{table}\n\n{end}{after}"
    return text


def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__)
        return 2
    disagree = False
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        document = str(path.relative_to(ROOT))
        before = path.read_text()
        after = filled(before, document)
        if before == after:
            continue
        if sys.argv[1:]:
            print(f"{document} and benchmarks/results disagree: run tools/readme_tables.py")
            disagree = True
        else:
            path.write_text(after)
    return int(disagree)


if __name__ == "__main__":
    sys.exit(main())
