"""A small, quick data set and configuration for the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quiet import Quiet

from bmtard.data import ImageData, load_digits
from bmtard.training.config import DIGITS, AttackConfig, TrainConfig
from bmtard.training.trainer import train


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """These networks are too small for more, and waiting threads slow a busy machine down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()


@pytest.fixture(scope="package")
def digits() -> ImageData:
    """A subset of the digits."""
    full = load_digits()
    return replace(
        full,
        train_images=full.train_images[:384],
        train_labels=full.train_labels[:384],
        test_images=full.test_images[:100],
        test_labels=full.test_labels[:100],
    )


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Short training of a tiny network."""
    return replace(
        DIGITS,
        model="cnn-2",
        epochs=2,
        batch_size=64,
        attack=AttackConfig(epsilon=0.1, step_size=0.05, steps=2),
        test_attacks=("fgsm",),
        log_every=2,
        checkpoint_every=1,
        device="cpu",
        output=tmp_path / "run",
    )


@pytest.fixture(scope="package")
def teachers(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: role -> path."""
    folder = tmp_path_factory.mktemp("teachers")
    paths: dict[str, Path] = {}
    for role, method in (("clean", "natural"), ("robust", "sat")):
        result = train(
            replace(
                DIGITS, method=method, model="cnn-4", epochs=8, batch_size=64, test_attacks=(),
                attack=AttackConfig(epsilon=0.1, step_size=0.05, steps=2),
                device="cpu", output=folder / role,
            ),
            Quiet(),
            digits,
        )  # fmt: skip
        paths[role] = result.checkpoint
    return paths


@pytest.fixture
def with_teachers(config: TrainConfig, teachers: dict[str, Path]) -> Callable[..., TrainConfig]:
    """The configuration with both teachers and the given changes."""

    def changed(**changes: object) -> TrainConfig:
        return replace(
            config,
            teacher_clean=teachers["clean"],
            teacher_robust=teachers["robust"],
            **changes,
        )

    return changed
