"""bmtard: Balanced Multi-Teacher Adversarial Robustness Distillation on fused kernels."""

import importlib
from types import ModuleType

from bmtard._library import build_info
from bmtard.balance import BMTARDLoss, EntropyBalance, NormalizationLossBalance
from bmtard.ops import bisect_temperature, multi_teacher_kl, pgd_step_, softmax_entropy
from bmtard.types import BalanceStatus, SearchStatus, TemperatureSearch

__all__ = [
    "BMTARDLoss",
    "BalanceStatus",
    "EntropyBalance",
    "NormalizationLossBalance",
    "SearchStatus",
    "TemperatureSearch",
    "bisect_temperature",
    "build_info",
    "multi_teacher_kl",
    "pgd_step_",
    "softmax_entropy",
]


def __getattr__(name: str) -> ModuleType:
    """Loads what the ops do not need at first use."""
    if name in ("attacks", "dropin", "losses"):
        return importlib.import_module(f"bmtard.{name}")
    raise AttributeError(f"module 'bmtard' has no attribute {name!r}")
