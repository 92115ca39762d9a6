"""bmtard: Balanced Multi-Teacher Adversarial Robustness Distillation on fused kernels."""

from bmtard import attacks, dropin, losses
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
    "attacks",
    "bisect_temperature",
    "build_info",
    "dropin",
    "losses",
    "multi_teacher_kl",
    "pgd_step_",
    "softmax_entropy",
]
