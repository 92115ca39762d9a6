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

    The losses begin with those of the first step, of which the weights are made.

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
                first = rows[0].get("initial_losses") if name == "losses" else None
                roles = ROLES if count == 2 else [f"teacher {k + 1}" for k in range(count)]
                for k, role in enumerate(roles):
                    axes[line][column].plot(
                        [0.0, *epochs] if first else epochs,
                        [*([first[k]] if first else []), *(row[name][k] for row in rows)],
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
    axes[-1][-1].legend(frameon=False)
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
    axis.set_ylabel(f"accuracy under {attack_title(attack)} (%)")
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


def plot_validation(
    runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]], output: Path
) -> None:
    """Weighted robust accuracy on the validation images over the epochs.

    runs: name -> for each seed its (epoch, accuracy) points; the first seed is drawn bold.
    """
    figure = import_extra("matplotlib.figure", "train").Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for number, (name, seeds) in enumerate(runs.items()):
        for index, points in enumerate(seeds):
            axis.plot(
                [epoch for epoch, _ in points],
                [100 * accuracy for _, accuracy in points],
                color=f"C{number}",
                linestyle="--" if name.startswith("teacher") else "-",
                linewidth=1.8 if index == 0 else 0.8,
                alpha=1.0 if index == 0 else 0.35,
                label=name if index == 0 else None,
            )
    axis.set_xlabel("epoch")
    axis.set_ylabel("weighted robust accuracy on validation images (%)")
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def plot_examples(networks: Mapping[str, Mapping[str, Any]], epsilon: float, output: Path) -> None:
    """Images, and for each network its adversarial examples and the difference, magnified.

    networks: title -> arrays ``images`` and ``adversarial`` [N, c, h, w] in [0, 1], ``labels`` [N]
    and ``answers`` [2, N], to the images and to the adversarial examples. The same images in all.
    """
    first = next(iter(networks.values()))
    count = len(first["labels"])
    rows = 1 + 2 * len(networks)
    figure = import_extra("matplotlib.figure", "train").Figure(
        figsize=(1.2 * count + 1.6, 1.45 * rows), layout="constrained"
    )
    axes = figure.subplots(rows, count, squeeze=False)

    def show(
        row: int, title: str, images: Any, words: Sequence[str], right: Sequence[bool]
    ) -> None:
        for column in range(count):
            axis = axes[row][column]
            pixels = images[column].transpose(1, 2, 0)
            axis.imshow(
                pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=1
            )
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(words[column], fontsize=8, color="black" if right[column] else COLORS[0])
        axes[row][0].set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")

    labels = first["labels"]
    show(0, "image", first["images"], [f"class {label}" for label in labels], [True] * count)
    for index, (title, arrays) in enumerate(networks.items()):
        before, after = arrays["answers"]
        words = [f"{a} → {b}" for a, b in zip(before, after, strict=True)]
        show(1 + 2 * index, f"{title}:\nattacked", arrays["adversarial"], words, after == labels)
        difference = (arrays["adversarial"] - arrays["images"]) / (2 * epsilon) + 0.5
        difference = difference.clip(0, 1)
        show(2 + 2 * index, "difference,\nmagnified", difference, [""] * count, [True] * count)
    figure.savefig(output, dpi=120)


ATTACK_TITLES = {
    "clean": "Clean",
    "fgsm": "FGSM",
    "pgd-sat": "PGD-20",
    "pgd-trades": "PGD-TRADES",
    "cw": "CW",
    "square": "Square",
    "autoattack": "AutoAttack",
    "transfer-pgd": "PGD",
    "transfer-cw": "CW",
}


def attack_title(name: str) -> str:
    """Of an attack, or of "ATTACK from SURROGATE"."""
    attack, found, surrogate = name.partition(" from ")
    return ATTACK_TITLES.get(attack, attack) + (f" from {surrogate}" if found else "")


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def accuracy_rows(
    results: Mapping[str, Sequence[Mapping[str, float]]], attack: str
) -> list[list[str]]:
    """Name, each accuracy and the weighted robust accuracy under ``attack``, in per cent."""
    rows = []
    for name, seeds in results.items():
        columns = [[seed[key] for seed in seeds if key in seed] for key in _columns(results)]
        columns.append([(seed["clean"] + seed[attack]) / 2 for seed in seeds])
        rows.append([name, *map(_cell, columns)])
    return rows


def accuracy_header(results: Mapping[str, Sequence[Mapping[str, float]]], attack: str) -> list[str]:
    titles = [attack_title(key) for key in _columns(results)]
    return ["", *titles, f"Weighted ({attack_title(attack)})"]


def _columns(results: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Everything that was measured anywhere, in the order in which it first comes."""
    return list(dict.fromkeys(key for seeds in results.values() for seed in seeds for key in seed))


def _cell(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return "-"
    mean, std = mean_std([100 * value for value in accuracies])
    return f"{mean:.1f} ± {std:.1f}" if len(accuracies) > 1 else f"{mean:.1f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = build_info()
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bmtard": info.version,
        "kernels": f"compiled, {info.instruction_set}" if info.native else "plain torch",
    }


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
