"""The report of ``bmtard reproduce``, from what is in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bmtard.extras import import_extra
from bmtard.training.config import TrainConfig, to_plain
from bmtard.training.files import read_json, write_json, write_text
from bmtard.training.metrics import read_metrics
from bmtard.training.report import (
    accuracy_header,
    accuracy_rows,
    attack_title,
    machine,
    markdown_table,
    plot_accuracy,
    plot_balance,
    plot_examples,
    plot_validation,
)
from bmtard.training.reproduce import jobs as work
from bmtard.training.reproduce.config import TEACHERS, ReproduceConfig
from bmtard.training.reproduce.plan import Job, left_out

_SHOWN = ("natural", "sat", "bmtard, sign", "bmtard, bisect")
"""whose adversarial examples are drawn, where they are there"""


def write_report(
    config: ReproduceConfig, jobs: Sequence[Job], command: str, failed: Mapping[str, str]
) -> dict[str, Any]:
    """results.json, the pictures and report.md; returns what results.json holds.

    failed: key -> why, of this run.
    """
    summary = _summary(config, jobs, command, failed)
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", summary)
    write_text(output / "report.md", _text(config, jobs, summary))
    return summary


def _summary(
    config: ReproduceConfig, jobs: Sequence[Job], command: str, failed: Mapping[str, str]
) -> dict[str, Any]:
    main = config.evaluation.main
    found: dict[str, dict[str, Any]] = {}
    unfinished: dict[str, str] = {}
    accuracy: dict[str, list[dict[str, float]]] = {job.name: [] for job in jobs}
    for job in jobs:
        state = _state(job)
        if job.key in failed:
            state = failed[job.key]
        if state:
            unfinished[job.key] = state
        if work.changes(job) or not work.is_trained(job):
            continue
        stale = work.changed_measurements(job)
        measured = {
            name: value
            for name, value in (read_json(job.folder / work.EVALUATION) or {}).items()
            if name not in stale
        }
        names = [m.name for m in job.measurements if m.name in measured]
        results = {name: measured[name]["accuracy"] for name in names}
        found[job.key] = {
            "name": job.name,
            "seed": job.seed,
            "chosen_epoch": _chosen_epoch(job),
            "seconds": work.seconds(job),
            "accuracy": results,
            "images": {name: measured[name]["images"] for name in names},
            "clean_on_these": {name: measured[name]["clean"] for name in names},
            "attack_seconds": {name: measured[name]["seconds"] for name in names},
            "epochs": _rounded(work.history(job)),
        }
        if "clean" in results and main in results:
            accuracy[job.name].append(results)
    if config.report_only:  # what made the runs is of interest, not this
        command = (read_json(config.output / "results.json") or {}).get("command", command)
    machines: list[dict[str, Any]] = []
    for job in jobs:
        there = read_json(job.folder / work.MACHINE)
        if job.key in found and there is not None and there not in machines:
            machines.append(there)
    where = machines[0] if machines else machine()
    return {
        "title": config.title,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": where,
        "other_machines": machines[1:],
        "device": where.get("device"),
        "seeds": config.seeds,
        "seconds": sum(job["seconds"] for job in found.values()),
        "main_attack": main,
        "left_out": left_out(config),
        "accuracy": {name: seeds for name, seeds in accuracy.items() if seeds},
        "unfinished": unfinished,
        "config": to_plain(config),
        "settings": {job.name: job.settings["train"] for job in jobs if job.seed == 0},
        "jobs": found,
    }


def _state(job: Job) -> str:
    """What is left of a job, in words; empty if nothing is."""
    if differences := work.changes(job):
        return f"made with other settings: {differences[0]}"
    if (job.folder / work.ERROR).exists():
        return f"failed, see {job.folder / work.ERROR}"
    if not work.is_trained(job):
        done = len(work.history(job))
        return f"{done} of {job.train.epochs} epochs" if done else "not begun"
    left = [m.name for m in work.missing(job)]
    return f"not measured: {', '.join(left)}" if left else ""


def _chosen_epoch(job: Job) -> int:
    """The epoch whose network is measured."""
    rows = work.history(job)
    if not rows or not job.train.validation_fraction:
        return job.train.epochs
    return 1 + max(
        (epoch for epoch, row in enumerate(rows) if "weighted" in row),
        key=lambda epoch: rows[epoch]["weighted"],  # the first of equals, as in training
    )


def _rounded(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in row.items()
            if name != "event"
        }
        for row in rows
    ]


def terminal_table(summary: Mapping[str, Any]) -> Any:
    """For the console of rich."""
    table = import_extra("rich.table", "train").Table(title="accuracy in %, mean ± std over seeds")
    accuracy, main = summary["accuracy"], summary["main_attack"]
    for index, title in enumerate(accuracy_header(accuracy, main)):
        table.add_column(title, justify="right" if index else "left", no_wrap=not index)
    for row in accuracy_rows(accuracy, main):
        table.add_row(*row)
    return table


def _pictures(config: ReproduceConfig, jobs: Sequence[Job], summary: Mapping[str, Any]) -> str:
    """Draws what there is to draw; returns the text around it."""
    output, text = config.output, ""
    if summary["accuracy"]:
        plot_accuracy(summary["accuracy"], config.evaluation.main, output / "accuracy.png")
        text += "![Robust against clean accuracy](accuracy.png)\n\n"
    clean = [job for job in jobs if not work.changes(job)]
    runs: dict[str, list[list[tuple[float, float]]]] = {}
    for job in clean:
        points = [
            (1.0 + index, row["weighted"])
            for index, row in enumerate(work.history(job))
            if "weighted" in row
        ]
        if points:
            runs.setdefault(job.name, []).append(points)
    if runs:
        plot_validation(runs, output / "validation.png")
        text += (
            "## On the validation images, epoch by epoch\n\n"
            "![Weighted robust accuracy on the validation images](validation.png)\n\n"
            "The best epoch of each run is the one that is measured on the test images.\n\n"
        )
    balanced: dict[str, list[Path]] = {}
    for job in clean:
        metrics = job.folder / "metrics.jsonl"
        rows = read_metrics(metrics) if metrics.exists() else []
        if rows and "weights" in rows[0]:
            balanced.setdefault(job.name, []).append(job.folder)
    if balanced:
        plot_balance(balanced, output / "balance.png")
        text += f"""## The balance

![Temperatures, entropies, weights and losses](balance.png)

Thick lines are the first seed, thin lines the others. B-MTARD raises the temperature of the
teacher that is surer until the mean softmax entropies of both agree: with "bisect" in every step
at once, with "sign", the published rule, in steps of {_student(jobs).balance.temperature_lr:g}.
The loss weights start at 1/2, move towards the teacher from whom the student has learnt less
since the first step, and turn back as it catches up.

"""
    if examples := _examples(clean):
        plot_examples(examples, _student(jobs).attack.epsilon, output / "examples.png")
        text += f"""## Adversarial examples

![Images, adversarial examples, differences](examples.png)

{attack_title(config.evaluation.main)} on the first test images, for networks of seed 0. Above each:
the answer to the image → the answer to the adversarial example, red if that is wrong. Differences
from -epsilon to epsilon are drawn from black to white.

"""
    return text


def _examples(jobs: Sequence[Job]) -> dict[str, Mapping[str, Any]]:
    paths = {job.name: job.folder / work.EXAMPLES for job in jobs if job.seed == 0}
    there = {name: path for name, path in paths.items() if path.exists()}
    names = [name for name in _SHOWN if name in there] or list(there)[:3]
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        with np.load(there[name]) as arrays:
            found[name] = {key: arrays[key] for key in arrays.files}
    return found


def _text(config: ReproduceConfig, jobs: Sequence[Job], summary: Mapping[str, Any]) -> str:
    accuracy, evaluation = summary["accuracy"], config.evaluation
    main = attack_title(evaluation.main)
    table = "Nothing is measured yet."
    if accuracy:
        table = markdown_table(
            accuracy_header(accuracy, evaluation.main), accuracy_rows(accuracy, evaluation.main)
        )
    unfinished = "".join(f"- {key}: {why}\n" for key, why in summary["unfinished"].items())
    if unfinished:
        unfinished = f"## Unfinished\n\n{unfinished}\n"
    return f"""# {config.title}

Accuracy in per cent on the test images, mean ± standard deviation over {_seeds(config)}
(initial weights, batches, attacks). Weighted robust accuracy is the mean of clean and {main}
accuracy.

{table}

{_pictures(config, jobs, summary)}{unfinished}## How it was measured

{_method(config, jobs, summary)}
- command: `{summary["command"]}`, {summary["seconds"]:.0f} s of work in all jobs, {summary["date"]}
{_machines(summary)}

All settings and every single result are in results.json; each run's own files are in `jobs`.
"""


def _machines(summary: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {value}" for name, value in summary["machine"].items()]
    return "\n".join([*lines, *(f"- some jobs: {other}" for other in summary["other_machines"])])


def _seeds(config: ReproduceConfig) -> str:
    return f"{config.seeds} seed{'s' if config.seeds > 1 else ''}"


def _student(jobs: Sequence[Job]) -> TrainConfig:
    """What the students share stands in any of them."""
    return next(job.train for job in jobs if job.name not in TEACHERS.values())


def _method(config: ReproduceConfig, jobs: Sequence[Job], summary: Mapping[str, Any]) -> str:
    train, evaluation = _student(jobs), config.evaluation
    attack, optimizer = train.attack, train.optimizer
    images = "all training images"
    if train.train_limit is not None:
        images = f"the first {train.train_limit} training images"
    chosen = "the last epoch counts"
    if train.validation_fraction:
        chosen = (
            f"the epoch is chosen by weighted accuracy under PGD-{train.validation_steps} on "
            f"{100 * train.validation_fraction:.1f} % of the training images, kept apart"
        )
    lines = [
        f"data: {train.data}; {images}",
        f'teachers: clean "{config.teacher_clean}", robust "{config.teacher_robust}"; '
        f"{config.teacher_seeds or config.seeds} of each",
        f"students: {train.model}; natural, sat and trades learn from labels, the others from "
        "teachers",
        f"training of the students: {train.epochs} epochs of batches of {train.batch_size}, SGD, "
        f"{optimizer.schedule} learning rate of at most {optimizer.lr:g}; {chosen}",
        f"training attack of the students: pixels in [0, 1], norm {attack.norm}, epsilon "
        f"{attack.epsilon:g}, "
        f"{attack.steps} steps of {attack.step_size:g}, start {attack.random_start}",
        "attacks in the table: 20 steps of epsilon / 4 (PGD-20) and of 0.094 epsilon (PGD-TRADES), "
        "30 of epsilon / 4 on the margin (CW), from a uniform start",
        f"test images: {'all' if evaluation.limit is None else f'the first {evaluation.limit}'}"
        + "".join(f"; {attack_title(a)}: the first {n}" for a, n in evaluation.limits.items()),
    ]
    if config.tuned or config.changes:
        lines.append(f"settings of single runs: {'; '.join((*config.tuned, *config.changes))}")
    if summary["left_out"]:
        names = ", ".join(map(attack_title, summary["left_out"]))
        lines.append(f"{names}: left out, as pyautoattack (bmtard[eval]) was not installed")
    return "\n".join(f"- {line}" for line in lines)
