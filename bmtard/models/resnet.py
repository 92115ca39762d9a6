"""Residual networks for small images: a 3x3 stem, no max-pooling, a global average at the end."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """conv - norm - relu - conv - norm, added to the input (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """norm - relu - conv, twice (He et al., ECCV 2016).

    Where the shape changes, the shortcut starts after the first norm and relu.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.norm2(self.conv1(out)))) + shortcut


class ResNet(nn.Module):
    """Stages of basic or pre-activation blocks; each stage after the first halves the image.

    widths: channels of the stem, then of each stage. depth: blocks in each stage.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[PreActBlock],
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        preact = block is PreActBlock
        self.stem = conv3x3(in_channels, widths[0])
        self.stem_norm = nn.Identity() if preact else nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths[1:], depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.last_norm = nn.BatchNorm2d(channels) if preact else nn.Identity()
        self.preact = preact
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = self.stem(x)
        if not self.preact:
            out = F.relu(self.stem_norm(out))
        out = self.blocks(out)
        if self.preact:
            out = F.relu(self.last_norm(out))
        return self.head(out.mean((2, 3)))


def resnet18(num_classes: int, in_channels: int) -> ResNet:
    return ResNet(BasicBlock, (64, 64, 128, 256, 512), (2, 2, 2, 2), num_classes, in_channels)


def preact_resnet18(num_classes: int, in_channels: int) -> ResNet:
    return ResNet(PreActBlock, (64, 64, 128, 256, 512), (2, 2, 2, 2), num_classes, in_channels)


def cifar_resnet(depth: int, num_classes: int, in_channels: int) -> ResNet:
    """ResNet-20, 32, 44, 56, 110: depth = 6n + 2, widths 16, 32, 64."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"cifar_resnet: depth must be 6n + 2 with n >= 1, got {depth}")
    blocks = (depth - 2) // 6
    return ResNet(BasicBlock, (16, 16, 32, 64), (blocks,) * 3, num_classes, in_channels)


def wide_resnet(depth: int, width: int, num_classes: int, in_channels: int) -> ResNet:
    """WRN-depth-width: depth = 6n + 4 (Zagoruyko and Komodakis, BMVC 2016)."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"wide_resnet: depth must be 6n + 4 with n >= 1, got {depth}")
    if width < 1:
        raise ValueError(f"wide_resnet: width must be >= 1, got {width}")
    blocks = (depth - 4) // 6
    widths = (16, 16 * width, 32 * width, 64 * width)
    return ResNet(PreActBlock, widths, (blocks,) * 3, num_classes, in_channels)
