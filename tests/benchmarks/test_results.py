"""The result file, the comparison of two, the tables, the pictures and the command."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bmtard.benchmarks import cli, shapes, table
from bmtard.benchmarks.compare import compare, comparison_table
from bmtard.benchmarks.providers.bmtard import Bmtard
from bmtard.benchmarks.report import Measure, Record, Report, load
from bmtard.benchmarks.timing import FEWEST_ROUNDS, Ratio
from bmtard.cli import main

FAST = ("bmtard", "eager")


def record(us, ratio=None, **values):
    ratio = None if ratio is None else Ratio(median=ratio[1], low=ratio[0], high=ratio[2])
    measure = Measure(
        rounds=9, median_us=us, p20_us=0.95 * us, p80_us=1.05 * us, min_us=0.9 * us, ratio=ratio
    )
    defaults = {
        "op": "softmax_entropy", "shape": "imagenet", "dims": (1024, 1000), "teachers": 2,
        "dtype": "float32", "pass_": "both", "provider": "bmtard", "ideal_bytes": 12_288_000,
        "flops": 46_080_000,
    }  # fmt: skip
    return Record(**{**defaults, **values}, measures={"wall": measure})


def report(*records, **values):
    defaults = {
        "command": "bmtard bench", "date": "2026-01-01T00:00:00", "preset": "quick",
        "device": "cpu", "threads": 1, "copy_bytes_per_second": 1e10,
        "peak_flops_per_second": 1e11,
        "machine": {"processor": "P", "torch": "2", "kernels": "avx2", "python": "3", "load": 0.1},
    }  # fmt: skip
    return Report(**{**defaults, **values}, records=list(records))


def pair(us, ratio):
    low, median, high = ratio
    return record(us), record(us * median, ratio=(low, median, high), provider="eager")


# --- The file ---------------------------------------------------------------------------------


def test_file_holds_everything(measured, tmp_path):
    made = measured(providers=(*FAST, "liger"), ops=("multi_teacher_kl", "bisect_temperature"))
    made.save(tmp_path / "a.json")
    read = load(tmp_path / "a.json")
    assert read.machine == made.machine
    assert [r.key for r in read.records] == [r.key for r in made.records]
    for was, is_ in zip(made.records, read.records, strict=True):
        assert (was.status, was.reason, was.dims) == (is_.status, is_.reason, is_.dims)
        for name, measure in was.measures.items():
            assert is_.measures[name].median_us == pytest.approx(measure.median_us, rel=1e-4)
            assert is_.measures[name].ratio.low == pytest.approx(measure.ratio.low, rel=1e-4)
    read.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    values = json.loads((tmp_path / "a.json").read_text())
    assert {"format", "command", "date", "machine", "threads", "device", "records"} <= set(values)
    assert {"processor", "torch", "kernels", "numpy", "load"} <= set(values["machine"])


def test_interrupted_writing_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    report(record(1.0)).save(path)

    def interrupt(*values):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report(record(1.0), record(2.0, dtype="bfloat16")).save(path)
    assert len(load(path).records) == 1
    assert list(tmp_path.iterdir()) == [path]
    report(record(1.0)).save(Path(os.devnull))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "records": [{}]}',
     '{"format": 1, "records": [], "unheard_of": 1}'],
)  # fmt: skip
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    for content in (text, text + '{"a":' * 100_000):  # too deep to be read
        path.write_text(content)
        with pytest.raises(ValueError, match=r"other\.json is not a result of bmtard bench"):
            load(path)


# --- The comparison ---------------------------------------------------------------------------


def test_slow_machine_is_no_regression():
    old = report(*pair(100.0, (2.9, 3.0, 3.1)))
    new = report(*pair(180.0, (2.9, 3.0, 3.1)))
    comparison = compare(old, new, 0.1)
    (change,) = comparison.changes
    assert change.verdict(0.1) == "same"
    assert change.control == "eager"
    assert comparison.status == 0
    assert comparison.notes() == [
        "1 measurement(s) took longer, up to 1.80 x, and so did their controls: the machine was "
        "slower, not bmtard"
    ]


@pytest.mark.parametrize(
    ("ratio", "verdict", "status"),
    [
        ((2.4, 2.5, 2.6), "slower", 1),  # 3 / 2.5 = 1.2, at least 1.15
        ((2.4, 2.65, 2.8), "unclear", 3),  # 1.13, more or less than 1.1
        ((2.6, 2.9, 3.0), "unclear", 3),  # 1.03, perhaps 1.16
        ((2.8, 2.9, 3.0), "same", 0),
        ((2.8, 3.2, 3.6), "same", 0),  # whether it is faster is not asked
        ((3.5, 3.6, 3.7), "faster", 0),
    ],
)
@pytest.mark.parametrize("us", [50.0, 100.0, 200.0])
def test_interval_of_the_ratio_decides(ratio, verdict, status, us):
    old, new = report(*pair(100.0, (2.95, 3.0, 3.05))), report(*pair(us, ratio))
    comparison = compare(old, new, 0.1)
    assert comparison.changes[0].verdict(0.1) == verdict
    assert comparison.status == status
    rows = comparison_table(comparison).rows
    assert [row[2] for row in rows] == ([] if verdict == "same" else [verdict])


def test_slowdown_on_a_faster_machine_is_found_with_a_note():
    old, new = report(*pair(100.0, (2.98, 3.0, 3.02))), report(*pair(90.0, (1.98, 2.0, 2.02)))
    comparison = compare(old, new, 0.1)
    assert comparison.status == 1
    assert comparison.conclusions() == ["1 measurement(s) slower than before"]
    assert "the machine, or the control, was faster" in " ".join(comparison.notes())


def test_unclear_says_which_run_is_uncertain():
    sure, unsure = pair(100.0, (2.98, 3.0, 3.02)), pair(100.0, (2.0, 3.0, 4.5))
    (text,) = compare(report(*sure), report(*unsure), 0.1).conclusions()
    assert text.startswith("1 measurement(s) unclear: 1.1 lies in the interval")
    assert "old run" not in text
    (text,) = compare(report(*unsure), report(*sure), 0.1).conclusions()
    assert text.endswith("for 1 of them the old run is too uncertain")


def test_too_few_rounds_decide_nothing():
    old, new = report(*pair(100.0, (2.98, 3.0, 3.02))), report(*pair(100.0, (1.98, 2.0, 2.02)))
    old.records[1].measures["wall"].rounds = FEWEST_ROUNDS - 1
    comparison = compare(old, new, 0.1)
    assert comparison.changes[0].verdict(0.1) == "unclear"
    assert comparison.conclusions()[0].endswith("for 1 of them the old run is too uncertain")


def test_bmtard_alone_is_warned_of_and_decides_nothing():
    comparison = compare(report(record(100.0)), report(record(150.0)), 0.1)
    (change,) = comparison.changes
    assert (change.control, change.verdict(0.1)) == ("", "longer")
    assert comparison_table(comparison).rows[0][2] == "longer"
    assert comparison.status == 3
    assert comparison.notes()[0].startswith("nothing is decided: no other provider")
    (change,) = compare(report(record(100.0)), report(record(105.0)), 0.1).changes
    assert change.verdict(0.1) == "same"
    # Beside one that has a control it changes nothing.
    scaled = {"shape": "sweep-C", "dims": (128, 16), "sweep": "C"}
    old = report(*pair(100.0, (2.95, 3.0, 3.05)), record(100.0, **scaled))
    new = report(*pair(100.0, (2.95, 3.0, 3.05)), record(150.0, **scaled))
    comparison = compare(old, new, 0.1)
    assert [c.verdict(0.1) for c in comparison.changes] == ["same", "longer"]
    assert comparison.status == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"threads": 2}, "threads 1 and 2"),
        ({"device": "cuda"}, "device cpu and cuda"),
        ({"machine": {"processor": "Q"}}, "runs on P and Q"),
    ],
)
def test_unlike_runs_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        compare(report(record(1.0)), report(record(1.0), **other), 0.1)


def test_nothing_in_common_is_refused():
    with pytest.raises(ValueError, match="no measurement of bmtard in common"):
        compare(report(record(1.0)), report(record(1.0, dtype="float64")), 0.1)


def test_lost_measurement_and_other_torch_are_named():
    old = report(record(1.0), record(1.0, pass_="forward"))
    broken = dataclasses.replace(record(1.0), status="wrong", measures={})
    new = report(broken, record(1.0, pass_="forward"))
    new.machine = {**new.machine, "torch": "3"}
    comparison = compare(old, new, 0.1)
    notes = " ".join(comparison.notes())
    assert "torch was 2 and is 3" in notes
    assert "softmax_entropy 1024x1000 float32 both was measured before and is lost now" in notes
    assert comparison.status == 1


# The same on a simulated machine, through the whole suite: runs, files and verdicts.

SIMULATED = {"ops": ("softmax_entropy", "multi_teacher_kl"), "passes": ("forward",),
             "providers": FAST, "seconds": 0.2}  # fmt: skip


def simulated(measured, providers, bmtard=2e-3, eager=6e-3):
    return measured(providers(bmtard=bmtard, eager=eager), **SIMULATED)


@pytest.mark.parametrize("busy", [0.0, 0.3])
def test_planted_slowdown_is_found_though_the_machine_became_faster(
    measured, machine, providers, busy
):
    machine.busy = busy
    old = simulated(measured, providers)
    machine.speed, machine.drift = 1.65, 0.02
    slow = simulated(measured, providers, bmtard=3e-3)
    comparison = compare(old, slow, 0.1)
    assert [c.verdict(0.1) for c in comparison.changes] == ["slower", "slower"]
    assert max(c.own for c in comparison.changes) < 1.1
    assert comparison.status == 1


@pytest.mark.parametrize("busy", [0.0, 0.3])
def test_rerun_on_a_machine_that_became_slower_is_the_same(measured, machine, providers, busy):
    machine.busy = busy
    old = simulated(measured, providers)
    machine.speed, machine.drift = 0.6, 0.02
    comparison = compare(old, simulated(measured, providers), 0.1)
    assert [c.verdict(0.1) for c in comparison.changes] == ["same", "same"]
    assert min(c.own for c in comparison.changes) > 1.3
    assert comparison.status == 0


def test_hopeless_noise_is_unclear(measured, machine, providers):
    old = simulated(measured, providers)
    machine.busy, machine.slice_seconds = 0.8, 0.1
    comparison = compare(old, simulated(measured, providers), 0.1)
    assert [c.verdict(0.1) for c in comparison.changes] == ["unclear", "unclear"]
    assert comparison.status == 3


# --- Tables -----------------------------------------------------------------------------------


def test_table_shows_ratio_tie_and_problem():
    wrong = dataclasses.replace(
        record(1.0), provider="compile", status="wrong", reason="entropy is 2", measures={}
    )
    tie = record(102.0, ratio=(0.98, 1.02, 1.05), provider="sklearn")
    made = table.op_table(
        "softmax_entropy", [*pair(100.0, (2.9, 3.0, 3.1)), tie, wrong], 1e10, "cpu"
    )
    text = made.plain()
    assert "3.00 [2.90, 3.10]" in text
    assert "tie [0.98, 1.05]" in text
    assert "WRONG" in text
    assert "1229 %" in text  # 122.88 GB/s of 10
    assert len({len(line) for line in text.splitlines()[2:3]}) == 1


def test_cuda_table_shows_launches_and_graphs():
    row = record(100.0)
    row.kernels, row.waits, row.peak_bytes = 1.0, 0.0, 1 << 20
    row.measures["graph_cold"] = dataclasses.replace(row.measures["wall"], median_us=12.0)
    text = table.op_table("softmax_entropy", [row], 1e10, "cuda").plain()
    assert "12.0 us" in text
    assert text.splitlines()[-1].split()[-3:] == ["1", "0", "1.0"]


@pytest.mark.parametrize(
    ("us", "text"), [(0.5, "0.50 us"), (12.34, "12.3 us"), (999, "999 us"), (1500, "1.50 ms"),
                     (2.5e6, "2.50 s")],
)  # fmt: skip
def test_durations(us, text):
    assert table.duration(us) == text


def test_sweep_table_names_the_cliff():
    points = [
        record(us, shape="sweep-C", dims=(128, c), sweep="C", provider="bmtard")
        for c, us in ((16, 10.0), (32, 20.0), (33, 61.875), (64, 100.0))
    ]
    (row,) = table.sweep_table(points).rows
    assert row[-1] == "3.00 (32 to 33)"


# --- The command ------------------------------------------------------------------------------


def bench(*arguments):
    return cli.bench([*arguments, "--threads", "1"], "bmtard bench")


SMALL = ("--quick", "--op", "softmax_entropy", "--shape", "16x10", "--provider", *FAST)


def test_command_measures_writes_and_draws(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(shapes, "SWEEP_C", (16, 17, 64))
    monkeypatch.setattr(shapes, "SWEEP_N", (1, 2))
    file, pictures = tmp_path / "new" / "a.json", tmp_path / "pictures"
    threads = torch.get_num_threads()
    common = (*SMALL, "--seconds", "0.05", "--json", str(file))
    assert bench(*common, "--sweep", "--plot", str(pictures)) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "16x10" in out
    assert "worst step" in out
    assert {p.name for p in pictures.iterdir()} == {"speedup.png", "roofline.png", "scaling.png"}
    saved = load(file)
    assert (saved.threads, saved.preset) == (1, "quick")
    assert saved.command.startswith("bmtard bench --quick --op softmax_entropy")


def test_command_compares(tmp_path, capsys, measured, machine, providers):
    old, slow, noisy = (tmp_path / name for name in ("old.json", "slow.json", "noisy.json"))
    simulated(measured, providers).save(old)
    simulated(measured, providers, bmtard=2.4e-3).save(slow)
    machine.busy, machine.slice_seconds = 0.8, 0.1
    simulated(measured, providers).save(noisy)
    assert bench("--compare", str(old), str(old)) == 0
    assert bench("--compare", str(old), str(slow)) == 1
    assert "softmax_entropy 16x10 float32 forward" in capsys.readouterr().out
    assert bench("--compare", str(old), str(slow), "--tolerance", "0.3") == 0
    assert bench("--compare", str(old), str(noisy)) == 3
    assert "2 measurement(s) unclear" in capsys.readouterr().out


def test_command_measures_and_compares(tmp_path, capsys, monkeypatch, machine, providers):
    known = cli.catalogue()
    old = tmp_path / "old.json"
    arguments = [*SMALL, "--pass", "forward", "--seconds", "0.2"]

    def simulate(seconds):
        changed = {**known[1], **providers(bmtard=seconds, eager=6e-3)}
        monkeypatch.setattr(cli, "catalogue", lambda: (known[0], changed))

    simulate(2e-3)
    assert bench(*arguments, "--json", str(old)) == 0
    assert bench(*arguments, "--compare", str(old)) == 0
    simulate(3e-3)
    assert bench(*arguments, "--compare", str(old)) == 1
    assert "1 measurement(s) slower than before" in capsys.readouterr().out
    machine.busy, machine.slice_seconds = 0.8, 0.1
    assert bench(*arguments, "--compare", str(old)) == 3
    out = capsys.readouterr().out
    assert "1 of 1 ratios have intervals wider than 10 %" in out
    assert "1 measurement(s) unclear" in out


def test_wrong_provider_makes_the_command_fail(monkeypatch, capsys):
    monkeypatch.setattr(
        Bmtard, "softmax_entropy", lambda self, spec: lambda i: (i.logits.float().sum(-1),)
    )
    assert bench(*SMALL, "--seconds", "0.01") == 1
    assert "wrong bmtard on softmax_entropy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "entropy"), "--op must be one of"),
        (("--shape", "10"), "--shape must be one of"),
        (("--seconds", "0"), "--seconds must be > 0 and < 1e9, got 0.0"),
        (("--max-memory", "-1"), "--max-memory must be > 0 and < 1e9, got -1.0"),
        (("--tolerance", "-0.1"), "--tolerance must lie in"),
        (("--compare", "missing.json"), "missing.json"),
        (("--compare", "a", "b", "c"), "--compare takes one or two files, got 3"),
        (("step", "--op", "softmax_entropy"), "step measures the step alone"),
        (("--threads", "0"), "--threads must be from 1 to 1024, got 0"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--quick", "--full"), "not allowed with"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line_and_status_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_what_was_refused_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    for file in (new, old):
        assert main(["bench", "--op", "softmax", "--json", str(file)]) == 2
    assert not new.exists()
    assert old.read_text() == "kept"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "finds no CUDA device; nothing was measured" in capsys.readouterr().err


def test_plain_tables_without_rich_and_a_clear_error_without_matplotlib(tmp_path):
    """A fresh install has torch and numpy; importing anything else is made impossible here."""
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'tyro', 'sklearn'): sys.modules[name] = None\n"
        "from bmtard.benchmarks.cli import main\n"
        f"arguments = {list(SMALL)!r} + ['sklearn', '--seconds', '0.01', '--threads', '1']\n"
        "arguments += ['--op', 'bisect_temperature']\n"
        "status = main(arguments)\n"
        "status = status or main(['--plot', 'pictures']) - 2\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16x10" in done.stdout
    assert "absent sklearn: cannot import" in done.stdout
    assert "pip install 'bmtard[train]'" in done.stderr


def test_module_and_folder_run_alike():
    checkout = Path(__file__).resolve().parents[2]
    for module in ("bmtard.benchmarks", "benchmarks"):
        if module == "benchmarks" and not (checkout / "benchmarks" / "__main__.py").is_file():
            continue  # tools/test_wheel.py copies the tests alone
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True,
            cwd=checkout,
        )  # fmt: skip
        assert "ops: bisect_temperature" in done.stdout


def test_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bmtard.benchmarks.cli", None)
    assert main(["bench", "--quick"]) == 2
    error = capsys.readouterr().err
    assert "has no bmtard.benchmarks.cli: this installation is incomplete" in error
    assert error.count("\n") == 1
