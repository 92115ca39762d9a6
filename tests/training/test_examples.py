"""The example loops run, and they learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import bmtard

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CPU = torch.device("cpu")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    )


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(32, 3, 4, 4), torch.randint(10, (32,))) for _ in range(3)]


@pytest.mark.parametrize("name", ["trades_loop", "rslad_loop", "bmtard_loop"])
def test_example(name: str, loader: list[tuple[Tensor, Tensor]]) -> None:
    student = network(0)
    optimizer = torch.optim.SGD(student.parameters(), 0.2, momentum=0.9)
    criterion = bmtard.BMTARDLoss()
    module = example(name)

    def epoch() -> float:
        if name == "trades_loop":
            return module.train_epoch(student, loader, optimizer, CPU)
        if name == "rslad_loop":
            return module.train_epoch(student, network(1), loader, optimizer, CPU)
        return module.train_epoch(
            student, network(1), network(2), criterion, loader, optimizer, CPU
        )

    losses = [epoch() for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    assert student.training
    assert int(criterion.step) == (36 if name == "bmtard_loop" else 0)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "trades_loop",
        "rslad_loop",
        "bmtard_loop",
    }
