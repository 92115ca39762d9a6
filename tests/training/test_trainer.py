"""Training runs: every method learns, resumes exactly, skips what is not finite."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bmtard import attacks
from bmtard.data import Batches, ImageData
from bmtard.ops import _dispatch
from bmtard.training import checkpoint
from bmtard.training import trainer as module
from bmtard.training.config import (
    AttackConfig,
    AWPConfig,
    BalanceConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from bmtard.training.evaluate import accuracies
from bmtard.training.methods import METHODS
from bmtard.training.metrics import MetricsLog, read_metrics
from bmtard.training.report import plot_balance
from bmtard.training.trainer import NonFiniteLossError, Trainer, train

Changed = Callable[..., TrainConfig]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(
    method: str, with_teachers: Changed, digits: ImageData, quiet: Any
) -> None:
    config = with_teachers(
        method=method,
        epochs=10,
        optimizer=OptimizerConfig(lr=0.1, schedule="constant", weight_decay=0.0),
        loss=LossConfig(mart_beta=1.0),  # with the published 6 it needs more epochs than these
    )
    result = train(config, quiet, digits)
    rows = read_metrics(config.folder / "metrics.jsonl", "epoch")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert [row["skipped"] for row in rows] == [0] * 10
    assert result.accuracy["clean"] > 0.3  # chance is 0.1
    assert set(result.accuracy) == {"clean", "fgsm"}
    written = json.loads((config.folder / "results.json").read_text())
    assert written["accuracy"] == result.accuracy
    expected = (result.accuracy["clean"] + result.accuracy["fgsm"]) / 2
    assert written["weighted_robust_accuracy"]["fgsm"] == pytest.approx(expected)


def everything(path: Path) -> dict[str, Any]:
    state = checkpoint.load(path)
    return {
        name: state[name] for name in ("model", "weights", "method", "optimizer", "step", "random")
    }


def assert_identical(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "mode", "options"),
    [
        ("sat", "bisect", {}),
        ("mtard", "bisect", {}),
        ("bmtard", "sign", {}),
        ("bmtard", "bisect", {}),
        ("bmtard", "bisect", {"ema": 0.9, "awp": AWPConfig(gamma=0.01, warmup=0.5)}),
    ],
)
def test_resumed_equals_uninterrupted(
    method: str,
    mode: str,
    options: dict[str, Any],
    with_teachers: Changed,
    digits: ImageData,
    quiet: Any,
    tmp_path: Path,
) -> None:
    config = with_teachers(
        method=method,
        epochs=3,
        crop_padding=1,
        flip=True,
        balance=BalanceConfig(mode=mode, temperature_lr=0.02),
        validation_fraction=0.2,
        **options,
    )
    whole, parts = replace(config, output=tmp_path / "a"), replace(config, output=tmp_path / "b")
    train(whole, quiet, digits)

    def stop_in_second_epoch(text: str) -> None:
        if (parts.folder / "last.pt").exists():
            raise Interrupted

    quiet.advance = stop_in_second_epoch
    with pytest.raises(Interrupted):
        train(parts, quiet, digits)
    assert checkpoint.load(parts.folder / "last.pt")["epoch"] == 1
    del quiet.advance
    torch.rand(100)  # the generator is somewhere else by now
    train(replace(parts, resume=True), quiet, digits)

    for name in ("last.pt", "best.pt"):
        assert_identical(everything(whole.folder / name), everything(parts.folder / name))
    a, b = (read_metrics(run.folder / "metrics.jsonl") for run in (whole, parts))
    for row in (*a, *b):
        row.pop("images_per_s")
    assert a == b


def test_resume_refuses_another_configuration(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    config = replace(config, method="natural")
    train(config, quiet, digits)
    with pytest.raises(ValueError, match=r"resume: seed is 7, but .* was trained with 0"):
        Trainer(replace(config, resume=True, seed=7), quiet, digits)
    with pytest.raises(ValueError, match=r"already holds a run"):
        Trainer(config, quiet, digits)
    Trainer(replace(config, overwrite=True), quiet, digits)


def test_balance_state_is_in_the_checkpoint(
    with_teachers: Changed, digits: ImageData, quiet: Any
) -> None:
    config = with_teachers(method="bmtard")
    train(config, quiet, digits)
    state = checkpoint.load(config.folder / "last.pt")["method"]
    last = read_metrics(config.folder / "metrics.jsonl")[-1]
    for name in ("temperatures", "entropies", "weights", "losses", "initial_losses"):
        assert state[f"balance.{name}"].tolist() == last[name]
    assert not any("teacher" in name for name in state)
    # The clean teacher is the surer one: its temperature has moved, and the entropies agree.
    assert last["temperatures"][0] == 1.0
    assert last["temperatures"][1] > 1.0
    assert last["entropies"][0] == pytest.approx(last["entropies"][1], abs=1e-4)


def test_the_picture_shows_the_losses_of_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"event": "train", "epoch": 1.0, "temperatures": [1.0, 2.0], "entropies": [0.5, 0.6],
         "weights": [0.4, 0.6], "losses": [0.02, 0.03], "initial_losses": [0.2, 0.05]},
        {"event": "train", "epoch": 2.0, "temperatures": [1.0, 3.0], "entropies": [0.7, 0.7],
         "weights": [0.3, 0.7], "losses": [0.01, 0.02], "initial_losses": [0.2, 0.05]},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda f, *_, **__: figures.append(f))
    plot_balance({"bmtard": [tmp_path]}, tmp_path / "balance.png")
    lines = [[line.get_xydata().tolist() for line in axis.lines] for axis in figures[0].axes]
    temperatures, *_, losses = lines
    assert temperatures == [[[1.0, 1.0], [2.0, 1.0]], [[1.0, 2.0], [2.0, 3.0]]]
    assert losses == [
        [[0.0, 0.2], [1.0, 0.02], [2.0, 0.01]],
        [[0.0, 0.05], [1.0, 0.03], [2.0, 0.02]],
    ]


def test_learning_rates_follow_the_milestones(
    with_teachers: Changed, digits: ImageData, quiet: Any
) -> None:
    config = with_teachers(
        method="bmtard",
        optimizer=OptimizerConfig(lr=0.1, milestones=(0.5,), decay=0.1),
        log_every=1,
    )
    trainer = Trainer(config, quiet, digits)
    trainer.run()
    rates = [row["lr"] for row in read_metrics(config.folder / "metrics.jsonl")]
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 6)
    assert float(trainer.method.balance.temperature_lr) == pytest.approx(0.0025)
    assert float(trainer.method.balance.weight_lr) == pytest.approx(0.0025)


def test_the_learning_rate_moves_with_every_step(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    optimizer = OptimizerConfig(lr=0.1, schedule="cosine")
    config = replace(config, method="natural", optimizer=optimizer, log_every=1, test_attacks=())
    Trainer(config, quiet, digits).run()
    rates = [row["lr"] for row in read_metrics(config.folder / "metrics.jsonl")]
    assert rates == pytest.approx([0.1 * optimizer.factor(step / 12) for step in range(12)])


def test_batches_are_augmented_as_configured(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    config = replace(config, method="natural", crop_padding=2, flip=True, seed=5)
    expected = Batches(
        digits.train_images, digits.train_labels, batch_size=64, max_value=16, shuffle=True,
        crop_padding=2, flip=True, seed=5,
    )  # fmt: skip
    for mine, theirs in zip(
        Trainer(config, quiet, digits).batches.epoch(1), expected.epoch(1), strict=True
    ):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("parts", [1, 2])
def test_each_step_has_a_start_of_its_own(
    parts: int, config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    attack = replace(config.attack, random_start="uniform")
    config = replace(config, method="sat", accumulate=parts, attack=attack)
    trainer = Trainer(config, quiet, digits)
    x, y = next(trainer.batches.epoch(0))
    assert not torch.equal(trainer._perturb(x, y), trainer._perturb(x, y))


def test_schedules() -> None:
    assert OptimizerConfig(schedule="cosine").factor(0.5) == pytest.approx(0.5)
    cyclic = OptimizerConfig(schedule="cyclic")
    assert [cyclic.factor(p) for p in (0.0, 0.2, 0.4, 0.7)] == pytest.approx([0, 0.5, 1, 0.5])
    assert cyclic.balance_factor(0.7) == 1.0
    published = OptimizerConfig()
    factors = [published.factor(epoch / 300) for epoch in (214, 215, 260, 285)]
    assert factors == pytest.approx([1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("method", "options"),
    [("sat", {}), ("bmtard", {}), ("bmtard", {"ema": 0.5, "awp": AWPConfig(gamma=0.01)})],
)
def test_a_non_finite_step_changes_nothing(
    method: str,
    options: dict[str, Any],
    with_teachers: Changed,
    digits: ImageData,
    quiet: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First step included, where momentum does not exist yet."""
    trainer = Trainer(with_teachers(method=method, **options), quiet, digits)
    x, y = next(trainer.batches.epoch(0))
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    averaged = {name: value.clone() for name, value in trainer.evaluated.state_dict().items()}
    state = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    monkeypatch.setattr(trainer.method, "perturb", lambda student, x, labels: x * math.nan)
    _, skipped = trainer._train_step(x, y)
    assert skipped
    assert_identical(before, dict(trainer.network.state_dict()))
    assert_identical(averaged, dict(trainer.evaluated.state_dict()))
    for name, value in trainer.method.state_dict().items():
        assert name == "balance.status" or torch.equal(value, state[name])
    monkeypatch.undo()
    _, skipped = trainer._train_step(x, y)
    assert not skipped
    after = trainer.network.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(after["network.head.weight"], before["network.head.weight"])
    # Nor does an average move that is not the network any more.
    averaged = {name: value.clone() for name, value in trainer.evaluated.state_dict().items()}
    monkeypatch.setattr(trainer.method, "perturb", lambda student, x, labels: x * math.nan)
    trainer._train_step(x, y)
    assert_identical(averaged, dict(trainer.evaluated.state_dict()))


def test_too_many_skipped_steps_are_an_error(
    config: TrainConfig, digits: ImageData, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(replace(config, method="sat", max_skipped=0.2), quiet, digits)
    calls = iter(range(1000))

    def sometimes(student: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x * (math.nan if next(calls) % 3 == 0 else 1)

    monkeypatch.setattr(trainer.method, "perturb", sometimes)
    with pytest.raises(NonFiniteLossError, match=r"epoch 1: 2 of 6 steps .* max_skipped=0.2"):
        trainer.run()
    rows = read_metrics(trainer.folder / "metrics.jsonl")
    assert sum(row["skipped"] for row in rows) == 2
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_steps_between_logs_read_nothing(
    with_teachers: Changed, digits: ImageData, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts, in an epoch, the ways to read a device value. (The loss looks at its gradient on the
    CPU, and only there.)"""
    config = with_teachers(method="bmtard", log_every=100)
    trainer = Trainer(config, quiet, digits)
    log = MetricsLog(config.folder, resume_step=None, tensorboard=False)
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self: Any, *args: Any, _name: str = name, _original: Any = original) -> Any:
            if Path(sys._getframe(1).f_code.co_filename) != Path(_dispatch.__file__):
                reads.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    trainer._train_epoch(log)
    monkeypatch.undo()
    log.close()
    assert reads == ["tolist"]


def test_validation_chooses_and_the_test_images_do_not(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    config = replace(config, method="natural", epochs=4, validation_fraction=0.25)
    result = train(config, quiet, digits)
    rows = read_metrics(config.folder / "metrics.jsonl", "epoch")
    best = max(range(4), key=lambda epoch: rows[epoch]["weighted"])
    assert result.checkpoint.name == "best.pt"
    assert checkpoint.load(result.checkpoint)["epoch"] == best + 1
    assert len(read_metrics(config.folder / "metrics.jsonl", "test")) == 1


def test_validation_looks_at_the_average(
    config: TrainConfig, digits: ImageData, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that is what best.pt holds."""
    config = replace(config, method="natural", validation_fraction=0.25, ema=0.9)
    trainer = Trainer(config, quiet, digits)
    seen: list[torch.nn.Module] = []

    def spy(network: torch.nn.Module, *rest: Any) -> dict[str, float]:
        seen.append(network)
        return {"clean": 0.5, "pgd-sat": 0.5}

    monkeypatch.setattr(trainer, "_accuracies", spy)
    trainer._validate()
    assert seen == [trainer.average]


def test_networks_are_measured_in_the_norm_of_the_training(
    config: TrainConfig, digits: ImageData, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = AttackConfig(epsilon=1.5, step_size=0.5, steps=1, norm="l2")
    config = replace(config, method="natural", epochs=1, validation_fraction=0.25, attack=attack)
    seen: list[tuple[Any, ...]] = []

    def spy(*inputs: Any, attacks: tuple[str, ...], **options: Any) -> dict[str, float]:
        seen.append((options["norm"], options["epsilon"]))
        return dict.fromkeys(("clean", *attacks), 0.5)

    monkeypatch.setattr(module, "accuracies", spy)
    Trainer(config, quiet, digits).run()
    assert seen == [("l2", 1.5)] * 2  # validation and test


def test_the_first_of_the_best_is_tested(
    config: TrainConfig, digits: ImageData, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, method="natural", epochs=4, validation_fraction=0.25, test_attacks=())
    trainer = Trainer(config, quiet, digits)
    marks = iter([0.2, 0.5, 0.5, 0.1])
    monkeypatch.setattr(trainer, "_validate", lambda: {"weighted": next(marks)})
    result = trainer.run()
    network, state = checkpoint.load_network(result.checkpoint)
    assert state["epoch"] == 2
    images = (digits.test_images, digits.test_labels)
    options = {"attacks": (), "epsilon": 0.1, "max_value": 16}
    assert result.accuracy == accuracies(network, *images, **options)
    assert result.accuracy != accuracies(trainer.network, *images, **options)


def test_validation_every_some_epochs_on_fixed_images(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    config = replace(
        config, method="natural", epochs=5, validation_fraction=0.25, validation_every=2,
        validation_seed=3, validation_steps=1, train_limit=100,
    )  # fmt: skip
    trainer = Trainer(config, quiet, digits)
    rest, images, labels = digits.split_validation(0.25, 3)
    assert torch.equal(trainer.validation[0], images)
    assert torch.equal(trainer.data.train_images, rest.train_images[:100])
    trainer.run()
    rows = read_metrics(config.folder / "metrics.jsonl", "epoch")
    assert ["weighted" in row for row in rows] == [False, True, False, True, True]
    # One step of epsilon / 4 from a uniform start, on the network of the last epoch.
    expected = accuracies(
        trainer.network, images, labels, attacks=("pgd-sat",), steps=1,
        epsilon=config.attack.epsilon, max_value=16,
    )  # fmt: skip
    assert {name: rows[-1][name] for name in expected} == expected
    twenty = accuracies(
        trainer.network, images, labels, attacks=("pgd-sat",),
        epsilon=config.attack.epsilon, max_value=16,
    )  # fmt: skip
    assert twenty["pgd-sat"] < expected["pgd-sat"]


def test_checkpoints_from_before_an_option_can_be_resumed(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    config = replace(config, method="natural")
    train(config, quiet, digits)
    path = config.folder / "last.pt"
    state = checkpoint.load(path)
    del state["config"]["train_limit"], state["config"]["loss"]["trades_beta"]
    checkpoint.save(path, state)
    Trainer(replace(config, resume=True), quiet, digits)
    with pytest.raises(ValueError, match=r"train_limit is 9, but .* was trained with None"):
        Trainer(replace(config, resume=True, train_limit=9), quiet, digits)


def test_missing_and_wrong_teachers(
    config: TrainConfig, teachers: dict[str, Path], digits: ImageData, quiet: Any
) -> None:
    with pytest.raises(ValueError, match=r"bmtard needs --teacher-robust .* and --teacher-c"):
        Trainer(config, quiet, digits)
    gone = replace(config, teacher_robust=Path("gone.pt"), teacher_clean=teachers["clean"])
    with pytest.raises(FileNotFoundError, match=r"checkpoint gone.pt does not exist"):
        Trainer(gone, quiet, digits)
    state = checkpoint.load(teachers["robust"])
    state["config"]["data"] = "mnist"
    other = config.folder.parent / "other.pt"
    checkpoint.save(other, state)
    with pytest.raises(ValueError, match=r"was trained on mnist, the student learns digits"):
        Trainer(
            replace(config, teacher_robust=other, teacher_clean=teachers["clean"]), quiet, digits
        )


def test_broken_checkpoints(teachers: dict[str, Path], tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut.pt", teachers["clean"].read_bytes()
    for size in (0, 1, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.pt is not a complete checkpoint: .+\Z"):
            checkpoint.load(cut)
    cut.write_text("no checkpoint\n" * 100)
    with pytest.raises(ValueError, match=r"cut.pt is not a complete checkpoint: .+\Z"):
        checkpoint.load(cut)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"is not a bmtard checkpoint of format 1, got None"):
        checkpoint.load(tmp_path / "other.pt")


def test_a_checkpoint_calls_no_function_by_itself(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    state = checkpoint.load(teachers["clean"])
    harm = tmp_path / "harm"
    path = tmp_path / "other.pt"
    for network, problem in (
        ({"name": "os:mkdir", "num_classes": str(harm)}, "made by the function os:mkdir"),
        ({"name": "cnn-4", "num_classes": str(harm)}, "num_classes must be an int"),
        ({"name": "cnn-4"}, "num_classes"),
        ({}, "name"),
        ({**state["network"], "name": "cnn-5"}, "size mismatch"),
    ):
        checkpoint.save(path, {**state, "network": network})
        with pytest.raises(ValueError, match=rf"other.pt holds no network.*{problem}"):
            checkpoint.load_network(path)
        assert not harm.exists()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"no space"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_autocast_and_channels_last(with_teachers: Changed, digits: ImageData, quiet: Any) -> None:
    config = with_teachers(method="bmtard", autocast="bfloat16", channels_last=True)
    trainer = Trainer(config, quiet, digits)
    x, _ = next(trainer.batches.epoch(0))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert trainer.run().accuracy["clean"] > 0.1
    assert trainer.method.balance.temperatures.dtype == torch.float64
    assert next(trainer.network.parameters()).dtype == torch.float32


def test_trades_attacks_its_own_clean_logits(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    """The method's attack equals pgd against the logits in eval mode."""
    config = replace(
        config,
        method="trades",
        attack=AttackConfig(epsilon=0.1, step_size=0.05, steps=3, random_start="gaussian"),
    )
    trainer = Trainer(config, quiet, digits)
    x, y = next(trainer.batches.epoch(0))
    trainer.network.train()
    torch.manual_seed(3)
    actual = trainer.method.perturb(trainer.network, x, y)
    trainer.network.eval()
    torch.manual_seed(3)
    expected = attacks.pgd(
        trainer.network, x, epsilon=0.1, step_size=0.05, steps=3, loss="kl",
        target_logits=trainer.network(x), random_start="gaussian",
    )  # fmt: skip
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("package", "changes"),
    [
        ("pyautoattack", {"test_attacks": ("square",)}),
        ("torch.utils.tensorboard", {"tensorboard": True}),
    ],
)
def test_a_missing_package_is_told_before_the_old_run_is_gone(
    package: str, changes: dict[str, Any], config: TrainConfig, digits: ImageData, quiet: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = replace(config, method="natural", overwrite=True, **changes)
    config.folder.mkdir()
    (config.folder / "last.pt").write_text("the old run")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed: .*bmtard\["):
        train(config, quiet, digits)
    assert (config.folder / "last.pt").read_text() == "the old run"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(epochs=0), "TrainConfig: epochs must be >= 1, got 0"),
        (lambda: TrainConfig(epochs=1.5), "TrainConfig: epochs must be a whole number, got 1.5"),
        (
            lambda: TrainConfig(autocast="half"),
            "autocast must be one of none, bfloat16, got 'half'",
        ),
        (
            lambda: TrainConfig(test_attacks=("pgd",)),
            r"test_attacks must be of fgsm, .* \('pgd',\)",
        ),
        (
            lambda: TrainConfig(test_attacks=("transfer-cw",)),
            r"test_attacks must be without transf",
        ),
        (lambda: OptimizerConfig(schedule="cosin"), "schedule must be one of .* got 'cosin'"),
        (lambda: AttackConfig(norm="l1"), "AttackConfig: norm must be one of linf, l2, got 'l1'"),
        (lambda: TrainConfig(train_limit=0), "train_limit must be >= 1, got 0"),
        (lambda: TrainConfig(validation_steps=0), "validation_steps must be >= 1, got 0"),
        (lambda: TrainConfig(model="vgg"), "model must be one of .* got 'vgg'"),
        (lambda: TrainConfig(data="svhn"), "data set must be one of digits, .* got 'svhn'"),
        (lambda: AttackConfig(epsilon=0), "AttackConfig: epsilon must be finite and > 0, got 0"),
        (lambda: OptimizerConfig(milestones=(0.9, 0.5)), "milestones must be ascending"),
        (lambda: OptimizerConfig(lr=math.nan), "lr must be finite and > 0, got nan"),
        (lambda: BalanceConfig(temperature_bounds=(2, 1)), "temperature_bounds must satisfy 0 < "),
    ],
)
def test_configurations_defend_themselves(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
