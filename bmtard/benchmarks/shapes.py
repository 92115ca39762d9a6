"""The named shapes, and how logits are drawn."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .spec import Op, Shape, Spec

LOGITS = {
    "digits": (1797, 10),
    "cifar10": (128, 10),
    "cifar100": (128, 100),
    "tiny-imagenet": (128, 200),
    "imagenet": (1024, 1000),
    "imagenet21k": (256, 21841),
    "llm32k": (256, 32000),
    "llm128k": (64, 128256),
}
LOGITS_CUDA = {
    "imagenet21k": (2048, 21841),
    "llm32k": (8192, 32000),
    "llm128k": (2048, 128256),
}
IMAGES = {
    "cifar10": (128, 3, 32, 32),
    "tiny-imagenet": (128, 3, 64, 64),
    "imagenet": (32, 3, 224, 224),
}
IMAGES_CUDA = {"imagenet": (1024, 3, 224, 224)}

# Dense enough that a cliff between two points shows; the neighbours of vector widths and of the
# block sizes of softmax kernels are among them.
SWEEP_N = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SWEEP_C = (
    2, 4, 8, 10, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 200, 256, 257, 512, 1000, 1024, 1025,
    2048, 4096, 8192, 16384, 16385, 32000,
)  # fmt: skip
SWEEP_K = (1, 2, 3, 4, 6, 8, 12, 16)
SWEEP_BASE = {"N": (0, 200), "C": (128, 0), "K": (128, 200)}


class LogitsOp(Op):
    """An op on logits [N, C]."""

    tensors: ClassVar[int] = 1
    """Tensors [N, C] that it reads, for each teacher."""
    quick: ClassVar[tuple[str, ...]] = ("imagenet",)
    default: ClassVar[tuple[str, ...]] = tuple(
        name for name in LOGITS if name not in ("digits", "llm128k")
    )

    def shapes(self, preset: str, device: torch.device) -> list[Shape]:
        table = {**LOGITS, **(LOGITS_CUDA if device.type == "cuda" else {})}
        names = {"quick": self.quick, "default": self.default}.get(preset, tuple(table))
        return [Shape(name=name, dims=table[name]) for name in names]

    def count(self, shape: Shape) -> int:
        """Numbers read."""
        rows, classes = shape.dims
        return rows * classes * self.tensors * (shape.teachers if self.tensors > 1 else 1)

    def memory(self, spec: Spec) -> int:
        # Inputs and gradients, eager's float32 temporaries, the oracle's float64 gradient.
        return self.count(spec.shape) * (2 * spec.dtype.itemsize + 6 * 4 + 8)


class ImagesOp(Op):
    """An op on images [N, channels, height, width]."""

    rank = 4

    def shapes(self, preset: str, device: torch.device) -> list[Shape]:
        table = {**IMAGES, **(IMAGES_CUDA if device.type == "cuda" else {})}
        names = ("cifar10",) if preset == "quick" else tuple(table)
        return [Shape(name=name, dims=table[name], teachers=0) for name in names]


def sweep_shapes(op: Op) -> list[Shape]:
    """The scaling sweep of an op along each of its axes."""
    found = []
    for axis, values in (("N", SWEEP_N), ("C", SWEEP_C), ("K", SWEEP_K)):
        if axis in op.sweeps:
            for value in values:
                rows, classes = SWEEP_BASE[axis]
                found.append(
                    Shape(
                        name=f"sweep-{axis}",
                        dims=(rows or value, classes or value),
                        teachers=value if axis == "K" else 2,
                        sweep=axis,
                    )
                )
    return found


def draw(spec: Spec, seed: int, scale: float) -> Tensor:
    """Normal numbers of the spec's shape, dtype and device."""
    generator = torch.Generator(device=spec.device).manual_seed(seed)
    numbers = torch.randn(
        spec.shape.dims, generator=generator, device=spec.device, dtype=torch.float32
    )
    return numbers.mul_(scale).to(spec.dtype)


def draw_pairs(spec: Spec, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """K students that require grad, and K teachers of unlike sharpness."""
    count = spec.shape.teachers
    students = [draw(spec, 1000 * seed + k, 1.0).requires_grad_() for k in range(count)]
    sharpness = [3.0 - 2.0 * k / max(count - 1, 1) for k in range(count)]
    teachers = [draw(spec, 1000 * seed + 500 + k, sharpness[k]) for k in range(count)]
    return students, teachers
