"""The loaders on small files written here, on broken ones, and on real data where it is."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bmtard import data
from bmtard.data import Batches

RNG = np.random.default_rng(0)


def records(count: int, classes: int, coarse: bool = False) -> np.ndarray:
    """[count, 1 or 2 label bytes + 3072]"""
    pixels = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = (np.arange(count) % classes).astype(np.uint8)[:, None]
    columns = [labels, pixels] if not coarse else [labels // 5, labels, pixels]
    return np.concatenate(columns, 1)


def check_images(images: torch.Tensor, pixels: np.ndarray) -> None:
    assert images.dtype == torch.uint8
    assert np.array_equal(images.flatten(1).numpy(), pixels)
    # planes: the second channel begins at byte 1024, its second row at 1056
    assert images[0, 1, 1, 0] == pixels[0, 1024 + 32]


def write_cifar10(folder: Path) -> np.ndarray:
    folder.mkdir(parents=True)
    train = [records(3, 10) for _ in range(5)]
    for k, part in enumerate(train):
        part.tofile(folder / f"data_batch_{k + 1}.bin")
    records(4, 10).tofile(folder / "test_batch.bin")
    return np.concatenate(train)


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_binary(tmp_path: Path, inside: str) -> None:
    train = write_cifar10(tmp_path / "d" / inside)
    loaded = data.load("cifar10", tmp_path / "d")
    check_images(loaded.train_images, train[:, 1:])
    assert loaded.train_labels.tolist() == train[:, 0].tolist()
    assert (len(loaded.test_labels), loaded.num_classes) == (4, 10)


def test_cifar_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = records(2, 10)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        content = {"data": batch[:, 1:], "labels": batch[:, 0].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    loaded = data.load("cifar10", tmp_path)
    check_images(loaded.test_images, batch[:, 1:])
    assert loaded.train_labels.tolist() == [0, 1] * 5


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": Harmful()}))
    with pytest.raises(ValueError, match=r"data_batch_1 is not a complete CIFAR.*refused to load"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "harm").exists()


def test_cifar100_uses_the_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    train = records(20, 100, coarse=True)
    train.tofile(folder / "train.bin")
    records(2, 100, coarse=True).tofile(folder / "test.bin")
    loaded = data.load("cifar100", tmp_path)
    assert loaded.train_labels.tolist() == list(range(20))
    check_images(loaded.train_images, train[:, 2:])


def write_idx(path: Path, values: np.ndarray) -> None:
    raw = struct.pack(f">4B{values.ndim}i", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist(tmp_path: Path, end: str) -> None:
    images = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.arange(5, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{end}", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{end}", labels)
    loaded = data.load("mnist", tmp_path)
    assert np.array_equal(loaded.train_images[:, 0].numpy(), images)
    assert loaded.test_labels.tolist() == [0, 1, 2, 3, 4]


def jpeg(gray: bool = False) -> bytes:
    pixels = RNG.integers(0, 256, (8, 8) if gray else (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "file", "test"),
    [
        ("cifar10", "cifar10_jpegq75.npz", "test"),
        ("tiny-imagenet", "tinyimagenet_80class.npz", "val"),
    ],
)
def test_jpeg_npz(tmp_path: Path, name: str, file: str, test: str) -> None:
    files = [jpeg(), jpeg(gray=True), jpeg()]
    content: dict[str, np.ndarray] = {"class_names": np.array(["a", "b", "c"])}
    for split in ("train", test):
        content[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        content[f"{split}_offset"] = np.cumsum([0, *map(len, files)]).astype(np.uint32)
        content[f"y_{split}"] = np.array([2, 0, 1], np.uint8)
    np.savez(tmp_path / file, **content)
    loaded = data.load(name, tmp_path)
    assert loaded.train_images.shape == (3, 3, 8, 8)
    assert (loaded.test_labels.tolist(), loaded.num_classes) == ([2, 0, 1], 3)
    expected = np.asarray(Image.open(io.BytesIO(files[0]))).transpose(2, 0, 1)
    assert np.array_equal(loaded.train_images[0].numpy(), expected)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{file} is not a complete npz"):
        data.load(name, tmp_path)


def test_tiny_imagenet_folder(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n02", "n01"):
        (root / "train" / name / "images").mkdir(parents=True)
        for k in range(2):
            (root / "train" / name / "images" / f"{name}_{k}.JPEG").write_bytes(jpeg())
    (root / "val" / "images").mkdir(parents=True)
    (root / "val" / "images" / "val_0.JPEG").write_bytes(jpeg())
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t7\t7\n")
    (root / "wnids.txt").write_text("n02\nn01\n")
    loaded = data.load("tiny-imagenet", tmp_path)
    assert loaded.train_labels.tolist() == [0, 0, 1, 1]  # in the order of the names
    assert loaded.test_labels.tolist() == [1]


def test_digits_are_split_by_class_and_complete() -> None:
    loaded = data.load("digits")
    assert (len(loaded.train_labels), len(loaded.test_labels)) == (1198, 599)
    assert loaded.train_images.max() == loaded.max_value == 16
    shares = loaded.train_labels.bincount() / loaded.test_labels.bincount()
    assert shares.min() > 1.9
    assert shares.max() < 2.1
    assert torch.equal(data.load("digits").test_labels, loaded.test_labels)
    pixels = loaded.train_images.double() / 16
    mean, std = loaded.statistics()
    assert mean == pytest.approx([pixels.mean().item()])
    assert std == pytest.approx([pixels.std(correction=0).item()])
    rows = torch.cat([loaded.train_images, loaded.test_images]).flatten(1).unique(dim=0)
    assert len(rows) == 1797  # every scan once


def test_truncated_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "d")
    file = tmp_path / "d" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=r"data_batch_3.bin is truncated .* multiple of 3073 .* 921"
    ):
        data.load("cifar10", tmp_path / "d")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.bin is missing"):
        data.load("cifar10", tmp_path / "d")
    with pytest.raises(FileNotFoundError, match=r"none of cifar-100-binary.* in"):
        data.load("cifar100", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the data folder .*nowhere does not exist"):
        data.load("cifar10", tmp_path / "nowhere")
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=r"say where .* --data-dir or .* BMTARD_DATA"):
        data.load("mnist")
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match=r"other does not exist"):
        data.load("mnist")
    with pytest.raises(ValueError, match=r"data set must be one of digits, .* got 'svhn'"):
        data.load("svhn")
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        write_idx(tmp_path / name, np.zeros((2, 2, 2) if "images" in name else 2, np.uint8))
    short = tmp_path / "train-images-idx3-ubyte"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is truncated: expected 24 bytes for 2x2x2, got 23"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet", "mnist", "cifar100"])
def test_real_data(name: str) -> None:
    folder = os.environ.get(data.DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{data.DATA_VARIABLE} is not set")
    try:
        loaded = data.load(name, folder)
    except FileNotFoundError as error:
        pytest.skip(f"{name} is not in {data.DATA_VARIABLE}: {error}")
    assert len(loaded.train_labels.unique()) == loaded.num_classes
    mean, std = loaded.statistics()
    assert all(0.1 < value < 0.9 for value in mean)
    assert all(0.1 < value < 0.5 for value in std)


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 1, 4, 4).contiguous()
    labels = torch.arange(20)

    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(images, labels, batch_size=6, shuffle=True, seed=seed, crop_padding=1)
        seen = [y for _, y in batches.epoch(epoch)]
        assert [len(y) for y in seen] == [6, 6, 6]  # 2 are left over
        return torch.cat(seen).tolist()

    assert order(1, 5) == order(1, 5)
    assert len({tuple(order(*which)) for which in ((1, 5), (1, 6), (2, 5))}) == 3
    assert len(set(order(1, 5))) == 18
    plain = list(Batches(images, labels, batch_size=6, max_value=16).epoch())
    assert torch.cat([y for _, y in plain]).tolist() == list(range(20))
    assert plain[1][0][2, 0, 0, 0] == 8 / 16


def test_augmentation_against_loops() -> None:
    images = torch.randint(256, (30, 3, 5, 6), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    cropped = data.random_crop(images, 2, generator)
    offsets = torch.randint(5, (2, 30), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for k, (top, left) in enumerate(offsets.T.tolist()):
        assert torch.equal(cropped[k], padded[k, :, top : top + 5, left : left + 6])
    assert len(set(map(tuple, offsets.T.tolist()))) > 10
    flipped = data.random_flip(images, generator)
    mirrored = [torch.equal(flipped[k], images[k].flip(2)) for k in range(30)]
    kept = [torch.equal(flipped[k], images[k]) for k in range(30)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 5 < sum(mirrored) < 25


def test_validation_takes_its_share_of_every_class() -> None:
    digits = data.load("digits")
    rest, images, labels = digits.split_validation(0.25, seed=3)
    assert len(rest.train_labels) + len(labels) == len(digits.train_labels)
    share = labels.bincount() / digits.train_labels.bincount()
    assert share.min() > 0.24
    assert share.max() < 0.26
    assert images.shape[1:] == (1, 8, 8)
    assert torch.equal(rest.test_images, digits.test_images)
