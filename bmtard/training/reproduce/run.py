"""``bmtard reproduce``: the jobs of a configuration, then its report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from bmtard.training.evaluate import resolve_device
from bmtard.training.files import locked
from bmtard.training.metrics import Display
from bmtard.training.reproduce import jobs as work
from bmtard.training.reproduce.config import ReproduceConfig
from bmtard.training.reproduce.plan import Job, left_out, plan, selected
from bmtard.training.reproduce.pool import Pool
from bmtard.training.reproduce.report import terminal_table, write_report


def reproduce(config: ReproduceConfig, command: str) -> dict[str, str]:
    """Does what is not done yet, and reports on all that is there.

    Returns the jobs that failed, with why. Raises ValueError where the folder has runs of other
    settings. An interruption leaves a folder from which the same call goes on.
    """
    jobs = plan(config)
    with Display(len(jobs)) as display:
        if config.report_only:
            _report(config, jobs, command, {}, display)
            return {}
        with locked(config.output, wait=False):
            wanted = selected(config, jobs)
            _prepare(wanted, config.overwrite)
            for name in left_out(config):
                display.print(f"{name}: left out, pyautoattack is not installed (bmtard[eval])")
            unfinished = [job for job in wanted if not work.is_finished(job)]
            if len(unfinished) < len(wanted):
                display.print(f"{len(wanted) - len(unfinished)} of {len(wanted)} jobs are done")
            display.runs = len(unfinished)
            pool = Pool(_workers(config), config.threads, display)
            try:
                there = [job for job in jobs if work.is_trained(job) and not work.changes(job)]
                pool.run(unfinished, {job.key: job.checkpoint for job in there})
            finally:
                _report(config, jobs, command, pool.failed, display)
            return pool.failed


def _workers(config: ReproduceConfig) -> int:
    if config.jobs is not None:
        return config.jobs
    if resolve_device(config.train.device).type == "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 8)


def _prepare(jobs: Sequence[Job], overwrite: bool) -> None:
    """Refuses what was made with other settings, or clears it away."""
    trained = {job.key: work.changes(job) for job in jobs}
    measured = {job.key: work.changed_measurements(job) for job in jobs}
    # Trainings first: a measurement may differ because the training of its surrogate does.
    found = [(job, trained[job.key]) for job in jobs]
    found += [(job, changes) for job in jobs for changes in measured[job.key].values()]
    for job, changes in found:
        if changes and not overwrite:
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise ValueError(
                f"{job.folder} was made with other settings: {changes[0]}{more}; overwrite it, or "
                "choose another output"
            )
    for job in jobs:
        if trained[job.key]:
            # A name of its own first, so that an interruption leaves no half of a job.
            shutil.rmtree(job.folder.rename(job.folder.with_name(f"{job.key}.{os.getpid()}.old")))
        elif measured[job.key]:
            work.forget_measurements(job, list(measured[job.key]))


def _report(
    config: ReproduceConfig,
    jobs: list[Job],
    command: str,
    failed: dict[str, str],
    display: Display,
) -> None:
    summary = write_report(config, jobs, command, failed)
    if summary["accuracy"]:
        display.print(terminal_table(summary))
    display.print(f"report: {config.output / 'report.md'}")
