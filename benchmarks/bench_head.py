"""The whole B-MTARD head, forward and backward: bmtard against the published code's way.

    python benchmarks/bench_head.py --threads 1 --json benchmarks/results/head-cpu.json

Providers run in turns in one process, a block of calls each and in a new order every round, so that
a drift of the machine hits all alike and none always runs in the caches that another has left. The
figures are medians over the rounds of a block's time per call, with the 20th and 80th percentile,
and ratios to bmtard. Each provider's loss and gradients are checked against the float64 formula
before it is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import bmtard
from bmtard.training.report import machine

SHAPES = ((128, 10), (128, 200), (1024, 1000), (256, 32000))
EPS = 1e-5


class PublishedHead:
    """Two teachers, "sign" mode, written as the released training script does it: one torch op
    after the other, balance state in Python floats, `.item()` for each of its six values."""

    def __init__(self) -> None:
        self.temperature = [1.0, 1.0]
        self.weight = [0.5, 0.5]
        self.initial: list[float] | None = None

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        losses, entropies = [], []
        for k in range(2):
            p = torch.softmax(teachers[k] / self.temperature[k], dim=1)
            log_q = torch.log_softmax(students[k], dim=1)
            losses.append(torch.mean(p * torch.log(p + EPS) - p * log_q))
            entropies.append(torch.mean((p * torch.log(p + EPS)).sum(1)).item())
        for k in range(2):
            sign = (entropies[k] / entropies[1 - k] > 1) - (entropies[k] / entropies[1 - k] < 1)
            self.temperature[k] = min(max(self.temperature[k] - 1e-3 * sign, 1.0), 10.0)
        values = [loss.item() for loss in losses]
        self.initial = self.initial or values
        relative = [value / start for value, start in zip(values, self.initial, strict=True)]
        mean = sum(relative) / 2
        relative = [r / mean for r in relative]
        self.weight = [
            max(w - 0.025 * (w - r / sum(relative)), 0.0)
            for w, r in zip(self.weight, relative, strict=True)
        ]
        self.weight = [w / sum(self.weight) for w in self.weight]
        return self.weight[0] * losses[0] + self.weight[1] * losses[1]


class TensorHead:
    """The same with its state in tensors, so that torch.compile sees one graph without syncs."""

    def __init__(self) -> None:
        self.temperature = torch.ones(2)
        self.weight = torch.full((2,), 0.5)
        self.initial = torch.zeros(2)
        self.step = torch.zeros((), dtype=torch.int64)
        self.compiled = torch.compile(self.head, fullgraph=True)

    @staticmethod
    def head(
        students: list[Tensor],
        teachers: list[Tensor],
        temperature: Tensor,
        weight: Tensor,
        initial: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses, entropies = [], []
        for k in range(2):
            p = torch.softmax(teachers[k] / temperature[k], dim=1)
            log_q = torch.log_softmax(students[k], dim=1)
            losses.append(torch.mean(p * torch.log(p + EPS) - p * log_q))
            entropies.append(torch.mean((p * torch.log(p + EPS)).sum(1)))
        loss, entropy = torch.stack(losses), torch.stack(entropies)
        value = loss.detach()
        initial = torch.where(step == 0, value, initial)
        relative = value / initial
        weight = (weight - 0.025 * (weight - relative / relative.sum())).clamp(min=0)
        weight = weight / weight.sum()
        ratio = entropy / entropy.flip(0) - 1
        temperature = (temperature - 1e-3 * ratio.sign()).clamp(1, 10)
        return (weight * loss).sum(), temperature, weight, initial

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        loss, self.temperature, self.weight, self.initial = self.compiled(
            students, teachers, self.temperature, self.weight, self.initial, self.step
        )
        self.step = self.step + 1
        return loss


def providers() -> dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]]:
    return {
        "bmtard sign": bmtard.BMTARDLoss(balance="sign", eps=EPS),
        "bmtard bisect": bmtard.BMTARDLoss(balance="bisect", eps=EPS),
        "eager as published": PublishedHead(),
        "torch.compile": TensorHead(),
    }


def step(head: Callable, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    for student in students:
        student.grad = None
    loss = head(students, teachers)
    loss.backward()
    return loss


def check(name: str, loss: Tensor, students: list[Tensor], teachers: list[Tensor]) -> None:
    """A first step, at weights 1/2 and (but for "bisect") temperatures 1, in float64."""
    expected = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        p, s = torch.softmax(teacher.double(), 1), student.detach().double().requires_grad_()
        part = 0.5 * (p * torch.log(p + EPS) - p * torch.log_softmax(s, 1)).mean()
        part.backward()
        expected += part.item()
        torch.testing.assert_close(student.grad.double(), s.grad, rtol=1e-4, atol=1e-9, msg=name)
    if abs(loss.item() - expected) > 1e-4 * abs(expected):
        raise AssertionError(f"{name}: loss {loss.item()}, expected {expected}")


def measure(rows: int, classes: int, seconds: float) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    students = [torch.randn(rows, classes, requires_grad=True) for _ in range(2)]
    teachers = [3 * torch.randn(rows, classes), torch.randn(rows, classes)]
    heads = providers()
    for name, head in heads.items():
        loss = step(head, students, teachers)
        if name != "bmtard bisect":
            check(name, loss, students, teachers)
    block = 20 if rows * classes <= 32768 else 1
    names = list(heads)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    warm_up = 2
    while time.perf_counter() < end or len(times[names[0]]) < warm_up + 20:
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            for _ in range(block):
                step(heads[name], students, teachers)
            times[name].append(1e6 * (time.perf_counter() - start) / block)
    result = {}
    for name in heads:
        values = times[name][warm_up:]
        low, *_, high = statistics.quantiles(values, n=5)
        result[name] = {
            "median_us": round(statistics.median(values), 1),
            "p20_us": round(low, 1),
            "p80_us": round(high, 1),
            "rounds": len(values),
            "calls_per_round": block,
        }
    for figures in result.values():
        figures["ratio_to_bmtard_sign"] = round(
            figures["median_us"] / result["bmtard sign"]["median_us"], 2
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5, help="for each shape")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.threads < 1 or options.seconds <= 0:
        parser.error("--threads must be >= 1 and --seconds > 0")
    if options.json:  # fails now rather than after the measurement
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.touch()
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": options.threads,
        "dtype": "float32",
        "figures": {},
    }
    torch.set_num_threads(options.threads)
    print(f"{'shape':>12}  {'provider':<20}{'median us':>10}{'p20':>10}{'p80':>10}{'ratio':>8}")
    for rows, classes in SHAPES:
        figures = measure(rows, classes, options.seconds)
        report["figures"][f"{rows}x{classes}"] = figures
        for name, f in figures.items():
            print(
                f"{f'{rows}x{classes}':>12}  {name:<20}{f['median_us']:>10}{f['p20_us']:>10}"
                f"{f['p80_us']:>10}{f['ratio_to_bmtard_sign']:>8}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
