"""Runs jobs in processes side by side; one that fails does not stop the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from bmtard.training.files import write_text
from bmtard.training.metrics import Display, Progress
from bmtard.training.reproduce.jobs import (
    ERROR,
    missing,
    run_evaluation,
    run_training,
)
from bmtard.training.reproduce.plan import Job
from bmtard.training.signals import Stopped


@dataclass(slots=True)
class _Task:
    """Half of a job: its training, or its evaluation."""

    job: Job
    training: bool


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    task: _Task | None = None


@dataclass(slots=True)
class Pool:
    """``workers`` processes of ``threads`` threads each."""

    workers: int
    threads: int
    display: Display
    failed: dict[str, str] = field(default_factory=dict)
    """key -> why, in a line"""

    def run(self, jobs: list[Job], trained: dict[str, Path]) -> None:
        """Works through the jobs, the first that can begin first.

        trained: key -> checkpoint, of all that are there, other jobs included; grows.
        """
        tasks = [
            _Task(job, training)
            for job in jobs
            for training in (True, False)
            if (job.key not in trained if training else missing(job))
        ]
        planned = {task.job.key for task in tasks if task.training}
        shown: dict[str, Progress] = {}
        crew: list[_Worker] = []
        try:
            while tasks or any(worker.task for worker in crew):
                tasks = self._skip(tasks, trained, shown)
                self._hand_out(tasks, crew, trained, planned)
                busy = [worker for worker in crew if worker.task]
                if not busy:
                    continue  # the rest was skipped
                for ready in wait([worker.connection for worker in busy]):
                    worker = next(w for w in busy if w.connection is ready)
                    self._listen(worker, crew, trained, shown)
        finally:
            for worker in crew:
                worker.process.terminate()  # all that it does can be continued
            for worker in crew:
                worker.process.join()

    def _skip(
        self, tasks: list[_Task], trained: dict[str, Path], shown: dict[str, Progress]
    ) -> list[_Task]:
        """Without those that can never begin, which are told."""
        left: list[_Task] = []
        for task in tasks:
            key = task.job.key
            gone = [
                teacher
                for teacher in task.job.teachers.values()
                if teacher in self.failed and teacher not in trained
            ]
            if gone and task.training and key not in self.failed:
                self._fail(task.job, f"skipped, since {gone[0]} failed", shown)
            if key not in self.failed:
                left.append(task)
        return left

    def _hand_out(
        self,
        tasks: list[_Task],
        crew: list[_Worker],
        trained: dict[str, Path],
        planned: set[str],
    ) -> None:
        for task in list(tasks):
            if not self._can_begin(task, trained, planned):
                continue
            crew[:] = [worker for worker in crew if worker.task or worker.process.is_alive()]
            worker = next((worker for worker in crew if not worker.task), None)
            if worker is None:
                if len(crew) == self.workers:
                    return
                worker = self._hire()
                crew.append(worker)
            tasks.remove(task)
            worker.task = task
            surrogates = {
                m.surrogate: trained[m.surrogate]
                for m in task.job.measurements
                if m.surrogate in trained
            }
            with contextlib.suppress(BrokenPipeError):  # _listen finds out why
                worker.connection.send((task.job, task.training, surrogates))

    def _can_begin(self, task: _Task, trained: dict[str, Path], planned: set[str]) -> bool:
        if task.training:
            return all(teacher in trained for teacher in task.job.teachers.values())
        surrogates = {m.surrogate for m in task.job.measurements if m.surrogate in planned}
        return task.job.key in trained and all(
            key in trained or key in self.failed for key in surrogates
        )

    def _hire(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.threads))
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _listen(
        self,
        worker: _Worker,
        crew: list[_Worker],
        trained: dict[str, Path],
        shown: dict[str, Progress],
    ) -> None:
        task = worker.task
        assert task is not None
        try:
            kind, *values = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            crew.remove(worker)
            why = f"its process ended with status {worker.process.exitcode}"
            with contextlib.suppress(OSError):  # the folder is not there before the work begins
                write_text(task.job.folder / ERROR, f"{why}\n")
            self._fail(task.job, why, shown)
            return
        key = task.job.key
        if kind == "begin":
            if key not in shown:
                shown[key] = self.display.run()
                shown[key].begin(*values)
        elif kind == "advance":
            shown[key].advance(*values)
        elif kind == "within":
            shown[key].within(*values)
        elif kind == "note":
            self.display.print(f"{task.job.name}, seed {task.job.seed}: {values[0]}")
        else:
            worker.task = None
            if kind == "failed":
                self._fail(task.job, values[0], shown)
            elif task.training:
                trained[key] = task.job.checkpoint
            else:
                shown[key].end(*values)

    def _fail(self, job: Job, why: str, shown: dict[str, Progress]) -> None:
        self.failed[job.key] = why
        if job.key not in shown:
            shown[job.key] = self.display.run()
            shown[job.key].begin(f"{job.name}, seed {job.seed}", 1)
        shown[job.key].end(why)


class _Sender:
    """A :class:`Progress` in a worker."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self.connection.send(("begin", title, total, done))

    def advance(self, text: str) -> None:
        self.connection.send(("advance", text))

    def within(self, part: float, text: str) -> None:
        self.connection.send(("within", part, text))

    def note(self, text: str) -> None:
        self.connection.send(("note", text))

    def end(self, text: str) -> None:
        """Told by the task's result."""


def _work(connection: Connection, threads: int) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    progress = _Sender(connection)
    while True:
        try:
            job, training, surrogates = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, ...]
        try:
            if training:
                run_training(job, progress)
                answer = ("done",)
            else:
                answer = ("done", run_evaluation(job, surrogates, progress))
        except Stopped:
            return
        except Exception as error:
            text = str(error).partition("\n")[0]
            answer = ("failed", f"failed: {type(error).__name__}: {text}")
            try:
                write_text(job.folder / ERROR, traceback.format_exc())
            except OSError as unwritable:
                answer = ("failed", f"{answer[1]} (and {ERROR} could not be written: {unwritable})")
        connection.send(answer)


def _end_with_parent() -> None:
    """A killed parent leaves no process behind that works on its jobs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
