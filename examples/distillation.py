"""Knowledge distillation after Hinton: python examples/distillation.py --with torch|bmtard

Both sides at temperature T, the divergence times T squared.
"""

import torch.nn.functional as F
from digits import main

TEACHERS = ("clean",)
TEMPERATURE, ALPHA = 4.0, 0.9


def with_torch(student, optimizer, teacher):
    def step(x, y):
        optimizer.zero_grad()
        logits, taught = student(x), teacher(x)
        soft = F.kl_div(
            F.log_softmax(logits / TEMPERATURE, 1),
            F.softmax(taught / TEMPERATURE, 1),
            reduction="batchmean",
        )
        loss = ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, teacher):
    from bmtard.losses import kd_loss

    def step(x, y):
        optimizer.zero_grad()
        logits, taught = student(x), teacher(x)
        loss = ALPHA * kd_loss(logits, taught, TEMPERATURE)
        loss = loss + (1 - ALPHA) * F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
