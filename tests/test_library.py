"""Finding, loading and describing the compiled library, and going on without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bmtard
from bmtard import _library

PACKAGE = Path(bmtard.__file__).parent
OP = "print(bmtard.softmax_entropy(torch.zeros(1, 4)).item())"  # log 4, on every path

needs_native = pytest.mark.skipif(
    not _library.NATIVE, reason="no compiled library (an error with BMTARD_REQUIRE_NATIVE=1)"
)


def run(code: str, folder: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh Python that takes bmtard from ``folder``."""
    names = [name for name in os.environ if not name.startswith(("BMTARD_", "PYTHONPATH"))]
    environ = {name: os.environ[name] for name in names}
    return subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
        cwd=folder or PACKAGE.parent,
        env=environ | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    """A folder with a copy of the package, but without its library."""
    shutil.copytree(PACKAGE, tmp_path / "bmtard", ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


IMPORT = """
import sys, torch

calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call"

before = set(sys.modules)
sys.setprofile(count)
import bmtard
sys.setprofile(None)
print(calls, *sorted(set(sys.modules) - before))
"""


def test_import_adds_little_to_torch():
    """The ops and the balance, and little work in them: about 4,000 Python calls."""
    result = run(IMPORT)
    assert result.returncode == 0, result.stderr
    calls, *modules = result.stdout.split()
    ours = {name.partition(".")[2].split(".")[0] for name in modules}
    assert {name.split(".")[0] for name in modules} == {"bmtard"}
    assert ours == {"", "_library", "balance", "ops", "reference", "types"}
    assert int(calls) < 20_000


@needs_native
def test_build_info_describes_the_library():
    info = bmtard.build_info()
    assert info.native
    assert info.reason == ""
    assert info.library == PACKAGE / "_C.so"
    assert info.torch_running == torch.__version__
    assert info.torch_target == "2.10"
    assert info.instruction_set in {"baseline", "avx2", "avx512"}
    assert info.cuda == _library.has_cuda() == bool(info.cuda_architectures)
    assert info.cuda == (info.cuda_runtime is not None)
    for part in (info.version, torch.__version__, info.instruction_set, str(info.library)):
        assert part in str(info)


@needs_native
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_instruction_set_can_be_chosen(instruction_set):
    best = run("import bmtard; print(bmtard.build_info().instruction_set)").stdout.strip()
    order = ["baseline", "avx2", "avx512"]
    if order.index(instruction_set) > order.index(best):
        pytest.skip(f"this machine has {best}")
    result = run(
        f"import torch, bmtard; print(bmtard.build_info().instruction_set); {OP}",
        BMTARD_CPU_CAPABILITY=instruction_set,
    )
    assert result.returncode == 0, result.stderr
    chosen, entropy = result.stdout.split()
    assert chosen == instruction_set
    assert float(entropy) == pytest.approx(1.3862943611)


@needs_native
def test_unknown_instruction_set_is_named():
    result = run("import bmtard", BMTARD_CPU_CAPABILITY='"sse"')
    assert result.returncode == 1
    message = "BMTARD_CPU_CAPABILITY must be baseline, avx2 or avx512, got 'sse'"
    assert f"ImportError: bmtard: {message}" in result.stderr


def test_without_library_warns_once_and_works(bare_package):
    result = run(f"import torch, bmtard; {OP}; print(bmtard.build_info())", bare_package)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1
    assert "without its compiled kernels: there is no" in result.stderr
    assert float(result.stdout.split()[0]) == pytest.approx(1.3862943611)
    assert "plain torch: there is no" in result.stdout


def test_sources_before_an_installation_are_named(bare_package, tmp_path_factory):
    installed = tmp_path_factory.mktemp("site-packages") / "bmtard"
    shutil.copytree(bare_package / "bmtard", installed)
    (installed / "_C.so").touch()
    result = run(f"import torch, bmtard; {OP}", bare_package, PYTHONPATH=str(installed.parent))
    assert result.returncode == 0, result.stderr
    assert f"and not {installed}, which is installed: run it in another folder" in result.stderr


@pytest.mark.parametrize("library", ["/none.so", "/no/such/folder/none.so"])
def test_a_library_by_name_that_is_missing_is_named(library):
    result = run("import bmtard", BMTARD_LIBRARY=library)
    assert result.returncode == 0, result.stderr
    assert f"there is no {library}, which BMTARD_LIBRARY names" in result.stderr


def test_modules_are_there_without_an_import_of_their_own():
    code = "import bmtard; print(bmtard.losses.kd_loss, bmtard.attacks.pgd, bmtard.dropin.hat_loss)"
    assert run(code).returncode == 0
    assert "has no attribute 'nothing'" in run("import bmtard; bmtard.nothing").stderr


def test_without_library_require_native_fails(bare_package):
    result = run("import bmtard", bare_package, BMTARD_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "ImportError: BMTARD_REQUIRE_NATIVE=1, but there is no" in result.stderr


def test_broken_library_is_named(bare_package):
    (bare_package / "bmtard" / "_C.so").write_bytes(b"not a library")
    result = run(f"import torch, bmtard; {OP}", bare_package)
    assert result.returncode == 0, result.stderr
    assert "_C.so cannot be loaded" in result.stderr


@needs_native
def test_old_torch_is_refused():
    code = "import torch; torch.__version__ = '2.9.1'; import bmtard"
    result = run(f"{code}; {OP}")
    assert result.returncode == 0, result.stderr
    assert "torch 2.9.1 is older than 2.10" in result.stderr


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        *(((7, 0), False), ((7, 5), True), ((8, 0), True), ((8, 7), True), ((9, 0), True)),
        # Machine code for 10.0 runs on 10.3; PTX of 12.0 on 12.1 and 13.0, but not on 11.0.
        *(((10, 3), True), ((11, 0), False), ((12, 1), True), ((13, 0), True)),
    ],
)
def test_which_gpus_the_architectures_serve(capability, served):
    built = ("75", "80", "86", "89", "90", "100", "120")
    assert _library.runs_on(built, capability) == served


def test_no_architecture_serves_no_gpu():
    assert not _library.runs_on((), (9, 0))


class CudaTensor:
    """What use_native asks of a tensor on a GPU."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda:0")


@needs_native
@pytest.mark.parametrize(
    ("has_cuda", "hip", "driver", "capability", "problem"),
    [
        (True, None, 13000, (9, 0), ""),
        (True, None, 0, (9, 0), ""),  # a torch that does not tell
        (True, None, 12080, (9, 0), r"runtime 13.0, and the driver is older: it serves CUDA 12.8"),
        (True, None, 13000, (7, 0), r"Some GPU has compute capability 7.0, .* for 75, 90; build"),
        (True, "7.0", 13000, (9, 0), "do not run on ROCm"),
        (False, None, 13000, (9, 0), "was built without CUDA"),
    ],
)
def test_why_a_gpu_is_not_served(monkeypatch, has_cuda, hip, driver, capability, problem):
    info = {"cuda_runtime": 13000, "cuda_architectures": "75;90"}
    monkeypatch.setattr(_library, "_INFO", info)
    monkeypatch.setattr(_library, "_HAS_CUDA", has_cuda)
    monkeypatch.setattr(_library, "_cuda_problems", {})
    monkeypatch.setattr(bmtard.ops._dispatch, "_warned", set())
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    if not problem:
        assert bmtard.ops.use_native(CudaTensor())
        return
    with pytest.warns(RuntimeWarning, match=rf"plain-torch path on device 'cuda:0', .*{problem}"):
        assert not bmtard.ops.use_native(CudaTensor())
    assert not bmtard.ops.use_native(CudaTensor())  # silent: warnings are errors here


@needs_native
@pytest.mark.parametrize(
    "call", ["bmtard.softmax_entropy(x)", "bmtard.BMTARDLoss().to('meta')([x, x], [x, x])"]
)
def test_a_warning_names_the_line_of_the_caller(tmp_path, call):
    (tmp_path / "caller.py").write_text(
        f"import torch, bmtard\nx = torch.zeros(2, 3, device='meta')\n\n{call}\n"
    )
    folders = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    result = run("import caller", PYTHONPATH=folders)
    assert re.search(r"caller.py:4: RuntimeWarning: bmtard uses the slower", result.stderr)


def test_the_warning_of_an_import_names_its_line(bare_package):
    (bare_package / "caller.py").write_text("\nimport bmtard\n")
    result = run("import caller", bare_package)
    assert "caller.py:2: RuntimeWarning: bmtard runs in plain torch" in result.stderr


def test_without_torch_the_import_names_it():
    result = run("import sys; sys.modules['torch'] = None; import bmtard")
    assert result.returncode == 1
    assert "ImportError: bmtard needs torch >= 2.10: pip install 'torch>=2.10'" in result.stderr


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ("win32", "the kernels do not compile on Windows"),
        ("darwin", "on macOS it is built only with BMTARD_REQUIRE_NATIVE=1"),
        ("linux", "it needs a C[+][+] compiler"),
    ],
)
def test_systems_without_a_library_run_in_plain_torch(bare_package, system, reason):
    code = f"import torch, sys; sys.platform = {system!r}; import bmtard; {OP}"
    result = run(code, bare_package)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(1.3862943611)
    assert re.search(f"without its compiled kernels: there is no .*; {reason}", result.stderr)


def test_a_library_for_another_c_library_is_told(bare_package):
    (bare_package / "bmtard" / "_C.so").write_bytes(b"not a library")
    musl = "import torch, platform; platform.libc_ver = lambda: ('', '')"
    result = run(f"{musl}; import bmtard; {OP}", bare_package)
    assert result.returncode == 0, result.stderr
    assert "this system's C library is not glibc, so build bmtard here" in result.stderr


@needs_native
def test_cuda_problem_is_a_constant_for_torch_compile():
    @torch.compile(backend="eager", fullgraph=True)
    def longer(x: torch.Tensor) -> torch.Tensor:
        return x + len(_library.cuda_problem(x.device.index))

    assert longer(torch.zeros(1)).item() == len(_library.cuda_problem(None))
