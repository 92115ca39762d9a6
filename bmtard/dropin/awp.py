"""Adversarial Weight Perturbation: csdongxian/AWP, utils_awp.py of AT_AWP and of trades_AWP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard import losses

_EPS = 1e-20


class _WeightPerturbation:
    """A proxy takes one step up the loss; its way, scaled to each weight's norm, is the attack."""

    def __init__(
        self, model: nn.Module, proxy: nn.Module, proxy_optim: torch.optim.Optimizer, gamma: float
    ) -> None:
        self.model = model
        self.proxy = proxy
        self.proxy_optim = proxy_optim
        self.gamma = gamma

    def perturb(self, diff: dict[str, Tensor]) -> None:
        """Adds gamma times ``diff`` to the model's weights."""
        self._add(diff, self.gamma)

    def restore(self, diff: dict[str, Tensor]) -> None:
        """Takes gamma times ``diff`` off again, after the optimizer's step."""
        self._add(diff, -self.gamma)

    @torch.no_grad()
    def _add(self, diff: dict[str, Tensor], factor: float) -> None:
        for name, parameter in self.model.named_parameters():
            if name in diff:
                parameter.add_(factor * diff[name])

    def _copy_model(self) -> nn.Module:
        self.proxy.load_state_dict(self.model.state_dict())
        return self.proxy.train()

    def _ascend(self, loss: Tensor) -> dict[str, Tensor]:
        """Steps the proxy up ``loss``; the differences of weights with 2 dimensions or more."""
        self.proxy_optim.zero_grad()
        (-loss).backward()
        self.proxy_optim.step()
        moved = self.proxy.state_dict()
        diff = {}
        for name, weight in self.model.state_dict().items():
            if weight.dim() > 1 and "weight" in name:
                way = moved[name] - weight
                diff[name] = weight.norm() / (way.norm() + _EPS) * way
        return diff


class AdvWeightPerturb(_WeightPerturbation):
    """AWP of adversarial training (Wu et al., NeurIPS 2020): calc_awp, perturb, step, restore.

    proxy: a network like ``model``, with ``proxy_optim`` over its parameters; it runs in train mode
    on the state of ``model``, whose own batch statistics do not move. gamma: size of the
    perturbation relative to each weight's norm.
    """

    def calc_awp(self, inputs_adv: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The perturbation that raises CE(S(x'), y), by the names of the weights."""
        proxy = self._copy_model()
        return self._ascend(F.cross_entropy(proxy(inputs_adv), targets))


class TradesAWP(_WeightPerturbation):
    """AWP of TRADES; see :class:`AdvWeightPerturb`. The proxy runs on x, x' and x again."""

    def calc_awp(
        self, inputs_adv: Tensor, inputs_clean: Tensor, targets: Tensor, beta: float
    ) -> dict[str, Tensor]:
        """The perturbation that raises the TRADES loss, by the names of the weights."""
        proxy = self._copy_model()
        loss = losses.trades_loss(
            clean_logits=proxy(inputs_clean),
            adversarial_logits=proxy(inputs_adv),
            target_logits=proxy(inputs_clean),
            labels=targets,
            beta=beta,
        )
        return self._ascend(loss)
