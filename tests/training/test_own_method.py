"""The example of docs/own-method.md, run as its commands say."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from bmtard import cli
from bmtard.training import checkpoint
from bmtard.training.metrics import read_metrics

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/own-method.md"


def test_example(
    tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = DOCUMENT.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert len(code.splitlines()) <= 35
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    train, evaluate = (
        shlex.split(line.replace("TEACHER.pt", str(teachers["robust"])))[1:]
        for line in commands.splitlines()
    )
    fast = ["--epochs", "2", "--model", "cnn-2", "--attack.steps", "1", "--device", "cpu"]
    try:
        assert cli.main([*train, *fast]) == 0
        assert cli.main([*evaluate, "--attacks", "fgsm", "--limit", "20", "--device", "cpu"]) == 0
    finally:
        sys.modules.pop("my_method", None)
    rows = read_metrics(tmp_path / "runs/fading/metrics.jsonl")
    trusts = [row["trust"][0] for row in rows]
    assert 0 < trusts[-1] < trusts[0] < 1
    assert rows[-1]["loss"] < rows[0]["loss"]
    state = checkpoint.load(tmp_path / "runs/fading/last.pt")
    assert state["method"]["trust"].tolist() == pytest.approx(trusts[-1:])
    assert state["config"]["method"] == "my_method:Fading"
