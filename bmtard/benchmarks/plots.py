"""The pictures of ``--plot``: speed-ups, roofline, and time along N, C and K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmtard.extras import import_extra

from .report import Record, Report
from .table import duration, sweep_lines

OURS = "#c1432e"
COLORS = {
    "eager": "#2f6db5",
    "compile": "#4f9d69",
    "compile-max-autotune": "#2d6a4f",
    "liger": "#8e6bbf",
    "quack": "#c98b2b",
    "sklearn": "#7f7f7f",
}
AXES = {"N": "rows N", "C": "classes C", "K": "teachers K"}


def check() -> None:
    """Raises ImportError, saying how to install it, where matplotlib is missing."""
    import_extra("matplotlib.figure", "train")


def draw(report: Report, folder: Path) -> list[Path]:
    """Writes what the report has something for; returns the files."""
    drawn = []
    for name, function in (
        ("speedup.png", speedup),
        ("roofline.png", roofline),
        ("scaling.png", scaling),
    ):
        figure = function(report)
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            drawn.append(folder / name)
    return drawn


def _figure(width: float, height: float) -> Any:
    figure = import_extra("matplotlib.figure", "train").Figure
    return figure(figsize=(width, height), layout="constrained")


def _where(report: Report) -> str:
    machine = report.machine
    name = machine.get("gpu", f"{machine['processor']}, {report.threads} thread(s)")
    return f"{name}, torch {machine['torch']}, {report.date[:10]}"


def speedup(report: Report) -> Any | None:
    """How many times bmtard's time the others take, a panel an op; first dtype, whole op."""
    chosen = [r for r in report.records if r.measures and not r.sweep]
    ops = []
    for op in dict.fromkeys(r.op for r in chosen):
        records = [r for r in chosen if r.op == op]
        last, dtype = records[-1].pass_, records[0].dtype
        records = [r for r in records if r.pass_ == last and r.dtype == dtype]
        others = [r for r in records if r.best.ratio and r.provider != "bmtard"]
        if others:
            ops.append((f"{op}, {last}, {dtype}", others))
    if not ops:
        return None
    columns = min(2, len(ops))
    lines = -(-len(ops) // columns)
    figure = _figure(6.5 * columns, 3.4 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for index, axis in enumerate(panels.flat):
        if index >= len(ops):
            axis.set_visible(False)
            continue
        title, others = ops[index]
        _bars(axis, title, others)
    figure.suptitle(f"Time over bmtard's, with 99 % intervals. {_where(report)}", fontsize=9)
    return figure


def _bars(axis: Any, title: str, records: Sequence[Record]) -> None:
    shapes = list(dict.fromkeys((r.shape, r.dims) for r in records))
    providers = list(dict.fromkeys(r.provider for r in records))
    width = 0.8 / len(providers)
    for place, provider in enumerate(providers):
        for record in records:
            ratio = record.best.ratio
            if record.provider != provider or ratio is None:
                continue
            x = shapes.index((record.shape, record.dims)) + (place + 0.5) * width - 0.4
            error = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            axis.bar(x, ratio.median, width, color=COLORS.get(provider, "0.5"), yerr=error,
                     capsize=2, error_kw={"lw": 0.8})  # fmt: skip
            axis.annotate(f"{ratio.median:.1f}", (x, ratio.high), ha="center", va="bottom",
                          fontsize=7)  # fmt: skip
        axis.bar(0, 0, color=COLORS.get(provider, "0.5"), label=provider)
    axis.axhline(1, color=OURS, lw=1.2, label="bmtard")
    axis.set_yscale("log")
    axis.margins(y=0.15)
    labels = [f"{name}\n{'x'.join(map(str, dims))}" for name, dims in shapes]
    axis.set_xticks(range(len(shapes)), labels, fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, frameon=False)


def roofline(report: Report) -> Any | None:
    """Operations a second against operations a byte, with the roofs measured in the same run."""
    records = [
        r for r in report.records if r.provider == "bmtard" and r.measures and r.flops
        and r.ideal_bytes and not r.sweep
    ]  # fmt: skip
    if not records:
        return None
    figure = _figure(8, 5.5)
    axis = figure.subplots()
    intensities = [r.flops / r.ideal_bytes for r in records]
    left, right = min(intensities) / 3, max(intensities) * 6
    bandwidth, peak = report.copy_bytes_per_second, report.peak_flops_per_second
    ridge = peak / bandwidth
    axis.plot([left, ridge], [left * bandwidth, peak], color="0.4", lw=1.2)
    axis.plot([ridge, max(right, ridge)], [peak, peak], color="0.4", lw=1.2)
    axis.annotate(f"copy {bandwidth / 1e9:.0f} GB/s", (left, left * bandwidth), fontsize=8,
                  xytext=(4, 10), textcoords="offset points", color="0.3")  # fmt: skip
    axis.annotate(f"matrix product {peak / 1e9:.0f} GFLOP/s", (max(right, ridge), peak), fontsize=8,
                  xytext=(-2, 4), textcoords="offset points", ha="right", color="0.3")  # fmt: skip
    markers = "osD^vP*X"
    for index, op in enumerate(dict.fromkeys(r.op for r in records)):
        points = [r for r in records if r.op == op]
        x = [r.flops / r.ideal_bytes for r in points]
        y = [r.flops / (1e-6 * r.best.median_us) for r in points]
        sizes = [12 + 6 * len(str(r.ideal_bytes)) for r in points]
        axis.scatter(x, y, s=sizes, marker=markers[index % len(markers)], alpha=0.7, label=op)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that must move")
    axis.set_ylabel("operations per second")
    axis.set_title(
        f"bmtard under its roofs (above the slope: the data were in a cache)\n{_where(report)}",
        fontsize=9,
    )
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return figure


def scaling(report: Report) -> Any | None:
    """Time along each axis of the sweep; dashed: linear from the last point."""
    lines = sweep_lines(report.records)
    if not lines:
        return None
    ops = list(dict.fromkeys(op for op, _, _ in lines))
    axes = [axis for axis in AXES if any(key[1] == axis for key in lines)]
    figure = _figure(4.2 * len(axes), 2.8 * len(ops))
    panels = figure.subplots(len(ops), len(axes), squeeze=False)
    for row, op in enumerate(ops):
        for column, axis_name in enumerate(axes):
            panel = panels[row][column]
            found = {p: points for (o, a, p), points in lines.items() if (o, a) == (op, axis_name)}
            if not found:
                panel.set_visible(False)
                continue
            for provider, points in found.items():
                color = OURS if provider == "bmtard" else COLORS.get(provider, "0.5")
                sizes, times = zip(*points, strict=True)
                panel.plot(sizes, times, "o-", ms=3, lw=1.2, color=color, label=provider)
                linear = [times[-1] * size / sizes[-1] for size in sizes]
                panel.plot(sizes, linear, "--", lw=0.7, color=color, alpha=0.6)
            lowest = min(time for points in found.values() for _, time in points)
            panel.set_ylim(bottom=lowest / 2)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(f"{op}, along {AXES[axis_name]}", fontsize=8)
            panel.yaxis.set_major_formatter(lambda value, _: duration(value))
            panel.tick_params(labelsize=7)
            panel.tick_params(axis="y", which="minor", labelleft=False)
            panel.grid(alpha=0.25)
            panel.legend(fontsize=7, frameon=False)
    figure.suptitle(f"Time along one axis; dashed: linear. {_where(report)}", fontsize=9)
    return figure
