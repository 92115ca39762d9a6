"""Packs what a bare GPU machine without a network lacks into one folder.  (make gpu-bundle)

    python tools/gpu_bundle.py                        # build the libraries for sm_90, fetch wheels
    python tools/gpu_bundle.py --library bmtard/_C.so # take a library that is built already
    python tools/gpu_bundle.py --data FOLDER          # with the first images of CIFAR-10

build/gpu-bundle then holds the checkout's files with the library in its place, a second library
for the tuning sweep, wheels/, data/ and run.sh. There, `bash run.sh PART ...` installs the wheels
into a folder of the bundle and runs tools/gpu_check.py with these parts; the results are in
results/. `bash run.sh --stand-in` rehearses it on the CPU. The machine needs a Python with torch,
pytest, hypothesis, NumPy, SciPy, scikit-learn, rich and matplotlib.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 60

# What images with PyTorch and scientific Python do not have. All are pure Python.
WHEELS = ("tyro", "typeguard", "docstring-parser", "liger-kernel")

RUN = """\
#!/bin/bash
# Runs tools/gpu_check.py from this folder alone: bash run.sh [PART ...] [--stand-in]
cd "$(dirname "$0")" || exit 2
python=${PYTHON:-python3}
if [ ! -d site ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target site.new wheels/*.whl &&
    mv site.new site || echo "run.sh: the wheels could not be installed; going on without"
fi
export PYTHONPATH="$PWD:$PWD/site"
[ -d data ] && export BMTARD_DATA="$PWD/data"
parts=() options=()
for argument in "$@"; do
  case $argument in -*) options+=("$argument") ;; *) parts+=("$argument") ;; esac
done
[ ${#parts[@]} -gt 0 ] && options+=(--part "${parts[@]}")
exec "$python" tools/gpu_check.py --out results "${options[@]}"
"""


def fail(message: str) -> None:
    raise SystemExit(f"gpu-bundle: {message}")


def run(command: Sequence[str]) -> None:
    print(f"gpu-bundle: {' '.join(command)}", flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        fail(f"failed: {' '.join(command)}")


def copy_checkout(to: Path) -> None:
    """The files that git knows; the results of other machines stay behind."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if name.startswith("benchmarks/results/") or not source.is_file():
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, to / name)


def build(arch: str, *, tuning: bool) -> Path:
    folder = ROOT / "build" / ("gpu-tuning" if tuning else "gpu")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "BMTARD_CUDA": "1",
        "BMTARD_CUDA_ARCHS": arch,
        "BMTARD_TUNING": "ON" if tuning else "OFF",
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        fail("cmake is needed: pip install cmake ninja")
    configure = [str(cmake), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    os.environ["PATH"] = path  # where ninja is
    run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
    run([str(cmake), "--build", str(folder)])
    return folder / "_C.so"


def fetch_wheels(to: Path, python: str) -> None:
    to.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    for name in WHEELS:
        run([*pip, "--python-version", python, "--implementation", "py", "-d", str(to), name])


def cut_cifar10(source: Path, to: Path, train: int, test: int) -> None:
    """The first images of the npz of JPEG bytes that bmtard.data.load_cifar10 reads."""
    import numpy as np

    found = sorted(source.glob("cifar10[!0]*.npz")) + sorted(source.glob("cifar10.npz"))
    if not found:
        fail(f"no cifar10*.npz in {source}")
    with np.load(found[0]) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for split, count in (("train", train), ("test", test)):
        offset = arrays[f"{split}_offset"][: count + 1]
        arrays[f"{split}_offset"] = offset
        arrays[f"{split}_jpeg"] = arrays[f"{split}_jpeg"][: int(offset[-1])]
        arrays[f"y_{split}"] = arrays[f"y_{split}"][:count]
    to.mkdir()
    np.savez_compressed(to / "cifar10.npz", **arrays)


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle")
    parser.add_argument("--arch", default="90", help="compute capability without the dot")
    parser.add_argument("--python", default="3.12", help="version on that machine")
    parser.add_argument("--library", type=Path, help="instead of building one")
    parser.add_argument("--tuning-library", type=Path, help="instead of building one")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 as an npz of JPEG bytes")
    parser.add_argument("--images", type=int, nargs=2, default=(20_000, 2_000))
    options = parser.parse_args(arguments)

    out = options.out.resolve()
    if out.exists() and not (out / "run.sh").is_file():
        fail(f"{out} is there and is no bundle: remove it, or choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "run.sh").write_text(RUN)
    os.chmod(out / "run.sh", 0o755)
    copy_checkout(out)
    library = options.library or build(options.arch, tuning=False)
    shutil.copyfile(library, out / "bmtard" / "_C.so")
    if options.tuning_library or not options.library:
        tuning = options.tuning_library or build(options.arch, tuning=True)
        shutil.copyfile(tuning, out / "bmtard" / "_C_tuning.so")
    fetch_wheels(out / "wheels", options.python)
    if options.data:
        cut_cifar10(options.data, out / "data", *options.images)
    size = megabytes(out)
    print(f"gpu-bundle: {out}, {size:.1f} MB")
    if size > LIMIT_MB:
        fail(f"{size:.1f} MB are more than {LIMIT_MB}; take fewer --images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
