"""Batches of images on every device; the loaders are tested in tests/training."""

from __future__ import annotations

import pytest
import torch

from bmtard import data
from bmtard.data import Batches


@pytest.mark.parametrize("free_bytes", [2**30, 0], ids=["on the device", "on the host"])
def test_every_device_gives_the_same_batches(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, free_bytes: int
) -> None:
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(data, "_free_bytes", lambda device: free_bytes)

    def batches(device: torch.device | str) -> list[torch.Tensor]:
        made = Batches(
            images, torch.arange(50), batch_size=16, device=device, shuffle=True,
            crop_padding=1, flip=True, seed=3,
        )  # fmt: skip
        return [tensor.cpu() for pair in made.epoch(2) for tensor in pair]

    for actual, expected in zip(batches(device), batches("cpu"), strict=True):
        assert torch.equal(actual, expected)
