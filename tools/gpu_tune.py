"""Tries other thresholds and launch shapes of the CUDA kernels, and writes which is fastest.

    python tools/gpu_tune.py --json tune.json --seconds 270

Needs a library built with -DBMTARD_TUNING=ON: its launchers read the environment variable
BMTARD_TUNE, "NAME=VALUE,...", at every launch. PLAN is the whole plan: for each regime the
constants that matter there, and the values to try. A constant is varied alone; the others keep
their defaults. The result is written after every regime, so a run that is stopped loses only the
one it was at. Defaults in csrc/cuda change by this file alone, and not where the gain is below 3 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bmtard import _library
from bmtard.benchmarks.cuda import CudaTimer
from bmtard.benchmarks.shapes import LOGITS, LOGITS_CUDA
from bmtard.benchmarks.spec import DTYPES, Shape, Spec, catalogue
from bmtard.benchmarks.timing import Block, interleave, plain_block, quantile

VARIABLE = "BMTARD_TUNE"

# name: (default, values to try). The names and defaults are those of csrc/cuda.
CONSTANTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "small_batch": (32768, (0, 8192, 131072)),
    "max_cluster": (8, (1, 2, 4)),
    "block_elements": (1024, (512, 4096, 16384)),
    "grid_blocks": (512, (66, 132, 264)),
    "cached_bytes": (98304, (0, 49152, 196608)),
    "split_tiles": (2, (1, 4, 8)),
}

# (op, shape, dtype, pass, constants)
BATCH = ("small_batch", "max_cluster")
GRID = ("block_elements", "grid_blocks")
ROWS = ("cached_bytes", "split_tiles", "max_cluster")
PLAN: list[tuple[str, str, str, str, tuple[str, ...]]] = [
    ("bmtard_loss_sign", "cifar10", "float32", "both", BATCH),
    ("bmtard_loss_bisect", "cifar10", "bfloat16", "both", BATCH),
    ("bmtard_loss_sign", "tiny-imagenet", "float32", "both", BATCH),
    ("bmtard_loss_bisect", "tiny-imagenet", "float32", "both", BATCH),
    ("bmtard_loss_sign", "imagenet", "float32", "both", GRID),
    ("bmtard_loss_bisect", "imagenet", "bfloat16", "both", GRID),
    ("bisect_temperature", "imagenet21k", "bfloat16", "forward", ROWS),
    ("bisect_temperature", "llm32k", "float32", "forward", ROWS),
    ("multi_teacher_kl", "llm32k", "bfloat16", "both", ROWS),
    ("multi_teacher_kl", "llm128k", "bfloat16", "both", ROWS),
    ("softmax_entropy", "llm128k", "bfloat16", "forward", ROWS),
    ("bmtard_loss_sign", "llm32k", "bfloat16", "both", GRID),
]
ROUND_SECONDS = 0.5
"""Of a constant in a regime, all its values in turns."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was found for one constant in one regime."""

    regime: str
    name: str
    default: int
    default_us: float
    best: int
    best_us: float
    microseconds: dict[int, float]


def choose(regime: str, name: str, times: dict[int, list[float]]) -> Case:
    """The value with the smallest median; the default, unless another is 3 % faster."""
    default = CONSTANTS[name][0]
    medians = {value: 1e6 * quantile(each, 0.5) for value, each in times.items()}
    best = min(medians, key=lambda value: medians[value])
    if medians[best] > 0.97 * medians[default]:
        best = default
    return Case(
        regime=regime,
        name=name,
        default=default,
        default_us=medians[default],
        best=best,
        best_us=medians[best],
        microseconds=medians,
    )


@contextlib.contextmanager
def constant(name: str, value: int) -> Iterator[None]:
    """Inside, launches take this value."""
    os.environ[VARIABLE] = f"{name}={value}"
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def with_value(name: str, value: int, block: Callable[[int], float]) -> Block:
    """The block, with the constant set while it runs."""

    def run(calls: int) -> float:
        with constant(name, value):
            return block(calls)

    return run


def blocks_of(spec: Spec, op_name: str, pass_: str, name: str) -> dict[int, Block]:
    """For each value of a constant, replays of a graph that was captured with it."""
    ops, providers = catalogue()
    inputs = ops[op_name].inputs(spec, 0)
    default, others = CONSTANTS[name]
    made: dict[int, Block] = {}
    for value in (default, *others):
        function = providers["bmtard"].build(op_name, spec)
        if spec.device.type == "cuda":
            timer = CudaTimer(spec.device)
            with constant(name, value):
                made[value] = timer.graph_block(function, [inputs], pass_, 1e-4)
        else:
            plain = plain_block(function, inputs, pass_, time.perf_counter)
            made[value] = with_value(name, value, plain)
    return made


def tuning_build() -> bool:
    return bool(_library._INFO.get("tuning", False))


def sweep(device: torch.device, seconds: float, file: Path) -> list[Case]:
    end = time.monotonic() + seconds
    cases: list[Case] = []
    result: dict[str, Any] = {"device": str(device), "constants": CONSTANTS, "skipped": []}

    def write() -> None:
        file.write_text(json.dumps({**result, "cases": [asdict(c) for c in cases]}, indent=1))

    write()
    for op, shape, dtype, pass_, names in PLAN:
        table = {**LOGITS, **(LOGITS_CUDA if device.type == "cuda" else {})}
        regime = f"{op} {'x'.join(map(str, table[shape]))} {dtype} {pass_}"
        for name in names:
            if time.monotonic() > end:
                result["skipped"].append(f"{regime}: {name}, no time left")
                continue
            spec = Spec(
                shape=Shape(name=shape, dims=table[shape]), dtype=DTYPES[dtype], device=device
            )
            try:
                blocks = blocks_of(spec, op, pass_, name)
                named = {str(value): block for value, block in blocks.items()}
                times = interleave(named, seconds=ROUND_SECONDS, min_rounds=8)
            except Exception as error:  # a value that a launch refuses must not end the sweep
                result["skipped"].append(f"{regime}: {name}, {error}")
                continue
            cases.append(choose(regime, name, {int(k): v for k, v in times.items()}))
            print(cases[-1], flush=True)
        write()
    write()
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not tuning_build():
        print("gpu-tune: the library is no tuning build, see CONTRIBUTING.md")
        return 1
    cases = sweep(torch.device(options.device), options.seconds, options.json)
    print(f"gpu-tune: {len(cases)} constants tried, {options.json}")
    return int(not cases)


if __name__ == "__main__":
    raise SystemExit(main())
