"""What the ops share after their checks: the compiled ops, the choice of path, autograd.

The autograd functions wrap the compiled ops in Python, because the stable ABI has no autograd. A
Python ``autograd.Function`` costs less per call than autograd registered with the dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bmtard import _library


class _Native:
    """The compiled ops as overloads. A packet would search its overloads in every call."""

    def __init__(self) -> None:
        for name in (
            "softmax_entropy", "softmax_entropy_backward", "bisect_temperature",
            "multi_teacher_kl", "multi_teacher_kl_with_gradients", "multi_teacher_kl_backward",
            "bmtard_loss", "pgd_step_", "scale_",
        ):  # fmt: skip
            setattr(self, name, getattr(torch.ops.bmtard, name).default)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"bmtard's compiled op {name} is not loaded")


native: Any = _Native() if _library.NATIVE else None


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a fake kernel, which torch.compile and meta tensors call for shapes and dtypes.

    Its arguments are those of the schema in csrc/ops.cpp. Without the library, it does nothing.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        # Called from this file alone: torch searches all modules for each new file that calls it.
        return torch.library.register_fake(f"bmtard::{name}")(fake) if _library.NATIVE else fake

    return register


def fake_rows(logits: Tensor) -> int:
    """N of fake logits [N, C]."""
    torch._check(logits.dim() == 2, lambda: f"expected [N, C], got {logits.dim()}-d")
    return logits.shape[0]


_warned: set[str] = set()


# Private to torch. Without it, a transform raises torch's own errors.
_in_functorch: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)


def in_transform() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap, ...) or a level of dual numbers is active.

    The kernels have no rules for these. Plain torch has.
    """
    return _in_functorch() or getattr(forward_ad, "_current_level", -1) >= 0


# torch.compile calls it while it traces; it guards on transforms and dual levels by itself.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def use_native(tensor: Tensor) -> bool:
    """Whether the compiled kernels can serve here; warns once if the device has none."""
    if not _library.NATIVE or in_transform():
        return False
    if tensor.is_cpu:
        return True
    problem = "there are none for it"
    if tensor.is_cuda and not (problem := _library.cuda_problem(tensor.device.index)):
        return True
    device = str(tensor.device)
    if device not in _warned and not torch.compiler.is_compiling():
        _warned.add(device)
        _library.warn(
            f"bmtard uses the slower plain-torch path on device '{device}', without its compiled "
            f"kernels: {problem}"
        )
    return False


def varies(*numbers: float) -> bool:
    """Whether torch.compile takes one of ``numbers`` for one that changes between calls.

    As an argument of an op, it would be compiled again for each value.
    """
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(number) for number in numbers)


def scalar(number: float, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``number`` as a 0-d tensor on the device of ``like``."""
    if varies(number):  # torch.compile makes this product a tensor op, but not torch.full
        return like.new_ones((), dtype=dtype) * number
    return torch.full((), float(number), dtype=dtype, device=like.device)


def as_tensor(value: float | Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A number as :func:`scalar` makes it, or a tensor of another dtype."""
    return value.to(dtype) if isinstance(value, Tensor) else scalar(value, dtype, like)


def split(value: float | Tensor, dtype: torch.dtype, like: Tensor) -> tuple[Tensor | None, float]:
    """The two arguments that a compiled op takes for a value; a tensor has precedence."""
    if isinstance(value, Tensor) or varies(value):
        return as_tensor(value, dtype, like), 0.0
    return None, float(value)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd must record an op on ``tensors``."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


# Private to torch: a batch of vmap, and of the older vmap behind ``is_grads_batched``.
_in_vmap, _in_legacy_vmap = (
    getattr(torch._C._functorch, name, lambda tensor: False)
    for name in ("is_batchedtensor", "is_legacy_batchedtensor")
)


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap takes ``tensor`` for a batch of tensors."""
    return bool(_in_vmap(tensor) or _in_legacy_vmap(tensor))


def derived(tensor: Tensor) -> bool:
    """Whether something differentiates by ``tensor``: autograd, a transform or a dual level."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return in_transform() and _has_tangent(tensor)


def _has_tangent(tensor: Tensor) -> bool:
    """The same for the levels of a transform below the uppermost, and for forward mode."""
    functorch = torch._C._functorch
    while True:
        dual = getattr(forward_ad, "_current_level", -1) >= 0
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True


def mark_overwritten(*tensors: Tensor) -> None:
    """Tells autograd that an op overwrote ``tensors``, so that it refuses stale saved values."""
    if not (torch.compiler.is_compiling() or tensors[0].is_inference()):
        torch.autograd.graph.increment_version(tensors)


def recordable(tensor: Tensor) -> Tensor:
    """A copy of an inference tensor, which autograd cannot save; else the tensor."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor if torch.is_inference_mode_enabled() else tensor.clone()


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward`` that takes inference tensors, which need no gradient, as well."""
    ctx.constants = ()
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if tensor is not None and tensor.is_inference():
                ctx.constants = [t if t is not None and t.is_inference() else None for t in tensors]
                tensors = tuple(
                    None if constant is not None else t
                    for t, constant in zip(tensors, ctx.constants, strict=True)
                )
                break
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> Sequence[Any]:
    """What :func:`save` got."""
    tensors: Sequence[Any] = ctx.saved_tensors
    if not ctx.constants:
        return tensors
    return [t if c is None else c for t, c in zip(tensors, ctx.constants, strict=True)]


def distinct(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """For an autograd function, which torch.compile refuses if it gets one tensor twice."""
    return [t.view_as(t) for t in tensors] if torch.compiler.is_compiling() else tensors


def rows_of(logits: Tensor) -> Tensor:
    """[..., C] -> [N, C]."""
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def all_rows(logits: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same for several of one shape."""
    return logits if logits[0].dim() == 2 else [rows_of(x) for x in logits]


def flat(tensor: Tensor | None) -> Tensor | None:
    """[...] -> [N]; a 0-d tensor stays 0-d."""
    return tensor if tensor is None or tensor.dim() < 2 else tensor.flatten()


def once_differentiable(op: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a ``backward``: a second derivative raises, and names ``op`` or ``ctx.op``.

    torch's decorator of the same name raises a RuntimeError, and switches the grad mode even when
    nobody wants a graph of the gradients.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grad_outputs: Any) -> Any:
            if getattr(forward_ad, "_current_level", -1) >= 0:
                _refuse_tangents(op or ctx.op, grad_outputs)
            if not torch.is_grad_enabled():
                return backward(ctx, *grad_outputs)
            with torch.no_grad():
                grads = backward(ctx, *grad_outputs)
            sources = (*grad_outputs, *ctx.saved_tensors)
            return NoDoubleBackward.apply(op or ctx.op, len(grads), *grads, *sources)

        return wrapper

    return decorate


def _refuse_tangents(op: str, grad_outputs: Sequence[Tensor | None]) -> None:
    for grad in grad_outputs:
        if grad is not None and forward_ad.unpack_dual(grad).tangent is not None:
            raise NotImplementedError(
                f"bmtard.{op} was called outside of the dual level, and its backward has no "
                "forward-mode derivative; call it inside"
            )


class NoDoubleBackward(torch.autograd.Function):
    """Returns the first ``count`` tensors; the rest are what these depend on. Backward raises."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.op = op
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(f"bmtard.{ctx.op} has no double backward")


class AttachGradients(torch.autograd.Function):
    """Gives a loss its gradients, which the op computed together with it.

    ``tensors`` are the K gradients and then the K students.
    """

    @staticmethod
    def forward(ctx: Any, op: str, loss: Tensor, *tensors: Tensor) -> Tensor:
        ctx.op, ctx.headroom, ctx.given_away = op, 1.0, False
        save(ctx, *tensors)
        return loss

    @staticmethod
    @once_differentiable()
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = saved(ctx)
        grads = tensors[: len(tensors) // 2]
        return (None, None, *(None,) * len(grads), *times_incoming(ctx, grads, grad))


def times_incoming(ctx: Any, grads: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    """The saved ``grads``, which are ``ctx.headroom`` times too large, times the incoming ``grad``.

    The usual ``grad`` leaves them as they are: the CPU path looks at it here, the CUDA kernel on
    the device, and neither passes over memory then. They may be scaled in place only if no later
    backward needs them and no earlier one returned them; ``ctx.given_away`` says that one did.
    """
    traced = torch.compiler.is_compiling() or in_transform() or is_batched(grad)
    if not traced and grad.is_cpu and grad.item() == ctx.headroom:
        ctx.given_away = True
        return grads
    if ctx.headroom != 1.0:
        grad = grad / ctx.headroom
    if traced or ctx.given_away or _graph_is_kept():
        return [(g.to(grad.dtype) * grad).to(g.dtype) for g in grads]
    native.scale_(grads, grad)
    return grads


# Private to torch, which uses it to decide whether a compiled backward may reuse its buffers.
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


@register_fake("scale_")
def _(buffers: Sequence[Tensor], factor: Tensor) -> None:
    torch._check(factor.numel() == 1, lambda: "expected one factor")
