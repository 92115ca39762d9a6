"""Bad input: the exception's type, and a message that names op, argument, wanted and got."""

import math
import warnings

import numpy as np
import pytest
import torch

import bmtard
from bmtard import BMTARDLoss, EntropyBalance, NormalizationLossBalance

pytest_plugins = ["paths"]

LOGITS = torch.zeros(3, 10)
META = torch.zeros(3, 10, device="meta")
SCALAR_META = torch.zeros((), device="meta")
INTEGERS = torch.zeros(3, 10, dtype=torch.int64)
SPARSE = torch.eye(3).to_sparse()
GRAD = torch.zeros(3, 10, requires_grad=True)


def entropy(*args, **kwargs):
    return lambda: bmtard.softmax_entropy(*args, **kwargs)


def bisect(logits=LOGITS, target=1.0, **kwargs):
    return lambda: bmtard.bisect_temperature(logits, target, **kwargs)


def kl(student=LOGITS, teacher=LOGITS, *args, **kwargs):
    return lambda: bmtard.multi_teacher_kl(student, teacher, *args, **kwargs)


def pgd(x_adv=None, grad=LOGITS, x=LOGITS, **kwargs):
    kwargs = {"step_size": 0.1, "epsilon": 0.3, **kwargs}
    return lambda: bmtard.pgd_step_(
        torch.zeros(3, 10) if x_adv is None else x_adv, grad, x, **kwargs
    )


def loss(student=(LOGITS, LOGITS), teacher=(LOGITS, LOGITS), **kwargs):
    return lambda: BMTARDLoss(**kwargs)(student, teacher)


def balance(teacher=(LOGITS, LOGITS), **kwargs):
    return lambda: EntropyBalance(**kwargs)(teacher)


def weights(losses, **kwargs):
    return lambda: NormalizationLossBalance(**kwargs)(losses)


# (call, exception, what the message must hold beside the op's name: argument, wanted, got)
CASES = {
    "softmax_entropy": [
        (entropy([1.0, 2.0]), TypeError, "logits", "tensor", "list"),
        (entropy(None), TypeError, "logits", "tensor", "NoneType"),
        (entropy(INTEGERS), TypeError, "logits", "float32", "int64"),
        (entropy(LOGITS.bool()), TypeError, "logits", "float32", "bool"),
        (entropy(LOGITS.to(torch.complex64)), TypeError, "logits", "float32", "complex64"),
        (entropy(LOGITS.to(torch.float8_e4m3fn)), TypeError, "logits", "float32", "float8"),
        (entropy(SPARSE), TypeError, "logits", "dense", "sparse"),
        (entropy(torch.tensor(1.0)), ValueError, "logits", "[..., C]", "[]"),
        (entropy(torch.zeros(3, 0)), ValueError, "logits", "C >= 1", "[3, 0]"),
        (entropy(LOGITS, 0.0), ValueError, "temperature", "> 0", "0.0"),
        (entropy(LOGITS, -1), ValueError, "temperature", "> 0", "-1"),
        (entropy(LOGITS, math.nan), ValueError, "temperature", "finite", "nan"),
        (entropy(LOGITS, math.inf), ValueError, "temperature", "finite", "inf"),
        (entropy(LOGITS, 9e-37), ValueError, "temperature", "from 1e-36 to 1e+36", "9e-37"),
        (entropy(LOGITS, 1.1e36), ValueError, "temperature", "from 1e-36 to 1e+36", "1.1e+36"),
        (entropy(LOGITS, True), TypeError, "temperature", "number", "bool"),
        (entropy(LOGITS, "1"), TypeError, "temperature", "number", "str"),
        (entropy(LOGITS, None), TypeError, "temperature", "number", "NoneType"),
        (entropy(LOGITS, [1.0]), TypeError, "temperature", "number", "list"),
        (entropy(LOGITS, torch.ones(3, 1)), ValueError, "temperature", "[3]", "[3, 1]"),
        (entropy(LOGITS, torch.ones(10)), ValueError, "temperature", "[3]", "[10]"),
        (entropy(LOGITS, torch.ones(1)), ValueError, "temperature", "[3]", "[1]"),
        (entropy(LOGITS, torch.ones(3, dtype=torch.int32)), TypeError, "temperature", "float32",
         "int32"),
        (entropy(LOGITS, SCALAR_META), ValueError, "temperature", "cpu", "meta"),
        (entropy(LOGITS, reduction="batchmean"), ValueError, "reduction", "'mean'", "batchmean"),
        (entropy(LOGITS, reduction=None), ValueError, "reduction", "'mean'", "None"),
    ],
    "bisect_temperature": [
        (bisect(INTEGERS), TypeError, "logits", "float32", "int64"),
        (bisect(torch.tensor(1.0)), ValueError, "logits", "[..., C]", "[]"),
        (bisect(torch.zeros(3, 0)), ValueError, "logits", "C >= 1", "[3, 0]"),
        (bisect(target="1"), TypeError, "target_entropy", "number", "str"),
        (bisect(target=True), TypeError, "target_entropy", "number", "bool"),
        (bisect(target=None), TypeError, "target_entropy", "number", "NoneType"),
        (bisect(target=torch.ones(3)), ValueError, "target_entropy", "0-d", "[3]"),
        (bisect(target=torch.ones(2), per_sample=True), ValueError, "target_entropy", "[3]", "[2]"),
        (bisect(target=torch.tensor(1)), TypeError, "target_entropy", "float32", "int64"),
        (bisect(target=SCALAR_META), ValueError, "target_entropy", "cpu", "meta"),
        (bisect(bounds=(0.0, 1.0)), ValueError, "bounds", "0 <", "(0.0, 1.0)"),
        (bisect(bounds=(2.0, 1.0)), ValueError, "bounds", "lowest < highest", "(2.0, 1.0)"),
        (bisect(bounds=(1.0, 1.0)), ValueError, "bounds", "lowest < highest", "(1.0, 1.0)"),
        (bisect(bounds=(1.0, math.inf)), ValueError, "bounds", "<", "inf"),
        (bisect(bounds=(math.nan, 1.0)), ValueError, "bounds", "<", "nan"),
        (bisect(bounds=(1e-39, 1.0)), ValueError, "bounds", "from 1e-36 to 1e+36", "(1e-39, 1.0)"),
        (bisect(bounds=(1.0, 1e37)), ValueError, "bounds", "from 1e-36 to 1e+36", "(1.0, 1e+37)"),
        (bisect(bounds=(1.0,)), ValueError, "bounds", "two numbers", "(1.0,)"),
        (bisect(bounds=None), ValueError, "bounds", "two numbers", "None"),
        (bisect(bounds=("a", "b")), ValueError, "bounds", "two numbers", "('a', 'b')"),
        (bisect(initial=0.0), ValueError, "initial", "> 0", "0.0"),
        (bisect(initial=math.nan), ValueError, "initial", "finite", "nan"),
        (bisect(initial="warm"), TypeError, "initial", "number", "str"),
        (bisect(initial=torch.ones(3)), ValueError, "initial", "0-d", "[3]"),
        (bisect(initial=SCALAR_META), ValueError, "initial", "cpu", "meta"),
        (bisect(tolerance=-1e-3), ValueError, "tolerance", ">= 0", "-0.001"),
        (bisect(tolerance=math.nan), ValueError, "tolerance", "finite", "nan"),
        (bisect(tolerance="1e-3"), (TypeError, ValueError), "tolerance", "1e-3"),
        (bisect(tolerance=None), (TypeError, ValueError), "tolerance", "None"),
        (bisect(max_iterations=0), ValueError, "max_iterations", ">= 1", "0"),
        (bisect(max_iterations=2.5), ValueError, "max_iterations", "integer", "2.5"),
        (bisect(max_iterations=True), ValueError, "max_iterations", "integer", "True"),
        (bisect(max_iterations="9"), (TypeError, ValueError), "max_iterations", "integer", "9"),
        (bisect(max_iterations=2**31), ValueError, "max_iterations", "< 2**31", "2147483648"),
        (bisect(max_iterations=math.inf), ValueError, "max_iterations", "integer", "inf"),
        (bisect(max_iterations=math.nan), ValueError, "max_iterations", "integer", "nan"),
        (bisect(max_iterations=None), (TypeError, ValueError), "max_iterations", "integer",
         "None"),
        (bisect(method="newton"), ValueError, "method", "'halley'", "newton"),
    ],
    "multi_teacher_kl": [
        (kl(INTEGERS), TypeError, "student_logits", "float32", "int64"),
        (kl(LOGITS, INTEGERS), TypeError, "teacher_logits", "float32", "int64"),
        (kl([LOGITS, INTEGERS]), TypeError, "student_logits[1]", "float32", "int64"),
        (kl([LOGITS, 3.0]), TypeError, "student_logits[1]", "tensor", "float"),
        (kl(LOGITS, [LOGITS, None]), TypeError, "teacher_logits[1]", "tensor", "NoneType"),
        (kl(LOGITS, LOGITS.to_sparse()), TypeError, "teacher_logits", "dense", "sparse"),
        (kl(3.0), TypeError, "student_logits", "sequence", "float"),
        (kl(LOGITS, {"clean": LOGITS}), TypeError, "teacher_logits", "sequence", "dict"),
        (kl([]), ValueError, "student_logits", "1 to 16", "0"),
        (kl(LOGITS, [LOGITS] * 17), ValueError, "teacher_logits", "1 to 16", "17"),
        (kl([LOGITS] * 2, [LOGITS] * 3), ValueError, "student_logits", "equally many",
         "2 and 3"),
        (kl(LOGITS, LOGITS[:, :9]), ValueError, "teacher_logits", "[3, 10]", "[3, 9]"),
        (kl(LOGITS, LOGITS[:2]), ValueError, "teacher_logits", "[3, 10]", "[2, 10]"),
        (kl([LOGITS, LOGITS[:2]], LOGITS), ValueError, "student_logits[1]", "[3, 10]", "[2, 10]"),
        (kl(torch.zeros(3, 0), torch.zeros(3, 0)), ValueError, "student_logits", "C >= 1",
         "[3, 0]"),
        (kl(LOGITS, META), ValueError, "teacher_logits", "cpu", "meta"),
        (kl(META, LOGITS), ValueError, "teacher_logits", "meta", "cpu"),
        (kl(LOGITS, LOGITS, 0.0), ValueError, "temperature", "> 0", "0.0"),
        (kl(LOGITS, LOGITS, math.nan), ValueError, "temperature", "finite", "nan"),
        (kl(LOGITS, LOGITS, "4"), TypeError, "temperature", "number", "str"),
        (kl(LOGITS, LOGITS, (1.0, 2.0)), TypeError, "temperature", "number", "tuple"),
        (kl(LOGITS, [LOGITS] * 2, torch.ones(3)), ValueError, "temperature", "[2]", "[3]"),
        (kl(LOGITS, LOGITS, torch.ones(1, 1)), ValueError, "temperature", "[1]", "[1, 1]"),
        (kl(LOGITS, LOGITS, torch.tensor(1)), TypeError, "temperature", "float32", "int64"),
        (kl(LOGITS, LOGITS, SCALAR_META), ValueError, "temperature", "cpu", "meta"),
        (kl(student_temperature=0.0), ValueError, "student_temperature", "> 0", "0.0"),
        (kl(student_temperature=1e-39), ValueError, "student_temperature", "from 1e-36 to 1e+36",
         "1e-39"),
        (kl(student_temperature=math.inf), ValueError, "student_temperature", "finite", "inf"),
        (kl(student_temperature=torch.ones(2)), ValueError, "student_temperature", "[1]", "[2]"),
        (kl(student_temperature=SCALAR_META), ValueError, "student_temperature", "cpu", "meta"),
        (kl(student_temperature="own"), ValueError, "student_temperature", "'teacher'", "'own'"),
        (kl(student_temperature=None), TypeError, "student_temperature", "number", "NoneType"),
        (kl(weight=torch.ones(2)), ValueError, "weight", "[1]", "[2]"),
        (kl(weight=torch.tensor(1.0)), ValueError, "weight", "[1]", "[]"),
        (kl(weight=[1.0, 2.0]), ValueError, "weight", "[1]", "[2]"),
        (kl(weight=["a"]), (TypeError, ValueError), "weight", "'a'"),
        (kl(weight=torch.ones(1, dtype=torch.int64)), TypeError, "weight", "float32", "int64"),
        (kl(weight=torch.ones(1, device="meta")), ValueError, "weight", "cpu", "meta"),
        (kl(sample_weight=[1.0] * 3), TypeError, "sample_weight", "tensor", "list"),
        (kl(sample_weight=torch.ones(2)), ValueError, "sample_weight", "[3]", "[2]"),
        (kl(sample_weight=torch.ones(3, 10)), ValueError, "sample_weight", "[3]", "[3, 10]"),
        (kl(sample_weight=torch.ones(3, dtype=torch.int64)), TypeError, "sample_weight",
         "float32", "int64"),
        (kl(sample_weight=torch.ones(3, device="meta")), ValueError, "sample_weight", "cpu",
         "meta"),
        (kl(reduction="avg"), ValueError, "reduction", "batchmean", "avg"),
        (kl(reduction=None), ValueError, "reduction", "batchmean", "None"),
        (kl(eps=-1e-5), ValueError, "eps", ">= 0", "-1e-05"),
        (kl(eps=math.nan), ValueError, "eps", "finite", "nan"),
        (kl(eps=1e-50), ValueError, "eps", "0 or from 1e-36 to 1e+36", "1e-50"),
        (kl(eps=1e40), ValueError, "eps", "0 or from 1e-36 to 1e+36", "1e+40"),
        (kl(eps="1e-5"), (TypeError, ValueError), "eps", "1e-5"),
    ],
    "pgd_step_": [
        (pgd(3.0), TypeError, "x_adv", "tensor", "float"),
        (pgd(INTEGERS), TypeError, "x_adv", "float32", "int64"),
        (pgd(grad=INTEGERS), TypeError, "grad", "float32", "int64"),
        (pgd(grad=None), TypeError, "grad", "tensor", "NoneType"),
        (pgd(x=torch.zeros(3, 10, dtype=torch.uint8)), TypeError, "x ", "float32", "uint8"),
        (pgd(grad=LOGITS[:2]), ValueError, "grad", "[3, 10]", "[2, 10]"),
        (pgd(x=LOGITS[:, :9]), ValueError, "x ", "[3, 10]", "[3, 9]"),
        (pgd(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)), ValueError, "x_adv",
         "[N, ...]", "[]"),
        (pgd(grad=META), ValueError, "grad", "cpu", "meta"),
        (pgd(x=META), ValueError, "x ", "cpu", "meta"),
        (pgd(torch.zeros(3, 10, requires_grad=True)), ValueError, "x_adv", "torch.no_grad()",
         "requires grad"),
        (pgd(step_size=-0.1), ValueError, "step_size", ">= 0", "-0.1"),
        (pgd(step_size=math.nan), ValueError, "step_size", "finite", "nan"),
        (pgd(step_size=torch.tensor(0.1)), ValueError, "step_size", "finite", "0.1"),
        (pgd(epsilon=-0.1), ValueError, "epsilon", ">= 0", "-0.1"),
        (pgd(epsilon=math.inf), ValueError, "epsilon", "finite", "inf"),
        (pgd(epsilon="8/255"), ValueError, "epsilon", "finite", "8/255"),
        (pgd(bounds=(1.0, 0.0)), ValueError, "bounds", "lowest, highest", "(1.0, 0.0)"),
        (pgd(bounds=(math.nan, 1.0)), ValueError, "bounds", "lowest, highest", "nan"),
        (pgd(bounds=(0.0,)), ValueError, "bounds", "lowest, highest", "(0.0,)"),
        (pgd(bounds=1.0), ValueError, "bounds", "lowest, highest", "1.0"),
        (pgd(bounds=("0", "1")), ValueError, "bounds", "lowest, highest", "('0', '1')"),
        (pgd(norm="l1"), ValueError, "norm", "'linf'", "l1"),
        (pgd(norm=math.inf), ValueError, "norm", "'linf'", "inf"),
    ],
    "BMTARDLoss": [
        (loss(num_teachers=0), ValueError, "num_teachers", "1 to 16", "0"),
        (loss(num_teachers=17), ValueError, "num_teachers", "1 to 16", "17"),
        (loss(num_teachers=2.0), ValueError, "num_teachers", "integer", "2.0"),
        (loss(num_teachers=True), ValueError, "num_teachers", "integer", "True"),
        (loss(balance="halley"), ValueError, "balance", "'sign'", "halley"),
        (loss(temperature_bounds=(10.0, 1.0)), ValueError, "temperature_bounds",
         "lowest < highest", "(10.0, 1.0)"),
        (loss(temperature_bounds=(0.0, 1.0)), ValueError, "temperature_bounds", "0 <", "0.0"),
        (loss(temperature_bounds=3.0), ValueError, "temperature_bounds", "two numbers", "3.0"),
        (loss(temperature_lr=-1e-3), ValueError, "temperature_lr", "[0, inf)", "-0.001"),
        (loss(temperature_lr=math.nan), ValueError, "temperature_lr", "[0, inf)", "nan"),
        (loss(temperature_momentum=1.0), ValueError, "temperature_momentum", "[0, 1)", "1.0"),
        (loss(weight_lr=1.1), ValueError, "weight_lr", "[0, 1]", "1.1"),
        (loss(weight_lr="fast"), ValueError, "weight_lr", "[0, 1]", "fast"),
        (loss(loss_exponent=0.0), ValueError, "loss_exponent", "> 0", "0.0"),
        (loss(loss_exponent=math.inf), ValueError, "loss_exponent", "finite", "inf"),
        (loss(student_temperature=-1.0), ValueError, "student_temperature", "> 0", "-1.0"),
        (loss(student_temperature="own"), ValueError, "student_temperature", "'teacher'", "'own'"),
        (loss(student_temperature=torch.ones(3)), ValueError, "student_temperature", "[2]", "[3]"),
        (loss(reduction="none"), ValueError, "reduction", "'mean'", "none"),
        (loss(student_temperature=1e300), ValueError, "student_temperature",
         "from 1e-36 to 1e+36", "1e+300"),
        (loss(eps=-1.0), ValueError, "eps", ">= 0", "-1.0"),
        (loss(LOGITS), ValueError, "student_logits", "2", "one Tensor [3, 10]"),
        (loss((LOGITS,)), ValueError, "student_logits", "2", "1"),
        (loss((LOGITS,) * 3), ValueError, "student_logits", "2", "3"),
        (loss(teacher=LOGITS), ValueError, "teacher_logits", "2", "got"),
        (loss(teacher=(LOGITS,)), ValueError, "teacher_logits", "2", "1"),
        (loss(teacher=(LOGITS,) * 3), ValueError, "teacher_logits", "2", "3"),
        (loss((LOGITS, INTEGERS)), TypeError, "student_logits[1]", "float32", "int64"),
        (loss(teacher=(LOGITS, INTEGERS)), TypeError, "teacher_logits[1]", "float32", "int64"),
        (loss(teacher=(LOGITS, None)), TypeError, "teacher_logits[1]", "tensor", "NoneType"),
        (loss(teacher=(LOGITS, LOGITS[:2])), ValueError, "teacher_logits[1]", "[3, 10]",
         "[2, 10]"),
        (loss(teacher=(GRAD, LOGITS)), ValueError, "teacher_logits[0]", "requires grad",
         "detach()"),
        (loss((META,) * 2, (META,) * 2), ValueError, "device", "cpu", "meta"),
        (loss(teacher=(LOGITS, META)), ValueError, "teacher_logits[1]", "cpu", "meta"),
    ],
    "EntropyBalance": [
        (balance(num_teachers=-1), ValueError, "num_teachers", "1 to 16", "-1"),
        (balance(mode="ebb"), ValueError, "mode", "'sign'", "ebb"),
        (balance(bounds=(2.0, 1.0)), ValueError, "bounds", "lowest < highest", "(2.0, 1.0)"),
        (balance(temperature_lr=math.inf), ValueError, "temperature_lr", "[0, inf)", "inf"),
        (balance(momentum=-0.1), ValueError, "momentum", "[0, 1)", "-0.1"),
        (balance(eps=math.inf), ValueError, "eps", "finite", "inf"),
        (balance(LOGITS), ValueError, "teacher_logits", "sequence of 2", "Tensor"),
        (balance((LOGITS,) * 3), ValueError, "teacher_logits", "sequence of 2", "3"),
        (balance((LOGITS, INTEGERS)), TypeError, "teacher_logits[1]", "float32", "int64"),
        (balance((LOGITS, torch.zeros(3, 0))), ValueError, "teacher_logits[1]", "C >= 1",
         "[3, 0]"),
        (balance((LOGITS, META)), ValueError, "teacher_logits[1]", "cpu", "meta"),
        (balance((LOGITS, GRAD)), ValueError, "teacher_logits[1]", "requires grad", "detach()"),
    ],
    "NormalizationLossBalance": [
        (weights(torch.ones(2), num_teachers=0), ValueError, "num_teachers", "1 to 16", "0"),
        (weights(torch.ones(2), weight_lr=-0.1), ValueError, "weight_lr", "[0, 1]", "-0.1"),
        (weights(torch.ones(2), loss_exponent=-1), ValueError, "loss_exponent", "> 0", "-1"),
        (weights([1.0, 2.0]), TypeError, "losses", "tensor", "list"),
        (weights(torch.ones(3)), ValueError, "losses", "[2]", "[3]"),
        (weights(torch.tensor(1.0)), ValueError, "losses", "[2]", "[]"),
        (weights(torch.ones(2, dtype=torch.int64)), TypeError, "losses", "float32", "int64"),
        (weights(torch.ones(2, device="meta")), ValueError, "losses", "cpu", "meta"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "call", "error", "parts"),
    [
        pytest.param(op, call, error, parts, id=f"{op}-{i}-{'-'.join(parts)}")
        for op, cases in CASES.items()
        for i, (call, error, *parts) in enumerate(cases)
    ],
)
def test_bad_input(path, op, call, error, parts):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{op}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numpy_scalars_are_numbers(path, kind):
    """Each call with a NumPy scalar in place of every number equals the call with 2.0 and 1.0."""
    noise = torch.linspace(0, 1, 30).view(3, 10)

    def call(one, two):
        found = bmtard.bisect_temperature(
            noise, one, bounds=(one, two), initial=one, tolerance=one, max_iterations=int(two)
        )
        module = BMTARDLoss(
            temperature_bounds=(one, two), temperature_lr=two, temperature_momentum=0 * one,
            weight_lr=one, loss_exponent=two, student_temperature=two, eps=one,
        )  # fmt: skip
        return [
            bmtard.softmax_entropy(noise, two),
            bmtard.multi_teacher_kl(
                noise, -noise, two, student_temperature=two, eps=one, weight=[two],
                scale_by_temperature=True,
            ),
            bmtard.pgd_step_(noise.clone(), noise, noise, step_size=two, epsilon=one),
            found.temperature,
            module((noise, noise), (-noise, 2 * noise)),
            EntropyBalance(mode="sign", bounds=(one, two), momentum=0 * one)((noise, -noise)),
            NormalizationLossBalance(weight_lr=one, loss_exponent=two)(torch.ones(2)),
        ]  # fmt: skip

    for actual, expected in zip(call(kind(1), kind(2)), call(1.0, 2.0), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("make", "name", "wrong", "part", "right", "stored"),
    [
        (BMTARDLoss, "balance", "ebb", "'sign'", "sign", "sign"),
        (BMTARDLoss, "reduction", "none", "'sum'", "sum", "sum"),
        (BMTARDLoss, "temperature_bounds", (2, 1), "lowest < highest", [1, 4], (1.0, 4.0)),
        (BMTARDLoss, "temperature_momentum", 1, "[0, 1)", 0.5, 0.5),
        (BMTARDLoss, "loss_exponent", 0, "> 0", 2, 2.0),
        (BMTARDLoss, "eps", -1.0, ">= 0", np.float32(0.5), 0.5),
        (EntropyBalance, "mode", "ebb", "'sign'", "sign", "sign"),
        (EntropyBalance, "bounds", 3.0, "two numbers", (1, 4), (1.0, 4.0)),
        (EntropyBalance, "momentum", "much", "[0, 1)", 0, 0.0),
        (EntropyBalance, "eps", math.nan, "finite", 1e-5, 1e-5),
        (NormalizationLossBalance, "loss_exponent", math.inf, "finite", 1, 1.0),
    ],
)
def test_settings_are_checked_when_set(make, name, wrong, part, right, stored):
    module = make()
    before = getattr(module, name)
    with pytest.raises(ValueError, match=f"{make.__name__}: {name} must ") as caught:
        setattr(module, name, wrong)
    for word in (part, str(wrong)):
        assert word in str(caught.value)
    assert getattr(module, name) == before
    setattr(module, name, right)
    assert getattr(module, name) == stored
    assert type(getattr(module, name)) is type(stored)


def test_numpy_integers_are_integers(path):
    assert len(BMTARDLoss(np.int64(3)).weights) == 3
    search = [bmtard.bisect_temperature(LOGITS, 1.0, max_iterations=n) for n in (3, np.int32(3))]
    assert search[0].iterations == search[1].iterations


def test_numpy_bool_is_no_number():
    with pytest.raises(TypeError, match="temperature must be a number"):
        bmtard.softmax_entropy(LOGITS, np.bool_(True))


def test_teacher_that_requires_grad_is_fine_without_grad_mode(path):
    with torch.no_grad():
        BMTARDLoss()((LOGITS, LOGITS), (GRAD, LOGITS))
        EntropyBalance()((GRAD, LOGITS))


def test_bad_input_leaves_the_state_alone(path):
    module = BMTARDLoss()
    before = {name: b.clone() for name, b in module.state_dict().items()}
    for teacher in ((LOGITS, INTEGERS), (GRAD, LOGITS), (LOGITS, LOGITS[:2])):
        with pytest.raises((TypeError, ValueError)):
            module((LOGITS, LOGITS), teacher)
    for name, b in module.state_dict().items():
        assert torch.equal(b, before[name])


def test_state_dict_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for weights"):
        BMTARDLoss(3).load_state_dict(BMTARDLoss(2).state_dict())


def test_a_device_without_kernels_warns_once(monkeypatch):
    monkeypatch.setattr(bmtard._library, "NATIVE", True)
    monkeypatch.setattr(bmtard.ops._dispatch, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"plain-torch path on device 'meta'"):
        assert bmtard.softmax_entropy(META).shape == (3,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bmtard.softmax_entropy(META)
