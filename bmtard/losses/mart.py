"""MART."""

from __future__ import annotations

import torch
from torch import Tensor

from bmtard.losses._rows import Rows, wide
from bmtard.ops import softmax_entropy
from bmtard.ops._checks import check_eps


def mart_loss(
    *,
    clean_logits: Tensor,
    adversarial_logits: Tensor,
    labels: Tensor,
    beta: float = 6.0,
    eps: float = 1e-12,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Boosted cross entropy + weighted divergence (Wang et al., ICLR 2020).

    CE(S(x'), y) - mean log(1.0001 - p'_j + 1e-12), where j is the most probable wrong class of x',
    + beta / N * sum_i (1.0000001 - p_y(x)) sum_c p_c (log p_c - log(p'_c + eps)). Gradients flow to
    both logits, also through the weight. The published ``eps`` bounds the divergence where p' is
    near 0, for logits 27 and more below the largest; ``eps=0`` is the exact KL in one fused op.
    """
    check_eps("mart_loss", eps)
    rows = Rows(
        "mart_loss", "clean_logits", clean_logits, labels,
        ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
    clean, adversarial = rows.flat(clean_logits=clean_logits, adversarial_logits=adversarial_logits)
    hard = rows.cross_entropy(adversarial)
    log_adversarial = wide(adversarial).log_softmax(1)
    wrong = log_adversarial.detach().scatter(1, rows.labels.unsqueeze(1), -torch.inf)
    wrong = wrong.argmax(1, keepdim=True)
    wrong_probability = log_adversarial.gather(1, wrong).squeeze(1).exp()
    margin = rows.reduced(-(1.0001 - wrong_probability + 1e-12).log())
    probability = wide(clean).softmax(1)
    doubt = 1.0000001 - rows.at_label(probability)
    if eps:
        bounded = torch.logaddexp(log_adversarial, log_adversarial.new_tensor(eps).log())
        divergence = -softmax_entropy(clean) - (probability * bounded).sum(1)
        robust = rows.reduced(divergence * doubt)
    else:
        robust = rows.divergence(adversarial, clean, sample_weight=doubt)
    return hard + margin + beta * robust
