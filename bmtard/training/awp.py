"""Adversarial weight perturbation around any loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

_EPS = 1e-20  # the published guard of a gradient of length 0


@contextlib.contextmanager
def perturbed_weights(
    network: nn.Module,
    gamma: float,
    loss: Callable[[], Tensor],
    average_: Callable[[Sequence[Tensor]], None] = lambda grads: None,
) -> Iterator[None]:
    """Inside, every weight w of 2 dimensions or more is w + gamma |w| g / |g| (Wu et al., 2020).

    g is the gradient of ``loss()`` with respect to w, taken once on entry; ``average_`` overwrites
    the gradients where processes average them. The buffers of ``network`` are put back afterwards.
    Backward pass and optimizer step belong inside, as in the published code; on exit, by an error
    too, the perturbation is taken off again, exactly so where no step has changed the weight. A
    perturbation that is not finite is none.
    """
    weights = [p for n, p in network.named_parameters() if p.dim() > 1 and "weight" in n]
    kept = [buffer.clone() for buffer in network.buffers()]
    try:
        grads = torch.autograd.grad(loss(), weights, allow_unused=True)
    finally:
        with torch.no_grad():
            for buffer, before in zip(network.buffers(), kept, strict=True):
                buffer.copy_(before)
    average_([grad for grad in grads if grad is not None])
    with torch.no_grad():
        pairs: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # weight, its value, perturbed value
        for weight, grad in zip(weights, grads, strict=True):
            if grad is not None:
                way = (gamma * weight.norm() / (grad.norm() + _EPS)) * grad
                value = weight.clone()
                weight.add_(way.nan_to_num_(0.0, 0.0, 0.0))
                pairs.append((weight, value, weight.clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value, perturbed in pairs:
                weight.copy_(value + (weight - perturbed))
