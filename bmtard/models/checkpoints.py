"""Networks from published checkpoints, whose files name containers and layers in many ways."""

from __future__ import annotations

import argparse
import codecs
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import Normalize, build_network, check_model_name
from .mobilenet import STAGES, MobileNetV2
from .resnet import ResNet

CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "last", "best")
"""Keys under which a checkpoint keeps its state dict, in the order in which they are looked for."""

# Of wrappers around the network: DataParallel, torch.compile, a class or a Sequential that
# normalises first.
_PREFIX = re.compile(r"(module|model|net|network|basic_net|_orig_mod|1)\.")
# RobustBench: mu, sigma, mean, std; others: normalize.mean, normalizer.new_mean, 0.mean
_NORMALIZATION = re.compile(r"(?:(?:normali[sz]\w*|0)\.)?(?:new_)?(mean|mu|std|sigma)")
# The robustness library saves its network again in its attacker; the wide residual network of
# TRADES has a block that its forward does not use.
_UNUSED = re.compile(r"(attacker|sub_block1)\.")


_scalar = np.float64(0).__reduce__()[0]
# What checkpoints hold beside tensors: the options of the run and numpy's scalars.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    codecs.encode,
    np.dtype,
    *{type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")},
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_torch_file(path: Path, kind: str = "checkpoint") -> Any:
    """Reads a file of ``torch.save`` to the CPU with ``weights_only``: no code of it runs.

    Raises FileNotFoundError or ValueError, one line that names ``kind`` and path.
    """
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{kind} {path} {problem}")
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle from elsewhere; it is refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        if refused := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            raise ValueError(
                f"{path} holds a {refused[1]}, which is not read because loading it could run "
                "code: save the state dict of the network alone"
            ) from None
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if "weights_only" in reason:  # would send one to running the file's code
            reason = "it is no file of torch.save"
        raise ValueError(f"{path} is not a complete {kind}: {reason}") from None


def load_pretrained(
    path: str | Path,
    architecture: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Normalize:
    """A network from a checkpoint of RobustBench, TRADES and the like; frozen, in eval mode.

    The state dict may be in a container (``CONTAINERS``), its keys may have prefixes such as
    "module.", and the layers may have the names of TRADES, RobustBench, DeepMind, pytorch-cifar or
    pytorch-cifar-models. float32, whatever the file has. Inputs are images in [0, 1].

    architecture: see ``bmtard.models.MODEL_NAMES``. A PreActResNet without a last norm in the
    file is built without one.
    mean, std: of each channel, in [0, 1] units. Default: those in the file, else no normalisation.

    Raises FileNotFoundError, or ValueError with the first missing and unexpected keys.
    """
    path = Path(path).expanduser()
    check_model_name(architecture)
    if (mean is None) != (std is None):
        raise ValueError("load_pretrained: give mean and std, or neither")
    found = _state_dict(read_torch_file(path), path)
    # Values come from the file, so none are drawn. A function may hold more than parameters.
    builtin = ":" not in architecture
    with torch.device("meta" if builtin else "cpu"):
        network = build_network(architecture, num_classes=num_classes, in_channels=in_channels)
    state, statistics = _match(network, found, path)
    if architecture.startswith("preact") and not any(k.startswith("last_norm") for k in state):
        assert isinstance(network, ResNet)
        network.last_norm, network.ends_in_norm = nn.Identity(), False
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):  # absent in old files, and unused in eval mode
            state.setdefault(key, torch.zeros((), dtype=value.dtype))
    _check(network, state, f"{path} does not fit {architecture} with {num_classes} classes")
    network.load_state_dict(state, assign=builtin)
    if mean is None or std is None:
        mean = statistics.get("mean", [0.0] * in_channels)
        std = statistics.get("std", [1.0] * in_channels)
    if len(mean) not in (1, in_channels):
        raise ValueError(f"{path}: need the mean of {in_channels} channels, got {len(mean)}")
    return Normalize(network, list(mean), list(std)).eval().requires_grad_(False)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint's content, out of its containers."""
    while isinstance(content, Mapping):
        inner = [content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no state dict, got {type(content).__name__}")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and torch.is_tensor(v)}
    if not tensors:
        names = ", ".join(list(map(str, content))[:5]) or "nothing"
        raise ValueError(
            f"{path} holds no state dict: looked for tensors at the top and in "
            f"{', '.join(CONTAINERS)}, got {names}"
        )
    return tensors


def _match(
    network: nn.Module, found: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """The tensors under the names of ``network``, and the "mean" and "std" of the file."""
    wanted = network.state_dict().keys()
    state: dict[str, Tensor] = {}
    statistics: dict[str, list[float]] = {}
    for original, value in found.items():
        key = original
        while key not in wanted and (match := _PREFIX.match(key)):
            key = key[match.end() :]
        if key not in wanted:
            if _UNUSED.match(key):
                continue
            if match := _NORMALIZATION.fullmatch(key):
                name = "mean" if match[1] in ("mean", "mu") else "std"
                statistics[name] = value.double().flatten().tolist()
                continue
            key = _our_name(network, key)
        if key in state:
            raise ValueError(f"{path} holds {key} twice, the second time as {original}")
        state[key] = value.float() if value.is_floating_point() else value
    if len(statistics) == 1:
        raise ValueError(f"{path} holds a normalisation with a {next(iter(statistics))} alone")
    return state, statistics


def _check(network: nn.Module, state: dict[str, Tensor], problem: str) -> None:
    wanted = network.state_dict()

    def listing(kind: str, keys: Iterable[str]) -> str:
        names = list(keys)
        return f"{len(names)} {kind}, the first {', '.join(names[:3])}" if names else ""

    shapes = {k: (v.shape, wanted[k].shape) for k, v in state.items() if k in wanted}
    problems = [
        listing("missing", (key for key in wanted if key not in state)),
        listing("unexpected", (key for key in state if key not in wanted)),
        listing(
            "of another shape",
            (f"{k} {list(a)} for {list(b)}" for k, (a, b) in shapes.items() if a != b),
        ),
    ]
    if any(problems):
        raise ValueError(f"{problem}: {'; '.join(filter(None, problems))}")


# ---- published names -> ours ----

_HEAD = re.compile(r"(?:fc|linear|logits|classifier)\.(weight|bias)")
# stage and block: block1.layer.0. (TRADES), layer1.0. (pytorch-cifar), layer.0.block.0. (DeepMind)
_BLOCK = re.compile(r"(?:block(\d)\.layer|layer(\d)|layer\.(\d)\.block)\.(\d+)\.(.+)")


def _our_name(network: nn.Module, key: str) -> str:
    """The name in ``network`` of a tensor's published name; ``key`` itself if there is none."""
    if match := _HEAD.fullmatch(key):
        return f"head.{match[1]}"
    if isinstance(network, ResNet):
        return _resnet_name(network, key)
    return _mobilenet_name(key) if isinstance(network, MobileNetV2) else key


def _resnet_name(network: ResNet, key: str) -> str:
    if match := _BLOCK.fullmatch(key):
        block, layer, group, index, rest = match.groups()
        stage = int(group) if group else int(block or layer) - 1
        if not 0 <= stage < len(network.depths) or int(index) >= network.depths[stage]:
            return key
        shortcut = "shortcut." if network.preact else "shortcut.\\1."
        for pattern, ours in (
            (r"bn(\d)\.", r"norm\1."),
            (r"batchnorm_0\.", "norm1."),
            (r"batchnorm_1\.", "norm2."),
            (r"conv_0\.", "conv1."),
            (r"conv_1\.", "conv2."),
            (r"(?:shortcut|downsample)\.(\d)\.", shortcut),
            (r"convShortcut\.", "shortcut."),
        ):
            rest, count = re.subn(f"^{pattern}", ours, rest)
            if count:
                break
        return f"blocks.{sum(network.depths[:stage]) + int(index)}.{rest}"
    name, _, rest = key.partition(".")
    after = "last_norm" if network.preact else "stem_norm"
    outer = {"conv1": "stem", "init_conv": "stem", "bn1": after, "bn": after, "batchnorm": after}
    return f"{outer[name]}.{rest}" if name in outer else key


def _mobilenet_name(key: str) -> str:
    blocks = sum(count for _, _, count, _ in STAGES)
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", key):
        inner = {
            "conv1": "expand", "bn1": "norm1", "conv2": "depthwise", "bn2": "norm2",
            "conv3": "project", "bn3": "norm3",
        }  # fmt: skip
        name, _, rest = match[2].partition(".")
        if int(match[1]) >= blocks:
            return key
        return f"features.{3 + int(match[1])}.{inner.get(name, name)}.{rest}"
    name, _, rest = key.partition(".")
    outer = {"conv1": 0, "bn1": 1, "conv2": 3 + blocks, "bn2": 4 + blocks}
    return f"features.{outer[name]}.{rest}" if name in outer else key
