"""The op library under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize-cpu``.

    python -m tests.sanitize_cpu [pytest arguments]

Builds the CPU kernels and the binding with both into build/cpu-sanitized and runs the op tests on
that library, once for each instruction set of this processor, or for that which
BMTARD_CPU_CAPABILITY names. A report ends the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .simt import sanitize

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cpu-sanitized"
LIBRARY = FOLDER / "_C.so"
# Reference tests run plain torch, of which nothing is instrumented.
TESTS = [
    *(
        f"tests/test_{name}.py"
        for name in (
            "softmax_entropy", "bisect_temperature", "multi_teacher_kl", "pgd_step", "balance",
            "losses", "attacks", "accuracy", "contracts",
        )
    ),
    "-k", "not reference",
]  # fmt: skip

# Reads four values that are forbidden, within an allocation: only an instrumented library sees it.
PROBE = """
import ctypes, torch, bmtard
logits = torch.zeros(3, 200)
ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(logits[1].data_ptr()), 16)
bmtard.softmax_entropy(logits)
"""


def build() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path) or sys.exit("sanitize-cpu needs cmake and ninja")
    options = {
        "Python_EXECUTABLE": sys.executable,
        "BMTARD_CUDA": "0",
        "BMTARD_SANITIZE": sanitize.SANITIZERS,
    }
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(FOLDER)]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    for command in (configure, [cmake, "--build", str(FOLDER)]):
        subprocess.run(command, env={**os.environ, "PATH": path}, check=True)


def main(arguments: list[str]) -> int:
    build()
    environ = {
        **os.environ,
        **sanitize.environment(FOLDER),
        "BMTARD_LIBRARY": str(LIBRARY),
        "BMTARD_REQUIRE_NATIVE": "1",
    }
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    if probe.returncode != sanitize.REPORTED or "use-after-poison" not in probe.stderr:
        print(probe.stderr, file=sys.stderr)
        print("sanitize-cpu: the probe's fault was not reported", file=sys.stderr)
        return 1
    # Reports go to stderr, which pytest would take and lose with the process.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys"]
    status = 0
    one = os.environ.get("BMTARD_CPU_CAPABILITY")
    for instruction_set in [one] if one else ["baseline", "avx2", "avx512"]:
        environ["BMTARD_CPU_CAPABILITY"] = instruction_set
        loads = [sys.executable, "-c", "import bmtard"]
        if subprocess.run(loads, cwd=ROOT, env=environ, stderr=subprocess.DEVNULL).returncode:
            print(f"sanitize-cpu: this processor has no {instruction_set}", flush=True)
            continue
        print(f"sanitize-cpu: {instruction_set}", flush=True)
        status |= subprocess.run(command + (arguments or TESTS), cwd=ROOT, env=environ).returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
