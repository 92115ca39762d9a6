"""Every op again in plain torch: slow, exact, and independent of the compiled kernels.

The oracle of the tests, and what runs where the compiled library cannot. Arguments have been
checked by ``bmtard.ops``; gradients are those of torch's autograd. The temperature search is a
plain bisection, so that it also checks the kernels' faster iteration.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmtard.types import SearchStatus, TemperatureSearch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which an op computes: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum(terms: Tensor) -> Tensor:
    """Over the last dimension, in float64 where the device has it.

    How torch adds float32 depends on the processor: 32,000 terms on AVX2 lose two digits.
    """
    wide = terms.dtype if terms.device.type == "mps" else torch.float64
    return terms.sum(-1, dtype=wide).to(terms.dtype)


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension; -inf logits are masked classes.

    A tensor as temperature has the leading dimensions of ``logits``, or none.
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).unsqueeze(-1)
        allowed = (temperature >= 1e-36) & (temperature <= 1e36)
        temperature = torch.where(allowed, temperature, math.nan)
    elif isinstance(temperature, numbers.Real) and not isinstance(temperature, float):
        temperature = float(temperature)  # the inverse of NumPy's float32 would be a float32
    # Shifted before it is scaled: logits / 0.01 would lose two digits of the differences.
    logits = logits - logits.detach().amax(-1, keepdim=True)
    # Multiplied, as the gradient of a quotient by the temperature may overflow on its way to 0.
    inverse = 1 / temperature
    # With those that lie further below the maximum than the type reaches.
    masked = (logits * inverse).detach() == -math.inf
    # -inf * inverse would have the gradient NaN by the temperature.
    scaled = (logits.masked_fill(masked, 0) * inverse).masked_fill(masked, -math.inf)
    # The largest is 0, so no exponential overflows.
    return scaled - _sum(scaled.exp()).log().unsqueeze(-1)


def softmax_entropy(
    logits: Tensor, temperature: float | Tensor = 1.0, *, eps: float = 0.0
) -> Tensor:
    """[..., C] -> [...], in nats: -sum p log(p + eps)."""
    log_p = log_softmax(logits, temperature)
    p = log_p.exp()
    if eps:
        return -_sum(p * (p + eps).log())
    return -_sum(p * log_p.masked_fill(p == 0, 0))


def bisect_temperature(
    logits: Tensor,
    target_entropy: Tensor,
    *,
    low: float,
    high: float,
    initial: Tensor | None,
    per_sample: bool,
    tolerance: float,
    max_iterations: int,
    newton_steps: int,
) -> TemperatureSearch:
    """logits [N, C]; target and initial 0-d, or [N] with ``per_sample``. See ``bmtard.ops``.

    ``newton_steps`` steps follow the search. They change no value, and give the temperature its
    derivatives up to the order 2^newton_steps - 1.
    """

    def entropy_at(logits: Tensor, temperature: Tensor) -> Tensor:
        if per_sample:
            return softmax_entropy(logits, temperature)
        return softmax_entropy(logits, temperature.expand(logits.shape[0])).mean()

    differentiable_logits = logits
    # Not no_grad alone, which stops neither forward mode nor an outer torch.func transform.
    logits = logits.detach()
    with torch.no_grad():
        dtype = accumulation_dtype(logits.dtype)
        target = target_entropy.detach().to(dtype)
        keep = torch.ones_like(target) if initial is None else initial.to(dtype)
        keep = torch.where(keep.isnan(), low, keep.clamp(low, high))
        log_count = (logits != -math.inf).sum(-1).to(dtype).log()
        log_count = log_count if per_sample else log_count.mean()
        tolerated = (4 * torch.finfo(dtype).eps * log_count).clamp(min=tolerance)

        bottom, top = torch.full_like(keep, low), torch.full_like(keep, high)
        temperature = bottom.clone()
        status = torch.full_like(keep, SearchStatus.MAX_ITERATIONS.value, dtype=torch.int32)
        iterations = torch.zeros_like(status)
        entropy = torch.full_like(keep, math.nan)
        # The first two evaluations are at the bounds; then geometric bisection. After 64 halvings
        # of the widest bracket its ends are neighbouring float64 numbers.
        for i in range(min(max_iterations, 80)):
            active = status == SearchStatus.MAX_ITERATIONS.value
            middle = bottom.sqrt() * top.sqrt()  # the product could overflow
            candidate = bottom if i == 0 else top if i == 1 else middle
            temperature = torch.where(active, candidate, temperature)
            entropy = torch.where(active, entropy_at(logits, temperature), entropy)
            iterations = iterations + active
            error = entropy - target
            variance = _entropy_slope(logits, temperature, per_sample)
            ends = [
                (~error.isfinite(), SearchStatus.NON_FINITE),
                (error.abs() <= tolerated, SearchStatus.CONVERGED),
            ]
            if i == 0:
                # At a higher temperature the variance of different logits may underflow.
                equal = (variance <= 0) & (entropy >= log_count - tolerated)
                ends.append((equal, SearchStatus.DEGENERATE))
                ends.append((error > 0, SearchStatus.CLAMPED_LOW))
            elif i == 1:
                ends.append((error < 0, SearchStatus.CLAMPED_HIGH))
            else:
                width = torch.finfo(dtype).eps * 2
                ends.append((top - bottom <= width * top, SearchStatus.CONVERGED))
                bottom = torch.where(error < 0, temperature, bottom)
                top = torch.where(error < 0, top, temperature)
            for condition, code in ends:
                open_ = status == SearchStatus.MAX_ITERATIONS.value
                status = torch.where(active & open_ & condition, int(code), status)
        kept = (SearchStatus.DEGENERATE.value, SearchStatus.NON_FINITE.value)
        unchanged = (status == kept[0]) | (status == kept[1])
        temperature = torch.where(unchanged, keep, temperature)
        slope = _entropy_slope(logits, temperature, per_sample) / temperature

    converged = (status == SearchStatus.CONVERGED.value) & (slope > 0)
    for step in range(newton_steps):
        if step:
            slope = _entropy_slope(differentiable_logits, temperature, per_sample) / temperature
        reached = entropy_at(differentiable_logits, temperature)
        moving = (reached - reached.detach()) - (target_entropy.to(dtype) - target)
        temperature = temperature - torch.where(
            converged, moving / slope.where(converged, torch.ones_like(slope)), 0.0
        )
    return TemperatureSearch(temperature, entropy, status.to(torch.int32), iterations)


def _entropy_slope(logits: Tensor, temperature: Tensor, per_sample: bool) -> Tensor:
    """d entropy / d log temperature = the variance of log p under p."""
    log_p = log_softmax(logits, temperature if per_sample else temperature.expand(len(logits)))
    p = log_p.exp()
    # Relative to the largest, equal logits have a variance of exactly 0.
    log_p = (log_p - log_p.amax(-1, keepdim=True)).masked_fill(log_p == -math.inf, 0)
    centered = log_p - _sum(p * log_p).unsqueeze(-1)
    variance = _sum(p * centered.square())
    return variance if per_sample else variance.mean()


def teacher_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor,
    student_temperature: float,
    eps: float,
) -> Tensor:
    """KL of one teacher, [..., C] -> [...], in nats."""
    # Once: a half type would round each part of the student's gradient before they are added.
    student_logits = student_logits.to(accumulation_dtype(student_logits.dtype))
    log_p = log_softmax(teacher_logits, temperature)
    log_q = log_softmax(student_logits, student_temperature)
    p = log_p.exp()
    # log q overflows where two logits are further apart than the largest number, though KL may not.
    # There, it is log q of the largest logit plus a difference, which is taken of smaller logits.
    far = (log_q == -math.inf) & student_logits.isfinite()
    near_log_q = torch.where(far, log_q.amax(-1, keepdim=True), log_q)
    small = student_logits * 2.0**-64
    difference = (small - small.amax(-1, keepdim=True)) / student_temperature
    ratio = ((p + eps).log() if eps else log_p) - near_log_q
    # A class of probability 0 adds nothing, also where the ratio is infinite.
    near = _sum(p * ratio.masked_fill(p == 0, 0))
    return near - _sum(p * difference.masked_fill(~far | (p == 0), 0)) * 2.0**64


def multi_teacher_kl(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    temperature: float | Tensor,
    *,
    student_temperature: float,
    eps: float,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """K pairs of [..., C] -> [K, ...]; temperature a float, 0-d or [K].

    A row of sample weight 0 whose KL is not finite is computed from logits of 0 instead: it would
    turn a gradient of 0 into NaN.
    """
    if sample_weight is not None:
        with torch.no_grad():
            kl = multi_teacher_kl(
                student_logits, teacher_logits, temperature,
                student_temperature=student_temperature, eps=eps,
            )  # fmt: skip
        ignored = ((sample_weight == 0) & ~kl.isfinite()).unsqueeze(-1)
        student_logits, teacher_logits = (
            [logits.masked_fill(one, 0) for logits, one in zip(side, ignored, strict=True)]
            for side in (student_logits, teacher_logits)
        )
    rows = []
    for k, (student, teacher) in enumerate(zip(student_logits, teacher_logits, strict=True)):
        one = temperature
        if isinstance(one, Tensor):
            one = one if one.dim() == 0 else one[k]
        rows.append(teacher_kl(student, teacher, one, student_temperature, eps))
    return torch.stack(rows)


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    step_size: float | Tensor,
    epsilon: float | Tensor,
    low: Any,
    high: Any,
    norm: str,
) -> Tensor:
    """[N, ...], in place. Tensors broadcast to it; low and high are two numbers or two tensors."""
    if x.numel() == 0:
        return x_adv
    acc = accumulation_dtype(x_adv.dtype)
    origin, delta = x.to(acc), grad.to(acc)
    if norm == "linf":
        moved = x_adv.to(acc) + step_size * delta.sign()  # 0 for NaN
        moved = torch.minimum(torch.maximum(moved, origin - epsilon), origin + epsilon)
    else:
        direction, _ = _direction_and_length(delta)
        moved = x_adv.to(acc) + direction * step_size - origin
        direction, length = _direction_and_length(moved)
        # Of an infinite length: NaN where it is infinite, else the centre.
        edge = torch.where(length.isfinite(), direction * epsilon, moved * 0.0)
        moved = origin + torch.where(length > epsilon, edge, moved)
    return x_adv.copy_(moved.clamp(low, high))


def _direction_and_length(values: Tensor) -> tuple[Tensor, Tensor]:
    """values / l2 norm and the norm of each sample, [N, ...] and [N, 1, ...]; a norm of 0, NaN or
    infinity has no direction. Scaled by the largest value first, so that no square leaves the
    range."""
    samples = values.unsqueeze(-1).flatten(1)
    largest = samples.abs().amax(1, keepdim=True)
    usable = largest.isfinite() & (largest > 0)
    scaled = samples / torch.where(usable, largest, 1.0)
    norm = torch.where(usable, scaled.norm(dim=1, keepdim=True), 1.0)
    direction = torch.where(usable, scaled / norm, 0.0)
    length = largest * norm
    return direction.view(values.shape), length.view((-1,) + (1,) * (values.dim() - 1))


def balanced_weights(
    losses: Tensor, initial_losses: Tensor, weights: Tensor, weight_lr: Tensor, exponent: float
) -> Tensor:
    """Normalization Loss Balance, one step on [K] tensors."""
    started = initial_losses > 0
    relative = torch.where(started, losses / initial_losses.where(started, 1.0), 1.0)
    relative = relative.clamp(min=0) ** exponent
    total = relative.sum()
    share = torch.where(total > 0, relative / total, 1 / len(losses))
    weights = ((1 - weight_lr) * weights + weight_lr * share).clamp(min=0)
    total = weights.sum()
    return torch.where(total > 0, weights / total, 1 / len(losses))


def sign_step(
    entropies: Tensor, temperatures: Tensor, temperature_lr: Tensor, low: float, high: float
) -> Tensor:
    """Entropy-Based Balance as published, one step on [K] tensors."""
    if len(entropies) < 2:
        return temperatures.clone()
    others = (entropies.sum() - entropies) / (len(entropies) - 1)
    return (temperatures - temperature_lr * (entropies - others).sign()).clamp(low, high)
