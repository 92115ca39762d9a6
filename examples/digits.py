"""What the examples share: scanned digits, a small network, teachers, and the command line.

Plain torch; nothing here is bmtard's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

EPSILON, STEP_SIZE, STEPS = 0.2, 0.05, 10
"""Of the attacks, in pixel units: 8 x 8 digits take more than photographs."""

Objective = Callable[[Tensor], Tensor]
"""Images to what the attack maximises."""


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    """1797 images [N, 1, 8, 8] in [0, 1], in torch's default dtype, and their labels."""
    data = load_digits()
    x = torch.tensor(data.images / 16.0, dtype=torch.get_default_dtype())
    return x.unsqueeze(1), torch.tensor(data.target)


def batches(x: Tensor, y: Tensor, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Without an end, in an order of torch's random numbers."""
    while True:
        for index in torch.randperm(len(x)).split(size):
            yield x[index], y[index]


def ascend(x: Tensor, start: Tensor, objective: Objective) -> Tensor:
    """PGD in the maximum norm: what every published script writes out."""
    x_adv = start
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(x_adv), x_adv)
        x_adv = x_adv.detach() + STEP_SIZE * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON).clamp(0, 1)
    return x_adv.detach()


def teacher(kind: str, steps: int = 150) -> nn.Module:
    """Trained on clean, adversarial ("robust") or noisy images; in eval mode, without gradient."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    data = batches(*images())
    for _ in range(steps):
        x, y = next(data)
        if kind == "robust":
            net.eval()
            x = ascend(x, x, lambda x_adv: F.cross_entropy(net(x_adv), y))  # noqa: B023
            net.train()
        elif kind == "noisy":
            x = x + 0.3 * torch.randn(x.shape)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def setup(
    kinds: tuple[str, ...], teacher_steps: int = 150
) -> tuple[nn.Module, list[nn.Module], Iterator[tuple[Tensor, Tensor]]]:
    """Student, teachers and batches of the training images."""
    teachers = [teacher(kind, teacher_steps) for kind in kinds]
    x, y = images()
    return network(), teachers, batches(x[:1500], y[:1500])


def report(student: nn.Module) -> str:
    """Accuracy on the test images, clean and under PGD."""
    x, y = (part[1500:] for part in images())
    student.eval()
    x_adv = ascend(x, x, lambda x_adv: F.cross_entropy(student(x_adv), y))
    clean, robust = ((student(z).argmax(1) == y).to(x.dtype).mean().item() for z in (x, x_adv))
    return f"accuracy {100 * clean:.1f} %, under PGD-{STEPS} {100 * robust:.1f} %"


def main(
    with_torch: Callable[..., Any],
    with_bmtard: Callable[..., Any],
    kinds: tuple[str, ...] = (),
    setup: Callable[..., Any] = setup,
    report: Callable[[nn.Module], str] = report,
) -> None:
    """Trains by either version: each takes student, optimizer and teachers and returns a step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--with", dest="library", choices=["torch", "bmtard"], default="bmtard")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    student, teachers, data = setup(kinds)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=2e-4)
    version = with_torch if args.library == "torch" else with_bmtard
    step = version(student, optimizer, *teachers)
    for index in range(1, args.steps + 1):
        loss = step(*next(data))
        if index % 20 == 0:
            print(f"step {index}: loss {loss.item():.4f}")
    print(report(student))
