"""AWP with adversarial training: python examples/awp.py --with torch|bmtard

Adversarial Weight Perturbation, Wu et al., NeurIPS 2020; csdongxian/AWP, AT_AWP/utils_awp.py.
"""

import copy

import torch
import torch.nn.functional as F
from digits import EPSILON, STEP_SIZE, STEPS, ascend, main

TEACHERS = ()
GAMMA = 0.01


def proxy_of(student):
    proxy = copy.deepcopy(student)
    return proxy, torch.optim.SGD(proxy.parameters(), lr=0.05)


def with_torch(student, optimizer):
    proxy, proxy_optimizer = proxy_of(student)

    def perturbation(x_adv, y):
        proxy.load_state_dict(student.state_dict())
        proxy.train()
        proxy_optimizer.zero_grad()
        (-F.cross_entropy(proxy(x_adv), y)).backward()
        proxy_optimizer.step()
        diff = {}
        for name, old in student.state_dict().items():
            if old.dim() > 1 and "weight" in name:
                way = proxy.state_dict()[name] - old
                diff[name] = old.norm() / (way.norm() + 1e-20) * way
        return diff

    @torch.no_grad()
    def move(diff, factor):
        for name, parameter in student.named_parameters():
            if name in diff:
                parameter.add_(factor * diff[name])

    def step(x, y):
        student.eval()
        start = x + torch.empty_like(x).uniform_(-EPSILON, EPSILON)
        x_adv = ascend(x, start.clamp(0, 1), lambda x_adv: F.cross_entropy(student(x_adv), y))
        student.train()
        diff = perturbation(x_adv, y)
        move(diff, GAMMA)
        optimizer.zero_grad()
        loss = F.cross_entropy(student(x_adv), y)
        loss.backward()
        optimizer.step()
        move(diff, -GAMMA)
        return loss.detach()

    return step


def with_bmtard(student, optimizer):
    from bmtard.attacks import pgd
    from bmtard.dropin import AdvWeightPerturb  # instead of: from utils_awp import ...

    adversary = AdvWeightPerturb(student, *proxy_of(student), gamma=GAMMA)

    def step(x, y):
        x_adv = pgd(student, x, y, epsilon=EPSILON, step_size=STEP_SIZE, steps=STEPS)
        diff = adversary.calc_awp(inputs_adv=x_adv, targets=y)
        adversary.perturb(diff)
        optimizer.zero_grad()
        loss = F.cross_entropy(student(x_adv), y)
        loss.backward()
        optimizer.step()
        adversary.restore(diff)
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS)
