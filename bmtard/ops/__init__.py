"""The public ops, one file each: contract, autograd, fake kernels.

Every argument is checked here, once; the compiled kernels trust what they get.
"""

from bmtard.ops._checks import MAX_TEACHERS
from bmtard.ops._dispatch import use_native
from bmtard.ops.bisect_temperature import bisect_temperature
from bmtard.ops.bmtard_loss import balanced_pairs, bmtard_loss, check_constant
from bmtard.ops.multi_teacher_kl import multi_teacher_kl
from bmtard.ops.pgd_step import pgd_step_
from bmtard.ops.softmax_entropy import softmax_entropy

__all__ = [
    "MAX_TEACHERS",
    "balanced_pairs",
    "bisect_temperature",
    "bmtard_loss",
    "check_constant",
    "multi_teacher_kl",
    "pgd_step_",
    "softmax_entropy",
    "use_native",
]
