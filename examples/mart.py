"""MART: python examples/mart.py --with torch|bmtard

Wang et al., ICLR 2020; YisenWang/MART, mart.py.
"""

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ()


def with_torch(student, optimizer):
    def step(x, y):
        student.eval()
        start = x + 0.001 * torch.randn(x.shape)
        x_adv = ascend(x, start, lambda x_adv: F.cross_entropy(student(x_adv), y))
        student.train()
        optimizer.zero_grad()
        logits, logits_adv = student(x), student(x_adv)
        p, p_adv = F.softmax(logits, 1), F.softmax(logits_adv, 1)
        best = p_adv.argsort(dim=1)[:, -2:]
        wrong = torch.where(best[:, -1] == y, best[:, -2], best[:, -1])
        boosted = F.cross_entropy(logits_adv, y)
        boosted = boosted + F.nll_loss(torch.log(1.0001 - p_adv + 1e-12), wrong)
        each = F.kl_div(torch.log(p_adv + 1e-12), p, reduction="none").sum(1)
        doubt = 1.0000001 - p.gather(1, y.unsqueeze(1)).squeeze(1)
        loss = boosted + 5.0 * (each * doubt).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer):
    from bmtard.dropin import mart_loss  # instead of: from mart import mart_loss

    def step(x, y):
        loss = mart_loss(
            student, x, y, optimizer,
            step_size=STEP_SIZE, epsilon=EPSILON, perturb_steps=STEPS, beta=5.0,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
