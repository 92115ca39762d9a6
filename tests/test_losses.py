"""Each loss against an independent float64 transcription of its published formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bmtard
from bmtard import dropin, losses

N, C = 7, 10
NAMES = ("student_adv", "student_clean", "teacher_adv", "teacher_clean")


def log_p(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return F.log_softmax(logits / temperature, 1)


def kl(target: Tensor, student: Tensor, temperature: float = 1.0, eps: float = 0.0) -> Tensor:
    """[N]"""
    p = log_p(target, temperature).exp()
    return (p * ((p + eps).log() - log_p(student, temperature))).sum(1)


def trades(z: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(z["student_clean"], y) + 6 * F.kl_div(
        log_p(z["student_adv"]), log_p(z["student_clean"]).exp(), reduction="batchmean"
    )


def mart(z: dict[str, Tensor], y: Tensor) -> Tensor:
    p_adv = log_p(z["student_adv"]).exp()
    top = p_adv.argsort(1)[:, -2:]
    wrong = torch.where(top[:, -1] == y, top[:, -2], top[:, -1])
    boosted = F.cross_entropy(z["student_adv"], y) + F.nll_loss(
        torch.log(1.0001 - p_adv + 1e-12), wrong
    )
    p = log_p(z["student_clean"]).exp()
    each = (p * (p.log() - torch.log(p_adv + 1e-12))).sum(1)
    return boosted + 6 * (each * (1.0000001 - p[range(N), y])).sum() / N


def ard(z: dict[str, Tensor], y: Tensor) -> Tensor:
    distilled = kl(z["teacher_clean"].detach(), z["student_adv"], 30.0).sum() / (N * C)
    return 0.7 * 30.0**2 * distilled + 0.3 * F.cross_entropy(z["student_clean"], y)


def rslad(z: dict[str, Tensor], y: Tensor) -> Tensor:
    teacher = z["teacher_clean"].detach()
    adversarial, clean = (kl(teacher, z[s], eps=1e-5) for s in ("student_adv", "student_clean"))
    return (5 / 6 * adversarial.sum() + 1 / 6 * clean.sum()) / (N * C)


def trust(logits: Tensor, y: Tensor) -> Tensor:
    return log_p(logits.detach()).exp()[range(N), y] ** 0.1


def iad(z: dict[str, Tensor], y: Tensor) -> Tensor:
    own = kl(z["student_clean"], z["student_adv"]) * (1 - trust(z["teacher_adv"], y))
    return (
        0.7 * 4 * kl(z["teacher_clean"].detach(), z["student_adv"], 2.0).sum() / N
        + 0.7 * own.sum() / N
        + 0.3 * F.cross_entropy(z["student_clean"], y)
    )


def iad2(z: dict[str, Tensor], y: Tensor) -> Tensor:
    a = trust(z["teacher_adv"], y)
    robust = a * kl(z["teacher_adv"].detach(), z["student_adv"], 2.0)
    robust = robust + (1 - a) * kl(z["student_clean"], z["student_adv"])
    clean = kl(z["teacher_clean"].detach(), z["student_adv"], 2.0)
    hard = F.cross_entropy(z["student_adv"], y)
    return 0.25 * hard + 0.5 * 4 * robust.mean() + 0.25 * 4 * clean.mean()


def adaad(z: dict[str, Tensor], y: Tensor) -> Tensor:
    adversarial = kl(z["teacher_adv"].detach(), z["student_adv"]).sum() / (N * C)
    clean = kl(z["teacher_clean"].detach(), z["student_clean"]).sum() / (N * C)
    return 0.8 * adversarial + 0.2 * clean


def mtard(z: dict[str, Tensor], y: Tensor) -> Tensor:
    adversarial = kl(z["teacher_adv"].detach(), z["student_adv"], eps=1e-5).sum() / (N * C)
    clean = kl(z["teacher_clean"].detach(), z["student_clean"], eps=1e-5).sum() / (N * C)
    return 0.3 * adversarial + 0.7 * clean


# expected, actual, and the logits that get gradient
Loss = Callable[[dict[str, Tensor], Tensor], Tensor]
STUDENTS = {"student_adv", "student_clean"}
CASES: dict[str, tuple[Loss, Loss, set[str]]] = {
    "trades": (
        trades,
        lambda z, y: losses.trades_loss(z["student_clean"], z["student_adv"], y),
        STUDENTS,
    ),
    "mart": (
        mart,
        lambda z, y: losses.mart_loss(z["student_clean"], z["student_adv"], y),
        STUDENTS,
    ),
    "ard": (
        ard,
        lambda z, y: losses.ard_loss(
            z["student_adv"], z["student_clean"], z["teacher_clean"], y, alpha=0.7
        ),
        STUDENTS,
    ),
    "rslad": (
        rslad,
        lambda z, y: losses.rslad_loss(z["student_adv"], z["student_clean"], z["teacher_clean"]),
        STUDENTS,
    ),
    "iad": (
        iad,
        lambda z, y: losses.iad_loss(
            *(z[n] for n in ("student_adv", "student_clean", "teacher_clean", "teacher_adv")),
            y,
            temperature=2.0,
            alpha=0.7,
        ),
        STUDENTS,
    ),
    "iad2": (
        iad2,
        lambda z, y: losses.iad2_loss(
            *(z[n] for n in ("student_adv", "student_clean", "teacher_adv", "teacher_clean")),
            y,
            temperature=2.0,
        ),
        STUDENTS,
    ),
    "adaad": (adaad, lambda z, y: losses.adaad_loss(*(z[n] for n in NAMES), alpha=0.8), STUDENTS),
    "mtard": (
        mtard,
        lambda z, y: losses.mtard_loss(
            [z["student_adv"], z["student_clean"]],
            [z["teacher_adv"], z["teacher_clean"]],
            torch.tensor([0.3, 0.7]),
        ),
        STUDENTS,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name: str, dtype: torch.dtype) -> None:
    expected_loss, actual_loss, receive = CASES[name]
    y = torch.randint(C, (N,))
    exact = {n: (3 * torch.randn(N, C, dtype=torch.float64)).requires_grad_() for n in NAMES}
    ours = {n: z.detach().to(dtype).requires_grad_() for n, z in exact.items()}
    expected = expected_loss(exact, y)
    expected.backward()
    actual = actual_loss(ours, y)
    actual.backward()
    # MART's log(p + 1e-12) is log(p) here.
    atol = 1e-7 if name == "mart" else 1e-9
    tolerance = {"rtol": 1e-6, "atol": atol} if dtype == torch.float64 else {}
    torch.testing.assert_close(actual, expected.to(dtype), **tolerance)
    assert {n for n, z in ours.items() if z.grad is not None} == receive
    for n in receive:
        torch.testing.assert_close(ours[n].grad, exact[n].grad.to(dtype), **tolerance)


def test_alternatives_of_the_published_loops() -> None:
    z = {n: torch.randn(N, C) for n in NAMES}
    y = torch.randint(C, (N,))
    # IAD-I before epoch 60 is ARD with another reduction.
    early = losses.iad_loss(
        z["student_adv"], z["student_clean"], z["teacher_clean"], z["teacher_adv"], y,
        temperature=5.0, introspect=False,
    )  # fmt: skip
    ard_all = losses.ard_loss(
        z["student_adv"], z["student_clean"], z["teacher_clean"], y, temperature=5.0
    )
    torch.testing.assert_close(early, C * ard_all)
    # AdaAD's CIFAR-100 code divides by N, its CIFAR-10 code by N * C.
    by_rows, by_values = (
        losses.adaad_loss(*z.values(), reduction=r) for r in ("batchmean", "mean")
    )
    torch.testing.assert_close(by_rows, C * by_values)


@pytest.mark.parametrize("name", CASES)
def test_no_nan_where_probabilities_vanish(name: str) -> None:
    """PyTorch's kl_div has NaN gradients for a target of probability 0 that needs gradient."""
    z = {n: torch.zeros(N, C).index_fill_(1, torch.tensor([k]), 300.0) for k, n in enumerate(NAMES)}
    for logits in z.values():
        logits.requires_grad_()
    CASES[name][1](z, torch.zeros(N, dtype=torch.int64)).backward()
    for n in STUDENTS:
        assert z[n].grad.isfinite().all()


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
        torch.nn.Linear(8, C),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_dropin_equals_the_published_procedure(name: str) -> None:
    """The whole function: attack in eval mode, loss in train mode, gradients of the parameters."""
    x, y = torch.rand(N, 1, 4, 4), torch.randint(C, (N,))
    model, reference = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(2)
    function = {"trades": dropin.trades_loss, "mart": dropin.mart_loss}[name]
    loss = function(model, x, y, optimizer, step_size=0.02, epsilon=0.1, perturb_steps=3, beta=6.0)
    loss.backward()

    torch.manual_seed(2)
    reference.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(3):
        x_adv.requires_grad_()
        if name == "trades":
            attacked = kl(reference(x), reference(x_adv)).sum()
        else:
            attacked = F.cross_entropy(reference(x_adv), y)
        grad = torch.autograd.grad(attacked, x_adv)[0]
        x_adv = x_adv.detach() + 0.02 * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - 0.1), x + 0.1).clamp(0, 1)
    reference.train()
    z = {"student_clean": reference(x), "student_adv": reference(x_adv)}
    expected = CASES[name][0](z, y)
    expected.backward()

    torch.testing.assert_close(loss, expected)
    assert model.training
    for actual, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-4, atol=1e-6)


def test_dropin_refuses_what_it_cannot_do() -> None:
    x, y = torch.rand(N, 1, 4, 4), torch.zeros(N, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"trades_loss: distance must be 'l_inf', got 'l_2'"):
        dropin.trades_loss(network(), x, y, None, distance="l_2")


def test_mtard_weights_come_from_the_balance() -> None:
    """mtard_loss with the weights of NormalizationLossBalance, for two steps."""
    balance = bmtard.NormalizationLossBalance(2, weight_lr=0.5)
    first = None
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(2):
        z = {n: torch.randn(N, C) for n in NAMES}
        students, teachers = [z[n] for n in NAMES[:2]], [z[n] for n in NAMES[2:]]
        each = bmtard.multi_teacher_kl(students, teachers, reduction="mean", eps=1e-5)
        actual = losses.mtard_loss(students, teachers, balance(each))
        first = each.double() if first is None else first
        relative = each.double() / first
        weights = 0.5 * weights + 0.5 * relative / relative.sum()
        weights = weights / weights.sum()
        torch.testing.assert_close(actual, (weights * each).sum().float())
