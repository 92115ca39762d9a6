"""Liger-Kernel's KL divergence. It takes log-probabilities, so log_softmax of both sides is timed
with it."""

from __future__ import annotations

from importlib import import_module

import torch

from ..ops.multi_teacher_kl import KLInputs
from ..published import wide
from ..spec import Function, Outputs, Provider, Spec, missing_package


class Liger(Provider):
    name = "liger"
    title = "Liger-Kernel"

    def absent(self, device: torch.device) -> str:
        if device.type != "cuda":
            return "its Triton kernels run on CUDA only"
        return missing_package("liger_kernel.transformers")

    def multi_teacher_kl(self, spec: Spec) -> Function:
        module = import_module("liger_kernel.transformers")
        divergence = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)

        def run(i: KLInputs) -> Outputs:
            losses = []
            for student, teacher in zip(i.students, i.teachers, strict=True):
                log_q = torch.log_softmax(wide(student), dim=1)
                log_p = torch.log_softmax(wide(teacher) / i.temperature, dim=1)
                losses.append(divergence(log_q, log_p))
            return (torch.stack(losses),)

        return run


PROVIDERS = [Liger()]
