"""What the losses share: labels, rows that do not count, and reductions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bmtard.ops import multi_teacher_kl
from bmtard.ops._checks import check_logits, is_number

_NO_LABEL = torch.iinfo(torch.int64).min
"""For F.cross_entropy, whose own default would leave rows of label -100 out unasked."""


class Rows:
    """The rows of one call: which of them count, and how their losses are reduced.

    logits [..., C] become [N, C] by :meth:`flat`; labels are kept as [N]. Built from the logits of
    one argument, ``name``, whose shape and device all others must have.
    """

    def __init__(
        self,
        op: str,
        name: str,
        logits: Tensor,
        labels: Tensor | None = None,
        *,
        ignore_index: int | None = None,
        mask: Tensor | None = None,
        reduction: str = "batchmean",
        label_smoothing: float = 0.0,
    ) -> None:
        if reduction not in ("none", "sum", "mean", "batchmean"):
            raise ValueError(
                f"{op}: reduction must be 'none', 'sum', 'mean' or 'batchmean', got {reduction!r}"
            )
        if not (is_number(label_smoothing) and 0 <= label_smoothing <= 1):
            raise ValueError(f"{op}: label_smoothing must be 0 to 1, got {label_smoothing!r}")
        check_logits(op, name, logits)
        self.label_smoothing = label_smoothing
        self.op, self.reduction = op, reduction
        self.name, self.logits_shape, self.device = name, logits.shape, logits.device
        self.shape, self.classes = logits.shape[:-1], logits.shape[-1]
        self.counted: Tensor | None = None
        """[N] bool, or None where all rows count."""
        if mask is not None:
            self._check("mask", mask, torch.bool)
            self.counted = mask.reshape(-1)
        if labels is not None:
            self._check("labels", labels, torch.int64)
            self.labels = labels.reshape(-1)
            if ignore_index is not None:
                self.counted = self.labels != ignore_index
                self.labels = self.labels.where(self.counted, 0)

    def _check(self, name: str, value: Any, dtype: torch.dtype) -> None:
        if not isinstance(value, Tensor) or value.dtype != dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{self.op}: {name} must be a tensor of {dtype}, got {got}")
        if value.shape != self.shape:
            raise ValueError(
                f"{self.op}: {name} must be {list(self.shape)} for logits "
                f"{list(self.logits_shape)}, got {list(value.shape)}"
            )
        self._check_device(name, value)

    def _check_device(self, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise ValueError(
                f"{self.op}: {name} must be on the device of {self.name}, {self.device}, "
                f"got {value.device}"
            )

    def flat(self, **logits: Tensor) -> list[Tensor]:
        """[..., C] -> [N, C], of arguments by name; rows that do not count replaced by 0."""
        for name, one in logits.items():
            check_logits(self.op, name, one)
            if one.shape != self.logits_shape:
                raise ValueError(
                    f"{self.op}: {name} must have the shape of {self.name}, "
                    f"{list(self.logits_shape)}, got {list(one.shape)}"
                )
            self._check_device(name, one)
        flat = [one if one.dim() == 2 else one.reshape(-1, self.classes) for one in logits.values()]
        if self.counted is not None:
            out = ~self.counted.unsqueeze(1)
            flat = [one.masked_fill(out, 0) for one in flat]
        return flat

    def taught(self, **logits: Tensor) -> list[Tensor]:
        """The same of teachers, who get no gradient."""
        return [one.detach() for one in self.flat(**logits)]

    def divergence(
        self,
        student_logits: Tensor,
        target_logits: Tensor,
        *,
        sample_weight: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """KL(target || student) of flat logits: 0-d, or [N] with reduction "none"."""
        if self.counted is None:
            return multi_teacher_kl(
                student_logits, target_logits, sample_weight=sample_weight,
                reduction=self.reduction, **options,
            )[0]  # fmt: skip
        each = multi_teacher_kl(student_logits, target_logits, reduction="none", **options)[0]
        if sample_weight is not None:
            each = each * sample_weight
        return self.reduced(each)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Of flat logits with the labels: the mean over the rows, "sum" or [N]."""
        reduction = self.reduction if self.reduction in ("none", "sum") else "mean"
        if self.counted is not None:
            reduction = "none"
        try:
            loss = F.cross_entropy(
                wide(logits), self.labels, ignore_index=_NO_LABEL, reduction=reduction,
                label_smoothing=self.label_smoothing,
            )  # fmt: skip
        except IndexError:
            raise self._bad_label() from None
        return loss if self.counted is None else self.reduced(loss, per_row=True)

    def at_label(self, values: Tensor) -> Tensor:
        """[N, C] -> [N], the entry of each row's label."""
        try:
            return values.gather(1, self.labels.unsqueeze(1)).squeeze(1)
        except RuntimeError:
            raise self._bad_label() from None

    def _bad_label(self) -> ValueError:
        return ValueError(
            f"{self.op}: labels must be 0 to {self.classes - 1} for {self.classes} classes, "
            f"got values from {self.labels.min()} to {self.labels.max()} "
            "(ignore_index leaves out the rows of one label)"
        )

    def reduced(self, each: Tensor, *, per_row: bool = False) -> Tensor:
        """[N] reduced; ``per_row`` divides by N also where the reduction is "mean"."""
        if self.counted is not None:
            each = each.where(self.counted, 0)
        if self.reduction == "none":
            return each
        total = each.sum()
        if self.reduction == "sum":
            return total
        rows = len(each) if self.counted is None else self.counted.sum()
        return total / (rows * self.classes if self.reduction == "mean" and not per_row else rows)

    def shaped(self, loss: Tensor) -> Tensor:
        """With reduction "none" in the shape of the labels."""
        return loss.view(self.shape) if self.reduction == "none" else loss


def wide(logits: Tensor) -> Tensor:
    """Half types as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
