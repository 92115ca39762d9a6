"""Adaptive Adversarial Distillation: python examples/adaad.py --with torch|bmtard

Huang et al., CVPR 2023; boyellow/AdaAD, AT_helper.py and main.py.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ("robust",)
ALPHA = 0.9


def with_torch(student, optimizer, teacher):
    def divergence(x):
        return F.kl_div(F.log_softmax(student(x), 1), F.softmax(teacher(x), 1), reduction="none")

    def step(x, y):
        student.eval()
        start = x + 0.001 * torch.randn(x.shape)
        x_adv = ascend(x, start, lambda x_adv: divergence(x_adv).sum())  # through the teacher too
        student.train()
        optimizer.zero_grad()
        loss = ALPHA * divergence(x_adv).mean() + (1 - ALPHA) * divergence(x).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, teacher):
    from bmtard.dropin import adaad_inner_loss
    from bmtard.losses import adaad_loss

    def step(x, y):
        x_adv = adaad_inner_loss(
            student, teacher, x, step_size=STEP_SIZE, steps=STEPS, epsilon=EPSILON
        )
        optimizer.zero_grad()
        loss = adaad_loss(
            student_adversarial_logits=student(x_adv),
            student_clean_logits=student(x),
            teacher_adversarial_logits=teacher(x_adv),
            teacher_clean_logits=teacher(x),
            alpha=ALPHA,
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
