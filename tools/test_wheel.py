"""Shows that one wheel, unchanged, serves other Pythons and other torches.

    python tools/test_wheel.py dist/bmtard-*.whl          # every cell of PYTHONS x TORCHES
    python tools/test_wheel.py WHEEL --only 3.10:2.10     # some of them
    python tools/test_wheel.py WHEEL --short              # a part of the tests in each
    python tools/test_wheel.py WHEEL --check              # only the wheel itself

Looks at the wheel itself (tag, size, what its library needs). Then, one cell after the other, it
makes an environment, installs torch and the wheel, checks the registered kernels, runs the tests of
the ops, and deletes the environment. Pythons are looked for on PATH and under pyenv. ``uv``, where
it is found, installs faster than pip. ``--json FILE`` adds what was seen to a file of results, from
which tools/readme_tables.py makes the table of docs/install.md.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.10", "2.11", "2.13", "newest")  # the newest that there is for the Python
MAX_MEGABYTES = 10
NEEDED = re.compile(
    r"(libtorch|libtorch_cpu|libc10)\.so|(libc|libm|libstdc\+\+|libgcc_s|ld-linux.*)\.so\.\d+"
)
# C++ symbols of torch have no stable ABI; its C functions (aoti_torch_*, torch_*) do.
UNSTABLE = re.compile(r"_Z\w*?(3c10|2at|5torch)\w*")
# Tests of the source tree, and those that need extras.
LEFT_OUT = (
    *("test_layout.py", "test_readme.py", "test_install.py", "test_cuda_check.py"),
    *("test_gpu_check.py", "test_examples.py", "test_migrating.py"),
    *("simt", "training", "__pycache__"),
)
# Every dtype, autograd, the whole loss and the state of the balance against the published code.
SHORT = ("test_pgd_step.py", "test_published_algorithm.py")

KERNELS = """
import json, sys, platform, torch, bmtard
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bmtard::")]
registered = torch._C._dispatch_has_kernel_for_dispatch_key
keys = ("CPU", "CUDA") if bmtard.build_info().cuda else ("CPU",)
missing = [(n, key) for n in names for key in keys if not registered(n, key)]
if missing or not names:
    sys.exit(f"no kernel: {missing or 'no ops'}")
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__}))
"""


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> None:
    print("+", *command, flush=True)
    if subprocess.run(command, cwd=cwd, env=os.environ | env).returncode:
        raise SystemExit(f"failed: {shlex.join(map(str, command))}")


def output(*command: str | Path) -> str:
    """What a command prints; nothing if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions(text: str, prefix: str) -> list[tuple[int, ...]]:
    """The symbol versions PREFIX_2.34 of a text, as numbers."""
    found = re.findall(rf"@{prefix}_(\d+(?:\.\d+)*)", text)
    return [tuple(map(int, version.split("."))) for version in found]


def check_wheel(wheel: Path) -> None:
    """Tag, size, and that the library needs torch's stable C functions and nothing rarer."""
    problems = []
    tag = re.search(r"-py3-none-manylinux_(\d+)_(\d+)_\w+\.whl$", wheel.name)
    if tag is None:
        problems.append("the tag is not py3-none-manylinux_<glibc>_<machine>")
    if (megabytes := wheel.stat().st_size / 1e6) >= MAX_MEGABYTES:
        problems.append(f"{megabytes:.1f} MB is not below {MAX_MEGABYTES} MB")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if "bmtard/benchmarks/ops/pgd_step.py" not in names:
            problems.append("bmtard.benchmarks is not in it")
        libraries = [name for name in names if re.search(r"\.so(\.\d|$)", name)]
        problems += [f"has {name}" for name in libraries if name != "bmtard/_C.so"]
        library = archive.extract("bmtard/_C.so", folder)
        dynamic = output("readelf", "-dW", library)
        symbols = output("nm", "-D", "--undefined-only", library)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    if "libtorch.so" not in needed or "aoti_torch_" not in symbols:
        problems.append("libtorch is not named as needed (are readelf and nm installed?)")
    if tag is not None and (newest := max(versions(symbols, "GLIBC"), default=(0,))) > (
        allowed := (int(tag[1]), int(tag[2]))
    ):
        problems.append(f"needs glibc {newest}, and its tag says {allowed}")
    problems += [f"needs {name}" for name in needed if not NEEDED.fullmatch(name)]
    problems += [f"imports {match[0]}" for match in UNSTABLE.finditer(symbols)]
    if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
        problems.append("has an RPATH")
    if problems:
        raise SystemExit(f"{wheel.name}: " + "; ".join(problems))
    print(f"{wheel.name}: {megabytes:.1f} MB, needs {', '.join(needed)}")


def find_python(version: str) -> str:
    print_version = "import sys; print('%d.%d' % sys.version_info[:2])"
    pyenv = Path(output("pyenv", "root") or "/nonexistent") / "versions"
    candidates = [f"python{version}"]
    candidates += map(str, sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True))
    for candidate in candidates:
        if output(candidate, "-c", print_version) == version:
            return candidate
    raise SystemExit(f"no Python {version}: tried {', '.join(candidates)}")


def install(environment: Path, python: str, torch: str, wheel: Path) -> Path:
    """The Python of a new environment that holds ``torch`` and this very wheel."""
    run(python, "-m", "venv", environment)
    inside = environment / "bin" / "python"
    uv = shutil.which("uv")
    pip = (uv, "pip", "install", "--python", inside) if uv else (inside, "-m", "pip", "install")
    wanted = "torch" if torch == "newest" else f"torch=={torch}.*"
    run(*pip, "--quiet", f"bmtard[test] @ {wheel.as_uri()}", wanted)
    return inside


def run_tests(inside: Path, short: bool) -> dict[str, Any]:
    """Runs the tests where the source tree cannot be imported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns(*LEFT_OUT))
        shutil.copy(ROOT / "pyproject.toml", folder)
        env = {"BMTARD_REQUIRE_NATIVE": "1", "OMP_NUM_THREADS": "1"}
        kernels: list[str | Path] = [inside, "-W", "error", "-c", KERNELS]
        seen = subprocess.run(
            kernels, cwd=folder, env=os.environ | env, stdout=subprocess.PIPE, text=True
        )
        if seen.returncode:
            raise SystemExit("the ops are not registered")
        log = folder / "log"
        files = [f"tests/{file}" for file in SHORT] if short else []
        pytest = shlex.join([str(inside), "-m", "pytest", *files])
        command = f"set -o pipefail; {pytest} {os.environ.get('PYTEST_ARGS', '-n 2')} | tee {log}"
        run("bash", "-c", command, cwd=folder, **env)
        passed = re.search(r"(\d+) passed", log.read_text().splitlines()[-1])
        if passed is None:
            raise SystemExit("no test passed")
        return {**json.loads(seen.stdout), "passed": int(passed[1]), "short": short}


def record(path: Path, wheel: Path, cell: str, row: dict[str, Any]) -> None:
    """Adds a cell to the results of this very file; those of another wheel are dropped."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if results.get("sha256") != sha256:
        megabytes = round(wheel.stat().st_size / 1e6, 2)
        results = {"wheel": wheel.name, "sha256": sha256, "megabytes": megabytes, "cells": {}}
    results["date"] = datetime.date.today().isoformat()
    results["command"] = f"python tools/test_wheel.py {wheel.name}{' --short' * row['short']}"
    results["machine"] = platform.platform()
    results["cells"][cell] = row
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    cells = [f"{python}:{torch}" for python in PYTHONS for torch in TORCHES]
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--only", nargs="+", choices=cells, default=cells, metavar="PYTHON:TORCH")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    check_wheel(wheel)
    if options.check:
        return
    wanted = sorted({cell.split(":")[0] for cell in options.only})
    pythons = {name: find_python(name) for name in wanted}  # all, before any long work
    lines = []
    for cell in options.only:
        python, torch = cell.split(":")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bmtard-wheel-") as folder:
            inside = install(Path(folder) / "venv", pythons[python], torch, wheel)
            row = run_tests(inside, options.short)
        row["seconds"] = round(time.monotonic() - started)
        if options.json:
            record(options.json, wheel, cell, row)
        lines.append(f"Python {row['python']}, torch {row['torch']}: {row['passed']} passed")
    print(wheel.name, *lines, sep="\n")


if __name__ == "__main__":
    main()
