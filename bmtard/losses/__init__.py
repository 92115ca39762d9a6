"""Losses of adversarial training and distillation, on the fused ops.

Each takes logits [..., C], so it drops into a loop that already has its forward passes; labels are
int64 of the rows' shape: [N] for [N, C], [N, T] for [N, T, C]. Each equals its published code to
rounding. What each docstring names, because results depend on it:

- the reduction. "batchmean" divides the sum of the divergences by the number of rows N, "mean" by
  N * C; a cross entropy is then the mean over the rows. "sum" adds the rows of every term, "none"
  keeps them. mart_loss is always the mean over the rows;
- the ``eps`` in log(p + eps) of the target probabilities p;
- the temperatures, and whether the loss is multiplied by the temperature squared;
- ``label_smoothing`` of the cross entropies, as in ``F.cross_entropy``, 0 by default;
- which logits receive gradient. Teacher logits never do: they are detached here.

Rows can be left out: where a loss has labels by ``ignore_index`` (usually -100), elsewhere (but in
mtard_loss) by a bool ``mask``, True for the rows that count. Such rows are in no term and in no
divisor, whatever their logits hold. With ``ignore_index=None`` a label outside 0 .. C - 1 is an
error where a term uses the labels.

The logits of the losses of one student on two kinds of images are keyword-only, so that clean and
adversarial ones cannot be swapped unseen. KL(p || q) is in nats. A bad argument raises ValueError
or TypeError.
"""

from bmtard.losses.adaad import adaad_loss
from bmtard.losses.ard import ard_loss
from bmtard.losses.dkd import dkd_loss
from bmtard.losses.iad import iad2_loss, iad_loss
from bmtard.losses.kd import jsd_loss, kd_loss, reverse_kl_loss
from bmtard.losses.mart import mart_loss
from bmtard.losses.mtard import mtard_loss
from bmtard.losses.rslad import rslad_loss
from bmtard.losses.trades import trades_loss

__all__ = [
    "adaad_loss",
    "ard_loss",
    "dkd_loss",
    "iad2_loss",
    "iad_loss",
    "jsd_loss",
    "kd_loss",
    "mart_loss",
    "mtard_loss",
    "reverse_kl_loss",
    "rslad_loss",
    "trades_loss",
]
