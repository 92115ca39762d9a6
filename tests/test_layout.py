"""The dependency rules of the source tree, checked on every file, and each shown able to fail.

core <- cpu, cuda <- csrc/ops; _library <- ops/ <- everything else; kernels know no torch.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import those of its own row and of the rows above it.
LAYERS = [
    {"types", "_library", "extras"},
    {"reference"},
    {"ops"},
    {"balance", "losses", "attacks", "dropin"},
    {"models", "data"},
    {"training"},
    {"benchmarks"},
    {"cli", "__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
LEVEL["__init__"] = LEVEL["balance"]

# What bmtard needs to run; everything else belongs to an extra and is imported where used.
RUNTIME = set(sys.stdlib_module_names) | {"torch", "numpy", "bmtard"}
CORE_MODULES = set.union(*LAYERS[:4]) | {"__init__"}

STANDARD_HEADERS = {"cfloat", "climits", "cmath", "cstddef", "cstdint", "limits"}
STABLE_TORCH = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|torch\.h|Python\.h")
DEVICE_INTRINSIC = re.compile(
    r"\b(__shfl\w*|__sync\w*|__ballot\w*|__any_sync|__all_sync|__activemask|__ldg|__stg|__ld\w*|"
    r"__nanosleep|__threadfence\w*|threadIdx|blockIdx|blockDim|gridDim|warpSize|atomic[A-Z]\w+|"
    r"cooperative_groups|cg|asm)\b"
)


def code_of(text: str) -> str:
    """C++ without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', code_of(text), flags=re.MULTILINE)


def core_stands_alone(path: PurePosixPath, text: str) -> Iterator[str]:
    """csrc/core includes mathematics of the standard library, itself and kernels.h."""
    if path.match("csrc/core/*"):
        for header in includes(text):
            local = "/" not in header and header.endswith(".h")
            if not (local or header == "../kernels.h" or header in STANDARD_HEADERS):
                yield f"includes {header}"


def is_binding(path: PurePosixPath) -> bool:
    return path.match("csrc/ops.cpp") or path.match("csrc/ops/*")


def kernels_know_no_torch(path: PurePosixPath, text: str) -> Iterator[str]:
    """Of csrc, only the binding includes a header of torch, and none includes one of Python."""
    if path.parts[0] == "csrc" and not is_binding(path):
        yield from (f"includes {header}" for header in includes(text) if TORCH_HEADER.match(header))


def binding_is_stable(path: PurePosixPath, text: str) -> Iterator[str]:
    """csrc/ops.cpp and csrc/ops/ include torch only where it promises a stable ABI."""
    if is_binding(path):
        for header in includes(text):
            if TORCH_HEADER.match(header) and not header.startswith(STABLE_TORCH):
                yield f"includes {header}"


def cpu_and_cuda_are_apart(path: PurePosixPath, text: str) -> Iterator[str]:
    """csrc/cpu includes nothing of csrc/cuda, csrc/cuda nothing of csrc/cpu."""
    for mine, other in (("cpu", "cuda"), ("cuda", "cpu")):
        if path.match(f"csrc/{mine}/*"):
            yield from (f"includes {name}" for name in includes(text) if f"{other}/" in name)


def only_simt_has_intrinsics(path: PurePosixPath, text: str) -> Iterator[str]:
    """CUDA intrinsics stand in csrc/cuda/simt.cuh alone, so that tests/simt can replace them."""
    if path.match("csrc/cuda/*") and path.name != "simt.cuh":
        yield from (f"uses {name}" for name in sorted(set(DEVICE_INTRINSIC.findall(code_of(text)))))


def module_of(path: PurePosixPath) -> str:
    """bmtard/balance.py -> balance; bmtard/ops/pgd_step.py -> ops."""
    return PurePosixPath(path.parts[1]).stem


def imports(path: PurePosixPath, nodes: list[ast.AST]) -> Iterator[str]:
    """Absolute dotted names of what is imported."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_point_down(path: PurePosixPath, text: str) -> Iterator[str]:
    """A module imports bmtard modules of its own layer or below."""
    if path.parts[0] != "bmtard" or path.suffix != ".py":
        return
    module = module_of(path)
    if module not in LEVEL:
        yield f"bmtard.{module} has no layer in tests/test_layout.py"
        return
    for name in imports(path, list(ast.walk(ast.parse(text)))):
        parts = [*name.split("."), "__init__"]
        if parts[0] == "bmtard" and LEVEL.get(parts[1], LEVEL["__init__"]) > LEVEL[module]:
            yield f"imports {name}"


def core_needs_torch_and_numpy_only(path: PurePosixPath, text: str) -> Iterator[str]:
    """What `import bmtard` and `bmtard bench` load imports the standard library, torch and numpy
    at its top."""
    if path.parts[0] == "bmtard" and module_of(path) in CORE_MODULES | {"benchmarks"}:
        for name in imports(path, ast.parse(text).body):
            if name.split(".")[0] not in RUNTIME:
                yield f"imports {name}"


def benchmarks_point_down(path: PurePosixPath, text: str) -> Iterator[str]:
    """In bmtard/benchmarks the providers import the ops, and the ops no provider."""
    if path.match("bmtard/benchmarks/*.py") or path.match("bmtard/benchmarks/ops/*.py"):
        for name in imports(path, list(ast.walk(ast.parse(text)))):
            if name.startswith("bmtard.benchmarks.providers"):
                yield f"imports {name}"


def version_stands_once(path: PurePosixPath, text: str) -> Iterator[str]:
    """The version of bmtard is written in pyproject.toml and nowhere else."""
    if path.name != "pyproject.toml" and not path.match("tests/*"):
        pattern = r"""^\s*(?:__version__|version|VERSION)\s*[=:]\s*["']?\d[^\n]*"""
        yield from (f"says {m.strip()}" for m in re.findall(pattern, text, flags=re.MULTILINE))


Rule = Callable[[PurePosixPath, str], Iterator[str]]

# Each rule with a file that breaks it and one that keeps it.
RULES: list[tuple[Rule, tuple[str, str], tuple[str, str]]] = [
    (
        core_stands_alone,
        ("csrc/core/a.h", "#include <vector>"),
        ("csrc/core/a.h", '#include <cmath>\n#include "common.h"\n#include "../kernels.h"'),
    ),
    (
        kernels_know_no_torch,
        ("csrc/cuda/a.cu", "#include <ATen/ATen.h>"),
        ("csrc/cuda/a.cu", "// #include <ATen/ATen.h>"),
    ),
    (
        kernels_know_no_torch,
        ("csrc/cpu/a.cpp", '#include "torch/csrc/stable/tensor.h"'),
        ("csrc/ops.cpp", '#include "torch/csrc/stable/tensor.h"'),
    ),
    (
        kernels_know_no_torch,
        ("csrc/arguments.h", '#include "torch/csrc/stable/tensor.h"'),
        ("csrc/ops/tensors.h", '#include "torch/csrc/stable/tensor.h"'),
    ),
    (
        binding_is_stable,
        ("csrc/ops.cpp", "#include <torch/library.h>"),
        ("csrc/ops.cpp", "#include <torch/csrc/stable/library.h>"),
    ),
    (
        binding_is_stable,
        ("csrc/ops/a.cpp", "#include <torch/extension.h>"),
        ("csrc/ops/a.cpp", "#include <torch/csrc/stable/ops.h>"),
    ),
    (
        cpu_and_cuda_are_apart,
        ("csrc/cpu/a.cpp", '#include "../cuda/simt.cuh"'),
        ("csrc/cpu/a.cpp", '#include "../core/common.h"'),
    ),
    (
        only_simt_has_intrinsics,
        ("csrc/cuda/a.cu", "int i = threadIdx.x; __syncthreads(); // plain"),
        ("csrc/cuda/simt.cuh", "int i = threadIdx.x; __syncthreads();"),
    ),
    (
        imports_point_down,
        ("bmtard/ops/a.py", "from bmtard.balance import BMTARDLoss"),
        ("bmtard/ops/a.py", "from bmtard import _library, reference\nfrom . import _checks"),
    ),
    (
        imports_point_down,
        ("bmtard/models/wide.py", "def f():\n  from ..training import run"),
        ("bmtard/models/wide.py", "from .. import ops\nfrom . import blocks"),
    ),
    (
        imports_point_down,
        ("bmtard/unheard_of.py", ""),
        ("bmtard/cli.py", "import bmtard.training.run"),
    ),
    (
        imports_point_down,
        ("bmtard/ops/a.py", "from bmtard.benchmarks import spec"),
        ("bmtard/benchmarks/ops/a.py", "from bmtard.training import report\nfrom ..spec import Op"),
    ),
    (
        imports_point_down,
        ("bmtard/benchmarks/ops/a.py", "from bmtard.cli import main"),
        ("bmtard/cli.py", "from bmtard.benchmarks import cli"),
    ),
    (
        core_needs_torch_and_numpy_only,
        ("bmtard/benchmarks/providers/a.py", "import sklearn"),
        ("bmtard/benchmarks/table.py", "from .spec import Op\ndef f():\n  import rich"),
    ),
    (
        benchmarks_point_down,
        ("bmtard/benchmarks/ops/a.py", "def f():\n  from ..providers import eager"),
        ("bmtard/benchmarks/providers/b.py", "from .eager import entropy\nfrom ..ops import a"),
    ),
    (
        core_needs_torch_and_numpy_only,
        ("bmtard/ops/a.py", "import scipy.stats"),
        ("bmtard/losses.py", "import math, torch\ndef f():\n  import matplotlib"),
    ),
    (
        version_stands_once,
        ("bmtard/__init__.py", '__version__ = "0.1.0"'),
        ("pyproject.toml", 'version = "0.1.0"'),
    ),
]


def tracked_files() -> list[str]:
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    suffixes = (".py", ".h", ".cuh", ".cpp", ".cu", ".txt", ".toml", ".cff", ".cmake")
    return [name for name in names if name.endswith(suffixes) and (ROOT / name).is_file()]


@pytest.mark.parametrize("rule", sorted({rule for rule, _, _ in RULES}, key=lambda r: r.__name__))
def test_tree_keeps(rule):
    names = tracked_files()
    assert "csrc/kernels.h" in names
    assert "bmtard/ops/pgd_step.py" in names
    broken = [
        f"{name}: {problem}"
        for name in names
        for problem in rule(PurePosixPath(name), (ROOT / name).read_text())
    ]
    assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


@pytest.mark.parametrize(("rule", "bad", "good"), RULES)
def test_rule_can_fail(rule, bad, good):
    assert list(rule(PurePosixPath(bad[0]), bad[1]))
    assert not list(rule(PurePosixPath(good[0]), good[1]))


def schema_names(text: str) -> set[str]:
    return set(re.findall(r'\.def\(\s*"(\w+)\(', code_of(text)))


def test_every_op_is_wrapped():
    """Every op of the schema is called and has a fake kernel in bmtard/ops."""
    assert schema_names('m.def("a(Tensor x) -> Tensor");\n  m.def(\n"b_(') == {"a", "b_"}
    ops = schema_names((ROOT / "csrc/ops.cpp").read_text())
    python = "\n".join(path.read_text() for path in ROOT.glob("bmtard/ops/*.py"))
    assert ops == set(re.findall(r"\bnative\.(\w+)\(", python))
    defined = set(re.findall(r'\.define\(\s*"(\w+)\(', python))
    assert ops | defined == set(re.findall(r'@register_fake\("(\w+)"\)', python))


def test_installed_version_is_the_one_in_pyproject():
    from importlib.metadata import version

    import bmtard

    written = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written is not None
    assert bmtard.build_info().version == version("bmtard") == written[1]
