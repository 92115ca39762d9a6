"""Checkpoints: everything that a run needs to go on exactly, in one file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmtard.models import build_model

FORMAT = 1
"""Of the checkpoint's dictionary; raised when an old reader would misread it."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` beside ``path`` and renames it, so that ``path`` is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"bmtard_checkpoint": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of :func:`save` to the CPU; runs no code from the file.

    Raises FileNotFoundError or ValueError naming the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}") from None
    found = state.get("bmtard_checkpoint") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} is not a bmtard checkpoint of format {FORMAT}, got {found!r}")
    return state


def load_network(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a checkpoint, frozen and in eval mode, and the whole checkpoint."""
    state = load(path)
    network = build_model(**state["network"])
    network.load_state_dict(state["model"])
    return network.to(device).eval().requires_grad_(False), state
