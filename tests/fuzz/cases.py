"""Random calls: a case is the name of an op and the arguments of ``check``."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np

from .arrays import DTYPES, LAYOUTS, VALUES, Array

Arguments = dict[str, Any]
# A step of the loss costs the oracle as much as three other calls.
OPS = {
    "softmax_entropy": 3, "bisect_temperature": 3, "multi_teacher_kl": 4, "BMTARDLoss": 1.5,
    "pgd_step_": 2,
}  # fmt: skip

# Around the widths of vectors, the change from columns to rows at 128, and blocks of 2048.
CLASSES = (1, 2, 3, 5, 7, 8, 9, 10, 13, 16, 17, 31, 33, 67, 100, 127, 128, 129, 131, 200)
MANY_CLASSES = (1000, 1021, 2047, 2048, 2049, 4099, 8191, 32000, 70000)
STEPS = (8 / 255, 2 / 255, 0.0, 0, 1, 0.5, 1e-3, 1e-30, 1e30, np.float32(0.1))
LEADING = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 23, 33)
HUGE = 10**400  # an integer that no float holds


def random_case(seed: int, index: int) -> tuple[str, Arguments]:
    """Case ``index`` of the sequence ``seed``."""
    draw = _Draw(random.Random(f"{seed}:{index}"))
    op = draw.rng.choices(list(OPS), list(OPS.values()))[0]
    arguments: Arguments = getattr(draw, op)()
    if draw.chance(0.1):
        draw.spoil(op, arguments)
    # Plain torch is slow on long rows, and slower still where two threads share one busy core.
    if draw.chance(0.03) and draw.most < 5000:
        arguments["path"] = "reference"
        if arguments.get("max_iterations") in (200, 1000):
            arguments["max_iterations"] = 64
    elif draw.chance(0.3):
        arguments["threads"] = 2
    return op, arguments


def one_line(op: str, arguments: Arguments) -> str:
    """The call of ``check`` that repeats a case."""
    return f"check({op!r}, {', '.join(f'{k}={_text(v)}' for k, v in arguments.items())})"


def _text(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, int) and value == HUGE:
        return "10**400"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)


class _Draw:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.most = 0  # numbers in a tensor so far

    def one(self, choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def seed(self) -> int:
        return self.rng.randrange(10**6)

    # --- Tensors ------------------------------------------------------------------------------

    def shape(self) -> tuple[int, ...]:
        """[..., C] of at most about 2000 numbers, and now and then of 100,000."""
        if self.chance(0.004):
            classes, most = self.one(MANY_CLASSES), 100_000
        else:
            classes, most = self.one(CLASSES), 30_000 if self.chance(0.004) else 1000
        dims = self.rng.choices((0, 1, 2, 3), (1, 12, 3, 1))[0]
        leading: list[int] = []
        for _ in range(dims):
            size = self.one(LEADING if most == 1000 else (*LEADING, 150, 300))
            leading.append(size if math.prod(leading) * size * classes <= most else 1)
        shape = (*leading, classes)
        self.most = max(self.most, math.prod(shape))
        return shape

    def logits(self, shape: tuple[int, ...], dtype: str | None = None, grad: float = 0.6) -> Array:
        plain = self.chance(0.35)
        array = Array(
            shape,
            dtype or self.one(DTYPES),
            "normal" if plain else self.one(VALUES),
            "contiguous" if self.chance(0.5) else self.one(LAYOUTS),
            self.seed(),
            grad=self.chance(grad),
        )
        return array if array.grad or not self.chance(0.03) else replace(array, inference=True)

    def companion(self, shape: tuple[int, ...], values: tuple[str, ...] = ("positive",)) -> Array:
        layout = self.one(LAYOUTS) if self.chance(0.3) else "contiguous"
        return Array(
            shape, self.one(DTYPES), self.one(values), layout, self.seed(), grad=self.chance(0.4)
        )

    def temperature(self) -> float:
        kind = self.rng.random()
        if kind < 0.3:
            return 1.0
        if kind < 0.85:
            return round(math.exp(self.rng.uniform(-3, 4)), 4)
        if kind < 0.93:
            return self.one((1, 4, 1e-2, 1e2, 1e-4, 1e4))
        if kind < 0.98:
            return self.one((1e-20, 1e20, 1e-30, 1e30, 1e-36, 1e36))
        return np.float32(0.7)

    def context(self) -> str:
        return self.rng.choices(("grad", "no_grad", "inference"), (8, 1, 1))[0]

    def upstream(self) -> str:
        kind = self.rng.choices(("normal", "ones", "fractions", "huge", "small"), (6, 3, 1, 1, 1))[
            0
        ]
        return kind + (":" + self.one(LAYOUTS) if self.chance(0.2) else "")

    def eps(self) -> float:
        return 0.0 if self.chance(0.6) else self.one((1e-5, 1e-5, 1e-12, 1e-2, 1.0, 1e-30))

    # --- Ops ----------------------------------------------------------------------------------

    def softmax_entropy(self) -> Arguments:
        shape = self.shape()
        kind = self.rng.random()
        temperature: Any = self.temperature()
        if kind < 0.2:
            temperature = self.companion(())
        elif kind < 0.4:
            temperature = self.companion(shape[:-1])
        return {
            "logits": self.logits(shape),
            "temperature": temperature,
            "reduction": self.one(("none", "mean", "sum")),
            "context": self.context(),
            "upstream": self.upstream(),
        }

    def bisect_temperature(self) -> Arguments:
        shape = self.shape()
        per_sample = self.chance(0.5)
        rows = shape[:-1] if per_sample else ()
        most = math.log(shape[-1]) if shape[-1] > 1 else 0.5
        target: Any = round(self.rng.uniform(0.0, 1.05) * most, 6)
        if self.chance(0.1):
            target = self.one((0.0, most, -1.0, 1e3, math.inf, math.nan, 1e-9))
        if self.chance(0.4):
            target = self.companion(self.one(((), rows)), ("positive", "fractions"))
        arguments = {
            "logits": self.logits(shape),
            "target_entropy": target,
            "per_sample": per_sample,
            "method": self.one(("halley", "halley", "bisection")),
            "context": self.context(),
            "upstream": self.upstream(),
        }
        if self.chance(0.5):
            arguments["bounds"] = self.one(
                ((1.0, 10.0), (0.1, 1.0), (1e-4, 1e4), (0.999, 1.001), (1e-20, 1e20),
                 (1e-30, 1e30), (5.0, 5.0000001), (1, 10))
            )  # fmt: skip
        if self.chance(0.4):
            arguments["initial"] = self.temperature()
            if self.chance(0.5):
                arguments["initial"] = self.companion(self.one(((), rows)))
        if self.chance(0.3):
            arguments["tolerance"] = self.one((0, 1e-3, 1e-10, 0.1))
        if self.chance(0.4):
            arguments["max_iterations"] = self.one((1, 2, 3, 5, 64, 200, 1000))
        return arguments

    def multi_teacher_kl(self) -> Arguments:
        shape = self.shape()
        count = self.rng.choices((1, 2, 3, 5, 16), (4, 8, 3, 1, 0.3))[0]
        if math.prod(shape) > 20_000:
            count = min(count, 2)
        dtype = self.one(DTYPES)
        mixed = self.chance(0.15)

        def side(shared: bool) -> Any:
            make = lambda: self.logits(shape, None if mixed else dtype, 0.5)  # noqa: E731
            if shared and self.chance(0.7):
                return make()
            return [make() for _ in range(1 if shared else count)]

        shared = self.rng.random()
        student, teacher = side(count == 1 or shared < 0.3), side(count == 1 or shared > 0.85)
        alone = all(isinstance(s, Array) or len(s) == 1 for s in (student, teacher))
        count = 1 if alone else count
        arguments: Arguments = {
            "student_logits": student,
            "teacher_logits": teacher,
            "temperature": self.temperature(),
            "student_temperature": self.temperature(),
            "reduction": self.one(("none", "sum", "mean", "batchmean", "weighted_mean")),
            "eps": self.eps(),
            "context": self.context(),
            "upstream": self.upstream(),
        }
        if self.chance(0.4):
            arguments["temperature"] = self.companion(self.one(((), (count,))))
        if self.chance(0.2):
            arguments["scale_by_temperature"] = True
        if self.chance(0.5):
            arguments["weight"] = self.companion((count,), ("positive", "fractions", "normal"))
            if self.chance(0.3):
                arguments["weight"] = [round(self.rng.random(), 3) for _ in range(count)]
        if self.chance(0.35):
            rows = self.one((shape[:-1], (count, *shape[:-1])))
            values = ("positive", "fractions", "normal", "mask")
            arguments["sample_weight"] = self.companion(rows, values)
            if self.chance(0.2):
                arguments["sample_weight"] = Array(rows, "bool", layout=self.one(LAYOUTS))
        return arguments

    def pgd_step_(self) -> Arguments:
        shape = self.shape()
        if self.chance(0.2):
            shape = (self.one((1, 2, 3)), 3, self.one((4, 5, 8)), self.one((4, 7, 8)))
        dtype = self.one(DTYPES)
        kinds = ("pixels", "pixels", "normal", "wide", "extreme", "subnormal", "nan", "inf")
        layout = lambda: self.one(LAYOUTS) if self.chance(0.4) else "contiguous"  # noqa: E731
        strided = lambda: self.one([x for x in LAYOUTS if "expanded" not in x])  # noqa: E731

        def image(values: tuple[str, ...], where: str) -> Array:
            other = self.one(DTYPES) if self.chance(0.1) else dtype
            return Array(shape, other, self.one(values), where, self.seed())

        x_adv = image(kinds, strided() if self.chance(0.4) else "contiguous")
        return {
            "x_adv": replace(x_adv, dtype=dtype, grad=self.chance(0.1)),
            "grad": image((*VALUES, "normal"), layout()),
            "x": image(kinds, layout()),
            "step_size": self.one(STEPS),
            "epsilon": self.one(STEPS),
            "bounds": self.one(((0.0, 1.0), (0, 1), None, (-1.0, 1.0), (0.3, 0.3), (-math.inf, 1))),
            "norm": self.one(("linf", "l2")),
            "context": self.context(),
        }

    def BMTARDLoss(self) -> Arguments:
        shape = self.shape()
        count = self.rng.choices((1, 2, 3, 5, 16), (1, 8, 3, 1, 0.3))[0]
        if math.prod(shape) > 20_000:
            count = min(count, 2)
        dtype = self.one(DTYPES)
        mixed = self.chance(0.1)
        balance = self.one(("bisect", "sign"))
        grad = self.one((0.0, 0.5, 1.0, 1.0))
        sides = [
            [self.logits(shape, None if mixed else dtype, g) for _ in range(count)]
            for g in (grad, 0.0)
        ]
        arguments: Arguments = {
            "student_logits": sides[0],
            "teacher_logits": sides[1],
            "num_teachers": count,
            "balance": balance,
            "steps": self.one((1, 1, 2, 3)),
            "reduction": self.one(("mean", "batchmean", "sum")),
            "eps": self.eps(),
            "context": self.context(),
            "upstream": self.upstream(),
        }
        if self.chance(0.1):
            arguments["training"] = False
        if self.chance(0.3):
            arguments["temperature_bounds"] = self.one(
                ((0.5, 3.0), (1e-2, 1e2), (1, 2), (4.0, 4.1))
            )
        if self.chance(0.3):
            arguments["temperature_lr"] = self.one((0.0, 0.1, 1.0))
        if self.chance(0.3):
            arguments["temperature_momentum"] = self.one((0.5, 0.9))
        if self.chance(0.3):
            arguments["weight_lr"] = self.one((0.0, 0.5, 1, 1.0))
        if self.chance(0.3):
            arguments["loss_exponent"] = self.one((0.5, 2.0, 3))
        if self.chance(0.3):
            arguments["student_temperature"] = self.temperature()
        return arguments

    # --- What is wrong ------------------------------------------------------------------------

    def spoil(self, op: str, arguments: Arguments) -> None:
        """Makes one argument impossible; ``raises`` names it."""
        name, value = self.one(getattr(self, f"_wrong_{op}")(arguments))
        arguments["raises"] = name
        arguments.pop("context", None)
        arguments[name] = value

    def _wrong_number(self) -> Any:
        return self.one((0.0, -1.0, math.nan, math.inf, -math.inf, "1", None, True, 1j, [1.0],
                         HUGE))  # fmt: skip

    def _wrong_tensor(self, array: Array) -> Any:
        return self.one(
            (
                replace(array, dtype="int64", grad=False, layout="contiguous", inference=False),
                replace(array, dtype="bool", grad=False, layout="contiguous", inference=False),
                replace(array, dtype="complex64", grad=False, layout="contiguous", inference=False),
                replace(array, layout="sparse", grad=False, inference=False),
                replace(array, shape=(*array.shape[:-1], 0), layout="contiguous"),
                replace(array, shape=(), values="normal", layout="contiguous"),
                None, 3.0, "logits", {},
            )
        )  # fmt: skip

    def _companions(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, Any]]:
        """Tensors that do not fit beside logits whose wanted companion has this shape."""
        wrong = (*shape, 17)  # more than there are teachers
        return [
            (name, Array(wrong, values="positive")),
            (name, Array(shape, "int64")),
            (name, Array(shape, values="positive", layout="meta")),
            (name, self.one(("1", 1j, {}))),
        ]

    def _wrong_softmax_entropy(self, a: Arguments) -> list[tuple[str, Any]]:
        return [
            ("logits", self._wrong_tensor(a["logits"])),
            ("temperature", self._wrong_number()),
            *self._companions("temperature", a["logits"].shape[:-1]),
            ("reduction", self.one(("batchmean", "avg", None, 3, ["mean"]))),
        ]

    def _wrong_bisect_temperature(self, a: Arguments) -> list[tuple[str, Any]]:
        shape = a["logits"].shape[:-1] if a["per_sample"] else ()
        return [
            ("logits", self._wrong_tensor(a["logits"])),
            ("target_entropy", self.one(("1", True, 1j, [1.0]))),
            *self._companions("target_entropy", shape),
            ("initial", self.one((0.0, -1.0, math.nan, math.inf, "1", True, 1j))),
            *self._companions("initial", shape),
            ("bounds", self._wrong_bounds()),
            ("bounds", self.one(((0.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (1.0, math.inf)))),
            ("tolerance", self.one((-1e-3, math.nan, math.inf, "1", None, True, 1j))),
            ("max_iterations", self.one((0, -5, 2.5, True, "9", None, math.inf, 2**31, 2**70))),
            ("method", self.one(("newton", None, 1, ["halley"]))),
        ]

    def _wrong_bounds(self) -> Any:
        return self.one(((2.0, 1.0), (1.0,), (1.0, 2.0, 3.0), "ab", ("1", "2"), (math.nan, 1.0),
                         3.0, {}, (None, None), (True, 2.0), (1, HUGE)))  # fmt: skip

    def _wrong_multi_teacher_kl(self, a: Arguments) -> list[tuple[str, Any]]:
        sides = [
            x if isinstance(x, list) else [x] for x in (a["student_logits"], a["teacher_logits"])
        ]
        count, array = max(map(len, sides)), sides[0][0]
        bad = self._wrong_tensor(array)
        longer = [array] * (len(sides[1]) + 1)
        a["sample_weight"] = a["weight"] = None
        if isinstance(a["temperature"], Array):
            a["temperature"] = 1.0
        return [
            ("student_logits", [bad, *sides[0][1:]]),
            ("teacher_logits", self.one(([], None, 3.0, "x", {}, [array] * 17))),
            ("student_logits", longer if len(sides[1]) > 1 else []),
            ("teacher_logits", replace(array, shape=(*array.shape, 1))),
            ("teacher_logits", replace(array, layout="meta", grad=False, inference=False)),
            ("temperature", self._wrong_number()),
            *self._companions("temperature", (count,)),
            ("student_temperature", self._wrong_number()),
            ("eps", self.one((-1.0, math.nan, math.inf, "1", None, True, 1j, HUGE))),
            ("reduction", self.one(("avg", None, 3, ["mean"]))),
            *self._companions("weight", (count,)),
            ("weight", self.one(([1.0] * (count + 1), ["a"] * count, [None] * count, 1.0))),
            *self._companions("sample_weight", array.shape[:-1]),
            ("sample_weight", [1.0]),
        ]

    def _wrong_pgd_step_(self, a: Arguments) -> list[tuple[str, Any]]:
        a["x_adv"] = replace(a["x_adv"], grad=False)
        tensor = replace(a["x_adv"], layout="contiguous")
        shared = replace(tensor, layout="expanded" if min(tensor.shape) > 1 else "sparse")
        return [
            ("x_adv", self.one((None, 3.0, replace(tensor, shape=()), replace(tensor, grad=True),
                                replace(tensor, dtype="int64"), shared))),
            *((name, self.one((None, [1.0], replace(tensor, shape=(*tensor.shape, 1)),
                               replace(tensor, dtype="int64"), replace(tensor, layout="sparse"),
                               replace(tensor, layout="meta"))))
              for name in ("grad", "x")),
            *((name, self.one((-1.0, math.nan, math.inf, "1", None, True, 1j, HUGE)))
              for name in ("step_size", "epsilon")),
            ("bounds", self._wrong_bounds()),
            ("norm", self.one(("l1", None, 2, ["l2"]))),
        ]  # fmt: skip

    def _wrong_BMTARDLoss(self, a: Arguments) -> list[tuple[str, Any]]:
        students, teachers = a["student_logits"], a["teacher_logits"]
        array = students[0]
        return [
            ("student_logits", [self._wrong_tensor(array), *students[1:]]),
            ("student_logits", self.one(([], None, 3.0, [*students, array]))),
            ("teacher_logits", self.one(([], None, {}, [*teachers, teachers[0]]))),
            ("teacher_logits", [*teachers[1:], replace(array, shape=(*array.shape, 1))]),
            ("teacher_logits", [*teachers[1:], replace(teachers[0], grad=True, inference=False)]),
            ("num_teachers", self.one((0, 17, 2.0, None, "2", True))),
            ("balance", self.one(("halley", None, 1))),
            ("temperature_bounds", self._wrong_bounds()),
            ("temperature_lr", self.one((-1.0, math.nan, math.inf, "1", None, 1j))),
            ("temperature_momentum", self.one((-0.1, 1.0, math.nan, "1", None))),
            ("weight_lr", self.one((-0.1, 1.1, math.nan, "1", None))),
            ("loss_exponent", self.one((0.0, -1.0, math.nan, math.inf, "1", None))),
            ("student_temperature", self._wrong_number()),
            ("reduction", self.one(("none", "avg", None))),
            ("eps", self.one((-1.0, math.nan, math.inf, "1", None))),
        ]
