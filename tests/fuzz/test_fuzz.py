"""That the fuzzer finds what is wrong, and a small, fixed share of its calls."""

import argparse
import math
import sys

import numpy as np
import oracles
import pytest

import bmtard

from .__main__ import CAPABILITIES, drive, runs
from .arrays import Array
from .cases import one_line, random_case
from .check import check, judged


@pytest.fixture(autouse=True)
def _native() -> None:
    oracles.require_native()


def cases(op: str, count: int, seed: int = 0):
    """The first ``count`` cases of an op."""
    found = 0
    for index in range(10**6):
        case = random_case(seed, index)
        if case[0] == op and not case[1].get("raises"):
            yield case[1]
            found += 1
            if found == count:
                return


def test_a_line_is_the_case():
    for index in range(200):
        op, arguments = random_case(3, index)
        line = one_line(op, arguments)
        copy = eval(line, {"check": lambda op, **kwargs: (op, kwargs), "Array": Array, "np": np})
        assert one_line(*copy) == line


# A fault in one result of each op, far smaller than a user would notice.
def _entropy_off(result, **_):
    return result * (1 + 3e-5)


def _temperature_off(result, **_):
    return result._replace(temperature=result.temperature * 1.001)


def _divergence_without_gradient(result, **_):
    return result.detach() + 0.999 * (result - result.detach())


def _step_too_far(result, **_):
    return result.mul_(1.01)


FAULTS = {
    "softmax_entropy": _entropy_off,
    "bisect_temperature": _temperature_off,
    "multi_teacher_kl": _divergence_without_gradient,
    "pgd_step_": _step_too_far,
}


def passes(op: str, arguments) -> bool:
    try:
        check(op, **arguments)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("op", FAULTS)
def test_a_wrong_result_is_found(op, monkeypatch):
    right, fault = getattr(bmtard, op), FAULTS[op]
    clean = [arguments for arguments in cases(op, 30) if passes(op, arguments)]
    assert len(clean) > 15
    monkeypatch.setattr(bmtard, op, lambda **kwargs: fault(right(**kwargs), **kwargs))
    assert sum(not passes(op, arguments) for arguments in clean) >= 5


@pytest.mark.parametrize("buffer", ["temperatures", "weights", "losses", "entropies"])
def test_a_wrong_state_is_found(buffer, monkeypatch):
    forward = bmtard.BMTARDLoss.forward
    clean = [arguments for arguments in cases("BMTARDLoss", 30) if passes("BMTARDLoss", arguments)]
    assert len(clean) > 15

    def wrong(self, *logits):
        result = forward(self, *logits)
        getattr(self, buffer).mul_(0.9999)
        return result

    monkeypatch.setattr(bmtard.BMTARDLoss, "forward", wrong)
    assert sum(not passes("BMTARDLoss", arguments) for arguments in clean) >= 5


@pytest.mark.parametrize("error", [RuntimeError("softmax_entropy: logits"), ValueError("logits")])
def test_an_unclear_error_is_found(error, monkeypatch):
    def refuse(**_):
        raise error

    monkeypatch.setattr(bmtard, "softmax_entropy", refuse)
    with pytest.raises((AssertionError, RuntimeError)):
        check("softmax_entropy", logits=Array((3, 4)), temperature=-1.0, raises="logits")


# What the fuzzer has found, as it printed it but for what did not matter.
FINDINGS = {
    "a float32 gradient that is 0 in float16 moves a float16 image": lambda path: check(
        "pgd_step_", path=path, x_adv=Array((3, 5), "float16", "pixels"),
        grad=Array((3, 5), values="subnormal"), x=Array((3, 5), "float16", "pixels", seed=1),
        step_size=8 / 255, epsilon=8 / 255,
    ),
    "a clean image keeps its digits beside a bfloat16 one": lambda path: check(
        "pgd_step_", path=path, x_adv=Array((1, 17), "bfloat16", "pixels"),
        grad=Array((1, 17), "bfloat16"), x=Array((1, 17), values="pixels", seed=1),
        step_size=0.5, epsilon=8 / 255, norm="l2",
    ),
    "an infinite image stays in no ball": lambda path: check(
        "pgd_step_", path=path, x_adv=Array((3, 5), values="inf"), grad=Array((3, 5)),
        x=Array((3, 5), values="pixels"), step_size=0.1, epsilon=0.1, norm="l2",
    ),
    "an expanded image cannot be overwritten": lambda path: check(
        "pgd_step_", path=path, x_adv=Array((3, 5), layout="expanded"), grad=Array((3, 5)),
        x=Array((3, 5)), step_size=0.1, epsilon=0.1, raises="x_adv",
    ),
    "an integer that no float holds is refused by name": lambda path: check(
        "pgd_step_", path=path, x_adv=Array((3, 5)), grad=Array((3, 5)), x=Array((3, 5)),
        step_size=10**400, epsilon=0.1, raises="step_size",
    ),
    "gradients of float64 logits further apart than float64 reaches": lambda path: check(
        "softmax_entropy", path=path, logits=Array((5, 33), "float64", "extreme", grad=True),
        temperature=Array((), "float64", "positive", grad=True), reduction="sum",
    ),
    "temperatures stay in bounds that float32 does not hold": lambda path: check(
        "BMTARDLoss", path=path, student_logits=[Array((4, 100))] * 2,
        teacher_logits=[Array((4, 100), seed=1), Array((4, 100), "float32", "wide")],
        temperature_bounds=(0.01, 0.1), temperature_momentum=0.9, steps=3,
    ),
    "temperatures begin exactly at a bound that float32 does not hold": lambda path: check(
        "BMTARDLoss", path=path, student_logits=[Array((4, 9), "float64")] * 3,
        teacher_logits=[Array((4, 9), "float64", seed=k) for k in range(3)], num_teachers=3,
        temperature_bounds=(0.01, 0.1), balance="sign", training=False,
    ),
    "a temperature of NumPy's float32 scales float64 logits": lambda path: check(
        "softmax_entropy", path=path, logits=Array((3, 200), "float64", seed=943899),
        temperature=np.float32(0.7), reduction="mean",
    ),
    "one evaluation does not tell equal logits from a high temperature": lambda path: check(
        "bisect_temperature", path=path, logits=Array((100,), values="small", seed=528145),
        target_entropy=4.679047, per_sample=True, bounds=(1e-30, 1e30), max_iterations=1,
    ),
    "bfloat16 gradients of logits further apart than float32 reaches": lambda path: check(
        "BMTARDLoss", path=path,
        student_logits=[
            Array((7, 127), "bfloat16", seed=50881),
            Array((7, 127), "bfloat16", "extreme", seed=364339, grad=True),
        ],
        teacher_logits=[
            Array((7, 127), "bfloat16", seed=421957),
            Array((7, 127), "bfloat16", "inf", seed=871862),
        ],
        balance="sign", reduction="mean", eps=0.0, temperature_bounds=(4.0, 4.1), steps=3,
    ),
    "a step of 1e30 ends in a ball of 1e-30": lambda path: check(
        "pgd_step_", path=path, x_adv=Array((3, 48), "bfloat16", "subnormal"),
        grad=Array((3, 48), "bfloat16", seed=1), x=Array((3, 48), "bfloat16", "subnormal", seed=2),
        step_size=1e30, epsilon=1e-30, bounds=(-1.0, 1.0), norm="l2",
    ),
    "a float16 temperature's gradient has a part that float16 does not hold": lambda path: check(
        "multi_teacher_kl", path=path,
        student_logits=Array((1, 1, 131), values="subnormal", seed=423577),
        teacher_logits=[
            Array((1, 1, 131), seed=185377),
            Array((1, 1, 131), values="integers", seed=763976),
            Array((1, 1, 131), seed=154048),
        ],
        temperature=Array((3,), "float16", "positive", seed=950323, grad=True),
        student_temperature=0.01, reduction="weighted_mean", eps=1.0, upstream="huge",
        scale_by_temperature=True, weight=Array((3,), "float16", "positive", seed=745921),
    ),
    # These were right, and the oracle's bounds were too narrow.
    "an infinite image and a step that no float holds": lambda path: check(
        "pgd_step_", path=path, x_adv=Array((2, 131), values="inf", seed=149599),
        grad=Array((2, 131), values="subnormal", seed=152465),
        x=Array((2, 131), values="pixels", seed=301204), step_size=1e30, epsilon=0.0,
        bounds=(-math.inf, 1), norm="l2",
    ),
    "a divergence beyond float64 whose weight is 0": lambda path: check(
        "multi_teacher_kl", path=path, student_logits=Array((1, 128), "float64", "extreme", seed=9),
        teacher_logits=Array((1, 128), "float64", "one_hot", seed=572912), temperature=2.387,
        student_temperature=0.4965, reduction="mean",
        sample_weight=Array((1,), "float64", "fractions", seed=824178, grad=True),
    ),
    "subnormal teacher logits lose digits": lambda path: check(
        "multi_teacher_kl", path=path,
        student_logits=Array((9, 1, 31), values="huge", layout="flipped", seed=461428),
        teacher_logits=Array((9, 1, 31), values="subnormal", layout="offset", seed=310444),
        temperature=Array((1,), values="positive", seed=922564, grad=True), reduction="none",
        eps=0.01, weight=[0.962],
    ),
    "float16 gradients of 1e20 beside gradients of 100": lambda path: check(
        "BMTARDLoss", path=path,
        student_logits=[Array((5, 131), "float16", "margin", seed=318937, grad=True)] * 2,
        teacher_logits=[Array((5, 131), "float16", "wide", seed=281911)] * 2,
        balance="sign", reduction="batchmean", eps=1.0, student_temperature=1e-20,
    ),
    "a divergence that only its mean brings back into float32": lambda path: check(
        "BMTARDLoss", path=path,
        student_logits=[Array((1, 70000), values="extreme", layout="expanded", seed=214539)],
        teacher_logits=[Array((1, 70000), values="masked", seed=421637)], num_teachers=1,
        balance="sign", reduction="mean", eps=1e-30,
    ),
    "plain torch subtracts products of two roundings of p": lambda path: check(
        "multi_teacher_kl", path=path, student_logits=Array((16, 16), seed=199955),
        teacher_logits=Array((16, 16), "float64", layout="flipped", seed=163132, grad=True),
        temperature=0.0518, student_temperature=0.132, reduction="sum", eps=1.0, upstream="ones",
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("finding", FINDINGS)
def test_finding(finding, path):
    assert FINDINGS[finding](path) >= 1


@pytest.mark.parametrize("block", range(8))
def test_random_calls(block):
    # The same calls on every machine and in every run.
    for index in range(100 * block, 100 * (block + 1)):
        op, arguments = random_case(1, index)
        try:
            check(op, **arguments)
        except Exception as error:
            pytest.fail(f"case {index}: {error}\n    {one_line(op, arguments)}")


def test_most_numbers_are_determined():
    before = dict(judged)
    for index in range(300):
        op, arguments = random_case(1, index)
        if not arguments.get("raises"):
            check(op, **arguments)
    total, unknown = (judged[key] - before[key] for key in ("numbers", "undetermined"))
    assert unknown < 0.2 * total


def test_every_instruction_set(capfd):
    options = argparse.Namespace(seed=2, start=0, seconds=0.0, calls=150)
    for capability in filter(runs, CAPABILITIES):
        result = drive(capability, options, 1.0)
        assert result["failures"] == 0, capfd.readouterr().out
        assert result["calls"] >= 150


def test_a_crash_is_reported(capfd):
    worker = (
        "import os, bmtard; bmtard.pgd_step_ = lambda **_: os.abort()\n"
        "from tests.fuzz.__main__ import main; raise SystemExit(main())"
    )
    first = next(i for i in range(1000) if random_case(0, i)[0] == "pgd_step_")
    options = argparse.Namespace(seed=0, start=first, seconds=0.0, calls=1)
    result = drive("baseline", options, 1.0, (sys.executable, "-c", worker))
    printed = capfd.readouterr().out
    assert (result["calls"], result["failures"]) == (1, 1)
    assert "check('pgd_step_', x_adv=Array(" in printed
