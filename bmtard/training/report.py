"""Pictures and words about finished runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from bmtard._library import build_info
from bmtard.extras import import_extra
from bmtard.training.metrics import read_metrics

ROLES = ("robust teacher", "clean teacher")
COLORS = ("#c1432e", "#2f6db5")
PANELS = {
    "temperatures": "temperature",
    "entropies": "teacher entropy (nats)",
    "weights": "loss weight",
    "losses": "KL to teacher (nats / C)",
}


def plot_balance(runs: Mapping[str, Sequence[Path]], output: Path) -> None:
    """Temperatures, entropies, weights and losses over the epochs: a column for each title.

    runs: title -> folders of runs, one a seed; the first is drawn bold.
    """
    figure = import_extra("matplotlib.figure", "train").Figure(
        figsize=(1 + 4.2 * len(runs), 9.5), layout="constrained"
    )
    axes = figure.subplots(len(PANELS), len(runs), sharex=True, sharey="row", squeeze=False)
    for column, (title, folders) in enumerate(runs.items()):
        axes[0][column].set_title(title)
        axes[-1][column].set_xlabel("epoch")
        for index, folder in enumerate(folders):
            rows = read_metrics(folder / "metrics.jsonl")
            epochs = [row["epoch"] for row in rows]
            for line, name in enumerate(PANELS):
                # MTARD leaves the temperatures at 1 and does not look at the entropies.
                if name not in rows[0]:
                    continue
                count = len(rows[0][name])
                roles = ROLES if count == 2 else [f"teacher {k + 1}" for k in range(count)]
                for k, role in enumerate(roles):
                    axes[line][column].plot(
                        epochs,
                        [row[name][k] for row in rows],
                        color=COLORS[k] if k < len(COLORS) else f"C{k}",
                        # Balanced entropies lie on top of each other.
                        linestyle="--" if k == 1 and name == "entropies" else "-",
                        linewidth=1.8 if index == 0 else 0.8,
                        alpha=1.0 if index == 0 else 0.35,
                        label=role if index == 0 else None,
                    )
    for line, (name, label) in enumerate(PANELS.items()):
        axes[line][0].set_ylabel(label)
        for axis in axes[line]:
            axis.grid(alpha=0.25)
            if name == "losses":
                axis.set_yscale("log")
            if not axis.lines:
                fixed = {"temperatures": "fixed at 1", "entropies": "not balanced"}[name]
                axis.text(0.5, 0.5, fixed, transform=axis.transAxes, ha="center", color="0.4")
    axes[0][-1].legend(loc="lower right", frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def plot_accuracy(
    results: Mapping[str, Sequence[Mapping[str, float]]], attack: str, output: Path
) -> None:
    """Robust against clean accuracy, mean and standard deviation over seeds.

    results: name -> the accuracies of each seed. Names that begin with "teacher" are squares.
    """
    figure = import_extra("matplotlib.figure", "train").Figure(
        figsize=(7.5, 5.5), layout="constrained"
    )
    axis = figure.subplots()
    points = {
        name: (
            mean_std([100 * seed["clean"] for seed in seeds]),
            mean_std([100 * seed[attack] for seed in seeds]),
        )
        for name, seeds in results.items()
    }
    best = max(robust[0] for _, robust in points.values())
    # Networks without any robustness would squeeze the others together.
    shown = {name: point for name, point in points.items() if point[1][0] >= best / 4}
    for index, name in enumerate(sorted(shown, key=lambda name: shown[name][0])):
        clean, robust = shown[name]
        teacher, ours = name.startswith("teacher"), name.startswith("bmtard")
        axis.errorbar(
            clean[0],
            robust[0],
            xerr=clean[1],
            yerr=robust[1],
            fmt="s" if teacher else "o",
            markersize=8 if ours else 6,
            capsize=2,
            linewidth=1,
            color="0.55" if teacher else (COLORS[0] if ours else COLORS[1]),
        )
        axis.annotate(
            name,
            (clean[0], robust[0]),
            xytext=(5, 8 if index % 2 else -9),
            textcoords="offset points",
            va="center",
        )
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    right = max(right, left + 1.15 * (right - left))
    for level in range(5, 100):
        axis.plot(
            [left, right], [2 * level - left, 2 * level - right], color="0.85", lw=0.8, zorder=0
        )
        # The label stands where the line crosses the top or the left edge.
        x, y = (2 * level - top, top) if 2 * level - top > left else (left, 2 * level - left)
        if left <= x <= right and bottom <= y <= top:
            axis.text(x, y, f" {level}", color="0.6", fontsize=8, va="top")
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.set_xlabel("clean accuracy (%)")
    axis.set_ylabel(f"accuracy under {ATTACK_TITLES.get(attack, attack)} (%)")
    notes = ["grey lines: equal weighted robust accuracy"]
    if hidden := [
        f"{name} ({clean[0]:.1f}, {robust[0]:.1f})"
        for name, (clean, robust) in points.items()
        if name not in shown
    ]:
        notes.append(f"not shown: {', '.join(hidden)}")
    axis.set_title("\n".join(notes), fontsize=9, color="0.4")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


ATTACK_TITLES = {"clean": "Clean", "fgsm": "FGSM", "pgd-sat": "PGD-20"}


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def accuracy_rows(
    results: Mapping[str, Sequence[Mapping[str, float]]], attack: str
) -> list[list[str]]:
    """Name, each accuracy and the weighted robust accuracy under ``attack``, in per cent."""
    rows = []
    for name, seeds in results.items():
        columns = [[seed[key] for seed in seeds] for key in seeds[0]]
        columns.append([(seed["clean"] + seed[attack]) / 2 for seed in seeds])
        cells = [mean_std([100 * value for value in column]) for column in columns]
        rows.append([name, *(f"{mean:.1f} ± {std:.1f}" for mean, std in cells)])
    return rows


def accuracy_header(keys: Sequence[str], attack: str) -> list[str]:
    title = ATTACK_TITLES.get(attack, attack)
    return ["", *(ATTACK_TITLES.get(key, key) for key in keys), f"Weighted ({title})"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = build_info()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bmtard": info.version,
        "kernels": f"compiled, {info.instruction_set}" if info.native else "plain torch",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
