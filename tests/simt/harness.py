"""The module bmtard_simt: how it is built, and its launchers on plain float64 arrays.

Inputs are rounded to the dtype under test; outputs lie between guard bytes that no kernel may
touch. float16 and bfloat16 are spelled as PyTorch spells them; NumPy carries bfloat16 as uint16.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

SOURCE = Path(__file__).resolve().parent
ROOT = SOURCE.parent.parent
# A folder with a module that is taken as it is: a mutant, or one under sanitizers.
PREBUILT = os.environ.get("BMTARD_SIMT_MODULE")
BUILD = Path(PREBUILT) if PREBUILT else ROOT / "build" / "simt"

DTYPES = ["float64", "float32", "float16", "bfloat16"]
STORAGE = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
# Of what is computed, and of what is stored.
EPS = {"float64": 2.3e-16, "float32": 1.2e-7, "float16": 9.8e-4, "bfloat16": 7.9e-3}

# Every boundary between kernel variants, one either side: 32, 512 (float64), 1024.
CLASSES = [1, 2, 3, 10, 31, 32, 33, 100, 127, 200, 511, 512, 513, 1000, 1001, 1024, 1025, 3000]
ROWS = [0, 1, 3, 37]


class BuildError(RuntimeError):
    """The kernels could not be built for the CPU."""


def build(folder: Path = BUILD, sanitize: str = "") -> None:
    """Configures and builds, which is a matter of milliseconds where nothing has changed.

    ``sanitize``: what the compiler's -fsanitize takes, see sanitize.py.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None:
        raise BuildError("tests/simt builds the CUDA kernels for the CPU and needs cmake and ninja")
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [cmake, "-S", SOURCE, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    configure.append(f"-DBMTARD_SIMT_SANITIZE={sanitize}")
    with (folder / ".lock").open("w") as lock:  # several test processes may come at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ([*configure, *generator], [cmake, "--build", folder, "--parallel"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise BuildError(
                    "tests/simt could not build the CUDA kernels for the CPU (needs a C++17 "
                    f"compiler, cmake, ninja and pybind11):\n{done.stdout}\n{done.stderr}"
                )


@functools.cache
def simt() -> ModuleType:
    """The built module."""
    sys.path.insert(0, str(BUILD))
    try:
        return importlib.import_module("bmtard_simt")
    finally:
        sys.path.remove(str(BUILD))


def real(dtype: str) -> np.dtype:
    """What values of ``dtype`` are computed in."""
    return np.dtype(np.float64 if dtype == "float64" else np.float32)


def encode(values: Float64, dtype: str) -> NDArray:
    """Rounds to ``dtype``, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(values).astype(STORAGE[dtype])
    single = np.asarray(values, np.float32)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(single), 0x7FFF, rounded).astype(np.uint16)


def decode(stored: NDArray) -> Float64:
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def rounded(values: Float64, dtype: str) -> Float64:
    return decode(encode(values, dtype))


def place(values: Float64, dtype: str, *, extra: int = 0, shift: int = 0) -> NDArray:
    """A matrix of ``dtype`` whose rows lie ``extra`` values apart, ``shift`` values past a
    multiple of 16 bytes. What lies between is NaN, and out of bounds for a sanitized kernel."""
    n, c = values.shape
    stored = encode(values, dtype)
    flat = _aligned(n * (c + extra) + shift, STORAGE[dtype])
    flat[:] = encode(np.full(1, np.nan), dtype)
    out = np.lib.stride_tricks.as_strided(
        flat[shift:], (n, c), ((c + extra) * flat.itemsize, flat.itemsize)
    )
    out[...] = stored
    if simt().sanitized():
        simt().forbid(flat[:shift].view(np.uint8))
        for row in range(n if extra else 0):
            end = shift + row * (c + extra) + c
            simt().forbid(flat[end : end + extra].view(np.uint8))
    return out


def _aligned(count: int, dtype: np.dtype) -> NDArray:
    return simt().allocate(count * dtype.itemsize).view(dtype)


class Outputs:
    """Arrays between guard bytes, of which there are enough for a tile or a chunk: a kernel that
    writes there shall fail a test, and not end the process."""

    GUARD = 16384
    BYTE = 0xA5

    def __init__(self) -> None:
        self._raw: list[tuple[NDArray, int]] = []

    def new(
        self, shape: tuple[int, ...], dtype: str | np.dtype | type, *, shift: int = 0
    ) -> NDArray:
        kind = STORAGE[dtype] if isinstance(dtype, str) else np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        start = self.GUARD + shift * kind.itemsize
        raw = _aligned(start + size + self.GUARD, np.dtype(np.uint8))
        raw[:] = self.BYTE
        raw[start : start + size] = 0xFF  # NaN
        simt().forbid(raw[:start])
        simt().forbid(raw[start + size :])
        self._raw.append((raw, start))
        return raw[start : start + size].view(kind).reshape(shape)

    def copy(self, values: NDArray) -> NDArray:
        out = self.new(values.shape, values.dtype)
        out[...] = values
        return out

    def check(self) -> None:
        for raw, start in self._raw:
            before, after = raw[:start], raw[-self.GUARD :]
            assert (before == self.BYTE).all(), "a kernel wrote before an output"
            assert (after == self.BYTE).all(), "a kernel wrote past an output"


def assert_close(
    actual: NDArray, expected: Float64, dtype: str, *, ulp: float = 64, floor: float = 1.0
) -> None:
    """To one rounding to ``dtype``, and before it ``ulp`` units of the last place of what is
    computed in, relative to the value or to ``floor``."""
    before = ulp * EPS[computed(dtype)]
    smallest = 6e-8 if dtype == "float16" else 0.0
    values = decode(actual) if actual.dtype != np.float64 else actual
    rtol, atol = EPS[dtype] + before, before * floor + smallest
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol)


def computed(dtype: str) -> str:
    """The dtype of the statistics."""
    return "float64" if dtype == "float64" else "float32"


def draw(seed: int, n: int, c: int, dtype: str, *, scale: float = 3.0) -> Float64:
    """Logits that ``dtype`` can hold exactly."""
    return rounded(scale * np.random.default_rng(seed).standard_normal((n, c)), dtype)


def log_softmax(logits: Float64, temperature: float | Float64 = 1.0) -> Float64:
    """The oracle, in float64. A row without finite logits is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = (logits - logits.max(-1, keepdims=True)) / temperature
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def entropy(logits: Float64, temperature: float | Float64 = 1.0, eps: float = 0.0) -> Float64:
    """-sum p log(p + eps) by row, in nats."""
    log_p = log_softmax(logits, temperature)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return -np.where(p == 0, 0, p * (np.log(p + eps) if eps else log_p)).sum(-1)
