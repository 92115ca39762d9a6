"""The loaders on small files written here, on broken ones, and on real data where it is."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

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


class OldPickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote the official files: bytes are its strings, numpy is 1.x."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch[bytes] = dispatch[str] = save_string


def old_pickle(content: dict[str, object]) -> bytes:
    file = io.BytesIO()
    OldPickler(file, 2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write_cifar_pickles(folder: Path, dumps: Callable[[dict[str, object]], bytes]) -> np.ndarray:
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    batch = records(2, 10)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        content = {"data": batch[:, 1:], "labels": batch[:, 0].tolist(), "batch_label": name}
        (folder / "cifar-10-batches-py" / name).write_bytes(dumps(content))
    return batch


@pytest.mark.parametrize("dumps", [old_pickle, pickle.dumps])
def test_cifar_pickles(tmp_path: Path, dumps: Callable[[dict[str, object]], bytes]) -> None:
    batch = write_cifar_pickles(tmp_path, dumps)
    loaded = data.load("cifar10", tmp_path)
    check_images(loaded.test_images, batch[:, 1:])
    assert loaded.train_labels.tolist() == [0, 1] * 5


def test_cifar100_pickles(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    batch = records(3, 100)
    content = {"data": batch[:, 1:], "fine_labels": [7, 99, 0], "coarse_labels": [1, 2, 3]}
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(old_pickle(content))
    loaded = data.load("cifar100", tmp_path)
    check_images(loaded.train_images, batch[:, 1:])
    assert loaded.test_labels.tolist() == [7, 99, 0]


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


def write_mnist(folder: Path, end: str) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{end}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{end}", np.arange(5, dtype=np.uint8))
    return images


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_idx(tmp_path: Path, name: str, inside: str, end: str) -> None:
    images = write_mnist(tmp_path / inside, end)
    loaded = data.load(name, tmp_path)
    assert np.array_equal(loaded.train_images[:, 0].numpy(), images)
    assert (loaded.name, loaded.test_labels.tolist()) == (name, [0, 1, 2, 3, 4])


def test_mnist_is_not_taken_for_fashion(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data", "")
    with pytest.raises(FileNotFoundError, match=r"none of fashion-mnist/train-images"):
        data.load("fashion-mnist", tmp_path / "data")
    images = write_mnist(tmp_path / "fashion", ".gz")
    loaded = data.load("fashion-mnist", tmp_path / "fashion")
    assert np.array_equal(loaded.test_images[:, 0].numpy(), images)


def jpeg(gray: bool = False) -> bytes:
    pixels = RNG.integers(0, 256, (8, 8) if gray else (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "file", "test"),
    [
        ("cifar10", "cifar10_jpegq75.npz", "test"),
        ("cifar10", "cifar10.npz", "test"),
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
    np.savez(tmp_path / "cifar100.npz", nothing=np.zeros(1))  # another data set
    loaded = data.load(name, tmp_path)
    assert loaded.train_images.shape == (3, 3, 8, 8)
    assert (loaded.test_labels.tolist(), loaded.num_classes) == ([2, 0, 1], 3)
    expected = np.asarray(Image.open(io.BytesIO(files[0]))).transpose(2, 0, 1)
    assert np.array_equal(loaded.train_images[0].numpy(), expected)
    # Sorted labels are mixed, and the images with them.
    for split in ("train", test):
        content[f"y_{split}"] = np.array([0, 1, 2], np.uint8)
    np.savez(tmp_path / file, **content)
    loaded = data.load(name, tmp_path)
    assert loaded.train_labels.tolist() != [0, 1, 2]
    for image, label in zip(loaded.train_images, loaded.train_labels, strict=True):
        expected = np.asarray(Image.open(io.BytesIO(files[label])).convert("RGB"))
        assert np.array_equal(image.numpy(), expected.transpose(2, 0, 1))
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{file} is not a complete npz"):
        data.load(name, tmp_path)


def write_tiny_imagenet(root: Path) -> None:
    for name in ("n02", "n01"):
        (root / "train" / name / "images").mkdir(parents=True)
        for k in range(2):
            (root / "train" / name / "images" / f"{name}_{k}.JPEG").write_bytes(jpeg())
    (root / "val" / "images").mkdir(parents=True)
    (root / "val" / "images" / "val_0.JPEG").write_bytes(jpeg())
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t7\t7\n")
    (root / "wnids.txt").write_text("n02\nn01\n")


def test_tiny_imagenet_folder(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    loaded = data.load("tiny-imagenet", tmp_path)
    assert loaded.train_labels.tolist() == [0, 0, 1, 1]  # in the order of the names
    assert loaded.test_labels.tolist() == [1]
    annotations = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    for line in ("val_0.JPEG", "val_0.JPEG\tn03\t0", "../val_0.JPEG\tn01\t0", ""):
        annotations.write_text(f"val_0.JPEG\tn02\n{line}\n")
        with pytest.raises(ValueError, match=r"val_annotations.txt, line 2: need the name"):
            data.load("tiny-imagenet", tmp_path)


# ---- folders ----


def write_image(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder(tmp_path: Path, test: str) -> None:
    first, second, gray = (
        RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((6, 9, 3), (6, 9, 3), (6, 9))
    )
    write_image(tmp_path / "train" / "dog" / "a.png", first)
    write_image(tmp_path / "train" / "cat" / "deep" / "b.PPM", second)
    write_image(tmp_path / "train" / "cat" / "a.bmp", gray)
    write_image(tmp_path / test / "dog" / "c.tiff", second)
    write_image(tmp_path / test / "dog" / "c.webp", first, lossless=True)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "README").write_text("no class")
    for hidden in ("._a.png", ".ipynb_checkpoints/a.png"):  # of macOS and Jupyter
        write_image(tmp_path / "train" / "cat" / hidden, second[:3])
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / test / ".ipynb_checkpoints").mkdir()
    with pytest.warns(UserWarning, match=rf"{test} has no image of cat: the test says nothing"):
        loaded = data.load(f"folder:{tmp_path}")
    assert loaded.num_classes == 2
    assert sorted(loaded.train_labels.tolist()) == [0, 0, 1]
    images = loaded.train_images.permute(0, 2, 3, 1).numpy()
    for pixels, label in ((np.stack([gray] * 3, 2), 0), (second, 0), (first, 1)):  # cat, then dog
        (place,) = [k for k, image in enumerate(images) if np.array_equal(image, pixels)]
        assert loaded.train_labels[place] == label
    assert loaded.test_labels.tolist() == [1, 1]


def test_the_first_images_are_of_all_classes(tmp_path: Path) -> None:
    """Folders and data sets that are sorted by class are mixed, each image with its label."""
    for label in range(3):
        for k in range(20):
            pixels = np.full((2, 2, 3), 20 * label + k, np.uint8)
            for split in ("train", "test"):
                write_image(tmp_path / split / f"c{label}" / f"{k:02}.png", pixels)
    folder = data.load(f"folder:{tmp_path}")
    ordered = [(torch.full((3, 2, 2), k, dtype=torch.uint8), k // 20) for k in range(60)]
    for loaded in (folder, data.from_dataset(ordered, ordered)):
        assert loaded.train_labels[:20].bincount(minlength=3).min() >= 3
        assert torch.equal(loaded.train_images[:, 0, 0, 0] // 20, loaded.train_labels)
        assert torch.equal(loaded.train_labels, loaded.test_labels)
        assert sorted(loaded.train_images[:, 0, 0, 0].tolist()) == list(range(60))
    mixed = [ordered[0], ordered[40], ordered[20]]  # stays as it is
    assert data.from_dataset(mixed, mixed).train_labels.tolist() == [0, 2, 1]


def test_folders_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"folder:{tmp_path}"
    pixels = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)

    def fails(kind: type[Exception], problem: str) -> None:
        with pytest.raises(kind, match=problem) as error:
            data.load(name)
        assert "\n" not in str(error.value)

    with pytest.raises(FileNotFoundError, match=r"data folder .*nowhere does not exist"):
        data.load(f"folder:{tmp_path / 'nowhere'}")
    fails(FileNotFoundError, r"needs the folders train and test \(or val\)")
    (tmp_path / "train").mkdir()
    fails(FileNotFoundError, r"needs the folders train and test \(or val\)")
    (tmp_path / "test").mkdir()
    fails(FileNotFoundError, r"train needs one folder a class, and has none")
    (tmp_path / "train" / "a").mkdir()
    fails(FileNotFoundError, r"no image \(.jpg, .* in .*train/a")
    write_image(tmp_path / "train" / "a" / "1.png", pixels)
    fails(FileNotFoundError, r"no image \(.jpg, .* in .*test")
    write_image(tmp_path / "test" / "b" / "1.png", pixels)
    write_image(tmp_path / "test" / "a" / "1.png", pixels)
    fails(ValueError, r"test/b is no class of .*train")
    write_image(tmp_path / "train" / "b" / "2.png", pixels[:, :8])
    fails(ValueError, r"b/2.png is 8x6, the images before it 9x6: all must have one size")
    write_image(tmp_path / "train" / "b" / "2.png", pixels)
    write_image(tmp_path / "test" / "b" / "1.png", pixels[:5])
    fails(ValueError, r"test/b/1.png is 9x5, the images before it 9x6")
    file = tmp_path / "test" / "b" / "1.png"
    write_image(file, pixels[..., 0].astype(np.uint16))
    fails(ValueError, r"test/b/1.png: pixels must have 8 bits, got more \(mode I;16\)")
    write_image(file, pixels)
    assert len(data.load(name).test_labels) == 2
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    fails(ValueError, r"test/b/1.png is not a complete image")
    for content in (
        b"",
        b"no image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n",
        whole[:20],
    ):
        file.write_bytes(content)
        fails(ValueError, r"test/b/1.png is no")


# ---- data sets from Python ----


class Pairs(torch.utils.data.Dataset):
    def __init__(self, images: list[object], labels: list[object]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, object]:
        return self.images[index], self.labels[index]


def test_from_dataset() -> None:
    pixels = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    forms: dict[str, list[object]] = {
        "tensors": list(planes),
        "floats": [plane.float() / 255 for plane in planes],
        "a little off": [(plane / 255).double() * (1 - 1e-6) for plane in planes],
        "arrays": list(pixels),
        "pillow": [Image.fromarray(image) for image in pixels],
    }
    test = Pairs([planes[0]], [torch.tensor(2)])
    for name, images in forms.items():
        loaded = data.from_dataset(Pairs(images, [0, np.int64(2), 1, 0]), test, name=name)
        assert torch.equal(loaded.train_images, planes), name
        assert loaded.train_labels.tolist() == [0, 2, 1, 0]
        assert (loaded.test_labels.tolist(), loaded.num_classes) == ([2], 3)
    palette = Image.fromarray(pixels[0]).quantize(30)
    colours = data.from_dataset(Pairs([palette], [2]), test).train_images[0]
    assert np.array_equal(colours.permute(1, 2, 0).numpy(), np.asarray(palette.convert("RGB")))
    gray = data.from_dataset(Pairs([pixels[0, :, :, 0]], [0]), Pairs([planes[0, :1]], [0]))
    assert gray.train_images.shape == gray.test_images.shape == (1, 1, 6, 5)
    assert data.from_dataset(test, test, num_classes=9).num_classes == 9


@pytest.mark.parametrize(
    ("images", "labels", "problem"),
    [
        ([torch.rand(3, 4, 4)], [0], r"train\[0\]: floats must be whole 255ths"),
        (
            [torch.zeros(3, 4, 4) - 1],
            [0],
            r"train\[0\]: floats must be whole 255ths .* before Norm",
        ),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)], [0, 0], r"train\[1\]: all .* one size"),
        (
            [torch.zeros(3, 4, 4, dtype=torch.int64)],
            [0],
            r"must be uint8 or float, got torch.int64",
        ),
        ([torch.zeros(4)], [0], r"an image must be \[c, h, w\], got \[4\]"),
        (["picture"], [0], r"need a tensor, an array or an image"),
        ([torch.zeros(3, 4, 4)], ["cat"], r"train\[0\] must be an image and a whole label"),
        ([torch.zeros(3, 4, 4)], [1.7], r"train\[0\] must be an image and a whole label, got 1.7"),
        ([torch.zeros(3, 4, 4)], [math.inf], r"train\[0\] must be an image and a whole label"),
        ([torch.zeros(3, 4, 4)], [-1], r"train_labels must be in \[0, 0\], got \[-1, -1\]"),
        (
            [Image.fromarray(np.zeros((4, 4), np.uint16))],
            [0],
            r"train\[0\]: pixels must have 8 bits, got more \(mode I;16\)",
        ),
        ([], [], r"train is empty"),
    ],
)
def test_datasets_that_do_not_fit(images: list[object], labels: list[object], problem: str) -> None:
    good = Pairs([torch.zeros(3, 4, 4)], [0])
    with pytest.raises((ValueError, TypeError), match=problem):
        data.from_dataset(Pairs(images, labels), good)


def test_a_python_name_is_not_loaded() -> None:
    with pytest.raises(ValueError, match=r"python:mine is made in Python: give it as data"):
        data.load("python:mine")


def test_digits_need_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, "/nowhere")
    assert data.load("digits").name == "digits"


def test_batches_of_no_image() -> None:
    with pytest.raises(
        ValueError, match=r"Batches: images must be one or more, got \[0, 1, 2, 2\]"
    ):
        data.Batches(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0), batch_size=1)


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
    with pytest.raises(ValueError, match=r"data set must be one of .*folder:PATH.* got 'folder:'"):
        data.load("folder:")
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        write_idx(tmp_path / name, np.zeros((2, 2, 2) if "images" in name else 2, np.uint8))
    short = tmp_path / "train-images-idx3-ubyte"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is truncated: expected 24 bytes for 2x2x2, got 23"):
        data.load("mnist", tmp_path)


def every_prefix(path: Path, name: str, folder: Path) -> None:
    """Loading fails in one sentence whatever part of the file is left, and if bytes are turned."""
    whole = path.read_bytes()
    parts = [whole[: len(whole) * k // 23] for k in range(23)]
    turned = [
        whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        for at in range(0, len(whole), max(1, len(whole) // 40))
    ]
    for content in parts:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name}|must be") as error:
            data.load(name, folder)
        assert "\n" not in str(error.value)
    for content in turned:  # may still be an image
        path.write_bytes(content)
        try:
            data.load(name, folder)
        except ValueError as damage:
            assert "\n" not in str(damage)  # noqa: PT017
    path.write_bytes(whole)
    data.load(name, folder)


def test_damaged_files(tmp_path: Path) -> None:
    write_mnist(tmp_path / "m", ".gz")
    every_prefix(tmp_path / "m" / "train-images-idx3-ubyte.gz", "mnist", tmp_path / "m")
    write_mnist(tmp_path / "fashion", "")
    every_prefix(
        tmp_path / "fashion" / "t10k-labels-idx1-ubyte", "fashion-mnist", tmp_path / "fashion"
    )
    for name, dumps in (("old", old_pickle), ("new", pickle.dumps)):
        write_cifar_pickles(tmp_path / name, dumps)
        path = tmp_path / name / "cifar-10-batches-py" / "data_batch_2"
        every_prefix(path, "cifar10", tmp_path / name)
    write_tiny_imagenet(tmp_path / "t" / "tiny-imagenet-200")
    path = tmp_path / "t" / "tiny-imagenet-200" / "train" / "n01" / "images" / "n01_1.JPEG"
    every_prefix(path, "tiny-imagenet", tmp_path / "t")


def test_wrong_labels_and_sizes(tmp_path: Path) -> None:
    write_mnist(tmp_path, "")
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels, np.array([0, 1, 2, 3, 10], np.uint8))
    with pytest.raises(
        ValueError, match=r"mnist: .*train_labels must be in \[0, 9\], got \[0, 10\]"
    ):
        data.load("mnist", tmp_path)
    write_idx(labels, np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match=r"mnist: .*train_labels must be int64 \[5\]"):
        data.load("mnist", tmp_path)
    labels.write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, -1))
    with pytest.raises(ValueError, match=r"train-labels.* is truncated"):
        data.load("mnist", tmp_path)
    write_cifar_pickles(tmp_path, pickle.dumps)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    for content in (
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 256]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0.5, 1.0]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
        {"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.uint8)},
        [1, 2],
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"cifar10: .*data_batch_1"):
            data.load("cifar10", tmp_path)


def test_malicious_npz(tmp_path: Path) -> None:
    file = jpeg()
    good: dict[str, np.ndarray] = {"class_names": np.array(["a", "b"])}
    for split in ("train", "test"):
        good[f"{split}_jpeg"] = np.frombuffer(file, np.uint8)
        good[f"{split}_offset"] = np.array([0, len(file)])
        good[f"y_{split}"] = np.array([1], np.uint8)
    path = tmp_path / "cifar10_own.npz"
    np.savez(path, **good)
    assert data.load("cifar10", tmp_path).test_labels.tolist() == [1]

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    cases: list[tuple[dict[str, object], str]] = [
        ({"class_names": np.array([Harmful()], object)}, "is not a complete npz of JPEG bytes"),
        ({"train_offset": np.array([0, 10**9])}, "train_offset must be 2 ascending positions"),
        ({"train_offset": np.array([0, 5, 9])}, "train_offset must be 2 ascending positions"),
        ({"train_offset": np.array([9, 5])}, "train_offset must be 2 ascending positions"),
        ({"test_offset": np.array([0, 99])}, "image 0 of test is no"),
        (
            {"test_jpeg": np.frombuffer(jpeg(gray=True)[:-90] + bytes(600), np.uint8)},
            "image 0 of test",
        ),
    ]
    for change, problem in cases:
        np.savez(path, **(good | change))
        with pytest.raises(ValueError, match=rf"cifar10: .*cifar10_own.npz.*{problem}"):
            data.load("cifar10", tmp_path)
        assert not (tmp_path / "harm").exists()


# ---- real files ----


def real_folder() -> Path:
    folder = os.environ.get(data.DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{data.DATA_VARIABLE} is not set")
    return Path(folder)


def unpacked(pattern: str, target: Path) -> Path:
    """The content of the real archive of that name."""
    archives = sorted(real_folder().glob(pattern))
    if not archives:
        pytest.skip(f"no {pattern} in {data.DATA_VARIABLE}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(target, filter="data")
    return target


def check_real(loaded: data.ImageData, size: tuple[int, int, int]) -> None:
    assert loaded.train_images.shape[1:] == loaded.test_images.shape[1:] == size
    assert len(loaded.train_labels.unique()) == loaded.num_classes
    mean, std = loaded.statistics()
    assert all(0.1 < value < 0.9 for value in mean)
    assert all(0.1 < value < 0.5 for value in std)


def write_part(path: Path, folder: Path, test: str) -> None:
    """An npz of the first two images of each class of a real one, by the same name."""
    content = {}
    with np.load(path) as real:
        for split in ("train", test):
            labels, offset = real[f"y_{split}"], real[f"{split}_offset"]
            chosen = np.sort(
                np.concatenate([np.flatnonzero(labels == label)[:2] for label in np.unique(labels)])
            )
            joined = real[f"{split}_jpeg"]
            files = [joined[offset[index] : offset[index + 1]] for index in chosen]
            content[f"{split}_jpeg"] = np.concatenate(files)
            content[f"{split}_offset"] = np.cumsum([0, *map(len, files)])
            content[f"y_{split}"] = labels[chosen]
        content["class_names"] = real["class_names"]
    np.savez(folder / path.name, **content)


@pytest.mark.parametrize(
    ("name", "pattern", "test", "size"),
    [
        ("cifar10", "cifar10_*.npz", "test", (3, 32, 32)),
        ("tiny-imagenet", "tinyimagenet*.npz", "val", (3, 64, 64)),
    ],
)
def test_part_of_a_real_npz(
    tmp_path: Path, name: str, pattern: str, test: str, size: tuple[int, int, int]
) -> None:
    paths = sorted(real_folder().glob(pattern))
    if not paths:
        pytest.skip(f"no {pattern} in {data.DATA_VARIABLE}")
    write_part(paths[0], tmp_path, test)
    check_real(data.load(name, tmp_path), size)


@pytest.mark.parametrize(
    ("name", "pattern", "size"),
    [
        ("mnist", "mnist*.tar", (1, 28, 28)),
        ("cifar10", "cifar10_*.tar.xz", (3, 32, 32)),
        ("cifar100", "cifar100_*.tar.xz", (3, 32, 32)),
    ],
)
def test_real_archive(tmp_path: Path, name: str, pattern: str, size: tuple[int, int, int]) -> None:
    check_real(data.load(name, unpacked(pattern, tmp_path)), size)


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


@pytest.mark.parametrize("fits", [True, False])
def test_images_stay_where_they_fit(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, as though it were a GPU: 160 bytes of images fit in 640 free ones."""
    images, labels = torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10)
    monkeypatch.setattr(data, "_free_bytes", lambda device: 640 if fits else 639)
    batches = Batches(images, labels, batch_size=4, device="meta")
    assert batches.images.device.type == batches.labels.device.type == ("meta" if fits else "cpu")
    assert batches.images.dtype == torch.uint8


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
    for fraction in (0.001, 0.999):
        with pytest.raises(ValueError, match=r"validation_fraction\) must leave images on both"):
            digits.split_validation(fraction, seed=3)
