"""Robust Soft Label Adversarial Distillation: python examples/rslad.py --with torch|bmtard

Zi et al., ICCV 2021; zibojia/RSLAD, rslad_loss.py and resnet18_rslad_cifar10.py.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ("robust",)


def divergence(logits, target):
    return torch.mean(target * (torch.log(target + 1e-5) - F.log_softmax(logits, 1)))


def with_torch(student, optimizer, teacher):
    def step(x, y):
        target = F.softmax(teacher(x), 1)
        student.eval()
        start = x + 0.001 * torch.randn(x.shape)
        x_adv = ascend(
            x,
            start,
            lambda x_adv: F.kl_div(F.log_softmax(student(x_adv), 1), target, reduction="sum"),
        )
        student.train()
        optimizer.zero_grad()
        adversarial, clean = student(x_adv), student(x)
        loss = 5 / 6 * divergence(adversarial, target) + 1 / 6 * divergence(clean, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, teacher):
    from bmtard.dropin import rslad_inner_loss
    from bmtard.losses import rslad_loss

    def step(x, y):
        taught = teacher(x)
        adversarial = rslad_inner_loss(
            student, taught, x, y, optimizer,
            step_size=STEP_SIZE, epsilon=EPSILON, perturb_steps=STEPS,
        )  # fmt: skip
        loss = rslad_loss(
            student_adversarial_logits=adversarial,
            student_clean_logits=student(x),
            teacher_clean_logits=taught,
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
