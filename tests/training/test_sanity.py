"""Masked gradients are noticed, and normal networks are believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bmtard import cli
from bmtard.data import ImageData
from bmtard.training import sanity
from bmtard.training.checkpoint import load_network
from bmtard.training.sanity import check_sanity

EPSILON = 0.1


class Around(nn.Module):
    """A network with something before and after it."""

    def __init__(
        self, network: nn.Module, before: Callable[[Tensor], Tensor], scale: float = 1.0
    ) -> None:
        super().__init__()
        self.network, self.before, self.scale = network, before, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.network(self.before(x))


class ShatteredAtImages(torch.autograd.Function):
    """The identity, whose gradient is that of another function: it leads nowhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(grad.shape, generator=generator)


class ReversedElsewhere(torch.autograd.Function):
    """The identity, whose gradient points down but at images, which are multiples of 1/16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.sign = 1.0 if ((16 * x - (16 * x).round()).abs() < 1e-4).all() else -1.0
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.sign * grad


def failed(report: dict[str, Any]) -> set[str]:
    return {check["name"] for check in report["checks"] if not check["passed"]}


@pytest.fixture
def look(digits: ImageData) -> Callable[..., dict[str, Any]]:
    def look(network: nn.Module, **options: Any) -> dict[str, Any]:
        x, labels = digits.test_images.float() / digits.max_value, digits.test_labels
        options = {"epsilon": EPSILON, "batch_size": 64} | options
        return check_sanity(network, x, labels, **options)

    return look


@pytest.mark.parametrize("role", ["clean", "robust"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", EPSILON), ("l2", 0.5)])
def test_normal_networks_are_believed(
    role: str,
    norm: str,
    epsilon: float,
    look: Callable[..., dict[str, Any]],
    teachers: dict[str, Path],
) -> None:
    report = look(load_network(teachers[role])[0], norm=norm, epsilon=epsilon)
    assert failed(report) == set()
    assert report["believable"]
    assert report["verdict"] == "Nothing speaks against these figures."
    assert {check["name"] for check in report["checks"]} == {
        "one answer", "gradients", "many steps", "start", "large epsilon", "black box",
    }  # fmt: skip
    assert 50 < report["images"] <= 100


def test_masks_are_noticed(look: Callable[..., dict[str, Any]], teachers: dict[str, Path]) -> None:
    network = load_network(teachers["clean"])[0]
    masks = {
        # a staircase: no gradient anywhere
        "rounded": Around(network, lambda x: (4 * x).round() / 4),
        # logits so large that the softmax has no gradient
        "saturated": Around(network, lambda x: x, scale=1e4),
        "shattered": Around(network, ShatteredAtImages.apply),
        "random": Around(network, lambda x: x + 0.3 * torch.randn_like(x)),
    }
    torch.manual_seed(0)
    reports = {name: look(mask) for name, mask in masks.items()}
    for name, report in reports.items():
        assert not report["believable"], name
        assert report["verdict"].startswith("This robustness is not to be believed. ")
    assert {"gradients", "large epsilon", "black box"} <= failed(reports["rounded"])
    assert "attacks by gradients cannot move them" in reports["rounded"]["verdict"]
    assert {"gradients", "large epsilon"} <= failed(reports["saturated"])
    assert "large epsilon" in failed(reports["shattered"])
    assert "gradients" not in failed(reports["shattered"])
    assert "one answer" in failed(reports["random"])
    # Nothing of it stays behind.
    assert look(network)["believable"]


def test_luck_in_the_start_is_noticed(
    look: Callable[..., dict[str, Any]], teachers: dict[str, Path], digits: ImageData
) -> None:
    """No gradient at the images, whose values are multiples of 1/16, but everywhere else."""

    def flat_at_images(x: Tensor) -> Tensor:
        at_image = ((16 * x - (16 * x).round()).abs() < 1e-4).flatten(1).all(1)
        return torch.where(at_image.view(-1, 1, 1, 1), x.detach(), x)

    report = look(Around(load_network(teachers["clean"])[0], flat_at_images))
    assert {"gradients", "start"} <= failed(report)
    assert "luck in the start decides" in report["verdict"]


def test_steps_that_lead_nowhere_are_noticed(
    look: Callable[..., dict[str, Any]], teachers: dict[str, Path]
) -> None:
    """The gradient is right at the images alone, so one step is the better attack."""
    report = look(Around(load_network(teachers["clean"])[0], ReversedElsewhere.apply))
    assert "many steps" in failed(report)
    assert ": the steps lead nowhere." in report["verdict"]


def test_restarts_are_counted_together(
    look: Callable[..., dict[str, Any]], teachers: dict[str, Path]
) -> None:
    """A corner that the start alone moves decides whether there is a gradient."""

    def lucky(x: Tensor) -> Tensor:
        moved = x[:, :, :1, :1] > 0
        corner = torch.zeros_like(x, dtype=torch.bool)
        corner[:, :, 0, 0] = True
        return torch.where(moved, x.detach(), x).masked_fill(corner, 0)

    report = look(Around(load_network(teachers["clean"])[0], lucky))
    values = next(check for check in report["checks"] if check["name"] == "start")["values"]
    assert failed(report) >= {"start"}
    assert values["restarts"] < values["one_start"] - 0.2


def test_the_network_is_looked_at_in_eval_mode(
    look: Callable[..., dict[str, Any]], teachers: dict[str, Path]
) -> None:
    network = load_network(teachers["robust"])[0]
    expected = look(network)
    assert look(network.train()) == expected
    assert network.training


def test_measured_black_boxes_are_compared(
    look: Callable[..., dict[str, Any]], teachers: dict[str, Path]
) -> None:
    network = load_network(teachers["robust"])[0]
    results = {"clean": 0.9, "pgd-sat": 0.5, "cw": 0.45, "transfer-pgd": 0.4, "square": 0.44}
    report = look(network, results=results)
    assert failed(report) == {"black box"}
    assert "transfer-pgd leaves 40.0 %" in report["verdict"]
    assert look(network, results=results | {"transfer-pgd": 0.44})["believable"]


def test_nothing_right_is_nothing_checked(
    look: Callable[..., dict[str, Any]], teachers: dict[str, Path]
) -> None:
    network = load_network(teachers["clean"])[0]
    report = look(Around(network, lambda x: x, scale=-1.0))
    assert not report["believable"]
    assert report["images"] == 0
    assert "Nothing could be checked" in report["verdict"]


def test_command(
    teachers: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sanity, "QUERIES", 10)
    out = tmp_path / "evaluation.json"
    options = ["--attacks", "fgsm", "--limit", "30", "--device", "cpu", "--output", str(out)]
    assert cli.main(["evaluate", str(teachers["robust"]), *options]) == 0
    printed = capsys.readouterr().out
    assert "Is it to be believed?" in printed
    assert "Nothing speaks against these figures." in printed
    written = json.loads(out.read_text())["sanity"]
    assert written["believable"]
    assert written["images"] <= 30
    assert cli.main(["evaluate", str(teachers["robust"]), *options, "--sanity", "0"]) == 0
    assert json.loads(out.read_text())["sanity"] is None
