"""Optional dependencies, asked for by the name of the extra that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports ``module``, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed: python -m pip install 'bmtard[{extra}]'"
        ) from error
