"""What every op must return, and how far rounding may take it from there: NumPy alone.

Written from the formulas of the docstrings, gradients by hand; nothing of bmtard is imported.
Arrays are float64, and long double (80 bits on x86) where the op itself computes in float64.

Every result is a pair (value, error). The errors are first-order bounds on what rounding to the
op's own type can do, from these steps of any implementation, with ulp = 2^-23 or 2^-52:

- u = (z - max z) / temperature: the difference, the temperature, its reciprocal and the product are
  rounded, each by ulp / 2: 2 |u| ulp. A reciprocal below the smallest normal number loses more.
- exp and log: 2 ulp of their value (their polynomials' own bound).
- a sum of n values in one lane, all roundings in one direction: n / 2 ulp of the sum of their
  magnitudes. A lane adds at most 512 values before the sums go on in double.
- exp(u) may be 0 where it is below the smallest normal number (u < -87 in float32).
- results, products and quotients: ulp / 2 each; rounding to the gradient's own type once or twice.

An error of infinity means "not determined": the value would be beyond the type's range, or an
infinite divergence has been differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Precision:
    """The type in which an op computes, and the one in which its oracle does."""

    ulp: float
    tiny: float  # smallest normal number
    subnormal: float
    max: float
    work: type

    @staticmethod
    def of(double: bool) -> Precision:
        info = np.finfo(np.float64 if double else np.float32)
        return Precision(
            float(info.eps), float(info.tiny), float(info.smallest_subnormal), float(info.max),
            np.longdouble if double else np.float64,
        )  # fmt: skip


PRECISIONS = {double: Precision.of(double) for double in (False, True)}


def lane(classes: int) -> float:
    """ulp of a sum over a row: half the number of values in one lane."""
    return 2 + 0.5 * (classes if classes <= 128 else min(classes / 4, 512) + 4)


def summed(values: np.ndarray, errors: np.ndarray, ulp: float, axis=None) -> Pair:
    """The sum over rows by torch, in a cascade: log2 n roundings of a value, and a few more."""
    count = values.size if axis is None else values.shape[axis]
    rounding = ulp * (8 + np.log2(count + 1)) * np.abs(values).sum(axis)
    return values.sum(axis), errors.sum(axis) + rounding


class Softmax:
    """softmax(z / temperature) of rows [N, C], with the errors of its parts."""

    def __init__(self, z: np.ndarray, temperature: np.ndarray | float, precision: Precision):
        ulp, tiny, work = precision.ulp, precision.tiny, precision.work
        z = z.astype(work, copy=False)
        t = np.asarray(temperature, work)
        t = t[:, None] if t.ndim else t
        top = z.max(-1, keepdims=True) if z.size else z[:, :1]
        self.broken = ~np.isfinite(top)[:, 0] | ~((t > 0)[:, 0] if t.ndim else t > 0)
        self.temperature, self.sums = t, lane(z.shape[-1]) * ulp
        self.masked = z == -np.inf
        distance = np.where(self.masked, -np.inf, z - top)
        u = np.where(self.masked, -np.inf, distance / t)
        e = np.exp(u)
        total = e.sum(-1, keepdims=True)
        self.log_sum = np.log(total)
        self.p = e / total
        self.log_p = u - self.log_sum
        self.u = np.where(self.p > 0, u, 0)  # a class of probability 0 adds nothing
        deep = np.abs(self.u)
        # The reciprocal of a temperature above 1e38 is subnormal, and loses digits.
        lost = np.where(self.p > 0, np.abs(distance), 0) * precision.subnormal
        self.distance = np.where(self.masked, 0, np.abs(distance))
        self.log_p_error = (2.5 * deep + self.log_sum + 2) * ulp + self.sums + lost
        self.p_error = (2.5 * deep + self.log_sum + 4) * ulp + 2 * self.sums + lost  # relative
        self.flushed = np.minimum(self.p, 4 * tiny)  # may be 0 instead

    def p_slack(self) -> np.ndarray:
        return self.p * self.p_error + self.flushed


# --- softmax_entropy ------------------------------------------------------------------------


class Entropy:
    """-sum p log p of rows, its error, and its derivatives."""

    def __init__(self, softmax: Softmax, precision: Precision):
        s, ulp = softmax, precision.ulp
        self.softmax, self.precision = s, precision
        log_p = np.where(s.p > 0, s.log_p, 0)
        self.value = -(s.p * log_p).sum(-1)
        self.centered = np.where(s.p > 0, s.log_p + self.value[:, None], 0)
        mean = np.abs((s.p * s.u).sum(-1))
        moved = np.abs(self.centered) * s.p_error + s.log_p_error + 2 * ulp * np.abs(s.u)
        self.error = (s.p * moved + s.flushed * 800).sum(-1) + (
            s.sums * (2 + 2 * mean) + 2 * ulp * (s.log_sum[:, 0] + mean)
        )
        self.value = np.where(s.broken, np.nan, self.value)
        self.variance = (s.p * self.centered**2).sum(-1)  # d entropy / d log temperature

    def variance_error(self) -> np.ndarray:
        """From its central form, or from the difference of the raw moments."""
        s, ulp = self.softmax, self.precision.ulp
        c = np.abs(self.centered)
        central = (s.p * (c**2 * (s.p_error + 4 * ulp) + 2 * c * (s.log_p_error))).sum(-1)
        raw = (s.p * s.u**2).sum(-1)
        return central + self.error**2 + (4 * s.sums + 8 * ulp) * raw + (s.flushed * 6e5).sum(-1)

    def by_logits(self, upstream: np.ndarray) -> Pair:
        s, ulp = self.softmax, self.precision.ulp
        scale = upstream[:, None] / s.temperature
        c = np.abs(self.centered)
        value = -scale * s.p * self.centered
        inner = s.p * (c * (s.p_error + 4 * ulp) + s.log_p_error + self.error[:, None])
        lost = self.precision.subnormal * (1 + np.abs(upstream[:, None])) * (1 + c)
        error = np.abs(scale) * (inner + s.flushed * (1 + c)) + lost
        return _undetermined(value, error, self.softmax.broken, self.precision, np.abs(scale))

    def by_temperature(self, upstream: np.ndarray) -> Pair:
        """Of each row."""
        s, ulp = self.softmax, self.precision.ulp
        scale = upstream / np.broadcast_to(s.temperature, (len(upstream), 1))[:, 0]
        value = scale * self.variance
        error = np.abs(scale) * (
            self.variance_error() + (s.sums + 4 * ulp) * self.variance
            + 2 * (s.p * np.abs(self.centered)).sum(-1) * self.error
        )  # fmt: skip
        error = error + self.precision.subnormal * (2 + np.abs(upstream))
        return _undetermined(value, error, self.softmax.broken, self.precision, np.abs(scale))


def _undetermined(value, error, broken, precision: Precision, *factors) -> Pair:
    """Rows that have no gradient, and those whose factors leave the type's range."""
    broken = broken.reshape(broken.shape + (1,) * (value.ndim - broken.ndim))
    beyond = np.zeros_like(value, bool)
    for factor in factors:
        beyond = beyond | ~(factor < 1e-3 * precision.max)
    unknown = broken | beyond | np.isnan(value)
    return np.where(unknown, 0, value), np.where(unknown, np.inf, error)


# --- multi_teacher_kl -----------------------------------------------------------------------


class Divergence:
    """sum p (log(p + eps) - log q) of rows, its error, and its derivatives.

    ``autograd``: by the teacher, they are differences of products with two roundings of p.
    """

    def __init__(
        self, student: Softmax, teacher: Softmax, eps: float, precision: Precision,
        autograd: bool = False,
    ):  # fmt: skip
        p, ulp = teacher.p, precision.ulp
        self.student, self.teacher, self.precision = student, teacher, precision
        self.autograd = autograd
        self.broken = student.broken | teacher.broken
        # Gradients by the teacher hold log q, whose differences may not be numbers of the type.
        self.far = ~(student.distance.max(-1, initial=0) < 0.99 * precision.max)
        counts = p > 0
        log_p_eps = np.log(p + precision.work(eps)) if eps else teacher.log_p
        self.log_p_eps = log_p_eps
        share = p / (p + eps) if eps else np.zeros_like(p)
        log_q_error = (2.5 * np.abs(np.where(np.isfinite(student.log_p), student.log_p, 0))
                       + 2 * student.log_sum + 2) * ulp + student.sums  # fmt: skip
        log_p_error = teacher.log_p_error
        if eps:
            log_p_error = share * (teacher.p_error + ulp) + 3 * ulp * np.abs(log_p_eps) + ulp
        ratio = np.where(counts, log_p_eps - student.log_p, 0)
        size = np.abs(ratio)
        value = (p * ratio).sum(-1)
        self.by_p = ratio + np.where(counts, share, 0)
        self.center = (p * self.by_p).sum(-1)
        # Before the sums over the row are added, terms are as large as these.
        raw = (p * (np.abs(teacher.u) + np.where(counts, np.abs(student.log_p), 0))).sum(-1)
        logs = student.log_sum[:, 0] + teacher.log_sum[:, 0]
        self.ratio_error = np.where(counts, log_p_error + log_q_error + 2 * ulp * size, 0)
        moved = p * (np.abs(ratio - value[:, None]) * teacher.p_error + self.ratio_error)
        moved = moved + teacher.flushed * (size + 1)
        q_sum = (student.p * (2 * np.abs(student.u) + 4) * ulp).sum(-1)
        error = moved.sum(-1) + q_sum + (
            (teacher.sums + 3 * ulp) * (2 * raw + (p * size).sum(-1) + 2)
            + (student.sums + teacher.sums) + 3 * ulp * logs
        )  # fmt: skip
        # The one class left of the student is gone, but the teacher may not know it any more.
        lost = student.masked & counts
        unsure = lost.any(-1) & ((np.where(lost, p, 0)).max(-1, initial=0) < 100 * precision.tiny)
        # log q that not even 2^-64 brings back into the range of the type.
        unsure = unsure | ~(np.where(lost, 0, size).max(-1, initial=0) < 2.0**63 * precision.max)
        self.infinite = lost.any(-1)
        self.error = np.where(unsure, np.inf, np.where(self.infinite, 0, error))
        self.value = np.where(self.broken, np.nan, value)
        self.center_error = error + (p * (share * 2 * teacher.p_error)).sum(-1) + teacher.sums

    def by_student(self, coefficient: np.ndarray, student_temperature: float) -> Pair:
        s, t, ulp = self.student, self.teacher, self.precision.ulp
        scale = coefficient[:, None] / self.precision.work(student_temperature)
        # No gradient where the divergence is infinite.
        value = np.where(s.masked & (t.p > 0), np.nan, scale * (s.p - t.p))
        slack = s.p_slack() + t.p_slack() + 8 * ulp * (s.p + t.p)
        error = np.abs(scale) * slack + self._lost(coefficient)
        limits = (np.abs(scale), np.abs(coefficient[:, None]))
        return _undetermined(value, error, self.broken, self.precision, *limits)

    def _by_scaled_teacher(self) -> Pair:
        t, ulp = self.teacher, self.precision.ulp
        centered = np.where(t.p > 0, self.by_p - self.center[:, None], 0)
        error = t.p * (
            np.abs(centered) * (t.p_error + 8 * ulp)
            + self.ratio_error + np.abs(self.by_p) * 2 * ulp + self.center_error[:, None]
        ) + t.flushed * (np.abs(self.by_p) + np.abs(self.center[:, None]) + 1)  # fmt: skip
        if self.autograd:
            size = np.where(t.p > 0, np.abs(self.by_p), 0) + np.abs(self.center[:, None])
            error = error + t.p * t.p_error * size
        return t.p * centered, error

    def by_teacher(self, coefficient: np.ndarray) -> Pair:
        inner, error = self._by_scaled_teacher()
        scale = coefficient[:, None] / self.teacher.temperature
        value, error = scale * inner, np.abs(scale) * error + self._lost(coefficient)
        broken = self.broken | self.infinite | self.far
        size = np.abs(coefficient)[:, None] * (1 + np.abs(self.by_p).max(-1, keepdims=True))
        return _undetermined(value, error, broken, self.precision, np.abs(scale), size)

    def by_temperature(self, coefficient: np.ndarray) -> Pair:
        """Of each row."""
        t, ulp = self.teacher, self.precision.ulp
        inner, error = self._by_scaled_teacher()
        scale = coefficient / np.broadcast_to(t.temperature, (len(coefficient), 1))[:, 0]
        value = -scale * (inner * t.u).sum(-1)
        size = (np.abs(inner * t.u)).sum(-1)
        slack = (np.abs(t.u) * error).sum(-1) + (8 * ulp + t.sums) * size
        slack = slack + np.abs(inner).sum(-1) * self.precision.subnormal  # of a subnormal u
        error = np.abs(scale) * slack + self._lost(coefficient)[:, 0] * t.p.shape[-1]
        broken = self.broken | self.infinite | self.far
        size = np.abs(scale) * (1 + size + np.abs(self.by_p).max(-1))
        return _undetermined(value, error, broken, self.precision, size, np.abs(coefficient))

    def _lost(self, coefficient: np.ndarray) -> np.ndarray:
        """What products of small numbers lose below the smallest subnormal one."""
        return self.precision.subnormal * (2 + np.abs(coefficient[:, None]))


# --- bisect_temperature ---------------------------------------------------------------------


def mean_entropy(z: np.ndarray, temperature, precision: Precision) -> tuple[Entropy, Pair]:
    """Of the rows and their mean, which the kernels add up in double."""
    rows = Entropy(Softmax(z, temperature, precision), precision)
    if not len(z):
        return rows, (np.array(np.nan), np.array(np.inf))
    ulp = precision.ulp
    return rows, (rows.value.mean(), rows.error.mean() + 4 * ulp * np.abs(rows.value).mean())


# --- pgd_step_ ------------------------------------------------------------------------------


def pgd_linf(x_adv, grad, x, step, epsilon, low, high, precision: Precision) -> Pair:
    sign = np.where(np.isnan(grad), 0, np.sign(grad))
    moved = x_adv + step * sign
    value = np.minimum(np.maximum(moved, x - epsilon), x + epsilon)
    # Rounded: the step, epsilon, one addition each, and the bounds.
    error = 2 * precision.ulp * (np.abs(x_adv) + step + np.abs(x) + epsilon)
    value = np.where(np.isnan(x) | np.isnan(x_adv), np.nan, value)
    return np.clip(value, low, high), error + precision.subnormal


def pgd_l2(x_adv, grad, x, step, epsilon, low, high, precision: Precision) -> Pair:
    """Rows are samples."""
    ulp = precision.ulp
    sums = (lane(x.shape[-1]) + 8) * ulp
    length = _norm(grad)
    moves = np.isfinite(length) & (length > 0)
    direction = np.where(moves, grad / np.where(moves, length, 1), 0)
    distance = x_adv + step * direction - x
    # The order (x_adv + step) - x rounds at the size of x_adv.
    slack = 3 * ulp * (np.abs(x_adv) + step * np.abs(direction) + np.abs(x))
    slack = slack + sums * step * np.abs(direction) + precision.subnormal
    size = _norm(distance)
    size_error = _norm(slack) + sums * size
    outside = size > epsilon
    factor = np.where(outside, epsilon / np.where(outside, size, 1), 1)
    # On the edge of the ball, whether it scales or not makes no difference beyond the errors.
    relative = np.where(size > 0, size_error / np.where(size > 0, size, 1), 0)
    relative = np.where(size + 2 * size_error >= epsilon, relative + 4 * ulp, 0)
    value = x + factor * distance
    error = factor * slack + np.abs(factor * distance) * relative + 2 * ulp * np.abs(x)
    # A factor that not even a gradient times 2^100 brings into the range of the type.
    beyond = step > 2.0**99 * precision.max * np.where(moves, length, 1)
    value, error = np.where(beyond, 0, value), np.where(beyond, np.inf, error)
    # A ball so small that the step's rounding decides the direction.
    error = np.where(relative > 0.1, np.abs(value - x) + epsilon + error, error)
    return np.clip(value, low, high), error + 4 * ulp * np.abs(value)


def _norm(rows: np.ndarray) -> np.ndarray:
    """[N, 1], scaled first, as squares may leave the range."""
    largest = np.abs(rows).max(-1, keepdims=True, initial=0)
    usable = np.isfinite(largest) & (largest > 0)
    scaled = rows / np.where(usable, largest, 1)
    return np.where(usable, largest * np.sqrt((scaled**2).sum(-1, keepdims=True)), largest)


# --- BMTARDLoss -----------------------------------------------------------------------------


def balanced_weights(losses, errors, initial, initial_errors, weights, rate, exponent) -> Pair:
    """One step of the weights [K]: w <- (1 - rate) w + rate r / sum r, clamped at 0, sum 1."""
    started = initial > 0
    ratio = np.where(started, losses / np.where(started, initial, 1), 1)
    ratio = np.maximum(ratio, 0)
    slack = errors / np.where(started, initial, 1)
    slack = slack + ratio * np.where(started, initial_errors / np.where(started, initial, 1), 0)
    slack = slack * np.where(started, 1, 0)
    relative = ratio**exponent
    upper, lower = (ratio + slack) ** exponent, np.maximum(ratio - slack, 0) ** exponent
    slack = np.maximum(upper - relative, relative - lower)
    # Whether a loss of 0 counts as started is a matter of its rounding.
    slack = np.where((initial_errors > 0) & (initial <= 2 * initial_errors), np.inf, slack)
    total = relative.sum()
    share = relative / total if total > 0 else np.full_like(relative, 1 / len(relative))
    spread = slack.sum()
    error = (slack + share * spread) / max(total - spread, 0) if spread < total else np.inf
    new = np.maximum((1 - rate) * weights + rate * share, 0)
    new = new / new.sum() if new.sum() > 0 else np.full_like(new, 1 / len(new))
    return new, np.minimum(rate * error if rate else 0 * new, 1) * 3 + 1e-14


def others_mean(entropies: np.ndarray) -> np.ndarray:
    """[K]: of the other teachers; a single one is its own."""
    if len(entropies) == 1:
        return entropies
    return (entropies.sum() - entropies) / (len(entropies) - 1)
