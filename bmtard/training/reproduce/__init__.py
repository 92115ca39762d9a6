"""Trains teachers and students under equal conditions, attacks them, and reports."""

from __future__ import annotations

from bmtard.training.reproduce.config import (
    REPRODUCE_PRESETS,
    ReproduceConfig,
    ReproduceEvaluation,
)
from bmtard.training.reproduce.run import reproduce

__all__ = ["REPRODUCE_PRESETS", "ReproduceConfig", "ReproduceEvaluation", "reproduce"]
