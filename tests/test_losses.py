"""Each loss against an independent float64 transcription of its published formula."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from torch import Tensor

import bmtard
from bmtard import losses

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
    return boosted + 6 * (each * (1.0000001 - p[range(len(y)), y])).sum() / len(y)


def ard(z: dict[str, Tensor], y: Tensor) -> Tensor:
    distilled = kl(z["teacher_clean"].detach(), z["student_adv"], 30.0).sum() / (len(y) * C)
    return 0.7 * 30.0**2 * distilled + 0.3 * F.cross_entropy(z["student_clean"], y)


def rslad(z: dict[str, Tensor], y: Tensor) -> Tensor:
    teacher = z["teacher_clean"].detach()
    adversarial, clean = (kl(teacher, z[s], eps=1e-5) for s in ("student_adv", "student_clean"))
    return (5 / 6 * adversarial.sum() + 1 / 6 * clean.sum()) / (len(y) * C)


def trust(logits: Tensor, y: Tensor) -> Tensor:
    return log_p(logits.detach()).exp()[range(len(y)), y] ** 0.1


def iad(z: dict[str, Tensor], y: Tensor) -> Tensor:
    own = kl(z["student_clean"], z["student_adv"]) * (1 - trust(z["teacher_adv"], y))
    return (
        0.7 * 4 * kl(z["teacher_clean"].detach(), z["student_adv"], 2.0).sum() / len(y)
        + 0.7 * own.sum() / len(y)
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
    adversarial = kl(z["teacher_adv"].detach(), z["student_adv"]).sum() / (len(y) * C)
    clean = kl(z["teacher_clean"].detach(), z["student_clean"]).sum() / (len(y) * C)
    return 0.8 * adversarial + 0.2 * clean


def mtard(z: dict[str, Tensor], y: Tensor) -> Tensor:
    adversarial = kl(z["teacher_adv"].detach(), z["student_adv"], eps=1e-5).sum() / (len(y) * C)
    clean = kl(z["teacher_clean"].detach(), z["student_clean"], eps=1e-5).sum() / (len(y) * C)
    return 0.3 * adversarial + 0.7 * clean


def named(z: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Arguments of a loss that are called as in the dictionary, "student_adv" and so on."""
    return {name.replace("adv", "adversarial") + "_logits": z[name] for name in (names or tuple(z))}


# expected, actual (the options of a call follow y), and the logits that get gradient
Loss = Callable[..., Tensor]
STUDENTS = {"student_adv", "student_clean"}
CASES: dict[str, tuple[Loss, Loss]] = {
    "trades": (
        trades,
        lambda z, y, **options: losses.trades_loss(
            clean_logits=z["student_clean"],
            adversarial_logits=z["student_adv"],
            labels=y,
            **options,
        ),
    ),
    "mart": (
        mart,
        lambda z, y, **options: losses.mart_loss(
            clean_logits=z["student_clean"],
            adversarial_logits=z["student_adv"],
            labels=y,
            **options,
        ),
    ),
    "ard": (
        ard,
        lambda z, y, **options: losses.ard_loss(
            **named(z, "student_adv", "student_clean", "teacher_clean"),
            labels=y,
            alpha=0.7,
            **options,
        ),
    ),
    "rslad": (
        rslad,
        lambda z, y, **options: losses.rslad_loss(
            **named(z, "student_adv", "student_clean", "teacher_clean"), **options
        ),
    ),
    "iad": (
        iad,
        lambda z, y, **options: losses.iad_loss(
            **named(z), labels=y, temperature=2.0, alpha=0.7, **options
        ),
    ),
    "iad2": (
        iad2,
        lambda z, y, **options: losses.iad2_loss(
            **named(z, "student_adv", "student_clean"),
            robust_teacher_logits=z["teacher_adv"],
            clean_teacher_logits=z["teacher_clean"],
            labels=y,
            temperature=2.0,
            **options,
        ),
    ),
    "adaad": (
        adaad,
        lambda z, y, **options: losses.adaad_loss(**named(z), alpha=0.8, **options),
    ),
    "mtard": (
        mtard,
        lambda z, y, **options: losses.mtard_loss(
            [z["student_adv"], z["student_clean"]],
            [z["teacher_adv"], z["teacher_clean"]],
            [0.3, 0.7],
            **options,
        ),
    ),
}
LABELLED = ["trades", "mart", "ard", "iad", "iad2"]


def random_logits(*shape: int, scale: float = 3.0) -> dict[str, Tensor]:
    return {n: (scale * torch.randn(*shape, dtype=torch.float64)) for n in NAMES}


def value_and_gradients(
    loss: Loss, z: dict[str, Tensor], y: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    leaves = {n: one.detach().clone().requires_grad_() for n, one in z.items()}
    value = loss(leaves, y, **options)
    value.sum().backward()
    return value.detach(), {n: leaf.grad for n, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name: str, dtype: torch.dtype) -> None:
    expected_loss, actual_loss = CASES[name]
    z, y = random_logits(N, C), torch.randint(C, (N,))
    expected, wanted = value_and_gradients(expected_loss, z, y)
    actual, grads = value_and_gradients(actual_loss, {n: one.to(dtype) for n, one in z.items()}, y)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(actual, expected.to(dtype), **tolerance)
    assert {n for n, grad in grads.items() if grad is not None} == STUDENTS
    for n in STUDENTS:
        torch.testing.assert_close(grads[n], wanted[n].to(dtype), **tolerance)


def test_alternatives_of_the_published_loops() -> None:
    z, y = random_logits(N, C), torch.randint(C, (N,))
    # IAD-I before epoch 60 is ARD with another reduction.
    early = losses.iad_loss(**named(z), labels=y, temperature=5.0, introspect=False)
    ard_all = losses.ard_loss(
        **named(z, "student_adv", "student_clean", "teacher_clean"), labels=y, temperature=5.0
    )
    torch.testing.assert_close(early, C * ard_all)
    # AdaAD's CIFAR-100 code divides by N, its CIFAR-10 code by N * C.
    by_rows, by_values = (losses.adaad_loss(**named(z), reduction=r) for r in ("batchmean", "mean"))
    torch.testing.assert_close(by_rows, C * by_values)


def test_a_target_of_its_own() -> None:
    """TRADES and IAD-I take S(x) of the divergence from another forward pass than S(x) of CE."""
    z, y = random_logits(N, C), torch.randint(C, (N,))
    other = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    for name, factor in (("trades", 6.0), ("iad", None)):
        actual = CASES[name][1](z, y, target_logits=other)
        if factor is not None:
            expected = F.cross_entropy(z["student_clean"], y)
            expected = expected + factor * kl(other, z["student_adv"]).mean()
        else:
            expected = iad({**z, "student_clean": other}, y)
            expected = expected - 0.3 * F.cross_entropy(other, y)
            expected = expected + 0.3 * F.cross_entropy(z["student_clean"], y)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, other), torch.autograd.grad(expected, other)
        )


@pytest.mark.parametrize("name", CASES)
def test_no_nan_where_probabilities_vanish(name: str) -> None:
    """PyTorch's kl_div has NaN gradients for a target of probability 0 that needs gradient."""
    z = {n: torch.zeros(N, C).index_fill_(1, torch.tensor([k]), 300.0) for k, n in enumerate(NAMES)}
    value, grads = value_and_gradients(CASES[name][1], z, torch.zeros(N, dtype=torch.int64))
    assert value.isfinite()
    for n in STUDENTS:
        assert grads[n].isfinite().all()


def test_mart_bounds_the_divergence_as_published() -> None:
    """log(p + 1e-12) in the published code: it matters from a logit margin of 27 on."""
    z = {n: torch.zeros(N, C, dtype=torch.float64) for n in NAMES}
    z["student_adv"][:, 1] = 60.0
    z["student_clean"][:, 2] = 4.0
    y = torch.full((N,), 2)
    expected, wanted = value_and_gradients(mart, z, y)
    actual, grads = value_and_gradients(CASES["mart"][1], z, y)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for n in STUDENTS:
        torch.testing.assert_close(grads[n], wanted[n], rtol=1e-10, atol=1e-14)
    exact = CASES["mart"][1](z, y, eps=0.0)
    assert exact > 1.05 * actual


def test_mart_without_the_bound() -> None:
    """Through another op, with the same gradients by the weight as well."""
    z, y = random_logits(N, C, scale=1.0), torch.randint(C, (N,))
    expected, wanted = value_and_gradients(mart, z, y)
    actual, grads = value_and_gradients(CASES["mart"][1], z, y, eps=0.0)
    torch.testing.assert_close(actual, expected)
    for n in STUDENTS:
        torch.testing.assert_close(grads[n], wanted[n])


@pytest.mark.parametrize("name", LABELLED)
def test_a_label_for_every_token(name: str) -> None:
    """Logits [N, T, C] with labels [N, T], also where T == C, are N * T rows."""
    z, y = random_logits(2, C, C), torch.randint(C, (2, C))
    flat = {n: one.flatten(0, 1) for n, one in z.items()}
    expected, wanted = value_and_gradients(CASES[name][0], flat, y.flatten())
    actual, grads = value_and_gradients(CASES[name][1], z, y)
    torch.testing.assert_close(actual, expected)
    for n in STUDENTS:
        torch.testing.assert_close(grads[n].flatten(0, 1), wanted[n])


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "mtard"])
def test_rows_that_do_not_count(name: str, reduction: str) -> None:
    """As if they were not there, whatever they hold."""
    options = {} if name == "mart" else {"reduction": reduction}
    z, y = random_logits(2, 4, C), torch.randint(C, (2, 4))
    counted = torch.tensor([[True, False, True, True], [False, True, True, False]])
    kept = {n: one[counted] for n, one in z.items()}
    expected, wanted = value_and_gradients(CASES[name][1], kept, y[counted], **options)
    spoiled = {n: one.masked_fill(~counted.unsqueeze(-1), torch.nan) for n, one in z.items()}
    y = y.masked_fill(~counted, -100)
    out = {"ignore_index": -100} if name in LABELLED else {"mask": counted}
    actual, grads = value_and_gradients(CASES[name][1], spoiled, y, **options, **out)
    if reduction == "none" and name != "mart":
        assert actual.shape == counted.shape
        assert (actual[~counted] == 0).all()
        actual = actual[counted]
    torch.testing.assert_close(actual, expected)
    for n in STUDENTS:
        torch.testing.assert_close(grads[n][counted], wanted[n])
        assert (grads[n][~counted] == 0).all()


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("mart", "mtard")])
def test_reductions(name: str) -> None:
    """Rows of "none" add up to "sum"; "mean" divides the divergences by C as well."""
    z, y = random_logits(2, 3, C), torch.randint(C, (2, 3))
    loss = CASES[name][1]
    each = loss(z, y, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(loss(z, y, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(z, y, reduction="batchmean"), each.mean())
    hard = {
        "trades": lambda: F.cross_entropy(z["student_clean"].flatten(0, 1), y.flatten()),
        "ard": lambda: 0.3 * F.cross_entropy(z["student_clean"].flatten(0, 1), y.flatten()),
        "iad": lambda: 0.3 * F.cross_entropy(z["student_clean"].flatten(0, 1), y.flatten()),
        "iad2": lambda: 0.25 * F.cross_entropy(z["student_adv"].flatten(0, 1), y.flatten()),
    }.get(name, lambda: torch.zeros((), dtype=torch.float64))()
    torch.testing.assert_close(loss(z, y, reduction="mean"), hard + (each.mean() - hard) / C)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [-100, -1, C])
def test_bad_labels(name: str, label: int) -> None:
    z, y = random_logits(N, C), torch.zeros(N, dtype=torch.int64)
    y[2] = label
    low, high = min(label, 0), max(label, 0)
    message = rf"{name}_loss: labels must be 0 to 9 .* got values from {low} to {high} .*ignore_ind"
    with pytest.raises(ValueError, match=message):
        CASES[name][1](z, y)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(C, dtype=torch.int64), ValueError, r"labels must be \[7\] .*, got \[10\]"),
        (torch.zeros(N, C), TypeError, r"labels must be a tensor of torch.int64, got torch.float3"),
        (torch.zeros(N, dtype=torch.int32), TypeError, "labels must .* got torch.int32"),
        ([0] * N, TypeError, "labels must be a tensor of torch.int64, got list"),
    ],
)
@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_a_wrong_kind(
    name: str, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{name}_loss: {message}"):
        CASES[name][1](random_logits(N, C), labels)


def test_clean_and_adversarial_cannot_be_swapped_unseen() -> None:
    """All logits of the losses on two kinds of images are keyword-only."""
    for name in losses.__all__:
        parameters = inspect.signature(getattr(losses, name)).parameters.values()
        logits = [p for p in parameters if p.name.endswith("_logits")]
        if any("clean" in p.name or "adversarial" in p.name for p in logits):
            assert all(p.kind == p.KEYWORD_ONLY for p in logits), name
        else:
            order = [p.name for p in logits if p.kind == p.POSITIONAL_OR_KEYWORD]
            assert order == ["student_logits", "teacher_logits"], name


def tempered(logits: np.ndarray, temperature: float) -> np.ndarray:
    return scipy.special.softmax(logits / temperature, axis=-1)


def relative(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) by row."""
    return scipy.special.rel_entr(p, q).sum(-1)


def numpy_kd(s: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> np.ndarray:
    return T**2 * relative(tempered(t, T), tempered(s, T))


def numpy_reverse(s: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> np.ndarray:
    return T**2 * relative(tempered(s, T), tempered(t, T))


def numpy_jsd(beta: float) -> Callable[..., np.ndarray]:
    def loss(s: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> np.ndarray:
        q, p = tempered(s, T), tempered(t, T)
        if beta == 0:
            return relative(p, q)
        if beta == 1:
            return relative(q, p)
        middle = beta * p + (1 - beta) * q
        return beta * relative(p, middle) + (1 - beta) * relative(q, middle)

    return loss


def numpy_dkd(s: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> np.ndarray:
    loss = np.zeros(len(y))
    for i, label in enumerate(y):
        p, q = tempered(t[i], T), tempered(s[i], T)
        others = [c for c in range(len(p)) if c != label]
        binary = [np.array([r[label], r[others].sum()]) for r in (p, q)]
        rest = [r[others] / r[others].sum() for r in (p, q)]
        loss[i] = T**2 * (1.5 * relative(*binary) + 8.0 * relative(*rest))
    return loss


DISTILLATION: dict[str, tuple[Callable[..., np.ndarray], Callable[..., Tensor]]] = {
    "kd": (numpy_kd, lambda s, t, y, **o: losses.kd_loss(s, t, **o)),
    "reverse_kl": (numpy_reverse, lambda s, t, y, **o: losses.reverse_kl_loss(s, t, **o)),
    **{
        f"jsd-{beta}": (
            numpy_jsd(beta),
            lambda s, t, y, beta=beta, **o: losses.jsd_loss(s, t, beta=beta, **o),
        )
        for beta in (0, 0.1, 0.5, 0.9, 1)
    },
    "dkd": (numpy_dkd, lambda s, t, y, **o: losses.dkd_loss(s, t, y, alpha=1.5, **o)),
}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", DISTILLATION)
def test_distillation(name: str, temperature: float) -> None:
    """Values against NumPy, gradients against finite differences; the teacher gets none."""
    expected_of, actual_of = DISTILLATION[name]
    s, t = (3 * torch.randn(N, C, dtype=torch.float64) for _ in range(2))
    y = torch.randint(C, (N,))
    each = expected_of(s.numpy(), t.numpy(), y.numpy(), temperature)
    s.requires_grad_()
    t.requires_grad_()
    for reduction, expected in (("batchmean", each.mean()), ("sum", each.sum()), ("none", each)):
        actual = actual_of(s, t, y, temperature=temperature, reduction=reduction)
        np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10, atol=1e-14)
    loss = actual_of(s, t, y, temperature=np.float32(temperature))
    assert loss.dim() == 0
    loss.backward()
    assert t.grad is None
    assert torch.autograd.gradcheck(
        lambda s: actual_of(s, t.detach(), y, temperature=temperature), s, atol=1e-7
    )
    if name != "dkd":
        actual = actual_of(s, t, y, temperature=temperature, reduction="mean")
        np.testing.assert_allclose(actual.item(), each.mean() / C)
        plain = actual_of(s, t, y, temperature=temperature, scale_by_temperature=False)
        factor = 1 if name.startswith("jsd") else temperature**2
        np.testing.assert_allclose(plain.item(), each.mean() / factor)
        scaled = actual_of(s, t, y, temperature=temperature, scale_by_temperature=True)
        np.testing.assert_allclose(scaled.item(), plain.item() * temperature**2)


@pytest.mark.parametrize("name", DISTILLATION)
def test_distillation_of_tokens_with_a_mask(name: str) -> None:
    expected_of, actual_of = DISTILLATION[name]
    s, t = (3 * torch.randn(2, 4, C, dtype=torch.float64) for _ in range(2))
    y = torch.randint(C, (2, 4))
    counted = torch.tensor([[True, False, True, True], [False, True, True, False]])
    each = expected_of(s[counted].numpy(), t[counted].numpy(), y[counted].numpy(), 2.0)
    for z in (s, t):
        z[~counted] = torch.nan
    s.requires_grad_()
    y = y.masked_fill(~counted, -100)
    out = {"ignore_index": -100} if name == "dkd" else {"mask": counted}
    loss = actual_of(s, t, y, temperature=2.0, **out)
    np.testing.assert_allclose(loss.item(), each.mean(), rtol=1e-10)
    loss.backward()
    assert (s.grad[~counted] == 0).all()
    assert (s.grad[counted] != 0).any()
    rows = actual_of(s, t, y, temperature=2.0, reduction="none", **out)
    np.testing.assert_allclose(rows[counted].detach().numpy(), each, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["kd", "reverse_kl"])
def test_a_temperature_that_learns(name: str) -> None:
    actual_of = DISTILLATION[name][1]
    s, t = (torch.randn(N, C, dtype=torch.float64) for _ in range(2))
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = actual_of(s, t, None, temperature=temperature)
    torch.testing.assert_close(loss, actual_of(s, t, None, temperature=2.0))
    assert torch.autograd.gradcheck(
        lambda temperature: actual_of(s, t, None, temperature=temperature), temperature
    )
    with pytest.raises(ValueError, match=rf"{name}_loss: temperature must be a float or 0-d, got"):
        actual_of(s, t, None, temperature=torch.ones(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", DISTILLATION)
def test_distillation_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    expected_of, actual_of = DISTILLATION[name]
    s, t = (3 * torch.randn(N, C).to(dtype) for _ in range(2))
    y = torch.randint(C, (N,))
    each = expected_of(s.double().numpy(), t.double().numpy(), y.numpy(), 3.0)
    s.requires_grad_()
    loss = actual_of(s, t, y, temperature=3.0)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), each.mean(), rtol=2e-5)
    loss.backward()
    assert s.grad.dtype == dtype
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("name", DISTILLATION)
def test_distillation_of_certain_networks(name: str) -> None:
    """Finite where the student is certain of a class, and the teacher of another."""
    s, t = torch.zeros(N, C), torch.zeros(N, C)
    s[:, 0], t[:, 1] = 300.0, 300.0
    s.requires_grad_()
    for label in (0, 1, 2):
        loss = DISTILLATION[name][1](s, t, torch.full((N,), label), temperature=1.0)
        loss.backward()
        assert loss.isfinite()
        assert s.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: losses.kd_loss(s, s, 0.0), "temperature must be finite and > 0, .* got 0"),
        (lambda s: losses.kd_loss(s, s, reduction="all"), "kd_loss: reduction must be .* 'all'"),
        (lambda s: losses.kd_loss(s, s, mask=torch.ones(3, dtype=torch.bool)),
         r"kd_loss: mask must be \[7\] for logits \[7, 10\], got \[3\]"),
        (lambda s: losses.jsd_loss(s, s, beta=1.5), "jsd_loss: beta must be 0 to 1, got 1.5"),
        (lambda s: losses.dkd_loss(s, s, torch.zeros(N, dtype=torch.int64), reduction="mean"),
         "dkd_loss: reduction must be"),
        (lambda s: losses.dkd_loss(s[:, :1], s[:, :1], torch.zeros(N, dtype=torch.int64)),
         "dkd_loss: student_logits must have 2 classes or more, got 1"),
        (lambda s: losses.kd_loss(s[0, 0], s), "kd_loss: student_logits must be"),
        (lambda s: losses.mart_loss(clean_logits=s, adversarial_logits=s, eps=-1.0,
                                    labels=torch.zeros(N, dtype=torch.int64)),
         "mart_loss: eps must be finite and >= 0"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(N, C))
    with pytest.raises(TypeError, match=r"mask must be a tensor of torch.bool, got torch.float32"):
        losses.kd_loss(torch.randn(N, C), torch.randn(N, C), mask=torch.ones(N))


TAKES = {"trades": NAMES[:2], "mart": NAMES[:2], "ard": (*NAMES[:2], NAMES[3])}
TAKES["rslad"] = TAKES["ard"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(name, one) for name in CASES if name != "mtard" for one in TAKES.get(name, NAMES)],
)
def test_logits_of_another_shape(name: str, wrong: str) -> None:
    """Equally many rows in another order would give a loss of mismatched rows."""
    z = random_logits(2, 3, C)
    z[wrong] = z[wrong].reshape(3, 2, C)
    message = rf"{name}_loss: (labels must be|\w+_logits must have the shape of \w+_logits,) \["
    with pytest.raises(ValueError, match=message):
        CASES[name][1](z, torch.zeros(2, 3, dtype=torch.int64))


def test_logits_are_tensors_of_one_device() -> None:
    s, y = torch.randn(N, C), torch.zeros(N, dtype=torch.int64)
    with pytest.raises(TypeError, match="kd_loss: teacher_logits must be a tensor, got NoneType"):
        losses.kd_loss(s, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"mart_loss: adversarial_logits must be float32, .*int64"):
        losses.mart_loss(clean_logits=s, adversarial_logits=s.long(), labels=y)
    with pytest.raises(ValueError, match="dkd_loss: labels must be on the device of student_logit"):
        losses.dkd_loss(s, s, y.to("meta"))
    with pytest.raises(ValueError, match=r"jsd_loss: teacher_logits must be on .* cpu, got meta"):
        losses.jsd_loss(s, s.to("meta"))
    with pytest.raises(ValueError, match=r"jsd_loss: teacher_logits .* \[7, 10\], got \[7, 9\]"):
        losses.jsd_loss(s, s[:, :9])
    for teachers in (None, [3, s]):
        with pytest.raises(TypeError, match=r"teacher_logits(\[0\])? must be a tensor"):
            losses.mtard_loss([s, s], teachers, [0.5, 0.5])  # type: ignore[arg-type]


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
    # Weights that still hang on a graph are constants.
    free = each.softmax(0).requires_grad_()
    assert not losses.mtard_loss(students, teachers, free).requires_grad


def test_label_smoothing_is_checked() -> None:
    z = torch.randn(N, C)
    for value in (-0.1, 1.5, "much"):
        with pytest.raises(ValueError, match=r"trades_loss: label_smoothing must be 0 to 1, got"):
            losses.trades_loss(
                clean_logits=z, adversarial_logits=z, labels=z.argmax(1), label_smoothing=value
            )
