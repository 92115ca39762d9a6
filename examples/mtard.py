"""Multi-Teacher Adversarial Robustness Distillation: python examples/mtard.py --with torch|bmtard

Zhao et al., ECCV 2022; zhaoshiji123/MTARD, mtard_loss.py and mtard_resnet18_cifar10.py.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ("robust", "clean")
WEIGHT_LR = 0.025


def divergence(logits, taught):
    target = F.softmax(taught, 1)
    return torch.mean(target * (torch.log(target + 1e-5) - F.log_softmax(logits, 1)))


def with_torch(student, optimizer, robust, clean):
    first, weight = [], 0.5

    def step(x, y):
        nonlocal weight
        student.eval()
        start = x + 0.001 * torch.randn(x.shape)
        x_adv = ascend(x, start, lambda x_adv: F.cross_entropy(student(x_adv), y))
        student.train()
        optimizer.zero_grad()
        adversarial = divergence(student(x_adv), robust(x_adv))
        natural = divergence(student(x), clean(x))
        if not first:
            first.extend([adversarial.item(), natural.item()])
        speed = adversarial.item() / first[0], natural.item() / first[1]
        weight = weight - WEIGHT_LR * (weight - speed[0] / sum(speed))
        loss = weight * adversarial + (1 - weight) * natural
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, robust, clean):
    import bmtard
    from bmtard.dropin import mtard_inner_loss_ce
    from bmtard.losses import mtard_loss

    balance = bmtard.NormalizationLossBalance(2, weight_lr=WEIGHT_LR)

    def step(x, y):
        adversarial, taught_adversarial = mtard_inner_loss_ce(
            student, robust, x, y, optimizer,
            step_size=STEP_SIZE, epsilon=EPSILON, perturb_steps=STEPS,
        )  # fmt: skip
        students, teachers = [adversarial, student(x)], [taught_adversarial, clean(x)]
        each = bmtard.multi_teacher_kl(students, teachers, reduction="mean", eps=1e-5)
        loss = mtard_loss(students, teachers, balance(each))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
