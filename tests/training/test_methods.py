"""Every method against a transcription of its published attack and loss in plain torch, float64.

Each transcription follows the released code: start, mode, steps, clipping, reductions, detached or
not. Students have batch norm, so that a mode or a forward pass of the attack shows in the running
statistics; without dropout, because TRADES and IAD-I run S(x) twice where we run it once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard.data import ImageData
from bmtard.training import checkpoint
from bmtard.training.awp import perturbed_weights
from bmtard.training.config import (
    DIGITS,
    METHOD_NAMES,
    AttackConfig,
    AWPConfig,
    BalanceConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from bmtard.training.methods import METHODS, find_method
from bmtard.training.trainer import Trainer

N, C = 8, 5
EPSILON, STEP, STEPS = 0.06, 0.02, 4
Networks = dict[str, nn.Module]
Published = Callable[[nn.Module, Networks, Tensor, Tensor], tuple[Tensor, Callable[[], Tensor]]]
"""(student, teachers, x, y) -> x' and the loss, taken later"""


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, C),
    ).double()  # fmt: skip


def teacher(seed: int) -> nn.Module:
    return network(seed).eval().requires_grad_(False)


def ascend(x_adv: Tensor, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x_adv), x_adv)
        x_adv = x_adv.detach() + STEP * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON).clamp(0, 1)
    return x_adv.detach()


def gaussian(x: Tensor) -> Tensor:
    return x + 0.001 * torch.randn(x.shape, dtype=x.dtype)


def uniform(x: Tensor, radius: float = EPSILON) -> Tensor:
    return x + torch.zeros_like(x).uniform_(-radius, radius)


def kl_sum(target: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(target, 1), reduction="none").sum()


def sat(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    student.eval()
    x_adv = ascend(uniform(x).clamp(0, 1), x, lambda z: F.cross_entropy(student(z), y))
    student.train()
    return x_adv, lambda: F.cross_entropy(student(x_adv), y)


def one_step(
    student: nn.Module, x: Tensor, y: Tensor, noise: float, step: float, clip: float | None
) -> Any:
    eta = torch.zeros_like(x).uniform_(-noise, noise)
    eta = torch.max(torch.min(eta, 1 - x), 0 - x).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(student(x + eta), y), eta)
    delta = eta.detach() + step * grad.sign()
    if clip is not None:
        delta = delta.clamp(-clip, clip)
    delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    return x + delta, lambda: F.cross_entropy(student(x + delta), y)


def fgsm_rs(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    return one_step(student, x, y, EPSILON, 9 / 8 * EPSILON, EPSILON)


def n_fgsm(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    return one_step(student, x, y, 1.5 * EPSILON, 0.9 * EPSILON, None)


def trades(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    student.eval()
    x_adv = ascend(gaussian(x), x, lambda z: kl_sum(student(x), student(z)))
    student.train()

    def loss() -> Tensor:
        clean, adversarial = student(x), student(x_adv)
        return F.cross_entropy(clean, y) + 5.0 * kl_sum(clean, adversarial) / N

    return x_adv, loss


def mart(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    student.eval()
    x_adv = ascend(gaussian(x), x, lambda z: F.cross_entropy(student(z), y))
    student.train()

    def loss() -> Tensor:
        clean, adversarial = student(x), student(x_adv)
        p_adv = F.softmax(adversarial, 1)
        highest = torch.argsort(p_adv, 1)[:, -2:]
        wrong = torch.where(highest[:, -1] == y, highest[:, -2], highest[:, -1])
        boosted = F.cross_entropy(adversarial, y) + F.nll_loss(
            torch.log(1.0001 - p_adv + 1e-12), wrong
        )
        p = F.softmax(clean, 1)
        true = p.gather(1, y.unsqueeze(1)).squeeze()
        each = F.kl_div(torch.log(p_adv + 1e-12), p, reduction="none").sum(1)
        return boosted + 4.0 * (each * (1.0000001 - true)).sum() / N

    return x_adv, loss


def label_attack_in_train_mode(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ascend(uniform(x), x, lambda z: F.cross_entropy(student(z), y, reduction="sum"))


def ard(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    x_adv = label_attack_in_train_mode(student, x, y)

    def loss() -> Tensor:
        t, alpha = 20.0, 0.7
        soft = rows_kl(teachers["robust"](x) / t, student(x_adv) / t).sum() / (N * C)
        return 10 * (alpha * t * t * soft + (1 - alpha) * F.cross_entropy(student(x), y))

    return x_adv, loss


def rslad(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    student.eval()
    with torch.no_grad():
        taught = teachers["robust"](x)
    x_adv = ascend(gaussian(x), x, lambda z: kl_sum(taught, student(z)))
    student.train()

    def kl(logits: Tensor) -> Tensor:
        p = F.softmax(taught, 1)
        return (p * ((p + 1e-5).log() - F.log_softmax(logits, 1))).mean()

    return x_adv, lambda: 10 * (0.7 * kl(student(x_adv)) + 0.3 * kl(student(x)))


def adaad(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    robust = teachers["robust"]
    student.eval()
    x_adv = ascend(gaussian(x), x, lambda z: kl_sum(robust(z), student(z)))
    student.train()

    def loss() -> Tensor:
        alpha = 0.8
        adversarial = kl_sum(robust(x_adv), student(x_adv)) / (N * C)
        clean = kl_sum(robust(x), student(x)) / (N * C)
        return 10 * (alpha * adversarial + (1 - alpha) * clean)

    return x_adv, loss


def trust(guide: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.softmax(guide, 1)[i][y[i]].pow(0.2) for i in range(N)]).detach()


def rows_kl(target: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(target, 1), reduction="none").sum(1)


def iad_1(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    x_adv = label_attack_in_train_mode(student, x, y)
    robust = teachers["robust"]

    def loss() -> Tensor:
        t, alpha = 2.0, 0.9
        outputs, basic = student(x_adv), student(x)
        first = rows_kl(robust(x) / t, outputs / t).sum() / N
        second = (rows_kl(basic, outputs) * (1 - trust(robust(x_adv), y))).sum() / N
        return alpha * t * t * first + alpha * second + (1 - alpha) * F.cross_entropy(basic, y)

    return x_adv, loss


def iad_2(student: nn.Module, teachers: Networks, x: Tensor, y: Tensor) -> Any:
    x_adv = label_attack_in_train_mode(student, x, y)

    def loss() -> Tensor:
        t, a1, a2 = 2.0, 0.4, 0.3
        outputs, robust, clean = student(x_adv), teachers["robust"](x_adv), teachers["clean"](x_adv)
        believed = trust(robust, y)
        first = (rows_kl(robust / t, outputs / t) * believed).sum() / N
        first = first + (rows_kl(student(x), outputs) * (1 - believed)).sum() / N
        third = rows_kl(clean / t, outputs / t).sum() / N
        hard = F.cross_entropy(outputs, y)
        return (1 - a1 - a2) * hard + a1 * t * t * first + a2 * t * t * third

    return x_adv, loss


PUBLISHED: dict[str, Published] = {
    "sat": sat, "fgsm-rs": fgsm_rs, "n-fgsm": n_fgsm, "trades": trades, "mart": mart, "ard": ard,
    "rslad": rslad, "iad-i": iad_1, "iad-ii": iad_2, "adaad": adaad,
}  # fmt: skip

CONFIG = TrainConfig(
    attack=AttackConfig(epsilon=EPSILON, step_size=STEP, steps=STEPS, as_published=True),
    loss=LossConfig(
        trades_beta=5.0, mart_beta=4.0, ard_temperature=20.0, ard_alpha=0.7, adaad_alpha=0.8,
        rslad_adversarial_weight=0.7, iad_temperature=2.0, iad_beta=0.2, iad1_alpha=0.9,
        iad2_alpha_robust=0.4, iad2_alpha_clean=0.3, fgsm_rs_step=9 / 8, n_fgsm_step=0.9,
        n_fgsm_noise=1.5, distillation_scale=10.0,
    ),
)  # fmt: skip
"""No number is its default, so that each shows."""


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand((N, 1, 4, 4), dtype=torch.float64, generator=generator)
    x[0], x[1] = 0.0, 1.0  # on the bounds
    return x, torch.randint(C, (N,), generator=generator)


def test_all_methods_are_known() -> None:
    assert tuple(METHODS) == METHOD_NAMES
    # Both balanced methods are in tests/test_published_algorithm.py.
    assert set(PUBLISHED) | {"natural", "mtard", "bmtard"} == set(METHODS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_attack_and_loss_as_published(name: str, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    teachers = {"robust": teacher(1), "clean": teacher(2)}
    mine = network(0).train()
    theirs = copy.deepcopy(mine)

    torch.manual_seed(7)
    method = find_method(name)(replace(CONFIG, method=name), teachers)
    method.set_progress(0.5)
    x_adv = method.perturb(mine, x, y)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    expected, published_loss = PUBLISHED[name](theirs, teachers, x, y)
    assert torch.rand(1) == drawn  # as many random numbers

    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert mine.training
    # Batch norm has counted the batches of the attack as published.
    torch.testing.assert_close(dict(mine.state_dict()), dict(theirs.state_dict()))
    assert (x_adv - x).abs().max() > 0.9 * EPSILON

    loss, wanted = method.loss(mine, x, x_adv, y), published_loss()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    loss.backward()
    wanted.backward()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["iad-i", "iad-ii"])
def test_iad_before_it_looks_at_itself(name: str, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    teachers = {"robust": teacher(1), "clean": teacher(2)}
    student = network(0)
    method = find_method(name)(replace(CONFIG, method=name), teachers)
    method.set_progress(0.19)
    x_adv = method.perturb(student, x, y)
    actual = method.loss(student, x, x_adv, y)
    outputs, robust, clean = student(x_adv), teachers["robust"](x_adv), teachers["clean"](x_adv)
    if name == "iad-i":
        soft = rows_kl(teachers["robust"](x) / 2, outputs / 2).mean()
        wanted = 0.9 * 4 * soft + 0.1 * F.cross_entropy(student(x), y)
    else:
        soft = 0.4 * rows_kl(robust / 2, outputs / 2) + 0.3 * rows_kl(clean / 2, outputs / 2)
        wanted = 0.3 * F.cross_entropy(outputs, y) + 4 * soft.mean()
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=0)
    method.set_progress({"iad-i": 60, "iad-ii": 40}[name] / 200)  # the epoch itself counts
    assert abs(method.loss(student, x, x_adv, y) - actual) > 1e-6


def test_the_configured_attack_is_the_default(batch: tuple[Tensor, Tensor]) -> None:
    """Equal terms: start and mode of the configuration for every method."""
    x, y = batch
    attack = replace(CONFIG.attack, as_published=False, random_start="none")
    student = network(0).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    made = []
    for name in ("sat", "ard", "mart"):
        config = replace(CONFIG, method=name, attack=attack)
        made.append(find_method(name)(config, {"robust": teacher(1)}).perturb(student, x, y))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    torch.testing.assert_close(dict(student.state_dict()), before, rtol=0, atol=0)
    # Batch norm counts the images of each step if it shall.
    config = replace(CONFIG, method="sat", attack=replace(attack, batch_norm="train"))
    find_method("sat")(config, {}).perturb(student, x, y)
    assert student[1].num_batches_tracked == STEPS


@pytest.mark.parametrize(
    ("name", "clean", "weight"),
    [
        ("natural", True, 1.0), ("sat", False, 1.0), ("trades", True, 1.0), ("mart", False, 1.0),
        ("ard", True, 3.0), ("iad-i", True, 0.1), ("iad-ii", False, 0.3),
    ],
)  # fmt: skip
def test_label_smoothing(
    name: str, clean: bool, weight: float, batch: tuple[Tensor, Tensor]
) -> None:
    """Moves the loss by s (mean_c -log p_c + log p_y) of the logits whose labels it is."""
    x, y = batch
    student, s = network(0).eval(), 0.3
    losses = []
    for smoothing in (0.0, s):
        options = replace(CONFIG.loss, label_smoothing=smoothing)
        method = find_method(name)(
            replace(CONFIG, method=name, loss=options),
            {"robust": teacher(1), "clean": teacher(2)},
        )
        losses.append(method.loss(student, x, x.flip(0), y))
    log_p = student(x if clean else x.flip(0)).log_softmax(1)
    moved = weight * s * (log_p[range(N), y] - log_p.mean(1)).mean()
    torch.testing.assert_close(losses[1] - losses[0], moved)


def test_methods_of_ones_own() -> None:
    assert find_method("bmtard.training.methods.trades:TRADES") is METHODS["trades"]
    with pytest.raises(ValueError, match=r"method pathlib:Path: it must be a subclass of"):
        find_method("pathlib:Path")
    with pytest.raises(ValueError, match=r"cannot import nowhere"):
        find_method("nowhere:Class")
    with pytest.raises(ValueError, match=r"method must be natural, .* or package\.module:Class"):
        TrainConfig(method="bmtrad")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "n-fgsm"])
def test_the_norm_of_the_attack(name: str, batch: tuple[Tensor, Tensor]) -> None:
    config = replace(CONFIG, method=name, attack=replace(CONFIG.attack, norm="l2"))
    method = find_method(name)(config, {"robust": teacher(1), "clean": teacher(2)})
    length = (method.perturb(network(0), *batch) - batch[0]).flatten(1).norm(dim=1)
    assert 0.9 * EPSILON < length.max() < 1.001 * EPSILON


def test_the_balance_has_its_settings() -> None:
    options = BalanceConfig(
        mode="sign", temperature_bounds=(2.0, 5.0), temperature_lr=0.01, temperature_momentum=0.5,
        weight_lr=0.1, loss_exponent=2.0, eps=1e-4,
    )  # fmt: skip
    config = replace(CONFIG, method="bmtard", balance=options)
    method = find_method("bmtard")(config, {"robust": teacher(1), "clean": teacher(2)})
    for name, value in asdict(options).items():
        assert value != getattr(BalanceConfig(), name)
        assert getattr(method.balance, "balance" if name == "mode" else name) == value, name


def test_n_fgsm_is_of_the_maximum_norm() -> None:
    with pytest.raises(ValueError, match=r"method n-fgsm: attack.norm must be linf, got 'l2'"):
        find_method("n-fgsm")(replace(CONFIG, attack=AttackConfig(norm="l2")), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iad2_alpha_robust": 0.9, "iad2_alpha_clean": 0.2}, "iad2_alpha_clean must be <= 1 - "),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"n_fgsm_step": 0.0}, "n_fgsm_step must be finite and > 0"),
    ],
)
def test_options_defend_themselves(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_awp_as_published(warmup: float, digits: ImageData, quiet: Any, tmp_path: Path) -> None:
    """The loop of the released AWP code: a proxy steps up, the weights move, step, move back."""
    gamma = 0.05
    config = replace(
        DIGITS, method="sat", model="cnn-2", epochs=2, batch_size=192, device="cpu",
        attack=AttackConfig(epsilon=0.1, step_size=0.05, steps=1, random_start="none"),
        optimizer=OptimizerConfig(lr=0.05, schedule="constant", weight_decay=1e-3),
        awp=AWPConfig(gamma=gamma, warmup=warmup), output=tmp_path,
    )  # fmt: skip
    trainer = Trainer(config, quiet, digits)
    trainer.network.double()
    trainer.optimizer.state.clear()
    for p in trainer.network.parameters():
        trainer.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    model, proxy = copy.deepcopy(trainer.network), copy.deepcopy(trainer.network)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    proxy_optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.05

    for step, (x, y) in enumerate(trainer.batches.epoch(0)):
        x = x.double()
        trainer.method.set_progress(step / 4)
        trainer._train_step(x, y)

        model.eval()
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
        x_adv = torch.min(torch.max(x + 0.05 * grad.sign(), x - 0.1), x + 0.1).clamp(0, 1)
        model.train()
        diff: dict[str, Tensor] = {}
        if step / 4 * 2 >= warmup:
            proxy.load_state_dict(model.state_dict())
            proxy.train()
            proxy_optimizer.zero_grad()
            (-F.cross_entropy(proxy(x_adv), y)).backward()
            proxy_optimizer.step()
            for name, old in model.state_dict().items():
                if old.dim() > 1 and "weight" in name:
                    way = proxy.state_dict()[name] - old
                    diff[name] = old.norm() / (way.norm() + 1e-20) * way
            assert len(diff) > 2
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, way in diff.items():
                named[name].add_(gamma * way)
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, way in diff.items():
                named[name].sub_(gamma * way)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(
                trainer.network.state_dict()[name], value, rtol=1e-9, atol=1e-10, msg=name
            )
    assert step == 1


def test_an_error_inside_awp_leaves_the_network_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.rand(4, 3)

    def failing() -> Tensor:
        network(x)
        raise RuntimeError("no memory")

    def perturbed() -> None:
        assert not torch.equal(network[0].weight, before["0.weight"])
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError), perturbed_weights(network, 0.1, failing):
        pass
    with pytest.raises(RuntimeError), perturbed_weights(network, 0.1, lambda: network(x)[0, 0]):
        perturbed()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_perturbation_that_is_not_finite_is_none() -> None:
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    with perturbed_weights(network, 0.1, lambda: network(torch.rand(4, 3)).sum() * torch.nan):
        assert torch.equal(network.weight, before)
    assert torch.equal(network.weight, before)


def test_awp_looks_at_the_balance_without_moving_it(
    digits: ImageData, quiet: Any, teachers: dict[str, Path], tmp_path: Path
) -> None:
    config = replace(
        DIGITS, method="bmtard", model="cnn-2", device="cpu", output=tmp_path,
        teacher_clean=teachers["clean"], teacher_robust=teachers["robust"],
        awp=AWPConfig(gamma=0.01),
    )  # fmt: skip
    trainer = Trainer(config, quiet, digits)
    x, y = next(trainer.batches.epoch(0))
    trainer._train_step(x, y)
    assert int(trainer.method.balance.step) == 1
    assert trainer.method.training


def test_average_of_the_weights(digits: ImageData, quiet: Any, tmp_path: Path) -> None:
    """By hand after each step; it is what is evaluated and saved."""
    config = replace(
        DIGITS, method="natural", model="cnn-2", epochs=1, batch_size=64, device="cpu",
        ema=0.3, output=tmp_path / "run", test_attacks=(),
    )  # fmt: skip
    trainer = Trainer(config, quiet, digits)
    expected = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    step_of_trainer = trainer._train_step
    steps = 0

    def step(x: Tensor, y: Tensor) -> Any:
        nonlocal steps
        result = step_of_trainer(x, y)
        decay = min(0.3, (1 + steps) / (10 + steps))
        for name, value in trainer.network.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value
        steps += 1
        return result

    trainer._train_step = step  # type: ignore[method-assign]
    result = trainer.run()
    assert steps == 6  # the decay has gone from 0.1 to 0.3
    saved = checkpoint.load(result.checkpoint)
    torch.testing.assert_close(dict(saved["model"]), expected)
    assert not torch.equal(saved["model"]["network.head.weight"],
                           saved["weights"]["network.head.weight"])  # fmt: skip
    loaded = checkpoint.load_network(result.checkpoint)[0]
    images = digits.test_images.float() / 16
    with torch.no_grad():
        right = (loaded(images).argmax(1) == digits.test_labels).float().mean().item()
    assert result.accuracy["clean"] == pytest.approx(right)
