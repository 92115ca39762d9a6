"""The networks of the trainer. Inputs are images in [0, 1]; normalisation is inside the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .cnn import SmallCNN, StridedCNN
from .mobilenet import MobileNetV2
from .resnet import ResNet, cifar_resnet, preact_resnet18, resnet18, wide_resnet

__all__ = [
    "MODEL_NAMES",
    "MobileNetV2",
    "Normalize",
    "ResNet",
    "SmallCNN",
    "StridedCNN",
    "build_model",
    "check_model_name",
]

# pattern of the name -> builder(numbers in the name, num_classes, in_channels)
_BUILDERS: dict[str, Callable[[list[int], int, int], nn.Module]] = {
    r"cnn-(\d+)": lambda n, classes, channels: SmallCNN(n[0], classes, channels),
    r"strided-cnn-(\d+)": lambda n, classes, channels: StridedCNN(n[0], classes, channels),
    r"resnet-18": lambda n, classes, channels: resnet18(classes, channels),
    r"preact-resnet-18": lambda n, classes, channels: preact_resnet18(classes, channels),
    r"resnet-(20|32|44|56|110)": lambda n, classes, channels: cifar_resnet(n[0], classes, channels),
    r"wrn-(\d+)-(\d+)": lambda n, classes, channels: wide_resnet(n[0], n[1], classes, channels),
    r"mobilenet-v2": lambda n, classes, channels: MobileNetV2(classes, channels),
}
MODEL_NAMES = (
    "cnn-WIDTH",
    "strided-cnn-WIDTH",
    "resnet-18",
    "preact-resnet-18",
    "resnet-{20,32,44,56,110}",
    "wrn-DEPTH-WIDTH",
    "mobilenet-v2",
)


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, then the network: [N, c, h, w] to logits [N, C]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(
                f"Normalize: need one mean and one std > 0 a channel, got {mean}, {std}"
            )
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


def _find(name: str) -> tuple[Callable[[list[int], int, int], nn.Module], list[int]]:
    for pattern, builder in _BUILDERS.items():
        if match := re.fullmatch(pattern, name):
            return builder, [int(number) for number in match.groups()]
    raise ValueError(f"model must be one of {', '.join(MODEL_NAMES)}, got {name!r}")


def check_model_name(name: str) -> None:
    """Raises ValueError, listing the known names, if ``build_model`` would not know this one."""
    _find(name)


def build_model(
    name: str,
    *,
    num_classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Normalize:
    """The named network behind its normalisation, for images of ``len(mean)`` channels."""
    builder, numbers = _find(name)
    return Normalize(builder(numbers, num_classes, len(mean)), mean, std)
