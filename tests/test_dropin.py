"""The published functions against transcriptions of their procedures in plain torch, float64.

Each transcription follows the released code statement by statement: modes, forward passes in their
order, draws of random numbers, clipping, zeroed gradients. Networks have batch norm and dropout, so
that a forward pass too few, too many or out of order shows in the weights after 20 steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard import dropin, losses

N, C = 8, 5
STEPS = 20
SHAPE = (N, 2, 4, 4)
# A step along a normalised gradient hands its rounding on; the sign of a gradient drops it.
TOLERANCES = {"l_inf": 1e-12, "l_2": 1e-10}
ATTACK = {"step_size": 0.02, "epsilon": 0.06, "perturb_steps": 3}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Step = Callable[[nn.Module, Tensor, Tensor, torch.optim.Optimizer], Tensor]


def network(seed: int, *, dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout),
        nn.Flatten(), nn.Linear(96, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, C),
    ).double()  # fmt: skip


def images(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.rand(SHAPE, dtype=torch.float64, generator=generator)
    x[0, 0], x[1, 0] = 0.0, 1.0  # on the bounds
    return x, torch.randint(C, (N,), generator=generator)


def train(step: Step, *others: nn.Module) -> tuple[nn.Module, list[float], Tensor]:
    """20 optimizer steps: the student, the losses, the state of the random numbers."""
    student = network(0)
    parameters = [p for net in (student, *others) for p in net.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=2e-4)
    torch.manual_seed(7)
    values = []
    for index in range(STEPS):
        x, y = images(index)
        loss = step(student, x, y, optimizer)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return student, values, torch.get_rng_state()


def assert_same_training(
    actual: Step, published: Step, *others: nn.Module, tolerance: float = 1e-12
) -> None:
    """Weights, running statistics, losses, modes and random numbers."""
    mine, theirs = copy.deepcopy(others), copy.deepcopy(others)
    with torch.random.fork_rng():
        student, values, drawn = train(lambda *args: actual(*args, *mine), *mine)
        wanted, expected, drawn_by_them = train(lambda *args: published(*args, *theirs), *theirs)
    assert values == pytest.approx(expected, rel=10 * tolerance)
    for ours, other in zip((student, *mine), (wanted, *theirs), strict=True):
        for name, value in other.state_dict().items():
            torch.testing.assert_close(
                ours.state_dict()[name], value, rtol=tolerance, atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip
        assert [m.training for m in ours.modules()] == [m.training for m in other.modules()]
    assert torch.equal(drawn, drawn_by_them)


def kl_sum(log_q: Tensor, p: Tensor) -> Tensor:
    return F.kl_div(log_q, p, reduction="sum")


def ascend(x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, epsilon: float) -> Tensor:
    x_adv = x_adv.detach() + step_size * torch.sign(grad.detach())
    x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon)
    return torch.clamp(x_adv, 0.0, 1.0)


def linf_images(
    model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], options: dict[str, Any]
) -> Tensor:
    """The l_inf branch shared by the published functions: a Gaussian start, sign steps."""
    x_adv = x.detach() + 0.001 * torch.randn(x.shape)
    for _ in range(options["perturb_steps"]):
        x_adv.requires_grad_()
        grad = torch.autograd.grad(objective(x_adv), x_adv)[0]
        x_adv = ascend(x_adv, grad, x, options["step_size"], options["epsilon"])
    return torch.clamp(x_adv, 0.0, 1.0)


def own_kl(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """KL(S(x) || S(x')), with S(x) computed anew in every step."""
    return lambda x_adv: kl_sum(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1))


def l2_images(
    model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], options: dict[str, Any]
) -> Tensor:
    """The l_2 branch: an optimizer over the perturbation."""
    delta = (0.001 * torch.randn(x.shape)).to(x.dtype).requires_grad_()
    optimizer = torch.optim.SGD([delta], lr=options["lr"])
    for _ in range(options["perturb_steps"]):
        optimizer.zero_grad()
        (-1 * objective(x + delta)).backward()
        norms = delta.grad.view(len(x), -1).norm(p=2, dim=1)
        delta.grad.div_(norms.view(-1, 1, 1, 1))
        if (norms == 0).any():
            delta.grad[norms == 0] = torch.randn_like(delta.grad[norms == 0])
        optimizer.step()
        delta.data.add_(x)
        delta.data.clamp_(0, 1).sub_(x)
        delta.data.renorm_(p=2, dim=0, maxnorm=options["epsilon"])
    return torch.clamp((x + delta).detach(), 0.0, 1.0)


def trades(model, x, y, optimizer, *, beta, distance, one_pass=False, **options):
    model.eval()
    if distance == "l_inf":
        x_adv = linf_images(model, x, own_kl(model, x), options)
    else:
        torch.randn(x.shape)  # the start of the other branch
        lr = options["epsilon"] / options["perturb_steps"] * 2
        x_adv = l2_images(model, x, own_kl(model, x), {**options, "lr": lr})
    model.train()
    optimizer.zero_grad()
    clean, adversarial = model(x), model(x_adv)
    target = clean if one_pass else model(x)
    robust = (1.0 / len(x)) * kl_sum(F.log_softmax(adversarial, 1), F.softmax(target, 1))
    return F.cross_entropy(clean, y) + beta * robust


@pytest.mark.parametrize("distance", ["l_inf", "l_2"])
def test_trades(distance: str) -> None:
    options = {**ATTACK, "beta": 6.0, "distance": distance}
    if distance == "l_2":
        options["epsilon"] = 0.5
    assert_same_training(
        lambda *args: dropin.trades_loss(*args, **options),
        lambda *args: trades(*args, **options),
        tolerance=TOLERANCES[distance],
    )


def test_trades_where_the_gradient_is_zero() -> None:
    """Where S is constant the l_2 attack goes a random way, at random numbers of its own."""
    constant = nn.Sequential(nn.Flatten(), nn.Linear(32, C)).double()
    nn.init.zeros_(constant[1].weight)
    options = {**ATTACK, "epsilon": 0.5, "beta": 6.0, "distance": "l_2"}
    seen: dict[str, list[Tensor]] = {}
    for name, function in (("ours", dropin.trades_loss), ("theirs", trades)):
        model = copy.deepcopy(constant)
        images_seen = seen[name] = []
        model.register_forward_pre_hook(lambda _, args, into=images_seen: into.append(args[0]))
        torch.manual_seed(3)
        function(model, *images(0), torch.optim.SGD(model.parameters(), 0.1), **options)
    # Of the last three forward passes, in train mode, the second sees the attacked images.
    torch.testing.assert_close(seen["ours"][-2], seen["theirs"][-2], rtol=0, atol=1e-12)
    assert (seen["ours"][-2] - images(0)[0]).abs().max() > 0.01


def test_the_l2_start_alone_is_clipped() -> None:
    model, (x, y) = network(0), images(0)
    x = x.round()  # on the bounds
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dropin.trades_loss(model, x, y, optimizer, perturb_steps=0, distance="l_2")
    assert not torch.equal(seen[-2], x)
    assert torch.equal(seen[-2], seen[-2].clamp(0, 1))


def test_trades_the_cheaper_form() -> None:
    """Two forward passes in train mode instead of three, and so another training."""
    counted = {}
    weights = {}
    for exact in (True, False):
        student, _, _ = train(
            lambda *args, exact=exact: dropin.trades_loss(*args, **ATTACK, beta=6.0, exact=exact)
        )
        counted[exact] = int(student[1].num_batches_tracked)
        weights[exact] = student[-1].weight
    assert counted == {True: 3 * STEPS, False: 2 * STEPS}
    assert not torch.allclose(weights[True], weights[False], rtol=1e-3)


@pytest.fixture
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("distance", ["l_inf", "l_2"])
def test_the_cheaper_form_is_that_of_core_utils(distance: str) -> None:
    """TRADES of imrahulr/hat: one pass over the clean images, which is the target as well."""
    options: dict[str, Any] = {**ATTACK, "beta": 6.0, "distance": distance}
    assert_same_training(
        lambda *args: dropin.trades_loss(*args, **options, exact=False),
        lambda *args: trades(*args, **options, one_pass=True),
        tolerance=TOLERANCES[distance],
    )


def mart(model, x, y, optimizer, *, beta, **options):
    model.eval()
    x_adv = linf_images(model, x, lambda x_adv: F.cross_entropy(model(x_adv), y), options)
    model.train()
    optimizer.zero_grad()
    logits = model(x)
    logits_adv = model(x_adv)
    adv_probs = F.softmax(logits_adv, dim=1)
    order = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    boosted = F.cross_entropy(logits_adv, y)
    boosted = boosted + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), new_y)
    nat_probs = F.softmax(logits, dim=1)
    true_probs = torch.gather(nat_probs, 1, y.unsqueeze(1)).squeeze()
    each = F.kl_div(torch.log(adv_probs + 1e-12), nat_probs, reduction="none").sum(1)
    return boosted + beta * (1.0 / len(x)) * torch.sum(each * (1.0000001 - true_probs))


def test_mart() -> None:
    assert_same_training(
        lambda *args: dropin.mart_loss(*args, **ATTACK, beta=5.0),
        lambda *args: mart(*args, **ATTACK, beta=5.0),
    )


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_published_defaults(name: str) -> None:
    """Settings, and no attack at all: the start alone, clipped."""
    ours, theirs = getattr(dropin, f"{name}_loss"), globals()[name]
    defaults = {
        "trades": {"step_size": 0.003, "epsilon": 0.031, "beta": 1.0, "distance": "l_inf"},
        "mart": {"step_size": 0.007, "epsilon": 0.031, "beta": 6.0},
    }[name]
    for options in ({}, {"perturb_steps": 0}):
        results = []
        for function, settings in (
            (ours, options),
            (theirs, {"perturb_steps": 10, **defaults, **options}),
        ):
            model = network(0)
            torch.manual_seed(1)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            results.append(function(model, *images(0), optimizer, **settings).item())
        assert results[0] == pytest.approx(results[1], rel=1e-12)


def rslad(model, x, y, optimizer, teacher):
    with torch.no_grad():
        teacher_logits = teacher(x)
    model.eval()
    target = F.softmax(teacher_logits, dim=1)
    x_adv = linf_images(
        model, x, lambda x_adv: kl_sum(F.log_softmax(model(x_adv), 1), target), ATTACK
    )
    model.train()
    optimizer.zero_grad()
    terms = [
        torch.mean(-F.log_softmax(logits, 1) * target + torch.log(target + 1e-5) * target)
        for logits in (model(x_adv), model(x))
    ]
    return 5 / 6.0 * terms[0] + 1 / 6.0 * terms[1]


def rslad_with_bmtard(model, x, y, optimizer, teacher):
    with torch.no_grad():
        teacher_logits = teacher(x)
    adv_logits = dropin.rslad_inner_loss(model, teacher_logits, x, y, optimizer, **ATTACK)
    return losses.rslad_loss(
        student_adversarial_logits=adv_logits,
        student_clean_logits=model(x),
        teacher_clean_logits=teacher_logits,
    )


def test_rslad() -> None:
    assert_same_training(rslad_with_bmtard, rslad, network(1).eval())


def adaad_images(model, teacher, x, *, BN_eval=True, random_init=True):
    if BN_eval:
        model.eval()
    teacher.eval()
    x_adv = x.detach() + 0.001 * torch.randn(x.shape) if random_init else x.detach()
    for _ in range(3):
        x_adv.requires_grad_()
        objective = kl_sum(F.log_softmax(model(x_adv), 1), F.softmax(teacher(x_adv), 1))
        x_adv = ascend(x_adv, torch.autograd.grad(objective, x_adv)[0], x, 0.02, 0.06)
    model.train()
    return x_adv


@pytest.mark.parametrize(
    "options", [{}, {"BN_eval": False}, {"random_init": False}], ids=lambda o: "-".join(o) or "all"
)
def test_adaad(options: dict[str, bool]) -> None:
    def published(model, x, y, optimizer, teacher):
        x_adv = adaad_images(model, teacher, x, **options)
        optimizer.zero_grad()
        clean, adversarial = model(x), model(x_adv)
        with torch.no_grad():
            taught, taught_adv = teacher(x), teacher(x_adv)
        terms = [
            F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="none").mean()
            for s, t in ((adversarial, taught_adv), (clean, taught))
        ]
        return 0.9 * terms[0] + 0.1 * terms[1]

    def ours(model, x, y, optimizer, teacher):
        x_adv = dropin.adaad_inner_loss(
            model, teacher, x, step_size=0.02, steps=3, epsilon=0.06, **options
        )
        optimizer.zero_grad()
        clean, adversarial = model(x), model(x_adv)
        with torch.no_grad():
            taught, taught_adv = teacher(x), teacher(x_adv)
        return losses.adaad_loss(
            student_adversarial_logits=adversarial,
            student_clean_logits=clean,
            teacher_adversarial_logits=taught_adv,
            teacher_clean_logits=taught,
            alpha=0.9,
        )

    # As published, the attack puts the teacher into eval mode.
    assert_same_training(ours, published, network(1).train())


class PublishedAttackPGD(nn.Module):
    def __init__(self, basic_net, config):
        super().__init__()
        self.basic_net, self.config = basic_net, config

    def forward(self, inputs, targets):
        x = inputs.detach()
        x = x + torch.zeros_like(x).uniform_(-self.config["epsilon"], self.config["epsilon"])
        for _ in range(self.config["num_steps"]):
            x.requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(self.basic_net(x), targets, reduction="sum")
            grad = torch.autograd.grad(loss, [x])[0]
            x = ascend(x, grad, inputs, self.config["step_size"], self.config["epsilon"])
        return self.basic_net(x), x


CONFIG = {"epsilon": 0.06, "num_steps": 3, "step_size": 0.02}


def test_ard() -> None:
    """The attack runs in train mode: its batches are counted by batch norm, with dropout."""

    def published(model, x, y, optimizer, teacher):
        net = PublishedAttackPGD(model, CONFIG).train()
        optimizer.zero_grad()
        outputs, _ = net(x, y)
        taught, basic = teacher(x), model(x)
        soft = F.kl_div(F.log_softmax(outputs / 5, 1), F.softmax(taught / 5, 1), reduction="none")
        return 0.7 * 5 * 5 * soft.mean() + (1.0 - 0.7) * F.cross_entropy(basic, y)

    def ours(model, x, y, optimizer, teacher):
        net = dropin.AttackPGD(model, CONFIG).train()
        optimizer.zero_grad()
        outputs, _ = net(x, y)
        return losses.ard_loss(
            student_adversarial_logits=outputs,
            teacher_clean_logits=teacher(x),
            student_clean_logits=model(x),
            labels=y,
            temperature=5.0,
            alpha=0.7,
        )

    assert_same_training(ours, published, network(1).eval().requires_grad_(False))


def test_attack_pgd_without_gradients() -> None:
    """As the published evaluation calls it; and without steps it is the start, not clipped."""
    x, y = images(0)
    for config in (CONFIG, {**CONFIG, "num_steps": 0}):
        results = []
        for attack in (dropin.AttackPGD, PublishedAttackPGD):
            torch.manual_seed(1)
            with torch.no_grad():
                results.append(attack(network(0), config).eval()(x, y))
        for actual, wanted in zip(*results, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    assert results[0][1].min() < 0


def test_iad() -> None:
    def published(model, x, y, optimizer, teacher):
        net = PublishedAttackPGD(model, CONFIG).train()
        optimizer.zero_grad()
        taught = teacher(x)
        outputs, x_adv = net(x, y)
        model(x_adv).detach()  # computed and never used
        guide = teacher(x_adv)
        trust = torch.tensor([F.softmax(guide, 1)[i][y[i].item()].pow(0.1) for i in range(N)])
        soft = F.kl_div(F.log_softmax(outputs / 2, 1), F.softmax(taught / 2, 1), reduction="none")
        own = F.kl_div(F.log_softmax(outputs, 1), F.softmax(model(x), 1), reduction="none")
        return (
            0.9 * 2 * 2 * (1 / N) * torch.sum(soft.sum(dim=1))
            + 0.9 * (1 / N) * torch.sum(own.sum(dim=1).mul(1 - trust))
            + (1.0 - 0.9) * F.cross_entropy(model(x), y)
        )

    def ours(model, x, y, optimizer, teacher):
        net = dropin.AttackPGD(model, CONFIG).train()
        optimizer.zero_grad()
        outputs, x_adv = net(x, y)
        model(x_adv)
        return losses.iad_loss(
            student_adversarial_logits=outputs,
            target_logits=model(x),
            student_clean_logits=model(x),
            teacher_clean_logits=teacher(x),
            teacher_adversarial_logits=teacher(x_adv),
            labels=y,
            temperature=2.0,
            alpha=0.9,
        )

    assert_same_training(ours, published, network(1).eval().requires_grad_(False))


def mtard(state: dict[str, float]) -> Step:
    def step(model, x, y, optimizer, robust, clean):
        with torch.no_grad():
            taught = clean(x)
        model.eval()
        x_adv = linf_images(model, x, lambda x_adv: F.cross_entropy(model(x_adv), y), ATTACK)
        model.train()
        optimizer.zero_grad()
        adversarial = model(x_adv)
        with torch.no_grad():
            taught_adv = robust(x_adv)
        terms = []
        for student, teacher in ((adversarial, taught_adv), (model(x), taught)):
            p = F.softmax(teacher, 1)
            terms.append(torch.mean(-F.log_softmax(student, 1) * p + torch.log(p + 1e-5) * p))
        adv, nat = terms
        state.setdefault("nat", nat.item())
        state.setdefault("adv", adv.item())
        rate_adv, rate_nat = adv.item() / state["adv"], nat.item() / state["nat"]
        weight = state.get("weight", 0.5)
        state["weight"] = weight - 0.025 * (weight - rate_nat / (rate_adv + rate_nat))
        return (1 - state["weight"]) * adv + state["weight"] * nat

    return step


def test_mtard() -> None:
    import bmtard

    balance = bmtard.NormalizationLossBalance(2, weight_lr=0.025)

    def ours(model, x, y, optimizer, robust, clean):
        with torch.no_grad():
            taught = clean(x)
        adversarial, taught_adv = dropin.mtard_inner_loss_ce(
            model, robust, x, y, optimizer, **ATTACK
        )
        assert not taught_adv.requires_grad
        students, teachers = [adversarial, model(x)], [taught_adv, taught]
        each = bmtard.multi_teacher_kl(students, teachers, reduction="mean", eps=1e-5)
        return losses.mtard_loss(students, teachers, balance(each))

    assert_same_training(ours, mtard({}), network(1).eval(), network(2).eval())


def hat(model, x, y, optimizer, helper, *, attack, h=3.5, beta=2.0, gamma=0.5):
    options = {**ATTACK, "epsilon": 0.5} if attack == "l2-pgd" else ATTACK
    model.eval()
    p_natural_of = lambda: F.softmax(model(x), dim=1)  # noqa: E731
    if attack == "linf-pgd":
        noise = 0.001 * torch.randn(x.shape)
        p_natural = p_natural_of()
        x_adv = x.detach() + noise
        for _ in range(options["perturb_steps"]):
            x_adv.requires_grad_()
            objective = kl_sum(F.log_softmax(model(x_adv), 1), p_natural.detach())
            grad = torch.autograd.grad(objective, x_adv)[0]
            x_adv = ascend(x_adv, grad, x, options["step_size"], options["epsilon"])
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    else:
        torch.randn(x.shape)
        p_natural = p_natural_of().detach()
        x_adv = l2_images(
            model,
            x,
            lambda x_adv: kl_sum(F.log_softmax(model(x_adv), 1), p_natural),
            {**options, "lr": options["step_size"]},
        )
    model.train()
    x_hr = x + h * (x_adv - x)
    flags = [(m, m.training) for m in helper.modules()]
    helper.eval()
    y_hr = helper(x_adv).argmax(dim=1)
    for module, flag in flags:
        module.training = flag
    optimizer.zero_grad()
    out_clean, out_adv, out_help = model(x), model(x_adv), model(x_hr)
    loss = F.cross_entropy(out_clean, y)
    loss = loss + beta * (1 / len(x)) * kl_sum(F.log_softmax(out_adv, 1), F.softmax(out_clean, 1))
    loss = loss + gamma * F.cross_entropy(out_help, y_hr)
    metrics = {
        "loss": loss.item(),
        "adversarial_acc": (out_adv.argmax(1) == y).sum().item() / len(x),
        "helper_acc": (out_help.argmax(1) == y_hr).sum().item() / len(x),
        "clean_acc": (out_clean.argmax(1) == y).sum().item() / len(x),
    }
    return loss, metrics


@pytest.mark.parametrize("attack", ["linf-pgd", "l2-pgd"])
def test_hat(attack: str) -> None:
    options = {**ATTACK, "epsilon": 0.5} if attack == "l2-pgd" else ATTACK
    seen: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}

    def ours(model, x, y, optimizer, helper):
        loss, metrics = dropin.hat_loss(
            model, x, y, optimizer, **options, h=3.5, beta=2.0, gamma=0.5,
            attack=attack, hr_model=helper,
        )  # fmt: skip
        seen["ours"].append(metrics)
        return loss

    def published(model, x, y, optimizer, helper):
        loss, metrics = hat(model, x, y, optimizer, helper, attack=attack)
        seen["theirs"].append(metrics)
        return loss

    # The helper is in train mode outside of the loss, and none of it moves.
    assert_same_training(
        ours, published, network(1).train().requires_grad_(False),
        tolerance=TOLERANCES["l_2" if attack == "l2-pgd" else "l_inf"],
    )  # fmt: skip
    for mine, theirs in zip(seen["ours"], seen["theirs"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-11)


def test_lbgat() -> None:
    """The teacher learns with the student."""

    def published(model, x, y, optimizer, teacher):
        model.eval()
        x_adv = linf_images(model, x, own_kl(model, x), ATTACK)
        model.train()
        optimizer.zero_grad()
        out_adv, out_natural, out = model(x_adv), model(x), teacher(x)
        guided = F.mse_loss(out_adv, out) + F.cross_entropy(out, y)
        robust = (1.0 / N) * kl_sum(F.log_softmax(out_adv, 1), F.softmax(out_natural, 1))
        return guided + 3.0 * robust

    def ours(model, x, y, optimizer, teacher):
        return dropin.lbgat_loss(model, teacher, x, y, optimizer, **ATTACK, beta=3.0)

    assert_same_training(ours, published, network(1).train())


class PublishedAWP:
    """calc, perturb, restore on a proxy, for a loss of the proxy's."""

    def __init__(self, proxy, gamma):
        self.proxy, self.gamma = proxy, gamma
        self.optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)

    def calc(self, model, loss_of):
        self.proxy.load_state_dict(model.state_dict())
        self.proxy.train()
        loss = -1.0 * loss_of(self.proxy)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        diff = {}
        for (key, old), new in zip(
            model.state_dict().items(), self.proxy.state_dict().values(), strict=True
        ):
            if len(old.size()) <= 1 or "weight" not in key:
                continue
            way = new - old
            diff[key] = old.norm() / (way.norm() + 1e-20) * way
        return diff

    def move(self, model, diff, sign):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in diff:
                    parameter.add_(sign * self.gamma * diff[name])


@pytest.mark.parametrize("kind", ["at", "trades"])
def test_awp(kind: str) -> None:
    """The loop of the published training: attack, perturb, step, restore."""

    def perturbed_training(awp: Any, trades_of: Any, ours: bool) -> nn.Module:
        model = network(0)
        proxy = network(5).eval()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if ours:
            adversary = awp(model, proxy, torch.optim.SGD(proxy.parameters(), lr=0.01), 0.02)
        else:
            adversary = awp(proxy, 0.02)
        torch.manual_seed(7)
        for index in range(STEPS):
            x, y = images(index)
            model.eval()
            x_adv = linf_images(model, x, own_kl(model, x), ATTACK)
            model.train()
            if ours and kind == "at":
                diff = adversary.calc_awp(inputs_adv=x_adv, targets=y)
            elif ours:
                diff = adversary.calc_awp(inputs_adv=x_adv, inputs_clean=x, targets=y, beta=4.0)
            else:
                diff = adversary.calc(model, lambda net: trades_of(net, x, x_adv, y))  # noqa: B023
            assert set(diff) == {"0.weight", "5.weight", "8.weight"}
            if ours:
                adversary.perturb(diff)
            else:
                adversary.move(model, diff, 1.0)
            optimizer.zero_grad()
            trades_of(model, x, x_adv, y).backward()
            optimizer.step()
            if ours:
                adversary.restore(diff)
            else:
                adversary.move(model, diff, -1.0)
        return model

    def at(net, x, x_adv, y):
        return F.cross_entropy(net(x_adv), y)

    def robust(net, x, x_adv, y):
        natural = F.cross_entropy(net(x), y)
        divergence = F.kl_div(
            F.log_softmax(net(x_adv), 1), F.softmax(net(x), 1), reduction="batchmean"
        )
        return natural + 4.0 * divergence

    loss = at if kind == "at" else robust
    adversary = dropin.AdvWeightPerturb if kind == "at" else dropin.TradesAWP
    actual = perturbed_training(adversary, loss, ours=True)
    expected = perturbed_training(PublishedAWP, loss, ours=False)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_dropin_refuses_what_it_cannot_do() -> None:
    x, y = images(0)
    net = network(0)
    for call, message in (
        (lambda: dropin.trades_loss(net, x, y, None, distance="l2"),
         "trades_loss: distance must be 'l_inf' or 'l_2', got 'l2'"),
        (lambda: dropin.mart_loss(net, x, y, None, distance="l_2"),
         "mart_loss: distance must be 'l_inf', got 'l_2'"),
        (lambda: dropin.lbgat_loss(net, net, x, y, None, distance="l_2"),
         "lbgat_loss: distance must be 'l_inf', got 'l_2'"),
        (lambda: dropin.hat_loss(net, x, y, None, attack="fgsm", hr_model=net),
         "hat_loss: attack must be 'linf-pgd' or 'l2-pgd', got 'fgsm'"),
        (lambda: dropin.hat_loss(net, x, y, None), "hat_loss: hr_model must be a network"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


class _Pair(nn.Module):
    """Logits and features, as networks of distillation return them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x


@pytest.mark.parametrize("name", ["trades", "mart", "hat", "lbgat", "rslad", "adaad teacher"])
def test_a_model_that_returns_a_tuple_is_told_so(name: str) -> None:
    x, y = images(0)
    model, other = _Pair(), network(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    calls: dict[str, Callable[[], Any]] = {
        "trades": lambda: dropin.trades_loss(model, x, y, optimizer),
        "mart": lambda: dropin.mart_loss(model, x, y, optimizer),
        "hat": lambda: dropin.hat_loss(model, x, y, optimizer, hr_model=other),
        "lbgat": lambda: dropin.lbgat_loss(model, other, x, y, optimizer),
        "rslad": lambda: dropin.rslad_inner_loss(other, model(x), x, y, optimizer),  # type: ignore[arg-type]
        "adaad teacher": lambda: dropin.adaad_inner_loss(other, model, x),
    }
    with pytest.raises(TypeError, match=r"logits.*tuple.*\[0\]"):
        calls[name]()
