"""The evaluation counts right and attacks as its names say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bmtard import attacks
from bmtard.data import ImageData
from bmtard.training import evaluate as module
from bmtard.training.checkpoint import load_network
from bmtard.training.config import AttackConfig, EvaluateConfig, TrainConfig
from bmtard.training.evaluate import accuracies, evaluate, resolve_device, weighted
from bmtard.training.trainer import train


def test_counts(digits: ImageData, teachers: dict[str, Path]) -> None:
    network, state = load_network(teachers["robust"])
    x = digits.test_images.float() / 16
    with torch.no_grad():
        expected = (network(x).argmax(1) == digits.test_labels).float().mean().item()
    x_adv = attacks.fgsm(network, x, digits.test_labels, epsilon=0.1)
    with torch.no_grad():
        attacked = (network(x_adv).argmax(1) == digits.test_labels).float().mean().item()
    results = accuracies(
        network, digits.test_images, digits.test_labels, attacks=["fgsm"], epsilon=0.1,
        max_value=16, batch_size=33,
    )  # fmt: skip
    assert results == pytest.approx({"clean": expected, "fgsm": attacked})
    assert weighted(results) == pytest.approx({"fgsm": (expected + attacked) / 2})
    assert state["epoch"] == 8


def test_robust_training_shows(digits: ImageData, teachers: dict[str, Path]) -> None:
    names = ["fgsm", "pgd-sat", "pgd-trades", "cw"]
    results = {
        role: accuracies(
            load_network(path)[0], digits.test_images, digits.test_labels,
            attacks=names, epsilon=0.1, max_value=16,
        )
        for role, path in teachers.items()
    }  # fmt: skip
    for name in names:
        assert results["robust"][name] > results["clean"][name]
        assert results["robust"][name] < results["robust"]["clean"]
    for role in teachers:
        assert results[role]["pgd-sat"] <= results[role]["fgsm"]


@pytest.mark.parametrize(
    ("name", "steps", "step_size"),
    [
        ("fgsm", 1, 8 / 255),
        ("pgd-sat", 20, 2 / 255),
        ("pgd-trades", 20, 0.003),
        ("cw", 30, 2 / 255),
        ("transfer-pgd", 20, 0.003),
        ("transfer-cw", 30, 2 / 255),
    ],
)
def test_published_steps_at_eight_255ths(
    name: str, steps: int, step_size: float, digits: ImageData, teachers: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[Any] = []

    def spy(model: Any, x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((model, options))
        return x

    monkeypatch.setattr(module, "pgd", spy)
    networks = {role: load_network(path)[0] for role, path in teachers.items()}
    accuracies(
        networks["clean"], digits.test_images, digits.test_labels, attacks=[name],
        epsilon=8 / 255, max_value=16, surrogate=networks["robust"],
    )  # fmt: skip
    ((model, options),) = seen
    assert model is networks["robust" if name.startswith("transfer") else "clean"]
    assert options["steps"] == steps
    assert options["step_size"] == pytest.approx(step_size)
    assert options["loss"] == ("cw" if name.endswith("cw") else "ce")


def test_attacks_hear_what_was_asked_for(
    digits: ImageData, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Radius, norm and seed; a random start has a seed of its own for each batch."""
    seen: list[dict[str, Any]] = []

    def spy(model: Any, x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
        if "generator" in options:
            options["seed"] = options["generator"].initial_seed()
        seen.append(options)
        return x

    for name in ("pgd", "square", "autoattack"):
        monkeypatch.setattr(module, name, spy)
    monkeypatch.setattr(module, "check_installed", lambda attacks: None)
    config = EvaluateConfig(
        attacks=("pgd-sat", "square", "autoattack"), epsilon=0.7, norm="l2", seed=3, limit=60,
        batch_size=40, sanity=0, square_queries=9, device="cpu", output=tmp_path / "e.json",
    )  # fmt: skip
    evaluate(teachers["clean"], config, lambda name, accuracy: None, digits)
    assert [(one["epsilon"], one["norm"]) for one in seen] == [(0.7, "l2")] * 6
    assert [one["seed"] for one in seen] == [3 << 20, (3 << 20) + 1, 3, 3, 3, 3]
    assert [one.get("queries", one.get("square_queries")) for one in seen[2:]] == [9] * 4
    seen.clear()
    inputs = (load_network(teachers["clean"])[0], digits.test_images, digits.test_labels)
    accuracies(*inputs, attacks=["cw"], epsilon=0.1, max_value=16, steps=7)
    assert seen[0]["steps"] == 7
    with pytest.raises(ValueError, match=r"images must be in \[0.0, 1.0\] .*, got values in"):
        accuracies(*inputs, attacks=[], epsilon=0.1, max_value=8)


def test_file_and_defaults(teachers: dict[str, Path], tmp_path: Path) -> None:
    config = EvaluateConfig(
        attacks=("fgsm", "transfer-pgd"), limit=50, device="cpu",
        surrogate=teachers["robust"], output=tmp_path / "new" / "e.json",
    )  # fmt: skip
    lines: list[str] = []
    summary = evaluate(teachers["clean"], config, lambda name, value: lines.append(name))
    assert lines == ["clean", "fgsm", "transfer-pgd"]
    written = json.loads((tmp_path / "new" / "e.json").read_text())
    assert written == summary
    assert (written["images"], written["method"]) == (50, "natural")
    assert written["evaluation"]["epsilon"] == 0.1  # of the checkpoint's training
    again = evaluate(teachers["clean"], config, lambda name, value: None)
    assert again["accuracy"] == summary["accuracy"]
    # An attack made on another network is weaker than one made on this one.
    direct = evaluate(
        teachers["clean"], replace(config, attacks=("pgd-trades",)), lambda name, value: None
    )
    assert direct["accuracy"]["pgd-trades"] < summary["accuracy"]["transfer-pgd"]


def test_norm_and_epsilon_belong_together(
    config: TrainConfig, digits: ImageData, quiet: Any, tmp_path: Path
) -> None:
    l2 = AttackConfig(epsilon=1.5, step_size=0.5, steps=1, norm="l2")
    run = replace(config, method="natural", epochs=1, attack=l2, test_attacks=("fgsm",))
    path = train(run, quiet, digits).checkpoint
    options = EvaluateConfig(attacks=("fgsm",), limit=100, sanity=0, device="cpu")

    def silent(name: str, accuracy: float) -> None:
        pass

    summary = evaluate(path, options, silent, digits)
    assert (summary["evaluation"]["norm"], summary["evaluation"]["epsilon"]) == ("l2", 1.5)
    assert summary["accuracy"] == json.loads((run.folder / "results.json").read_text())["accuracy"]
    with pytest.raises(ValueError, match=r"epsilon must be given with norm linf: .* trained in l2"):
        evaluate(path, replace(options, norm="linf"), silent, digits)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate(
            path, replace(options, output=tmp_path / "file" / "e.json"),
            lambda name, accuracy: pytest.fail("told after the attack"), digits,
        )  # fmt: skip


def test_square_and_autoattack(digits: ImageData, teachers: dict[str, Path]) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack (bmtard[eval]) is not installed")
    network = load_network(teachers["clean"])[0]
    results = accuracies(
        network, digits.test_images[:24], digits.test_labels[:24], attacks=["square"],
        epsilon=0.2, max_value=16, square_queries=60,
    )  # fmt: skip
    assert results["square"] < results["clean"]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (("config",), "has no entry 'config'"),
        (("config", "data"), r"its settings \(config\) have no 'data'"),
        (("config", "attack", "epsilon"), r"its settings \(config\) have no 'epsilon'"),
        (("network",), "has no entry 'network'"),
    ],
)
def test_an_incomplete_checkpoint_is_told(
    lost: tuple[str, ...], message: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    state = torch.load(teachers["clean"], weights_only=True)
    inner = state
    for name in lost[:-1]:
        inner = inner[name]
    del inner[lost[-1]]
    torch.save(state, tmp_path / "some.pt")
    with pytest.raises(ValueError, match=rf"some.pt .*{message}"):
        evaluate(tmp_path / "some.pt", EvaluateConfig(device="cpu"), lambda name, value: None)


def test_the_output_is_looked_at_before_the_attacks(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a checkpoint that is read is never written over, by whatever name."""
    path, other = tmp_path / "last.pt", tmp_path / "other.pt"
    for copy in (path, other):
        copy.write_bytes(teachers["clean"].read_bytes())
    link, content = tmp_path / "link.json", path.read_bytes()
    link.symlink_to(path)
    monkeypatch.setattr(module, "accuracies", lambda *given, **options: pytest.fail("attacked"))
    for output, problem in (
        (path, "output must be a JSON file of its own, got the checkpoint .*last.pt"),
        (link, "output must be a JSON file of its own, got the checkpoint .*link.json"),
        (other, "output must be a JSON file of its own, got the checkpoint .*other.pt"),
        (tmp_path, "output must be a JSON file, got the folder"),
        (path / "a.json", r"cannot write .*last.pt/a.json: "),
    ):
        config = EvaluateConfig(device="cpu", surrogate=other, output=output)
        with pytest.raises((ValueError, OSError), match=problem):
            evaluate(path, config, lambda name, value: None)
    assert path.read_bytes() == other.read_bytes() == content


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match=r"EvaluateConfig: seed must be in \[0, 2\^40\), got -1"):
        EvaluateConfig(seed=-1)
    with pytest.raises(ValueError, match=r"device 'meta' cannot be used"):
        resolve_device("meta")
    with pytest.raises(ValueError, match=r"surrogate must be a checkpoint for transfer"):
        EvaluateConfig(attacks=("transfer-cw",))
    with pytest.raises(ValueError, match=r"EvaluateConfig: attacks must be of fgsm, .* 'pgd'"):
        EvaluateConfig(attacks=("fgsm", "pgd"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"device 'gpu' cannot be used"):
        resolve_device("gpu")
