"""The balanced loss and its two halves as modules; all their state is in buffers."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bmtard import _library, ops, reference
from bmtard.ops._checks import (
    check_bounds,
    check_eps,
    check_floating,
    check_logits,
    check_own_temperature,
    check_temperature,
    is_integer,
    is_number,
)
from bmtard.types import BalanceState, BalanceStatus, SearchStatus

# Defaults of the modules here and of the trainer.
MODE: Final = "bisect"
TEMPERATURE_BOUNDS = (1.0, 10.0)
TEMPERATURE_LR = 1e-3
TEMPERATURE_MOMENTUM = 0.0
WEIGHT_LR = 0.025
LOSS_EXPONENT = 1.0


def check_settings(op: str, **settings: Any) -> None:
    """Checks settings by name, for the modules here and for the trainer.

    "mode", "bounds" and "momentum" of EntropyBalance are "balance", "temperature_bounds" and
    "temperature_momentum" of BMTARDLoss.
    """
    for name, value in settings.items():
        match name:
            case "num_teachers":
                if not (is_integer(value) and 1 <= value <= ops.MAX_TEACHERS):
                    raise ValueError(
                        f"{op}: num_teachers must be an integer from 1 to {ops.MAX_TEACHERS}, "
                        f"got {value!r}"
                    )
            case "mode" | "balance":
                _check_choice(op, name, value, ("bisect", "sign"))
            case "bounds" | "temperature_bounds":
                check_bounds(op, value, name)
            case "temperature_lr":
                _check_range(op, name, value, 0, math.inf)
            case "momentum" | "temperature_momentum":
                _check_range(op, name, value, 0, 1)
            case "weight_lr":
                _check_range(op, name, value, 0, 1, closed=True)
            case "loss_exponent":
                if not (is_number(value) and 0 < value < math.inf):
                    raise ValueError(f"{op}: {name} must be finite and > 0, got {value!r}")
            case "student_temperature":
                if isinstance(value, str):
                    check_own_temperature(op, value)
                elif not isinstance(value, Tensor):
                    check_temperature(op, name, value)
            case "reduction":
                _check_choice(op, name, value, ("mean", "batchmean", "sum"))
            case "eps":
                check_eps(op, value)
            case _:
                raise KeyError(name)


def _check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")


def _check_range(
    op: str, name: str, value: float, low: float, high: float, *, closed: bool = False
) -> None:
    inside = is_number(value) and low <= value and (value < high or (closed and value == high))
    if not inside:
        end = "]" if closed else ")"
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}{end}, got {value!r}")


class _Balance(nn.Module):
    """Keeps its state in float64 buffers, which ``module.half()`` and ``.to(dtype)`` leave alone.

    A temperature moves by 1e-3 a step from values up to 10; float32 would bias every step.
    """

    step: Tensor
    status: Tensor
    # Attributes that are checked whenever they are set: names of check_settings.
    _settings: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(lambda t: _keep_dtype(t, fn(t)), recurse)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """A number sets a learning rate. A tensor that replaces a buffer gets the buffer's dtype.

        ``load_state_dict(..., assign=True)`` comes this way too. Settings are checked.
        """
        if name in self._settings:
            check_settings(type(self).__name__, **{name: value})
            if not isinstance(value, str):
                value = float(value) if is_number(value) else (float(value[0]), float(value[1]))
        buffer = self.__dict__.get("_buffers", {}).get(name)
        if buffer is not None and is_number(value):
            op = type(self).__name__
            if name not in ("temperature_lr", "weight_lr"):
                raise TypeError(f"{op}: {name} must be set to a tensor, got {value!r}")
            check_settings(op, **{name: value})
            buffer.fill_(float(value))
            return
        if buffer is not None and isinstance(value, Tensor):
            if value.shape != buffer.shape:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be {list(buffer.shape)}, "
                    f"got {list(value.shape)}"
                )
            value = value.detach().to(buffer.dtype)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A process group cannot be copied. The copy shares it."""
        group = self.__dict__.get("process_group")
        if group is not None:
            memo[id(group)] = group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def _check_buffers(self) -> None:
        """Refuses a torch.func transform over a step whose state it does not own."""
        if not ops.in_transform():
            return
        level = torch._C._functorch.maybe_current_level()  # None in a dual level alone
        if level is not None and torch._C._functorch.maybe_get_level(self.step) != level:
            raise NotImplementedError(
                f"{type(self).__name__}: a training step overwrites the buffers, which a "
                "torch.func transform forbids; call eval(), step outside of the transform, or "
                "pass the buffers through torch.func.functional_call"
            )

    def _register(self, num_teachers: int, per_teacher: dict[str, float], **rates: float) -> None:
        """Registers ``per_teacher`` as buffers [K], ``rates`` as 0-d, then step and status."""
        for name, value in per_teacher.items():
            self.register_buffer(name, torch.full((num_teachers,), value, dtype=torch.float64))
        for name, value in rates.items():
            self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("status", torch.zeros((), dtype=torch.int32))


def _keep_dtype(old: Tensor, new: Tensor) -> Tensor:
    if new.dtype == old.dtype or new.device.type == "mps":  # which has no float64
        return new
    return old.to(new.device)


class EntropyBalance(_Balance):
    """Entropy-Based Balance: temperatures at which K teachers are equally uncertain.

    ``forward(teacher_logits)`` takes K tensors [..., C] and returns the temperatures [K]
    (float64) to use with them. In mode "bisect" they are those at which every teacher's mean
    softmax entropy equals the largest of their entropies at the lower bound: the fixed point of
    the published rule, reached at once; ``momentum`` moves there gradually in log space. In mode
    "sign" the returned ones are the current ones, and afterwards each moves by
    ``temperature_lr`` towards the others' mean entropy, as published. In ``eval()`` nothing moves.

    Args:
        num_teachers: K, 1 to 16.
        mode: "bisect" or "sign".
        bounds: (lowest, highest) temperature; all start at the lowest.
        temperature_lr: step of mode "sign"; a buffer, so a schedule may change it (by a number,
            ``module.temperature_lr = 1e-4``, too).
        momentum: 0 to below 1, mode "bisect" only.
        eps: inside log(p + eps) of the entropies of mode "sign"; 1e-5 in the published code.
        process_group: averages entropies over its ranks, so that all hold the same state. In
            mode "bisect" the ranks' logits are gathered and must have one shape; a check of
            that waits for the device in every step.

    Buffers: ``temperatures`` [K], ``entropies`` [K] in nats at the returned temperatures,
    ``temperature_lr``, ``step``, ``status`` (a :class:`bmtard.BalanceStatus`).

    Source: B-MTARD, section on entropy-based balance; the published code steps after use. It
    divides the two entropies where the difference is taken here. Both rules move alike but for a
    teacher of logit margin 17 and more on the whole batch: there sum p log(p + 1e-5) is positive,
    so the published ratio raises both temperatures, or lowers the sharper teacher's.
    """

    _settings = ("mode", "bounds", "momentum", "eps")
    temperatures: Tensor
    entropies: Tensor
    temperature_lr: Tensor

    def __init__(
        self,
        num_teachers: int = 2,
        *,
        mode: str = MODE,
        bounds: tuple[float, float] = TEMPERATURE_BOUNDS,
        temperature_lr: float = TEMPERATURE_LR,
        momentum: float = TEMPERATURE_MOMENTUM,
        eps: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_settings("EntropyBalance", num_teachers=num_teachers, temperature_lr=temperature_lr)
        self.mode, self.bounds, self.momentum, self.eps = mode, bounds, momentum, eps
        self.process_group = process_group
        self._register(
            num_teachers,
            {"temperatures": self.bounds[0], "entropies": 0.0},
            temperature_lr=temperature_lr,
        )

    def forward(self, teacher_logits: Sequence[Tensor]) -> Tensor:
        """K teacher logits [..., C] -> temperatures [K], float64; in ``train()`` one step."""
        teachers = _check_teachers("EntropyBalance", teacher_logits, self.temperatures)
        if not self.training:
            return self.temperatures.clone()
        _warn_of_ranks("EntropyBalance", self.process_group)
        self._check_buffers()
        return self._step(teachers)

    @torch.no_grad()
    def _step(self, teachers: list[Tensor]) -> Tensor:
        low, high = self.bounds
        used, out_of_bounds = self.temperatures.clone(), _false(self.temperatures)
        if self.mode == "bisect":
            gathered = _all_gather("EntropyBalance", teachers, self.process_group)
            used, out_of_bounds = solve_temperatures(gathered, used, self.bounds, self.momentum)
        entropies = mean_entropies(teachers, used, self.eps if self.mode == "sign" else 0.0)
        entropies = _all_reduce_mean(entropies, self.process_group)
        finite = entropies.isfinite().all()
        used = torch.where(finite, used, self.temperatures)
        following = used
        if self.mode == "sign":
            following = reference.sign_step(entropies, used, self.temperature_lr, low, high)
        _commit(
            finite, out_of_bounds, self.step, self.status,
            [(self.temperatures, following), (self.entropies, entropies)],
        )  # fmt: skip
        return used

    def extra_repr(self) -> str:
        return f"{len(self.temperatures)}, mode={self.mode!r}, bounds={self.bounds}"


class NormalizationLossBalance(_Balance):
    """Normalization Loss Balance: weights that keep K losses falling at one relative speed.

    ``forward(losses)`` takes the losses [K] of this step and returns the weights [K] (float64,
    sum 1, without gradient) to use with them. The first call fixes the initial losses. With
    r_k = (L_k / L_k of the first step) ** loss_exponent, each weight goes the part ``weight_lr`` of
    its way to r_k / sum r; all are clamped at 0 and scaled to sum 1. In ``eval()`` nothing moves.

    Args:
        num_teachers: K, 1 to 16.
        weight_lr: 0 to 1; a buffer, so a schedule may change it.
        loss_exponent: > 0; larger favours the slower teacher more strongly.
        process_group: averages the losses over its ranks, so that all hold the same state.

    Buffers: ``weights`` [K], ``initial_losses`` [K], ``losses`` [K], ``weight_lr``, ``step``,
    ``status`` (a :class:`bmtard.BalanceStatus`; losses that are not finite change nothing else).

    Source: B-MTARD, section on normalization loss balance, which follows GradNorm's idea.
    """

    _settings = ("loss_exponent",)
    weights: Tensor
    initial_losses: Tensor
    losses: Tensor
    weight_lr: Tensor

    def __init__(
        self,
        num_teachers: int = 2,
        *,
        weight_lr: float = WEIGHT_LR,
        loss_exponent: float = LOSS_EXPONENT,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_settings("NormalizationLossBalance", num_teachers=num_teachers, weight_lr=weight_lr)
        self.loss_exponent = loss_exponent
        self.process_group = process_group
        self._register(
            num_teachers,
            {"weights": 1 / num_teachers, "initial_losses": 0.0, "losses": 0.0},
            weight_lr=weight_lr,
        )

    @torch.no_grad()
    def forward(self, losses: Tensor) -> Tensor:
        """Losses [K] -> weights [K], float64; in ``train()`` one step."""
        op = "NormalizationLossBalance"
        check_floating(op, "losses", losses)
        if losses.shape != self.weights.shape:
            raise ValueError(
                f"{op}: losses must be [{len(self.weights)}], got {list(losses.shape)}"
            )
        if losses.device != self.weights.device:
            raise ValueError(
                f"{op}: losses must be on the module's device, {self.weights.device}, "
                f"got {losses.device}"
            )
        if not self.training:
            return self.weights.clone()
        _warn_of_ranks("NormalizationLossBalance", self.process_group)
        self._check_buffers()
        losses = _all_reduce_mean(losses.detach().to(self.weights.dtype), self.process_group)
        initial = torch.where(self.step == 0, losses, self.initial_losses)
        weights = reference.balanced_weights(
            losses, initial, self.weights, self.weight_lr, self.loss_exponent
        )
        finite = losses.isfinite().all()
        _commit(
            finite, _false(losses), self.step, self.status,
            [(self.weights, weights), (self.initial_losses, initial), (self.losses, losses)],
        )  # fmt: skip
        return self.weights.clone()

    def extra_repr(self) -> str:
        return f"{len(self.weights)}, loss_exponent={self.loss_exponent}"


class BMTARDLoss(_Balance):
    """The balanced multi-teacher distillation loss of B-MTARD, state and all in one call.

    ``forward(student_logits, teacher_logits)`` takes two sequences of K tensors [..., C]; entry k
    of both comes from teacher k's own inputs. For B-MTARD: ``[student(x_adv), student(x)]`` and
    ``[robust_teacher(x_adv), clean_teacher(x)]``. One step computes each teacher's mean entropy
    and KL, moves the temperatures (see :class:`EntropyBalance`) and the weights (see
    :class:`NormalizationLossBalance`), and returns sum_k weight_k L_k, with the weights as
    constants. On CUDA one kernel launch does it all, gradient included; nothing is read back to
    the host. A step whose losses or entropies are not finite changes ``status`` alone.
    In ``eval()`` nothing is updated. Several calls for one optimizer step: :meth:`one_step`.

    Args:
        num_teachers: K, 1 to 16.
        balance: "bisect", which finds the temperatures of equal entropy in every step, or
            "sign", the published rule of fixed steps (use ``eps=1e-5`` with it for the published
            arithmetic; it differs for teachers of logit margin 17 and more, see
            :class:`EntropyBalance`).
        temperature_bounds: (lowest, highest) temperature; all start at the lowest.
        temperature_lr: step of the sign rule; a buffer, so a schedule may change it.
        temperature_momentum: of "bisect", 0 to below 1, in log space.
        weight_lr: 0 to 1; a buffer.
        loss_exponent: > 0, of the relative losses.
        student_temperature: 1e-36 to 1e36; "teacher", the temperature of the teacher at hand; or a
            tensor, 0-d or [K], which becomes a buffer, or stays a parameter and learns. The last
            two take a step apart into several launches.
        reduction: of each KL: "mean" over N * C as published, "batchmean" or "sum".
        eps: inside log(p + eps).
        process_group: averages losses and entropies over its ranks, so that all hold the same
            state; with "bisect" the teachers' logits are gathered and must have one shape, and a
            check of that waits for the device in every step.

    Buffers, all on the device: ``temperatures``, ``weights``, ``initial_losses``, ``entropies``
    (nats) and ``losses``, each [K] float64, ``step``, ``status`` (a
    :class:`bmtard.BalanceStatus`), ``temperature_lr``, ``weight_lr``. ``state_dict()`` resumes
    exactly. Reading one on the host waits for the device.

    Raises:
        ValueError, TypeError: a bad setting here, bad logits in ``forward``.

    Source: Zhao, Wang, Wei, TPAMI 2024, doi 10.1109/TPAMI.2024.3416308; two-teacher released code,
    generalised to K (each teacher is compared with the mean entropy of the others).
    """

    _settings = (
        "balance", "temperature_bounds", "temperature_momentum", "loss_exponent", "reduction",
        "eps",
    )  # fmt: skip
    temperatures: Tensor
    weights: Tensor
    initial_losses: Tensor
    entropies: Tensor
    losses: Tensor
    temperature_lr: Tensor
    weight_lr: Tensor
    # Of the step that one_step() holds: None outside of it, () before its first call, then the
    # temperatures and weights of that call.
    _held: tuple[Tensor, ...] | None = None

    def __init__(
        self,
        num_teachers: int = 2,
        *,
        balance: str = MODE,
        temperature_bounds: tuple[float, float] = TEMPERATURE_BOUNDS,
        temperature_lr: float = TEMPERATURE_LR,
        temperature_momentum: float = TEMPERATURE_MOMENTUM,
        weight_lr: float = WEIGHT_LR,
        loss_exponent: float = LOSS_EXPONENT,
        student_temperature: float | Tensor | Literal["teacher"] = 1.0,
        reduction: str = "mean",
        eps: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_settings(
            "BMTARDLoss", num_teachers=num_teachers, temperature_lr=temperature_lr,
            weight_lr=weight_lr, student_temperature=student_temperature,
        )  # fmt: skip
        self.balance, self.reduction, self.eps = balance, reduction, eps
        self.temperature_bounds = temperature_bounds
        self.temperature_momentum = temperature_momentum
        self.loss_exponent = loss_exponent
        self.process_group = process_group
        self._register(
            num_teachers,
            {
                "temperatures": self.temperature_bounds[0],
                "weights": 1 / num_teachers,
                "initial_losses": 0.0,
                "entropies": 0.0,
                "losses": 0.0,
            },
            temperature_lr=temperature_lr,
            weight_lr=weight_lr,
        )
        self.student_temperature: float | Tensor | str
        if isinstance(student_temperature, Tensor):
            check_floating("BMTARDLoss", "student_temperature", student_temperature)
            if student_temperature.shape not in ((), (num_teachers,)):
                raise ValueError(
                    f"BMTARDLoss: student_temperature must be a float, 0-d or [{num_teachers}], "
                    f"got {list(student_temperature.shape)}"
                )
            if isinstance(student_temperature, nn.Parameter):
                self.student_temperature = student_temperature
            else:
                self.register_buffer("student_temperature", student_temperature)
        elif isinstance(student_temperature, str):
            self.student_temperature = student_temperature
        else:
            self.student_temperature = float(student_temperature)

    def state(self) -> BalanceState:
        """The buffers that a step reads and writes, not copies of them."""
        # Past nn.Module's attribute look-up, which takes half a microsecond for each.
        buffers: Any = self._buffers
        return BalanceState(*[buffers[name] for name in BalanceState._fields])

    @contextlib.contextmanager
    def one_step(self) -> Iterator[None]:
        """Makes all calls inside one step of the balance: for several calls per optimizer step.

        The first call moves the balance; the others use the temperatures and weights of the first
        and move nothing. So is a closure of LBFGS served, and a loss under activation checkpointing
        (with ``backward()`` inside as well).

        For gradient accumulation, the first call decides what the balance sees. Exactly one step on
        the whole batch, in value, gradients and state: first call the loss without gradient on the
        logits of all micro-batches, concatenated (both rules need all rows before the first
        backward: the losses set the weights of this very step, and with "bisect" the entropies set
        its temperatures); then on each micro-batch, times its share of the rows (with reduction
        "sum": times 1)::

            with criterion.one_step():
                with torch.no_grad():
                    criterion(all_student_logits, all_teacher_logits)
                for student_logits, teacher_logits, share in micro_batches:
                    (share * criterion(student_logits, teacher_logits)).backward()
            optimizer.step()

        Without that first call, the balance sees the first micro-batch alone, as a sample of the
        batch. A trainer that owns the loop can enter and leave in its hooks. In ``eval()`` nothing
        differs. Not to be nested: RuntimeError.
        """
        if self._held is not None:
            raise RuntimeError("BMTARDLoss: one_step() is open already; leave it first")
        self._held = ()
        try:
            yield
        finally:
            self._held = None

    def forward(self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor]) -> Tensor:
        """K student and K teacher logits [..., C] -> the loss, 0-d; in ``train()`` one step."""
        state = self.state()
        if self._held is None or not self.training:
            return self._loss(student_logits, teacher_logits, state, self.training)
        if self._held:
            temperatures, weights = self._held
            held = state._replace(temperatures=temperatures, weights=weights)
            return self._loss(student_logits, teacher_logits, held, False)
        before = state.temperatures.clone()
        loss = self._loss(student_logits, teacher_logits, state, True)
        used = before if self.balance == "sign" else state.temperatures.clone()
        self._held = used, state.weights.clone()
        return loss

    def _loss(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        state: BalanceState,
        update: bool,
    ) -> Tensor:
        if update:
            _warn_of_ranks("BMTARDLoss", self.process_group)
        averages = self.process_group is not None and update
        student_temperature = self.student_temperature
        if (
            averages
            or not isinstance(student_temperature, float)
            or not ops.use_native(state.weights)
        ):
            return self._stepwise(student_logits, teacher_logits, state, update)
        return ops.bmtard_loss(
            student_logits,
            teacher_logits,
            state,
            update=update,
            mode=self.balance,
            bounds=self.temperature_bounds,
            temperature_momentum=self.temperature_momentum,
            loss_exponent=self.loss_exponent,
            student_temperature=student_temperature,
            eps=self.eps,
            reduction=self.reduction,
        )

    def _stepwise(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        state: BalanceState,
        update: bool,
    ) -> Tensor:
        """The same step out of its parts: between them the ranks can average."""
        students, teachers = ops.balanced_pairs(student_logits, teacher_logits, state.weights)
        if update:
            self._check_buffers()
        low, high = self.temperature_bounds
        used, out_of_bounds = state.temperatures.clone(), _false(state.temperatures)
        if update and self.balance == "bisect":
            gathered = _all_gather("BMTARDLoss", teachers, self.process_group)
            used, out_of_bounds = solve_temperatures(
                gathered, used, self.temperature_bounds, self.temperature_momentum
            )
        losses = ops.multi_teacher_kl(
            students,
            teachers,
            used,
            student_temperature=self.student_temperature,  # type: ignore[arg-type]
            reduction=self.reduction,
            eps=self.eps,
        )
        if update:
            with torch.no_grad():
                entropies = mean_entropies(
                    teachers, used, self.eps if self.balance == "sign" else 0.0
                )
                current = losses.detach().to(state.weights.dtype)
                entropies, current = _all_reduce_mean(
                    torch.stack([entropies, current]), self.process_group
                )
                initial = torch.where(state.step == 0, current, state.initial_losses)
                weights = reference.balanced_weights(
                    current, initial, state.weights, state.weight_lr, self.loss_exponent
                )
                if self.balance == "sign":
                    used = reference.sign_step(entropies, used, state.temperature_lr, low, high)
                finite = current.isfinite().all() & entropies.isfinite().all()
                new = (used, weights, initial, entropies, current)
                _commit(
                    finite,
                    out_of_bounds,
                    state.step,
                    state.status,
                    zip(state[: len(new)], new, strict=True),
                )
        # A copy: the next step overwrites the buffer, maybe before this one's backward.
        return (state.weights.to(losses.dtype, copy=True) * losses).sum()

    def extra_repr(self) -> str:
        return (
            f"{len(self.weights)}, balance={self.balance!r}, "
            f"temperature_bounds={self.temperature_bounds}, reduction={self.reduction!r}, "
            f"eps={self.eps}"
        )


@torch.no_grad()
def solve_temperatures(
    teachers: Sequence[Tensor],
    temperatures: Tensor,
    bounds: tuple[float, float],
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Temperatures [K] of equal mean entropy, and whether one stopped short of it."""
    lowest = [ops.softmax_entropy(t, bounds[0], reduction="mean") for t in teachers]
    target = torch.stack(lowest).max()
    found = [
        ops.bisect_temperature(t, target, bounds=bounds, initial=temperatures[k])
        for k, t in enumerate(teachers)
    ]
    solved = torch.stack([f.temperature for f in found]).to(temperatures.dtype)
    if momentum:
        solved = (momentum * temperatures.log() + (1 - momentum) * solved.log()).exp()
    # A bound that was rounded to float32 may lie beyond it.
    solved = solved.clamp(*bounds)
    statuses = torch.stack([f.status for f in found])
    return solved, (statuses == SearchStatus.CLAMPED_HIGH.value).any()


def mean_entropies(teachers: Sequence[Tensor], temperatures: Tensor, eps: float) -> Tensor:
    """[K], in nats, in the dtype of ``temperatures``."""
    if eps:
        each = [
            reference.softmax_entropy(t, temperatures[k], eps=eps).mean()
            for k, t in enumerate(teachers)
        ]
    else:
        each = [
            ops.softmax_entropy(t, temperatures[k], reduction="mean")
            for k, t in enumerate(teachers)
        ]
    return torch.stack(each).to(temperatures.dtype)


def _commit(
    finite: Tensor,
    out_of_bounds: Tensor,
    step: Tensor,
    status: Tensor,
    updates: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Writes the new values where everything was finite, and says so."""
    for buffer, value in updates:
        buffer.copy_(torch.where(finite, value, buffer))
    step.add_(finite)
    updated = torch.where(
        out_of_bounds, int(BalanceStatus.TARGET_OUT_OF_BOUNDS), int(BalanceStatus.UPDATED)
    )
    status.copy_(torch.where(finite, updated, int(BalanceStatus.SKIPPED_NON_FINITE)))


_warned_of_ranks = False


def _warn_of_ranks(op: str, group: dist.ProcessGroup | None) -> None:
    """Warns once in a process where several ranks train and each moves a balance of its own."""
    global _warned_of_ranks
    if _warned_of_ranks or group is not None or torch.compiler.is_compiling():
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _warned_of_ranks = True
        _library.warn(
            f"{op}: torch.distributed has {dist.get_world_size()} ranks, but without process_group "
            "each moves a balance of its own, and on different data they drift apart; pass "
            "process_group=torch.distributed.group.WORLD",
            RuntimeWarning,
        )


def _all_reduce_mean(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return values
    values = values.clone(memory_format=torch.contiguous_format)  # it is overwritten
    dist.all_reduce(values, group=group)
    return values / dist.get_world_size(group)


def _all_gather(
    op: str, teachers: Sequence[Tensor], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Each teacher's logits of all ranks as [ranks * N, C]."""
    rows = [t.reshape(-1, t.shape[-1]).contiguous() for t in teachers]
    if group is None:
        return rows
    _check_equal_sizes(op, rows, group)
    return [_gathered(mine, group) for mine in rows]


def _gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, ...] of each rank -> [ranks * N, ...]."""
    everyone = mine.new_empty(dist.get_world_size(group) * mine.shape[0], *mine.shape[1:])
    # Newer torch has another name for all_gather_into_tensor, and warns of this one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine, group=group)
    return everyone


def _check_equal_sizes(op: str, rows: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Refuses batches that differ between the ranks: gathered, they would end or hang all ranks.

    Reads sizes back to the host, so not while a graph is captured or traced.
    """
    device = rows[0].device
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or captured:
        return
    mine = torch.tensor([mine.shape for mine in rows], device=device)
    sizes = _gathered(mine, group).view(-1, len(rows), 2).tolist()
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            f"{op}: mode 'bisect' needs teacher_logits of one shape on every rank, got "
            f"{sizes}; drop the last batch, pad it, or use mode 'sign'"
        )


def _false(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=like.device)


def _check_teachers(op: str, logits: Sequence[Tensor], temperatures: Tensor) -> list[Tensor]:
    if not isinstance(logits, (list, tuple)) or len(logits) != len(temperatures):
        came = len(logits) if isinstance(logits, (list, tuple)) else type(logits).__name__
        raise ValueError(
            f"{op}: teacher_logits must be a sequence of {len(temperatures)} tensors, one for "
            f"each teacher, got {came}"
        )
    for k, entry in enumerate(logits):
        check_logits(op, f"teacher_logits[{k}]", entry)
        if entry.device != temperatures.device:
            raise ValueError(
                f"{op}: teacher_logits[{k}] must be on the module's device, "
                f"{temperatures.device}, got {entry.device}"
            )
        ops.check_constant(op, k, entry)
    return list(logits)
