"""Adversarially Robust Distillation: python examples/ard.py --with torch|bmtard

Goldblum et al., AAAI 2020; goldblum/AdversariallyRobustDistillation, main.py.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ("robust",)
TEMPERATURE, ALPHA = 30.0, 0.9


def with_torch(student, optimizer, teacher):
    def step(x, y):
        # The attack runs in train mode, from a start that is not clipped.
        start = x + torch.zeros_like(x).uniform_(-EPSILON, EPSILON)
        x_adv = ascend(x, start, lambda x_adv: F.cross_entropy(student(x_adv), y, reduction="sum"))
        optimizer.zero_grad()
        adversarial, taught, clean = student(x_adv), teacher(x), student(x)
        soft = F.kl_div(
            F.log_softmax(adversarial / TEMPERATURE, 1),
            F.softmax(taught / TEMPERATURE, 1),
            reduction="none",
        ).mean()  # over N * C
        loss = ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(clean, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, teacher):
    from bmtard.dropin import AttackPGD
    from bmtard.losses import ard_loss

    config = {"epsilon": EPSILON, "step_size": STEP_SIZE, "num_steps": STEPS}
    attacked = AttackPGD(student, config)

    def step(x, y):
        optimizer.zero_grad()
        adversarial, _ = attacked(x, y)
        loss = ard_loss(
            student_adversarial_logits=adversarial,
            teacher_clean_logits=teacher(x),
            student_clean_logits=student(x),
            labels=y,
            temperature=TEMPERATURE,
            alpha=ALPHA,
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
