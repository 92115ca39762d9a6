"""Runs what only a GPU can tell, and writes it down.  (make gpu)

    python tools/gpu_check.py                      # everything
    python tools/gpu_check.py --part tests graphs  # parts, each below ten minutes
    python tools/gpu_check.py --stand-in           # a rehearsal: the CPU stands in for the device

    smoke      every kernel once, small, against plain torch in float64
    tests      the tests of the ops on the device
    sanitizer  compute-sanitizer's memcheck, racecheck, synccheck, initcheck on a few small calls
    graphs     CUDA graphs: captured once, replayed with other inputs, equal to eager
    bench      the microbenchmarks, op by op, and a whole training step
    tune       other thresholds and launch shapes (tools/gpu_tune.py); needs a tuning build
    train      a short bmtard reproduce cifar10-gpu, where BMTARD_DATA names a folder

Needs a GPU, a CUDA torch and bmtard/_C.so with kernels for that GPU; no network, no compiler.
tools/gpu_bundle.py packs what a bare machine lacks. Writes <gpu>-<date>.json and .md, and the
plots, into --out, anew after every step. What fails or takes too long does not keep the rest from
running; parts run one after the other on one day share the files. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"
PYTHON = sys.executable
# Seconds of each part, all its steps together. The first four fit into ten minutes.
PARTS = {
    "smoke": 60, "tests": 240, "sanitizer": 180, "graphs": 60, "bench": 420, "tune": 300,
    "train": 360,
}  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Of the benchmarks, in this order: (name, options).
BENCHMARKS = [
    *((op, ["--op", op, "--no-sweep"]) for op in (
        "softmax_entropy", "multi_teacher_kl", "bmtard_loss_sign", "bmtard_loss_bisect",
        "bisect_temperature", "bisect_temperature_batch", "pgd_step_",
    )),
    ("step", ["step"]),
]  # fmt: skip
QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,utilization.gpu,clocks_throttle_reasons.active"
)

# What torch and the library say of the device; the clocks are read while it copies.
PROBE = """
import json, statistics, subprocess, sys
import torch
import bmtard

info = bmtard.build_info()
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no CUDA device")
if not info.cuda:
    sys.exit(f"bmtard has no CUDA kernels here: {info.reason or 'it was built without nvcc'}")
properties = torch.cuda.get_device_properties(0)
# PTX of the last architecture serves newer devices.
wanted, built = 10 * properties.major + properties.minor, [int(a) for a in info.cuda_architectures]
same_major = [a for a in built if a // 10 == properties.major and a <= wanted]
if not same_major and max(built) > wanted:
    sys.exit(f"bmtard is built for {built}, this device is {wanted}")

size = min(2 << 30, torch.cuda.mem_get_info()[0] // 4)
source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
target = torch.empty_like(source)
events = [torch.cuda.Event(enable_timing=True) for _ in range(101)]
for _ in range(10):
    target.copy_(source)
for event in events[:-1]:
    event.record()
    target.copy_(source)
events[-1].record()
clocks = subprocess.run(sys.argv[1:], capture_output=True, text=True).stdout
torch.cuda.synchronize()
milliseconds = statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:]))
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "device": properties.name,
    "compute_capability": f"{properties.major}.{properties.minor}",
    "multiprocessors": properties.multi_processor_count,
    "l2_bytes": properties.L2_cache_size,
    "memory_bytes": properties.total_memory,
    "bmtard": info.version,
    "bmtard_architectures": info.cuda_architectures,
    "copy_gb_per_s": round(2 * size / milliseconds / 1e6, 1),
    "copy_bytes": size,
    "nvidia_smi_while_copying": clocks.strip(),
}))
"""

# The same facts of the CPU.
STAND_IN_PROBE = """
import json
import torch
import bmtard
from bmtard.benchmarks.timing import copy_bandwidth

info = bmtard.build_info()
if not info.native:
    raise SystemExit(info.reason)
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "device": "no GPU, the CPU stands in",
    "compute_capability": "-",
    "multiprocessors": 0,
    "bmtard": info.version,
    "bmtard_architectures": info.cuda_architectures,
    "copy_gb_per_s": round(copy_bandwidth(torch.device("cpu")) / 1e9, 1),
    "nvidia_smi_while_copying": "-",
}))
"""

# On the CPU, which compiles slowly, a look is enough.
REHEARSED = [("softmax_entropy", ["--op", "softmax_entropy", "--quick", "--provider", "bmtard"])]


@dataclass
class Step:
    """One command of a part."""

    name: str
    command: list[str]
    writes: str = ""  # a JSON file in the folder of the results, which becomes part of them
    env: dict[str, str] = field(default_factory=dict)
    must_say: str = ""  # a pattern of the output, without which the step has failed


def fail(message: str) -> None:
    raise SystemExit(f"gpu-check: {message}")


def nvidia_smi() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    return ["nvidia-smi", "-i", visible, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]


def gpu_state() -> dict[str, str]:
    """Driver, clocks (MHz), power (W), temperature (deg C) of the GPU that will be used."""
    if shutil.which("nvidia-smi") is None:
        fail("needs an NVIDIA GPU, but there is no nvidia-smi on PATH")
    done = subprocess.run(nvidia_smi(), capture_output=True, text=True)
    values = [value.strip() for value in done.stdout.strip().split("\n")[0].split(",")]
    if done.returncode or len(values) != len(QUERY.split(",")):
        said = (done.stdout + done.stderr).strip() or f"exit status {done.returncode}"
        fail(f"needs an NVIDIA GPU, but nvidia-smi says: {said}")
    return dict(zip(QUERY.split(","), values, strict=True))


def environment(stand_in: bool = False) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    required = {"BMTARD_REQUIRE_NATIVE": "1"}
    if not stand_in:
        required["BMTARD_REQUIRE_CUDA"] = "1"
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **required}


def probe(stand_in: bool = False) -> dict[str, Any]:
    """The device as torch sees it, and the copy bandwidth, bytes read plus bytes written."""
    if not (ROOT / "bmtard" / "_C.so").is_file():
        fail("bmtard/_C.so is missing: build it with make venv, or carry it along")
    command = [PYTHON, "-c", STAND_IN_PROBE] if stand_in else [PYTHON, "-c", PROBE, *nvidia_smi()]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(stand_in), cwd=ROOT
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        fail(f"the device cannot be used: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def steps_of(part: str, folder: Path, stand_in: bool = False) -> list[Step]:
    device = "cpu" if stand_in else "cuda"
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if stand_in:
        # One file of them: make test runs the rest.
        pytest += ["-m", "not cuda", "tests/test_cuda_kernels.py"]
    else:
        # No test of a device is in these; they need packages that a GPU host may lack.
        pytest += ["-m", "cuda", "--ignore=tests/training", "--ignore=tests/simt"]
    if part == "smoke":
        file = [] if stand_in else ["tests/test_cuda_kernels.py"]
        return [Step("smoke", [*pytest, "--maxfail=20", *file, "-k", "small"])]
    if part == "tests":
        parallel = ["-n", "4"] if importlib.util.find_spec("xdist") and not stand_in else []
        return [Step("tests", [*pytest, *parallel, "-k", "not graph"])]
    if part == "graphs":
        return [Step("graphs", [*pytest, "-k", "graph"])]
    if part == "sanitizer":
        small = ["-x", *([] if stand_in else ["tests/test_cuda_kernels.py"]), "-k", "small"]
        if stand_in:  # it watches CUDA alone
            return [Step("no sanitizer", [*pytest, *small])]
        # Without torch's cache of memory each tensor has bounds of its own.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            Step(
                tool,
                [
                    "compute-sanitizer",
                    *("--tool", tool, "--error-exitcode", "66"),
                    *("--kernel-name", "kernel_substring=bmtard"),
                    *pytest,
                    *small,
                ],
                env=env,
                must_say=r"SUMMARY: 0 (errors|hazards)",
            )
            for tool in SANITIZERS
        ]
    if part == "tune":
        command = [PYTHON, "tools/gpu_tune.py", "--device", device]
        command += ["--seconds", str(PARTS["tune"] - 30), "--json", str(folder / "tune.json")]
        tuning = ROOT / "bmtard" / "_C_tuning.so"
        env = {"BMTARD_LIBRARY": str(tuning)} if tuning.is_file() and not stand_in else {}
        return [Step("tune", command, env=env, writes="tune.json")]
    if part == "train":
        return [Step("train", [PYTHON, "-m", "bmtard", *training(folder, stand_in)])]
    return [
        Step(
            name,
            [
                *(PYTHON, "-m", "benchmarks", *options, "--device", device),
                *("--json", str(folder / f"{name}.json"), "--plot", str(folder / name)),
            ],
            writes=f"{name}.json",
        )
        for name, options in (BENCHMARKS if not stand_in else REHEARSED)
    ]


def training(folder: Path, stand_in: bool) -> list[str]:
    """The command of a short training of teachers and students."""
    if stand_in:
        sizes = ["--train.epochs", "1", "--train.device", "cpu", "--train.train-limit", "256"]
        sizes += ["--train.no-check-teachers"]  # after so little training they only guess
        sizes += ["--evaluation.attacks", "fgsm", "pgd-sat", "--evaluation.limit", "16"]
        names = ["bmtard, bisect"]
    else:
        sizes = ["--train.epochs", "3", "--train.train-limit", "20000"]
        sizes += ["--evaluation.attacks", "fgsm", "pgd-sat", "--evaluation.limit", "1000"]
        names = ["sat", "rslad", "bmtard, sign", "bmtard, bisect"]
    if not os.environ.get("BMTARD_DATA"):
        preset = "digits"  # bundled with scikit-learn
    else:
        preset = "cifar10-small" if stand_in else "cifar10-gpu"
    if preset == "cifar10-small":
        for role, method in (("clean", "natural"), ("robust", "sat")):
            sizes += [f"--teacher-{role}", f"method={method} model=strided-cnn-16 epochs=1"]
        sizes += ["--student", "epochs=1"]
    elif preset == "digits" and not stand_in:
        sizes += ["--train.device", "cuda"]
    return [
        "reproduce", preset, *sizes, "--seeds", "1", "--only", *names,
        "--output", str(folder / "train"),
    ]  # fmt: skip


def run_step(step: Step, seconds: float, stand_in: bool = False) -> dict[str, Any]:
    """Runs a step, its output into a log; a step that takes too long is stopped."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{step.name}.log"
    print(f"gpu-check: {step.name} ...", flush=True)
    start = time.monotonic()
    status: int | None
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                step.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(stand_in) | step.env,
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{error}\n")
            status = 127
        else:
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with its children
                process.wait()
                status = None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    closing = lines[-1].strip("= ") if lines else "no output"
    if status is None:
        closing = f"stopped after {seconds:.0f} s; {closing}"
    elif status == 0 and not re.search(step.must_say, "\n".join(lines)):
        closing, status = f"the output does not say {step.must_say!r}; {closing}", 1
    result = {
        "ok": status == 0,
        "seconds": round(time.monotonic() - start, 1),
        "closing": closing,
        "command": " ".join(step.command),
    }
    if status != 0:
        print("\n".join(lines[-40:]), f"gpu-check: the whole output is in {log}", sep="\n")
    return result


def run_part(part: str, folder: Path, stand_in: bool) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Its steps as they end. A step may take an equal share of what time is left."""
    steps = steps_of(part, folder, stand_in)
    end = time.monotonic() + PARTS[part]
    for i, step in enumerate(steps):
        seconds = (end - time.monotonic()) / (len(steps) - i)
        yield step, run_step(step, max(seconds, 1.0), stand_in)


def take(result: dict[str, Any], part: str, file: Path) -> None:
    """Moves what a step has written into the result."""
    if not file.is_file():
        return
    text = file.read_text()
    file.unlink()
    try:
        found = json.loads(text)
    except ValueError:  # it was stopped while it wrote, or before
        return
    if part == "bench":
        result["bench"] = {**(result["bench"] or {}), file.stem: found}
    else:
        result[part] = found


def largest_figures(bench: dict[str, Any]) -> list[list[str]]:
    """Of each op, dtype and pass, bmtard at the most bytes."""
    most: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in bench.values():
        copy = run.get("copy_bytes_per_second")
        for record in run.get("records", []):
            measured = record.get("provider") == "bmtard" and record.get("measures")
            if not measured or record.get("sweep"):
                continue
            key = tuple(str(record.get(name)) for name in ("op", "dtype", "pass_"))
            if key not in most or record["ideal_bytes"] > most[key]["ideal_bytes"]:
                most[key] = {**record, "copy": copy}
    rows = []
    for (op, dtype, pass_), record in sorted(most.items()):
        kinds = ("graph_cold", "graph_hot", "cpu_time", "wall")
        kind = next(k for k in kinds if k in record["measures"])
        microseconds = record["measures"][kind]["median_us"]
        rate = record["ideal_bytes"] / microseconds * 1e6
        share = f"{rate / record['copy']:.0%}" if record["copy"] else "-"
        rows.append([op, record["shape"], dtype, pass_, kind, f"{microseconds:.1f}", share])
    return rows


def winners(tuned: dict[str, Any]) -> list[list[str]]:
    """Of each regime, the values that were faster than the defaults."""
    return [
        [case["regime"], case["name"], f"{case['default']}", f"{case['best']}",
         f"{case['default_us'] / case['best_us']:.2f}"]
        for case in tuned.get("cases", [])
        if case["best"] != case["default"]
    ]  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(result: dict[str, Any], plots: Sequence[str]) -> str:
    """The result on one page of Markdown."""
    machine, before = result["machine"], result["nvidia_smi"]
    facts = {
        "GPU": f"{machine['device']}, compute capability {machine['compute_capability']}, "
        f"{machine['multiprocessors']} multiprocessors",
        "Driver": before["driver_version"],
        "torch": f"{machine['torch']}, CUDA {machine['cuda']}",
        "Clocks before (MHz)": f"{before['clocks.sm']} of {before['clocks.max.sm']}, memory "
        f"{before['clocks.mem']} of {before['clocks.max.mem']}",
        "While copying": machine["nvidia_smi_while_copying"],
        "Copy bandwidth": f"{machine['copy_gb_per_s']} GB/s, read plus written",
    }
    rows = [
        [part, name, "passed" if step["ok"] else "FAILED", f"{step['seconds']}", step["closing"]]
        for part, steps in result["parts"].items()
        for name, step in steps.items()
    ]
    parts = [
        f"# bmtard on {machine['device']}, {result['date']}",
        table(["", ""], [[name, value.replace("|", "/")] for name, value in facts.items()]),
        table(["Part", "Step", "Result", "Seconds", "Last line"], rows),
    ]
    if figures := largest_figures(result.get("bench") or {}):
        header = ["Op", "Shape", "Dtype", "Pass", "Measure", "us", "Of copy bandwidth"]
        parts += ["bmtard at the most bytes of each op:", table(header, figures)]
    if rows := winners(result.get("tune") or {}):
        header = ["Regime", "Constant", "Default", "Faster", "By"]
        parts += ["Launch constants that another value beats:", table(header, rows)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def write(out: Path, stem: str, result: dict[str, Any]) -> Path:
    folder = out / stem
    plots = sorted(path.relative_to(out).as_posix() for path in folder.glob("**/*.png"))
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{stem}.md").write_text(page(result, plots))
    return out / f"{stem}.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results")
    parser.add_argument(
        "--stand-in", action="store_true", help="rehearse on the CPU; default --out: build"
    )
    options = parser.parse_args(arguments)
    stand_in = options.stand_in
    out = options.out or (LOGS if stand_in else ROOT / "benchmarks" / "results")
    out = out.resolve()

    state = dict.fromkeys(QUERY.split(","), "-") if stand_in else gpu_state()
    machine = probe(stand_in)
    today = date.today().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", state["name"].lower()).removeprefix("nvidia-").strip("-")
    stem = f"{name or 'rehearsal'}-{today}"
    folder = out / stem
    folder.mkdir(parents=True, exist_ok=True)
    written = out / f"{stem}.json"
    earlier = json.loads(written.read_text()) if written.is_file() else {}
    result: dict[str, Any] = {
        "date": today,
        "machine": machine,
        "nvidia_smi": state,
        "parts": earlier.get("parts", {}),
        "bench": earlier.get("bench"),
        "tune": earlier.get("tune"),
    }
    report = write(out, stem, result)
    for part in options.part:
        result["parts"][part] = {}
        for step, ended in run_part(part, folder, stand_in):
            result["parts"][part][step.name] = ended
            if step.writes:
                take(result, part, folder / step.writes)
            report = write(out, stem, result)  # after each step, so that none is lost

    print(f"\ngpu-check: {machine['device']}, copy {machine['copy_gb_per_s']} GB/s; {report}")
    steps = {name: step for part in options.part for name, step in result["parts"][part].items()}
    for name, step in steps.items():
        verdict = "passed" if step["ok"] else "FAILED"
        print(f"  {name:10} {verdict}  {step['seconds']:>6} s  {step['closing']}")
    return int(not all(step["ok"] for step in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
