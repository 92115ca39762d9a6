"""tools/gpu_bundle.py: what is in the bundle, and that its script runs from the bundle alone."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmtard.data import load_cifar10

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / ".git").exists():
    pytest.skip("the bundle takes the files that git knows", allow_module_level=True)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_bundle", ROOT / "tools" / "gpu_bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def fetch_wheels(to, python):
        to.mkdir()
        with zipfile.ZipFile(to / "lacking-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("lacking.py", "here = True\n")
            wheel.writestr("lacking-1.0.dist-info/METADATA", "Name: lacking\nVersion: 1.0\n")
            wheel.writestr("lacking-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
            wheel.writestr("lacking-1.0.dist-info/RECORD", "")

    monkeypatch.setattr(module, "fetch_wheels", fetch_wheels)
    (tmp_path / "_C.so").write_bytes(b"library")
    module.library = tmp_path / "_C.so"
    module.out = tmp_path / "bundle"
    module.pack = lambda *more: module.main(
        ["--out", str(module.out), "--library", str(module.library), *more]
    )
    return module


def jpeg_npz(folder, count):
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(buffer, "JPEG")
    one = np.frombuffer(buffer.getvalue(), np.uint8)
    arrays = {"class_names": np.array([f"class {k}" for k in range(10)])}
    for split in ("train", "test"):
        arrays[f"{split}_jpeg"] = np.tile(one, count)
        arrays[f"{split}_offset"] = np.arange(count + 1, dtype=np.uint32) * len(one)
        arrays[f"y_{split}"] = np.arange(count, dtype=np.uint8) % 10
    folder.mkdir()
    np.savez(folder / "cifar10.npz", **arrays)


def test_the_bundle_holds_the_checkout_and_the_library(tool):
    assert tool.pack() == 0
    assert (tool.out / "bmtard" / "_C.so").read_bytes() == b"library"
    for name in ("tools/gpu_check.py", "tools/gpu_tune.py", "tests/test_cuda_kernels.py"):
        assert (tool.out / name).read_text() == (ROOT / name).read_text()
    assert not list((tool.out / "benchmarks" / "results").glob("*.json"))
    assert os.access(tool.out / "run.sh", os.X_OK)


def test_only_a_bundle_is_replaced(tool):
    tool.out.mkdir()
    (tool.out / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="is there and is no bundle"):
        tool.pack()
    assert (tool.out / "thesis.tex").read_text() == "years of work"
    (tool.out / "run.sh").touch()
    assert tool.pack() == 0
    assert not (tool.out / "thesis.tex").exists()


def test_the_images_are_the_first_ones(tool, tmp_path):
    jpeg_npz(tmp_path / "images", 20)
    assert tool.pack("--data", str(tmp_path / "images"), "--images", "12", "3") == 0
    found = load_cifar10(tool.out / "data")
    assert found.train_labels.tolist() == [k % 10 for k in range(12)]
    assert sorted(found.test_labels.tolist()) == [0, 1, 2]  # sorted data is mixed when it is read


def test_a_bundle_that_cannot_travel_is_refused(tool, monkeypatch):
    monkeypatch.setattr(tool, "LIMIT_MB", 0.1)
    with pytest.raises(SystemExit, match=r"MB are more than 0\.1"):
        tool.pack()


def test_a_folder_without_images_is_refused(tool, tmp_path):
    with pytest.raises(SystemExit, match="no cifar10"):
        tool.pack("--data", str(tmp_path))


def test_the_script_runs_from_the_bundle_alone(tool, tmp_path):
    """A Python that prints what it gets stands in for that of the machine."""
    tool.pack()
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        'if [ "$1" = -m ]; then mkdir site.new && touch site.new/lacking.py; exit; fi\n'
        'echo "$PYTHONPATH|$*"\n'
    )
    python.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    command = ["bash", str(tool.out / "run.sh"), "smoke", "tests", "--stand-in"]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=True)
    path, _, arguments = done.stdout.strip().partition("|")
    assert path == f"{tool.out}:{tool.out}/site"
    assert arguments == "tools/gpu_check.py --out results --stand-in --part smoke tests"
    assert (tool.out / "site" / "lacking.py").is_file()
