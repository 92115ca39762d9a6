"""AdaAD: boyellow/AdaAD, AT_helper.py."""

from __future__ import annotations

from torch import Tensor, nn

from bmtard.attacks import kl_from_model
from bmtard.dropin._common import gaussian, linf_attack


def adaad_inner_loss(
    model: nn.Module,
    teacher_model: nn.Module,
    x_natural: Tensor,
    step_size: float = 2 / 255,
    steps: int = 10,
    epsilon: float = 8 / 255,
    BN_eval: bool = True,
    random_init: bool = True,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
) -> Tensor:
    """AdaAD (Huang et al., CVPR 2023): the images x' that maximise KL(T(x') || S(x')).

    The gradient flows through the teacher as well. The attack starts from 0.001 Gaussian noise
    (``random_init``) with the teacher in eval mode, and the student too unless ``BN_eval`` is
    False; afterwards the student is in train mode. The outer loss is
    :func:`bmtard.losses.adaad_loss`.
    """
    x_natural = x_natural.detach()
    if BN_eval:
        model.eval()
    teacher_model.eval()
    start = x_natural + gaussian(x_natural) if random_init else x_natural
    x_adv = linf_attack(
        model, x_natural, start, kl_from_model(teacher_model),
        step_size=step_size, epsilon=epsilon, steps=steps, bounds=(clip_min, clip_max),
    )  # fmt: skip
    model.train()
    return x_adv
