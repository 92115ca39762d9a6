"""Finds and loads the compiled ops, and says what was found.

``NATIVE`` is True once the ops are registered as ``torch.ops.bmtard.*``. Otherwise every
public function runs on ``bmtard.reference``, and ``build_info().reason`` says why.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("bmtard needs torch >= 2.10: pip install 'torch>=2.10'") from error

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
        return "\n".join(f"{name + ':':<11}{value}" for name, value in rows.items())


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warns at the line outside of bmtard and torch that called into them."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__"))
        importing = name.startswith("importlib._bootstrap")  # warnings does not count these
        if name.split(".")[0] not in ("bmtard", "torch") and not importing:
            break
        level, frame = level + (not importing), frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _load() -> str:
    """Registers the ops. Returns why that was impossible, or an empty string."""
    if not _LIBRARY.is_file():
        named = bool(os.environ.get("BMTARD_LIBRARY"))
        why = ", which BMTARD_LIBRARY names" if named else f"; {_why_not_built()}"
        return f"there is no {_LIBRARY}{why}"
    running = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if running < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    try:
        torch.ops.load_library(_LIBRARY)
    except (OSError, RuntimeError) as error:
        musl = "; this system's C library is not glibc, so build bmtard here"
        other = sys.platform == "linux" and platform.libc_ver()[0] != "glibc"
        return f"{_LIBRARY} cannot be loaded: {error}{musl if other else ''}"
    return ""


def _why_not_built() -> str:
    for place in sys.path:
        installed = Path(place, "bmtard", "_C.so")
        if installed.is_file():
            return (
                f"Python found these sources first, and not {installed.parent}, which is "
                f"installed: run it in another folder than {_LIBRARY.parents[1]}"
            )
    if sys.platform == "win32":
        return "the kernels do not compile on Windows"
    if sys.platform == "darwin":
        return "on macOS it is built only with BMTARD_REQUIRE_NATIVE=1, and nobody has tested it"
    return "it needs a C++ compiler when bmtard is installed"


_REASON = _load()
NATIVE: bool = not _REASON

if not NATIVE:
    if os.environ.get("BMTARD_REQUIRE_NATIVE") == "1":
        raise ImportError(f"BMTARD_REQUIRE_NATIVE=1, but {_REASON}")
    warn(f"bmtard runs in plain torch, without its compiled kernels: {_REASON}")


def _native_info() -> dict[str, Any]:
    """What the library says of itself: the JSON object of csrc/ops.cpp."""
    function = ctypes.CDLL(str(_LIBRARY)).bmtard_build_info
    function.restype = ctypes.c_char_p
    info: dict[str, Any] = json.loads(function())
    if "error" in info:
        raise ImportError(f"bmtard: {info['error']}")
    return info


_INFO = _native_info() if NATIVE else {}
_HAS_CUDA: bool = _INFO.get("cuda", False)


def has_cuda() -> bool:
    """Whether CUDA kernels are compiled in. Says nothing of a GPU."""
    return _HAS_CUDA


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a GPU of a compute capability runs code for ``architectures``, e.g. ("75", "90").

    Machine code runs on its own major version from its minor version on; PTX, which there is of the
    last architecture, on all that is newer.
    """
    built = [divmod(int(architecture), 10) for architecture in architectures]
    same_major = any(major == capability[0] and minor <= capability[1] for major, minor in built)
    return same_major or (bool(built) and built[-1] <= capability)


_cuda_problems: dict[int | None, str] = {}


def cuda_problem(index: int | None) -> str:
    """Why the CUDA kernels cannot serve GPU ``index``; empty if they can."""
    if index not in _cuda_problems:
        _cuda_problems[index] = _cuda_problem(index)
    return _cuda_problems[index]


# torch.compile calls it while it traces.
cuda_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cuda_problem(index: int | None) -> str:
    if not _HAS_CUDA:
        return "its library was built without CUDA; build it where nvcc is, with BMTARD_CUDA=1"
    if torch.version.hip:
        return "its CUDA kernels do not run on ROCm"
    if not torch.cuda.is_available():
        return ""  # fake tensors, which torch.compile traces without a GPU
    info = build_info()
    driver, runtime = driver_version(), _INFO["cuda_runtime"]
    if driver and driver // 1000 < runtime // 1000:
        return (
            f"its library has CUDA runtime {_dotted(runtime)}, and the driver is older: it serves "
            f"CUDA {_dotted(driver)}; update the driver, or build bmtard with CUDA "
            f"{driver // 1000}"
        )
    major, minor = torch.cuda.get_device_capability(index)
    if not runs_on(info.cuda_architectures, (major, minor)):
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and its "
            f"library was built for {', '.join(info.cuda_architectures)}; build it with "
            f"BMTARD_CUDA_ARCHS={major}{minor}"
        )
    return ""


def driver_version() -> int:
    """The newest CUDA that the driver serves, 13000 for 13.0; 0 without a driver."""
    version: Callable[[], int] = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)
    return version()


def _dotted(version: int) -> str:
    """13000 -> 13.0"""
    return f"{version // 1000}.{version % 1000 // 10}"


def build_info() -> BuildInfo:
    """Version, torch, instruction set, CUDA architectures, and the path in use and why."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("bmtard")
    except PackageNotFoundError:
        installed = "not installed"
    runtime = _INFO.get("cuda_runtime")
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
        cuda_runtime=_dotted(runtime) if runtime else None,
    )
