"""Checkpoints under the published layer names: the same logits, or a clear error."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import published_models as published
import pytest
import torch
from torch import Tensor, nn

from bmtard.models import build_model
from bmtard.models.checkpoints import load_pretrained


def same_logits(
    source: nn.Module,
    content: Any,
    path: Path,
    architecture: str,
    classes: int = 10,
    **options: Any,
) -> None:
    """Saves ``content`` and compares what is loaded with ``source``, in float64."""
    torch.save(content, path)
    loaded = load_pretrained(path, architecture, num_classes=classes, **options)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = source.double()(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(loaded.double()(x), expected, rtol=1e-6, atol=1e-6)


SOURCES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "trades": ("wrn-16-2", lambda: published.TradesWideResNet(16, 2, 10)),
    "trades, width 1": ("wrn-10-1", lambda: published.TradesWideResNet(10, 1, 10)),
    "deepmind": ("dm-wrn-16-2", lambda: published.DeepMindWideResNet(16, 2, 10, nn.SiLU())),
    "deepmind relu": (
        "dm-wrn-16-2-relu", lambda: published.DeepMindWideResNet(16, 2, 10, nn.ReLU())
    ),
    "resnet-18": (
        "resnet-18", lambda: published.PytorchCifarResNet(published.Basic, [2, 2, 2, 2], 10)
    ),
    "resnet-34": (
        "resnet-34", lambda: published.PytorchCifarResNet(published.Basic, [3, 4, 6, 3], 10)
    ),
    "resnet-50": (
        "resnet-50", lambda: published.PytorchCifarResNet(published.Bottle, [3, 4, 6, 3], 10)
    ),
    "preact-18": (
        "preact-resnet-18",
        lambda: published.PytorchCifarPreActResNet(published.PreAct, [2, 2, 2, 2], 10, bn=False),
    ),
    "preact-34 with bn": (
        "preact-resnet-34",
        lambda: published.PytorchCifarPreActResNet(published.PreAct, [3, 4, 6, 3], 10, bn=True),
    ),
    "preact-18 of the raw input": (
        "preact-resnet-18-raw",
        lambda: published.PytorchCifarPreActResNet(published.RawPreAct, [2, 2, 2, 2], 10, bn=False),
    ),
    "preact-18 of the raw input, with bn": (
        "preact-resnet-18-raw",
        lambda: published.PytorchCifarPreActResNet(published.RawPreAct, [2, 2, 2, 2], 10, bn=True),
    ),
    "resnet-20": ("resnet-20", lambda: published.CifarModelsResNet(20, 10)),
    "resnet-56": ("resnet-56", lambda: published.CifarModelsResNet(56, 10)),
    "mobilenet-v2": ("mobilenet-v2", lambda: published.PytorchCifarMobileNetV2(10)),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_published_architectures(name: str, tmp_path: Path) -> None:
    architecture, build = SOURCES[name]
    source = published.randomize(build())
    same_logits(source, source.state_dict(), tmp_path / "teacher.pt", architecture)


def small() -> nn.Module:
    return published.randomize(published.TradesWideResNet(10, 1, 7))


CONTENTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    **{
        name: lambda state, name=name: {name: state, "epoch": 3, "optimizer": {"state": {}}}
        for name in ("state_dict", "model_state_dict", "model", "net", "last")
    },
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "module.model.": lambda state: {
        "state_dict": {f"module.model.{key}": value for key, value in state.items()}
    },
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "nested": lambda state: {"model": {"state_dict": state}},
    "beside scalars": lambda state: {
        "net": state,
        "args": argparse.Namespace(lr=0.1),
        "acc": np.float64(84.9),
        "best": np.float32(0.5),
    },
    "float16": lambda state: {
        k: v.half() if v.is_floating_point() else v for k, v in state.items()
    },
    "no counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    "the robustness library": lambda state: {
        "model": {
            **{f"module.model.{key}": value for key, value in state.items()},
            **{f"module.attacker.model.{key}": value for key, value in state.items()},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_containers_and_prefixes(name: str, tmp_path: Path) -> None:
    source = small()
    if name == "float16":
        source = source.half().float()
    content = CONTENTS[name](source.state_dict())
    same_logits(source, content, tmp_path / "teacher.pt", "wrn-10-1", 7)


def test_normalisation_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    source = published.Standardized(small())
    same_logits(source, source.state_dict(), path, "wrn-10-1", 7)  # mu, sigma, model.conv1...
    state = small().state_dict() | {"mu": source.mu, "sigma": source.sigma}
    same_logits(source, {"state_dict": state}, path, "wrn-10-1", 7)
    front = published.Normalization()
    source = nn.Sequential(front, small())
    same_logits(source, source.state_dict(), path, "wrn-10-1", 7)  # 0.mean, 1.conv1...
    state = small().state_dict()
    for names in (
        ("normalize.mean", "normalize.std"),
        ("normalizer.new_mean", "normalizer.new_std"),
    ):
        content = {**state, **dict(zip(names, (front.mean, front.std), strict=True))}
        same_logits(source, content, path, "wrn-10-1", 7)
    torch.save({**state, "mu": front.mean}, path)
    with pytest.raises(ValueError, match=r"normalisation with a mean alone"):
        load_pretrained(path, "wrn-10-1", num_classes=7)


def test_given_normalisation(tmp_path: Path) -> None:
    front, network = published.Normalization(), small()
    source = nn.Sequential(front, network)
    statistics = {"mean": front.mean.tolist(), "std": front.std.tolist()}
    path = tmp_path / "teacher.pt"
    same_logits(source, network.state_dict(), path, "wrn-10-1", 7, **statistics)
    with pytest.raises(ValueError, match=r"give mean and std, or neither"):
        load_pretrained(path, "wrn-10-1", num_classes=7, mean=[0.5] * 3)
    with pytest.raises(ValueError, match=r"need the mean of 3 channels, got 2"):
        load_pretrained(path, "wrn-10-1", num_classes=7, mean=[0.5] * 2, std=[0.5] * 2)


def test_own_networks(tmp_path: Path) -> None:
    source = build_model("wrn-10-1", num_classes=7, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    published.randomize(source)
    same_logits(source, {"model": source.state_dict()}, tmp_path / "own.pt", "wrn-10-1", 7)


def test_a_mismatch_lists_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    state = small().state_dict()

    def message(architecture: str, classes: int = 7) -> str:
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"teacher\.pt does not fit") as error:
            load_pretrained(path, architecture, num_classes=classes)
        return str(error.value)

    assert "fit wrn-10-1 with 10 classes: 2 of another shape, the first head.weight [7, 64] for " \
        "[10, 64], head.bias [7] for [10]" in message("wrn-10-1", 10)  # fmt: skip
    text = message("wrn-16-1")
    assert "missing, the first blocks.1.norm1.weight, blocks.1.norm1.bias" in text
    text = message("resnet-20")
    assert "missing" in text
    assert "unexpected" in text
    del state["fc.bias"]
    state["extra.weight"] = torch.zeros(1)
    assert "1 missing, the first head.bias; 1 unexpected, the first extra.weight" in message(
        "wrn-10-1"
    )


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"

    def message(kind: type[Exception] = ValueError) -> str:
        with pytest.raises(kind) as error:
            load_pretrained(path, "wrn-10-1", num_classes=7)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in message(FileNotFoundError)
    path.mkdir()
    assert "is no file" in message(FileNotFoundError)
    path.rmdir()
    for content in (b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert message() == f"{path} is not a complete checkpoint: it is no file of torch.save"
    torch.save(small().state_dict(), path)
    whole = path.read_bytes()
    contents = {
        "empty": b"", "one byte": b"x", "text": b"not a checkpoint\n" * 50, "zeros": bytes(4096),
        "pickle": pickle.dumps([1, 2]), "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }  # fmt: skip
    for part in (1, 10, 50, 90, 99):
        contents[f"{part} %"] = whole[: len(whole) * part // 100]
    for name, content in contents.items():
        path.write_bytes(content)
        text = message()
        assert ("is not a complete checkpoint" in text) or ("holds no state dict" in text), name
    torch.save([torch.zeros(2)], path)
    assert "holds no state dict, got list" in message()
    torch.save({"epoch": 3}, path)
    assert "looked for tensors at the top and in state_dict" in message()


def test_no_code_of_the_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(small(), path)  # a pickled module
    with pytest.raises(ValueError, match=r"holds a \S*TradesWideResNet, .* could run code"):
        load_pretrained(path, "wrn-10-1", num_classes=7)

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "harm",)

    torch.save({"model": small().state_dict(), "x": Harmful()}, path)
    with pytest.raises(ValueError, match=r"which is not read"):
        load_pretrained(path, "wrn-10-1", num_classes=7)
    assert not (tmp_path / "harm").exists()


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of the user's own, found in the working directory."""
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.model = nn.Sequential(\n"
        "            nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, num_classes))\n"
        "    def forward(self, x):\n"
        "        return self.model(x)\n"
        "def make(num_classes, width=3): return Own(num_classes)\n"
        "def wrong(): return None\n"
        "def nothing(num_classes): return num_classes\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    source = published.randomize(build_model("own_networks:make", num_classes=10).network)
    path = tmp_path / "own.pt"
    same_logits(source, source.state_dict(), path, "own_networks:make")
    content = {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}
    same_logits(source, content, path, "own_networks:Own")
    for name, problem in (
        ("own_networks:wrong", r"called with num_classes alone: got an unexpected"),
        ("own_networks:number", r"called with num_classes alone: 3 is not a callable"),
        ("own_networks:nothing", r"must return a torch.nn.Module, got int"),
        ("own_networks:absent", r"own_networks has no absent"),
        ("no_such_module_here:f", r"cannot import no_such_module_here"),
    ):
        with pytest.raises(ValueError, match=problem):
            build_model(name, num_classes=10)
    with pytest.raises(ValueError, match=r"num_classes must be an int"):
        build_model("own_networks:make", num_classes="10")  # type: ignore[arg-type]
