"""Kills short training runs with SIGKILL, resumes them, and looks at what every kill leaves.

    python tools/kill_runs.py --kills 200 --seed 0      at random moments
    python tools/kill_runs.py --at-writes               before each write, link and rename of a file

A run goes on with resume until it ends, then the next one begins. After every kill all files must
be readable and at most one checkpoint interval lost; at the end weights, optimizer, balance,
metrics (without times) and results must equal those of a run that was never killed, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # a process with one thread can be forked

import torch
import torch._dynamo  # an optimizer imports it at its first step: once here, not in each run

from bmtard.data import ImageData, load_digits
from bmtard.training import checkpoint
from bmtard.training.config import DIGITS, AttackConfig, BalanceConfig, TrainConfig
from bmtard.training.metrics import NoProgress
from bmtard.training.trainer import train

TIMES = ("seconds", "images_per_s", "epoch_seconds")


def start(config: TrainConfig, data: ImageData, before: Callable[[], None] | None = None) -> int:
    """Trains in a new process, which resumes what is there; returns its id."""
    if child := os.fork():
        return child
    try:
        if before is not None:
            before()
        train(replace(config, resume=True), NoProgress(), data)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def finish(child: int) -> bool:
    """Waits; returns whether the run has ended by itself rather than by SIGKILL."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise SystemExit(f"a run failed: status {os.waitstatus_to_exitcode(status)}")
    return True


def cpu_seconds(child: int) -> float:
    """That a process has used. On a busy machine its work goes by this clock alone."""
    return time.clock_gettime((~child << 3) | 2)  # Linux's clock of the process, CPUCLOCK_SCHED


def kill_at(child: int, seconds: float) -> None:
    """Sends SIGKILL when the process has used so much of the CPU, or does nothing if it ends."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if cpu_seconds(child) >= seconds:
            os.kill(child, signal.SIGKILL)
            return
        time.sleep(0.001)


def kill_at_write(number: int) -> None:
    """Makes this process kill itself before its ``number``-th change of a file, from 1."""
    left = [number]
    for name in ("fsync", "link", "replace"):
        original = getattr(os, name)

        def counted(*values: Any, _original: Any = original) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return _original(*values)

        setattr(os, name, counted)


def rows(path: Path) -> list[dict[str, Any]]:
    """Of a metrics.jsonl, which may end in a line that was cut."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def lost_steps(folder: Path) -> int:
    """Steps that were logged and are in no checkpoint. Raises where a file cannot be read."""
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    states = {path.name: checkpoint.load(path) for path in folder.glob("*.pt")}
    done = max((row["step"] for row in rows(folder / "metrics.jsonl")), default=0)
    return max(0, done - (states["last.pt"]["step"] if "last.pt" in states else 0))


def timeless(value: Any) -> Any:
    """Without times and paths."""
    if isinstance(value, dict):
        skipped = (*TIMES, "config", "checkpoint")
        return {name: timeless(item) for name, item in value.items() if name not in skipped}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def equal(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def end_of(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves and that does not depend on time."""
    found: dict[str, Any] = {
        name: checkpoint.load(folder / name) for name in ("last.pt", "previous.pt", "best.pt")
    }
    found["results.json"] = json.loads((folder / "results.json").read_text())
    found["metrics.jsonl"] = rows(folder / "metrics.jsonl")
    return {name: timeless(value) for name, value in found.items()}


def prepare(folder: Path) -> tuple[TrainConfig, ImageData]:
    """The configuration of the runs, its data, and its teachers, which are trained."""
    full = load_digits()
    data = replace(
        full,
        train_images=full.train_images[:384],
        train_labels=full.train_labels[:384],
        test_images=full.test_images[:50],
        test_labels=full.test_labels[:50],
    )
    config = replace(
        DIGITS,
        model="cnn-4",
        epochs=4,
        batch_size=64,
        attack=AttackConfig(epsilon=0.1, step_size=0.05, steps=2),
        test_attacks=("fgsm",),
        device="cpu",
    )
    for role, method in (("clean", "natural"), ("robust", "sat")):
        teacher = replace(config, method=method, output=folder / role)
        finish(start(teacher, data))
    config = replace(
        config,
        method="bmtard",
        crop_padding=1,
        balance=BalanceConfig(mode="sign", temperature_lr=0.02),
        teacher_clean=folder / "clean" / "last.pt",
        teacher_robust=folder / "robust" / "last.pt",
        validation_fraction=0.2,
        validation_steps=2,
        log_every=1,
        checkpoint_every=2,
    )
    return config, data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="at random moments, in all")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--at-writes", action="store_true", help="at the writes of one run instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, data = prepare(folder)
        whole = replace(config, output=folder / "whole")
        before = os.times()
        finish(start(whole, data))
        after = os.times()
        seconds = after.children_user + after.children_system
        seconds -= before.children_user + before.children_system
        expected = end_of(whole.folder)
        steps = max(row["step"] for row in expected["metrics.jsonl"])
        interval = config.checkpoint_every * steps // config.epochs
        kills, runs, most_lost, problems = 0, 0, 0, 0
        while kills < options.kills and not (options.at_writes and runs):
            run = replace(config, output=folder / "killed")
            attempt, ended = 0, False
            while not ended:
                attempt += 1
                if options.at_writes:
                    child = start(run, data, lambda number=attempt: kill_at_write(number))  # type: ignore[misc]
                elif kills < options.kills:
                    child = start(run, data)
                    kill_at(child, chance.uniform(0, seconds))
                else:
                    child = start(run, data)
                ended = finish(child)
                if not ended:
                    kills += 1
                    lost = lost_steps(run.folder)
                    most_lost = max(most_lost, lost)
                    problems += lost > interval
                    if kills % 10 == 0:
                        print(f"{kills} kills", flush=True)
            runs += 1
            if different := [k for k, v in end_of(run.folder).items() if not equal(v, expected[k])]:
                print(f"run {runs} ends with another {', '.join(different)}", flush=True)
                problems += 1
            shutil.rmtree(run.folder)
            print(f"{kills} kills, {runs} runs to their end, {problems} problems", flush=True)
    print(f"at most {most_lost} steps lost; the interval is {interval} of {steps} steps")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
