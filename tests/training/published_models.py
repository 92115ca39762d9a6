"""The published architectures under their published layer names, written down a second time.

Only names, shapes and order of operations follow the sources, which each class names; nothing here
uses ``bmtard.models``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(a: int, b: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False)


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and running statistics for which every layer matters; eval mode, float32."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith(("running_var", "sigma", "std")):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.is_floating_point():
            scale = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.3
            shift = 1.0 if value.dim() == 1 and name.endswith("weight") else 0.0
            value.normal_(shift, scale, generator=generator)
    return network.eval()


class TradesBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), conv(a, b, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), conv(b, b, 3)
        self.convShortcut = None if a == b else conv(a, b, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(y)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(y))))


class TradesGroup(nn.Module):
    def __init__(self, count: int, a: int, b: int, stride: int) -> None:
        super().__init__()
        rest = [TradesBlock(b, b, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(TradesBlock(a, b, stride), *rest)


class TradesWideResNet(nn.Module):
    """yaodongyu/TRADES models/wideresnet.py, with the sub_block1 that it never calls."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        count = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = TradesGroup(count, 16, 16 * width, 1)
        self.sub_block1 = TradesGroup(count, 16, 16 * width, 1)
        self.block2 = TradesGroup(count, 16 * width, 32 * width, 2)
        self.block3 = TradesGroup(count, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for group in (self.block1, self.block2, self.block3):
            x = group.layer(x)
        return self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).flatten(1))


class DeepMindBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        self.batchnorm_0, self.relu_0 = nn.BatchNorm2d(a), activation
        self.conv_0 = nn.Conv2d(a, b, 3, stride, 0, bias=False)
        self.batchnorm_1, self.relu_1 = nn.BatchNorm2d(b), activation
        self.conv_1 = conv(b, b, 3)
        self.shortcut = nn.Conv2d(a, b, 1, stride, 0, bias=False) if a != b else None
        self.pads = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu_0(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        y = self.conv_0(F.pad(y, self.pads))
        return skip + self.conv_1(self.relu_1(self.batchnorm_1(y)))


class DeepMindGroup(nn.Module):
    def __init__(self, count: int, a: int, b: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        rest = [DeepMindBlock(b, b, 1, activation) for _ in range(count - 1)]
        self.block = nn.Sequential(DeepMindBlock(a, b, stride, activation), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DeepMindWideResNet(nn.Module):
    """RobustBench architectures/dm_wide_resnet.py: mean and std are buffers of the network."""

    def __init__(self, depth: int, width: int, classes: int, activation: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.register_buffer("std", torch.rand(3, 1, 1) + 0.5)
        count, w = (depth - 4) // 6, width
        self.init_conv = conv(3, 16, 3)
        self.layer = nn.Sequential(
            DeepMindGroup(count, 16, 16 * w, 1, activation),
            DeepMindGroup(count, 16 * w, 32 * w, 2, activation),
            DeepMindGroup(count, 32 * w, 64 * w, 2, activation),
        )
        self.batchnorm, self.relu = nn.BatchNorm2d(64 * w), activation
        self.logits = nn.Linear(64 * w, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.init_conv((x - self.mean) / self.std))
        return self.logits(F.avg_pool2d(self.relu(self.batchnorm(x)), 8).flatten(1))


class Basic(nn.Module):
    """Of pytorch-cifar (projection "shortcut") and of pytorch-cifar-models ("downsample")."""

    growth = 1

    def __init__(self, a: int, planes: int, stride: int, skip: str = "shortcut") -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(a, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.skip = skip
        if stride != 1 or a != planes:
            setattr(self, skip, nn.Sequential(conv(a, planes, 1, stride), nn.BatchNorm2d(planes)))
        else:
            setattr(self, skip, nn.Sequential())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + getattr(self, self.skip)(x))


class Bottle(nn.Module):
    growth = 4

    def __init__(self, a: int, planes: int, stride: int) -> None:
        super().__init__()
        b = 4 * planes
        self.conv1, self.bn1 = conv(a, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, b, 1), nn.BatchNorm2d(b)
        self.shortcut = nn.Sequential()
        if stride != 1 or a != b:
            self.shortcut = nn.Sequential(conv(a, b, 1, stride), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + self.shortcut(x))


class PreAct(nn.Module):
    growth = 1
    raw = False

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), conv(a, b, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), conv(b, b, 3)
        if stride != 1 or a != b:
            self.shortcut = nn.Sequential(conv(a, b, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        skip = self.shortcut(x if self.raw else y) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + skip


class RawPreAct(PreAct):
    """RobustBench's PreActBlock, of Wong2020Fast; its PreActBlockV2 is the other one."""

    raw = True


def stages(block: type, counts: list[int], a: int, planes: int, **options: str) -> list[nn.Module]:
    result: list[nn.Module] = []
    for stage, count in enumerate(counts):
        blocks = []
        for index in range(count):
            blocks.append(block(a, planes, 2 if stage and not index else 1, **options))
            a = planes * block.growth
        result.append(nn.Sequential(*blocks))
        planes *= 2
    return result


class PytorchCifarResNet(nn.Module):
    """kuangliu/pytorch-cifar models/resnet.py; RobustBench architectures/resnet.py is the same."""

    def __init__(self, block: type, counts: list[int], classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3), nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(block, counts, 64, 64)
        self.linear = nn.Linear(512 * block.growth, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class PytorchCifarPreActResNet(nn.Module):
    """kuangliu/pytorch-cifar models/preact_resnet.py; ``bn``: RobustBench's bn_before_fc."""

    def __init__(self, block: type, counts: list[int], classes: int, bn: bool) -> None:
        super().__init__()
        self.conv1 = conv(3, 64, 3)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(block, counts, 64, 64)
        if bn:
            self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if hasattr(self, "bn"):
            x = F.relu(self.bn(x))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class CifarModelsResNet(nn.Module):
    """chenyaofo/pytorch-cifar-models resnet.py."""

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        counts = [(depth - 2) // 6] * 3
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = stages(Basic, counts, 16, 16, skip="downsample")
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class MobileBlock(nn.Module):
    def __init__(self, a: int, b: int, expansion: int, stride: int) -> None:
        super().__init__()
        m, self.stride = a * expansion, stride
        self.conv1, self.bn1 = conv(a, m, 1), nn.BatchNorm2d(m)
        self.conv2, self.bn2 = conv(m, m, 3, stride, groups=m), nn.BatchNorm2d(m)
        self.conv3, self.bn3 = conv(m, b, 1), nn.BatchNorm2d(b)
        self.shortcut = nn.Sequential()
        if stride == 1 and a != b:
            self.shortcut = nn.Sequential(conv(a, b, 1), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return y if self.stride == 2 else y + self.shortcut(x)


class PytorchCifarMobileNetV2(nn.Module):
    """kuangliu/pytorch-cifar models/mobilenetv2.py."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 32, 3), nn.BatchNorm2d(32)
        blocks, a = [], 32
        for expansion, b, count, first in (
            (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for index in range(count):
                blocks.append(MobileBlock(a, b, expansion, 1 if index else first))
                a = b
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = conv(320, 1280, 1), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(F.relu(self.bn2(self.conv2(x))), 2).mean((2, 3)))


class Standardized(nn.Module):
    """RobustBench's models with buffers ``mu`` and ``sigma`` [1, 3, 1, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mu", torch.rand(1, 3, 1, 1))
        self.register_buffer("sigma", torch.rand(1, 3, 1, 1) + 0.5)
        self.model = network

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mu) / self.sigma)


class Normalization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("std", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]
