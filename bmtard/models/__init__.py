"""The networks of the trainer. Inputs are images in [0, 1]; normalisation is inside the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard.extras import import_object, is_object_name

from .cnn import SmallCNN, StridedCNN
from .mobilenet import MobileNetV2
from .resnet import ResNet, cifar_resnet, preact_resnet, resnet, wide_resnet

__all__ = [
    "MODEL_NAMES",
    "MobileNetV2",
    "Normalize",
    "ResNet",
    "SmallCNN",
    "StridedCNN",
    "build_model",
    "build_network",
    "check_model_name",
]

# pattern of the name -> builder(numbers in the name, num_classes, in_channels)
_BUILDERS: dict[str, Callable[[list[int], int, int], nn.Module]] = {
    r"cnn-(\d+)": lambda n, classes, channels: SmallCNN(n[0], classes, channels),
    r"strided-cnn-(\d+)": lambda n, classes, channels: StridedCNN(n[0], classes, channels),
    r"resnet-(18|34|50)": lambda n, classes, channels: resnet(n[0], classes, channels),
    r"preact-resnet-(18|34)": lambda n, classes, channels: preact_resnet(n[0], classes, channels),
    r"preact-resnet-(18|34)-raw": lambda n, classes, channels: preact_resnet(
        n[0], classes, channels, raw_shortcut=True
    ),
    r"resnet-(20|32|44|56|110)": lambda n, classes, channels: cifar_resnet(n[0], classes, channels),
    r"wrn-(\d+)-(\d+)": lambda n, classes, channels: wide_resnet(n[0], n[1], classes, channels),
    r"dm-wrn-(\d+)-(\d+)": lambda n, classes, channels: wide_resnet(
        n[0], n[1], classes, channels, same_padding=True, activation=F.silu
    ),
    r"dm-wrn-(\d+)-(\d+)-relu": lambda n, classes, channels: wide_resnet(
        n[0], n[1], classes, channels, same_padding=True
    ),
    r"mobilenet-v2": lambda n, classes, channels: MobileNetV2(classes, channels),
}
MODEL_NAMES = (
    "cnn-WIDTH",
    "strided-cnn-WIDTH",
    "resnet-{18,34,50}",
    "preact-resnet-{18,34}[-raw]",
    "resnet-{20,32,44,56,110}",
    "wrn-DEPTH-WIDTH",
    "dm-wrn-DEPTH-WIDTH[-relu]",
    "mobilenet-v2",
    "package.module:function",
)
"""What :func:`build_model` knows. -raw: shortcuts of the raw input of a block, as in some published
PreActResNets. dm-wrn: DeepMind's wide residual network, with SiLU unless -relu. A function is
called with ``num_classes`` and returns the network."""


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
    if is_object_name(name):
        return lambda numbers, classes, channels: _call(name, classes), []
    raise ValueError(f"model must be one of {', '.join(MODEL_NAMES)}, got {name!r}")


def _call(name: str, num_classes: int) -> nn.Module:
    """The network that the function of that name makes."""
    function = import_object(name)
    try:
        inspect.signature(function).bind(num_classes=num_classes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"model {name}: it must be a function that can be called with num_classes alone: "
            f"{error}"
        ) from None
    network = function(num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"model {name}: it must return a torch.nn.Module, got {type(network).__name__}"
        )
    return network


def check_model_name(name: str) -> None:
    """Raises ValueError, listing the known names, if ``build_model`` would not know this one."""
    _find(name)


def build_network(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The named network for normalised images; see ``MODEL_NAMES``."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"model {name}: num_classes must be an int >= 1, got {num_classes!r}")
    builder, numbers = _find(name)
    return builder(numbers, num_classes, in_channels)


def build_model(
    name: str,
    *,
    num_classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Normalize:
    """The named network behind its normalisation, for ``len(mean)`` channels (1 without it)."""
    return Normalize(build_network(name, num_classes=num_classes, in_channels=len(mean)), mean, std)
