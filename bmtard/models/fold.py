"""Batch norm folded into the convolution before it, where a network is in eval mode."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

_Norm = nn.BatchNorm2d | nn.SyncBatchNorm


class FoldedBatchNorm(nn.Module):
    """``network``, but that in eval mode each batch norm is part of the convolution before it.

    In eval mode batch norm is a scale and a shift a channel, so the weights of the convolution can
    hold it: the same function up to rounding, without passes over the images for it, forward and
    backward. The folded weights are constants, copies that :meth:`refresh` makes anew after the
    network has changed. In train mode it is the network itself.

    Raises ValueError where torch.fx cannot trace the network or no batch norm follows a
    convolution.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        training = [(module, module.training) for module in network.modules()]
        try:
            graph = torch.fx.symbolic_trace(network.eval())
        except Exception as error:  # of the network's own code, whatever it is
            reason = " ".join(str(error).split())
            raise ValueError(
                f"FoldedBatchNorm: torch.fx cannot trace {type(network).__name__}: {reason}"
            ) from None
        finally:
            for module, flag in training:
                module.training = flag
        self._folded: list[_FoldedConv] = []
        modules = dict(graph.named_modules())
        for node in graph.graph.nodes:
            pair = [modules.get(str(n.target)) for n in (node, *node.all_input_nodes[:1])]
            if not (node.op == "call_module" and _fit(pair, node.all_input_nodes)):
                continue
            before = node.all_input_nodes[0]
            folded = _FoldedConv(cast(nn.Conv2d, pair[1]), cast(_Norm, pair[0]))
            name = f"_folded_{len(self._folded)}"
            graph.add_submodule(name, folded)
            self._folded.append(folded)
            before.target = name
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
        if not self._folded:
            raise ValueError(
                f"FoldedBatchNorm: {type(network).__name__} has no batch norm after a convolution"
            )
        graph.delete_all_unused_submodules()
        graph.recompile()
        self.graph = graph
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the weights and statistics that the network has now."""
        for folded in self._folded:
            folded.refresh()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) if self.training else self.graph(x)


def _fit(pair: list[nn.Module | None], inputs: list[Any]) -> bool:
    """Whether they are a batch norm and a convolution that nothing else looks at or changes."""
    norm, conv = pair if len(pair) == 2 else (None, None)
    return (
        isinstance(norm, _Norm)
        and norm.running_mean is not None
        and type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        # Of spectral_norm and weight_norm, or of a user: the fold would not call them.
        and not any((m._forward_hooks or m._forward_pre_hooks) for m in (norm, conv))
        and len(inputs[0].users) == 1
    )


class _FoldedConv(nn.Module):
    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: _Norm) -> None:
        super().__init__()
        # No submodules: they are the network's, with its parameters.
        self._pair = (conv, norm)

    def refresh(self) -> None:
        conv, norm = self._pair
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        scale = (var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -mean if conv.bias is None else conv.bias - mean
        bias = shift * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        self.weight, self.bias = conv.weight * scale.view(-1, 1, 1, 1), bias

    def forward(self, x: Tensor) -> Tensor:
        conv = self._pair[0]
        return F.conv2d(
            x, self.weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
