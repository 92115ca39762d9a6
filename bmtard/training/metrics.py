"""What a run reports while it runs: lines of JSON, TensorBoard, and progress on the terminal."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from bmtard.extras import import_extra
from bmtard.training.files import write_text


class MetricsLog:
    """``metrics.jsonl`` in a folder, one JSON object a line with a ``step``; and TensorBoard."""

    def __init__(
        self, folder: Path, *, resume_step: int | None, tensorboard: bool, in_epoch: bool = False
    ) -> None:
        """Keeps what is there up to ``resume_step``, and starts anew if that is None.

        in_epoch: the epoch of that step is not over.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept: list[str] = []
        if resume_step is not None and self.path.exists():
            # An interrupted run has logged what its last checkpoint has not seen.
            at_the_end = ("train",) if in_epoch else ("train", "epoch")
            for line in self.path.read_text(errors="replace").splitlines(keepends=True):
                row = _row(line)
                if row is None:
                    break
                seen = row["step"] == resume_step and row["event"] in at_the_end
                if seen or row["step"] < resume_step:
                    kept.append(line)
        write_text(self.path, "".join(kept))
        # Without a buffer, each line is in the file when write returns.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        self._writer = None
        if tensorboard:
            module = import_extra("torch.utils.tensorboard", "train")
            self._writer = module.SummaryWriter(folder / "tensorboard", purge_step=resume_step)

    def write(self, event: str, step: int, **values: Any) -> None:
        line = (json.dumps({"event": event, "step": step, **values}) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from error
        if self._writer is None:
            return
        for name, value in values.items():
            for k, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, (int, float)):
                    tag = f"{name}/{k}" if isinstance(value, list) else name
                    self._writer.add_scalar(f"{event}/{tag}", item, step)

    def sync(self) -> None:
        """Makes the lines outlive a failure of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class NoLog(MetricsLog):
    """That of a process for which rank 0 writes."""

    def __init__(self) -> None:
        pass

    def write(self, event: str, step: int, **values: Any) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def _row(line: str) -> dict[str, Any] | None:
    """None for a line that was cut while it was written, or is none of ours."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    ours = isinstance(row, dict) and isinstance(row.get("step"), int) and "event" in row
    return row if ours else None


def read_metrics(path: Path, event: str = "train") -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` with this event; a last line that is cut is no line."""
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["event"] == event]


class Progress(Protocol):
    """What a run tells while it trains."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """``done`` of ``total`` parts (epochs; in a job, attacks as well) are over already."""

    def advance(self, text: str) -> None:
        """One more part is over."""

    def within(self, part: float, text: str) -> None:
        """``part``, in [0, 1], of the current part is over."""

    def note(self, text: str) -> None:
        """Something happened that the user should know; may come before ``begin``."""

    def end(self, text: str) -> None:
        """The run is over, with this result."""


class NoProgress:
    """Tells nothing, as a process for which rank 0 speaks."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, text: str) -> None:
        pass

    def within(self, part: float, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def end(self, text: str) -> None:
        pass


class Display:
    """Progress of one or several runs: bars on a terminal, plain lines anywhere else.

    A context manager. Runs may overlap: each has its own ``run()``.
    """

    LINE_INTERVAL = 15.0
    """Seconds between two plain lines about the same run."""

    def __init__(self, runs: int = 1) -> None:
        rich = import_extra("rich.progress", "train")
        self.console = import_extra("rich.console", "train").Console()
        self.runs, self.done, self.started = runs, 0, time.monotonic()
        self.bars = None
        if self.console.is_terminal:
            self.bars = rich.Progress(
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            if runs > 1:
                self.overall = self.bars.add_task("all runs", total=runs, text="")

    def __enter__(self) -> Display:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def print(self, content: Any) -> None:
        """A line, or anything that rich can render, above the bars."""
        plain = isinstance(content, str)
        self.console.print(content, highlight=False, markup=not plain, soft_wrap=plain)

    def run(self) -> Progress:
        return _DisplayedRun(self)


class _DisplayedRun:
    def __init__(self, display: Display) -> None:
        self.display, self.title = display, ""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done, self.begun_at = title, total, done, done
        self.started = self.last = time.monotonic()
        if self.display.bars is not None:
            self.task = self.display.bars.add_task(title, total=total, completed=done, text="")

    def advance(self, text: str) -> None:
        self.done += 1
        self._show(self.done, text)

    def within(self, part: float, text: str) -> None:
        self._show(self.done + part, text)

    def note(self, text: str) -> None:
        self.display.print(f"{self.title}: {text}" if self.title else text)

    def _show(self, done: float, text: str) -> None:
        now = time.monotonic()
        if self.display.bars is not None:
            self.display.bars.update(self.task, completed=done, text=text)
        elif now - self.last > self.display.LINE_INTERVAL:
            self.last = now
            left = time_left(now - self.started, done - self.begun_at, self.total - done)
            self.display.print(f"{self.title}: {int(done)}/{self.total}, {text}{left}")

    def end(self, text: str) -> None:
        display = self.display
        display.done += 1
        if display.bars is not None:
            display.bars.remove_task(self.task)
            if display.runs > 1:
                display.bars.update(display.overall, completed=display.done)
        left = count = ""
        if display.runs > 1:
            count = f"[{display.done}/{display.runs}] "
            elapsed = time.monotonic() - display.started
            left = time_left(elapsed, display.done, display.runs - display.done)
        display.print(f"{count}{self.title}: {text}{left}")


def time_left(seconds: float, done: float, left: float) -> str:
    """As ", 12 min left", where ``done`` parts took ``seconds`` and ``left`` more are to come."""
    if done <= 0 or left <= 0:
        return ""
    rest = seconds / done * left
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if rest >= 2 * size:
            return f", {rest / size:.0f} {unit} left"
    return f", {rest:.0f} s left"
