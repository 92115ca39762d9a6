"""TRADES: python examples/trades.py --with torch|bmtard

Zhang et al., ICML 2019; yaodongyu/TRADES, trades.py.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ()


def with_torch(student, optimizer):
    def step(x, y):
        student.eval()
        start = x + 0.001 * torch.randn(x.shape)
        x_adv = ascend(
            x,
            start,
            lambda x_adv: F.kl_div(
                F.log_softmax(student(x_adv), 1), F.softmax(student(x), 1), reduction="sum"
            ),
        )
        student.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(student(x), y) + 6.0 * F.kl_div(
            F.log_softmax(student(x_adv), 1), F.softmax(student(x), 1), reduction="batchmean"
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer):
    from bmtard.dropin import trades_loss  # instead of: from trades import trades_loss

    def step(x, y):
        loss = trades_loss(
            student, x, y, optimizer,
            step_size=STEP_SIZE, epsilon=EPSILON, perturb_steps=STEPS, beta=6.0,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
