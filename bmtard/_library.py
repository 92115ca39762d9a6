"""Finds and loads the compiled library (placeholder until the build lands)."""

NATIVE = False


def has_cuda() -> bool:
    return False


def build_info() -> str:
    return "reference path"
