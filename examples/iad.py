"""Introspective Adversarial Distillation (IAD-I): python examples/iad.py --with torch|bmtard

Zhu et al., ICLR 2022; ZFancy/IAD, IAD-I.py, from epoch 60 on, with one forward pass of
S(x) for its three.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ("robust",)
TEMPERATURE, ALPHA, BETA = 2.0, 0.9, 0.1


def with_torch(student, optimizer, teacher):
    def step(x, y):
        start = x + torch.zeros_like(x).uniform_(-EPSILON, EPSILON)
        x_adv = ascend(x, start, lambda x_adv: F.cross_entropy(student(x_adv), y, reduction="sum"))
        optimizer.zero_grad()
        adversarial, clean = student(x_adv), student(x)
        taught, guide = teacher(x), teacher(x_adv)
        trust = F.softmax(guide, 1).gather(1, y.unsqueeze(1)).squeeze(1) ** BETA
        soft = F.kl_div(
            F.log_softmax(adversarial / TEMPERATURE, 1),
            F.softmax(taught / TEMPERATURE, 1),
            reduction="batchmean",
        )
        own = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="none").sum(1)
        loss = ALPHA * (TEMPERATURE**2 * soft + ((1 - trust) * own).mean())
        loss = loss + (1 - ALPHA) * F.cross_entropy(clean, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, teacher):
    from bmtard.dropin import AttackPGD
    from bmtard.losses import iad_loss

    config = {"epsilon": EPSILON, "step_size": STEP_SIZE, "num_steps": STEPS}
    attacked = AttackPGD(student, config)

    def step(x, y):
        optimizer.zero_grad()
        adversarial, x_adv = attacked(x, y)
        loss = iad_loss(
            student_adversarial_logits=adversarial,
            student_clean_logits=student(x),
            teacher_clean_logits=teacher(x),
            teacher_adversarial_logits=teacher(x_adv),
            labels=y,
            temperature=TEMPERATURE,
            alpha=ALPHA,
            beta=BETA,
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
