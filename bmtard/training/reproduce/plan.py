"""Which jobs there are, and what each is."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmtard.training.config import TrainConfig, to_plain
from bmtard.training.methods import find_method
from bmtard.training.reproduce.config import STUDENTS, TEACHERS, ReproduceConfig
from bmtard.training.settings import with_arguments
from bmtard.training.trainer import FREE_FIELDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One attack on one network."""

    name: str
    """column of the table: "clean", an attack, or "transfer-... from SURROGATE" """
    attack: str
    images: int | None
    """test images, the first ones; None: all"""
    epsilon: float
    norm: str
    square_queries: int
    seed: int
    surrogate: str | None = None
    """key of the job on whose network a transfer attack is made"""
    surrogate_settings: str | None = None
    """digest of that job's settings"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A network to train and to measure. Its files lie in the folder of ``train``."""

    name: str
    """in the table"""
    seed: int
    train: TrainConfig
    """with seed, folder and teachers"""
    teachers: dict[str, str]
    """role -> key of the teacher's job"""
    settings: dict[str, Any]
    """what decides the numbers: the training's settings and those of its teachers"""
    measurements: tuple[Measurement, ...]
    examples: int
    """images of the picture of adversarial examples"""
    main: str
    """the attack of that picture"""

    @property
    def key(self) -> str:
        return key_of(self.name, self.seed)

    @property
    def folder(self) -> Path:
        return self.train.folder

    @property
    def checkpoint(self) -> Path:
        """What is measured, and what students learn from."""
        return self.folder / ("best.pt" if self.train.validation_fraction else "last.pt")


def key_of(name: str, seed: int) -> str:
    """A file name."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-seed{seed}"


def with_settings(config: TrainConfig, settings: str, name: str) -> TrainConfig:
    """``config`` with FIELD=VALUE settings, separated by spaces; the commas of a tuple too."""
    arguments: list[str] = []
    for setting in settings.split():
        path, found, value = setting.partition("=")
        if not found:
            raise ValueError(f"{name}: a setting must be FIELD=VALUE, got {setting!r}")
        arguments += [f"--{path}", *value.split(",")]
    return with_arguments(config, arguments, f"{name}: {' '.join(settings.split())!r}")


def configurations(config: ReproduceConfig) -> dict[str, TrainConfig]:
    """Name in the table -> configuration without seed, teachers and folder."""
    recipes = {
        TEACHERS["clean"]: config.teacher_clean,
        TEACHERS["robust"]: config.teacher_robust,
        **{name: f"{STUDENTS.get(name, '')} {config.student}".strip() for name in config.students},
    }
    for change in (*config.tuned, *config.changes):
        name, found, settings = change.partition(":")
        if not found or name not in recipes:
            raise ValueError(
                f"changes: must be 'NAME: FIELD=VALUE ...' with NAME one of "
                f"{', '.join(map(repr, recipes))}; got {change!r}"
            )
        recipes[name] = f"{recipes[name]} {settings}"
    for name, settings in recipes.items():
        if "method=" not in settings:
            raise ValueError(
                f"{name}: no method; known students are {', '.join(map(repr, STUDENTS))}, for "
                f"another give --changes '{name}: method=METHOD ...'"
            )
    configs = {name: with_settings(config.train, text, name) for name, text in recipes.items()}
    if len({key_of(name, 0) for name in configs}) < len(configs):
        raise ValueError(f"students: names must differ in letters, got {', '.join(configs)}")
    for name in TEACHERS.values():
        if find_method(configs[name].method).needs:
            raise ValueError(f"{name}: method {configs[name].method} needs teachers itself")
    return configs


def plan(config: ReproduceConfig) -> list[Job]:
    """All jobs, seed by seed, teachers first."""
    configs = configurations(config)
    teachers = set(TEACHERS.values())
    teacher_seeds = config.teacher_seeds or config.seeds
    jobs: list[Job] = []
    for seed in range(config.seeds):
        for name, train in configs.items():
            if name in teachers and seed >= teacher_seeds:
                continue
            taught_by = {
                role: key_of(TEACHERS[role], seed % teacher_seeds)
                for role in find_method(train.method).needs
            }
            by_key = {job.key: job for job in jobs}
            checkpoints = {role: by_key[key].checkpoint for role, key in taught_by.items()}
            train = replace(
                train,
                seed=seed,
                output=config.output / "jobs" / key_of(name, seed),
                test_attacks=(),
                teacher_clean=checkpoints.get("clean"),
                teacher_robust=checkpoints.get("robust"),
            )
            settings = {
                "train": deciding(to_plain(train)),
                "teachers": {
                    role: by_key[key].settings["train"] for role, key in taught_by.items()
                },
            }
            jobs.append(
                Job(
                    name=name,
                    seed=seed,
                    train=train,
                    teachers=taught_by,
                    settings=settings,
                    measurements=(),
                    examples=config.evaluation.examples,
                    main=config.evaluation.main,
                )
            )
    return [replace(job, measurements=_measurements(config, job, jobs)) for job in jobs]


def selected(config: ReproduceConfig, jobs: list[Job]) -> list[Job]:
    """The jobs that ``only`` asks for, with the teachers that they need."""
    names = {job.name for job in jobs}
    for name in config.only:
        if name not in names:
            raise ValueError(
                f"only: must be of {', '.join(map(repr, sorted(names)))}; got {name!r}"
            )
    wanted = [job for job in jobs if not config.only or job.name in config.only]
    keys = {job.key for job in wanted}.union(*(job.teachers.values() for job in wanted))
    return [job for job in jobs if job.key in keys]


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what may differ between runs of the same numbers."""
    return {name: value for name, value in settings.items() if name not in FREE_FIELDS}


def _surrogates(config: ReproduceConfig, job: Job, jobs: list[Job]) -> list[Job]:
    """The jobs on whose networks transfer attacks are made, if this one is a student's."""
    teachers = set(TEACHERS.values())
    if job.name in teachers:
        return []
    teacher_seeds = config.teacher_seeds or config.seeds
    return [
        other
        for name in config.evaluation.surrogates
        for other in jobs
        if other.name == name != job.name
        and other.seed == (job.seed % teacher_seeds if name in teachers else job.seed)
    ]


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def left_out(config: ReproduceConfig) -> list[str]:
    """Attacks that this Python cannot run."""
    if importlib.util.find_spec("pyautoattack"):
        return []
    return [name for name in config.evaluation.attacks if name in ("square", "autoattack")]


def _measurements(config: ReproduceConfig, job: Job, jobs: list[Job]) -> tuple[Measurement, ...]:
    evaluation = config.evaluation
    limits: dict[str, int | None] = dict(evaluation.limits.items())
    found: list[Measurement] = []
    for attack in ("clean", *evaluation.attacks):
        if attack in left_out(config):
            continue
        shared: dict[str, Any] = {
            "attack": attack,
            "images": limits.get(attack, evaluation.limit),
            "epsilon": job.train.attack.epsilon,
            "norm": job.train.attack.norm,
            "square_queries": evaluation.square_queries,
            "seed": evaluation.seed,
        }
        if attack.startswith("transfer"):
            found += [
                Measurement(
                    name=f"{attack} from {other.name}",
                    surrogate=other.key,
                    surrogate_settings=digest(other.settings),
                    **shared,
                )
                for other in _surrogates(config, job, jobs)
            ]
        else:
            found.append(Measurement(name=attack, **shared))
    return tuple(found)
