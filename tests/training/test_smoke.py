"""Every method on every data set: two steps from files of the official formats, and of real ones
where BMTARD_DATA is set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_data
import torch
from quiet import Quiet

from bmtard import data
from bmtard.data import ImageData
from bmtard.models import build_model
from bmtard.training import checkpoint
from bmtard.training.config import METHOD_NAMES, PRESETS, TrainConfig
from bmtard.training.metrics import read_metrics
from bmtard.training.trainer import train

BATCH, STEPS = 4, 2


def write_mnist(folder: Path, inside: str = "mnist") -> None:
    pixels = test_data.RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8)
    (folder / inside).mkdir(parents=True)
    for prefix in ("train", "t10k"):
        for kind, values in (("images-idx3", pixels), ("labels-idx1", np.arange(10, dtype="u1"))):
            test_data.write_idx(folder / inside / f"{prefix}-{kind}-ubyte.gz", values)


def write_fashion_mnist(folder: Path) -> None:
    write_mnist(folder, "fashion-mnist")


def write_cifar100(folder: Path) -> None:
    folder.mkdir()
    for name, count in (("train", 12), ("test", 5)):
        test_data.records(count, 100, coarse=True).tofile(folder / f"{name}.bin")


def write_tiny_imagenet(folder: Path) -> None:
    test_data.write_tiny_imagenet(folder / "tiny-imagenet-200")
    for name in ("n02", "n01"):
        for k in range(2, 6):
            image = folder / "tiny-imagenet-200" / "train" / name / "images" / f"{name}_{k}.JPEG"
            image.write_bytes(test_data.jpeg())


def write_folder(folder: Path) -> None:
    for split, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            for k in range(count):
                pixels = test_data.RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                test_data.write_image(folder / split / name / f"{k}.png", pixels)


GENERATED: dict[str, Callable[[Path], Any]] = {
    "digits": Path.mkdir,  # they come with scikit-learn
    "mnist": write_mnist,
    "fashion-mnist": write_fashion_mnist,
    "cifar10": test_data.write_cifar10,
    "cifar100": write_cifar100,
    "tiny-imagenet": write_tiny_imagenet,
    "folder:images": write_folder,
}
REAL = {
    "mnist": ("mnist/train-images-idx3-ubyte*", "mnist*.tar"),
    "cifar10": ("cifar10_*.npz", "cifar10_*.tar.xz"),
    "cifar100": ("cifar100_*.tar.xz",),
    "tiny-imagenet": ("tinyimagenet*.npz",),
}


def real_part(name: str, folder: Path) -> ImageData:
    """Some of the real images."""
    real = test_data.real_folder()
    found = [path for pattern in REAL[name] for path in sorted(real.glob(pattern))]
    if not found:
        pytest.skip(f"no {' or '.join(REAL[name])} in {data.DATA_VARIABLE}")
    if found[0].suffix == ".npz":
        test = "val" if name == "tiny-imagenet" else "test"
        test_data.write_part(found[0], folder, test)
        return data.load(name, folder)
    if ".tar" in found[0].name:
        return data.load(name, test_data.unpacked(found[0].name, folder))
    return data.load(name, real)


def settings(name: str, folder: Path) -> TrainConfig:
    """The preset of the data set, made small."""
    preset = PRESETS[name][1] if name in PRESETS else TrainConfig()
    return replace(
        preset, data=name, data_dir=folder, model="cnn-2", epochs=1, batch_size=BATCH,
        train_limit=BATCH * STEPS, attack=replace(preset.attack, steps=1), log_every=1,
        test_attacks=("fgsm",), check_teachers=False, device="cpu",
    )  # fmt: skip


Set = tuple[ImageData, TrainConfig]


@pytest.fixture(
    scope="module",
    params=[*(f"{name}, generated" for name in GENERATED), *(f"{name}, real" for name in REAL)],
)
def data_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Set:
    """The data, and the settings with two teachers."""
    name, kind = request.param.split(", ")
    folder = tmp_path_factory.mktemp("data") / "files"
    if kind == "generated":
        GENERATED[name](folder)
        name = f"folder:{folder}" if name.startswith("folder:") else name
        images = data.load(name, folder)
    else:
        folder.mkdir()
        images = real_part(name, folder)
    images = replace(
        images, test_images=images.test_images[:10], test_labels=images.test_labels[:10]
    )
    config = settings(name, folder)
    roles = {}
    for seed, (role, method) in enumerate([("clean", "natural"), ("robust", "fgsm-rs")]):
        teacher = replace(config, method=method, seed=seed, output=folder.parent / role)
        roles[f"teacher_{role}"] = train(teacher, Quiet(), images).checkpoint
    return images, replace(config, **roles)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_two_steps(method: str, data_set: Set, tmp_path: Path) -> None:
    images, config = data_set
    result = train(replace(config, method=method, output=tmp_path), Quiet(), images)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0] * STEPS
    assert all(math.isfinite(row["loss"]) and row["loss"] >= 0 for row in rows)
    assert result.accuracy.keys() == {"clean", "fgsm"}
    network, state = checkpoint.load_network(result.checkpoint)
    assert state["step"] == STEPS
    x = images.test_images.float() / images.max_value
    assert network(x).shape == (len(x), images.num_classes)
    right = (network(x).argmax(1) == images.test_labels).float().mean()
    assert result.accuracy["clean"] == pytest.approx(float(right))
    torch.manual_seed(config.seed)
    begun = build_model(**state["network"])
    for new, old in zip(network.parameters(), begun.parameters(), strict=True):
        assert new.isfinite().all()
        assert new.dim() == 1 or not torch.equal(new, old)
