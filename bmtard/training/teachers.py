"""The teachers of a run: how they are named, loaded, and looked at before the first epoch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from bmtard._library import warn
from bmtard.data import ImageData
from bmtard.models import check_model_name
from bmtard.models.checkpoints import load_pretrained
from bmtard.training import checkpoint

Images = Literal["clean", "adversarial"]

_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_NUMBERS = rf"{_NUMBER}(?:,{_NUMBER})*"
_TEACHER = re.compile(
    r"(?P<role>[A-Za-z][\w-]*)=(?P<path>.+?)"
    r"(?::(?P<architecture>[\w-]+|[A-Za-z_][\w.]*:[A-Za-z_]\w*))??"
    rf"(?::(?P<normalization>none|data|{_NUMBERS}/{_NUMBERS}))?"
    r"(?:@(?P<images>clean|adversarial))?"
)


def default_images(role: str) -> Images:
    """What a teacher sees unless told otherwise: the clean one clean images."""
    return "clean" if role == "clean" else "adversarial"


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """One teacher of a configuration."""

    role: str
    path: Path
    architecture: str | None = None
    """of a checkpoint from elsewhere; a checkpoint of bmtard knows its own"""
    normalization: str | None = None
    """of a checkpoint from elsewhere: "none", "data" or "MEAN,.../STD,..."; default: that in the
    file, else none"""
    images: Images = "adversarial"
    """what it sees in mtard and bmtard"""

    def load(self, data: ImageData, data_name: str, device: torch.device) -> nn.Module:
        """The network, frozen, in eval mode. Raises FileNotFoundError or ValueError."""
        if self.architecture is None:
            network, state = checkpoint.load_network(self.path, device)
            config = state.get("config", {})
            trained = config.get("data")
            if self.role == "robust" and config.get("method") == "natural":
                warn(
                    f"teacher robust {self.path} was trained on clean images alone; are the "
                    "teachers swapped?",
                    UserWarning,
                )
            if trained != data_name:
                raise ValueError(
                    f"teacher {self.role} {self.path} was trained on {trained}, "
                    f"the student learns {data_name}"
                )
            return network
        channels = data.train_images.shape[1]
        mean: list[float] | None = None
        std: list[float] | None = None
        if self.normalization == "data":
            mean, std = data.statistics()
        elif self.normalization == "none":
            mean, std = [0.0] * channels, [1.0] * channels
        elif self.normalization is not None:
            mean, std = (
                [float(number) for number in part.split(",")]
                for part in self.normalization.split("/")
            )
        return load_pretrained(
            self.path,
            self.architecture,
            num_classes=data.num_classes,
            in_channels=channels,
            mean=mean,
            std=std,
        ).to(device)


def parse_teacher(text: str) -> Teacher:
    """``ROLE=PATH[:ARCHITECTURE[:NORMALIZATION]][@clean|@adversarial]``.

    Raises ValueError saying what of it is wrong.
    """
    match = _TEACHER.fullmatch(text)
    if match is None:
        raise ValueError(
            "teacher must be ROLE=PATH[:ARCHITECTURE[:NORMALIZATION]][@clean|@adversarial], "
            f"got {text!r}"
        )
    role, architecture = match["role"], match["architecture"]
    if match["normalization"] and not architecture:
        raise ValueError(f"teacher {role}: a normalisation comes after an architecture: {text!r}")
    if architecture:
        try:
            check_model_name(architecture)
        except ValueError as error:
            raise ValueError(f"teacher {role}: {error}") from None
    return Teacher(
        role=role,
        path=Path(match["path"]).expanduser(),  # no shell does it after "="
        architecture=architecture,
        normalization=match["normalization"],
        images=cast(Images, match["images"] or default_images(role)),
    )


def check_teacher(
    role: str,
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    batch_size: int = 64,
) -> float:
    """Raises ValueError if a teacher's answers to training images are not worth learning.

    That is: no finite logits [N, C] of these classes, probabilities instead of logits, or no more
    right answers than always naming the most frequent class would give (within three standard
    deviations). Returns its accuracy.

    images: [N, c, h, w] in [0, 1]; labels: [N].
    """
    with torch.no_grad():
        parts = [network(part) for part in images.split(batch_size)]
    wanted = f"teacher {role}: its output must be logits [N, {num_classes}]"
    if not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(f"{wanted}, got {type(parts[0]).__name__}")
    logits = torch.cat(parts).double()
    if logits.shape != (len(images), num_classes):
        raise ValueError(f"{wanted} of {num_classes} classes, got {list(parts[0].shape)}")
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{wanted}, got values that are not finite")
    if num_classes > 1 and bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"{wanted}, got probabilities: every row sums to 1; take the network without its "
            "softmax, or return the logarithms of the probabilities"
        )
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    chance = (labels.bincount().max() / len(labels)).item()
    if accuracy <= chance + 3 * (chance * (1 - chance) / len(labels)) ** 0.5:
        raise ValueError(
            f"teacher {role}: {100 * accuracy:.1f} % of {len(labels)} clean training images are "
            f"right, no more than guessing gives; a wrong normalisation, architecture or order of "
            "the classes?"
        )
    return accuracy


def sample(data: ImageData, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``count`` training images in [0, 1] and labels, evenly spread over the data."""
    total = len(data.train_labels)
    rows = torch.linspace(0, total - 1, min(count, total)).long()
    images = data.train_images[rows].to(device, torch.float32) / data.max_value
    return images, data.train_labels[rows].to(device)
