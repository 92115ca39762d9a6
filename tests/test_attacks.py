"""The attacks stay where they must, raise the loss, and leave the model alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard import attacks
from bmtard.ops import multi_teacher_kl

N, C = 6, 10


@pytest.fixture
def model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(4 * 9, C),
    )  # fmt: skip
    return net.to(device)


@pytest.fixture
def images(device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.rand(N, 2, 5, 5, device=device)
    x[0], x[1] = 0.0, 1.0  # on the bounds
    return x, torch.randint(C, (N,), device=device)


def distance(a: Tensor, b: Tensor, norm: str) -> Tensor:
    return (a - b).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)


@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
@pytest.mark.parametrize("loss", ["ce", "kl", "cw"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.7)])
def test_stays_inside_and_raises_the_loss(
    model: nn.Module,
    images: tuple[Tensor, Tensor],
    norm: str,
    epsilon: float,
    loss: str,
    start: str,
) -> None:
    x, y = images
    model.eval()
    target = model(x.flip(0)).detach()
    objective = {
        "ce": attacks.cross_entropy(y),
        "kl": attacks.kl_from(target),
        "cw": attacks.carlini_wagner(y),
    }[loss]
    x_adv = attacks.pgd(
        model, x, y, epsilon=epsilon, step_size=epsilon / 4, steps=8, loss=loss,
        target_logits=target, norm=norm, random_start=start,
    )  # fmt: skip
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (distance(x_adv, x, norm) <= epsilon * (1 + 1e-5)).all()
    with torch.no_grad():
        assert objective(model(x_adv), x_adv) > objective(model(x), x)


def test_equals_plain_pgd(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model.eval()
    expected = x.clone()
    for _ in range(3):
        expected.requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(model(expected), y), expected)[0]
        expected = expected.detach() + 0.03 * grad.sign()
        expected = torch.min(torch.max(expected, x - 0.05), x + 0.05).clamp(0, 1)
    x_adv = attacks.pgd(model, x, y, epsilon=0.05, step_size=0.03, steps=3, random_start="none")
    torch.testing.assert_close(x_adv, expected)


def test_fgsm_is_one_full_step(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model.eval()
    leaf = x.clone().requires_grad_()
    grad = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]
    expected = (x + 0.1 * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(attacks.fgsm(model, x, y, epsilon=0.1), expected)


def test_carlini_wagner_formula() -> None:
    logits, y = 40 * torch.randn(N, C), torch.randint(C, (N,))
    expected = 0.0
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        other = max(value for k, value in enumerate(row) if k != label)
        expected -= max(row[label] - other + 50, 0.0)
    actual = attacks.carlini_wagner(y)(logits, logits)
    torch.testing.assert_close(actual, torch.tensor(expected))


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("before", [True, False])
def test_modes_and_statistics(
    model: nn.Module, images: tuple[Tensor, Tensor], mode: str, before: bool
) -> None:
    model.train(before)
    model[1].training = not before  # one module apart from the others, as when it is frozen
    flags = [module.training for module in model.modules()]
    seen: list[list[bool]] = []
    hook = model.register_forward_hook(
        lambda *_: seen.append([module.training for module in model.modules()])
    )
    statistics = model[1].running_mean.clone()
    attacks.pgd(model, *images, epsilon=0.1, step_size=0.05, steps=2, mode=mode)
    hook.remove()
    assert [module.training for module in model.modules()] == flags
    during = flags if mode == "keep" else [mode == "train"] * len(flags)
    assert seen == [during, during]
    assert torch.equal(model[1].running_mean, statistics) == (not during[2])


def test_restores_modes_after_an_error(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    model.train()
    with pytest.raises(RuntimeError):
        attacks.pgd(model, images[0][:, :1], images[1])
    assert all(module.training for module in model.modules())


def test_touches_only_the_images(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    before = x.clone()
    with torch.no_grad():  # works where gradients are off
        attacks.pgd(model, x, y, epsilon=0.1, step_size=0.05, steps=2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, before)


def test_kl_from_model_attacks_through_the_teacher(images: tuple[Tensor, Tensor]) -> None:
    """AdaAD: d/dx of KL(T(x) || S(x)) has a part through T."""
    x = images[0].cpu().flatten(1)
    student, teacher = nn.Linear(50, C), nn.Linear(50, C)
    leaf = x.clone().requires_grad_()
    log_p, log_q = F.log_softmax(teacher(leaf), 1), F.log_softmax(student(leaf), 1)
    expected = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), leaf)[0]
    again = x.clone().requires_grad_()
    loss = attacks.kl_from_model(teacher)(student(again), again)
    actual = torch.autograd.grad(loss, again)[0]
    torch.testing.assert_close(actual, expected)
    fixed = x.clone().requires_grad_()
    detached = attacks.kl_from(teacher(x))(student(fixed), fixed)
    assert not torch.allclose(torch.autograd.grad(detached, fixed)[0], expected)
    torch.testing.assert_close(loss, multi_teacher_kl(student(x), teacher(x), reduction="sum")[0])


def test_autocast(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model.eval()
    with torch.autocast(x.device.type, torch.bfloat16):
        x_adv = attacks.pgd(model, x, y, epsilon=0.1, step_size=0.05, steps=3)
    assert x_adv.dtype == torch.float32
    assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y)


def test_generator_makes_it_repeatable(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    model.eval()
    device = images[0].device
    for norm, start in (("linf", "uniform"), ("l2", "uniform"), ("linf", "gaussian")):
        first, second, other = (
            attacks.pgd(
                model, *images, steps=1, norm=norm, random_start=start,
                generator=torch.Generator(device).manual_seed(seed),
            )
            for seed in (1, 1, 2)
        )  # fmt: skip
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"loss": "bce"}, "loss must be 'ce', 'kl', 'cw' or a function, got 'bce'"),
        ({"loss": "kl"}, r"loss 'kl' needs target_logits \[6, C\], got None"),
        ({"labels": None}, r"loss 'ce' needs labels \[6\], got None"),
        ({"random_start": "normal"}, "random_start must be"),
        ({"mode": "test"}, "mode must be"),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ({"epsilon": -1.0, "random_start": "none"}, "epsilon must be finite and >= 0"),
        ({"x": torch.zeros(6, 2, 5, 5, dtype=torch.uint8)}, "x must be floating"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, C))
    x, labels = torch.rand(N, 2, 5, 5), torch.zeros(N, dtype=torch.int64)
    given = {"x": x, "labels": labels, **arguments}
    with pytest.raises(ValueError, match=message):
        attacks.pgd(net, given.pop("x"), given.pop("labels"), **given)


def test_check_images() -> None:
    attacks.check_images(torch.rand(4))
    for bad in (torch.tensor([0.5, 1.5]), torch.tensor([-0.1]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match=r"images must be in \[0.0, 1.0\]"):
            attacks.check_images(bad)


def test_square_and_autoattack(images: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack (bmtard[eval]) is not installed")
    x = images[0].cpu()
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, C, bias=False)).requires_grad_(False)
    y = net(x).argmax(1)
    for x_adv in (
        attacks.square(net, x, y, epsilon=0.3, queries=50),
        attacks.autoattack(net, x, y, epsilon=0.3, attacks=("apgd-ce",)),
    ):
        assert (x_adv - x).abs().max() <= 0.3 + 1e-5
        assert (net(x_adv).argmax(1) == y).float().mean() < 0.5


def test_autoattack_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, images: tuple[Tensor, Tensor]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"pyautoattack is not installed: .*bmtard\[eval\]"):
        attacks.autoattack(nn.Flatten(), *images)
