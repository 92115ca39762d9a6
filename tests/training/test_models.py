"""The networks: sizes as published, shapes, normalisation inside."""

from __future__ import annotations

import pytest
import torch

from bmtard.models import Normalize, build_model


@pytest.mark.parametrize(
    ("name", "classes", "size", "millions"),
    [
        ("cnn-4", 10, 8, None),
        ("cnn-16", 10, 28, None),
        ("strided-cnn-64", 10, 32, 0.38),
        ("resnet-18", 10, 32, 11.17),
        ("resnet-34", 10, 32, 21.28),
        ("resnet-50", 10, 32, 23.52),
        ("preact-resnet-18", 10, 32, 11.17),
        ("preact-resnet-18-raw", 100, 32, 11.22),
        ("preact-resnet-34", 10, 32, 21.28),
        ("resnet-56", 10, 32, 0.86),
        ("wrn-34-10", 10, None, 46.16),
        ("wrn-34-20", 10, None, 184.53),
        ("wrn-70-16", 10, None, 266.80),
        ("dm-wrn-70-16", 10, None, 266.80),
        ("dm-wrn-10-1-relu", 10, 32, None),
        ("wrn-10-1", 10, 32, None),
        ("mobilenet-v2", 10, 32, 2.30),
        ("mobilenet-v2", 200, 64, None),
    ],
)
def test_shapes_and_published_sizes(
    name: str, classes: int, size: int | None, millions: float | None
) -> None:
    channels = 1 if name.startswith("cnn") else 3
    with torch.device("meta" if size is None else "cpu"):
        model = build_model(name, num_classes=classes, mean=[0.5] * channels, std=[0.2] * channels)
    if millions is not None:
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert count == pytest.approx(millions, abs=0.01)
    if size is not None:
        logits = model.eval()(torch.rand(2, channels, size, size))
        assert logits.shape == (2, classes)
        assert logits.isfinite().all()


def test_normalisation_is_inside() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    model = build_model("resnet-20", num_classes=10, mean=mean, std=std).eval()
    x = torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(model(x), model.network(by_hand))
    assert {"mean", "std"} <= model.state_dict().keys()


@pytest.mark.parametrize(
    "name",
    ["resnet-19", "wrn-28", "cnn", "wrn-11-2", "wrn-10-0", "cnn-0", "a.b", ":f", "a b:f", "a:f()"],
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        build_model(name, num_classes=10)
    with pytest.raises(ValueError, match=r"std > 0 a channel"):
        Normalize(torch.nn.Identity(), [0.5], [0.0])
