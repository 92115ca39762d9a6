"""Tables and progress on the terminal: by rich where it is installed, else in plain text."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from .report import Record, Report

RATIO_HEADER = "/ bmtard"


@dataclass(kw_only=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    left: int
    """Columns that are text; the others are numbers."""
    bold: set[int] = field(default_factory=set)
    """Rows to stress."""

    def plain(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.title]
        for row in [self.header, ["-" * width for width in widths], *self.rows]:
            cells = [
                cell.ljust(width) if index < self.left else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def duration(microseconds: float) -> str:
    for unit, scale in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        if microseconds < 1000 * scale or unit == "s":
            value = microseconds / scale
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    raise AssertionError


def ratio_text(record: Record, measure: str) -> str:
    """``2.91 [2.88, 2.94]``; a tie where the interval holds 1."""
    if measure not in record.measures:
        return ""
    ratio = record.measures[measure].ratio
    if ratio is None or record.provider == "bmtard":
        return ""
    interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"tie {interval}" if ratio.tie else f"{ratio.median:.2f} {interval}"


def _time(record: Record, measure: str) -> str:
    return duration(record.measures[measure].median_us) if measure in record.measures else "-"


def op_table(op: str, records: Sequence[Record], copy: float, device: str) -> Table:
    """Everything measured of one op; problems stand where the time would."""
    header = ["shape", "dtype", "pass", "provider"]
    if device == "cuda":
        header += ["wall", "graph, hot", "graph, cold", RATIO_HEADER, "GB/s", "of copy"]
        header += ["kernels", "waits", "peak MiB"]
    else:
        header += ["median", "p20 - p80", RATIO_HEADER, "GB/s", "of copy"]
    table = Table(title=op, header=header, rows=[], left=4)
    previous: list[str] = []
    for record in records:
        dims = "x".join(map(str, record.dims))
        shape = dims if record.shape == dims else f"{record.shape} {dims}"
        cells = [shape, record.dtype, record.pass_, record.provider]
        shown = [
            "" if cells[: i + 1] == previous[: i + 1] and i < 3 else c for i, c in enumerate(cells)
        ]
        previous = cells
        if record.provider == "bmtard":
            table.bold.add(len(table.rows))
        best = record.best_measure
        if not best:
            numbers = [record.status.upper() if record.status == "wrong" else record.status]
        else:
            rate = record.bytes_per_second(best)
            rates = [f"{rate / 1e9:.1f}", f"{100 * rate / copy:.0f} %"] if rate else ["", ""]
            if device == "cuda":
                peak = "" if record.peak_bytes is None else f"{record.peak_bytes / 2**20:.1f}"
                counts = ["" if n is None else f"{n:g}" for n in (record.kernels, record.waits)]
                times = [_time(record, m) for m in ("wall", "graph_hot", "graph_cold")]
                numbers = [*times, ratio_text(record, best), *rates, *counts, peak]
            else:
                time_ = record.best
                spread = f"{duration(time_.p20_us)} - {duration(time_.p80_us)}"
                numbers = [duration(time_.median_us), spread, ratio_text(record, best), *rates]
        table.rows.append(shown + numbers + [""] * (len(header) - 4 - len(numbers)))
    return table


def worst_step(points: Sequence[tuple[int, float]]) -> tuple[int, int, float]:
    """Of (size, time) in order of size: the neighbours between which the time grows most over
    the size, and how many times it does. Linear cost, with any overhead, gives 1 at most."""
    steps = [
        (small, large, (after / before) / (large / small))
        for (small, before), (large, after) in pairwise(points)
    ]
    return max(steps, key=lambda step: step[2]) if steps else (0, 0, 0.0)


AXIS_INDEX = {"N": 0, "C": 1}


def sweep_size(record: Record) -> int:
    return record.teachers if record.sweep == "K" else record.dims[AXIS_INDEX[record.sweep]]


def sweep_lines(records: Sequence[Record]) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
    """(op, axis, provider) -> (size, microseconds) in order of size."""
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for record in records:
        if record.sweep and record.best_measure:
            point = (sweep_size(record), record.best.median_us)
            lines.setdefault((record.op, record.sweep, record.provider), []).append(point)
    return {key: sorted(points) for key, points in lines.items()}


def sweep_table(records: Sequence[Record]) -> Table:
    table = Table(
        title="Scaling: time along one axis; linear cost has a worst step of at most 1",
        header=["op", "axis", "provider", "from", "to", "first", "last", "worst step"],
        rows=[],
        left=3,
    )
    for (op, axis, provider), points in sweep_lines(records).items():
        small, large, factor = worst_step(points)
        sizes = [str(points[0][0]), str(points[-1][0])]
        times = [duration(points[0][1]), duration(points[-1][1])]
        table.rows.append(
            [op, axis, provider, *sizes, *times, f"{factor:.2f} ({small} to {large})"]
        )
    return table


def phases_table(records: Sequence[Record]) -> Table:
    """Where the time of a whole training step goes."""
    rows = []
    for record in records:
        total = sum(record.phases_ms.values())
        for phase, value in record.phases_ms.items():
            rows.append([record.provider, phase, f"{value:.3f}", f"{100 * value / total:.2f} %"])
    return Table(
        title="One training step by phases, each waited for",
        header=["provider", "phase", "ms", "share"],
        rows=rows,
        left=2,
    )


def problems(report: Report) -> list[str]:
    """A line for everything that was asked for and not measured."""
    lines = []
    for status in ("wrong", "failed", "absent", "skipped"):
        chosen = [record for record in report.records if record.status == status]
        for text, group in groupby(chosen, key=_problem):
            members = list(group)
            passes = ", ".join(dict.fromkeys(r.pass_ for r in members if r.pass_))
            lines.append(f"{text} ({passes})" if passes else text)
    merged: dict[str, list[str]] = {}
    for line in lines:  # a provider is absent from several ops for one reason
        subject, _, reason = line.partition(": ")
        merged.setdefault(reason if subject.startswith("absent") else line, []).append(subject)
    result = []
    for reason, subjects in merged.items():
        if subjects[0].startswith("absent"):
            names = list(dict.fromkeys(subject.split()[1] for subject in subjects))
            result.append(f"absent {', '.join(names)}: {reason}")
        else:
            result.append(reason)
    notes = {f"{r.op} {r.provider}: {note}" for r in report.records for note in r.notes}
    return result + sorted(notes)


def _problem(record: Record) -> str:
    if record.status == "absent":
        return f"absent {record.provider} {record.op}: {record.reason}"
    where = f"{record.op} {'x'.join(map(str, record.dims))} {record.dtype}"
    return f"{record.status} {record.provider} on {where}: {record.reason}"


class Display:
    """Prints tables, and progress to a terminal's stderr; without rich in plain text."""

    LINE_INTERVAL = 10.0
    """Seconds between two lines of progress where there is no bar."""

    def __init__(self) -> None:
        try:
            self.rich: Any = importlib.import_module("rich")
            self.console = importlib.import_module("rich.console").Console()
            self.progress = importlib.import_module("rich.progress")
        except ModuleNotFoundError:
            self.rich = None
        self.bar: Any = None
        self.last = time.monotonic()

    def __enter__(self) -> Display:
        if self.rich is not None and self.console.is_terminal:
            columns = (
                self.progress.BarColumn(),
                self.progress.MofNCompleteColumn(),
                self.progress.TimeElapsedColumn(),
                self.progress.TimeRemainingColumn(),
                self.progress.TextColumn("{task.description}"),
            )
            # A thread that redraws would be timed with the ops.
            self.bar = self.progress.Progress(
                *columns, console=self.console, transient=True, auto_refresh=False
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=None)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def advance(self, done: int, total: int, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=text, refresh=True)
        elif time.monotonic() - self.last > self.LINE_INTERVAL:
            self.last = time.monotonic()
            print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        if self.rich is None:
            print(text, flush=True)
        else:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        if self.rich is None or not self.console.is_terminal:
            self.line(table.plain() + "\n")  # rich would fold it to 80 columns
            return
        rich = importlib.import_module("rich.table")
        shown = rich.Table(title=table.title, title_justify="left", box=None)
        for index, name in enumerate(table.header):
            shown.add_column(name, justify="left" if index < table.left else "right", no_wrap=True)
        for index, row in enumerate(table.rows):
            style = "red" if "WRONG" in row else "bold" if index in table.bold else None
            shown.add_row(*row, style=style)
        self.console.print(shown, "")
