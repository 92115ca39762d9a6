"""The command line, and the demo at a small size."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bmtard import _library, cli
from bmtard.training import report
from bmtard.training.metrics import Display, MetricsLog, read_metrics

FAST = ["--epochs", "1", "--model", "cnn-2", "--device", "cpu", "--attack.steps", "1"]


def test_train_evaluate_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    arguments = ["train", "digits", *FAST, "--method", "sat", "--output", out]
    assert cli.main([*arguments, "--test-attacks", "fgsm", "--tensorboard"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"sat cnn-2 on digits, seed 0: clean \d+\.\d %, fgsm", printed)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"] == "sat"

    assert cli.main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert cli.main([*arguments, "--resume"]) == 0

    checkpoint = str(tmp_path / "run" / "last.pt")
    assert cli.main(["evaluate", checkpoint, "--attacks", "fgsm", "cw", "--limit", "40"]) == 0
    assert "weighted, cw" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 40


def test_distillation_draws_the_balance(
    tmp_path: Path, teachers: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--teacher-{role}={path}" for role, path in teachers.items()]
    out = tmp_path / "student"
    assert cli.main(["train", "digits", *FAST, *given, "--output", str(out)]) == 0
    assert (out / "balance.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--device", "cpu"], "method bmtard needs --teacher-robust"),
        (["train", "digits", "--epochs", "0"], "epochs must be >= 1, got 0"),
        (["train", "cifar10", "--data-dir", "nowhere"], "the data folder nowhere does not exist"),
        (["evaluate", "gone.pt"], "checkpoint gone.pt does not exist"),
        (["evaluate", "."], "checkpoint . is no file"),
        (["train", "digits", "--attack.steps", "0"], "train: AttackConfig: steps must be >= 1"),
        (["train", "digits", "--epochs", "many"], "Error parsing --epochs: "),
        (["train", "digits", "--resume", "--overwrite"], "resume must be false with overwrite"),
        (["train"], "Missing subcommand Expected one of"),
        (["train", "digits", "--speed", "9"], "train: Unrecognized options: --speed, 9"),
        (["evaluate", "a.pt", "--limit", "0"], "limit must be >= 1, got 0"),
        (["reproduce", "nothing"], "Unrecognized options: nothing"),
        (["demo", "--seeds", "x"], "Error parsing --seeds: "),
        (["bench", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["bench", "--max-memory", "inf"], "--max-memory must be > 0 and < 1e9, got inf"),
        (["bench", "--threads", "3000000000"], "--threads must be from 1 to 1024"),
        (["bench", "--shape", "²x4"], "--shape must be one of"),
        (["train", "digits", "--method=natural", "--crop-padding=100000000"], "not enough memory"),
        (["info", "now"], "takes no arguments"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_command_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bake"]) == 2
    assert capsys.readouterr().err.startswith("bmtard: no command 'bake'\n\nusage: bmtard")


@pytest.mark.parametrize("redirection", [">&-", ">/dev/null 2>&-"])
def test_closed_streams_are_no_error(redirection: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m bmtard info {redirection}"
    run = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_poor_terminal_gets_the_help() -> None:
    command = [sys.executable, "-m", "bmtard", "train", "--help"]
    poor = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, env=poor, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "tiny-imagenet" in run.stdout


def test_help_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 2
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in ("train", "evaluate", "reproduce", "demo", "info"))
    assert cli.main(["info", "--help"]) == 0
    assert "usage: bmtard info" in capsys.readouterr().out
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(\w+): +(.+)$", printed, flags=re.MULTILINE))
    assert set(rows) == {
        *("bmtard", "kernels", "torch", "CPU", "CUDA", "compiler", "library"),
        *("Python", "system", "processor", "settings", "driver", "GPUs"),
    }
    assert platform.python_version() in rows["Python"]


@pytest.mark.parametrize("where", ["cuInit", "device"])
def test_info_tells_of_a_gpu_that_cannot_be_used(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def capability(index: int) -> tuple[int, int]:
        if where == "cuInit":
            raise RuntimeError("The NVIDIA driver on your system is too old")
        return 7, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    monkeypatch.setattr(_library, "cuda_problem", lambda index: f"GPU {index} is too old")
    assert cli.main(["info"]) == 0
    expected = {"cuInit": "driver on your system", "device": r"Old GPU \(7.0\): GPU 0 is too old"}
    assert re.search(f"GPUs: .*{expected[where]}", capsys.readouterr().out)


def test_output_into_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "bmtard", "info"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")


def test_module_runs_and_missing_extras_are_named() -> None:
    code = (
        "import sys; sys.modules['tyro'] = None; from bmtard.cli import main;"
        "sys.exit(main(['train', 'digits']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "tyro is not installed: python -m pip install 'bmtard[train]'" in run.stderr
    run = subprocess.run(
        [sys.executable, "-m", "bmtard", "info"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0
    assert "torch:" in run.stdout


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    options = ["--seeds", "2", "--train.epochs", "1", "--students", "mtard", "bmtard, sign"]
    assert cli.main(["demo", *options, "--output", str(out)]) == 0
    names = ["teacher, clean", "teacher, robust", "mtard", "bmtard, sign"]
    summary = json.loads((out / "results.json").read_text())
    assert list(summary["accuracy"]) == names
    text = (out / "report.md").read_text()
    for name in names:
        seeds = summary["accuracy"][name]
        assert len(seeds) == 2
        assert set(seeds[0]) == {"clean", "fgsm", "pgd-sat"}
        clean = [100 * seed["clean"] for seed in seeds]
        mean, spread = sum(clean) / 2, abs(clean[0] - clean[1]) / 2**0.5
        assert f"| {name} | {mean:.1f} ± {spread:.1f} |" in text
    assert f"`{summary['command']}`" in text
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        assert (out / picture).stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "[8/8]" in printed
    assert "bmtard, sign" in printed
    # The students' runs are ordinary ones: the preset, and this seed's teachers.
    config = json.loads((out / "jobs" / "bmtard-sign-seed1" / "config.json").read_text())
    assert config["balance"]["mode"] == "sign"
    assert config["teacher_robust"].endswith("teacher-robust-seed1/last.pt")


def test_metrics_forget_what_the_checkpoint_has_not_seen(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=None, tensorboard=False)
    for step in range(1, 5):
        log.write("train", step, loss=1 / step)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # cut while writing
    MetricsLog(tmp_path, resume_step=4, tensorboard=False).close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("[1]\n")  # of somebody else
    log = MetricsLog(tmp_path, resume_step=4, tensorboard=False)
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    log = MetricsLog(tmp_path, resume_step=2, tensorboard=False)
    log.write("train", 3, loss=9.0)
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_display_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(2) as display:
        assert display.bars is not None
        first, second = display.run(), display.run()
        first.begin("one", 2)
        second.begin("two", 2)
        first.advance("loss 1")
        first.end("done [well]")
        assert display.bars.tasks[display.overall].completed == 1
        second.end("done")
    assert "[1/2] one: done [well]" in capsys.readouterr().out


def test_statistics_of_the_report() -> None:
    assert report.mean_std([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert report.mean_std([5.0]) == (5.0, 0.0)
    results = {"a": [{"clean": 0.9, "pgd-sat": 0.5}, {"clean": 0.7, "pgd-sat": 0.5}]}
    row = report.accuracy_rows(results, "pgd-sat")
    assert row == [["a", "80.0 ± 14.1", "50.0 ± 0.0", "65.0 ± 7.1"]]
    # Where something was not measured for all, each cell is of what there is.
    results["b"] = [{"clean": 0.5, "pgd-sat": 0.25, "transfer-pgd from sat": 0.4}]
    assert report.accuracy_rows(results, "pgd-sat") == [
        ["a", "80.0 ± 14.1", "50.0 ± 0.0", "-", "65.0 ± 7.1"],
        ["b", "50.0", "25.0", "40.0", "37.5"],
    ]
    assert report.accuracy_header(results, "pgd-sat") == [
        "", "Clean", "PGD-20", "PGD from sat", "Weighted (PGD-20)",
    ]  # fmt: skip
