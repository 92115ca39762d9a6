"""Settings from files and from words, by the rules of the command line."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmtard.extras import import_extra
from bmtard.training.config import PRESETS, TrainConfig


def with_arguments(config: TrainConfig, arguments: Sequence[str], source: str) -> TrainConfig:
    """``config`` with options of the command line. Raises ValueError naming ``source``."""
    tyro = import_extra("tyro", "train")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(TrainConfig, default=config, args=list(arguments))
    except SystemExit:
        words = re.sub(r"[\s─│╭╮╰╯]+|-{4,}", " ", said.getvalue()).partition("For full helptext")[0]
        raise ValueError(f"{source} cannot be set: {' '.join(words.split())}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """A TOML file, or a JSON file such as ``config.json`` of a run.

    Raises FileNotFoundError or ValueError naming the file.
    """
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"config {path}: its name must end in .toml or .json")
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            settings = json.loads(text)
        else:
            name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
            settings = import_extra(name, "train").loads(text)
    except ValueError as error:  # of the encoding, JSON or TOML
        raise ValueError(f"config {path}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"config {path}: it must hold settings by name")
    return settings


def as_arguments(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings, nested by name, as options of the command line."""
    arguments: list[str] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            arguments += as_arguments(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            arguments.append(f"--{prefix}{'' if value else 'no-'}{name}")
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{prefix}{name}", *map(str, values)]
    return arguments


def train_config(arguments: Sequence[str]) -> TrainConfig:
    """Of the command line ``[PRESET] [--config FILE] [--option ...]``; a preset, a file or both.

    A file may name its preset itself; its other settings have the names and the nesting of
    TrainConfig. Later ones win: preset, file, options.
    """
    tyro = import_extra("tyro", "train")
    path, rest = _split(list(arguments))
    if path is None:
        return tyro.extras.overridable_config_cli(PRESETS, prog="bmtard train", args=rest)
    settings = read_settings(path)
    preset = settings.pop("preset", None)
    if rest and not rest[0].startswith("-"):
        preset = rest.pop(0)
    if preset is not None and preset not in list(PRESETS):  # of a file, it may be anything
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    config = TrainConfig() if preset is None else PRESETS[preset][1]
    config = with_arguments(config, as_arguments(settings), f"config {path}")
    return tyro.cli(TrainConfig, default=config, prog=f"bmtard train --config {path}", args=rest)


def _split(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file of --config, and the other arguments."""
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments):
                raise ValueError("--config needs a file")
            return Path(arguments[index + 1]), arguments[:index] + arguments[index + 2 :]
        if argument.startswith("--config="):
            return Path(argument[len("--config=") :]), arguments[:index] + arguments[index + 1 :]
    return None, arguments
