"""What an installation says where something is missing, and what wheel and archive hold."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from bmtard import _library

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sysconfig.get_path("scripts")
PATH = os.pathsep.join([SCRIPTS, os.environ.get("PATH", os.defpath)])


def run(command, **env):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BMTARD_")}
    return subprocess.run(
        command, cwd=ROOT, env=environ | {"PATH": PATH} | env, capture_output=True, text=True
    )


def setup(before: str = "", **env):
    """What setup.py says before it builds anything: it is asked for the name alone."""
    code = (
        "import runpy, sys, setuptools.command.build_ext, setuptools.command.bdist_wheel\n"
        f"{before}\nsys.argv = ['setup.py', '--name']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    return run([sys.executable, "-c", code], **env)


NO_COMPILER = {"PATH": "/nonexistent", "CXX": ""}


@pytest.mark.parametrize(
    ("before", "env", "reason"),
    [
        ("", NO_COMPILER, "no C++ compiler found (CXX, c++, g++, clang++)"),
        ("sys.platform = 'win32'", {}, "the kernels do not compile on Windows"),
        ("sys.platform = 'darwin'", {}, "nobody has tested the kernels on macOS"),
    ],
    ids=["compiler", "windows", "macos"],
)
def test_without_kernels_setup_goes_on_in_plain_torch(before, env, reason):
    result = setup(before, **env)
    assert result.returncode == 0, result.stderr
    assert f"bmtard: {reason}" in result.stderr
    assert "installing the plain torch path only" in result.stderr
    required = setup(before, BMTARD_REQUIRE_NATIVE="1", **env)
    if "darwin" in before:  # it compiles there on request
        assert required.returncode == 0
        assert reason not in required.stderr
    else:
        assert required.returncode == 1
        assert f"bmtard: BMTARD_REQUIRE_NATIVE=1, but {reason}" in required.stderr


def test_an_old_setuptools_is_named():
    result = setup("setuptools.__version__ = '76.1.0'")
    assert result.returncode == 1
    assert "bmtard: setuptools >= 77 is needed, found 76.1.0" in result.stderr


def configure(folder: Path, *options: str, **env):
    """CMake on the source tree; its messages on one line, as it wraps them."""
    if shutil.which("cmake", path=PATH) is None or shutil.which("ninja", path=PATH) is None:
        pytest.skip("cmake and ninja (bmtard[dev]) are not installed")
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder / "build"), *options]
    result = run([*command, f"-DPython_EXECUTABLE={sys.executable}"], **env)
    return result.returncode, " ".join(result.stderr.split())


def test_a_build_without_torch_says_what_to_do(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    code, message = configure(tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 1
    assert "torch is not installed" in message
    assert "Install torch >= 2.10 there, then pip install --no-build-isolation" in message


def test_a_build_with_an_old_torch_names_it(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    code, message = configure(tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 1
    assert "bmtard needs torch >= 2.10, found 2.9.1+cpu" in message


def test_cuda_that_is_required_and_missing_is_an_error(tmp_path):
    folders = {"/usr/local/cuda/bin"}
    folders |= {f for f in PATH.split(os.pathsep) if shutil.which("nvcc", path=f)}
    ignored = f"-DCMAKE_IGNORE_PATH={';'.join(sorted(folders))}"
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        if name in os.environ:
            pytest.skip(f"{name} names an nvcc")
    code, message = configure(tmp_path, ignored, "-DBMTARD_CUDA=1")
    assert code == 1
    assert "BMTARD_CUDA=1, but there is no nvcc on PATH, in CUDA_HOME or in CUDACXX" in message


def test_an_architecture_of_a_gpu_that_is_not_here_is_an_error(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    code, message = configure(tmp_path, "-DBMTARD_CUDA=1", "-DBMTARD_CUDA_ARCHS=native")
    assert code == 1
    if "there is no nvcc" in message:
        pytest.skip("nvcc is not here")
    assert "BMTARD_CUDA_ARCHS=native, but there is no GPU here; name the architectures" in message


def tracked() -> list[str]:
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def test_the_archive_holds_what_a_build_and_the_tests_need(tmp_path):
    """Every tracked file but those that serve the repository alone."""
    names = tracked()
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    code = "from setuptools.build_meta import build_sdist; build_sdist('out')"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "tree", check=True, capture_output=True
    )
    (archive,) = (tmp_path / "tree/out").glob("bmtard-*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    ours = {name for name in names if not name.startswith((".ci/", ".github/", ".gitignore"))}
    assert ours - held == set()


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("wheel_tool", ROOT / "tools/test_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(folder: Path, tag: str, *more: str) -> Path:
    wheel = folder / f"bmtard-0.1.0-py3-none-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(_library._LIBRARY, "bmtard/_C.so")
        for name in ("bmtard/benchmarks/ops/pgd_step.py", *more):
            archive.writestr(name, "")
    return wheel


@pytest.mark.skipif(not _library.NATIVE, reason="no compiled library to put into a wheel")
@pytest.mark.parametrize(
    ("tag", "more", "problem"),
    [
        ("manylinux_2_99_x86_64", (), ""),
        ("linux_x86_64", (), r"the tag is not py3-none-manylinux_<glibc>_<machine>"),
        ("manylinux_2_5_x86_64", (), r"needs glibc \(2, \d+\), and its tag says \(2, 5\)"),
        ("manylinux_2_99_x86_64", ("bmtard.libs/libc10-1f.so",), r"has bmtard.libs/libc10-1f.so"),
        ("manylinux_2_99_x86_64", ("bmtard.libs/libm.so.6",), r"has bmtard.libs/libm.so.6"),
    ],
)
def test_a_wheel_is_looked_at(tmp_path, tool, tag, more, problem):
    wheel = make_wheel(tmp_path, tag, *more)
    if not problem:
        tool.check_wheel(wheel)
        return
    with pytest.raises(SystemExit, match=problem):
        tool.check_wheel(wheel)


@pytest.mark.skipif(not _library.NATIVE, reason="no compiled library to put into a wheel")
def test_a_wheel_of_ten_megabytes_is_refused(tmp_path, tool, monkeypatch):
    monkeypatch.setattr(tool, "MAX_MEGABYTES", 0.01)
    with pytest.raises(SystemExit, match=r"MB is not below 0.01 MB"):
        tool.check_wheel(make_wheel(tmp_path, "manylinux_2_99_x86_64"))


def test_results_of_another_wheel_are_dropped(tmp_path, tool):
    path, wheel = tmp_path / "wheel.json", tmp_path / "one.whl"
    wheel.write_bytes(b"one")
    tool.record(path, wheel, "3.10:2.10", {"passed": 1, "short": True})
    tool.record(path, wheel, "3.11:2.10", {"passed": 2, "short": True})
    assert '"3.10:2.10"' in path.read_text()
    wheel.write_bytes(b"two")  # built again: the same name, another file
    tool.record(path, wheel, "3.11:2.10", {"passed": 3, "short": True})
    assert '"3.10:2.10"' not in path.read_text()


def test_the_release_runs_what_there_is(tool):
    """Its make targets exist, and its matrix is that of tools/test_wheel.py."""
    text = (ROOT / ".github/workflows/release.yml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"run: make ([\w-]+)", text)
    assert set(targets) == {"wheel", "sdist"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    pythons, torches = (re.search(rf"{name}: \[(.+)\]", text)[1] for name in ("python", "torch"))
    assert tuple(re.findall(r"[\d.]+", pythons)) == tool.PYTHONS
    assert tuple(re.findall(r"[\w.]+", torches)) == tool.TORCHES
