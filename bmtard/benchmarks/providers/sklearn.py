"""scikit-learn's perplexity search, the bisection of its t-SNE, on one thread.

It finds beta such that the perplexity of softmax(-beta * squared distances) is the wanted one. With
the logits, negated and shifted, as distances that is the search for a temperature: perplexity =
exp(entropy), beta = 1 / temperature. Bringing the logits into its form is not timed.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..ops.bisect_temperature import SearchInputs
from ..spec import Function, Outputs, Provider, Spec, missing_package

MODULE = "sklearn.manifold._utils"


class Sklearn(Provider):
    name = "sklearn"
    title = "scikit-learn"

    def absent(self, device: torch.device) -> str:
        return missing_package(MODULE) if device.type == "cpu" else "runs on the CPU only"

    def bisect_temperature(self, spec: Spec) -> Function:
        return PerplexitySearch(import_module(MODULE)._binary_search_perplexity)


class PerplexitySearch:
    def __init__(self, search: Any) -> None:
        self.search = search
        self.prepared: tuple[Tensor, Any] | None = None

    def prepare(self, inputs: SearchInputs) -> Any:
        """float32 [N, C], or [N, C + 1] where C >= N: it then takes the matrix for distances
        between the samples themselves, and leaves the diagonal out."""
        if self.prepared is None or self.prepared[0] is not inputs.logits:
            logits = inputs.logits.float()
            distances = logits.amax(-1, keepdim=True) - logits
            rows, classes = distances.shape
            if classes >= rows:
                padded = distances.new_zeros(rows, classes + 1)
                off_diagonal = ~torch.eye(rows, classes + 1, dtype=torch.bool)
                distances = padded.masked_scatter_(off_diagonal, distances)
            self.prepared = inputs.logits, distances.contiguous().numpy()
        return self.prepared[1]

    def __call__(self, inputs: SearchInputs) -> Outputs:
        return (self.search(self.prepare(inputs), math.exp(inputs.target), 0),)

    def result(self, inputs: SearchInputs, outputs: Outputs) -> Outputs:
        """Of the probabilities that it returns: the slope of the logits by log p. Not timed."""
        p = torch.from_numpy(outputs[0])
        rows, classes = inputs.logits.shape
        if classes >= rows:
            off_diagonal = ~torch.eye(rows, classes + 1, dtype=torch.bool)
            p = p[off_diagonal].view(rows, classes)
        log_p = p.clamp(min=1e-300).log()
        log_p = log_p - (p * log_p).sum(-1, keepdim=True)
        z = inputs.logits.double()
        return ((p * log_p * z).sum(-1) / (p * log_p.square()).sum(-1),)


PROVIDERS = [Sklearn()]
