"""Residual networks for small images: a 3x3 stem, no max-pooling, a global average at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The shortcut of a basic or bottleneck block; empty where the shape stays."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """conv - norm - relu - conv - norm, added to the input (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with norms, a quarter as wide inside (He et al., CVPR 2016).

    The 3x3 convolution has the stride.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        hidden = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv3x3(hidden, hidden, stride)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = F.relu(self.norm2(self.conv2(out)))
        return F.relu(self.norm3(self.conv3(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """norm - activation - conv, twice (He et al., ECCV 2016).

    Where the shape changes, the shortcut is a convolution of the first activation, or with
    ``raw_shortcut`` of the input. ``same_padding``: a convolution of stride 2 pads below and on
    the right alone, as TensorFlow's "SAME" does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        raw_shortcut: bool = False,
        same_padding: bool = False,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.raw_shortcut = raw_shortcut
        self.one_sided = same_padding and stride == 2
        if self.one_sided:
            self.conv1.padding = (0, 0)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.norm1(x))
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(x if self.raw_shortcut else out)
        if self.one_sided:
            out = F.pad(out, (0, 1, 0, 1))
        return self.conv2(self.activation(self.norm2(self.conv1(out)))) + shortcut


class ResNet(nn.Module):
    """Stages of residual blocks; each stage after the first halves the image.

    block: from (channels in, channels out, stride). widths: channels of the stem, then of each
    stage. depths: blocks in each stage. preact: the norm is after the last block, not after the
    stem. last_norm: False leaves that norm and its activation out.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        num_classes: int,
        in_channels: int,
        *,
        preact: bool = False,
        last_norm: bool = True,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.depths = depths
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
        self.preact, self.ends_in_norm = preact, preact and last_norm
        self.last_norm = nn.BatchNorm2d(channels) if self.ends_in_norm else nn.Identity()
        self.activation = activation
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = self.stem(x)
        if not self.preact:
            out = self.activation(self.stem_norm(out))
        out = self.blocks(out)
        if self.ends_in_norm:
            out = self.activation(self.last_norm(out))
        return self.head(out.mean((2, 3)))


# blocks in each stage of the networks that have four stages
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def resnet(depth: int, num_classes: int, in_channels: int) -> ResNet:
    """ResNet-18 and 34 of basic blocks, ResNet-50 of bottlenecks."""
    bottleneck = depth == 50
    scale = 4 if bottleneck else 1
    widths = (64, *(scale * width for width in (64, 128, 256, 512)))
    block = Bottleneck if bottleneck else BasicBlock
    return ResNet(block, widths, DEPTHS[depth], num_classes, in_channels)


def preact_resnet(
    depth: int,
    num_classes: int,
    in_channels: int,
    *,
    raw_shortcut: bool = False,
    last_norm: bool = True,
) -> ResNet:
    """PreActResNet-18 and 34; for the options see :class:`PreActBlock` and :class:`ResNet`."""
    return ResNet(
        partial(PreActBlock, raw_shortcut=raw_shortcut),
        (64, 64, 128, 256, 512),
        DEPTHS[depth],
        num_classes,
        in_channels,
        preact=True,
        last_norm=last_norm,
    )


def cifar_resnet(depth: int, num_classes: int, in_channels: int) -> ResNet:
    """ResNet-20, 32, 44, 56, 110: depth = 6n + 2, widths 16, 32, 64."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"cifar_resnet: depth must be 6n + 2 with n >= 1, got {depth}")
    blocks = (depth - 2) // 6
    return ResNet(BasicBlock, (16, 16, 32, 64), (blocks,) * 3, num_classes, in_channels)


def wide_resnet(
    depth: int,
    width: int,
    num_classes: int,
    in_channels: int,
    *,
    same_padding: bool = False,
    activation: Callable[[Tensor], Tensor] = F.relu,
) -> ResNet:
    """WRN-depth-width: depth = 6n + 4 (Zagoruyko and Komodakis, BMVC 2016).

    DeepMind's variant (Gowal et al., arXiv 2010.03593) has ``same_padding`` and F.silu.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"wide_resnet: depth must be 6n + 4 with n >= 1, got {depth}")
    if width < 1:
        raise ValueError(f"wide_resnet: width must be >= 1, got {width}")
    return ResNet(
        partial(PreActBlock, same_padding=same_padding, activation=activation),
        (16, 16 * width, 32 * width, 64 * width),
        ((depth - 4) // 6,) * 3,
        num_classes,
        in_channels,
        preact=True,
        activation=activation,
    )
