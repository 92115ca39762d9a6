"""bmtard reproduce: what it runs, that it goes on after every kind of stop, and its report."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bmtard import cli
from bmtard.training import checkpoint
from bmtard.training.config import AttackConfig
from bmtard.training.files import locked, read_json
from bmtard.training.metrics import Display
from bmtard.training.reproduce import (
    REPRODUCE_PRESETS,
    ReproduceConfig,
    ReproduceEvaluation,
    jobs,
    reproduce,
)
from bmtard.training.reproduce.plan import Job, digest, plan, selected, with_settings
from bmtard.training.reproduce.pool import Pool, _Task, _Worker

DIGITS = REPRODUCE_PRESETS["digits"][1]
STUDENTS = ("natural", "sat", "bmtard, sign")


def small(output: Path, **changes: Any) -> ReproduceConfig:
    """Two teachers and three students, seconds each."""
    config = replace(
        DIGITS,
        train=replace(
            DIGITS.train,
            model="cnn-2",
            epochs=3,
            batch_size=64,
            attack=AttackConfig(epsilon=0.1, step_size=0.05, steps=1),
            train_limit=256,
            validation_fraction=0.1,
            validation_seed=0,
            validation_steps=2,
            log_every=2,
            checkpoint_every=1,
        ),
        teacher_clean="method=natural model=cnn-4",
        teacher_robust="method=sat model=cnn-4",
        students=STUDENTS,
        evaluation=ReproduceEvaluation(
            attacks=("fgsm", "pgd-sat", "transfer-pgd"), limit=60, limits={"fgsm": 20}
        ),
        seeds=1,
        jobs=1,
        output=output,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ReproduceConfig:
    """Run once, never interrupted."""
    config = small(tmp_path_factory.mktemp("finished") / "out", jobs=2)
    assert reproduce(config, "bmtard reproduce the test") == {}
    return config


def results(config: ReproduceConfig) -> Any:
    return json.loads((config.output / "results.json").read_text())


def assert_equal_runs(a: ReproduceConfig, b: ReproduceConfig) -> None:
    """All numbers but times, and all weights."""
    for job, other in zip(plan(a), plan(b), strict=True):
        for name in ("last.pt", "best.pt"):
            ours, theirs = (checkpoint.load(x.folder / name) for x in (job, other))
            assert (ours["epoch"], ours["best"]) == (theirs["epoch"], theirs["best"])
            for key, value in ours["model"].items():
                assert torch.equal(value, theirs["model"][key]), (job.key, name, key)
    ours, theirs = results(a)["jobs"], results(b)["jobs"]
    assert ours.keys() == theirs.keys()
    for key in ours:
        for record in (ours[key], theirs[key]):
            del record["seconds"], record["attack_seconds"]
            for row in record["epochs"]:
                del row["seconds"]
        assert ours[key] == theirs[key]


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def hire(self: Pool) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(Pool, "_hire", hire)


# ---- the plan ----


def test_the_plan_goes_seed_by_seed_and_every_job_knows_its_teachers() -> None:
    config = small(Path("out"), seeds=2, teacher_seeds=1)
    found = plan(config)
    assert [job.key for job in found] == [
        "teacher-clean-seed0", "teacher-robust-seed0",
        "natural-seed0", "sat-seed0", "bmtard-sign-seed0",
        "natural-seed1", "sat-seed1", "bmtard-sign-seed1",
    ]  # fmt: skip
    student = found[-1]
    assert student.teachers == {"robust": "teacher-robust-seed0", "clean": "teacher-clean-seed0"}
    assert student.train.teacher_robust == Path("out/jobs/teacher-robust-seed0/best.pt")
    assert (student.train.method, student.train.balance.mode) == ("bmtard", "sign")
    assert (student.train.seed, student.train.validation_seed) == (1, 0)
    assert student.settings["teachers"]["robust"]["model"] == "cnn-4"
    # A student is attacked through the robust teacher and through the other students' sat.
    transfers = {m.name: m.surrogate for m in student.measurements if m.surrogate}
    assert transfers == {
        "transfer-pgd from teacher, robust": "teacher-robust-seed0",
        "transfer-pgd from sat": "sat-seed1",
    }
    assert {m.name: m.images for m in found[0].measurements} == {
        "clean": 60, "fgsm": 20, "pgd-sat": 60,
    }  # fmt: skip
    only = selected(replace(config, only=("bmtard, sign",)), found)
    assert [job.key for job in only] == [
        "teacher-clean-seed0", "teacher-robust-seed0", "bmtard-sign-seed0", "bmtard-sign-seed1",
    ]  # fmt: skip
    assert [job.key for job in selected(replace(config, only=("sat",)), found)] == [
        "sat-seed0", "sat-seed1",
    ]  # fmt: skip


@pytest.mark.parametrize("name", REPRODUCE_PRESETS)
def test_presets_can_be_planned(name: str) -> None:
    config = REPRODUCE_PRESETS[name][1]
    found = plan(config)
    teachers = 2 * (config.teacher_seeds or config.seeds)
    assert len(found) == config.seeds * len(config.students) + teachers
    assert config.output.name == name
    # Students are trained under equal conditions.
    students = [job.settings["train"] for job in found if not job.name.startswith("teacher")]
    for field in ("epochs", "model", "attack", "optimizer", "train_limit", "validation_fraction"):
        assert all(settings[field] == students[0][field] for settings in students)


def test_settings_of_all_students_are_in_the_report(tmp_path: Path) -> None:
    config = small(tmp_path, student="epochs=2 model=cnn-3", report_only=True)
    trained = {job.name: (job.train.epochs, job.train.model) for job in plan(config)}
    assert trained.pop("teacher, clean") == trained.pop("teacher, robust") == (3, "cnn-4")
    assert set(trained.values()) == {(2, "cnn-3")}
    reproduce(config, "look")
    text = (tmp_path / "report.md").read_text()
    assert "- students: cnn-3;" in text
    assert "of the students: 2 epochs" in text


def test_settings_of_single_runs() -> None:
    config = small(
        Path("out"),
        students=("rslad", "slow"),
        tuned=("rslad: loss.distillation_scale=3",),
        changes=(
            "rslad: optimizer.milestones=0.25,0.5",
            "slow: method=bmtard balance.temperature_lr=0.001",
            "teacher, clean: epochs=7",
        ),
    )
    found = {job.name: job.train for job in plan(config)}
    assert found["rslad"].loss.distillation_scale == 3.0
    assert found["rslad"].optimizer.milestones == (0.25, 0.5)
    assert (found["slow"].method, found["slow"].balance.temperature_lr) == ("bmtard", 0.001)
    assert (found["teacher, clean"].epochs, found["teacher, robust"].epochs) == (7, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": ("fast",)}, r"fast: no method; known students are 'natural', "),
        ({"changes": ("rslad: epochs=1",)}, r"NAME one of 'teacher, clean', .* got 'rslad: ep"),
        ({"changes": ("sat: epochs",)}, r"sat: a setting must be FIELD=VALUE, got 'epochs'"),
        ({"changes": ("sat: epoch=3",)}, r"sat: 'method=sat epoch=3' cannot be set: .*epoch"),
        ({"changes": ("sat: epochs=0",)}, r"epochs must be >= 1, got 0"),
        ({"teacher_robust": "method=rslad"}, r"method rslad needs teachers itself"),
        ({"only": ("trades",)}, r"only: must be of .*'sat'.*; got 'trades'"),
        ({"seeds": 2, "teacher_seeds": 3}, r"teacher_seeds must be in \[1, seeds\], got 3"),
        ({"train": replace(DIGITS.train, seed=3)}, r"train.seed is decided for each run"),
    ],
)
def test_bad_requests(changes: dict[str, Any], message: str) -> None:
    def ask() -> None:
        config = small(Path("out"), **changes)
        selected(config, plan(config))

    with pytest.raises(ValueError, match=message):
        ask()


def test_the_main_attack_sees_all_images() -> None:
    with pytest.raises(ValueError, match=r"limits must be of other attacks than main"):
        ReproduceEvaluation(limits={"pgd-sat": 10})
    with pytest.raises(ValueError, match=r"main must be one of attacks"):
        ReproduceEvaluation(attacks=("fgsm",))


# ---- the report ----


def test_report(finished: ReproduceConfig) -> None:
    summary = results(finished)
    names = ["teacher, clean", "teacher, robust", *STUDENTS]
    assert list(summary["accuracy"]) == names
    assert summary["unfinished"] == {}
    assert summary["command"] == "bmtard reproduce the test"
    text = (finished.output / "report.md").read_text()
    for name in names:
        (seed,) = summary["accuracy"][name]
        weighted = 50 * (seed["clean"] + seed["pgd-sat"])
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        assert cells[0] == f"{100 * seed['clean']:.1f}"
        assert cells[-1] == f"{weighted:.1f}"
        # Transfer attacks are made against students, on another network.
        assert cells.count("-") == {"s": 1, "t": 2}.get(name[0], 0)
    pictures = re.findall(r"\]\((\S+\.png)\)", text)
    assert pictures == ["accuracy.png", "validation.png", "balance.png", "examples.png"]
    for picture in pictures:
        assert (finished.output / picture).stat().st_size > 10_000
    record = summary["jobs"]["sat-seed0"]
    assert record["images"] == {
        "clean": 60, "fgsm": 20, "pgd-sat": 60, "transfer-pgd from teacher, robust": 60,
    }  # fmt: skip
    scores = [row["weighted"] for row in record["epochs"]]
    assert record["chosen_epoch"] == 1 + scores.index(max(scores))
    chosen = checkpoint.load(finished.output / "jobs" / "sat-seed0" / "best.pt")
    assert chosen["epoch"] == record["chosen_epoch"]
    assert summary["settings"]["bmtard, sign"]["balance"]["mode"] == "sign"
    assert summary["machine"]["device"] == "cpu"


def test_measured_as_bmtard_evaluate_does(finished: ReproduceConfig, tmp_path: Path) -> None:
    path = finished.output / "jobs" / "sat-seed0" / "best.pt"
    out = tmp_path / "e.json"
    arguments = ["--attacks", "fgsm", "pgd-sat", "--limit", "60", "--output", str(out)]
    assert cli.main(["evaluate", str(path), *arguments]) == 0
    expected = json.loads(out.read_text())["accuracy"]
    record = results(finished)["jobs"]["sat-seed0"]["accuracy"]
    assert (record["clean"], record["pgd-sat"]) == (expected["clean"], expected["pgd-sat"])


def test_report_from_what_is_there(
    finished: ReproduceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run in its middle: one job trained and measured, one in its second epoch."""
    config = small(tmp_path, seeds=2)
    copied = ("teacher-clean-seed0", "bmtard-sign-seed0")
    for key in copied:
        source, target = finished.output / "jobs" / key, tmp_path / "jobs" / key
        target.mkdir(parents=True)
        for path in source.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    student = tmp_path / "jobs" / copied[1]
    (student / "results.json").unlink()
    lines = (student / "metrics.jsonl").read_text().splitlines(keepends=True)
    (student / "metrics.jsonl").write_text("".join(lines[:4]) + '{"event": "tr')
    forbid_work(monkeypatch)
    assert reproduce(replace(config, report_only=True), "look") == {}
    summary = results(config)
    assert list(summary["accuracy"]) == ["teacher, clean"]
    assert summary["unfinished"]["bmtard-sign-seed0"] == "1 of 3 epochs"
    assert summary["unfinished"]["sat-seed1"] == "not begun"
    text = (tmp_path / "report.md").read_text()
    assert "of the students: 3 epochs of batches of 64, SGD, cyclic learning rate" in text
    assert "- bmtard-sign-seed0: 1 of 3 epochs" in text
    assert (tmp_path / "balance.png").exists()
    # Nothing at all is a report as well.
    empty = replace(config, output=tmp_path / "empty", report_only=True)
    assert reproduce(empty, "look") == {}
    assert "Nothing is measured yet." in (tmp_path / "empty" / "report.md").read_text()


# ---- going on ----


def test_a_finished_folder_is_kept(
    finished: ReproduceConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in finished.output.glob("jobs/*/*") if p.is_file()}
    forbid_work(monkeypatch)
    assert reproduce(finished, "bmtard reproduce the test") == {}
    assert before == {p: p.read_bytes() for p in finished.output.glob("jobs/*/*") if p.is_file()}
    assert "5 of 5 jobs are done" in capsys.readouterr().out


class Interrupted(Exception):
    pass


class StopAfter:
    """A progress that is interrupted when so many parts are over."""

    def __init__(self, parts: int) -> None:
        self.left = parts

    def begin(self, title: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, text: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted

    def within(self, part: float, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def end(self, text: str) -> None:
        pass


def test_stopped_inside_jobs_equals_never_stopped(
    finished: ReproduceConfig, tmp_path: Path
) -> None:
    config = small(tmp_path)
    clean, robust, *_ = plan(config)
    for job, epochs in ((clean, 1), (robust, 2)):
        with pytest.raises(Interrupted):
            jobs.run_training(job, StopAfter(epochs + 1))
        assert checkpoint.load(job.folder / "last.pt")["epoch"] == epochs
    jobs.run_training(clean, StopAfter(-1))
    with pytest.raises(Interrupted):
        jobs.run_evaluation(clean, {}, StopAfter(2))
    assert list(read_json(clean.folder / jobs.EVALUATION)) == ["clean", "fgsm"]
    stopped = read_json(clean.folder / jobs.EVALUATION)
    assert reproduce(config, "again") == {}
    assert_equal_runs(finished, config)
    # What was measured before the stop was not measured again.
    after = read_json(clean.folder / jobs.EVALUATION)
    assert {name: after[name] for name in stopped} == stopped


def test_killed_and_started_again(finished: ReproduceConfig, tmp_path: Path) -> None:
    """SIGKILL of the command between its first checkpoint and its end: no process goes on, and the
    next start ends with the same numbers."""
    config = small(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_reproduce import reproduce, small\n"
        "if __name__ == '__main__':\n"
        "    reproduce(small(Path(sys.argv[2])), 'killed')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    run = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)])
    try:
        while not list(tmp_path.glob("jobs/*/last.pt")):
            assert run.poll() is None
            time.sleep(0.05)  # leaves the core to the run
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert not (tmp_path / "results.json").exists()
    assert reproduce(config, "again") == {}
    assert_equal_runs(finished, config)


def test_other_settings_are_refused(
    finished: ReproduceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_work(monkeypatch)
    other = replace(finished, changes=("sat: loss.trades_beta=1",))
    message = r"sat-seed0 was made with other settings: train.loss.trades_beta is 1.0, was 6.0; ov"
    with pytest.raises(ValueError, match=message):
        reproduce(other, "other")
    # A student of another teacher is another student.
    other = replace(finished, teacher_robust="method=sat model=cnn-3", only=("bmtard, sign",))
    with pytest.raises(ValueError, match=r"teacher-robust-seed0 .* train.model is 'cnn-3', was"):
        reproduce(other, "other")
    (job,) = (job for job in plan(other) if job.name == "bmtard, sign")
    assert jobs.changes(job) == ["teachers.robust.model is 'cnn-3', was 'cnn-4'"]
    evaluation = replace(finished.evaluation, limits={"fgsm": 30})
    with pytest.raises(ValueError, match=r"images is 30, was 20"):
        reproduce(replace(finished, evaluation=evaluation), "other")
    # An option that was not there yet had its default.
    settings = finished.output / "jobs" / "bmtard-sign-seed0" / jobs.SETTINGS
    written = settings.read_text()
    saved = json.loads(written)
    del saved["train"]["validation_every"], saved["teachers"]["robust"]["loss"]["ard_alpha"]
    settings.write_text(json.dumps(saved))
    assert reproduce(finished, "bmtard reproduce the test") == {}
    settings.write_text(written)
    # So had the network that a transfer attack was made on.
    surrogate = finished.output / "jobs" / "sat-seed0" / jobs.SETTINGS
    measured = finished.output / "jobs" / "natural-seed0" / jobs.EVALUATION
    written = {path: path.read_text() for path in (surrogate, measured)}
    saved, found = (json.loads(text) for text in written.values())
    del saved["train"]["awp"], saved["train"]["loss"]["mart_beta"]
    surrogate.write_text(json.dumps(saved))
    with_it = found["transfer-pgd from sat"]["settings"]
    with_it["surrogate_settings"] = digest(saved)
    measured.write_text(json.dumps(found))
    assert reproduce(finished, "bmtard reproduce the test") == {}
    with_it["surrogate_settings"] = digest(saved | {"train": {}})  # measured on another one
    measured.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"natural-seed0 .* surrogate_settings is"):
        reproduce(finished, "bmtard reproduce the test")
    for path, text in written.items():
        path.write_text(text)
    # The report leaves such runs out, and says so.
    report = replace(finished, changes=("sat: loss.trades_beta=1",), report_only=True)
    reproduce(report, "look")
    summary = results(finished)
    assert "sat" not in summary["accuracy"]
    assert "trades_beta is 1.0, was 6.0" in summary["unfinished"]["sat-seed0"]
    reproduce(replace(finished, report_only=True), "look")
    assert "sat" in results(finished)["accuracy"]


def test_overwrite_does_again_what_differs_and_keeps_the_rest(tmp_path: Path) -> None:
    config = small(tmp_path, students=("natural", "sat"), only=("natural", "sat"))
    assert reproduce(config, "first") == {}
    natural, sat = (job for job in plan(config) if not job.name.startswith("teacher"))
    assert jobs.missing(natural) != []  # the teacher was not trained, so no transfer from it
    kept = (natural.folder / "last.pt").read_bytes()
    old = (sat.folder / "last.pt").read_bytes()
    evaluation = replace(config.evaluation, limits={"fgsm": 30})
    changed = replace(
        config, changes=("sat: optimizer.lr=0.05",), evaluation=evaluation, overwrite=True
    )
    assert reproduce(changed, "second") == {}
    assert (natural.folder / "last.pt").read_bytes() == kept
    assert (sat.folder / "last.pt").read_bytes() != old
    assert read_json(natural.folder / jobs.EVALUATION)["fgsm"]["images"] == 30
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == [
        "natural-seed0", "sat-seed0",
    ]  # fmt: skip


# ---- failures ----

DIVERGES = "optimizer.lr=1e30 optimizer.schedule=constant"


def test_a_failed_job_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, teacher_robust=f"method=sat model=cnn-4 {DIVERGES}")
    failed = reproduce(config, "test")
    assert list(failed) == ["teacher-robust-seed0", "bmtard-sign-seed0"]
    assert failed["teacher-robust-seed0"].startswith("failed: NonFiniteLossError: epoch 1: ")
    assert failed["bmtard-sign-seed0"] == "skipped, since teacher-robust-seed0 failed"
    error = (tmp_path / "jobs" / "teacher-robust-seed0" / "error.txt").read_text()
    assert "Traceback" in error
    assert "NonFiniteLossError" in error
    printed = capsys.readouterr().out
    assert re.search(r"\[\d/5\] teacher, robust, seed 0: failed: NonFiniteLossError", printed)
    summary = results(config)
    assert list(summary["accuracy"]) == ["teacher, clean", "natural", "sat"]
    assert set(summary["unfinished"]) == {
        "teacher-robust-seed0", "bmtard-sign-seed0", "natural-seed0", "sat-seed0",
    }  # fmt: skip
    missing = "not measured: transfer-pgd from teacher, robust"
    assert summary["unfinished"]["sat-seed0"] == missing
    # Repaired, the same folder goes on; what does not differ is kept.
    kept = (tmp_path / "jobs" / "sat-seed0" / "last.pt").read_bytes()
    repaired = replace(small(tmp_path), overwrite=True)
    assert reproduce(repaired, "test") == {}
    assert (tmp_path / "jobs" / "sat-seed0" / "last.pt").read_bytes() == kept
    assert not list(tmp_path.glob("jobs/*/error.txt"))
    assert results(config)["unfinished"] == {}


def test_a_process_that_dies_fails_its_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = Pool._listen

    def kill_natural(self: Pool, worker: Any, *rest: Any) -> None:
        if worker.task.job.name == "natural":
            worker.process.kill()
        listen(self, worker, *rest)

    monkeypatch.setattr(Pool, "_listen", kill_natural)
    config = small(tmp_path, students=("natural", "sat"), only=("natural", "sat"))
    failed = reproduce(config, "test")
    assert failed == {"natural-seed0": "its process ended with status -9"}
    assert list(results(config)["accuracy"]) == ["sat"]
    assert "status -9" in (tmp_path / "jobs" / "natural-seed0" / "error.txt").read_text()


def test_a_process_that_dies_before_its_folder_is_there(tmp_path: Path) -> None:
    config = small(tmp_path, students=("natural",), only=("natural",))
    job = next(job for job in plan(config) if job.name == "natural")
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    theirs.close()
    process = multiprocessing.get_context("spawn").Process(target=sys.exit, args=(3,))
    process.start()
    worker = _Worker(process, ours, _Task(job, training=True))
    crew = [worker]
    with Display() as display:
        pool = Pool(1, 1, display)
        pool._listen(worker, crew, {}, {})
    assert pool.failed == {job.key: "its process ended with status 3"}
    assert crew == []


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    config = small(tmp_path)
    with (
        locked(tmp_path, wait=False),
        pytest.raises(ValueError, match=f"another process works in {tmp_path}"),
    ):
        reproduce(config, "test")


def test_the_exit_status_tells_of_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "reproduce", "digits", "--train.model", "cnn-2", "--train.epochs", "1", "--seeds", "1",
        "--students", "natural", "--only", "natural", "--output", str(tmp_path),
    ]  # fmt: skip
    assert cli.main([*arguments, "--changes", f"natural: {DIVERGES}"]) == 1
    assert "NonFiniteLossError" in capsys.readouterr().out
    assert cli.main([*arguments]) == 2
    assert "was made with other settings: train.optimizer.lr is 0.1" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_job_names_are_file_names() -> None:
    config = small(Path("out"), changes=("a/b: method=sat",), students=("a/b",))
    job: Job = plan(config)[-1]
    assert job.folder == Path("out/jobs/a-b-seed0")
    clash = small(
        Path("out"), changes=("a/b: method=sat", "a b: method=sat"), students=("a/b", "a b")
    )
    with pytest.raises(ValueError, match=r"names must differ in letters"):
        plan(clash)
    assert with_settings(config.train, "", "nothing") == config.train
