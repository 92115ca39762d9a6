"""Small convolutional networks, for a CPU."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3x3 convolutions of ``width``, ``2 width``, ``2 width`` channels, each with batch norm.

    The second and third halve the image; the 2x2 average at the end keeps a coarse position.
    """

    def __init__(self, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"SmallCNN: width must be >= 1, got {width}")
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            channels = out_channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(4 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class StridedCNN(nn.Module):
    """Three convolutions of ``width``, ``2 width``, ``4 width`` channels, each with batch norm.

    Each halves the image. So most of the arithmetic works on small images with many channels: a
    step on a CPU takes as long as that of a :class:`SmallCNN` with a sixth of the parameters.
    """

    def __init__(self, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"StridedCNN: width must be >= 1, got {width}")
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels, kernel in ((width, 4), (2 * width, 3), (4 * width, 3)):
            layers += [
                nn.Conv2d(channels, out_channels, kernel, 2, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            channels = out_channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(4 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
