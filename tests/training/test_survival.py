"""Runs that are killed, stopped, short of space, damaged or not finite; and their memory."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bmtard import cli
from bmtard.data import ImageData
from bmtard.training import checkpoint, files
from bmtard.training.config import BalanceConfig, OptimizerConfig, TrainConfig
from bmtard.training.metrics import Display, MetricsLog, time_left
from bmtard.training.signals import Stopped, StopRequest
from bmtard.training.trainer import Trainer, replay, train

ROOT = Path(__file__).parents[2]
Changed = Callable[..., TrainConfig]
kill_runs = runpy.run_path(str(ROOT / "tools" / "kill_runs.py"), run_name="kill_runs")
end_of, equal = kill_runs["end_of"], kill_runs["equal"]


def assert_same_end(a: Path, b: Path) -> None:
    ends = end_of(a), end_of(b)
    assert [name for name in ends[0] if not equal(ends[0][name], ends[1][name])] == []


@pytest.fixture
def balanced(with_teachers: Changed) -> TrainConfig:
    """Everything that a checkpoint must hold: balance, momentum, crops, starts, validation."""
    return with_teachers(
        method="bmtard",
        epochs=3,
        crop_padding=1,
        flip=True,
        balance=BalanceConfig(mode="sign", temperature_lr=0.02),
        validation_fraction=0.2,
        validation_steps=2,
    )


def test_killed_at_every_write() -> None:
    """In a process of its own, which has one thread and can be forked."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "kill_runs.py"), "--at-writes"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    kills = re.search(r"^(\d+) kills, 1 runs to their end, 0 problems$", run.stdout, re.MULTILINE)
    assert kills is not None
    assert int(kills[1]) >= 10  # a run from its last checkpoint to its end has more writes


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A process that a shell starts in the background ignores SIGINT, and so does its child."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["step", "validation", "test"])
def test_a_signal_leaves_an_exact_checkpoint(
    moment: str,
    number: signal.Signals,
    balanced: TrainConfig,
    digits: ImageData,
    quiet: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # log_every is 2: the signal comes in the middle of an epoch and between two log lines.
    whole, parts = (
        replace(balanced, output=tmp_path / "a"),
        replace(balanced, output=tmp_path / "b"),
    )
    train(whole, quiet, digits)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer = Trainer(parts, quiet, digits)
    if moment == "step":
        original = trainer._train_step

        def step(x: torch.Tensor, labels: torch.Tensor) -> Any:
            if trainer.step == 6:
                os.kill(os.getpid(), number)
            return original(x, labels)

        monkeypatch.setattr(trainer, "_train_step", step)
        message = r"stopped after epoch 2, batch 3; --resume goes on exactly there, from .*last.pt"
    else:
        epoch, attack = (1, "pgd-sat") if moment == "validation" else (3, "fgsm")

        def within(part: float, text: str) -> None:
            if trainer.epoch == epoch and text.startswith(attack):
                os.kill(os.getpid(), number)

        monkeypatch.setattr(quiet, "within", within)
        message = "epoch 2, batch 4" if moment == "validation" else "after the last epoch"
    with pytest.raises(Stopped, match=message) as stopped:
        trainer.run()
    assert stopped.value.status == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.undo()
    torch.rand(100)  # the generator is somewhere else by now
    train(replace(parts, resume=True), quiet, digits)
    a, b = end_of(whole.folder), end_of(parts.folder)
    a.pop("previous.pt"), b.pop("previous.pt")  # one is of the signal
    assert [name for name in a if not equal(a[name], b[name])] == []


def test_signals_that_are_ignored_or_come_twice() -> None:
    stop = StopRequest()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGINT)
            stop.check()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt) as second:
                os.kill(os.getpid(), signal.SIGTERM)
            assert not isinstance(second.value, Stopped)
            with pytest.raises(Stopped):
                stop.check()
    finally:
        signal.signal(signal.SIGINT, before)
    with stop.listening():
        stop.check()


def test_the_command_line_tells_of_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "digits", "--model=cnn-2", "--method=natural", "--epochs=1",
                 "--device=cpu", "--output", str(out)]  # fmt: skip
    with monkeypatch.context() as patch:
        original = Trainer._train_step

        def step(self: Trainer, x: torch.Tensor, labels: torch.Tensor) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(self, x, labels)

        patch.setattr(Trainer, "_train_step", step)
        assert cli.main(arguments) == 143
    error = capsys.readouterr().err.strip()
    assert error == (
        "bmtard train: stopped after epoch 1, batch 1; --resume goes on exactly there, from "
        f"{out / 'last.pt'}"
    )
    assert cli.main([*arguments, "--resume"]) == 0
    assert checkpoint.load(out / "last.pt")["epoch"] == 1

    def end(arguments: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(cli.COMMANDS, "info", end)
    assert cli.main(["info"]) == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_two_processes_in_one_folder(config: TrainConfig, digits: ImageData, quiet: Any) -> None:
    config = replace(config, method="natural", epochs=1)
    code = (
        "import runpy, sys, pathlib\n"
        f"locked = runpy.run_path({files.__file__!r})['locked']\n"
        f"with locked(pathlib.Path({str(config.folder)!r}), wait=False, name='.train.lock'):\n"
        "    print('mine', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=r"another process works in .*run"):
            train(config, quiet, digits)
        assert not (config.folder / "metrics.jsonl").exists()
        other.kill()
    half = config.folder / "last.pt.1.tmp"
    half.write_text("of a process that was killed")
    train(config, quiet, digits)
    assert not half.exists()


def test_a_full_disk_keeps_the_last_checkpoint(
    balanced: TrainConfig, digits: ImageData, quiet: Any, tmp_path: Path
) -> None:
    whole, parts = (
        replace(balanced, output=tmp_path / "a"),
        replace(balanced, output=tmp_path / "b"),
    )
    train(whole, quiet, digits)

    def fill(text: str) -> None:
        if (parts.folder / "last.pt").exists():
            # What is opened to write the second checkpoint is a device without space.
            (parts.folder / f"last.pt.{os.getpid()}.tmp").symlink_to("/dev/full")

    quiet.advance = fill
    message = r"cannot write .*last.pt: No space left on device; --resume goes on from .*last.pt"
    with pytest.raises(OSError, match=message) as error:
        train(parts, quiet, digits)
    assert "\n" not in str(error.value)
    del quiet.advance
    assert not list(parts.folder.glob("*.tmp"))
    assert checkpoint.load(parts.folder / "last.pt")["epoch"] == 1
    train(replace(parts, resume=True), quiet, digits)
    assert_same_end(whole.folder, parts.folder)


def test_a_full_disk_under_the_metrics(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=None, tensorboard=False)
    log.write("train", 1, loss=1.0)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (closed below)
    with pytest.raises(OSError, match=r"\Acannot write .*metrics.jsonl: No space left on device\Z"):
        log.write("train", 2, loss=1.0)
    log.close()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert cli.main(["train", "digits", "--method=natural", "--output", str(out)]) == 2
    assert capsys.readouterr().err == (f"bmtard train: cannot write into {out}: Not a directory\n")


def test_a_truncated_checkpoint(
    balanced: TrainConfig, digits: ImageData, quiet: Any, tmp_path: Path
) -> None:
    train(balanced, quiet, digits)
    whole = end_of(balanced.folder)
    last, previous = balanced.folder / "last.pt", balanced.folder / "previous.pt"
    assert checkpoint.load(previous)["epoch"] == 2
    last.write_bytes(last.read_bytes()[:1000])
    again = replace(balanced, resume=True)
    quiet.lines.clear()
    trainer = Trainer(again, quiet, digits)
    assert trainer.epoch == 2
    (told,) = quiet.lines
    assert "last.pt is not a complete checkpoint" in told
    assert told.endswith(f"; goes on from {previous}")
    assert checkpoint.load(last)["epoch"] == 2  # so that no save moves the damaged one there
    trainer.run()
    end = end_of(balanced.folder)
    assert [name for name in end if not equal(end[name], whole[name])] == []
    for path in (last, previous):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"previous.pt is not a complete checkpoint"):
        Trainer(again, quiet, digits)


def test_a_lost_checkpoint_leaves_the_one_before_it(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    config = replace(config, method="natural")
    train(config, quiet, digits)
    (config.folder / "last.pt").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(config, quiet, digits)
    trainer = Trainer(replace(config, resume=True), quiet, digits)
    assert trainer.epoch == config.epochs - 1
    assert quiet.lines[-1].endswith(f"does not exist; goes on from {config.folder / 'previous.pt'}")


@pytest.mark.parametrize("entry", ["model", "method", "optimizer"])
def test_a_checkpoint_of_another_network_is_told(
    entry: str, config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    """As of an own model that was changed since."""
    config = replace(config, method="natural")
    train(config, quiet, digits)
    last = config.folder / "last.pt"
    torch.save({**torch.load(last, weights_only=True), entry: {"other": torch.ones(2)}}, last)
    with pytest.raises(ValueError, match=r"resume: .*last.pt does not fit this run: \S+") as error:
        Trainer(replace(config, resume=True), quiet, digits)
    assert "\n" not in str(error.value)


def test_resume_begins_where_there_is_no_checkpoint(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    trainer = Trainer(replace(config, method="natural", resume=True), quiet, digits)
    assert trainer.step == 0
    assert quiet.lines == [f"no checkpoint in {config.folder} yet: begins with the first epoch"]


def test_overwriting_leaves_no_checkpoint_of_the_old_run(
    config: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    config = replace(config, method="natural")
    train(config, quiet, digits)
    assert (config.folder / "previous.pt").exists()
    train(replace(config, epochs=1, overwrite=True), quiet, digits)
    assert not (config.folder / "previous.pt").exists()


@pytest.mark.parametrize("changes", [{"overwrite": True}, {"resume": True}, {}])
def test_a_run_never_writes_over_its_own_teacher(
    with_teachers: Changed, digits: ImageData, quiet: Any, changes: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = with_teachers(**changes)
    config.folder.mkdir()
    monkeypatch.chdir(config.folder)  # so that both paths differ as text
    path = Path("best.pt")
    shutil.copy(cast(Path, config.teacher_clean), path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"teacher clean best\.pt .* choose another output"):
        train(replace(config, teacher_clean=path), quiet, digits)
    assert path.read_bytes() == content


def test_a_refused_run_leaves_no_folder(
    config: TrainConfig, digits: ImageData, quiet: Any, tmp_path: Path
) -> None:
    refused = replace(config, method="ard", teacher_robust=tmp_path / "missing.pt")
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        train(refused, quiet, digits)
    assert not refused.folder.exists()
    refused.folder.mkdir()
    (refused.folder / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        train(refused, quiet, digits)
    assert (refused.folder / "notes.txt").exists()


def test_who_waited_for_a_folder_that_was_removed_owns_the_new_one(tmp_path: Path) -> None:
    folder, order = tmp_path / "run", []

    def wait() -> None:
        with files.locked(folder, wait=True):
            order.append("waited")
            with (
                pytest.raises(ValueError, match="another process works"),
                files.locked(folder, wait=False),
            ):
                pass
            (folder / "written").touch()

    waiting = threading.Thread(target=wait)
    with contextlib.suppress(KeyError), files.locked(folder, wait=False):
        waiting.start()
        # The thread has opened the lock's file: what it waits for is about to be removed.
        while not _opened_twice(folder / ".lock"):
            time.sleep(0.01)
        order.append("failed")
        raise KeyError
    waiting.join(60)
    assert order == ["failed", "waited"]
    assert (folder / "written").exists()


def _opened_twice(path: Path) -> bool:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(link.exists() and link.samefile(path) for link in links) > 1


def test_the_first_non_finite_batch_can_be_replayed(
    with_teachers: Changed, digits: ImageData, quiet: Any
) -> None:
    """A learning rate under which the weights overflow in the second step or soon after."""
    config = with_teachers(
        method="bmtard", log_every=3, max_skipped=1.0,
        optimizer=OptimizerConfig(lr=1e18, schedule="constant"),
    )  # fmt: skip
    trainer = Trainer(config, quiet, digits)
    states: list[dict[str, torch.Tensor]] = []
    outcomes: list[bool] = []
    original = trainer._train_step

    def step(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states.append({k: v.clone() for k, v in trainer.network.state_dict().items()})
        loss, skipped = original(x, labels)
        outcomes.append(bool(skipped))
        return loss, skipped

    trainer._train_step = step  # type: ignore[method-assign]
    trainer.run()
    first = outcomes.index(True)
    assert 0 < first < 6
    path = config.folder / "non-finite.pt"
    state = checkpoint.load(path)
    found = state["non_finite"]
    assert (found["epoch"], found["batch"], found["step"], found["seed"]) == (0, first, first, 0)
    x, labels = next(islice(trainer.batches.epoch(0), first, None))
    assert torch.equal(found["images"], x)
    assert torch.equal(found["labels"], labels)
    assert equal(state["model"], states[first - first % 3])
    (told,) = [line for line in quiet.lines if "--replay" in line]
    assert told == (
        f"epoch 1, batch {first + 1}: loss or gradient not finite, skipped; the same command with "
        f"--replay {path} does it again"
    )
    before = {p: p.read_bytes() for p in config.folder.iterdir() if p.is_file()}
    again = Trainer(replace(config, replay=path), quiet, digits)
    lines = list(again.replay())
    steps = [line for line in lines if line.startswith("epoch")]
    assert [line.split()[-2:] == ["not", "finite"] for line in steps] == outcomes[
        first - first % 3 : first + 1
    ]
    assert any("gradients not finite" in line for line in lines)
    assert equal(dict(again.network.state_dict()), states[first])  # a skipped step changes nothing
    with pytest.raises(ValueError, match=r"train: replay must be None, got .*; call replay\(\)"):
        train(replace(config, replay=path), quiet, digits)
    with pytest.raises(ValueError, match=r"config.replay must be the file of a non-finite step"):
        replay(config, quiet, digits)
    assert before == {p: p.read_bytes() for p in config.folder.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match=r"last.pt was not written because of a non-finite step"):
        list(replay(replace(config, replay=config.folder / "last.pt"), quiet, digits))


def test_replay_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["train", "digits", "--model=cnn-2", "--method=natural", "--epochs=1",
                 "--device=cpu", "--optimizer.lr=1e18", "--optimizer.schedule=constant",
                 "--max-skipped=1", "--output", str(out)]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"the same command with --replay {out / 'non-finite.pt'} does it again" in printed
    assert cli.main([*arguments, "--replay", str(out / "non-finite.pt")]) == 0
    assert "gradients not finite" in capsys.readouterr().out


class _Saved:
    """Stands for a tensor that autograd keeps for a backward pass."""

    live = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        _Saved.live += 1

    def __del__(self) -> None:
        _Saved.live -= 1


def _live_tensors() -> tuple[int, int]:
    """How many there are, and their bytes."""
    gc.collect()
    tensors = [
        item
        for item in gc.get_objects()
        # Other tests of this process may have left sparse ones, which have no size in bytes.
        if type(item) is torch.Tensor and item.layout == torch.strided
    ]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("method", ["trades", "bmtard"])
def test_steps_leave_no_tensor_and_no_graph_behind(
    method: str, with_teachers: Changed, digits: ImageData, quiet: Any
) -> None:
    config = with_teachers(method=method, log_every=3)  # so each epoch ends in the same phase
    trainer = Trainer(config, quiet, digits)
    log = MetricsLog(config.folder, resume_step=None, tensorboard=False)
    counts: list[tuple[int, int, int]] = []
    with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.tensor):
        for _ in range(5):  # epochs of 6 steps
            trainer._train_epoch(log)
            counts.append((*_live_tensors(), _Saved.live))
    log.close()
    assert counts[1:] == [counts[1]] * 4
    assert counts[1][2] == 0


def test_time_left() -> None:
    assert time_left(10, 0, 5) == ""
    assert time_left(10, 5, 0) == ""
    assert time_left(10, 2, 3) == ", 15 s left"
    assert time_left(60, 1, 90) == ", 90 min left"
    assert time_left(600, 0.5, 9.5) == ", 3 h left"
    assert time_left(86400, 1, 3) == ", 3 days left"


def test_plain_progress_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Display(2) as display:
        assert display.bars is None
        run = display.run()
        run.note("before it begins")
        run.begin("run", 4, done=1)
        run.within(0.5, "loss 2")  # too early for a line
        now[0] = 20.0
        run.within(0.5, "loss 1")
        now[0] = 40.0
        run.advance("loss 0.5")
        run.note("something happened")
        run.end("done")
    assert capsys.readouterr().out.splitlines() == [
        "before it begins",
        "run: 1/4, loss 1, 100 s left",
        "run: 2/4, loss 0.5, 80 s left",
        "run: something happened",
        "[1/2] run: done, 40 s left",
    ]


def test_evaluation_tells_its_progress(
    teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Display, "LINE_INTERVAL", -1.0)
    output = tmp_path / "evaluation.json"
    options = ["--attacks", "fgsm", "--limit=60", "--batch-size=20", "--output", str(output)]
    assert cli.main(["evaluate", str(teachers["robust"]), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    accuracy = json.loads(output.read_text())["accuracy"]
    for name in ("clean", "fgsm"):
        assert any(line.startswith(f"{name}: 2/3, 2 of 3 batches, ") for line in lines)
        assert f"{name}: {100 * accuracy[name]:.2f} %" in lines
