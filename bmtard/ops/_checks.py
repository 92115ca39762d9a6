"""The checks of arguments that several ops share."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_TEACHERS = 16
"""The largest K: the kernels take K pointers by value."""

LOWEST, HIGHEST = 1e-36, 1e36
"""Of a temperature and of eps: their inverses are normal float32 numbers. As in core/common.h."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number of Python or NumPy that a float holds, and no bool."""
    # float and int first, because numbers.Real takes longer.
    if isinstance(value, float):
        return True
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, numbers.Real)


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of Python or NumPy, and no bool."""
    # int first, because numbers.Integral takes longer.
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def check_temperature(op: str, name: str, value: float) -> None:
    if not is_number(value):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    if not LOWEST <= value <= HIGHEST:
        raise ValueError(
            f"{op}: {name} must be finite and > 0, from {LOWEST} to {HIGHEST}, got {value}"
        )


def check_own_temperature(op: str, value: str) -> None:
    """For a student temperature in words."""
    if value != "teacher":
        raise ValueError(
            f"{op}: student_temperature must be a number, a tensor or 'teacher', got {value!r}"
        )


def check_eps(op: str, eps: float) -> None:
    if not (is_number(eps) and (eps == 0 or LOWEST <= eps <= HIGHEST)):
        raise ValueError(
            f"{op}: eps must be finite and >= 0, namely 0 or from {LOWEST} to {HIGHEST}, got {eps}"
        )


def two_numbers(op: str, name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2
    if not (pair and is_number(bounds[0]) and is_number(bounds[1])):
        raise ValueError(f"{op}: {name} must be two numbers, (lowest, highest), got {bounds!r}")
    return float(bounds[0]), float(bounds[1])


def check_bounds(op: str, bounds: tuple[float, float], name: str = "bounds") -> tuple[float, float]:
    low, high = two_numbers(op, name, bounds)
    if not LOWEST <= low < high <= HIGHEST:
        raise ValueError(
            f"{op}: {name} must satisfy 0 < lowest < highest, from {LOWEST} to {HIGHEST}, "
            f"got {bounds}"
        )
    return low, high


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
    if is_distributed(tensor):
        raise TypeError(
            f"{op}: {name} must be a tensor of this rank, got a DTensor; pass .to_local() where "
            "the rows are sharded, else .full_tensor()"
        )


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, told by its class: torch may lack torch.distributed."""
    return type(tensor) is not Tensor and hasattr(type(tensor), "full_tensor")


def check_logits(op: str, name: str, logits: Tensor) -> None:
    check_floating(op, name, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must be [..., C] with C >= 1, got {list(logits.shape)}")


def check_companion(op: str, name: str, tensor: Tensor, logits: Tensor) -> None:
    """For a floating-point tensor that must be on the device of the logits."""
    check_floating(op, name, tensor)
    if tensor.device != logits.device:
        raise ValueError(
            f"{op}: {name} must be on the device of the logits, {logits.device}, "
            f"got {tensor.device}"
        )


def check_pair(
    op: str, student_logits: Tensor | Sequence[Tensor], teacher_logits: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Checks both sides and returns each as a list of 1 or K tensors, all of one dtype.

    All tensors must have one shape and device. Different dtypes are promoted.
    """
    students: Any = [student_logits] if isinstance(student_logits, Tensor) else student_logits
    teachers: Any = [teacher_logits] if isinstance(teacher_logits, Tensor) else teacher_logits
    if _alike(students, teachers):
        return list(students), list(teachers)
    sides: list[list[Tensor]] = []
    first, same_dtype = None, True
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        side = [logits] if isinstance(logits, Tensor) else logits
        if not isinstance(side, (list, tuple)):
            raise TypeError(
                f"{op}: {name} must be a tensor or a sequence of tensors, "
                f"got {type(logits).__name__}"
            )
        if not 1 <= len(side) <= MAX_TEACHERS:
            raise ValueError(f"{op}: {name} must hold 1 to {MAX_TEACHERS} tensors, got {len(side)}")
        for k, entry in enumerate(side):
            if first is None:
                check_logits(op, name if side[0] is logits else f"{name}[0]", entry)
                first, shape, dtype, device = entry, entry.shape, entry.dtype, entry.device
            elif (
                not isinstance(entry, Tensor)
                or entry.dtype != dtype
                or entry.layout != torch.strided
                or is_distributed(entry)
            ):
                check_logits(op, f"{name}[{k}]", entry)
                same_dtype = False
            if entry.shape != shape:
                raise ValueError(
                    f"{op}: {name}[{k}] must have the shape of student_logits, {list(shape)}, "
                    f"got {list(entry.shape)}"
                )
            if entry.device != device:
                raise ValueError(
                    f"{op}: {name}[{k}] must be on the device of student_logits, {device}, "
                    f"got {entry.device}"
                )
        sides.append(list(side))
    assert first is not None
    students, teachers = sides
    if len(students) != len(teachers) and 1 not in (len(students), len(teachers)):
        raise ValueError(
            f"{op}: student_logits and teacher_logits must hold equally many tensors, or one of "
            f"them a single one, got {len(students)} and {len(teachers)}"
        )
    if not same_dtype:
        dtype = first.dtype
        for entry in students + teachers:
            dtype = torch.promote_types(dtype, entry.dtype)
        students, teachers = [s.to(dtype) for s in students], [t.to(dtype) for t in teachers]
    return students, teachers


def _alike(students: Any, teachers: Any) -> bool:
    """Whether :func:`check_pair` has nothing to refuse and nothing to convert.

    This quick look serves the usual case. A full check takes a few microseconds more.
    """
    if type(students) not in (list, tuple) or type(teachers) not in (list, tuple):
        return False
    k, n = len(students), len(teachers)
    if not (0 < k <= MAX_TEACHERS and 0 < n <= MAX_TEACHERS and (k == n or 1 in (k, n))):
        return False
    first = students[0]
    return same_kind(first, (*students, *teachers)) and first.dim() > 0 and first.shape[-1] > 0


def same_kind(first: Any, tensors: Sequence[Any]) -> bool:
    """Whether ``tensors`` have the shape, dtype and device of ``first`` and suit the kernels."""
    if not isinstance(first, Tensor) or first.dtype not in DTYPES:
        return False
    shape, dtype, device = first.shape, first.dtype, first.device
    for tensor in tensors:
        if not (
            (type(tensor) is Tensor or (isinstance(tensor, Tensor) and not is_distributed(tensor)))
            and tensor.shape == shape
            and tensor.dtype is dtype
            and tensor.layout is torch.strided
            and tensor.device == device
        ):
            return False
    return True
