"""Runs one call of an op and compares everything that it returns with the oracle."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bmtard
from bmtard import _library

from . import oracle
from .arrays import Array, in_layout
from .oracle import PRECISIONS, Divergence, Entropy, Precision, Softmax, summed

CONTEXTS: dict[str, Callable[[], Any]] = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def check(
    op: str, *, path: str = "native", threads: int = 1, raises: str = "", **arguments: Any
) -> int:
    """Calls ``op`` once (BMTARDLoss once a step) and raises AssertionError on a wrong result.

    Arguments are those of the op, tensors as :class:`Array`. ``raises``: the argument that the
    ValueError or TypeError must name. Returns the number of calls.
    """
    with _setting(path, threads):
        if raises:
            return _check_error(op, raises, arguments)
        with np.errstate(all="ignore"):
            return CHECKS[op](**arguments)


@contextlib.contextmanager
def _setting(path: str, threads: int) -> Iterator[None]:
    native, before = _library.NATIVE, torch.get_num_threads()
    if path == "native":
        assert native, "the compiled library is not loaded"
    if threads != before:
        torch.set_num_threads(threads)
    _library.NATIVE = path == "native"
    try:
        yield
    finally:
        _library.NATIVE = native
        if threads != before:
            torch.set_num_threads(before)


def call(op: str, context: str = "grad", **arguments: Any) -> Any:
    """The op on tensors."""
    with CONTEXTS[context]():
        return getattr(bmtard, op)(**arguments)


def _check_error(op: str, argument: str, arguments: dict[str, Any]) -> int:
    arguments = {name: tensors(value) for name, value in arguments.items()}
    arguments.pop("upstream", None)
    try:
        if op == "BMTARDLoss":
            inputs = [arguments.pop(name) for name in ("student_logits", "teacher_logits")]
            arguments.pop("steps", None), arguments.pop("training", None)
            bmtard.BMTARDLoss(**arguments)(*inputs)
        else:
            call(op, **arguments)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert message.startswith(f"{op}: "), f"the message does not begin with the op: {message}"
        assert argument in message, f"the message does not name {argument}: {message}"
        return 1
    raise AssertionError(f"no error about {argument}")


def tensors(value: Any) -> Any:
    if isinstance(value, Array):
        return value.tensor()
    if isinstance(value, (list, tuple)) and any(isinstance(v, Array) for v in value):
        return type(value)(map(tensors, value))
    return value


def numbers(x: Any, precision: Precision) -> np.ndarray:
    """A tensor, or a number, as the oracle's array."""
    if not isinstance(x, Tensor):
        return np.asarray(x, precision.work)
    return x.detach().double().numpy().astype(precision.work, copy=False)


def precision_of(*dtypes: torch.dtype) -> Precision:
    return PRECISIONS[torch.float64 in dtypes]


worst: dict[str, float] = {}
"""The largest error of each result so far, in parts of its bound."""
judged = {"numbers": 0, "undetermined": 0}
"""How many numbers were compared, and how many of them may be anything."""


def compare(
    name: str, found: Tensor, expected: tuple[Any, Any], shape: Any = None, roundings: int = 0,
    factor: float = 1.0, unsettled: bool = False,
) -> None:  # fmt: skip
    """``roundings``: to the dtype of ``found``, after the op's own arithmetic. Between two, it is
    multiplied by ``factor``.

    ``unsettled``: where the result is not defined, it may be an infinity as well as NaN.
    """
    value, error = expected
    if shape is not None:
        assert found.shape == shape, f"{name}: shape {list(found.shape)}, not {list(shape)}"
    info = torch.finfo(found.dtype)
    actual = found.detach().double().numpy()
    if np.shape(value) != actual.shape:
        value = np.broadcast_to(value, actual.shape) if actual.ndim else np.reshape(value, ())
    if np.shape(error) != actual.shape:
        error = np.broadcast_to(error, actual.shape) if actual.ndim else np.reshape(error, ())
    magnitude = np.abs(value)
    if roundings:
        lost = info.smallest_normal * info.eps * max(1.0, factor)
        error = error + roundings * (info.eps / 2 * magnitude + lost)
    miss = np.abs(actual - value)
    undefined = ~np.isfinite(actual) if unsettled else np.isnan(actual)
    fine = (miss <= error) | (actual == value) | (undefined & np.isnan(value))
    if not fine.all():
        # Undetermined, or too large for the type.
        fine |= (error == np.inf) | (np.isnan(error) & ~np.isnan(value))
        fine |= (magnitude + error >= info.max * (1 - info.eps)) & (magnitude < np.inf)
    if not fine.all():
        at = tuple(int(i) for i in np.argwhere(~fine)[0]) if found.dim() else ()
        raise AssertionError(
            f"{name}[{', '.join(map(str, at))}] is {actual[at]!r}, not {float(value[at])!r} "
            f"within {float(error[at]):.3g} ({(~fine).sum()} of {fine.size} are wrong)"
        )
    judged["numbers"] += found.numel()
    bounded = error < np.inf
    judged["undetermined"] += bounded.size - int(np.count_nonzero(bounded))
    if found.numel():
        bounded &= miss > 0
        ratio = np.where(bounded & (miss <= error), miss / error, 0).max()
        if ratio > worst.get(name, 0.0):
            worst[name] = float(ratio)


def gradients(
    output: Tensor, inputs: list[Tensor], upstream: str
) -> tuple[np.ndarray, list[Tensor]]:
    """The upstream gradient, and what it makes of the inputs."""
    kind, _, layout = upstream.partition(":")
    dtype = str(output.dtype).removeprefix("torch.")
    grad = in_layout(
        Array(tuple(output.shape), dtype, kind, seed=5).tensor(), layout or "contiguous"
    )
    found = torch.autograd.grad(output, inputs, grad)
    for name, x, g in zip("abcdefgh", inputs, found, strict=False):
        assert g.dtype == x.dtype, f"gradient {name}: {g.dtype} for an input of {x.dtype}"
        assert g.shape == x.shape, f"gradient {name}: {list(g.shape)} for {list(x.shape)}"
    return grad.detach().double().numpy(), list(found)


def stacked(side: list[Tensor], count: int, precision: Precision) -> np.ndarray:
    """[K * N, C]; a single tensor serves all K."""
    rows = [rows_of(numbers(x, precision)) for x in side]
    return np.concatenate(rows * (count if len(rows) == 1 else 1))


def rows_of(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


# --- softmax_entropy ------------------------------------------------------------------------


def check_softmax_entropy(
    logits: Array, temperature: Any = 1.0, reduction: str = "none", context: str = "grad",
    upstream: str = "normal",
) -> int:  # fmt: skip
    z, t = logits.tensor(), tensors(temperature)
    found = call("softmax_entropy", context, logits=z, temperature=t, reduction=reduction)
    precision = precision_of(z.dtype)
    ulp, shape = precision.ulp, z.shape[:-1]
    flat_t = numbers(t, precision)
    rows = rows_of(numbers(z, precision))
    per_row = flat_t.reshape(-1) if flat_t.ndim else flat_t
    entropy = Entropy(Softmax(rows, per_row, precision), precision)
    expected = entropy.value, entropy.error
    count = len(rows)
    if reduction == "none":
        expected = tuple(x.reshape(shape) for x in expected)
    else:
        expected = summed(*expected, ulp)
        if reduction == "mean":
            expected = tuple(x / count if count else np.nan for x in expected)
    assert found.dtype == (z.dtype if z.dtype == torch.float64 else torch.float32)
    compare("entropy", found, expected, shape if reduction == "none" else (), 1)

    inputs = [x for x in (z, t) if isinstance(x, Tensor) and x.requires_grad]
    if context != "grad" or not inputs:
        assert not found.requires_grad
        return 1
    upstream_grad, grads = gradients(found, inputs, upstream)
    by_row = upstream_grad.reshape(-1) if reduction == "none" else np.full(count, upstream_grad)
    by_row = by_row.astype(precision.work)
    if reduction == "mean":
        by_row = by_row / max(count, 1)
    if z.requires_grad:
        value, error = entropy.by_logits(by_row)
        error = error + 2 * ulp * np.abs(value)
        compare("entropy by logits", grads[0], (value.reshape(z.shape), error.reshape(z.shape)),
                roundings=1)  # fmt: skip
    if isinstance(t, Tensor) and t.requires_grad:
        value, error = entropy.by_temperature(by_row)
        error = error + 4 * ulp * np.abs(value)
        value, error = (summed(value, error, ulp) if t.dim() == 0
                        else (value.reshape(t.shape), error.reshape(t.shape)))  # fmt: skip
        compare("entropy by temperature", grads[-1], (value, error), roundings=2)
    return 1


# --- bisect_temperature ---------------------------------------------------------------------

CONVERGED, CLAMPED_LOW, CLAMPED_HIGH, DEGENERATE, NON_FINITE, MAX_ITERATIONS = range(6)


def check_bisect_temperature(
    logits: Array, target_entropy: Any, bounds: tuple[float, float] = (1e-2, 1e2),
    initial: Any = None, per_sample: bool = False, tolerance: float = 1e-6,
    max_iterations: int = 32, method: str = "halley", context: str = "grad",
    upstream: str = "normal",
) -> int:  # fmt: skip
    z, target, start = logits.tensor(), tensors(target_entropy), tensors(initial)
    found = call(
        "bisect_temperature", context, logits=z, target_entropy=target, bounds=bounds,
        initial=start, per_sample=per_sample, tolerance=tolerance, max_iterations=max_iterations,
        method=method,
    )  # fmt: skip
    precision = precision_of(z.dtype)
    ulp = precision.ulp
    shape = z.shape[:-1] if per_sample else torch.Size(())
    dtype = z.dtype if z.dtype == torch.float64 else torch.float32
    for name, field in zip(found._fields, found, strict=True):
        assert field.shape == shape, f"{name}: shape {list(field.shape)}, not {list(shape)}"
        wanted = torch.int32 if name in ("status", "iterations") else dtype
        assert field.dtype == wanted, f"{name}: {field.dtype}, not {wanted}"
    rows = rows_of(numbers(z, precision))
    status = found.status.numpy().reshape(-1)
    iterations = found.iterations.numpy().reshape(-1)
    t = numbers(found.temperature, precision).reshape(-1)
    reported = numbers(found.entropy, precision).reshape(-1)
    count = len(status)
    wanted = np.broadcast_to(numbers(target, precision).reshape(-1), count)
    # In the op's own type; an overflow there is infinite, as it is for the op.
    wanted = wanted.astype(np.float64 if dtype == torch.float64 else np.float32)
    wanted = wanted.astype(precision.work)

    def at(temperature: Any) -> tuple[Entropy, np.ndarray, np.ndarray, np.ndarray]:
        """At each result: entropy, its error, its slope."""
        rows_at = Entropy(Softmax(rows, temperature, precision), precision)
        if per_sample:
            return rows_at, rows_at.value, rows_at.error, rows_at.variance
        if not len(rows):
            return rows_at, *np.full((3, 1), np.nan)
        value, error, slope = (
            x.mean(keepdims=True) for x in (rows_at.value, rows_at.error, rows_at.variance)
        )
        return rows_at, value, error + 4 * ulp * np.abs(value), slope

    low, high = (precision.work(b) for b in bounds)
    _, lowest, low_error, _ = at(low)
    _, highest, high_error, _ = at(high)
    finite = np.isfinite(lowest) & np.isfinite(wanted)
    available = (rows != -np.inf).sum(-1)
    log_count = np.log(available.astype(precision.work))
    log_count = log_count if per_sample else log_count.mean(keepdims=True) if len(rows) else 0
    slack = np.maximum(tolerance, 4 * ulp * log_count) * (1 + 8 * ulp) + 2 * ulp * np.abs(wanted)

    _expect("NON_FINITE without a cause, or missed", (status == NON_FINITE) == ~finite, found)
    inside = (t >= low * (1 - ulp)) & (t <= high * (1 + ulp))
    _expect("temperature out of bounds", inside, found)
    _expect("iterations", (iterations >= 1) & (iterations <= max_iterations), found)

    unknown = status == NON_FINITE
    here = np.where(inside, t, 1)
    rows_at, value, error, slope = at(here if per_sample else here[0] if count else 1.0)
    # The result is rounded to its type, and a bracket of two neighbouring numbers ends a search.
    error = error + 3 * ulp * (slope + np.sqrt(slope) * 0.1)
    near = np.abs(value - wanted) <= slack + 2 * error
    _expect("CONVERGED, but not at the target", (status != CONVERGED) | near | unknown, found)
    _expect(
        "CLAMPED_LOW, but the target is above",
        (status != CLAMPED_LOW) | ((t <= low * (1 + ulp)) & (lowest >= wanted - 2 * low_error)),
        found,
    )
    _expect(
        "CLAMPED_HIGH, but the target is below",
        (status != CLAMPED_HIGH) | ((t >= high * (1 - ulp)) & (highest <= wanted + 2 * high_error)),
        found,
    )
    flat = highest - lowest <= slack + low_error + high_error
    _expect("DEGENERATE, but the entropy varies", (status != DEGENERATE) | flat, found)
    if start is not None:
        kept = np.clip(np.broadcast_to(numbers(start, precision).reshape(-1), count), low, high)
        same = np.abs(t - kept) <= 2 * ulp * kept
        odd = ~np.isfinite(kept)  # NaN starts at the lower bound
        same |= odd & (np.abs(t - low) <= ulp * low)
        _expect(
            "the initial temperature was not kept",
            ~np.isin(status, (DEGENERATE, NON_FINITE)) | same, found,
        )  # fmt: skip
    ran_out = status == MAX_ITERATIONS
    _expect("MAX_ITERATIONS too early", ~ran_out | (iterations == max_iterations), found)
    if max_iterations >= 200:
        _expect("200 evaluations are enough", ~ran_out, found)
    settled = ~(unknown | ran_out)
    close = np.abs(reported - value) <= 2 * error + ulp * np.abs(value)
    _expect("the reported entropy", ~settled | close | (status == DEGENERATE), found)
    # Whatever a search needs, it must find a root that rounding cannot hide.
    hidden = 2 * (low_error + high_error) + slack
    root = finite & (lowest < wanted - hidden) & (highest > wanted + hidden)
    _expect("a root was missed", ~root | (status == CONVERGED) | ran_out, found)

    inputs = [x for x in (z, target) if isinstance(x, Tensor) and x.requires_grad]
    assert not found.entropy.requires_grad
    if context != "grad" or not inputs:
        assert not found.temperature.requires_grad
        return 1
    upstream_grad, grads = gradients(found.temperature, inputs, upstream)
    variance_error = rows_at.variance_error()
    if not per_sample:
        variance_error = variance_error.mean(keepdims=True) if len(rows) else np.full(1, np.inf)
    # Of the temperature's own rounding, too.
    third = 4 * ulp * (slope + np.sqrt(slope) * slope)
    relative = (variance_error + third) / slope + 8 * ulp
    converged = status == CONVERGED
    by_target = np.where(converged, upstream_grad.reshape(-1) * t / slope, 0)
    # A slope that rounding may have made 0 gives no gradient.
    unsure = converged & ~((relative < 0.3) & np.isfinite(by_target))
    by_target = np.where(unsure, 0, by_target)
    target_error = np.abs(by_target) * 2 * relative + precision.subnormal
    target_error = np.where(unsure | ~(np.abs(by_target) < 1e-3 * precision.max), np.inf,
                            target_error)  # fmt: skip
    if z.requires_grad:
        factor = (
            -by_target if per_sample else np.broadcast_to(-by_target, len(rows)) / max(len(rows), 1)
        )
        factor = np.where(np.isfinite(factor), factor, 0)
        value, error = rows_at.by_logits(factor)
        spread = target_error / np.where(by_target == 0, 1, np.abs(by_target))
        spread = np.broadcast_to(spread, len(rows))
        error = error * 2 + np.abs(value) * (spread[:, None] + 8 * ulp)
        # Through the temperature's own rounding.
        c = np.abs(rows_at.centered)
        p = rows_at.softmax.p
        moved = p * (np.abs(rows_at.softmax.u) * (1 + c) + 1) * 4 * ulp
        error = error + np.abs(factor / rows_at.softmax.temperature.reshape(-1))[:, None] * moved
        error = np.where(np.isinf(spread)[:, None], np.inf, error)
        compare("temperature by logits", grads[0],
                (value.reshape(z.shape), error.reshape(z.shape)), roundings=1)  # fmt: skip
    if isinstance(target, Tensor) and target.requires_grad:
        value, error = by_target, target_error
        if target.dim() == 0:
            value, error = summed(value, error, ulp)
        expected = tuple(np.reshape(x, target.shape) for x in (value, error))
        compare("temperature by target", grads[-1], expected, roundings=2)
    return 1


def _expect(what: str, holds: np.ndarray, found: Any) -> None:
    if not holds.all():
        i = int(np.argwhere(~holds)[0][0])
        fields = {
            name: x.reshape(-1)[i].item() for name, x in zip(found._fields, found, strict=True)
        }
        raise AssertionError(f"{what}: search {i} gave {fields}")


# --- multi_teacher_kl -----------------------------------------------------------------------


def check_multi_teacher_kl(
    student_logits: Any, teacher_logits: Any, temperature: Any = 1.0,
    student_temperature: float = 1.0, weight: Any = None, sample_weight: Any = None,
    reduction: str = "batchmean", scale_by_temperature: bool = False, eps: float = 0.0,
    context: str = "grad", upstream: str = "normal",
) -> int:  # fmt: skip
    given = student_logits, teacher_logits
    sides = [tensors(side) for side in given]
    students, teachers = ([side] if isinstance(side, Tensor) else list(side) for side in sides)
    t, w, sw = tensors(temperature), tensors(weight), tensors(sample_weight)
    found = call(
        "multi_teacher_kl", context, student_logits=sides[0], teacher_logits=sides[1],
        temperature=t, student_temperature=student_temperature, weight=w, sample_weight=sw,
        reduction=reduction, scale_by_temperature=scale_by_temperature, eps=eps,
    )  # fmt: skip
    dtypes = [x.dtype for x in students + teachers]
    precision = precision_of(*dtypes)
    dtype = torch.float64 if precision is PRECISIONS[True] else torch.float32
    ulp, shape = precision.ulp, students[0].shape[:-1]
    count = max(len(students), len(teachers))
    ts = np.broadcast_to(numbers(t, precision), count)
    classes = students[0].shape[-1]
    rows = students[0].numel() // classes
    # All rows of all teachers, [K * N, C].
    each = Divergence(
        Softmax(stacked(students, count, precision), student_temperature, precision),
        Softmax(stacked(teachers, count, precision), np.repeat(ts, rows), precision),
        float(eps), precision, autograd=not _library.NATIVE,
    )  # fmt: skip
    value, error = each.value.reshape(count, rows), each.error.reshape(count, rows)
    raw = value, error
    # A row of weight 0 does not count, whatever its logits are.
    factor = np.ones((count, rows), precision.work)
    if sw is not None:
        factor = factor * numbers(sw, precision).reshape(
            count if sw.dim() > len(shape) else 1, rows
        )
    absent = factor == 0
    value, error = np.where(absent, 0, value * factor), np.where(absent, 0, error * np.abs(factor))
    error = error + 2 * ulp * np.abs(value)
    divisor = np.full(count, 1.0, precision.work)  # [K], of the sum over the rows
    if reduction == "weighted_mean":
        divisor, rounding = summed(factor, 0 * factor, ulp, axis=1)
        # Weights of both signs may leave nothing.
        divisor = np.where(rounding < 1e-3 * np.abs(divisor), divisor, np.nan if rows else 0)
        spread = rounding / np.abs(divisor)
    elif reduction in ("batchmean", "mean"):
        divisor = divisor * (rows if reduction == "batchmean" else rows * classes)
    if reduction != "none":
        value, error = summed(value, error, ulp, axis=1)
        value, error = value / divisor, error / np.abs(divisor)
        if reduction == "weighted_mean":
            error = np.where(np.isnan(divisor), np.inf, error + spread * np.abs(value))
            value = np.where(np.isnan(divisor), 0, value)
    # [K] or [K, N] from here on.
    column = (-1, *(1,) * (value.ndim - 1))
    unscaled = value, error
    squared = np.ones(count, precision.work)
    if scale_by_temperature:
        squared = ts.astype(precision.work) ** 2
        value, error = value * squared.reshape(column), error * squared.reshape(column)
        error = error + 4 * ulp * np.abs(value)
        # A square that leaves the range of the type.
        beyond = ~((squared < 1e-3 * precision.max) & (squared > 1e3 * precision.tiny))
        error = np.where(beyond.reshape(column), np.inf, error)
    ws = np.ones(count, precision.work)
    if w is not None:
        ws = numbers(w, precision) if isinstance(w, Tensor) else np.asarray(w, precision.work)
        value, error = value * ws.reshape(column), error * np.abs(ws).reshape(column)
        error = error + 2 * ulp * np.abs(value)
        # 0 * infinity: not determined.
        error = np.where(np.isnan(value) & ~np.isnan(unscaled[0]), np.inf, error)
        value = np.where(np.isinf(error), 0, value)
        value, error = summed(value, error, ulp, axis=0)
    wanted_shape = () if w is not None else (count,)
    if reduction == "none":
        wanted_shape = (*wanted_shape, *shape)
    assert found.dtype == dtype, f"{found.dtype}, not {dtype}"
    value, error = (np.reshape(x, wanted_shape) for x in (value, error))
    # Between the steps, a product of the type may leave its range.
    error = np.where(np.abs(value) > 1e-3 * precision.max, np.inf, error)
    limit = np.abs(unscaled[0] * np.maximum(1, np.abs(divisor)).reshape(column)).max(initial=0)
    limit = limit * max(1, squared.max())
    if not limit < 1e-3 * precision.max:
        error = np.full_like(error, np.inf)
    compare("divergence", found, (value, error), torch.Size(wanted_shape), 1, unsettled=True)

    candidates = [*students, *teachers, t, w, sw]
    inputs = [x for x in candidates if isinstance(x, Tensor) and x.requires_grad]
    if context != "grad" or not inputs:
        assert not found.requires_grad
        return 1
    upstream_grad, grads = gradients(found, inputs, upstream)
    by_input = dict(zip(map(id, inputs), grads, strict=True))
    g = upstream_grad.astype(precision.work)
    # [K, 1], [K, N], or with weights [1, 1] or [1, N].
    g = g.reshape(count if w is None else 1, rows if reduction == "none" else 1)
    g = np.broadcast_to(g, (count, rows)) / divisor[:, None]
    outer = g * (squared * ws)[:, None]
    coefficient = outer * factor
    if not max(limit, squared.max()) < 1e-3 * precision.max or squared.min() < 1e3 * precision.tiny:
        return 1
    if np.isnan(divisor).any():
        return 1
    # A row that does not count has no gradient, nor a broken one.
    gone = absent.reshape(-1)
    each.broken, each.infinite = each.broken & ~gone, each.infinite & ~gone
    flat = coefficient.reshape(-1)

    def counted(pair: oracle.Pair) -> oracle.Pair:
        value, error = pair
        none = gone.reshape(-1, *(1,) * (value.ndim - 1))
        return np.where(none, 0, value), np.where(none, 0, error + 12 * ulp * np.abs(value))

    for side, name in ((students, "divergence by student"), (teachers, "divergence by teacher")):
        if not any(x.requires_grad for x in side):
            continue
        value, error = (
            x.reshape(count, rows, classes)
            for x in counted(each.by_student(flat, student_temperature) if side is students
                             else each.by_teacher(flat))
        )  # fmt: skip
        if len(side) < count:
            error = error + 12 * ulp * np.abs(value)
            if not _library.NATIVE:  # autograd adds up parts that are rounded
                error = error + (count + 1) * torch.finfo(side[0].dtype).eps / 2 * np.abs(value)
            value, error = value.sum(0, keepdims=True), error.sum(0, keepdims=True)
        for i, x in enumerate(side):
            if x.requires_grad:
                wanted = value[i].reshape(x.shape), error[i].reshape(x.shape)
                # With weights they may be computed beforehand, and be scaled once more.
                compare(name, by_input[id(x)], wanted, roundings=1 if w is None else 2,
                        factor=np.abs(upstream_grad).max(initial=0))  # fmt: skip
    kl = tuple(np.where(absent, 0, x) for x in raw)
    if isinstance(t, Tensor) and t.requires_grad:
        value, error = (x.reshape(count, rows) for x in counted(each.by_temperature(flat)))
        value, error = summed(value, error, ulp, axis=1)
        if scale_by_temperature:
            extra = g * factor * kl[0] * (2 * ts * ws)[:, None]
            slack = np.abs(g * factor * (2 * ts * ws)[:, None]) * kl[1] + 12 * ulp * np.abs(extra)
            more, slack = summed(extra, slack, ulp, axis=1)
            # Autograd adds up two parts that are rounded.
            slack = slack + torch.finfo(t.dtype).eps * (np.abs(value) + np.abs(more))
            value, error = value + more, error + slack + 2 * ulp * np.abs(more)
        if t.dim() == 0:
            value, error = summed(value, error, ulp)
        compare("divergence by temperature", by_input[id(t)], (value, error), roundings=3)
    if isinstance(w, Tensor) and w.requires_grad:
        by_row = g * squared[:, None] * factor
        value, error = by_row * kl[0], np.abs(by_row) * kl[1] + 12 * ulp * np.abs(by_row * kl[0])
        value, error = summed(value, error, ulp, axis=1)
        value = np.where(divisor == 0, np.nan, value)  # 0 / 0
        compare("divergence by weight", by_input[id(w)], _finite((value, error)), roundings=2)
    if isinstance(sw, Tensor) and sw.requires_grad:
        by_row = raw
        if reduction == "weighted_mean":  # the divisor moves, too
            mean, mean_error = (x[:, None] for x in unscaled)
            by_row = raw[0] - mean, raw[1] + mean_error + 4 * ulp * (np.abs(raw[0]) + np.abs(mean))
        value, error = outer * by_row[0], np.abs(outer) * (by_row[1] + 12 * ulp * np.abs(by_row[0]))
        if reduction == "weighted_mean":
            error = error + spread[:, None] * np.abs(value)
        error = np.where(absent & ~(np.abs(raw[0]) < 1e-3 * precision.max), np.inf, error)
        if sw.dim() == len(shape):
            value, error = summed(value, error, ulp, axis=0)
        expected = _finite((value.reshape(sw.shape), error.reshape(sw.shape)))
        compare("divergence by sample_weight", by_input[id(sw)], expected, roundings=2)
    return 1


def _finite(pair: oracle.Pair) -> oracle.Pair:
    """Gradients that follow from infinite or NaN divergences are not determined."""
    value, error = pair
    return np.where(np.isfinite(value), value, 0), np.where(np.isfinite(value), error, np.inf)


# --- pgd_step_ ------------------------------------------------------------------------------


def check_pgd_step_(
    x_adv: Array, grad: Array, x: Array, step_size: float, epsilon: float,
    bounds: tuple[float, float] | None = (0.0, 1.0), norm: str = "linf", context: str = "grad",
) -> int:  # fmt: skip
    moved, gradient, origin = x_adv.tensor(), grad.tensor(), x.tensor()
    if moved.requires_grad and context == "grad":
        context = "no_grad"
    precision = precision_of(moved.dtype, gradient.dtype, origin.dtype)
    info = torch.finfo(moved.dtype)
    arrays = [numbers(a, precision) for a in (moved, gradient, origin)]
    others = [a.detach().clone() for a in (gradient, origin)]
    found = call(
        "pgd_step_", context, x_adv=moved, grad=gradient, x=origin, step_size=step_size,
        epsilon=epsilon, bounds=bounds, norm=norm,
    )  # fmt: skip
    assert found is moved, "x_adv was not returned"
    for a, b in zip((gradient, origin), others, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), "grad or x was overwritten"
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    shape = moved.shape
    arrays = [a.reshape(shape[0], int(np.prod(shape[1:]))) for a in arrays]
    step, size = precision.work(step_size), precision.work(epsilon)
    rule = oracle.pgd_linf if norm == "linf" else oracle.pgd_l2
    value, error = rule(*arrays, step, size, low, high, precision)
    # Sums that leave the range of the type.
    reach = np.abs(arrays[0]) + np.abs(arrays[2]) + step + size
    if norm == "l2":
        reach = reach.sum(-1, keepdims=True) + 0 * value
    error = np.where((reach < 1e-3 * precision.max) | np.isnan(value), error, np.inf)
    compare(f"x_adv of {norm}", found, (value.reshape(shape), error.reshape(shape)), roundings=1)
    if bounds is not None and found.numel():
        least, most = (float(torch.tensor(b, dtype=torch.float64).to(moved.dtype)) for b in bounds)
        result = found.detach().double().nan_to_num(least)
        slack = info.eps
        assert (result >= least - slack * abs(least)).all(), "below the bounds"
        assert (result <= most + slack * abs(most)).all(), "above the bounds"
    return 1


# --- BMTARDLoss -----------------------------------------------------------------------------


def check_BMTARDLoss(
    student_logits: list[Array], teacher_logits: list[Array], steps: int = 1,
    training: bool = True, context: str = "grad", upstream: str = "normal", **settings: Any,
) -> int:  # fmt: skip
    loss = bmtard.BMTARDLoss(**settings).train(training)
    count = len(loss.weights)
    assert loss.temperatures.tolist() == [loss.temperature_bounds[0]] * count, "temperatures"
    assert loss.weights.tolist() == [1 / count] * count, "weights"
    for step in range(steps):
        # Each step sees other numbers.
        inputs = [
            [Array(**{**vars(a), "seed": a.seed + 31 * step}).tensor() for a in side]
            for side in (student_logits, teacher_logits)
        ]
        _check_step(loss, *inputs, context, upstream)
    return steps


def _check_step(loss: Any, students: list[Tensor], teachers: list[Tensor], context: str,
                upstream: str) -> None:  # fmt: skip
    before = {name: b.clone() for name, b in loss.named_buffers()}
    with CONTEXTS[context]():
        found = loss(students, teachers)
    after = {name: b.clone() for name, b in loss.named_buffers()}
    count = len(students)
    dtypes = [x.dtype for x in students + teachers]
    precision = precision_of(*dtypes)
    dtype = torch.float64 if precision is PRECISIONS[True] else torch.float32
    ulp = precision.ulp
    low, high = loss.temperature_bounds
    classes = students[0].shape[-1]
    rows = students[0].numel() // classes
    zs, zt = ([rows_of(numbers(x, precision)) for x in side] for side in (students, teachers))
    old_t = before["temperatures"].numpy()
    used, bisects = old_t, loss.training and loss.balance == "bisect"
    updated = int(after["step"]) == int(before["step"]) + 1
    if bisects and updated:
        used = after["temperatures"].numpy()
        inside = (used >= low * (1 - 1e-12)) & (used <= high * (1 + 1e-12))
        assert inside.all(), f"temperatures {used} are not in [{low}, {high}]"
    elif bisects:
        # What the temperatures would have been is not kept: only that nothing else changed.
        for name in before:
            if name != "status":
                assert torch.equal(before[name], after[name]), f"{name} changed in a skipped step"

    eps = float(loss.eps)
    teacher = Softmax(np.concatenate(zt), np.repeat(used, rows), precision)
    student = Softmax(np.concatenate(zs), loss.student_temperature, precision)
    each = Divergence(student, teacher, eps, precision)
    entropy = Entropy(teacher, precision)
    h_rows, h_row_errors = entropy.value, entropy.error
    if eps and loss.balance == "sign":
        size = np.abs(each.log_p_eps)
        h_rows = np.where(teacher.broken, np.nan, -(teacher.p * each.log_p_eps).sum(-1))
        h_row_errors = (teacher.p * (size + 1) * (teacher.p_error + 4 * ulp)).sum(-1)
        h_row_errors = h_row_errors + teacher.sums * (teacher.p * size).sum(-1)
        h_row_errors = h_row_errors + (teacher.flushed * (size + 1)).sum(-1)
    divisor = {"mean": rows * classes, "batchmean": rows, "sum": 1}[loss.reduction]

    def averaged(value: np.ndarray, error: np.ndarray, by: int) -> oracle.Pair:
        value, error = (x.reshape(count, rows) for x in (value, error))
        value, error = summed(value, error, ulp, axis=1)
        return (value / by, error / by) if by else (value * np.nan, value * np.nan)

    losses, loss_errors = averaged(each.value, each.error, divisor)
    h, h_errors = averaged(h_rows, h_row_errors, rows)
    loss_errors = loss_errors + 4 * ulp * np.abs(losses)
    h_errors = h_errors + 4 * ulp * np.abs(h)
    finite = np.isfinite(losses).all() and np.isfinite(h).all()
    # The losses of single rows are numbers of the type, too.
    sure = np.isfinite(loss_errors).all() and (np.abs(each.value) < 1e-3 * precision.max).all()
    if (loss.training and not bisects) or (bisects and updated):
        if finite and sure:
            assert updated, "a finite step was skipped"
        elif not finite and rows:
            assert not updated or not sure, "a step that is not finite was taken"
    weights = before["weights"].numpy()
    initial = before["initial_losses"].numpy()
    if loss.training and not updated:
        assert int(after["status"]) == 1, f"status {int(after['status'])} of a skipped step"
        for name in before:
            if name != "status":
                assert torch.equal(before[name], after[name]), f"{name} changed in a skipped step"
    elif loss.training and sure:
        compare("losses", after["losses"], (losses, loss_errors), roundings=1)
        compare("entropies", after["entropies"], (h, h_errors), roundings=1)
        first = int(before["step"]) == 0
        started = after["losses"].numpy() if first else initial
        assert (after["initial_losses"].numpy() == started).all(), "initial_losses"
        # From the losses as they were stored: these are compared above.
        stored = after["losses"].numpy()
        expected = oracle.balanced_weights(
            stored, 0 * stored, started, 0 * stored, weights, float(before["weight_lr"]),
            loss.loss_exponent,
        )  # fmt: skip
        compare("weights", after["weights"], expected)
        weights = after["weights"].numpy()
        status = int(after["status"])
        if loss.balance == "sign":
            gap = h - oracle.others_mean(h)
            unsure = np.abs(gap) <= 2 * (h_errors + oracle.others_mean(h_errors))
            move = np.sign(gap) * float(before["temperature_lr"])
            wanted = np.clip(old_t - move, low, high)
            got = after["temperatures"].numpy()
            fine = np.abs(got - wanted) <= 1e-14 * high
            most = float(before["temperature_lr"]) * (1 + 1e-14) + 1e-14 * high
            assert (fine | (unsure & (np.abs(got - old_t) <= most))).all(), (
                f"temperatures {got} after {old_t}, not {wanted}; entropies {h}"
            )
            assert status == 0, f"status {status}"
        else:
            _check_solution(loss, zt, old_t, used, precision, status)
    elif not loss.training:
        for name in before:
            assert torch.equal(before[name], after[name]), f"{name} changed in eval()"
    if bisects and not updated:
        assert not torch.isfinite(found) or not sure or not finite, "a finite step was skipped"
        return
    if loss.training and updated and not sure:
        weights = after["weights"].numpy()
    value = (weights * losses).sum()
    error = (weights * loss_errors).sum() + 4 * ulp * np.abs(weights * losses).sum()
    error = error if sure or np.isnan(value) else np.inf
    if not np.isfinite(losses).all():  # 0 * infinity
        error = np.inf
        assert not sure or not torch.isfinite(found), "the loss hides an infinity"
    assert found.dtype == dtype, f"{found.dtype}, not {dtype}"
    compare("loss", found, (value, error), torch.Size(()), 1, unsettled=True)

    inputs = [x for x in students if x.requires_grad]
    if context != "grad" or not inputs:
        assert not found.requires_grad
        return
    g, grads = gradients(found, inputs, upstream)
    got = iter(grads)
    coefficient = np.repeat(g * weights / max(divisor, 1), rows).astype(precision.work)
    value, error = each.by_student(coefficient, loss.student_temperature)
    error = error + 12 * ulp * np.abs(value)
    if torch.float16 in dtypes:
        # The smallest float16, where p - q = 1 is kept as 2^12 or more.
        error = error + np.abs(coefficient)[:, None] / loss.student_temperature * 2.0**-36
    value, error = (x.reshape(count, *students[0].shape) for x in (value, error))
    for k, x in enumerate(students):
        if x.requires_grad:
            compare("loss by student", next(got), (value[k], error[k]), roundings=2,
                    factor=float(np.abs(g)))  # fmt: skip


def _check_solution(loss, zt, old, used, precision: Precision, status: int) -> None:
    """The temperatures of mode "bisect": where the mean entropies are the common target."""
    low, high = loss.temperature_bounds
    ulp, count = precision.ulp, len(zt)
    at_low = [oracle.mean_entropy(z, low, precision)[1] for z in zt]
    h_low, low_error = np.array(at_low).T
    target, target_error = h_low.max(), low_error.max()
    momentum = loss.temperature_momentum
    solved = used.copy()
    relative = np.full(count, 1e-13)
    if momentum:
        solved = np.exp((np.log(used) - momentum * np.log(old)) / (1 - momentum))
        relative = relative + 1e-15 / (1 - momentum) * (1 + np.abs(np.log(used)))
        solved = np.clip(solved, low, high)
    clamped = near_top = False
    for k, z in enumerate(zt):
        rows, (value, error) = oracle.mean_entropy(z, solved[k], precision)
        slope = rows.variance.mean()
        log_count = np.log((z != -np.inf).sum(-1)).mean()
        slack = max(1e-6, 4 * ulp * log_count) + 2 * (error + target_error)
        slack = slack + slope * (relative[k] + 4 * ulp)
        top = oracle.mean_entropy(z, high, precision)[1]
        short = top[0] < target - slack - top[1]
        at_high = solved[k] >= high * (1 - 4 * ulp - relative[k])
        near_top |= bool(at_high)
        # Equal logits in every row: nothing depends on the temperature, which stays.
        flat = top[0] - h_low[k] <= slack + top[1]
        clamped |= bool(short and not flat)
        fine = abs(value - target) <= slack or (at_high and value <= target + slack) or flat
        assert fine, (
            f"temperature {solved[k]} of teacher {k}: entropy {value}, not {target} within {slack}"
        )
        if short:
            assert at_high or flat, f"temperature {solved[k]} of teacher {k} is not at its bound"
    allowed = {2} if clamped else {0, 2} if near_top else {0}
    assert status in allowed, f"status {status}, not one of {allowed}"


CHECKS: dict[str, Callable[..., int]] = {
    "softmax_entropy": check_softmax_entropy,
    "bisect_temperature": check_bisect_temperature,
    "multi_teacher_kl": check_multi_teacher_kl,
    "pgd_step_": check_pgd_step_,
    "BMTARDLoss": check_BMTARDLoss,
}
