"""The training step with one option after the other: what each of them gives."""

from __future__ import annotations

from bmtard.benchmarks.providers.bmtard import FusedStep

from ..spec import Function, Provider, Spec


class StepOptions(Provider):
    """``bmtard_step`` alone; the provider "bmtard" has all the options."""

    def __init__(self, name: str, title: str, *, channels_last: bool, folded: bool) -> None:
        self.name, self.title = name, title  # type: ignore[misc]
        self.channels_last, self.folded = channels_last, folded

    def bmtard_step(self, spec: Spec) -> Function:
        return FusedStep(channels_last=self.channels_last, folded=self.folded)


PROVIDERS = [
    StepOptions("ops-alone", "ops alone", channels_last=False, folded=False),
    StepOptions("channels-last", "ops, channels_last", channels_last=True, folded=False),
    StepOptions("folded", "ops, folded batch norm", channels_last=False, folded=True),
]
