"""Adversarial examples for training and evaluation, on the fused :func:`bmtard.pgd_step_`.

A model maps images ``x`` [N, ...] inside ``bounds`` to logits [N, C]; normalisation belongs in the
model. The training attacks (:func:`fgsm`, :func:`pgd`) touch nothing but the images: no gradient
of a parameter is computed or stored, and every module's training flag comes back as it was. They
read no value on the host, but for the first batch: images outside their bounds, which every step
would clip, are warned of once. :func:`check_images` raises, at the price of one synchronisation,
and the evaluation uses it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard import reference
from bmtard._library import warn
from bmtard.extras import import_extra
from bmtard.ops import multi_teacher_kl, pgd_step_
from bmtard.ops._checks import is_integer, is_number
from bmtard.types import WHOLE, Share

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
    """Sum over the batch of the cross entropy with ``labels`` [N]; half logits in float32."""
    return lambda logits, x_adv: F.cross_entropy(
        _wide(logits), _for_autograd(labels), reduction="sum"
    )


def kl_from(target_logits: Tensor) -> AttackLoss:
    """Sum over the batch of KL(softmax(target) || softmax(logits)); the target is a constant.

    TRADES attacks with the student's own clean logits, RSLAD with the teacher's.
    """
    target = _logits(target_logits, "kl_from: target_logits must be").detach()
    return lambda logits, x_adv: multi_teacher_kl(logits, target, reduction="sum")[0]


def kl_from_model(teacher: Callable[[Tensor], Tensor]) -> AttackLoss:
    """Sum of KL(softmax(teacher(x_adv)) || softmax(logits)), as AdaAD attacks.

    The gradient flows to the images through the teacher as well, so the teacher must be in eval
    mode already, and its parameters need no gradient.
    """

    def loss(logits: Tensor, x_adv: Tensor) -> Tensor:
        target = _logits(teacher(x_adv), "kl_from_model: teacher must return")
        return multi_teacher_kl(logits, target, reduction="sum")[0]

    return loss


def carlini_wagner(labels: Tensor, confidence: float = 50.0) -> AttackLoss:
    """Sum of -max(z_label - max_other z + confidence, 0) (Carlini and Wagner, S&P 2017).

    Half logits in float32.
    """

    def loss(logits: Tensor, x_adv: Tensor) -> Tensor:
        logits = _wide(logits)
        chosen = _for_autograd(labels).unsqueeze(1)
        other = logits.scatter(1, chosen, -torch.inf).amax(1)
        return -F.relu(logits.gather(1, chosen).squeeze(1) - other + confidence).sum()

    return loss


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: float | Tensor = 8 / 255,
    step_size: float | Tensor = 2 / 255,
    steps: int = 10,
    loss: Literal["ce", "kl", "cw"] | AttackLoss = "ce",
    target_logits: Tensor | None = None,
    targeted: bool = False,
    norm: Norm = "linf",
    random_start: RandomStart = "uniform",
    start: Tensor | None = None,
    clip_start: bool | None = None,
    mask: Tensor | None = None,
    momentum: float = 0.0,
    eot_samples: int = 1,
    bounds: tuple[float | Tensor, float | Tensor] | None = (0.0, 1.0),
    mode: Mode = "eval",
    generator: torch.Generator | None = None,
    share: Share = WHOLE,
) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018): the images [N, ...] after ``steps``.

    Args:
        model: gives logits [N, C], a tensor.
        x: images [N, ...], inside ``bounds``.
        labels: [N] int64, for the losses "ce" and "cw" (:func:`carlini_wagner`).
        epsilon, step_size: in the units of ``x``, in the norm ``norm``. A number, or a tensor: 0-d,
            [N] (one a sample) or, for "linf", of as many dimensions as ``x`` ([1, C, 1, 1]: one a
            channel). The values of tensors, here and in ``bounds``, are not read on the host.
        loss: "ce", "kl", "cw", or a function of the logits and the images to maximise.
        target_logits: [N, C], for "kl" (:func:`kl_from`).
        targeted: minimise the loss, so that ``labels`` are what the images shall be taken for.
        norm: "linf" or "l2".
        random_start: "uniform" in the ball, "gaussian" with standard deviation 0.001 as in TRADES,
            or "none".
        start: the first images, instead of a random start.
        clip_start: whether the first images are clipped to ``bounds`` before the model sees them.
            By default only the uniform start is; ARD's uniform start is not.
        mask: bool, broadcast to ``x``: True where a pixel may change.
        momentum: above 0, the decay of MI-FGSM (Dong et al., CVPR 2018): gradients divided by their
            mean absolute value per sample are accumulated, momentum times the earlier ones.
        eot_samples: each step takes the gradient of so many forward passes together, for a model
            that draws random numbers (Athalye et al., ICML 2018).
        bounds: (lowest, highest) value of ``x``, or None; numbers, or tensors of as many dimensions
            as ``x``. For images normalised by mean m and standard deviation s they are
            ((0 - m) / s, (1 - m) / s), and epsilon in pixel units is divided by s.
        mode: how batch norm and dropout behave, see :func:`module_mode`.
        generator: of the random start, on the device of ``x``.
        share: which part of a batch ``x`` is. The random start is drawn for the whole batch, so
            that processes whose generators agree start together as one process would.

    Returns:
        A new tensor without gradient, within ``epsilon`` of ``x`` and within ``bounds`` if ``x``
        is. Works where gradients are off, also under ``torch.inference_mode``.

    Raises:
        ValueError, TypeError: an argument out of range, or a model that returns no tensor.
    """
    given = {"labels": labels, "target_logits": target_logits, "start": start, "mask": mask}
    for name, value in {"x": x, **given}.items():
        if not isinstance(value, Tensor) and (value is not None or name == "x"):
            raise TypeError(f"pgd: {name} must be a tensor, got {type(value).__name__}")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"pgd: x must be floating [N, ...], got {x.dtype} {list(x.shape)}")
    for name, count in (("steps", steps), ("eot_samples", eot_samples)):
        if not (is_integer(count) and count >= 1):
            raise ValueError(f"pgd: {name} must be an integer >= 1, got {count!r}")
    _check_not_negative("momentum", momentum)
    if norm not in ("linf", "l2"):
        raise ValueError(f"pgd: norm must be 'linf' or 'l2', got {norm!r}")
    if start is not None and _kind(start) != _kind(x):
        raise ValueError(f"pgd: start must be {_kind(x)} like x, got {_kind(start)}")
    if mask is not None and not (mask.dtype == torch.bool and _fits(mask, x)):
        raise ValueError(
            f"pgd: mask must be bool and fit x {list(x.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    # Autograd records nothing in inference mode, and saves no tensor that was made there.
    with torch.inference_mode(False), torch.enable_grad(), module_mode(model, mode):
        x = _for_autograd(x)
        labels = None if labels is None else _for_autograd(labels)
        target_logits = None if target_logits is None else _for_autograd(target_logits)
        step = _Step(x, step_size, epsilon, bounds, norm)
        objective = _objective(x, labels, loss, target_logits)
        x_adv = _start(x, step, random_start, start, clip_start, generator, share)
        if mask is not None:
            x_adv = x_adv.where(mask, x)
        accumulated: Tensor | None = None
        for _ in range(steps):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(objective(_logits(model(x_adv)), x_adv), x_adv)
            for _ in range(eot_samples - 1):
                # Not in place: it may be expanded, or memory of a backward function.
                (more,) = torch.autograd.grad(objective(_logits(model(x_adv)), x_adv), x_adv)
                grad = grad + more
            x_adv = x_adv.detach()
            if targeted:
                grad = -grad
            if momentum:
                size = grad.flatten(1).abs().mean(1).view(-1, *(1,) * (x.dim() - 1))
                grad = grad / size.clamp(min=torch.finfo(grad.dtype).tiny)
                if accumulated is not None:
                    grad = grad + momentum * accumulated
                accumulated = grad
            if mask is not None:
                grad = grad.where(mask, 0)
            step(x_adv, grad)
    return x_adv


def random_like(x: Tensor, fill: Callable[[Tensor], Tensor], share: Share = WHOLE) -> Tensor:
    """A tensor like ``x`` [N, ...] of random numbers, as ``fill`` draws them into its argument.

    share: which part of a batch ``x`` is; the numbers of the whole batch are drawn.
    """
    if share.count == 1:
        return fill(torch.empty_like(x))
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    whole = torch.empty(
        (share.count * len(x), *x.shape[1:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    return fill(whole)[share.rows(len(whole))].clone()


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
    if not x.numel():
        return
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
    norms = {"linf": "Linf", "l2": "L2"}
    if norm not in norms:
        raise ValueError(f"autoattack: norm must be 'linf' or 'l2', got {norm!r}")
    check_images(x)
    runner = package.AutoAttack(
        model,
        norm=norms[norm],
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


def _wide(logits: Tensor) -> Tensor:
    """Half types as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_not_negative(name: str, value: float) -> None:
    if not (is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"pgd: {name} must be finite and >= 0, got {value!r}")


def _for_autograd(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _logits(output: Any, must: str = "pgd: model must return") -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{must} the logits, a tensor, got {type(output).__name__}; "
            "wrap the network in a module that returns the first, as in net(x)[0]"
        )
    return output


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
    if labels is None or labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        given = None if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"pgd: loss {loss!r} needs labels [{len(x)}] of torch.int64, got {given}")
    return cross_entropy(labels) if loss == "ce" else carlini_wagner(labels)


def _kind(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def _two(bounds: tuple[float | Tensor, float | Tensor]) -> tuple[float | Tensor, float | Tensor]:
    """(lowest, highest); the values of tensors are not read."""
    pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2
    if not (pair and all(isinstance(value, Tensor) or is_number(value) for value in bounds)):
        raise ValueError(
            f"pgd: bounds must be None or (lowest, highest), numbers or tensors, got {bounds!r}"
        )
    low, high = bounds
    if not (isinstance(low, Tensor) or isinstance(high, Tensor) or low <= high):
        raise ValueError(f"pgd: bounds must be (lowest, highest), got {bounds!r}")
    return low, high


def _fits(tensor: Tensor, x: Tensor) -> bool:
    """Whether ``tensor`` has the dimensions of ``x``, each its own or 1."""
    return tensor.dim() == x.dim() and all(
        own in (1, other) for own, other in zip(tensor.shape, x.shape, strict=True)
    )


class _Step:
    """One step from the images, in place: the fused op; its reference where a setting is a tensor.

    epsilon and step_size become numbers or tensors that broadcast to ``x``, low and high too.
    """

    def __init__(
        self,
        x: Tensor,
        step_size: float | Tensor,
        epsilon: float | Tensor,
        bounds: tuple[float | Tensor, float | Tensor] | None,
        norm: Norm,
    ) -> None:
        self.x, self.norm = x, norm
        self.step_size = self._radius("step_size", step_size)
        self.epsilon = self._radius("epsilon", epsilon)
        low, high = (
            value.detach() if isinstance(value, Tensor) else value
            for value in ((-torch.inf, torch.inf) if bounds is None else _two(bounds))
        )
        for value in (low, high):
            if isinstance(value, Tensor) and value.dim() and not _fits(value, x):
                raise ValueError(
                    f"pgd: bounds must be numbers or of {x.dim()} dimensions that fit x "
                    f"{list(x.shape)}, got {list(value.shape)}"
                )
        self.low: Any = low
        self.high: Any = high
        if isinstance(low, Tensor) != isinstance(high, Tensor):  # clamp takes two of a kind
            self.low, self.high = (
                v if isinstance(v, Tensor) else x.new_full((), v) for v in (low, high)
            )
        _warn_of_images_outside(x, self.low, self.high)

    def _radius(self, name: str, value: float | Tensor) -> float | Tensor:
        x = self.x
        if not isinstance(value, Tensor):
            _check_not_negative(name, value)
            return float(value)
        value = value.detach()
        if value.dim() == 1 and len(value) == len(x):
            return value.view(-1, *(1,) * (x.dim() - 1))
        per_sample = value.dim() == x.dim() and value.numel() in (1, len(value))
        if value.dim() and not (_fits(value, x) and (self.norm == "linf" or per_sample)):
            wanted = "0-d, [N]" + (f" or of {x.dim()} dimensions" if self.norm == "linf" else "")
            raise ValueError(
                f"pgd: {name} must be a number or a tensor, {wanted}, for x {list(x.shape)} and "
                f"norm {self.norm!r}, got {list(value.shape)}"
            )
        return value

    def clip(self, x_adv: Tensor) -> Tensor:
        """``x_adv`` inside the bounds."""
        return x_adv.clamp(self.low, self.high)

    def __call__(self, x_adv: Tensor, grad: Tensor) -> None:
        settings = (self.step_size, self.epsilon, self.low, self.high)
        if not any(isinstance(value, Tensor) for value in settings):
            step_size, epsilon, low, high = map(float, settings)
            pgd_step_(
                x_adv, grad, self.x,
                step_size=step_size, epsilon=epsilon, bounds=(low, high), norm=self.norm,
            )  # fmt: skip
            return
        reference.pgd_step_(
            x_adv, grad, self.x, step_size=self.step_size, epsilon=self.epsilon,
            low=self.low, high=self.high, norm=self.norm,
        )  # fmt: skip


def _length(images: Tensor) -> Tensor:
    """The l2 norm of each sample, [N, 1, ...]."""
    return images.flatten(1).norm(dim=1).view(-1, *(1,) * (images.dim() - 1))


_devices_seen: set[str] = set()


def _warn_of_images_outside(x: Tensor, low: float | Tensor, high: float | Tensor) -> None:
    """Looks at the first images on each kind of device; later ones are trusted."""
    kind = x.device.type
    if kind in _devices_seen or torch.compiler.is_compiling() or not x.numel():
        return
    if kind == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    _devices_seen.add(kind)
    if not ((x >= low) & (x <= high)).all():
        least, most = (float(value) for value in x.aminmax())
        warn(
            f"pgd: x has values in [{least:.4g}, {most:.4g}], outside its bounds, and the attack "
            "clips them: normalise inside the model, or give the bounds of normalised images",
            UserWarning,
        )


def _start(
    x: Tensor,
    step: _Step,
    random_start: str,
    start: Tensor | None,
    clip_start: bool | None,
    generator: torch.Generator | None,
    share: Share,
) -> Tensor:
    if random_start not in ("uniform", "gaussian", "none"):
        raise ValueError(
            f"pgd: random_start must be 'uniform', 'gaussian' or 'none', got {random_start!r}"
        )
    if clip_start is None:
        clip_start = start is None and random_start == "uniform"
    if start is not None:
        x_adv = start.detach().clone()
    elif random_start == "none":
        x_adv = x.clone()
    elif random_start == "gaussian":
        noise = random_like(x, lambda t: t.normal_(generator=generator), share)
        x_adv = noise.mul_(GAUSSIAN_START).add_(x)
    else:
        x_adv = _uniform(x, step, generator, share)
    return step.clip(x_adv) if clip_start else x_adv


def _uniform(x: Tensor, step: _Step, generator: torch.Generator | None, share: Share) -> Tensor:
    if step.norm == "linf":
        epsilon = step.epsilon
        # Drawn at the radius where it is a number: a product rounds.
        radius = 1.0 if isinstance(epsilon, Tensor) else epsilon
        noise = random_like(x, lambda t: t.uniform_(-radius, radius, generator=generator), share)
        return (noise.mul_(epsilon) if isinstance(epsilon, Tensor) else noise).add_(x)
    # Uniform in the l2 ball of D dimensions: a random direction, a radius of U^(1/D).
    noise = random_like(x, lambda t: t.normal_(generator=generator), share)
    part = random_like(x.new_empty(len(x)), lambda t: t.uniform_(generator=generator), share)
    part = part ** (1 / max(x[:1].numel(), 1))
    part = part.view(-1, *(1,) * (x.dim() - 1))
    length = _length(noise).clamp_(min=torch.finfo(x.dtype).tiny)
    return noise.mul_(step.epsilon * part / length).add_(x)
