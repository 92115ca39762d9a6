"""Adversarial examples for training and evaluation, on the fused :func:`bmtard.pgd_step_`.

A model maps images ``x`` [N, ...] inside ``bounds`` to logits [N, C]; normalisation belongs in the
model. The training attacks (:func:`fgsm`, :func:`pgd`) touch nothing but the images: no gradient
of a parameter is computed or stored, every module's training flag comes back as it was, and no
value is read on the host. For the same reason they trust that ``x`` is inside its bounds;
:func:`check_images` looks, at the price of one synchronisation, and the evaluation uses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard.extras import import_extra
from bmtard.ops import multi_teacher_kl, pgd_step_

Norm = Literal["linf", "l2"]
RandomStart = Literal["uniform", "gaussian", "none"]
Mode = Literal["eval", "train", "keep"]
AttackLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, C] of the perturbed images, the perturbed images) -> scalar to maximise"""

GAUSSIAN_START = 1e-3
"""Standard deviation of the "gaussian" start, as in TRADES."""


@contextlib.contextmanager
def module_mode(model: nn.Module | Callable[..., Any], mode: Mode) -> Iterator[None]:
    """Puts ``model`` in a mode; afterwards each of its modules has its own training flag again.

    "eval" freezes batch statistics and dropout; "train" uses and updates batch statistics, as some
    published attacks do; "keep" changes nothing.
    """
    if mode not in ("eval", "train", "keep"):
        raise ValueError(f"module_mode: mode must be 'eval', 'train' or 'keep', got {mode!r}")
    if mode == "keep" or not isinstance(model, nn.Module):
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def cross_entropy(labels: Tensor) -> AttackLoss:
    """Sum over the batch of the cross entropy with ``labels`` [N]."""
    return lambda logits, x_adv: F.cross_entropy(logits.float(), labels, reduction="sum")


def kl_from(target_logits: Tensor) -> AttackLoss:
    """Sum over the batch of KL(softmax(target) || softmax(logits)); the target is a constant.

    TRADES attacks with the student's own clean logits, RSLAD with the teacher's.
    """
    target = target_logits.detach()
    return lambda logits, x_adv: multi_teacher_kl(logits, target, reduction="sum")[0]


def kl_from_model(teacher: Callable[[Tensor], Tensor]) -> AttackLoss:
    """Sum of KL(softmax(teacher(x_adv)) || softmax(logits)), as AdaAD attacks.

    The gradient flows to the images through the teacher as well, so the teacher must be in eval
    mode already, and its parameters need no gradient.
    """
    return lambda logits, x_adv: multi_teacher_kl(logits, teacher(x_adv), reduction="sum")[0]


def carlini_wagner(labels: Tensor, confidence: float = 50.0) -> AttackLoss:
    """Sum of -max(z_label - max_other z + confidence, 0) (Carlini and Wagner, S&P 2017)."""

    def loss(logits: Tensor, x_adv: Tensor) -> Tensor:
        logits = logits.float()
        chosen = labels.unsqueeze(1)
        other = logits.scatter(1, chosen, -torch.inf).amax(1)
        return -F.relu(logits.gather(1, chosen).squeeze(1) - other + confidence).sum()

    return loss


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    loss: Literal["ce", "kl", "cw"] | AttackLoss = "ce",
    target_logits: Tensor | None = None,
    norm: Norm = "linf",
    random_start: RandomStart = "uniform",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    mode: Mode = "eval",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018): the images [N, ...] after ``steps``.

    labels: [N] int64, for the losses "ce" and "cw" (:func:`carlini_wagner`). target_logits: [N, C],
    for "kl" (:func:`kl_from`). Any other loss is a function of the logits and the images.
    epsilon, step_size: in the units of ``x``, in the norm "linf" or "l2". random_start: "uniform"
    in the ball (then clipped to ``bounds``), "gaussian" with standard deviation 0.001 as in TRADES
    (not clipped before the first step), or "none". mode: how batch norm and dropout behave, see
    :func:`module_mode`. generator: of the random start, on the device of ``x``.

    Returns a new tensor without gradient. The result is within ``epsilon`` of ``x`` and within
    ``bounds`` if ``x`` is. Raises ValueError on an argument out of range.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"pgd: x must be floating [N, ...], got {x.dtype} {list(x.shape)}")
    if steps < 1:
        raise ValueError(f"pgd: steps must be >= 1, got {steps}")
    objective = _objective(x, labels, loss, target_logits)
    x = x.detach()
    x_adv = _start(x, epsilon, norm, random_start, bounds, generator)
    with module_mode(model, mode), torch.enable_grad():
        for _ in range(steps):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(objective(model(x_adv), x_adv), x_adv)
            x_adv = x_adv.detach()
            pgd_step_(
                x_adv, grad, x, step_size=step_size, epsilon=epsilon, bounds=bounds, norm=norm
            )
    return x_adv


def fgsm(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 8 / 255,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    mode: Mode = "eval",
) -> Tensor:
    """One signed gradient step of ``epsilon`` (Goodfellow et al., ICLR 2015). See :func:`pgd`."""
    return pgd(
        model,
        x,
        labels,
        epsilon=epsilon,
        step_size=epsilon,
        steps=1,
        random_start="none",
        bounds=bounds,
        mode=mode,
    )


def check_images(x: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Raises ValueError unless all of ``x`` is finite and inside ``bounds``. Synchronises."""
    low, high = (float(value) for value in x.aminmax())
    if not (bounds[0] <= low and high <= bounds[1]):
        raise ValueError(
            f"images must be in [{bounds[0]}, {bounds[1]}] (normalisation belongs in the model), "
            f"got values in [{low}, {high}]"
        )


def autoattack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 8 / 255,
    norm: Norm = "linf",
    attacks: tuple[str, ...] = (),
    square_queries: int = 5000,
    batch_size: int = 250,
    seed: int = 0,
) -> Tensor:
    """Images after AutoAttack (Croce and Hein, ICML 2020) by the package ``pyautoattack``.

    attacks: empty for the standard ensemble (APGD-CE, targeted APGD and FAB, Square), else names
    of pyautoattack such as ``("square",)`` alone. The targeted attacks need 10 classes or more.
    square_queries: of the Square attack, 5000 in the standard ensemble. Images in [0, 1].
    Raises ImportError, saying how to install it, without pyautoattack.
    """
    package = import_extra("pyautoattack", "eval")
    check_images(x)
    runner = package.AutoAttack(
        model,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=epsilon,
        device=x.device,
        seed=seed,
        version="custom" if attacks else "standard",
        attacks=list(attacks) or None,
    )
    runner.square.n_queries = square_queries
    with module_mode(model, "eval"):
        return runner.run_standard_evaluation(x, labels, batch_size=batch_size)[0]


def square(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 8 / 255,
    norm: Norm = "linf",
    queries: int = 5000,
    batch_size: int = 250,
    seed: int = 0,
) -> Tensor:
    """The black-box Square attack (Andriushchenko et al., ECCV 2020) alone; see autoattack."""
    return autoattack(
        model,
        x,
        labels,
        epsilon=epsilon,
        norm=norm,
        attacks=("square",),
        square_queries=queries,
        batch_size=batch_size,
        seed=seed,
    )


def _objective(
    x: Tensor, labels: Tensor | None, loss: str | AttackLoss, target_logits: Tensor | None
) -> AttackLoss:
    if callable(loss):
        return loss
    if loss == "kl":
        if target_logits is None or target_logits.shape[:1] != x.shape[:1]:
            got = None if target_logits is None else list(target_logits.shape)
            raise ValueError(f"pgd: loss 'kl' needs target_logits [{len(x)}, C], got {got}")
        return kl_from(target_logits)
    if loss not in ("ce", "cw"):
        raise ValueError(f"pgd: loss must be 'ce', 'kl', 'cw' or a function, got {loss!r}")
    if labels is None or labels.shape != x.shape[:1]:
        got = None if labels is None else list(labels.shape)
        raise ValueError(f"pgd: loss {loss!r} needs labels [{len(x)}], got {got}")
    return cross_entropy(labels) if loss == "ce" else carlini_wagner(labels)


def _start(
    x: Tensor,
    epsilon: float,
    norm: str,
    random_start: str,
    bounds: tuple[float, float] | None,
    generator: torch.Generator | None,
) -> Tensor:
    low, high = bounds or (-torch.inf, torch.inf)
    if random_start == "none":
        return x.clone()
    if random_start not in ("uniform", "gaussian"):
        raise ValueError(
            f"pgd: random_start must be 'uniform', 'gaussian' or 'none', got {random_start!r}"
        )
    if random_start == "uniform" and norm == "linf":
        noise = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
        return noise.add_(x).clamp_(low, high)
    noise = torch.empty_like(x).normal_(generator=generator)
    if random_start == "gaussian":
        return noise.mul_(GAUSSIAN_START).add_(x)
    # Uniform in the l2 ball of D dimensions: a random direction, a radius of U^(1/D).
    shape = (-1,) + (1,) * (x.dim() - 1)
    radius = torch.rand(len(x), device=x.device, dtype=x.dtype, generator=generator)
    radius = epsilon * radius ** (1 / x[0].numel()) if len(x) else radius
    length = noise.flatten(1).norm(dim=1).clamp_(min=torch.finfo(x.dtype).tiny)
    return noise.mul_((radius / length).view(shape)).add_(x).clamp_(low, high)
