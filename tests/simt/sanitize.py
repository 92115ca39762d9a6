"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize``.

    python -m tests.simt.sanitize [pytest arguments]

Builds the module with both into build/simt-sanitized and runs the tests of this folder on it.
Python itself is not instrumented, so the runtime of AddressSanitizer has to be loaded before it.
Every array that a kernel gets ends where its memory ends, see harness.py.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from . import harness

SANITIZERS = "address,undefined"
REPORTED = 99  # the exit status after a report of AddressSanitizer
FOLDER = harness.ROOT / "build" / "simt-sanitized"


def build() -> Path:
    harness.build(FOLDER, SANITIZERS)
    return FOLDER


def environment(folder: Path = FOLDER) -> dict[str, str]:
    """What a Python that loads what was built in ``folder`` needs to be started with."""
    entries = json.loads((folder / "compile_commands.json").read_text())
    compiler = shlex.split(entries[0]["command"])[0]
    runtimes = []
    for library in ("libasan.so", "libstdc++.so.6"):  # the second throws the exceptions it watches
        query = [compiler, f"-print-file-name={library}"]
        path = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            raise harness.BuildError(f"{compiler} has no {library}, which AddressSanitizer needs")
        runtimes.append(path)
    return {
        "LD_PRELOAD": " ".join(runtimes),
        # Python never frees what lives as long as the process.
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={REPORTED}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main(arguments: list[str]) -> int:
    build()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    # Reports go to stderr, which pytest would take and lose with the process.
    command += ["--capture=sys", "--confcutdir", str(harness.SOURCE)]
    command += arguments or ["tests/simt"]
    environ = {**os.environ, **environment(), "BMTARD_SIMT_MODULE": str(FOLDER)}
    return subprocess.run(command, cwd=harness.ROOT, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
