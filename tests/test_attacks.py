"""The attacks stay where they must, raise the loss, and leave the model alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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


def test_scalars_of_numpy_are_numbers(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    model.eval()
    options = {"epsilon": 0.125, "step_size": 0.0625, "bounds": (0.0, 1.0)}
    expected = attacks.pgd(model, *images, steps=2, random_start="none", **options)
    for kind in (np.float32, np.float64, np.float16):
        given = {name: kind(value) for name, value in options.items() if name != "bounds"}
        given["bounds"] = (kind(0), kind(1))
        actual = attacks.pgd(model, *images, steps=2, random_start="none", **given)
        assert torch.equal(actual, expected)


def test_fgsm_is_one_full_step(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model.eval()
    leaf = x.clone().requires_grad_()
    grad = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]
    expected = (x + 0.1 * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(attacks.fgsm(model, x, y, epsilon=0.1), expected)
    free = attacks.fgsm(model, x, y, epsilon=0.1, bounds=None)
    torch.testing.assert_close(free, x + 0.1 * grad.sign())
    attacks.fgsm(model, x, y, mode="train")
    assert model[1].num_batches_tracked == 1


def test_carlini_wagner_formula() -> None:
    logits, y = 40 * torch.randn(N, C), torch.randint(C, (N,))
    expected = 0.0
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        other = max(value for k, value in enumerate(row) if k != label)
        expected -= max(row[label] - other + 50, 0.0)
    actual = attacks.carlini_wagner(y)(logits, logits)
    torch.testing.assert_close(actual, torch.tensor(expected))


def test_losses_keep_double_precision() -> None:
    """And take half types to float32, whose range and rounding they need."""
    exact, y = 40 * torch.randn(N, C, dtype=torch.float64), torch.randint(C, (N,))
    for make in (attacks.cross_entropy, attacks.carlini_wagner):
        logits = exact.clone().requires_grad_()
        value = make(y)(logits, logits)
        assert value.dtype == torch.float64
        assert torch.autograd.gradcheck(lambda z, make=make: make(y)(z, z), logits)
        assert make(y)(exact.half(), exact).dtype == torch.float32
    expected = (exact.logsumexp(1) - exact[range(N), y]).sum()
    actual = attacks.cross_entropy(y)(exact, exact)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


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


def test_works_in_inference_mode(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    """Autograd refuses tensors that were made there; the attack copies them."""
    x, y = images
    model.eval()
    options = {"epsilon": 0.1, "step_size": 0.05, "steps": 2, "random_start": "none"}
    target = model(x.flip(0)).detach()
    for loss in ("ce", "cw", "kl"):
        expected = attacks.pgd(model, x, y, loss=loss, target_logits=target, **options)
        with torch.inference_mode():
            made_there = (x.clone(), y.clone())
            actual = attacks.pgd(
                model, *made_there, loss=loss, target_logits=model(x.flip(0)), **options
            )
            assert torch.is_inference_mode_enabled()
            if loss != "kl":
                function = {"ce": attacks.cross_entropy, "cw": attacks.carlini_wagner}[loss]
                own = attacks.pgd(model, made_there[0], loss=function(made_there[1]), **options)
                torch.testing.assert_close(own, expected)
        torch.testing.assert_close(actual, expected)
        assert not torch.equal(actual, x)


def test_says_what_a_model_must_return(images: tuple[Tensor, Tensor]) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, C)).to(images[0].device)
    message = r"pgd: model must return the logits, a tensor, got tuple; wrap the network"
    with pytest.raises(TypeError, match=message):
        attacks.pgd(lambda x: (net(x), x), *images)


def plain_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: Tensor,
    step_size: Tensor,
    low: Tensor,
    high: Tensor,
    norm: str,
    start: Tensor,
    steps: int = 3,
) -> Tensor:
    """Sample by sample, every setting a tensor of the images' shape."""
    x_adv = start
    for _ in range(steps):
        leaf = x_adv.clone().requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)[0]
        rows = []
        for i in range(len(x)):
            if norm == "linf":
                moved = x_adv[i] + step_size[i] * grad[i].sign()
                moved = torch.max(torch.min(moved, x[i] + epsilon[i]), x[i] - epsilon[i])
            else:
                delta = x_adv[i] + step_size[i] * grad[i] / grad[i].norm() - x[i]
                radius = float(epsilon[i].max())
                moved = x[i] + delta * min(1.0, radius / float(delta.norm()))
            rows.append(torch.max(torch.min(moved, high[i]), low[i]))
        x_adv = torch.stack(rows)
    return x_adv


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_numbers_and_tensors_take_equal_steps(norm: str, scale: float) -> None:
    """Also where the square of a gradient leaves the range of float32."""
    x, direction = torch.full((N, 8), 0.5), scale * torch.randn(N, 8)
    for kind in (float, torch.tensor):
        x_adv = attacks.pgd(
            lambda x: (x * direction).sum(1, keepdim=True), x, random_start="none", norm=norm,
            loss=lambda logits, x_adv: logits.sum(), epsilon=kind(0.3), step_size=kind(0.1),
        )  # fmt: skip
        moved = (x_adv - x).abs().amax(1) if norm == "linf" else (x_adv - x).norm(dim=1)
        torch.testing.assert_close(moved, torch.full((N,), 0.3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", ["number", "0-d", "[N]", "channels", "pixels"])
def test_settings_of_each_sample_and_channel(
    model: nn.Module, images: tuple[Tensor, Tensor], norm: str, shape: str
) -> None:
    x, y = images
    model.eval()
    size = 0.1 if norm == "linf" else 0.7
    epsilon: float | Tensor
    if shape == "number":
        epsilon = size
    else:
        dimensions = {"0-d": (), "[N]": (N,), "channels": (1, 2, 1, 1), "pixels": x.shape}[shape]
        epsilon = size * (0.5 + torch.rand(dimensions, device=x.device))
    if norm == "l2" and shape in ("channels", "pixels"):
        message = rf"epsilon must be a number or a tensor, 0-d, \[N\], for x \[{N}, 2, 5, 5\]"
        with pytest.raises(ValueError, match=message):
            attacks.pgd(model, x, y, epsilon=epsilon, norm=norm)
        return
    start = x + 0.01 * torch.randn_like(x)
    # The bounds of normalised images: one pair a channel.
    low, high = torch.tensor([0.0, -0.5]), torch.tensor([1.0, 0.75])
    low, high = (b.view(1, 2, 1, 1).to(x.device) for b in (low, high))
    x = x.clamp(low, high)
    view = epsilon.view(-1, 1, 1, 1) if shape == "[N]" else epsilon
    full = torch.zeros_like(x) + view
    for bounds in ((0.0, 1.0), (low, high)) if shape == "number" else ((low, high),):
        expected = plain_pgd(
            model, x.clamp(*bounds), y, epsilon=full, step_size=full / 3, norm=norm, start=start,
            low=torch.zeros_like(x) + bounds[0], high=torch.zeros_like(x) + bounds[1],
        )  # fmt: skip
        actual = attacks.pgd(
            model, x.clamp(*bounds), y, epsilon=epsilon, step_size=epsilon / 3, steps=3,
            norm=norm, start=start, bounds=bounds,
        )  # fmt: skip
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_of_each_sample(norm: str) -> None:
    """Inside each sample's own ball, and filling it."""
    x = torch.full((64, 3), 0.5)
    epsilon = torch.linspace(0.01, 0.3, 64)
    seen: list[Tensor] = []
    net = nn.Linear(3, C)
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    attacks.pgd(net, x, torch.zeros(64).long(), epsilon=epsilon, steps=1, norm=norm)
    relative = distance(seen[0], x, norm) / epsilon
    assert relative.max() <= 1 + 1e-5
    assert relative.max() > 0.9
    assert relative.min() > 0


@pytest.mark.parametrize("start", ["uniform", "gaussian", "none", "own"])
@pytest.mark.parametrize("clip", [None, True, False])
def test_start_is_clipped_as_asked(start: str, clip: bool | None) -> None:
    x = torch.cat([torch.zeros(N, 1, 20), torch.ones(N, 1, 20)], 1)
    own = x + 0.1 * torch.randn_like(x) if start == "own" else None
    seen: list[Tensor] = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, C))
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    attacks.pgd(
        net, x, torch.zeros(N).long(), steps=1, start=own, clip_start=clip,
        random_start="uniform" if start == "own" else start,
    )  # fmt: skip
    outside = bool(((seen[0] < 0) | (seen[0] > 1)).any())
    clipped = clip if clip is not None else start == "uniform"
    assert outside == (start != "none" and not clipped)
    if own is not None:
        assert torch.equal(seen[0], own.clamp(0, 1) if clipped else own)


def test_targeted_mask_and_momentum(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model.eval()
    options = {"epsilon": 0.2, "step_size": 0.05, "steps": 4, "random_start": "uniform"}
    with torch.no_grad():
        before = F.cross_entropy(model(x), y)
        aimed = attacks.pgd(model, x, y, targeted=True, **options)
        assert F.cross_entropy(model(aimed), y) < before
        # Pixels outside of the mask stay, also in the random start.
        mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool, device=x.device)
        mask[..., 1:3, 2:] = True
        for norm in ("linf", "l2"):
            patched = attacks.pgd(model, x, y, mask=mask, norm=norm, **options)
            changed = (patched != x).any(0).any(0)
            assert torch.equal(changed, mask[0, 0])
            assert F.cross_entropy(model(patched), y) > before

    # MI-FGSM: the sign of the accumulated gradients, each divided by its mean absolute value.
    expected, accumulated = x.clone(), torch.zeros_like(x)
    for _ in range(4):
        leaf = expected.clone().requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]
        accumulated = 0.9 * accumulated + grad / grad.abs().mean(dim=(1, 2, 3), keepdim=True)
        expected = expected + 0.05 * accumulated.sign()
        expected = torch.min(torch.max(expected, x - 0.2), x + 0.2).clamp(0, 1)
    options["random_start"] = "none"
    actual = attacks.pgd(model, x, y, momentum=0.9, **options)
    torch.testing.assert_close(actual, expected)
    assert not torch.equal(actual, attacks.pgd(model, x, y, **options))


class _SumOfMemory(torch.autograd.Function):
    """The sum of each image; its backward returns memory that it keeps."""

    memory = torch.ones(N, 4)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOfMemory.memory


def test_gradients_are_added_in_memory_of_their_own() -> None:
    x = torch.full((N, 4), 0.5)
    for model in (lambda x: x.sum(1, keepdim=True), _SumOfMemory.apply):  # expanded, kept
        x_adv = attacks.pgd(
            model, x, loss=lambda logits, x_adv: logits.sum(), step_size=0.1, epsilon=0.1,
            random_start="none", eot_samples=3,
        )  # fmt: skip
        torch.testing.assert_close(x_adv, x + 0.1)
    assert _SumOfMemory.memory.eq(1).all()


def test_settings_that_require_grad_give_images_without() -> None:
    x, labels = torch.rand(N, 4), torch.zeros(N, dtype=torch.int64)
    one = torch.tensor(1.0, requires_grad=True)
    for settings in ({"epsilon": 0.1 * one}, {"step_size": 0.1 * one}, {"bounds": (0 * one, one)}):
        for norm in ("linf", "l2"):
            x_adv = attacks.pgd(nn.Linear(4, C), x, labels, norm=norm, **settings)  # type: ignore[arg-type]
            assert not x_adv.requires_grad


def test_gradients_of_a_random_model_are_averaged() -> None:
    """Each of three passes pulls its own way; the sign of their sum decides."""
    pulls = iter([torch.tensor([[3.0, -1.0]]), torch.tensor([[-1.0, 2.0]])] * 2)
    x, calls = torch.full((1, 2), 0.5), []

    def model(images: Tensor) -> Tensor:
        calls.append(images)
        return images * next(pulls)

    attacked = attacks.pgd(
        model, x, epsilon=0.1, step_size=0.1, steps=1, eot_samples=2, random_start="none",
        loss=lambda logits, x_adv: logits.sum(),
    )  # fmt: skip
    assert len(calls) == 2
    torch.testing.assert_close(attacked, torch.tensor([[0.6, 0.6]]))


def test_warns_of_normalised_images(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    """Of the first batch alone: looking at it waits for the device."""
    x, y = images
    monkeypatch.setattr(attacks, "_devices_seen", set())
    with pytest.warns(UserWarning, match=r"pgd: x has values in \[-2, 2\], outside its bounds"):
        attacks.pgd(model, 4 * x - 2, y, steps=1)
    attacks.pgd(model, 4 * x - 2, y, steps=1)
    monkeypatch.setattr(attacks, "_devices_seen", set())
    attacks.pgd(model, 4 * x - 2, y, steps=1, bounds=(-2.0, 2.0))


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
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer >= 1, got 2.5"),
        ({"loss": "bce"}, "loss must be 'ce', 'kl', 'cw' or a function, got 'bce'"),
        ({"loss": "kl"}, r"loss 'kl' needs target_logits \[6, C\], got None"),
        ({"labels": None}, r"loss 'ce' needs labels \[6\] of torch.int64, got None"),
        ({"labels": torch.zeros(6)}, r"of torch.int64, got torch.float32 \[6\]"),
        ({"random_start": "normal"}, "random_start must be"),
        ({"mode": "test"}, "mode must be"),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ({"step_size": math.nan}, "step_size must be finite and >= 0, got nan"),
        ({"epsilon": torch.ones(3)}, r"epsilon must be .* for x \[6, 2, 5, 5\] .*, got \[3\]"),
        ({"bounds": (torch.zeros(2), 1.0)}, r"bounds must be numbers or of 4 dim.*, got \[2\]"),
        ({"bounds": (1.0, 0.0)}, r"pgd: bounds must be \(lowest, highest\), got \(1.0, 0.0\)"),
        ({"bounds": torch.tensor([0.0, 1.0])}, "pgd: bounds must be None or .* got tensor"),
        ({"bounds": 1.0}, r"pgd: bounds must be None or \(lowest, highest\), .* got 1.0"),
        ({"start": torch.zeros(6, 2, 5, 4)}, r"start must be .*\[6, 2, 5, 5\] on cpu like x, got"),
        ({"start": torch.zeros(6, 2, 5, 5, dtype=torch.float64)}, "start .* got torch.float64"),
        ({"mask": torch.ones(6)}, r"mask must be bool and fit x \[6, 2, 5, 5\], got torch.float32"),
        ({"momentum": -0.1}, "momentum must be finite and >= 0, got -0.1"),
        ({"eot_samples": 0}, "eot_samples must be an integer >= 1, got 0"),
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


@pytest.mark.parametrize("name", ["x", "labels", "target_logits", "start", "mask"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    given: dict[str, Any] = {"x": torch.rand(N, 4), "labels": None, name: [0] * N}
    with pytest.raises(TypeError, match=f"pgd: {name} must be a tensor, got list"):
        attacks.pgd(nn.Linear(4, C), given.pop("x"), given.pop("labels"), **given)


def test_check_images() -> None:
    attacks.check_images(torch.rand(4))
    attacks.check_images(torch.rand(0, 4))
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
    with pytest.raises(ValueError, match="autoattack: norm must be 'linf' or 'l2', got 'l1'"):
        attacks.autoattack(net, x, y, norm="l1")  # type: ignore[arg-type]


def test_autoattack_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, images: tuple[Tensor, Tensor]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"pyautoattack is not installed: .*bmtard\[eval\]"):
        attacks.autoattack(nn.Flatten(), *images)
