"""The work of a job, and what its folder tells about it."""

from __future__ import annotations

import functools
import io
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmtard.attacks import pgd
from bmtard.data import ImageData, load
from bmtard.training import checkpoint
from bmtard.training.config import saved_settings
from bmtard.training.evaluate import SUITE, accuracies, resolve_device
from bmtard.training.files import locked, read_json, remove_temporaries, write_json
from bmtard.training.metrics import Progress, read_metrics
from bmtard.training.report import machine
from bmtard.training.reproduce.plan import Job, Measurement, deciding, digest
from bmtard.training.trainer import train

SETTINGS = "job.json"
"""what decides the numbers; written before the work begins"""
MACHINE = "machine.json"
"""where the work was done"""
EVALUATION = "evaluation.json"
"""what is measured: rewritten after each attack"""
ERROR = "error.txt"
"""the traceback of the last attempt, if it failed"""
EXAMPLES = "examples.npz"
"""adversarial examples, for their picture"""

# Jobs of a preset share their data, so a process reads them once.
_load = functools.lru_cache(maxsize=1)(load)


def is_trained(job: Job) -> bool:
    return (job.folder / "results.json").exists() and job.checkpoint.exists()


def missing(job: Job) -> list[Measurement]:
    """What is not measured yet."""
    found = read_json(job.folder / EVALUATION) or {}
    return [m for m in job.measurements if m.name not in found]


def is_finished(job: Job) -> bool:
    return is_trained(job) and not missing(job)


def changes(job: Job) -> list[str]:
    """How the settings of what is in the folder differ from the wanted ones."""
    found = read_json(job.folder / SETTINGS)
    if found is None:
        return []
    return _differences(job.settings, _filled(found))


def _filled(found: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file; an option that was not there yet has its default."""
    return {
        "train": deciding(saved_settings(found["train"])),
        "teachers": {
            role: deciding(saved_settings(teacher)) for role, teacher in found["teachers"].items()
        },
    }


def changed_measurements(job: Job) -> dict[str, list[str]]:
    """The same for the attacks: name -> differences."""
    found = read_json(job.folder / EVALUATION) or {}
    pairs = {
        m.name: _differences(_plain(m), _known(job, m, found[m.name]["settings"]))
        for m in job.measurements
        if m.name in found
    }
    return {name: differences for name, differences in pairs.items() if differences}


def _known(job: Job, measurement: Measurement, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the wanted digest of the surrogate's, if they were made from that one,
    before an option was there."""
    if measurement.surrogate is None:
        return settings
    surrogate = read_json(job.folder.parent / measurement.surrogate / SETTINGS)
    wanted = measurement.surrogate_settings
    same = surrogate and digest(_filled(surrogate)) == wanted
    if same and settings["surrogate_settings"] == digest(surrogate):
        return {**settings, "surrogate_settings": wanted}
    return settings


def _plain(measurement: Measurement) -> dict[str, Any]:
    return asdict(measurement)


def _differences(wanted: Any, found: Any, name: str = "") -> list[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        return [
            difference
            for key in keys
            for difference in _differences(
                wanted.get(key), found.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if wanted == found else [f"{name} is {wanted!r}, was {found!r}"]


def forget_measurements(job: Job, names: list[str]) -> None:
    found = read_json(job.folder / EVALUATION) or {}
    write_json(job.folder / EVALUATION, {n: v for n, v in found.items() if n not in names})


class _Training:
    """The progress of a training inside that of its job."""

    def __init__(self, progress: Progress, job: Job) -> None:
        self.progress, self.job = progress, job

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self.progress.begin(f"{self.job.name}, seed {self.job.seed}", parts(self.job), done)

    def advance(self, text: str) -> None:
        self.progress.advance(text)

    def within(self, part: float, text: str) -> None:
        self.progress.within(part, text)

    def note(self, text: str) -> None:
        self.progress.note(text)

    def end(self, text: str) -> None:
        """The job goes on with its evaluation."""


def parts(job: Job) -> int:
    """Epochs and attacks."""
    return job.train.epochs + len(job.measurements)


def run_training(job: Job, progress: Progress) -> None:
    """Trains to the last epoch, from the last checkpoint if there is one."""
    with locked(job.folder, wait=True):
        _tidy(job.folder)
        write_json(job.folder / SETTINGS, job.settings)
        write_json(job.folder / MACHINE, _machine(resolve_device(job.train.device)))
        data = _data(job)
        config = replace(job.train, resume=checkpoint.resumable(job.folder))
        train(config, _Training(progress, job), data)


def run_evaluation(job: Job, surrogates: dict[str, Path], progress: Progress) -> str:
    """Measures what is not measured yet; returns the result in a line.

    surrogates: key -> checkpoint, of those that are trained.
    """
    with locked(job.folder, wait=True):
        _tidy(job.folder)
        device = resolve_device(job.train.device)
        data = _data(job)
        network, _ = checkpoint.load_network(job.checkpoint, device)
        left = missing(job)
        done = parts(job) - len(left)
        progress.begin(f"{job.name}, seed {job.seed}", parts(job), done)
        found = read_json(job.folder / EVALUATION) or {}
        for m in left:
            if m.surrogate is not None and m.surrogate not in surrogates:
                continue
            started = time.perf_counter()
            count = len(data.test_labels[: m.images])
            result = accuracies(
                network,
                data.test_images[:count],
                data.test_labels[:count],
                attacks=() if m.attack == "clean" else (m.attack,),
                epsilon=m.epsilon,
                norm=m.norm,  # type: ignore[arg-type]
                max_value=data.max_value,
                device=device,
                surrogate=None
                if m.surrogate is None
                else checkpoint.load_network(surrogates[m.surrogate], device)[0],
                square_queries=m.square_queries,
                seed=m.seed,
                progress=lambda name, done, total: progress.within(
                    done / total, f"{name} {100 * done / total:.0f} %"
                ),
            )
            found[m.name] = {
                "accuracy": result[m.attack],
                "clean": result["clean"],
                "images": count,
                "seconds": time.perf_counter() - started,
                "settings": _plain(m),
            }
            write_json(job.folder / EVALUATION, found)
            progress.advance(f"{m.name} {100 * result[m.attack]:.1f} %")
        if not (job.folder / EXAMPLES).exists():
            _save_examples(job, network, data, device)
        numbers = ", ".join(f"{name} {100 * v['accuracy']:.1f} %" for name, v in found.items())
        return f"{numbers} ({seconds(job):.0f} s)"


def _tidy(folder: Path) -> None:
    """Without the last attempt's error and what it had half written when it was killed."""
    (folder / ERROR).unlink(missing_ok=True)
    remove_temporaries(folder)


def _machine(device: torch.device) -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {**machine(), "device": device.type, **gpu}


def seconds(job: Job) -> float:
    """Of the training's epochs, those of interrupted attempts included as far as they count, and
    of the attacks."""
    found = read_json(job.folder / EVALUATION) or {}
    trained = sum(row["seconds"] for row in history(job))
    return trained + sum(float(item["seconds"]) for item in found.values())


def history(job: Job) -> list[dict[str, Any]]:
    """An entry an epoch."""
    path = job.folder / "metrics.jsonl"
    return read_metrics(path, "epoch") if path.exists() else []


def _data(job: Job) -> ImageData:
    return _load(job.train.data, job.train.data_dir)


def _save_examples(
    job: Job, network: torch.nn.Module, data: ImageData, device: torch.device
) -> None:
    """The first test images, what the main attack makes of them, and the answers."""
    count = job.examples
    labels = data.test_labels[:count]
    x = (data.test_images[:count].float() / data.max_value).to(device)
    options = dict(SUITE.get(job.main, SUITE["pgd-sat"]))
    attack = job.train.attack
    x_adv = pgd(
        network,
        x,
        labels.to(device),
        epsilon=attack.epsilon,
        step_size=options.pop("step") * attack.epsilon,
        norm=attack.norm,
        generator=torch.Generator(device).manual_seed(0),
        **options,
    )
    with torch.no_grad():
        answers = [network(images).argmax(1).cpu().numpy() for images in (x, x_adv)]
    content = io.BytesIO()
    np.savez_compressed(
        content,
        images=x.cpu().numpy(),
        adversarial=x_adv.cpu().numpy(),
        labels=labels.numpy(),
        answers=np.stack(answers),
    )
    temporary = job.folder / f"{EXAMPLES}.{os.getpid()}.tmp"
    temporary.write_bytes(content.getvalue())
    os.replace(temporary, job.folder / EXAMPLES)
