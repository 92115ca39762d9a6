"""Imports at run time: optional dependencies, and what a user names as ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from types import ModuleType
from typing import Any


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports ``module``, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed: python -m pip install 'bmtard[{extra}]'"
        ) from error


def is_object_name(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:name``."""
    return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name) is not None


def import_object(name: str) -> Any:
    """Imports ``package.module:name``; modules in the working directory are found last.

    Raises ValueError naming what is not there.
    """
    if not is_object_name(name):
        raise ValueError(f"need package.module:name, got {name!r}")
    module_name, attribute = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name}: cannot import {module_name}: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{name}: {module_name} has no {attribute}")
    return getattr(module, attribute)
