"""Settings from files: bmtard train --config."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bmtard import cli
from bmtard.training import checkpoint
from bmtard.training.config import PRESETS, AWPConfig, TrainConfig, to_plain
from bmtard.training.settings import as_arguments, train_config, with_arguments

RUN = """
preset = "digits"
method = "trades"
epochs = 3
flip = true
test_attacks = []
teacher = ["clean=a b.pt", "third=c.pt@clean"]
train_limit = 64
[attack]
epsilon = 0.125
as_published = true
[balance]
temperature_bounds = [1, 5.5]
"""


def test_toml_over_preset_under_options(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    digits = PRESETS["digits"][1]
    expected = replace(
        digits,
        method="trades",
        epochs=7,
        flip=True,
        test_attacks=(),
        teacher=("clean=a b.pt", "third=c.pt@clean"),
        train_limit=64,
        attack=replace(digits.attack, epsilon=0.125, as_published=True),
        balance=replace(digits.balance, temperature_bounds=(1.0, 5.5)),
    )
    assert train_config(["--config", str(path), "--epochs", "7"]) == expected
    assert train_config(["--epochs", "7", f"--config={path}"]) == expected
    mnist = train_config(["mnist", "--config", str(path)])
    assert (mnist.data, mnist.epochs, mnist.model) == ("mnist", 3, PRESETS["mnist"][1].model)


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_comes_back(name: str, tmp_path: Path) -> None:
    config = replace(
        PRESETS[name][1],
        teacher_clean=tmp_path / "with space.pt",
        check_teachers=False,
        ema=1 / 3,
        awp=AWPConfig(gamma=0.1),
        test_attacks=(),
        validation_seed=0,
    )
    plain = json.loads(json.dumps(to_plain(config)))
    assert with_arguments(TrainConfig(), as_arguments(plain), "it") == config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "epochs = ", "config .*a.toml: "),
        ("a.json", "[1]", "config .*a.json: it must hold settings by name"),
        ("a.yaml", "epochs: 1", "config .*a.yaml: its name must end in .toml or .json"),
        ("a.toml", "epoch = 1", "config .*a.toml cannot be set: .*Perhaps you meant: --epochs"),
        (
            "a.toml",
            "epochs = 0",
            "config .*a.toml cannot be set: .*TrainConfig: epochs must be >= 1, got 0",
        ),
        ("a.toml", "[attack]\nsteps = 'many'", "config .*a.toml cannot be set: .*attack.steps"),
        ("a.toml", "preset = 'cifar'", "preset must be one of digits, .* got 'cifar'"),
        ("a.toml", "preset = ['digits']", r"preset must be one of digits, .* got \['digits'\]"),
        ("a.json", '{"help": true}', "config .*a.json cannot be set: .*--help"),
        (None, "", "config .*none.toml does not exist"),
    ],
)
def test_bad_files(name: str | None, text: str, message: str, tmp_path: Path) -> None:
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_config(["--config", str(tmp_path / (name or "none.toml"))])
    with pytest.raises(ValueError, match="--config needs a file"):
        train_config(["--config"])


def test_a_file_that_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"config .*a.json: .*recursion"):
        train_config(["--config", str(tmp_path / "a.json")])


def test_a_run_is_repeated_from_its_configuration(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fast = ["--epochs", "1", "--model", "cnn-2", "--device", "cpu", "--train-limit", "128"]
    options = [*fast, "--method", "n-fgsm", "--seed", "3", "--test-attacks", "fgsm", "--overwrite"]
    assert cli.main(["train", "digits", *options, "--output", str(first)]) == 0
    saved = str(first / "config.json")
    assert cli.main(["train", "--config", saved]) == 2  # the folder holds a run
    assert cli.main(["train", "--config", saved, "--output", str(second)]) == 0
    results = [json.loads((run / "results.json").read_text()) for run in (first, second)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    a, b = (checkpoint.load(run / "last.pt")["model"] for run in (first, second))
    assert all(a[name].equal(b[name]) for name in a)
