"""What is measured: shapes, ops, and the providers that compete on them.

An op is one file in ``ops/``, a provider one file in ``providers/``; ``catalogue()`` finds both.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both", "step")
PRESETS = ("quick", "default", "full")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    dims: tuple[int, ...]
    """[N, C] of logits, or [N, channels, height, width] of images."""
    teachers: int = 2
    """K, where the op has teachers."""
    sweep: str = ""
    """The axis that a scaling sweep varies: "N", "C" or "K"."""

    def __str__(self) -> str:
        return "x".join(map(str, self.dims))


@dataclass(frozen=True, kw_only=True)
class Spec:
    shape: Shape
    dtype: torch.dtype
    device: torch.device


@dataclass(kw_only=True)
class Inputs:
    """Base of the inputs of an op."""

    leaves: tuple[Tensor, ...] = ()
    """The tensors whose gradients are taken."""
    upstream: tuple[Tensor, ...] = ()
    """The gradients of a loss by the first outputs; the other outputs are not differentiated."""

    def tensors(self) -> list[Tensor]:
        """Every tensor among the fields."""
        found: list[Tensor] = []
        for value in vars(self).values():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, Tensor) and all(item is not other for other in found):
                    found.append(item)
        return found


Outputs = tuple[Any, ...]
"""Tensors; those that are not differentiated may be lists of numbers on the host."""
Function = Callable[[Any], Outputs]
"""One implementation of an op: its inputs to its outputs. May keep state between calls."""


class Op(ABC):
    """One op: what it gets, what is right, and what it costs at least."""

    name: ClassVar[str]
    passes: ClassVar[tuple[str, ...]] = ("forward",)
    rank: ClassVar[int] = 2
    """Dimensions of a shape."""
    sweeps: ClassVar[str] = ""
    """Axes of the scaling sweep, e.g. "NC"."""
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)
    presets: ClassVar[tuple[str, ...]] = PRESETS
    """Where it runs without being named by --op."""
    capturable: ClassVar[bool] = True
    """Whether a CUDA graph of it makes sense."""

    @abstractmethod
    def shapes(self, preset: str, device: torch.device) -> list[Shape]: ...

    @abstractmethod
    def inputs(self, spec: Spec, seed: int) -> Inputs: ...

    def preset_passes(self, preset: str) -> tuple[str, ...]:
        """The passes to measure where --pass names none; the last of ``passes`` is the whole op."""
        if preset == "full":
            return self.passes
        return self.passes[-1:] if preset == "quick" else (self.passes[0], self.passes[-1])

    def trials(self, inputs: Any) -> Sequence[Any]:
        """The calls of the check, in this order; what the last returns is looked at."""
        return [inputs]

    @abstractmethod
    def oracle(self, inputs: Any) -> Any:
        """What ``verify`` compares with, in float64; computed once for all providers."""

    @abstractmethod
    def verify(
        self, expected: Any, inputs: Any, outputs: Outputs, grads: Sequence[Tensor] | None
    ) -> str:
        """What is wrong with a result, or an empty string."""

    @abstractmethod
    def ideal_bytes(self, spec: Spec, pass_: str) -> int:
        """Bytes that any implementation moves: each input read once, each result written once."""

    @abstractmethod
    def flops(self, spec: Spec, pass_: str) -> int:
        """Floating-point operations; an exponential or a logarithm counts as ``EXP_FLOPS``."""

    @abstractmethod
    def memory(self, spec: Spec) -> int:
        """Bytes that a run needs: inputs, an eager provider's temporaries, the oracle. Generous."""


EXP_FLOPS = 16
"""Range reduction, a polynomial of degree 6 and the reconstruction."""


class Provider(ABC):
    """One way to compute the ops. A method that has an op's name builds its implementation:
    ``spec -> Function``."""

    name: ClassVar[str]
    title: ClassVar[str]

    def absent(self, device: torch.device) -> str:
        """Why it cannot run here, or an empty string."""
        return ""

    def offers(self, op: str) -> bool:
        return hasattr(self, op)

    def build(self, op: str, spec: Spec) -> Function:
        function: Function = getattr(self, op)(spec)
        return function


def missing_package(module: str) -> str:
    """Why ``module`` cannot be imported, or an empty string."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        reason = str(error).strip().splitlines()
        return f"cannot import {module}: {reason[0] if reason else type(error).__name__}"
    return ""


def catalogue() -> tuple[dict[str, Op], dict[str, Provider]]:
    """Every op and provider of the folders, by name; bmtard first, then eager."""
    ops = {op.name: op for module in _modules("ops") for op in module.OPS}
    providers = {p.name: p for module in _modules("providers") for p in module.PROVIDERS}
    first = {name: providers.pop(name) for name in ("bmtard", "eager")}
    return ops, first | providers


def _modules(folder: str) -> list[Any]:
    package = importlib.import_module(f".{folder}", __package__)
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f".{name}", package.__name__) for name in names]
