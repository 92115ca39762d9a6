"""Runs what only a GPU can tell, and writes it down.  (make gpu)

    python tools/gpu_check.py                      # everything
    python tools/gpu_check.py --part tests graphs  # parts, each below ten minutes

    tests      the tests of the ops on the device
    sanitizer  compute-sanitizer's memcheck, racecheck, synccheck, initcheck on a few small calls
    graphs     CUDA graphs: captured once, replayed with other inputs, equal to eager
    bench      the microbenchmarks

Needs a GPU, a CUDA torch and bmtard/_C.so with kernels for that GPU; no network, no compiler.
Writes <gpu>-<date>.json and .md, and the plots, into --out. A part that fails does not keep the
others from running; parts run one after the other on one day share the files. Exit status 1 if
anything failed.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"
PYTHON = sys.executable
PARTS = ("tests", "sanitizer", "graphs", "bench")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
PART_SECONDS = 570  # of a part, all its steps together
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


@dataclass
class Step:
    """One command of a part."""

    name: str
    command: list[str]
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


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    required = {"BMTARD_REQUIRE_CUDA": "1", "BMTARD_REQUIRE_NATIVE": "1"}
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **required}


def probe() -> dict[str, Any]:
    """The device as torch sees it, and the copy bandwidth, bytes read plus bytes written."""
    if not (ROOT / "bmtard" / "_C.so").is_file():
        fail("bmtard/_C.so is missing: build it with make venv, or carry it along")
    command = [PYTHON, "-c", PROBE, *nvidia_smi()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        fail(f"the device cannot be used: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def steps_of(part: str, folder: Path) -> list[Step]:
    pytest = [PYTHON, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    # No test of a device is in these; they need packages that a GPU host may lack.
    pytest += ["--ignore=tests/training", "--ignore=tests/simt"]
    if part == "tests":
        parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        return [Step("tests", [*pytest, *parallel, "-k", "not graph"])]
    if part == "graphs":
        return [Step("graphs", [*pytest, "-k", "graph"])]
    if part == "sanitizer":
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
                    *("-x", "tests/test_cuda_kernels.py", "-k", "small"),
                ],
                env,
                must_say=r"SUMMARY: 0 (errors|hazards)",
            )
            for tool in SANITIZERS
        ]
    outputs = ["--json", str(folder / "bench.json"), "--plot", str(folder)]
    return [Step("bench", [PYTHON, "-m", "benchmarks", "--device", "cuda", *outputs])]


def run_step(step: Step, seconds: float) -> dict[str, Any]:
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
                env=environment() | step.env,
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


def run_part(part: str, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    steps = steps_of(part, folder)
    end = time.monotonic() + PART_SECONDS
    for i, step in enumerate(steps):
        results[step.name] = run_step(step, (end - time.monotonic()) / (len(steps) - i))
    return results


def largest_figures(bench: dict[str, Any]) -> list[list[str]]:
    """Of each op, dtype and pass, bmtard at the most bytes."""
    most: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in bench.get("records", []):
        if record.get("provider") != "bmtard" or record.get("sweep") or not record.get("measures"):
            continue
        key = tuple(str(record.get(name)) for name in ("op", "dtype", "pass_"))
        if key not in most or record["ideal_bytes"] > most[key]["ideal_bytes"]:
            most[key] = record
    rows = []
    for (op, dtype, pass_), record in sorted(most.items()):
        kind = next(k for k in ("graph_cold", "graph_hot", "wall") if k in record["measures"])
        microseconds = record["measures"][kind]["median_us"]
        rate = record["ideal_bytes"] / microseconds * 1e6
        share = f"{rate / copy:.0%}" if (copy := bench.get("copy_bytes_per_second")) else "-"
        rows.append([op, record["shape"], dtype, pass_, kind, f"{microseconds:.1f}", share])
    return rows


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
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def write(out: Path, stem: str, result: dict[str, Any]) -> Path:
    folder = out / stem
    plots = sorted(f"{stem}/{path.name}" for path in folder.glob("*.png"))
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{stem}.md").write_text(page(result, plots))
    return out / f"{stem}.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)

    state = gpu_state()
    machine = probe()
    today = date.today().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", state["name"].lower()).removeprefix("nvidia-").strip("-")
    stem = f"{name}-{today}"
    folder = options.out / stem
    folder.mkdir(parents=True, exist_ok=True)
    written = options.out / f"{stem}.json"
    earlier = json.loads(written.read_text()) if written.is_file() else {}
    result: dict[str, Any] = {
        "date": today,
        "machine": machine,
        "nvidia_smi": state,
        "parts": earlier.get("parts", {}),
        "bench": earlier.get("bench"),
    }
    for part in options.part:
        result["parts"][part] = run_part(part, folder)
        if part == "bench" and (folder / "bench.json").is_file():
            text = (folder / "bench.json").read_text()
            result["bench"] = json.loads(text) if text else None
            (folder / "bench.json").unlink()
        report = write(options.out, stem, result)  # after each part, so that none is lost

    print(f"\ngpu-check: {machine['device']}, copy {machine['copy_gb_per_s']} GB/s; {report}")
    steps = {name: step for part in options.part for name, step in result["parts"][part].items()}
    for name, step in steps.items():
        verdict = "passed" if step["ok"] else "FAILED"
        print(f"  {name:10} {verdict}  {step['seconds']:>6} s  {step['closing']}")
    return int(not all(step["ok"] for step in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
