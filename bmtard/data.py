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
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bmtard._library import warn
from bmtard.extras import import_extra
from bmtard.types import WHOLE, Share

DATA_VARIABLE = "BMTARD_DATA"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF")


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

        Returns the data that remain, and the validation images and labels. Raises ValueError where
        either would be none.
        """
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(self.train_labels), dtype=torch.bool)
        for label in range(self.num_classes):
            members = (self.train_labels == label).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            held[members[: round(fraction * len(members))]] = True
        if not 0 < held.sum() < len(held):
            raise ValueError(
                f"split_validation: fraction (validation_fraction) must leave images on both "
                f"sides, got {fraction}, which takes {held.sum()} of {len(held)}"
            )
        rest = replace(
            self, train_images=self.train_images[~held], train_labels=self.train_labels[~held]
        )
        return rest, self.train_images[held], self.train_labels[held]


class Batches:
    """Batches of one data split on a device: images [B, c, h, w] in [0, 1], labels [B].

    ``epoch(e)`` is a function of ``seed`` and ``e`` alone, so a resumed run sees the same batches
    as an uninterrupted one, on every device. With ``shuffle`` the last, incomplete batch is left
    out (unless it is the only one); without it every image comes once, in order.

    A GPU holds all the images, as uint8, if they take at most a quarter of its free memory; else
    they stay in pinned host memory and are copied a batch at a time.
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
        share: Share = WHOLE,
    ) -> None:
        """``crop_padding``: pixels of zero padding before a random crop; ``flip``: left-right.

        ``share``: only this part of each batch, as it is in the whole one; with ``shuffle``.
        """
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be >= 1, got {batch_size}")
        if not len(images):
            raise ValueError(f"Batches: images must be one or more, got {list(images.shape)}")
        self.device = torch.device(device)
        if images.nbytes <= _free_bytes(self.device) // 4:
            images, labels = images.to(self.device), labels.to(self.device)
        elif self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        self.images, self.labels = images, labels
        self.batch_size = min(batch_size, len(images))
        if self.batch_size % share.count:
            raise ValueError(
                f"Batches: batch_size must be a multiple of the {share.count} processes, "
                f"got {self.batch_size}"
            )
        self.share = share
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
        order = order.to(self.images.device)
        for index in range(len(self)):
            rows = order[index * self.batch_size : (index + 1) * self.batch_size]
            rows = rows[self.share.rows(len(rows))]
            images = self.images[rows].to(self.device, non_blocking=True)
            labels = self.labels[rows].to(self.device, non_blocking=True)
            if self.crop_padding:
                images = random_crop(images, self.crop_padding, generator, self.share)
            if self.flip:
                images = random_flip(images, generator, self.share)
            pixels = images.to(torch.float32).div_(self.max_value)
            yield pixels.contiguous(memory_format=self.memory_format), labels


def _free_bytes(device: torch.device) -> int:
    """Of a GPU; 0 where images are not moved."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def random_crop(
    images: Tensor, padding: int, generator: torch.Generator, share: Share = WHOLE
) -> Tensor:
    """Pads [B, c, h, w] with zeros and cuts a window of the old size, one offset an image.

    ``share``: which part of a batch they are; the offsets of the whole batch are drawn.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    total = share.count * count
    offsets = torch.randint(2 * padding + 1, (2, total), generator=generator)
    offsets = offsets[:, share.rows(total)].to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    # Indices on both sides of the slice put the channels last.
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator, share: Share = WHOLE) -> Tensor:
    """Mirrors each image of [B, c, h, w] left to right with probability 1/2; as random_crop."""
    total = share.count * len(images)
    mirrored = (torch.rand(total, generator=generator) < 0.5)[share.rows(total)].to(images.device)
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
    """MNIST in its idx files, gzipped or not, in ``folder``, ``mnist`` or ``MNIST/raw`` in it."""
    return _load_idx("mnist", folder, ("", "mnist/", "MNIST/raw/"))


def load_fashion_mnist(folder: Path) -> ImageData:
    """Fashion-MNIST, whose files are named as those of MNIST, gzipped or not.

    They are in ``fashion-mnist`` or ``FashionMNIST/raw`` in ``folder``; in ``folder`` itself only
    if its path ends in such a name, because MNIST would be mistaken for it.
    """
    places = ["fashion-mnist/", "FashionMNIST/raw/"]
    if any("fashion" in part.lower() for part in folder.resolve().parts[-2:]):
        places.append("")
    return _load_idx("fashion-mnist", folder, places)


def _load_idx(name: str, folder: Path, places: Iterable[str]) -> ImageData:
    arrays: dict[str, np.ndarray] = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, rank in (("images", 3), ("labels", 1)):
            file = f"{prefix}-{kind}-idx{rank}-ubyte"
            names = [f"{place}{file}{end}" for place in places for end in ("", ".gz")]
            arrays[f"{split}_{kind}"] = _read_idx(_find(folder, names), rank)
    return ImageData(
        name=name,
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
        patterns=["cifar10.npz", "cifar10[!0]*.npz"],
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
    annotations = _find(place, ["val/val_annotations.txt"])
    test: list[tuple[Path, int]] = []
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        file, name = [*line.split("\t"), "", ""][:2]
        if name not in label_of or Path(file).name != file:
            raise ValueError(
                f"{annotations}, line {number}: need the name of an image and of a class in "
                f"wnids.txt, got {line!r}"
            )
        test.append((place / "val" / "images" / file, label_of[name]))
    return _image_files("tiny-imagenet", train, test, len(names))


def load_folder(folder: Path) -> ImageData:
    """Images of one size in ``train/CLASS/`` and ``test/CLASS/`` (or ``val/CLASS/``), read as RGB.

    The classes are numbered in the order of their names, and every one has training images. The
    order of the images mixes the classes, and is always the same. Hidden files and folders, whose
    names begin with a dot, are passed over.
    """
    train = folder / "train"
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if test is None or not train.is_dir():
        raise FileNotFoundError(
            f"{folder} needs the folders train and test (or val), each with one folder a class"
        )
    names = _class_names(train)
    if not names:
        raise FileNotFoundError(f"{train} needs one folder a class, and has none")
    if strange := sorted(set(_class_names(test)) - set(names)):
        raise ValueError(f"{test / strange[0]} is no class of {train}")
    splits: list[list[tuple[Path, int]]] = []
    for place in (train, test):
        items: list[tuple[Path, int]] = []
        for label, name in enumerate(names):
            inside = (file.relative_to(place / name) for file in (place / name).rglob("*"))
            found = sorted(place / name / file for file in inside if _is_image(file))
            if place == train and not found:
                raise FileNotFoundError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {place / name}")
            items += [(file, label) for file in found]
        if not items:
            raise FileNotFoundError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {place}")
        if unseen := set(range(len(names))) - {label for _, label in items}:
            missing = ", ".join(names[label] for label in sorted(unseen))
            warn(f"{place} has no image of {missing}: the test says nothing of that", UserWarning)
        splits.append(items)
    return _image_files(f"folder:{folder}", splits[0], splits[1], len(names))


def _class_names(place: Path) -> list[str]:
    """The folders in ``place``, without hidden ones such as .ipynb_checkpoints."""
    return sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: Path) -> bool:
    """By its name, in a class. Hidden ones are none: macOS leaves ._1.png beside 1.png."""
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _mixing(labels: Tensor) -> Tensor:
    """An order of images with these labels [N]: their own, or a fixed random one if it is sorted.

    A limit takes the first images, which shall be of all classes.
    """
    if bool((labels[1:] < labels[:-1]).any()):
        return torch.arange(len(labels))
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))


# Labels [N], and what gives name and content of an image file by its place among them.
_Split = tuple[Tensor, Callable[[int], tuple[str, bytes]]]


def _image_files(
    name: str, train: list[tuple[Path, int]], test: list[tuple[Path, int]], num_classes: int
) -> ImageData:
    """Data of image files and their labels."""

    def split(items: list[tuple[Path, int]]) -> _Split:
        labels = torch.tensor([label for _, label in items])
        return labels, lambda index: (str(items[index][0]), _read_bytes(items[index][0]))

    return _decoded(name, split(train), split(test), num_classes)


def from_dataset(
    train: Dataset[Any],
    test: Dataset[Any],
    *,
    name: str = "dataset",
    num_classes: int | None = None,
) -> ImageData:
    """Reads two data sets of (image, label) pairs into memory, once: give them no augmentation.

    An image is a uint8 or float tensor [c, h, w], an array [h, w] or [h, w, c], or of Pillow; all
    of one size. Floats are whole 255ths in [0, 1], as torchvision's ToTensor makes them.
    num_classes: default: the highest label + 1. The result is for ``train(config, data=...)`` with
    ``data="python:NAME"`` in the configuration.

    Raises ValueError or TypeError naming the split and the index.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for split, dataset in (("train", train), ("test", test)):
        pixels: list[Tensor] = []
        targets: list[int] = []
        for index in range(len(dataset)):  # type: ignore[arg-type]
            where = f"from_dataset: {split}[{index}]"
            try:
                image, label = dataset[index]
                targets.append(int(label))
            except (TypeError, ValueError, OverflowError) as error:
                raise TypeError(f"{where} must be an image and a whole label: {error}") from None
            if not isinstance(label, str) and targets[-1] != label:
                raise ValueError(f"{where} must be an image and a whole label, got {label}")
            pixels.append(_to_uint8(image, where))
            first = images[0][0] if images else pixels[0]
            if pixels[-1].shape != first.shape:
                raise ValueError(
                    f"{where}: all images must have one size, {list(first.shape)}, "
                    f"got {list(pixels[-1].shape)}"
                )
        if not pixels:
            raise ValueError(f"from_dataset: {split} is empty")
        given = torch.tensor(targets)
        order = _mixing(given)
        images.append(torch.stack([pixels[index] for index in order.tolist()]))
        labels.append(given[order])
    return ImageData(
        name=name,
        train_images=images[0],
        train_labels=labels[0],
        test_images=images[1],
        test_labels=labels[1],
        num_classes=int(torch.cat(labels).max()) + 1 if num_classes is None else num_classes,
    )


def _check_depth(mode: str, where: str) -> None:
    """Raises ValueError for a mode of Pillow with more bits, which it would cut off at 255."""
    if mode.startswith(("I", "F")):
        raise ValueError(f"{where}: pixels must have 8 bits, got more (mode {mode}); scale them")


def _to_uint8(image: Any, where: str) -> Tensor:
    """Any image of :func:`from_dataset` -> uint8 [c, h, w]."""
    if not isinstance(image, Tensor):
        mode = getattr(image, "mode", "RGB")
        if mode not in ("L", "RGB"):  # of Pillow: palettes, alpha, bits
            _check_depth(mode, where)
            image = image.convert("RGB")
        array = np.asarray(image)
        if array.dtype.kind not in "uif" or array.ndim not in (2, 3):
            raise TypeError(f"{where}: need a tensor, an array or an image, got {type(image)}")
        image = torch.from_numpy(array.copy())
        image = image.permute(2, 0, 1) if image.dim() == 3 else image
    if image.dim() == 2:
        image = image.unsqueeze(0)
    if image.dim() != 3:
        raise ValueError(f"{where}: an image must be [c, h, w], got {list(image.shape)}")
    if image.is_floating_point():
        scaled = 255 * image.double()
        whole = scaled.round()
        if bool(((scaled - whole).abs() > 1e-2).any() or (whole != whole.clamp(0, 255)).any()):
            raise ValueError(
                f"{where}: floats must be whole 255ths in [0, 1], got [{image.min():.4g}, "
                f"{image.max():.4g}]; take the images as they are before Normalize"
            )
        image = whole.to(torch.uint8)
    if image.dtype != torch.uint8:
        raise TypeError(f"{where}: an image must be uint8 or float, got {image.dtype}")
    return image.contiguous()


LOADERS: dict[str, Callable[[Path], ImageData]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "tiny-imagenet": load_tiny_imagenet,
}
DATA_NAMES = (*LOADERS, "folder:PATH", "python:NAME")
"""What a configuration may name: see :func:`load_folder` and :func:`from_dataset`."""


def check_data_name(name: str) -> None:
    """Raises ValueError, listing the known names, unless ``name`` is one of ``DATA_NAMES``."""
    kind, _, rest = name.partition(":")
    if name not in LOADERS and not (kind in ("folder", "python") and rest):
        raise ValueError(f"data set must be one of {', '.join(DATA_NAMES)}, got {name!r}")


def load(name: str, folder: str | os.PathLike[str] | None = None) -> ImageData:
    """Loads a data set by name. ``folder``: where its files are; default ``$BMTARD_DATA``.

    Raises FileNotFoundError or ValueError naming the path and what was expected there.
    """
    check_data_name(name)
    kind, _, rest = name.partition(":")
    if kind == "python":
        raise ValueError(f"{name} is made in Python: give it as data; see bmtard.data.from_dataset")
    loader = load_folder if kind == "folder" else LOADERS[name]
    folder = rest or folder or os.environ.get(DATA_VARIABLE)
    if folder is None and name != "digits":
        raise FileNotFoundError(
            f"{name}: say where its files are, with --data-dir or the environment variable "
            f"{DATA_VARIABLE}"
        )
    path = Path(folder or ".").expanduser()
    if name != "digits" and not path.is_dir():  # they come with scikit-learn
        raise FileNotFoundError(f"{name}: the data folder {path} does not exist")
    try:
        return loader(path)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error


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
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from None


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """An idx file of bytes: magic 0x0000 08 rank, the sizes as big-endian int32, the values."""
    raw = _read_bytes(path)
    header = 4 + 4 * rank
    if raw[:4] != bytes((0, 0, 8, rank)) or len(raw) < header:
        raise ValueError(f"{path} is not an idx file of bytes with {rank} dimensions")
    shape = np.frombuffer(raw, ">u4", rank, 4)
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
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise many kinds
        raise ValueError(f"{path} is not a complete CIFAR python batch: {error!r}") from None
    if pixels.dtype != np.uint8 or pixels.shape != (target.size, 3072):
        raise ValueError(
            f"{path}: expected uint8 [{target.size}, 3072], got {pixels.dtype} {pixels.shape}"
        )
    if (
        target.dtype.kind not in "iu"
        or not 0 <= target.min(initial=0) <= target.max(initial=0) < 256
    ):
        raise ValueError(f"{path}: labels must be whole numbers from 0 to 255")
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
        num_classes = len(arrays["class_names"])
        parts = [
            (split, arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offset"].tolist())
            for split in ("train", test)
        ]
        labels = [torch.from_numpy(arrays[f"y_{split}"].astype(np.int64)) for split, *_ in parts]
    except Exception as error:  # damaged archives raise many kinds
        raise ValueError(f"{path} is not a complete npz of JPEG bytes: {error!r}") from None

    def checked(split: str, joined: bytes, offset: list[int], target: Tensor) -> _Split:
        if len(offset) != len(target) + 1 or offset != sorted(offset) or offset[-1] > len(joined):
            raise ValueError(
                f"{path}: {split}_offset must be {len(target) + 1} ascending positions in the "
                f"{len(joined)} bytes of {split}_jpeg"
            )
        return target, lambda index: (
            f"{path}, image {index} of {split}",
            joined[offset[index] : offset[index + 1]],
        )

    train, held = (checked(*part, target) for part, target in zip(parts, labels, strict=True))
    return _decoded(name, train, held, num_classes)


def _decoded(name: str, train: _Split, test: _Split, num_classes: int) -> ImageData:
    """Data of two splits of image files, each in its mixed order."""
    size: tuple[int, int] | None = None
    images: list[Tensor] = []
    mixed: list[Tensor] = []
    for labels, read in (train, test):
        order = _mixing(labels)
        images.append(_decode(len(labels), (read(index) for index in order.tolist()), size))
        mixed.append(labels[order])
        size = (images[0].shape[3], images[0].shape[2])
    return ImageData(
        name=name,
        train_images=images[0],
        train_labels=mixed[0],
        test_images=images[1],
        test_labels=mixed[1],
        num_classes=num_classes,
    )


def _decode(
    count: int, files: Iterable[tuple[str, bytes]], size: tuple[int, int] | None = None
) -> Tensor:
    """``count`` names and contents of image files of one size (w, h) -> [N, 3, h, w]."""
    image = import_extra("PIL.Image", "train")
    pixels = np.empty((count, 0, 0, 3), np.uint8)
    for index, (name, content) in enumerate(files):
        try:
            # Formats are named because Pillow would run other programs for some.
            with image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as opened:
                size = size or opened.size
                found, mode = opened.size, opened.mode
                if found == size:
                    if index == 0:
                        pixels = np.empty((count, size[1], size[0], 3), np.uint8)
                    pixels[index] = np.asarray(opened.convert("RGB"))
        except image.UnidentifiedImageError:
            raise ValueError(f"{name} is no image of {', '.join(IMAGE_FORMATS)}") from None
        except Exception as error:  # damaged images raise many kinds
            raise ValueError(f"{name} is not a complete image: {error}") from None
        _check_depth(mode, name)
        if found != size:
            raise ValueError(
                f"{name} is {found[0]}x{found[1]}, the images before it {size[0]}x{size[1]}: "
                "all must have one size"
            )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
