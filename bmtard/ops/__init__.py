"""The public ops, one file each: contract, autograd, fake kernels.

Every argument is checked here, once; the compiled kernels trust what they get.

Inside a torch.func transform or a dual level (forward-mode AD) the ops take the plain torch path,
which these differentiate to any order. Tensors made under ``torch.inference_mode`` serve wherever
they need no gradient; in compiled code torch itself refuses to keep them for a backward.
"""

from bmtard.ops._checks import MAX_TEACHERS
from bmtard.ops._dispatch import in_transform, use_native
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
    "in_transform",
    "multi_teacher_kl",
    "pgd_step_",
    "softmax_entropy",
    "use_native",
]
