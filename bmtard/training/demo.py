"""The demonstration: every method on the bundled digits, over several seeds, with a report."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bmtard.extras import import_extra
from bmtard.training.config import DIGITS, MethodName, TrainConfig, require, to_plain
from bmtard.training.metrics import Display, Progress
from bmtard.training.report import (
    accuracy_header,
    accuracy_rows,
    machine,
    markdown_table,
    plot_accuracy,
    plot_balance,
)
from bmtard.training.trainer import TrainResult, train

ATTACK = "pgd-sat"
TEACHER_MODEL = "cnn-16"
TEACHERS: dict[str, MethodName] = {"teacher, clean": "natural", "teacher, robust": "sat"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What ``bmtard demo`` runs. Everything else is the preset "digits" of ``bmtard train``."""

    seeds: int = 3
    """runs of each method, with seeds 0, 1, ..."""
    epochs: int = DIGITS.epochs
    """of teachers and students"""
    workers: int | None = None
    """processes, one thread each; default: the cores, at most 8"""
    output: Path = Path("runs/demo")
    """folder of report.md, results.json, the pictures and all runs"""

    def __post_init__(self) -> None:
        require(self, "seeds", self.seeds >= 1, ">= 1")
        require(self, "epochs", self.epochs >= 1, ">= 1")
        require(self, "workers", self.workers is None or self.workers >= 1, ">= 1")


def student_configs(base: TrainConfig) -> dict[str, TrainConfig]:
    """Name in the table -> configuration, without seed, teachers and folder."""
    return {
        "natural": replace(base, method="natural"),
        "sat": replace(base, method="sat"),
        "trades": replace(base, method="trades"),
        "rslad": replace(base, method="rslad"),
        "mtard": replace(base, method="mtard"),
        "bmtard, sign": replace(base, method="bmtard", balance=replace(base.balance, mode="sign")),
        "bmtard, bisect": replace(base, method="bmtard"),
    }


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / "runs" / f"{name.replace(', ', '-')}-seed{seed}"


def run_demo(config: DemoConfig, command: str) -> dict[str, Any]:
    """Trains and tests everything, writes the report, returns what results.json holds."""
    started = time.perf_counter()
    base = replace(
        DIGITS, epochs=config.epochs, checkpoint_every=config.epochs, device="cpu", overwrite=True
    )
    students = student_configs(base)
    names = [*TEACHERS, *students]
    with Display(config.seeds * len(names)) as display, _Pool(config, display) as pool:
        for seed in range(config.seeds):
            for name, method in TEACHERS.items():
                pool.submit(name, seed, replace(base, method=method, model=TEACHER_MODEL))
        taught = {name: c for name, c in students.items() if c.method not in TEACHERS.values()}
        for seed in range(config.seeds):
            for name in students.keys() - taught.keys():
                pool.submit(name, seed, students[name])
        # Each student of teachers starts when those of its seed are ready.
        for seed in range(config.seeds):
            teachers = {
                role: pool.result(f"teacher, {role}", seed).checkpoint
                for role in ("clean", "robust")
            }
            for name, student in taught.items():
                pool.submit(
                    name,
                    seed,
                    replace(
                        student,
                        teacher_clean=teachers["clean"],
                        teacher_robust=teachers["robust"],
                    ),
                )
        results = {
            name: [pool.result(name, seed) for seed in range(config.seeds)] for name in names
        }
        accuracy = {name: [run.accuracy for run in runs] for name, runs in results.items()}
        summary = {
            "command": command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "workers": pool.workers,
            "seconds": time.perf_counter() - started,
            "seeds": config.seeds,
            "config": to_plain(base),
            "teacher_model": TEACHER_MODEL,
            "accuracy": accuracy,
            "run_seconds": {n: [run.seconds for run in runs] for n, runs in results.items()},
        }
        write_report(config.output, summary)
        display.print(_terminal_table(accuracy))
        display.print(f"{summary['seconds']:.0f} s; report: {config.output / 'report.md'}")
    return summary


def write_report(output: Path, summary: Mapping[str, Any]) -> None:
    """results.json, the pictures and report.md."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    accuracy, seeds = summary["accuracy"], range(summary["seeds"])
    balanced = ("mtard", "bmtard, sign", "bmtard, bisect")
    plot_balance(
        {name: [folder_of(output, name, seed) for seed in seeds] for name in balanced},
        output / "balance.png",
    )
    plot_accuracy(accuracy, ATTACK, output / "accuracy.png")
    header = accuracy_header(list(next(iter(accuracy.values()))[0]), ATTACK)
    base = summary["config"]
    attack, optimizer = base["attack"], base["optimizer"]
    training = (
        f"{base['epochs']} epochs of batches of {base['batch_size']}, SGD, {optimizer['schedule']} "
        f"learning rate of at most {optimizer['lr']:g}; the last epoch counts"
    )
    attacks = (
        f"pixels in [0, 1], maximum norm, epsilon {attack['epsilon']:g}, uniform start; in "
        f"training {attack['steps']} steps of {attack['step_size']:g}, PGD-20 20 of epsilon / 4"
    )
    run = f"{summary['workers']} processes, {summary['seconds']:.0f} s, {summary['date']}"
    step = base["balance"]["temperature_lr"]
    (output / "report.md").write_text(f"""# B-MTARD and its baselines on 8x8 digits

Accuracy in per cent on the test images, mean ± standard deviation over {len(seeds)} seeds (initial
weights, batches, attacks; the split is fixed). Weighted robust accuracy is the mean of clean and
PGD-20 accuracy.

{markdown_table(header, accuracy_rows(accuracy, ATTACK))}

![Robust against clean accuracy](accuracy.png)

## The balance

![Temperatures, entropies, weights and losses](balance.png)

Thick lines are seed 0, thin lines the other seeds. The clean teacher is the surer one, so B-MTARD
raises its temperature until the mean softmax entropies of both teachers agree: with "bisect" in
every step at once, with "sign", the published rule, in steps of {step:g}.
The loss weights start at 1/2, move towards the teacher from whom the student has learnt less
since the first step, and turn back as it catches up.

## How it was measured

- data: the 1,797 scanned digits of scikit-learn, two thirds to train, one third to test
- teachers: {summary["teacher_model"]}; "clean" trained on clean images, "robust" on PGD images
- students: {base["model"]}; natural, sat and trades learn from labels, the others from teachers
- training: {training}
- attacks: {attacks}
- command: `{summary["command"]}`, {run}
{chr(10).join(f"- {name}: {value}" for name, value in summary["machine"].items())}

All settings and every single result are in results.json. To train one of them alone:
`bmtard train digits --method bmtard --teacher-clean CHECKPOINT --teacher-robust CHECKPOINT`.
These are tiny networks on tiny images: the table shows how the methods trade clean for robust
accuracy, not what they reach on larger data.
""")


def _terminal_table(accuracy: Mapping[str, list[dict[str, float]]]) -> Any:
    table = import_extra("rich.table", "train").Table(title="accuracy in %, mean ± std over seeds")
    for index, title in enumerate(accuracy_header(list(next(iter(accuracy.values()))[0]), ATTACK)):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in accuracy_rows(accuracy, ATTACK):
        table.add_row(*row)
    return table


class _Pool:
    """Runs in worker processes, shown in this one.

    The networks are too small to gain from several threads, so each worker has one.
    """

    def __init__(self, config: DemoConfig, display: Display) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = config.workers or min(cores or 1, 8)
        self.output, self.display = config.output, display
        context = multiprocessing.get_context("spawn")
        self.manager = context.Manager()
        self.messages = self.manager.Queue()
        self.executor = ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        )
        self.futures: dict[tuple[str, int], Future[TrainResult]] = {}
        self.shown: dict[tuple[str, int], Progress] = {}

    def submit(self, name: str, seed: int, config: TrainConfig) -> None:
        config = replace(config, seed=seed, output=folder_of(self.output, name, seed))
        self.shown[name, seed] = self.display.run()
        self.futures[name, seed] = self.executor.submit(
            train, config, QueuedProgress(self.messages, (name, seed))
        )

    def result(self, name: str, seed: int) -> TrainResult:
        """Waits for a run, and shows what all of them tell meanwhile. Raises what it raised."""
        future = self.futures[name, seed]
        while not future.done():
            wait([future], timeout=0.1, return_when=FIRST_COMPLETED)
            self._show()
            for other in self.futures.values():
                if other.done():
                    other.result()  # one failure ends the demo
        self._show()
        return future.result()

    def _show(self) -> None:
        while True:
            try:
                key, call, arguments = self.messages.get_nowait()
            except queue.Empty:
                return
            getattr(self.shown[key], call)(*arguments)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.shutdown(cancel_futures=True)
        self.manager.shutdown()


class QueuedProgress:
    """A :class:`Progress` in a worker that speaks through a queue."""

    def __init__(self, messages: Any, key: tuple[str, int]) -> None:
        self.messages, self.key = messages, key

    def begin(self, title: str, total: int, done: int = 0) -> None:
        name, seed = self.key
        self.messages.put((self.key, "begin", (f"{name}, seed {seed}", total, done)))

    def advance(self, text: str) -> None:
        self.messages.put((self.key, "advance", (text,)))

    def end(self, text: str) -> None:
        self.messages.put((self.key, "end", (text,)))
