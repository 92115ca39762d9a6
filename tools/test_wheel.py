"""Shows that one wheel, unchanged, serves other Pythons and other torches.

    python tools/test_wheel.py dist/bmtard-*.whl        (or: make test-wheel)

Looks at the wheel itself (tag, size, what its library needs), then installs it into an
environment for each target below, and there checks the registered kernels and runs the tests
of the ops. The Python of a target is looked for by name, on PATH and under pyenv, unless the
variable of the target names one; if it has the wanted torch already, that one is used.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_MEGABYTES = 10
NEEDED = re.compile(
    r"(libtorch|libtorch_cpu|libc10)\.so|(libc|libm|libstdc\+\+|libgcc_s|ld-linux.*)\.so\.\d+"
)
# C++ symbols of torch have no stable ABI; its C functions (aoti_torch_*, torch_*) do.
UNSTABLE = re.compile(r"_Z\w*?(3c10|2at|5torch)\w*")
# Tests of the source tree, and those that need extras.
LEFT_OUT = (
    *("test_layout.py", "test_readme.py", "test_cuda_check.py", "test_gpu_check.py"),
    *("test_examples.py", "test_migrating.py"),
    *("simt", "training", "__pycache__"),
)

KERNELS = """
import sys, torch, bmtard
print(bmtard.build_info())
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bmtard::")]
registered = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [(n, key) for n in names for key in ("CPU", "CUDA") if not registered(n, key)]
sys.exit(f"no kernel: {missing}" if missing else None if names else "no ops")
"""


@dataclass(frozen=True, kw_only=True)
class Target:
    name: str
    variable: str  # environment variable that names the Python to use
    versions: tuple[str, ...]  # of Python, the preferred one first
    torch: str
    cuda_torch: bool


TARGETS = (
    Target(
        name="cuda",
        variable="CUDA_PYTHON",
        versions=("3.12", "3.13"),
        torch="2.11",
        cuda_torch=True,
    ),
    Target(
        name="oldest",
        variable="OLDEST_PYTHON",
        versions=("3.10",),
        torch="2.10",
        cuda_torch=False,
    ),
)


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


def check_wheel(wheel: Path) -> None:
    """Tag, size, and that the library needs torch's stable C functions and nothing rarer."""
    problems = []
    if "-py3-none-" not in wheel.name or wheel.name.endswith("-any.whl"):
        problems.append("the tag is not py3-none-<platform>")
    if (megabytes := wheel.stat().st_size / 1e6) >= MAX_MEGABYTES:
        problems.append(f"{megabytes:.1f} MB is not below {MAX_MEGABYTES} MB")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        if "bmtard/benchmarks/ops/pgd_step.py" not in archive.namelist():
            problems.append("bmtard.benchmarks is not in it")
        library = archive.extract("bmtard/_C.so", folder)
        dynamic = output("readelf", "-dW", library)
        symbols = output("nm", "-D", "--undefined-only", library)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    if "libtorch.so" not in needed or "aoti_torch_" not in symbols:
        problems.append("libtorch is not named as needed (are readelf and nm installed?)")
    problems += [f"needs {name}" for name in needed if not NEEDED.fullmatch(name)]
    problems += [f"imports {match[0]}" for match in UNSTABLE.finditer(symbols)]
    if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
        problems.append("has an RPATH")
    if problems:
        raise SystemExit(f"{wheel.name}: " + "; ".join(problems))
    print(f"{wheel.name}: {megabytes:.1f} MB, needs {', '.join(needed)}")


def find_python(target: Target) -> str:
    print_version = "import sys; print('%d.%d' % sys.version_info[:2])"
    if named := os.environ.get(target.variable):
        candidates = [named]
    else:
        pyenv = Path(output("pyenv", "root") or "/nonexistent") / "versions"
        candidates = []
        for version in target.versions:
            candidates.append(f"python{version}")
            candidates += map(str, sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True))
    for candidate in candidates:
        if output(candidate, "-c", print_version) in target.versions:
            return candidate
    raise SystemExit(
        f"target {target.name!r} needs Python {' or '.join(target.versions)}, tried "
        f"{', '.join(candidates)}: set {target.variable} to such a Python"
    )


def prepare(target: Target, python: str, wheel: Path) -> Path:
    """The Python of an environment that holds the target's torch and this very wheel."""
    environment = ROOT / f".venv-wheel-{target.name}"
    inside = environment / "bin" / "python"
    if output(inside, "-c", "import torch; print(torch.__version__)")[:4] != target.torch:
        shutil.rmtree(environment, ignore_errors=True)
        run(python, "-m", "venv", environment)
        packages = "import sysconfig; print(sysconfig.get_path('purelib'))"
        has_torch = "import torch; print(torch.__version__)"
        if output(python, "-c", has_torch)[:4] == target.torch:
            folder = Path(output(inside, "-c", packages))
            (folder / "lender.pth").write_text(output(python, "-c", packages) + "\n")
    pip = (inside, "-m", "pip", "install", "--quiet")
    run(*pip, f"bmtard[test] @ {wheel.as_uri()}", f"torch=={target.torch}.*")
    run(*pip, "--force-reinstall", "--no-deps", wheel)
    cuda = output(inside, "-c", "import torch; print(torch.version.cuda)")
    if target.cuda_torch and cuda in ("", "None"):
        raise SystemExit(f"target {target.name!r} needs a CUDA build of torch {target.torch}")
    return inside


def run_tests(inside: Path) -> str:
    """Runs the tests where the source tree cannot be imported; pytest's closing line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns(*LEFT_OUT))
        shutil.copy(ROOT / "pyproject.toml", folder)
        run(inside, "-c", KERNELS, cwd=folder, BMTARD_REQUIRE_NATIVE="1")
        log = folder / "log"
        pytest = f"{shlex.quote(str(inside))} -m pytest {os.environ.get('PYTEST_ARGS', '-n 2')}"
        command = f"set -o pipefail; {pytest} | tee {log}"
        run("bash", "-c", command, cwd=folder, BMTARD_REQUIRE_NATIVE="1", OMP_NUM_THREADS="1")
        return log.read_text().splitlines()[-1]


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit(f"usage: test_wheel.py WHEEL, got {arguments}")
    wheel = Path(arguments[0]).resolve()
    check_wheel(wheel)
    pythons = [find_python(target) for target in TARGETS]  # all, before any long work
    for target, python in zip(TARGETS, pythons, strict=True):
        closing = run_tests(prepare(target, python, wheel))
        print(f"{wheel.name} under {python}, torch {target.torch}: {closing.strip('= ')}")


if __name__ == "__main__":
    main(sys.argv[1:])
