"""TRADES."""

from __future__ import annotations

from torch import Tensor

from bmtard.losses._rows import Rows


def trades_loss(
    *,
    clean_logits: Tensor,
    adversarial_logits: Tensor,
    labels: Tensor,
    beta: float = 6.0,
    target_logits: Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """CE(S(x), y) + beta * batchmean KL(S(x) || S(x')) (Zhang et al., ICML 2019).

    Gradients flow to all logits; the target S(x) of the divergence is not detached. target_logits:
    S(x) of the divergence from a forward pass of its own, as the published code has it, which
    matters where S has dropout; by default ``clean_logits``.
    """
    rows = Rows(
        "trades_loss", "clean_logits", clean_logits, labels,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    target_logits = clean_logits if target_logits is None else target_logits
    clean, adversarial, target = rows.flat(
        clean_logits=clean_logits,
        adversarial_logits=adversarial_logits,
        target_logits=target_logits,
    )
    robust = rows.divergence(adversarial, target)
    return rows.shaped(rows.cross_entropy(clean) + beta * robust)
