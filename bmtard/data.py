"""Image classification data: uint8 tensors in memory, augmented a batch at a time.

Every loader returns :class:`ImageData` and downloads nothing. Files are looked for in the given
folder, or in the one that the environment variable ``BMTARD_DATA`` names.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmtard.extras import import_extra

DATA_VARIABLE = "BMTARD_DATA"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageData:
    """A data set in memory."""

    name: str
    train_images: Tensor
    """[N, c, h, w], uint8"""
    train_labels: Tensor
    """[N], int64"""
    test_images: Tensor
    """[M, c, h, w], uint8"""
    test_labels: Tensor
    """[M], int64"""
    num_classes: int
    max_value: int = 255
    """the pixel value that becomes 1.0"""

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images = getattr(self, f"{split}_images")
            labels = getattr(self, f"{split}_labels")
            if images.dtype != torch.uint8 or images.dim() != 4 or len(images) == 0:
                raise ValueError(
                    f"ImageData: {split}_images must be uint8 [N, c, h, w] with N > 0, "
                    f"got {images.dtype} {list(images.shape)}"
                )
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"ImageData: {split}_labels must be int64 [{len(images)}], "
                    f"got {labels.dtype} {list(labels.shape)}"
                )
            if labels.min() < 0 or labels.max() >= self.num_classes:
                raise ValueError(
                    f"ImageData: {split}_labels must be in [0, {self.num_classes - 1}], "
                    f"got [{labels.min()}, {labels.max()}]"
                )

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training images, in [0, 1] units."""
        values = torch.arange(256, dtype=torch.float64) / self.max_value
        mean, std = [], []
        for channel in self.train_images.unbind(1):
            share = channel.flatten().bincount(minlength=256).double() / channel.numel()
            mean.append(float(share @ values))
            std.append(float((share @ (values - mean[-1]).square()).sqrt().clamp(min=1e-3)))
        return mean, std

    def split_validation(self, fraction: float, seed: int) -> tuple[ImageData, Tensor, Tensor]:
        """Takes ``fraction`` of each class out of the training images.

        Returns the data that remain, and the validation images and labels.
        """
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(self.train_labels), dtype=torch.bool)
        for label in range(self.num_classes):
            members = (self.train_labels == label).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            held[members[: round(fraction * len(members))]] = True
        rest = replace(
            self, train_images=self.train_images[~held], train_labels=self.train_labels[~held]
        )
        return rest, self.train_images[held], self.train_labels[held]


class Batches:
    """Batches of one data split on a device: images [B, c, h, w] in [0, 1], labels [B].

    ``epoch(e)`` is a function of ``seed`` and ``e`` alone, so a resumed run sees the same batches
    as an uninterrupted one, on every device. With ``shuffle`` the last, incomplete batch is left
    out (unless it is the only one); without it every image comes once, in order.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        max_value: int = 255,
        shuffle: bool = False,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        """``crop_padding``: pixels of zero padding before a random crop; ``flip``: left-right."""
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be >= 1, got {batch_size}")
        self.device = torch.device(device)
        pin = self.device.type == "cuda"
        self.images = images.pin_memory() if pin else images
        self.labels = labels.pin_memory() if pin else labels
        self.batch_size = min(batch_size, len(images))
        self.max_value = max_value
        self.shuffle = shuffle
        self.crop_padding = crop_padding
        self.flip = flip
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        count = len(self.images) / self.batch_size
        return math.floor(count) if self.shuffle else math.ceil(count)

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        total = len(self.images)
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        for index in range(len(self)):
            rows = order[index * self.batch_size : (index + 1) * self.batch_size]
            images = self.images[rows].to(self.device, non_blocking=True)
            labels = self.labels[rows].to(self.device, non_blocking=True)
            if self.crop_padding:
                images = random_crop(images, self.crop_padding, generator)
            if self.flip:
                images = random_flip(images, generator)
            pixels = images.to(torch.float32).div_(self.max_value)
            yield pixels.contiguous(memory_format=self.memory_format), labels


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pads [B, c, h, w] with zeros and cuts a window of the old size, one offset an image."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    offsets = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    # Indices on both sides of the slice put the channels last.
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image of [B, c, h, w] left to right with probability 1/2."""
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


# ---- loaders ----


def load_digits(folder: Path | None = None) -> ImageData:
    """The 1,797 scanned 8x8 digits that come with scikit-learn; nothing is read from ``folder``.

    Two thirds of each class train, one third tests; the split is fixed. Pixels are 0 to 16.
    """
    datasets = import_extra("sklearn.datasets", "train")
    selection = import_extra("sklearn.model_selection", "train")
    digits = datasets.load_digits()
    train, test = selection.train_test_split(
        np.arange(len(digits.target)), test_size=1 / 3, stratify=digits.target, random_state=0
    )
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return ImageData(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        num_classes=10,
        max_value=16,
    )


def load_mnist(folder: Path) -> ImageData:
    """MNIST in its idx files, gzipped or not, in ``folder`` or a folder ``mnist`` in it."""
    arrays: dict[str, np.ndarray] = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, rank in (("images", 3), ("labels", 1)):
            name = f"{prefix}-{kind}-idx{rank}-ubyte"
            path = _find(
                folder, [f"{sub}{name}{end}" for sub in ("", "mnist/") for end in ("", ".gz")]
            )
            arrays[f"{split}_{kind}"] = _read_idx(path, rank)
    return ImageData(
        name="mnist",
        train_images=torch.from_numpy(arrays["train_images"]).unsqueeze(1),
        train_labels=torch.from_numpy(arrays["train_labels"].astype(np.int64)),
        test_images=torch.from_numpy(arrays["test_images"]).unsqueeze(1),
        test_labels=torch.from_numpy(arrays["test_labels"].astype(np.int64)),
        num_classes=10,
    )


def load_cifar10(folder: Path) -> ImageData:
    """CIFAR-10 from ``cifar-10-batches-bin``, ``cifar-10-batches-py`` or an npz of JPEG bytes."""
    place = _find(
        folder,
        ["cifar-10-batches-bin", "data_batch_1.bin", "cifar-10-batches-py", "data_batch_1"],
        patterns=["cifar10*.npz"],
    )
    if place.suffix == ".npz":
        return _load_jpeg_npz("cifar10", place, "test")
    place = place if place.is_dir() else place.parent
    end = ".bin" if (place / "data_batch_1.bin").exists() else ""
    read = _read_cifar_binary if end else _read_cifar_pickle
    train = [read(place / f"data_batch_{k}{end}", "labels") for k in range(1, 6)]
    return _cifar("cifar10", train, [read(place / f"test_batch{end}", "labels")], 10)


def load_cifar100(folder: Path) -> ImageData:
    """CIFAR-100 (fine labels) from ``cifar-100-binary`` or ``cifar-100-python``."""
    place = _find(folder, ["cifar-100-binary", "train.bin", "cifar-100-python", "train"])
    place = place if place.is_dir() else place.parent
    end = ".bin" if (place / "train.bin").exists() else ""
    read = _read_cifar_binary if end else _read_cifar_pickle
    parts = {s: [read(place / f"{s}{end}", "fine_labels")] for s in ("train", "test")}
    return _cifar("cifar100", parts["train"], parts["test"], 100)


def load_tiny_imagenet(folder: Path) -> ImageData:
    """Tiny-ImageNet from its folder ``tiny-imagenet-200`` or an npz of JPEG bytes.

    The labelled validation images are the test images, as usual for this data set.
    """
    place = _find(folder, ["tiny-imagenet-200", "wnids.txt"], patterns=["tinyimagenet*.npz"])
    if place.suffix == ".npz":
        return _load_jpeg_npz("tiny-imagenet", place, "val")
    place = place if place.is_dir() else place.parent
    names = sorted((place / "wnids.txt").read_text().split())
    label_of = {name: label for label, name in enumerate(names)}
    train: list[tuple[Path, int]] = []
    for name in names:
        files = sorted((place / "train" / name / "images").glob("*.JPEG"))
        if not files:
            raise FileNotFoundError(f"no *.JPEG in {place / 'train' / name / 'images'}")
        train += [(file, label_of[name]) for file in files]
    lines = _find(place, ["val/val_annotations.txt"]).read_text().splitlines()
    rows = [line.split("\t")[:2] for line in lines]
    test = [(place / "val" / "images" / file, label_of[name]) for file, name in rows]
    splits = {
        split: (_decode([file.read_bytes() for file, _ in items]), [label for _, label in items])
        for split, items in (("train", train), ("test", test))
    }
    return ImageData(
        name="tiny-imagenet",
        train_images=splits["train"][0],
        train_labels=torch.tensor(splits["train"][1]),
        test_images=splits["test"][0],
        test_labels=torch.tensor(splits["test"][1]),
        num_classes=len(names),
    )


LOADERS: dict[str, Callable[[Path], ImageData]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "tiny-imagenet": load_tiny_imagenet,
}


def load(name: str, folder: str | os.PathLike[str] | None = None) -> ImageData:
    """Loads a data set by name. ``folder``: where its files are; default ``$BMTARD_DATA``.

    Raises FileNotFoundError or ValueError naming the path and what was expected there.
    """
    if name not in LOADERS:
        raise ValueError(f"data set must be one of {', '.join(LOADERS)}, got {name!r}")
    folder = folder or os.environ.get(DATA_VARIABLE)
    if folder is None and name != "digits":
        raise FileNotFoundError(
            f"{name}: say where its files are, with --data-dir or the environment variable "
            f"{DATA_VARIABLE}"
        )
    path = Path(folder or ".").expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: the data folder {path} does not exist")
    return LOADERS[name](path)


# ---- file formats ----


def _find(folder: Path, names: list[str], patterns: list[str] | None = None) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    for pattern in patterns or []:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise FileNotFoundError(f"none of {', '.join(names + (patterns or []))} in {folder}")


def _read_bytes(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from None


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """An idx file of bytes: magic 0x0000 08 rank, the sizes as big-endian int32, the values."""
    raw = _read_bytes(path)
    header = 4 + 4 * rank
    if raw[:4] != bytes((0, 0, 8, rank)) or len(raw) < header:
        raise ValueError(f"{path} is not an idx file of bytes with {rank} dimensions")
    shape = np.frombuffer(raw, ">i4", rank, 4)
    if len(raw) != header + math.prod(shape.tolist()):
        raise ValueError(
            f"{path} is truncated: expected {header + math.prod(shape.tolist())} bytes for "
            f"{'x'.join(map(str, shape))}, got {len(raw)}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _read_cifar_binary(path: Path, labels: str) -> np.ndarray:
    """Records of label byte(s) and 3072 pixels; returns [N, 3073], the label first."""
    skipped = 1 if labels == "fine_labels" else 0  # the coarse label
    record = skipped + 1 + 3072
    raw = _read_bytes(path)
    if not raw or len(raw) % record:
        raise ValueError(
            f"{path} is truncated or no CIFAR binary file: expected a multiple of {record} bytes, "
            f"got {len(raw)}"
        )
    return np.frombuffer(raw, np.uint8).reshape(-1, record)[:, skipped:]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the CIFAR pickles and refuses every class that they do not need."""

    _allowed = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


def _read_cifar_pickle(path: Path, labels: str) -> np.ndarray:
    """A python batch; returns [N, 3073], the label first."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(_read_bytes(path)), encoding="latin1").load()
        pixels, target = np.asarray(batch["data"]), np.asarray(batch[labels])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a complete CIFAR python batch: {error!r}") from None
    if pixels.dtype != np.uint8 or pixels.shape != (len(target), 3072):
        raise ValueError(f"{path}: expected uint8 [{len(target)}, 3072], got {pixels.shape}")
    return np.concatenate([target[:, None].astype(np.uint8), pixels], 1)


def _cifar(
    name: str, train: list[np.ndarray], test: list[np.ndarray], num_classes: int
) -> ImageData:
    splits = [torch.from_numpy(np.concatenate(records)) for records in (train, test)]
    images = [records[:, 1:].reshape(-1, 3, 32, 32).contiguous() for records in splits]
    labels = [records[:, 0].long() for records in splits]
    return ImageData(
        name=name,
        train_images=images[0],
        train_labels=labels[0],
        test_images=images[1],
        test_labels=labels[1],
        num_classes=num_classes,
    )


def _load_jpeg_npz(name: str, path: Path, test: str) -> ImageData:
    """Keys SPLIT_jpeg (all files, concatenated), SPLIT_offset [N + 1], y_SPLIT; class_names."""
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            arrays = {key: archive[key] for key in archive.files}
        splits: dict[str, tuple[Tensor, Tensor]] = {}
        for split in ("train", test):
            joined, offset = arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offset"].tolist()
            files = [joined[a:b] for a, b in pairwise(offset)]
            labels = torch.from_numpy(arrays[f"y_{split}"].astype(np.int64))
            splits[split] = (_decode(files), labels)
        num_classes = len(arrays["class_names"])
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a complete npz of JPEG bytes: {error}") from None
    return ImageData(
        name=name,
        train_images=splits["train"][0],
        train_labels=splits["train"][1],
        test_images=splits[test][0],
        test_labels=splits[test][1],
        num_classes=num_classes,
    )


def _decode(files: list[bytes]) -> Tensor:
    """JPEG files of one size -> [N, 3, h, w]."""
    image = import_extra("PIL.Image", "train")
    pixels = [np.asarray(image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
