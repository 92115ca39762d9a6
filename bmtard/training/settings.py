"""Settings from files and from words, by the rules of the command line."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bmtard.extras import import_extra
from bmtard.training.config import PRESETS, TrainConfig


def with_arguments(config: TrainConfig, arguments: Sequence[str], source: str) -> TrainConfig:
    """``config`` with options of the command line. Raises ValueError naming ``source``."""
    tyro = import_extra("tyro", "train")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return parsed(tyro.cli, TrainConfig, default=config, args=list(arguments))
    except ValueError as error:
        raise ValueError(f"{source} cannot be set: {error}") from None
    except SystemExit:
        raise ValueError(f"{source} cannot be set: Unrecognized options: --help") from None


def parsed(parse: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a parser of tyro returns. Its complaint, a box of lines, becomes a ValueError of one."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(*arguments, **options)
    except SystemExit as stop:
        if not stop.code:  # after --help
            raise
    text = re.sub(r"[\s─│╭╮╰╯]+|-{4,}", " ", said.getvalue()).partition("For full helptext")[0]
    words = " ".join(text.split())
    # A heading that says it again, and the names of our own classes.
    for noise in (r"Value error ", r"(.+?) (?=\1)", r"Error parsing (?!-)\S+: "):
        words = re.sub(rf"^{noise}", "", words)
    raise ValueError(words)


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
    except (ValueError, RecursionError) as error:  # of the encoding, JSON or TOML
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
        cli = tyro.extras.overridable_config_cli
        return parsed(cli, PRESETS, prog="bmtard train", args=rest)
    settings = read_settings(path)
    preset = settings.pop("preset", None)
    if rest and not rest[0].startswith("-"):
        preset = rest.pop(0)
    if preset is not None and preset not in list(PRESETS):  # of a file, it may be anything
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    config = TrainConfig() if preset is None else PRESETS[preset][1]
    config = with_arguments(config, as_arguments(settings), f"config {path}")
    prog = f"bmtard train --config {path}"
    return parsed(tyro.cli, TrainConfig, default=config, prog=prog, args=rest)


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
