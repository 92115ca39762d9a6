"""B-MTARD, the published sign rule: python examples/b_mtard.py --with torch|bmtard

Zhao, Wang and Wei, TPAMI 2024; zhaoshiji123/MTARD-extension, resnet18_mtard_cifar10.py.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ("robust", "clean")
TEMPERATURE_LR, WEIGHT_LR = 0.01, 0.025


def with_torch(student, optimizer, robust, clean):
    first, weights, temperatures = [], [0.5, 0.5], [1.0, 1.0]

    def step(x, y):
        student.eval()
        start = x + 0.001 * torch.randn(x.shape)
        x_adv = ascend(x, start, lambda x_adv: F.cross_entropy(student(x_adv), y))
        student.train()
        optimizer.zero_grad()
        losses, entropies = [], []
        for k, (net, z) in enumerate([(robust, x_adv), (clean, x)]):
            target = F.softmax(net(z) / temperatures[k], 1)
            log_target = torch.log(target + 1e-5)
            losses.append(torch.mean(target * (log_target - F.log_softmax(student(z), 1))))
            entropies.append((target * log_target).mean().item())
        if not first:
            first.extend(loss.item() for loss in losses)
        speed = [loss.item() / start for loss, start in zip(losses, first, strict=True)]
        for k in range(2):
            weights[k] -= WEIGHT_LR * (weights[k] - speed[k] / sum(speed))
        weights[:] = [weight / sum(weights) for weight in weights]
        loss = weights[0] * losses[0] + weights[1] * losses[1]
        for k in range(2):
            ratio = entropies[k] / entropies[1 - k]
            moved = temperatures[k] - TEMPERATURE_LR * ((ratio > 1) - (ratio < 1))
            temperatures[k] = min(max(moved, 1.0), 10.0)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, robust, clean):
    import bmtard
    from bmtard.dropin import mtard_inner_loss_ce

    # The published rule. BMTARDLoss() finds the temperatures of equal entropy in every step.
    criterion = bmtard.BMTARDLoss(
        balance="sign", eps=1e-5, temperature_lr=TEMPERATURE_LR, weight_lr=WEIGHT_LR
    )

    def step(x, y):
        adversarial, taught_adversarial = mtard_inner_loss_ce(
            student, robust, x, y, optimizer,
            step_size=STEP_SIZE, epsilon=EPSILON, perturb_steps=STEPS,
        )  # fmt: skip
        loss = criterion([adversarial, student(x)], [taught_adversarial, clean(x)])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
