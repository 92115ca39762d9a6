"""Three teachers in balance: python examples/three_teachers.py --with torch|bmtard

A robust teacher on adversarial, a clean one on clean and one trained with noise on noisy images;
B-MTARD's rules, where each teacher's entropy is compared with the mean of the others.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ("robust", "clean", "noisy")
TEMPERATURE_LR, WEIGHT_LR = 0.01, 0.025


def with_torch(student, optimizer, *teachers):
    first, weights, temperatures = [], [1 / 3] * 3, [1.0] * 3

    def step(x, y):
        student.eval()
        start = x + 0.001 * torch.randn(x.shape)
        x_adv = ascend(x, start, lambda x_adv: F.cross_entropy(student(x_adv), y))
        student.train()
        noisy = x + 0.3 * torch.randn(x.shape)
        optimizer.zero_grad()
        losses, entropies = [], []
        for k, z in enumerate([x_adv, x, noisy]):
            target = F.softmax(teachers[k](z) / temperatures[k], 1)
            log_target = torch.log(target + 1e-5)
            losses.append(torch.mean(target * (log_target - F.log_softmax(student(z), 1))))
            entropies.append(-(target * log_target).sum(1).mean().item())
        if not first:
            first.extend(loss.item() for loss in losses)
        speed = [loss.item() / start for loss, start in zip(losses, first, strict=True)]
        for k in range(3):
            weights[k] -= WEIGHT_LR * (weights[k] - speed[k] / sum(speed))
        weights[:] = [weight / sum(weights) for weight in weights]
        loss = sum(weight * each for weight, each in zip(weights, losses, strict=True))
        for k in range(3):
            others = (sum(entropies) - entropies[k]) / 2
            moved = temperatures[k] - TEMPERATURE_LR * (
                (entropies[k] > others) - (entropies[k] < others)
            )
            temperatures[k] = min(max(moved, 1.0), 10.0)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, *teachers):
    import bmtard
    from bmtard.attacks import pgd

    criterion = bmtard.BMTARDLoss(
        3, balance="sign", eps=1e-5, temperature_lr=TEMPERATURE_LR, weight_lr=WEIGHT_LR
    )

    def step(x, y):
        x_adv = pgd(
            student, x, y, epsilon=EPSILON, step_size=STEP_SIZE, steps=STEPS,
            start=x + 0.001 * torch.randn(x.shape),
        )  # fmt: skip
        noisy = x + 0.3 * torch.randn(x.shape)
        inputs = [x_adv, x, noisy]
        optimizer.zero_grad()
        loss = criterion(
            [student(z) for z in inputs],
            [net(z) for net, z in zip(teachers, inputs, strict=True)],
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
