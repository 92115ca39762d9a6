"""Tensors by their description: small enough to be printed, and pasted into a test."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

_POOL = np.random.default_rng(0).standard_normal(1 << 17)
DTYPES = ("float32", "float64", "bfloat16", "float16")

VALUES = (
    "normal", "small", "wide", "huge", "extreme", "subnormal", "equal", "integers", "one_hot",
    "margin", "masked", "masked_rows", "nan", "inf",
)  # fmt: skip
LAYOUTS = (
    "contiguous", "transposed", "sliced", "class_stride", "row_stride", "offset", "expanded",
    "expanded_classes", "flipped",
)  # fmt: skip


@dataclass(frozen=True)
class Array:
    """A tensor: its shape, dtype, kind of values, memory layout, and role in autograd."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    values: str = "normal"
    layout: str = "contiguous"
    seed: int = 0
    grad: bool = False
    inference: bool = False  # made under torch.inference_mode

    def __repr__(self) -> str:
        shown = [repr(self.shape)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"Array({', '.join(shown)})"

    def tensor(self) -> Tensor:
        if self.inference:
            with torch.inference_mode():
                return in_layout(self._dense(), self.layout)
        tensor = in_layout(self._dense(), self.layout)
        return tensor.requires_grad_() if self.grad else tensor

    def _dense(self) -> Tensor:
        dtype = getattr(torch, self.dtype)
        size = math.prod(self.shape)
        start = self.seed * 7919 % len(_POOL)
        x = _POOL[start : start + size]
        if len(x) < size:
            x = np.resize(np.roll(_POOL, -start), size)
        x = x.reshape(self.shape)
        if dtype == torch.bool:
            return torch.from_numpy(np.asarray(x > 0))
        if not dtype.is_floating_point:
            return torch.from_numpy(np.asarray(np.abs(x))).to(dtype)
        return torch.from_numpy(np.asarray(self._shaped(x, torch.finfo(dtype)))).to(dtype)

    def _shaped(self, x: np.ndarray, info: torch.finfo) -> np.ndarray:
        """Normal numbers ``x`` as the kind of values that is asked for."""
        kind = self.values
        if kind == "normal":
            return 3 * x
        if kind == "small":
            return 1e-3 * x
        if kind == "wide":
            return 30 * x
        if kind == "huge":
            return 5e3 * x
        if kind == "extreme":
            return info.max * np.clip(x, -1, 1)
        if kind == "subnormal":
            return info.smallest_normal * info.eps * np.round(20 * x)
        if kind == "equal":
            return np.full(self.shape, 2.3)
        if kind == "integers":
            return np.round(2 * x)
        if kind == "positive":  # temperatures, weights
            return 0.05 + np.abs(x)
        if kind == "fractions":  # with zeros: weights of samples
            return np.maximum(x, 0)
        if kind == "mask":
            return (x > 0).astype(float)
        if kind == "pixels":
            return np.abs(np.sin(x))
        if kind == "ones":
            return np.ones(self.shape)
        x = 3 * x
        if x.size == 0:
            return x
        seed = self.seed
        last = x.shape[-1] if x.ndim else 1
        flat = x.reshape(-1, last)
        if kind == "one_hot":
            flat = np.zeros_like(flat)
            flat[:, seed % last] = (1.0, 20.0, 90.0, 800.0)[seed // last % 4]
        elif kind == "margin":
            flat[:, seed % last] += (17.0, 80.0, 1000.0)[seed // last % 3]
        elif kind == "masked":
            hidden = flat < flat.mean(-1, keepdims=True)
            hidden[:, seed % last] = False
            flat[hidden] = -np.inf
        elif kind == "masked_rows":
            flat[seed % len(flat)] = -np.inf
        elif kind == "nan":
            flat[seed % len(flat), seed % last] = np.nan
        elif kind == "inf":
            flat[seed % len(flat), seed % last] = np.inf
        else:
            raise ValueError(kind)
        return flat.reshape(self.shape)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """``x`` in another memory layout; what lies between its values is NaN. 0-d stays as it is."""
    if layout == "meta":
        return x.to("meta")
    if x.dim() == 0 or layout == "contiguous":
        return x
    *rows, last = x.shape
    if layout == "flipped":
        return x.flip(-1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "expanded_classes":
        return x[..., :1].expand(x.shape)
    if layout == "sparse":
        return x.to_sparse()
    if layout == "transposed":
        view = x.new_empty((last, *rows)).movedim(0, -1)
    elif layout == "sliced":
        view = _between(x, (*rows, last + 4))[..., 1 : last + 1]
    elif layout == "class_stride":
        view = _between(x, (*rows, 2 * last))[..., ::2]
    elif layout == "row_stride":
        view = _between(x, (2 * x.shape[0], *x.shape[1:]))[::2]
    elif layout == "offset":
        view = _between(x, (x.numel() + 1,))[1:].view(x.shape)
    else:
        raise ValueError(layout)
    return view.copy_(x)


def _between(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_full(shape, torch.nan if x.is_floating_point() else 1)
