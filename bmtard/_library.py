"""Finds and loads the compiled ops, and says what was found.

``NATIVE`` is True once the ops are registered as ``torch.ops.bmtard.*``. Otherwise every
public function runs on ``bmtard.reference``, and ``build_info().reason`` says why.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

OLDEST_TORCH = (2, 10)  # TORCH_TARGET_VERSION in CMakeLists.txt

# BMTARD_LIBRARY names another one, such as that of tests/sanitize_cpu.py.
_LIBRARY = Path(os.environ.get("BMTARD_LIBRARY") or Path(__file__).with_name("_C.so"))


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """What this installation of bmtard is, and which path its functions take."""

    version: str
    native: bool
    """True: compiled kernels; False: plain torch, see ``reason``."""
    reason: str
    """Why the compiled kernels are not in use; empty if they are."""
    library: Path | None
    torch_running: str
    torch_built: str | None
    torch_target: str | None
    """Oldest torch that the library runs with."""
    compiler: str | None
    instruction_set: str | None
    """Of the CPU kernels in use: "baseline", "avx2" or "avx512"."""
    cuda: bool
    """CUDA kernels are compiled in, whether or not there is a GPU."""
    cuda_architectures: tuple[str, ...]
    """Compute capabilities without the dot, e.g. "90"; PTX of the last serves newer GPUs."""
    cuda_runtime: str | None

    def __str__(self) -> str:
        torch_line = f"{self.torch_running} (running)"
        if self.native:
            torch_line += f", {self.torch_built} (built with), >= {self.torch_target} (supported)"
        cuda = f"{', '.join(self.cuda_architectures)} (CUDA runtime {self.cuda_runtime})"
        rows = {
            "bmtard": self.version,
            "kernels": "compiled" if self.native else f"plain torch: {self.reason}",
            "torch": torch_line,
            "CPU": self.instruction_set or "-",
            "CUDA": cuda if self.cuda else "not compiled in",
            "compiler": self.compiler or "-",
            "library": self.library or "-",
        }
        return "\n".join(f"{name + ':':<10}{value}" for name, value in rows.items())


def _load() -> str:
    """Registers the ops. Returns why that was impossible, or an empty string."""
    if not _LIBRARY.is_file():
        return f"there is no {_LIBRARY}; it needs a C++ compiler when bmtard is installed"
    running = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if running < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    try:
        torch.ops.load_library(_LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{_LIBRARY} cannot be loaded: {error}"
    return ""


_REASON = _load()
NATIVE: bool = not _REASON

if not NATIVE:
    if os.environ.get("BMTARD_REQUIRE_NATIVE") == "1":
        raise ImportError(f"BMTARD_REQUIRE_NATIVE=1, but {_REASON}")
    warnings.warn(
        f"bmtard runs in plain torch, without its compiled kernels: {_REASON}",
        RuntimeWarning,
        stacklevel=2,
    )


def _native_info() -> dict[str, Any]:
    """What the library says of itself: the JSON object of csrc/ops.cpp."""
    function = ctypes.CDLL(str(_LIBRARY)).bmtard_build_info
    function.restype = ctypes.c_char_p
    info: dict[str, Any] = json.loads(function())
    if "error" in info:
        raise ImportError(f"bmtard: {info['error']}")
    return info


_INFO = _native_info() if NATIVE else {}
_HAS_CUDA: bool = _INFO.get("cuda", False)  # a constant, so that torch.compile can trace it


def has_cuda() -> bool:
    """Whether CUDA kernels are compiled in. Says nothing of a GPU."""
    return _HAS_CUDA


def build_info() -> BuildInfo:
    """Version, torch, instruction set, CUDA architectures, and the path in use and why."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("bmtard")
    except PackageNotFoundError:
        installed = "not installed"
    runtime = _INFO.get("cuda_runtime")  # 13000 is 13.0
    return BuildInfo(
        version=installed,
        native=NATIVE,
        reason=_REASON,
        library=_LIBRARY if NATIVE else None,
        torch_running=torch.__version__,
        torch_built=_INFO.get("torch"),
        torch_target=_INFO.get("target"),
        compiler=_INFO.get("compiler"),
        instruction_set=_INFO.get("instruction_set"),
        cuda=_HAS_CUDA,
        cuda_architectures=tuple(filter(None, _INFO.get("cuda_architectures", "").split(";"))),
        cuda_runtime=f"{runtime // 1000}.{runtime % 1000 // 10}" if runtime else None,
    )
