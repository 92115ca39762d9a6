"""QuACK's softmax, with the sum of its entropy in eager torch; it has no entropy of its own."""

from __future__ import annotations

from importlib import import_module

import torch

from ..ops.softmax_entropy import EntropyInputs
from ..spec import Function, Outputs, Provider, Spec, missing_package


class Quack(Provider):
    name = "quack"
    title = "QuACK"

    def absent(self, device: torch.device) -> str:
        if device.type != "cuda":
            return "its CuTe kernels run on CUDA only"
        return missing_package("quack")

    def softmax_entropy(self, spec: Spec) -> Function:
        softmax = import_module("quack").softmax

        def run(i: EntropyInputs) -> Outputs:
            p = softmax(i.logits / i.temperature)
            return (torch.special.entr(p.float()).sum(-1),)

        return run


PROVIDERS = [Quack()]
