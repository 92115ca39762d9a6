"""What ``bmtard reproduce`` runs: presets, and their options."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from bmtard.training.config import (
    CIFAR10,
    CIFAR100,
    DIGITS,
    MNIST,
    TINY_IMAGENET,
    AttackConfig,
    AttackName,
    BalanceConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    check_kinds,
    require,
)

STUDENTS: dict[str, str] = {
    "natural": "method=natural",
    "sat": "method=sat",
    "trades": "method=trades",
    "ard": "method=ard",
    "rslad": "method=rslad",
    "adaad": "method=adaad",
    "mtard": "method=mtard",
    "bmtard, sign": "method=bmtard balance.mode=sign",
    "bmtard, bisect": "method=bmtard balance.mode=bisect",
}
"""name in the table -> settings on top of what all share: FIELD=VALUE of TrainConfig"""

TEACHERS = {"clean": "teacher, clean", "robust": "teacher, robust"}
"""role -> name in the table"""

# TrainConfig's fields that are decided run by run, or by the evaluation.
_OWN = (
    "method", "teacher_clean", "teacher_robust", "teacher", "seed", "output", "overwrite",
    "resume", "replay", "test_attacks",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceEvaluation:
    """What is measured on the test images, the same for every network, in eval mode."""

    attacks: tuple[AttackName, ...] = (
        "fgsm", "pgd-sat", "pgd-trades", "cw", "autoattack", "transfer-pgd",
    )  # fmt: skip
    """see bmtard evaluate; square and autoattack are left out where pyautoattack is not there"""
    main: AttackName = "pgd-sat"
    """of the weighted robust accuracy and the pictures"""
    limit: int | None = None
    """only so many test images, the first ones; default: all"""
    limits: dict[AttackName, int] = field(default_factory=dict)
    """the same for single attacks, instead of limit"""
    surrogates: tuple[str, ...] = ("teacher, robust", "sat")
    """on whose networks of the same seed the transfer attacks are made, against students alone"""
    square_queries: int = 5000
    """of the Square attack"""
    seed: int = 0
    """of the random starts"""
    examples: int = 8
    """test images, the first ones, kept for the picture of adversarial examples"""

    def __post_init__(self) -> None:
        check_kinds(self)
        main = self.main in self.attacks and not self.main.startswith("transfer")
        require(self, "main", main, "one of attacks, and no transfer attack")
        require(self, "limits", self.main not in self.limits, "of other attacks than main")
        require(self, "limits", all(n >= 1 for n in self.limits.values()), ">= 1")
        require(self, "limit", self.limit is None or self.limit >= 1, ">= 1")
        require(self, "square_queries", self.square_queries >= 1, ">= 1")
        require(self, "examples", self.examples >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """Teachers and students to train and compare. Runs are jobs in the folder output: what is
    there already is kept, so the same command goes on where it was stopped."""

    title: str
    """of the report"""
    train: TrainConfig
    """what all runs share"""
    teacher_clean: str = "method=natural"
    """settings of the clean teacher on top of train: FIELD=VALUE ..., such as "model=cnn-64" """
    teacher_robust: str = "method=sat"
    """settings of the robust teacher"""
    student: str = ""
    """settings of every student"""
    students: tuple[str, ...] = tuple(STUDENTS)
    """names in the table"""
    tuned: tuple[str, ...] = ()
    """the preset's own settings of single runs: "NAME: FIELD=VALUE ..." """
    changes: tuple[str, ...] = ()
    """your settings of single runs, such as "bmtard, sign: balance.temperature_lr=0.01"; a new
    name in students gets its method here"""
    evaluation: ReproduceEvaluation = field(default_factory=ReproduceEvaluation)
    seeds: int = 3
    """runs of each student, with seeds 0, 1, ..."""
    teacher_seeds: int | None = None
    """runs of each teacher; student k learns from the teachers k modulo this; default: seeds"""
    only: tuple[str, ...] = ()
    """only these names, and the teachers that they need"""
    jobs: int | None = None
    """processes side by side; default: the cores, at most 8, and one on a GPU"""
    threads: int = 1
    """of each process"""
    output: Path
    """folder of report.md, results.json, the pictures and all runs"""
    overwrite: bool = False
    """do those runs again whose settings are not the wanted ones any more"""
    report_only: bool = False
    """train and measure nothing; report what is there"""

    def __post_init__(self) -> None:
        check_kinds(self)
        require(self, "seeds", self.seeds >= 1, ">= 1")
        require(self, "students", len(self.students) >= 1, "one name or more")
        teacher_seeds = self.teacher_seeds
        inside = teacher_seeds is None or 1 <= teacher_seeds <= self.seeds
        require(self, "teacher_seeds", inside, "in [1, seeds]")
        require(self, "jobs", self.jobs is None or self.jobs >= 1, ">= 1")
        require(self, "threads", self.threads >= 1, ">= 1")
        require(self, "students", len(set(self.students)) == len(self.students), "all different")
        default = TrainConfig()
        for name in _OWN:
            if getattr(self.train, name) != getattr(default, name):
                raise ValueError(
                    f"ReproduceConfig: train.{name} is decided for each run, so it cannot be set "
                    f"for all; got {getattr(self.train, name)!r}"
                )


_STUDENTS_OF_THE_DEMO = tuple(name for name in STUDENTS if name not in ("ard", "adaad"))

REPRODUCE_DIGITS = ReproduceConfig(
    title="B-MTARD and its baselines on 8x8 digits",
    train=replace(DIGITS, device="cpu", checkpoint_every=5),
    teacher_clean="method=natural model=cnn-16",
    teacher_robust="method=sat model=cnn-16",
    students=_STUDENTS_OF_THE_DEMO,
    evaluation=ReproduceEvaluation(attacks=("fgsm", "pgd-sat")),
    output=Path("runs/digits"),
)
# 390 steps. As in the other small presets, temperature_lr lets a temperature cross [1, 10] in
# about a tenth of them: the published run does so in 9,000 of its 117,000 steps.
REPRODUCE_MNIST = ReproduceConfig(
    title="B-MTARD and its baselines on MNIST, 5,000 images",
    train=replace(
        MNIST,
        model="strided-cnn-16",
        epochs=10,
        train_limit=5_000,
        attack=AttackConfig(epsilon=0.3, step_size=0.1, steps=5, random_start="uniform"),
        balance=BalanceConfig(temperature_lr=0.25),
        validation_fraction=1 / 60,
        validation_seed=0,
        validation_steps=10,
        device="cpu",
    ),
    teacher_clean="method=natural model=strided-cnn-32 epochs=6",
    teacher_robust="method=sat model=strided-cnn-32 epochs=15",
    student="optimizer.lr=0.3",
    evaluation=ReproduceEvaluation(
        limit=1000, limits={"cw": 500, "transfer-pgd": 500, "autoattack": 200}
    ),
    teacher_seeds=1,
    output=Path("runs/mnist"),
)
# Everything fits into three hours on two cores. The teachers' settings name the learning rate of
# their own; see docs/evidence.md for how the students' rate was chosen.
REPRODUCE_CIFAR10_SMALL = ReproduceConfig(
    title="B-MTARD and its baselines on CIFAR-10, small networks",
    train=TrainConfig(
        data="cifar10",
        model="strided-cnn-16",
        epochs=7,
        train_limit=20_000,
        attack=AttackConfig(steps=5, random_start="uniform"),
        optimizer=OptimizerConfig(lr=0.1, weight_decay=5e-4, schedule="cyclic"),
        loss=LossConfig(distillation_scale=10.0),
        # The published run crosses [1, 10] in 9,000 of its 117,000 steps, 8 %. So do these.
        balance=BalanceConfig(temperature_lr=0.1),
        channels_last=True,
        validation_fraction=0.02,
        validation_seed=0,
        validation_steps=5,
        device="cpu",
    ),
    teacher_clean="method=natural model=strided-cnn-48 epochs=20",
    # Two large steps make a robust teacher in half of the time of five small ones.
    teacher_robust="method=sat model=strided-cnn-48 epochs=20 attack.steps=2 attack.step_size=0.02",
    student="optimizer.lr=0.3 epochs=5 loss.distillation_scale=40.0",
    evaluation=ReproduceEvaluation(
        limit=5000,
        limits={"pgd-trades": 1000, "cw": 1000, "autoattack": 250, "transfer-pgd": 500},
    ),
    teacher_seeds=1,
    output=Path("runs/cifar10-small"),
)


def _validated(train: TrainConfig) -> TrainConfig:
    """With the epoch chosen on 1,000 of CIFAR's images, the same ones for every run."""
    return replace(train, validation_fraction=0.02, validation_seed=0)


_LIMITS: dict[AttackName, int] = {"autoattack": 1000}
REPRODUCE_CIFAR10 = ReproduceConfig(
    title="B-MTARD and its baselines on CIFAR-10",
    train=_validated(CIFAR10),
    teacher_clean="method=natural model=resnet-56",
    teacher_robust="method=trades model=wrn-34-10",
    evaluation=ReproduceEvaluation(limits=_LIMITS),
    teacher_seeds=1,
    output=Path("runs/cifar10"),
)
REPRODUCE_CIFAR100 = replace(
    REPRODUCE_CIFAR10,
    title="B-MTARD and its baselines on CIFAR-100",
    train=_validated(CIFAR100),
    teacher_clean="method=natural model=wrn-22-6",
    output=Path("runs/cifar100"),
)
REPRODUCE_TINY_IMAGENET = replace(
    REPRODUCE_CIFAR10,
    title="B-MTARD and its baselines on Tiny-ImageNet",
    train=_validated(TINY_IMAGENET),
    teacher_clean="method=natural model=preact-resnet-18",
    output=Path("runs/tiny-imagenet"),
)
REPRODUCE_CIFAR10_GPU = replace(
    REPRODUCE_CIFAR10,
    title="B-MTARD and its baselines on CIFAR-10, 30 epochs",
    train=replace(
        _validated(CIFAR10),
        epochs=30,
        optimizer=OptimizerConfig(lr=0.1, weight_decay=5e-4, schedule="cyclic"),
        loss=LossConfig(distillation_scale=10.0),
        balance=BalanceConfig(temperature_lr=0.001),
        autocast="bfloat16",
        channels_last=True,
    ),
    teacher_clean="method=natural model=preact-resnet-18",
    teacher_robust="method=sat model=preact-resnet-18",
    output=Path("runs/cifar10-gpu"),
)

REPRODUCE_PRESETS: dict[str, tuple[str, ReproduceConfig]] = {
    "digits": ("the 8x8 digits of scikit-learn: minutes, no download", REPRODUCE_DIGITS),
    "mnist": ("MNIST, small networks, for a CPU", REPRODUCE_MNIST),
    "cifar10-small": ("CIFAR-10, small networks, for a CPU", REPRODUCE_CIFAR10_SMALL),
    "cifar10": ("CIFAR-10, the published settings: GPU days", REPRODUCE_CIFAR10),
    "cifar100": ("CIFAR-100, the published settings: GPU days", REPRODUCE_CIFAR100),
    "tiny-imagenet": ("Tiny-ImageNet, the published settings: GPU days", REPRODUCE_TINY_IMAGENET),
    "cifar10-gpu": ("CIFAR-10, ResNet-18, 30 epochs in bfloat16", REPRODUCE_CIFAR10_GPU),
}
