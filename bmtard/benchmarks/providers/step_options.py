"""The training step with one option after the other: what each of them gives."""

from __future__ import annotations

import torch

from bmtard.benchmarks.providers.bmtard import FusedStep

from ..spec import Function, Provider, Spec


class StepOptions(Provider):
    """``bmtard_step`` alone; the provider "bmtard" has all but bfloat16."""

    def __init__(
        self, name: str, title: str, *, channels_last: bool, folded: bool, bfloat16: bool = False
    ) -> None:
        self.name, self.title = name, title  # type: ignore[misc]
        self.options = {"channels_last": channels_last, "folded": folded, "bfloat16": bfloat16}

    def absent(self, device: torch.device) -> str:
        if self.options["bfloat16"] and not has_bfloat16_units(device):
            return "this processor has no bfloat16 units"
        return ""

    def bmtard_step(self, spec: Spec) -> Function:
        return FusedStep(**self.options)


def has_bfloat16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not in torch's documentation.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


PROVIDERS = [
    StepOptions("ops-alone", "ops alone", channels_last=False, folded=False),
    StepOptions("channels-last", "ops, channels_last", channels_last=True, folded=False),
    StepOptions("folded", "ops, folded batch norm", channels_last=False, folded=True),
    StepOptions("bfloat16", "both, bfloat16", channels_last=True, folded=True, bfloat16=True),
]
