"""Which cases are chosen, that every provider is checked, and that nothing vanishes silently."""

import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from bmtard.benchmarks import suite
from bmtard.benchmarks.ops.bisect_temperature import BisectTemperature
from bmtard.benchmarks.providers import bmtard as bmtard_provider
from bmtard.benchmarks.providers.bmtard import Bmtard
from bmtard.benchmarks.providers.compile import Compile
from bmtard.benchmarks.providers.eager import Eager
from bmtard.benchmarks.providers.sklearn import Sklearn
from bmtard.benchmarks.report import load
from bmtard.benchmarks.shapes import draw
from bmtard.benchmarks.spec import DTYPES, Shape, Spec, catalogue
from bmtard.benchmarks.suite import Selection, choose
from bmtard.benchmarks.table import problems
from bmtard.benchmarks.training_step import PHASES, TrainingStep

CPU = torch.device("cpu")
OPS, PROVIDERS = catalogue()
FAST = tuple(name for name in PROVIDERS if not name.startswith("compile"))


def spec(rows=16, classes=10, dtype=torch.float32, teachers=2):
    shape = Shape(name="test", dims=(rows, classes), teachers=teachers)
    return Spec(shape=shape, dtype=dtype, device=CPU)


def logits_ops():
    return [op for op in OPS.values() if op.rank == 2]


# --- Every provider is right, and a wrong one is found ----------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.name != "bmtard_step"])
def test_bmtard_and_eager_pass_the_check(op, dtype):
    shape = (16, 33) if op.rank == 2 else (4, 3, 5, 7)
    case = Spec(shape=Shape(name="test", dims=shape), dtype=DTYPES[dtype], device=CPU)
    inputs = op.inputs(case, 0)
    expected = op.oracle(inputs)
    for provider in (Bmtard(), Eager()):
        for pass_ in op.passes:
            function = provider.build(op.name, case)
            assert suite.check(op, expected, inputs, function, pass_) == ""


@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize("name", ["bmtard_loss_sign", "bmtard_loss_bisect", "multi_teacher_kl"])
def test_other_numbers_of_teachers(name, teachers):
    op, case = OPS[name], spec(teachers=teachers)
    inputs = op.inputs(case, 0)
    expected = op.oracle(inputs)
    for provider in (Bmtard(), Eager()):
        assert suite.check(op, expected, inputs, provider.build(name, case), "both") == ""


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.name != "bmtard_step"])
def test_compiled_provider_is_one_graph_and_right(op, monkeypatch):
    """Traced as torch.compile would; without Inductor, which takes seconds for each."""

    def compiled(self, function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(Compile, "compiled", compiled)
    shape = (16, 10) if op.rank == 2 else (2, 3, 4, 4)
    case = Spec(shape=Shape(name="test", dims=shape), dtype=torch.float32, device=CPU)
    inputs = op.inputs(case, 0)
    function = Compile().build(op.name, case)
    assert suite.check(op, op.oracle(inputs), inputs, function, op.passes[-1]) == ""


# More rows than classes, fewer, and as many: scikit-learn leaves a diagonal out of the latter two.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 10), (16, 40), (20, 20)], ids=str)
def test_scikit_learn_solves_the_same_problem(shape, dtype):
    pytest.importorskip("sklearn")
    op, case = BisectTemperature(), spec(*shape, dtype=dtype)
    inputs = op.inputs(case, 0)
    function = Sklearn().build(op.name, case)
    assert suite.check(op, op.oracle(inputs), inputs, function, "forward") == ""
    ours = Bmtard().build(op.name, case)(inputs)[0]
    theirs = function.result(inputs, function(inputs))[0]
    torch.testing.assert_close(theirs.float(), ours, rtol=1e-3, atol=0)


def test_search_may_end_at_the_lowest_temperature():
    op, case = BisectTemperature(), spec(128, 2)
    inputs = op.inputs(case, 0)
    reached = op.oracle(inputs)
    assert 0 < int((~reached).sum()) < 10
    for provider in (Bmtard(), Eager()):
        function = provider.build(op.name, case)
        assert suite.check(op, reached, inputs, function, "forward") == ""
    (found,) = Bmtard().build(op.name, case)(inputs)
    assert "off the target" in op.verify(reached, inputs, (found.clamp(min=0.02),), None)


def test_unscaled_half_gradients_are_as_right_as_float16_is():
    op = OPS["bmtard_loss_sign"]
    case = spec(256, 1000, dtype=torch.float16)
    inputs = op.inputs(case, 0)
    function = Eager().build(op.name, case)
    assert suite.check(op, op.oracle(inputs), inputs, function, "both") == ""


STEPS = ["bmtard", "ops-alone", "channels-last", "folded", "bfloat16"]


@pytest.mark.parametrize("provider", STEPS)
def test_training_steps_agree(provider):
    op = OPS["bmtard_step"]
    case = Spec(shape=Shape(name="test", dims=(4, 3, 8, 8)), dtype=torch.float32, device=CPU)
    inputs = op.inputs(case, 0)
    before = [p.clone() for p in inputs.student.parameters()]
    expected = op.oracle(inputs)
    function = PROVIDERS[provider].build(op.name, case)
    assert suite.check(op, expected, inputs, function, "step") == ""
    # The shared networks are left as they were, and the step did train.
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.student.parameters(), strict=True))
    student = function.inputs.student
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert set(function.phases(inputs, 0.0)) == set(PHASES)


@pytest.mark.parametrize("provider", ["bmtard", "bfloat16"])
def test_a_wrong_training_step_is_found(provider, monkeypatch):
    op = OPS["bmtard_step"]
    case = Spec(shape=Shape(name="test", dims=(4, 3, 8, 8)), dtype=torch.float32, device=CPU)
    inputs = op.inputs(case, 0)
    expected = op.oracle(inputs)
    monkeypatch.setattr(bmtard_provider, "pgd", lambda model, x, *_, **__: x.clone())
    function = PROVIDERS[provider].build(op.name, case)
    assert suite.check(op, expected, inputs, function, "step")


def test_phases_of_a_step_are_told_apart(machine):
    """Each is the median over steps; what passes between two steps belongs to none."""
    steps = iter(range(1, 100))

    class Step(TrainingStep):
        def __call__(self, inputs, mark):
            step = next(steps)
            for number, phase in enumerate(PHASES, 1):
                machine.work(step * number)
                mark(phase)
            machine.work(1000.0)

        attack = head = state = None

    inputs = SimpleNamespace(x=torch.zeros(1))
    # Five steps of 1000 s and more are the first to pass 5000 s.
    assert Step().phases(inputs, 5000.0) == {
        phase: 3 * 1e3 * number for number, phase in enumerate(PHASES, 1)
    }


class Wrong(Bmtard):
    """Off by a thousandth, in one result of each op."""

    name = "wrong"

    def build(self, op, spec):
        right = super().build(op, spec)
        return lambda inputs: (right(inputs)[0] * 1.001, *right(inputs)[1:])


@pytest.mark.parametrize("op", [op.name for op in OPS.values() if op.name != "bmtard_step"])
def test_wrong_provider_is_reported_and_not_timed(measured, op):
    shape = "16x10" if OPS[op].rank == 2 else "2x3x8x8"
    report = measured({"wrong": Wrong()}, ops=(op,), providers=("wrong", "bmtard"), shapes=(shape,))
    by_name = {record.provider: record for record in report.records}
    assert by_name["bmtard"].status == "ok"
    assert by_name["wrong"].status == "wrong"
    assert not by_name["wrong"].measures
    assert "wrong on" in " ".join(problems(report))


class WrongGradient(Bmtard):
    name = "wrong"

    def softmax_entropy(self, spec):
        return lambda i: (
            super(WrongGradient, self).softmax_entropy(spec)(i)[0].detach() + 0 * i.logits.sum(),
        )


class StuckWeights(Bmtard):
    name = "wrong"

    def bmtard_loss_sign(self, spec):
        right = super().bmtard_loss_sign(spec)
        return lambda i: (*right(i)[:2], torch.full((2,), 0.5))


@pytest.mark.parametrize(
    ("provider", "op", "what"),
    [
        (WrongGradient(), "softmax_entropy", "gradient"),
        (StuckWeights(), "bmtard_loss_sign", "weights"),
    ],
)
def test_gradients_and_state_are_checked(measured, provider, op, what):
    report = measured({"wrong": provider}, ops=(op,), providers=("wrong",))
    assert report.records[0].status == "wrong"
    assert what in report.records[0].reason


def test_nan_is_wrong(measured):
    class NaN(Bmtard):
        def softmax_entropy(self, spec):
            return lambda i: (super(NaN, self).softmax_entropy(spec)(i)[0] * math.nan,)

    report = measured({"nan": NaN()}, ops=("softmax_entropy",), providers=("nan",))
    assert report.records[0].status == "wrong"


def test_failing_provider_is_reported(measured):
    class Broken(Bmtard):
        def softmax_entropy(self, spec):
            def run(inputs):
                raise RuntimeError("no kernel image\nand more")

            return run

    report = measured(
        {"broken": Broken()}, ops=("softmax_entropy",), providers=("broken", "bmtard")
    )
    broken, fine = sorted(report.records, key=lambda r: r.provider != "broken")
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: no kernel image")
    assert fine.status == "ok"


# --- Nothing vanishes -------------------------------------------------------------------------


def test_absent_providers_are_listed(measured):
    report = measured(ops=("multi_teacher_kl",), providers=("bmtard", "liger"))
    absent = [r for r in report.records if r.status == "absent"]
    assert [(r.provider, r.reason) for r in absent] == [
        ("liger", "its Triton kernels run on CUDA only")
    ]
    assert "absent liger: its Triton kernels run on CUDA only" in problems(report)


def test_compile_is_absent_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in PROVIDERS["compile"].absent(CPU)
    monkeypatch.undo()
    if shutil.which(os.environ.get("CXX", "g++")):
        assert PROVIDERS["compile"].absent(CPU) == ""


def test_cases_over_the_memory_limit_are_listed(measured):
    report = measured(
        ops=("softmax_entropy",), providers=("bmtard",), shapes=("16x10", "4096x1000"),
        max_memory=1 << 20,
    )  # fmt: skip
    small, large = report.records
    assert (small.status, large.status) == ("ok", "skipped")
    assert "needs about 0.2 GiB, --max-memory is 0.0" in large.reason
    assert any(
        line.startswith("skipped bmtard on softmax_entropy 4096x1000") for line in problems(report)
    )


def test_running_out_of_memory_is_listed(measured):
    class Large(Bmtard):
        def softmax_entropy(self, spec):
            calls = []

            def run(inputs):
                calls.append(1)
                if len(calls) > 1:  # right, but too large beside the others
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super(Large, self).softmax_entropy(spec)(inputs)

            return run

    report = measured({"large": Large()}, ops=("softmax_entropy",), providers=("large",))
    assert report.records[0].status == "skipped"
    assert "out of memory" in report.records[0].reason


def test_memory_estimate_covers_inputs_and_oracle():
    for op in logits_ops():
        case = spec(64, 1000)
        inputs = op.inputs(case, 0)
        assert op.memory(case) > 2 * sum(tensor.nbytes for tensor in inputs.tensors())


# --- Selection --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"ops": ("softmax",)}, "--op must be one of bisect_temperature, .*, got 'softmax'"),
        ({"providers": ("jax",)}, "--provider must be one of bmtard, eager, .*, got 'jax'"),
        ({"shapes": ("imagnet",)}, "--shape must be one of cifar10, .* 512x1000, got 'imagnet'"),
        ({"shapes": ("0x10",)}, "got '0x10'"),
        ({"shapes": ("1x2x3",)}, "got '1x2x3'"),
        ({"ops": ("pgd_step_",), "passes": ("backward",)}, "pgd_step_ has the passes forward"),
        ({"providers": ("liger",)}, "no provider chosen"),
    ],
)  # fmt: skip
def test_bad_selection_says_what_is_wanted(selection, message):
    with pytest.raises(ValueError, match=message):
        choose(Selection(**selection), OPS, PROVIDERS)


def test_quick_is_small_and_default_covers_every_op():
    def of(preset):
        return choose(Selection(preset=preset, providers=("bmtard", "eager")), OPS, PROVIDERS)

    quick, default, full = of("quick"), of("default"), of("full")
    assert len(quick) < 10
    assert {g.op.name for g in default} == set(OPS) - {"bmtard_step"}
    assert {"float32", "bfloat16", "float16"} == {g.dtype for g in default}
    assert {"N", "C", "K"} == {g.spec.shape.sweep for g in default} - {""}
    assert {"forward", "backward", "both"} == {p for g in full for p in g.passes}
    assert set(DTYPES) == {g.dtype for g in full}
    assert len(full) > 2 * len(default) - sum(bool(g.spec.shape.sweep) for g in default)


def test_selection_narrows():
    chosen = choose(
        Selection(ops=("softmax_entropy", "pgd_step_"), shapes=("cifar10", "8x5"),
                  dtypes=("float64",), passes=("forward",), providers=("bmtard",)),
        OPS, PROVIDERS,
    )  # fmt: skip
    assert [(g.op.name, str(g.spec.shape), g.dtype, g.passes) for g in chosen] == [
        ("pgd_step_", "128x3x32x32", "float64", ("forward",)),
        ("softmax_entropy", "128x10", "float64", ("forward",)),
        ("softmax_entropy", "8x5", "float64", ("forward",)),
    ]


def test_inputs_are_the_same_for_a_seed():
    case = spec()
    assert torch.equal(draw(case, 3, 1.0), draw(case, 3, 1.0))
    assert not torch.equal(draw(case, 3, 1.0), draw(case, 4, 1.0))


def test_every_op_is_measured(measured):
    """All ops and passes, with every provider that compiles nothing."""
    report = measured(
        providers=FAST, shapes=("16x10", "2x3x8x8"), ops=tuple(set(OPS) - {"bmtard_step"}),
        passes=("forward", "backward", "both"),
    )  # fmt: skip
    assert not report.wrong
    assert not report.failed
    timed = {(r.op, r.pass_) for r in report.records if r.provider == "bmtard" and r.measures}
    assert timed == {(n, p) for n, op in OPS.items() for p in op.passes if n != "bmtard_step"}
    for record in report.records:
        if record.measures and record.provider != "bmtard":
            ratio = record.best.ratio
            assert ratio.low <= ratio.median <= ratio.high


def test_what_is_measured_is_kept_case_by_case(tmp_path, providers):
    """A run that is stopped in its second case leaves a file with the first."""
    selection = Selection(
        preset="quick", ops=("pgd_step_",), shapes=("2x3x4x4", "2x3x5x5"), device=CPU
    )
    file = tmp_path / "kept.json"

    def keep(report):
        report.save(file)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.run(selection, OPS, providers(bmtard=1e-3), command="", keep=keep)
    assert {record.dims for record in load(file).records if record.measures} == {(2, 3, 4, 4)}
