"""Checkpoints: everything that a run needs to go on exactly, in one file."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmtard.models import build_model
from bmtard.models.checkpoints import read_torch_file
from bmtard.training.files import write_bytes

FORMAT = 1
"""Of the checkpoint's dictionary; raised when an old reader would misread it."""


def save(path: Path, state: dict[str, Any], *, previous: Path | None = None) -> None:
    """Writes ``state`` so that ``path`` is never half a file; its old content becomes ``previous``.

    Raises OSError, one line that names ``path``; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In memory first: torch.save hides why a file cannot be written.
    content = io.BytesIO()
    torch.save({"bmtard_checkpoint": FORMAT, **state}, content)
    if previous is not None and path.exists():
        # A second name, so that path is there all the time.
        temporary = path.with_name(f"{previous.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a file system without links keeps one checkpoint
            os.link(path, temporary)
            os.replace(temporary, previous)
        # A rename between two names of one file leaves both.
        temporary.unlink(missing_ok=True)
    write_bytes(path, content.getbuffer())


def resumable(folder: Path) -> bool:
    """Whether a run can go on from a checkpoint in ``folder``."""
    return any((folder / name).exists() for name in ("last.pt", "previous.pt"))


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of :func:`save` to the CPU; runs no code from the file.

    Raises FileNotFoundError or ValueError naming the path.
    """
    state = read_torch_file(path)
    found = state.get("bmtard_checkpoint") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} is not a bmtard checkpoint of format {FORMAT}, got {found!r}; for a network "
            "from elsewhere say its architecture"
        )
    return _Checkpoint(state, path=path)


class _Checkpoint(dict[str, Any]):
    """A checkpoint that names its file where an entry is missing."""

    def __init__(self, state: dict[str, Any], *, path: Path) -> None:
        super().__init__(state)
        self.path = path

    def __missing__(self, entry: str) -> Any:
        raise ValueError(f"{self.path} is incomplete: it has no entry {entry!r}")


def load_network(
    path: Path, device: torch.device | str = "cpu", function: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a checkpoint, frozen and in eval mode, and the whole checkpoint.

    function: the ``package.module:function`` that makes the network, where one does: a file alone
    cannot make this process run code.
    """
    state = load(path)
    try:
        options, weights = dict(state["network"]), state["model"]
        name = str(options["name"])
        if ":" in name and name != function:
            raise ValueError(
                f"its network is made by the function {name}, which is called only where you name "
                "it as the model"
            )
        network = build_model(**options)
        network.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds no network that can be built: {reason}") from None
    return network.to(device).eval().requires_grad_(False), state
