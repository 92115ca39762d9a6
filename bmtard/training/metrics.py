"""What a run reports while it runs: lines of JSON, TensorBoard, and progress on the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from bmtard.extras import import_extra
from bmtard.training.files import write_text


class MetricsLog:
    """``metrics.jsonl`` in a folder, one JSON object a line with a ``step``; and TensorBoard."""

    def __init__(self, folder: Path, *, resume_step: int | None, tensorboard: bool) -> None:
        """Keeps what is there up to ``resume_step``, and starts anew if that is None."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept: list[str] = []
        if resume_step is not None and self.path.exists():
            # An interrupted run has logged steps that its last checkpoint has not seen.
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= resume_step]
        write_text(self.path, "".join(kept))
        self._file = open(self.path, "a")  # noqa: SIM115 (open for the whole run)
        self._writer = None
        if tensorboard:
            module = import_extra("torch.utils.tensorboard", "train")
            self._writer = module.SummaryWriter(folder / "tensorboard", purge_step=resume_step)

    def write(self, event: str, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is None:
            return
        for name, value in values.items():
            for k, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, (int, float)):
                    tag = f"{name}/{k}" if isinstance(value, list) else name
                    self._writer.add_scalar(f"{event}/{tag}", item, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


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

    def end(self, text: str) -> None:
        """The run is over, with this result."""


class Display:
    """Progress of one or several runs: bars on a terminal, plain lines anywhere else.

    A context manager. Runs may overlap: each has its own ``run()``.
    """

    LINE_INTERVAL = 15.0
    """Seconds between two plain lines about the same run."""

    def __init__(self, runs: int = 1) -> None:
        rich = import_extra("rich.progress", "train")
        self.console = import_extra("rich.console", "train").Console()
        self.runs, self.done = runs, 0
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
        self.display = display

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.epoch, self.last = title, total, done, time.monotonic()
        if self.display.bars is not None:
            self.task = self.display.bars.add_task(title, total=total, completed=done, text="")

    def advance(self, text: str) -> None:
        self.epoch += 1
        now = time.monotonic()
        if self.display.bars is not None:
            self.display.bars.update(self.task, completed=self.epoch, text=text)
        elif now - self.last > self.display.LINE_INTERVAL:
            self.last = now
            self.display.print(f"{self.title}: {self.epoch}/{self.total}, {text}")

    def end(self, text: str) -> None:
        display = self.display
        display.done += 1
        if display.bars is not None:
            display.bars.remove_task(self.task)
            if display.runs > 1:
                display.bars.update(display.overall, completed=display.done)
        count = f"[{display.done}/{display.runs}] " if display.runs > 1 else ""
        display.print(f"{count}{self.title}: {text}")
