"""KL of K teachers to K students, divided by N; gradients to the students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import oracle
from ..shapes import LogitsOp, draw_pairs
from ..spec import EXP_FLOPS, Inputs, Outputs, Spec


@dataclass(kw_only=True)
class KLInputs(Inputs):
    students: list[Tensor]
    teachers: list[Tensor]
    temperature: float = 2.0


class MultiTeacherKL(LogitsOp):
    name = "multi_teacher_kl"
    passes = ("forward", "backward", "both")
    sweeps = "NCK"
    tensors = 2

    def inputs(self, spec: Spec, seed: int) -> KLInputs:
        students, teachers = draw_pairs(spec, seed)
        wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
        upstream = torch.linspace(0.5, 1.5, len(students), device=spec.device, dtype=wide)
        return KLInputs(
            students=students, teachers=teachers, leaves=tuple(students), upstream=(upstream,)
        )

    def oracle(self, inputs: KLInputs) -> tuple[Tensor, list[Tensor]]:
        rows = len(inputs.students[0])
        values, grads = [], []
        for k, (student, teacher) in enumerate(zip(inputs.students, inputs.teachers, strict=True)):
            values.append(oracle.kl(student, teacher, inputs.temperature).mean())
            scale = float(inputs.upstream[0][k]) / rows
            grads.append(oracle.kl_gradient(student, teacher, inputs.temperature, scale))
        return torch.stack(values), grads

    def verify(
        self,
        expected: tuple[Tensor, list[Tensor]],
        inputs: KLInputs,
        outputs: Outputs,
        grads: Sequence[Tensor] | None,
    ) -> str:
        rtol, of_largest = oracle.TOLERANCE[inputs.students[0].dtype]
        problem = oracle.differs("KL", outputs[0], expected[0], rtol=rtol)
        for k, grad in enumerate(grads or ()):
            problem = problem or oracle.differs(
                f"gradient {k}", grad, expected[1][k], of_largest=of_largest
            )
        return problem

    def ideal_bytes(self, spec: Spec, pass_: str) -> int:
        # Reads of student and teacher; with the gradient, which one pass can give, its write.
        moves = {"forward": 2, "backward": 3, "both": 3}[pass_]
        return moves * self.count(spec.shape) // 2 * spec.dtype.itemsize

    def flops(self, spec: Spec, pass_: str) -> int:
        each = {"forward": EXP_FLOPS + 7, "backward": EXP_FLOPS + 4, "both": 2 * EXP_FLOPS + 11}
        return each[pass_] * self.count(spec.shape)


OPS = [MultiTeacherKL()]
