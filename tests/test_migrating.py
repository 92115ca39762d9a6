"""docs/migrating.md: what is before and what is after have the same loss and gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randn
from torch import nn

from bmtard import dropin

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs/migrating.md").read_text()
SECTIONS = {
    section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    for section in DOCUMENT.split("\n## ")[1:]
}
PAIRS = [name for name, blocks in SECTIONS.items() if blocks]


def given() -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The names that the document speaks of, and what gets gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    x = randn(6, 3, 2, 2, scale=1.0).sigmoid()
    names: dict[str, Any] = {
        "t": randn(6, 10, seed=1), "t_adv": randn(6, 10, seed=2), "y": torch.arange(6) % 10,
        "tokens_t": randn(2, 4, 10, seed=3),
        "token_labels": torch.tensor([[1, 2, -100, 4], [5, -100, -100, 8]]),
        "x": x, "noise": 0.01 * randn(6, 3, 2, 2, scale=1.0, seed=4), "model": model.double(),
    }  # fmt: skip
    students = {
        "s": randn(6, 10, seed=5), "s_adv": randn(6, 10, seed=6),
        "tokens_s": randn(2, 4, 10, seed=7),
    }  # fmt: skip
    leaves = [one.requires_grad_() for one in students.values()]
    return {**names, **students}, [*leaves, *model.parameters()]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # nn.KLDivLoss's own
@pytest.mark.parametrize("section", PAIRS)
def test_before_and_after(section: str) -> None:
    outcomes = []
    for code in SECTIONS[section]:
        names, leaves = given()
        exec(compile(code, f"migrating.md, {section}", "exec"), names)
        loss = names["loss"]
        assert loss.dim() == 0
        outcomes.append([loss, *torch.autograd.grad(loss, leaves, allow_unused=True)])
        assert any(g is not None and g.abs().max() > 1e-4 for g in outcomes[-1][1:])
    before, after = outcomes
    for one, two in zip(before, after, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


def test_the_sections_are_short_and_many() -> None:
    assert len(PAIRS) >= 11
    for blocks in SECTIONS.values():
        assert all(len(code.splitlines()) <= 11 for code in blocks)


def test_every_function_argument_for_argument_is_in_the_table() -> None:
    table = SECTIONS and DOCUMENT.split("\n## ")[1]
    assert set(dropin.__all__) <= set(re.findall(r"\w+", table))
