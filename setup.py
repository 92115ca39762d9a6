"""Builds bmtard/_C.so with CMake and ships it in a py3-none-<platform> wheel.

The build itself is defined in CMakeLists.txt, the metadata in pyproject.toml. Environment:

BMTARD_CUDA            auto (default): CUDA kernels where nvcc is found; 1: required; 0: none
BMTARD_CUDA_ARCHS      e.g. "90", "80;90" or "native"; default: all that CMakeLists.txt lists
BMTARD_WERROR          1: warnings in bmtard's sources are errors
BMTARD_BUILD_TESTS     1: build the CUDA kernels for the CPU as well (tests/simt)
BMTARD_REQUIRE_NATIVE  1: fail where there is no C++ compiler, instead of going on without
MAX_JOBS               compilers to run at the same time
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

if int(__version__.split(".")[0]) < 77:  # without build isolation nothing else checks
    raise SystemExit(f"bmtard: setuptools >= 77 is needed, found {__version__}")
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def can_compile() -> bool:
    """Whether to compile; if not, bmtard is installed as pure Python."""
    required = os.environ.get("BMTARD_REQUIRE_NATIVE") == "1"
    if sys.platform == "win32":
        reason = "the kernels do not compile on Windows"
    elif sys.platform == "darwin" and not required:
        reason = "nobody has tested the kernels on macOS; BMTARD_REQUIRE_NATIVE=1 builds them"
    elif os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return True
    else:
        reason = "no C++ compiler found (CXX, c++, g++, clang++)"
    if required:
        raise SystemExit(f"bmtard: BMTARD_REQUIRE_NATIVE=1, but {reason}")
    print(f"bmtard: {reason}; installing the plain torch path only", file=sys.stderr)
    return False


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no CPython tag: it serves them all

    def build_extension(self, ext: Extension) -> None:
        # Two folders, because an editable install and a wheel may differ in architectures.
        build = ROOT / "build" / ("develop" if self.editable_mode else "wheel")
        scripts = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
        path = os.pathsep.join([*scripts, os.environ.get("PATH", os.defpath)])
        cmake = shutil.which("cmake", path=path)
        if cmake is None or shutil.which("ninja", path=path) is None:
            raise SystemExit("bmtard: cmake and ninja are needed: pip install cmake ninja")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "BMTARD_CUDA": os.environ.get("BMTARD_CUDA") or "auto",
            "BMTARD_CUDA_ARCHS": os.environ.get("BMTARD_CUDA_ARCHS") or "default",
            "BMTARD_WERROR": os.environ.get("BMTARD_WERROR") or "0",
            "BMTARD_BUILD_TESTS": os.environ.get("BMTARD_BUILD_TESTS") or "0",
        }
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        compile_ = [cmake, "--build", str(build)]
        if jobs := os.environ.get("MAX_JOBS"):
            compile_ += ["--parallel", jobs]
        for command in (configure, compile_):
            if subprocess.run(command, env={**os.environ, "PATH": path}).returncode:
                raise SystemExit(f"bmtard: failed: {' '.join(command)}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has the old one loaded keeps it
        shutil.copyfile(build / "_C.so", target)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("bmtard._C", sources=[])] if can_compile() else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
