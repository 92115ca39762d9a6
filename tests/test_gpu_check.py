"""tools/gpu_check.py with programs that stand in for the GPU's; no GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

SMI = "NVIDIA H100 80GB HBM3, 580.1, 345, 2619, 1980, 2619, 70.1, 700.0, 31, 0, 0x0000000000000001"

PROBED = {
    "torch": "2.11.0",
    "cuda": "13.0",
    "device": "NVIDIA H100 80GB HBM3",
    "compute_capability": "9.0",
    "multiprocessors": 132,
    "copy_gb_per_s": 2900.5,
    "nvidia_smi_while_copying": SMI.replace("345", "1980"),
}

BENCH = {
    "copy_bytes_per_second": 2.9e12,
    "records": [
        {
            "op": "softmax_entropy",
            "shape": shape,
            "dtype": "float32",
            "pass_": "forward",
            "provider": provider,
            "sweep": "",
            "ideal_bytes": ideal,
            "measures": {"wall": {"median_us": 30.0}, "graph_cold": {"median_us": 10.0}},
        }
        for shape, ideal in (("128x10", 5120), ("8192x32k", 14_500_000))
        for provider in ("bmtard", "eager")
    ],
}

TUNE = {
    "cases": [
        {"regime": "small head", "name": "max_cluster", "default": 8, "default_us": 6.0,
         "best": 4, "best_us": 5.0},
        {"regime": "small head", "name": "small_batch", "default": 32768, "default_us": 6.0,
         "best": 32768, "best_us": 6.0},
    ]
}  # fmt: skip

# Stands in for Python and, at the end of its command, for compute-sanitizer. What it is told to
# do stands in the folder of its environment variable FAKE.
FAKE = f"""#!{sys.executable}
import json, os, pathlib, sys, time
folder = pathlib.Path(os.environ["FAKE"])
told = json.loads((folder / "told.json").read_text())
arguments = sys.argv[1:]
with (folder / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([pathlib.Path(sys.argv[0]).name, arguments, dict(os.environ)]) + "\\n")
if "-c" in arguments:
    if "no_device" in told:
        sys.exit(told["no_device"])
    print(json.dumps({PROBED!r}))
elif "--tool" in arguments:
    tool = arguments[arguments.index("--tool") + 1]
    print("3 passed in 1 s")
    if tool in told.get("errors", ()):
        print("========= ERROR SUMMARY: 2 errors")
        sys.exit(66)
    if tool not in told.get("silent", ()):
        what = "hazards displayed (0 errors, 0 warnings)" if tool == "racecheck" else "errors"
        print(f"========= SUMMARY: 0 {{what}}")
elif "benchmarks" in arguments:
    file = pathlib.Path(arguments[arguments.index("--json") + 1])
    file.write_text("{{" if file.stem in told.get("cut", ()) else json.dumps({BENCH!r}))
    if file.stem in told.get("killed", ()):
        os.kill(os.getpid(), 9)
    plots = pathlib.Path(arguments[arguments.index("--plot") + 1])
    plots.mkdir(exist_ok=True)
    (plots / "speedup.png").write_bytes(b"")
    print("4 measurements")
elif "tools/gpu_tune.py" in arguments:
    pathlib.Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps({TUNE!r}))
    print("1 constant tried")
elif "reproduce" in arguments:
    print("4 runs")
else:
    name = "graphs" if "graph" in arguments else "smoke" if "small" in arguments else "tests"
    if name in told.get("hang", ()):
        time.sleep(3600)
    failed = name in told.get("errors", ())
    print(f"== {{'1 failed' if failed else '7 passed'}} in 2 s ==")
    sys.exit(int(failed))
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)

    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "python": FAKE,
        "compute-sanitizer": FAKE,
        "nvidia-smi": f"#!/bin/sh\necho '{SMI}'\n",
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    checkout = tmp_path / "checkout"
    (checkout / "bmtard").mkdir(parents=True)
    (checkout / "bmtard" / "_C.so").touch()
    monkeypatch.setattr(module, "ROOT", checkout)
    today = type("Date", (date,), {"today": classmethod(lambda cls: cls.fromisoformat(TODAY))})
    monkeypatch.setattr(module, "date", today)
    monkeypatch.setattr(module, "LOGS", checkout / "logs")
    monkeypatch.setattr(module, "PYTHON", str(programs / "python"))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(tmp_path))
    module.told = lambda **what: (tmp_path / "told.json").write_text(json.dumps(what))
    module.told()
    module.out = tmp_path / "out"
    module.run_all = lambda *arguments: module.main(["--out", str(module.out), *arguments])
    module.result = lambda: json.loads((module.out / f"{STEM}.json").read_text())
    module.calls = lambda: [
        json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()
    ]
    return module


TODAY = "2026-01-31"
STEM = f"h100-80gb-hbm3-{TODAY}"


def test_everything_is_run_and_written(tool, capsys):
    assert tool.run_all() == 0
    result = tool.result()
    assert list(result["parts"]) == list(tool.PARTS)
    assert list(tool.PARTS)[:5] == ["smoke", "tests", "sanitizer", "graphs", "bench"]
    assert sum(list(tool.PARTS.values())[:4]) < 570  # a command may take ten minutes
    assert all(seconds <= 480 for seconds in tool.PARTS.values())
    assert list(result["parts"]["sanitizer"]) == list(tool.SANITIZERS)
    assert all(step["ok"] for steps in result["parts"].values() for step in steps.values())
    assert result["parts"]["tests"]["tests"]["closing"] == "7 passed in 2 s"
    assert result["nvidia_smi"]["driver_version"] == "580.1"
    assert result["nvidia_smi"]["clocks.sm"] == "345"
    assert result["machine"] == PROBED
    assert result["bench"] == {name: BENCH for name, _ in tool.BENCHMARKS}
    assert result["tune"] == TUNE

    text = (tool.out / f"{STEM}.md").read_text()
    assert text.startswith(f"# bmtard on NVIDIA H100 80GB HBM3, {TODAY}\n")
    assert "2900.5 GB/s, read plus written" in text
    assert "| sanitizer | racecheck | passed |" in text
    # The larger shape; 14.5 MB in 10 us are half of the copy bandwidth.
    assert "| softmax_entropy | 8192x32k | float32 | forward | graph_cold | 10.0 | 50% |" in text
    assert "128x10" not in text
    assert "| small head | max_cluster | 8 | 4 | 1.20 |" in text
    assert "small_batch" not in text
    assert f"![speedup]({STEM}/step/speedup.png)" in text
    assert (tool.out / STEM / "step" / "speedup.png").is_file()

    summary = capsys.readouterr().out
    for name in ("smoke", "tests", *tool.SANITIZERS, "graphs", "pgd_step_", "tune", "train"):
        assert f"  {name:10} passed" in summary


def test_commands(tool):
    assert tool.run_all() == 0
    commands = [(name, arguments) for name, arguments, _ in tool.calls() if "-c" not in arguments]
    names = [name for name, _ in commands]
    assert names[:7] == ["python", "python", *["compute-sanitizer"] * 4, "python"]
    assert set(names[7:]) == {"python"}
    smoke, tests, memcheck, _, _, _, graphs = (arguments for _, arguments in commands[:7])
    assert "tests/test_cuda_kernels.py" in smoke
    # Together the two parts run every test of the device once.
    assert tests[tests.index("-k") + 1] == f"not {graphs[graphs.index('-k') + 1]}"
    assert "cuda" in tests
    assert "cuda" in graphs
    assert memcheck[:4] == ["--tool", "memcheck", "--error-exitcode", "66"]
    assert (ROOT / "tests" / "test_cuda_kernels.py").is_file()
    assert "tests/test_cuda_kernels.py" in memcheck
    for _, arguments, env in tool.calls():
        assert env["BMTARD_REQUIRE_CUDA"] == env["BMTARD_REQUIRE_NATIVE"] == "1"
        cached = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in env
        assert cached == ("--tool" not in arguments)


def test_no_device_test_is_left_out():
    for folder in ("training", "simt"):
        for path in (ROOT / "tests" / folder).glob("test_*.py"):
            assert "def test" in path.read_text()
            assert not re.search(r"def test\w*\([^)]*\bdevice\b|mark\.cuda", path.read_text()), path


def test_a_failure_does_not_lose_the_others(tool, capsys):
    tool.told(errors=["tests", "racecheck"])
    assert tool.run_all() == 1
    parts = tool.result()["parts"]
    failed = {name for steps in parts.values() for name, step in steps.items() if not step["ok"]}
    assert failed == {"tests", "racecheck"}
    assert parts["sanitizer"]["racecheck"]["closing"] == "ERROR SUMMARY: 2 errors"
    assert tool.result()["bench"]["step"] == BENCH
    summary = capsys.readouterr().out
    assert "  tests      FAILED" in summary
    assert "  graphs     passed" in summary
    assert "| tests | tests | FAILED |" in (tool.out / f"{STEM}.md").read_text()


def test_a_sanitizer_that_watched_nothing_has_failed(tool):
    tool.told(silent=["initcheck"])
    assert tool.run_all("--part", "sanitizer") == 1
    steps = tool.result()["parts"]["sanitizer"]
    assert [name for name, step in steps.items() if not step["ok"]] == ["initcheck"]
    assert "does not say" in steps["initcheck"]["closing"]


def test_parts_add_up_in_one_file(tool):
    assert tool.run_all("--part", "bench") == 0
    tool.told(errors=["graphs"])
    assert tool.run_all("--part", "graphs") == 1
    assert list(tool.result()["parts"]) == ["bench", "graphs"]
    assert tool.result()["bench"]["step"] == BENCH
    tool.told()
    assert tool.run_all("--part", "graphs", "tests") == 0
    assert tool.result()["parts"]["graphs"]["graphs"]["ok"]


def test_a_part_that_hangs_is_stopped(tool, monkeypatch):
    """The program sleeps for an hour: however slow the machine is, it is stopped before its end."""
    monkeypatch.setitem(tool.PARTS, "graphs", 0.5)
    tool.told(hang=["graphs"])
    assert tool.run_all("--part", "graphs") == 1
    step = tool.result()["parts"]["graphs"]["graphs"]
    assert not step["ok"]
    assert step["closing"].startswith("stopped after 1 s; ")


def test_what_a_step_wrote_before_it_was_stopped_is_kept(tool, monkeypatch):
    """The first benchmark is killed after it wrote; the second wrote half a file."""
    monkeypatch.setattr(tool, "BENCHMARKS", tool.BENCHMARKS[:3])
    (first, _), (second, _), (third, _) = tool.BENCHMARKS
    tool.told(killed=[first], cut=[second])
    assert tool.run_all("--part", "bench") == 1
    assert tool.result()["bench"] == {first: BENCH, third: BENCH}
    assert not tool.result()["parts"]["bench"][first]["ok"]


def test_the_result_is_written_after_every_step(tool, monkeypatch):
    """A tool that is killed in its second step leaves the first one's result."""
    ended = tool.run_step

    def killed(step, seconds, stand_in):
        if step.name == "tests":
            raise KeyboardInterrupt
        return ended(step, seconds, stand_in)

    monkeypatch.setattr(tool, "run_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tool.run_all()
    assert tool.result()["parts"]["smoke"]["smoke"]["ok"]


def test_rehearsal_needs_no_gpu(tool, tmp_path):
    (tmp_path / "bin" / "nvidia-smi").unlink()
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    assert tool.main(["--stand-in", "--out", str(tool.out)]) == 0
    (file,) = tool.out.glob("rehearsal-*.json")
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == list(tool.PARTS)
    assert not set(parts["sanitizer"]) & set(tool.SANITIZERS)
    for _, arguments, env in tool.calls():
        assert "BMTARD_REQUIRE_CUDA" not in env
        assert "cuda" not in arguments


def test_a_program_that_is_missing_has_failed(tool, tmp_path):
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    assert tool.run_all("--part", "sanitizer") == 1
    steps = tool.result()["parts"]["sanitizer"]
    assert all("compute-sanitizer" in step["closing"] for step in steps.values())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "needs an NVIDIA GPU, but there is no nvidia-smi on PATH"),
        ("echo 'No devices were found'; exit 6", "nvidia-smi says: No devices were found"),
        ("echo 'No devices were found'", "nvidia-smi says: No devices were found"),
        ("exit 9", "nvidia-smi says: exit status 9"),
    ],
)
def test_without_a_gpu_it_says_so(tool, tmp_path, script, message):
    smi = tmp_path / "bin" / "nvidia-smi"
    if script is None:
        smi.unlink()
    else:
        smi.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(SystemExit, match=f"^gpu-check: .*{message}$"):
        tool.run_all()
    assert not tool.out.exists()


def test_without_the_library_it_says_so(tool):
    (tool.ROOT / "bmtard" / "_C.so").unlink()
    with pytest.raises(SystemExit, match=r"bmtard/_C.so is missing: build it"):
        tool.run_all()


def test_a_device_that_cannot_be_used_is_named(tool):
    tool.told(no_device="torch 2.11.0+cpu finds no CUDA device")
    message = r"the device cannot be used: torch 2.11.0\+cpu finds no CUDA device"
    with pytest.raises(SystemExit, match=message):
        tool.run_all()


def test_probe_says_what_is_missing_here(tool):
    """The probe itself, on a machine that cannot pass it."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", tool.PROBE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"torch {torch.__version__} finds no CUDA device"


def test_unknown_part_is_refused(tool, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.run_all("--part", "everything")
    assert "invalid choice: 'everything'" in capsys.readouterr().err
