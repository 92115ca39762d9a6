"""Folded batch norm is the network in eval mode, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bmtard.data import ImageData
from bmtard.models import build_model
from bmtard.models.fold import FoldedBatchNorm
from bmtard.training.config import TrainConfig
from bmtard.training.trainer import Trainer


def network(name: str) -> nn.Module:
    """In double, with statistics and weights that are not the initial ones."""
    built = build_model(name, num_classes=4, mean=(0.4,) * 3, std=(0.3,) * 3).double()
    shake(built)
    return built


@torch.no_grad()
def shake(built: nn.Module) -> None:
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()


def answer(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    return logits, torch.autograd.grad(logits.logsumexp(1).sum(), x)[0]


@pytest.mark.parametrize(
    "name",
    ["cnn-3", "strided-cnn-3", "resnet-20", "preact-resnet-18", "wrn-10-1", "mobilenet-v2"],
)
def test_same_function_and_gradient_in_eval_mode(name: str) -> None:
    plain = network(name).eval()
    folded = FoldedBatchNorm(plain).eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        for got, wanted in zip(answer(folded, x), answer(plain, x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        shake(plain)
        with torch.no_grad():
            next(p for p in plain.parameters() if p.dim() == 4).mul_(0.7)
        assert not torch.allclose(folded(x), plain(x))  # until it is told
        folded.refresh()


def test_train_mode_and_parameters_are_the_networks() -> None:
    plain = network("cnn-3").train()
    folded = FoldedBatchNorm(plain)
    assert all(module.training for module in plain.modules())
    assert [p.data_ptr() for p in folded.parameters()] == [p.data_ptr() for p in plain.parameters()]
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    counted = plain.network.features[1].num_batches_tracked
    wanted = plain(x)
    assert torch.equal(folded(x), wanted)
    assert counted == 2
    folded.eval()
    assert not torch.allclose(folded(x), wanted)
    assert counted == 2


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.mean() > 0 else x


def test_synchronised_batch_norm_is_folded() -> None:
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(network("cnn-3")).eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(FoldedBatchNorm(plain).eval()(x), plain(x))


def test_a_convolution_with_hooks_stays_itself() -> None:
    """Spectral norm makes the weight anew in a hook before each call."""
    first = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
    plain = nn.Sequential(
        first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    ).double()
    shake(plain)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    folded = FoldedBatchNorm(plain).eval()
    torch.testing.assert_close(folded(x), plain.eval()(x))
    with torch.no_grad():
        first.weight_orig[0].mul_(5.0)
    folded.refresh()
    torch.testing.assert_close(folded(x), plain(x))


def test_networks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"FoldedBatchNorm: torch.fx cannot trace Branch: "):
        FoldedBatchNorm(Branch())
    with pytest.raises(ValueError, match=r"Sequential has no batch norm after a convolution"):
        FoldedBatchNorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)))


@pytest.mark.parametrize("method", ["bmtard", "n-fgsm"])
def test_training_is_the_same_to_rounding(
    method: str, with_teachers: Callable[..., TrainConfig], digits: ImageData, quiet: Any
) -> None:
    """The attack of the second method runs in train mode, which counts batch statistics."""
    config = with_teachers(method=method, epochs=1)
    states = []
    for fold in (False, True):
        folder = config.folder.with_name(f"fold-{fold}")
        trainer = Trainer(replace(config, fold_batch_norm=fold, output=folder), quiet, digits)
        trainer.run()
        states.append(trainer.network.state_dict())
        assert isinstance(trainer.attacked, FoldedBatchNorm) == fold
    plain, folded = states
    for name, value in plain.items():
        # A gradient that is 0 to rounding may have either sign, which moves its pixel.
        torch.testing.assert_close(folded[name], value, rtol=1e-2, atol=1e-3)
