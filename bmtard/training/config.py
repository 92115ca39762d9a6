"""Configuration of the trainer: frozen dataclasses, which are also the command line.

An image lies in [0, 1]; epsilon and step sizes are in that unit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bmtard import balance
from bmtard.data import check_data_name
from bmtard.extras import is_object_name
from bmtard.models import check_model_name
from bmtard.ops._checks import is_integer
from bmtard.training.teachers import Teacher, default_images, parse_teacher

METHOD_NAMES = (
    "natural", "sat", "fgsm-rs", "n-fgsm", "trades", "mart", "ard", "rslad", "iad-i", "iad-ii",
    "adaad", "mtard", "bmtard",
)  # fmt: skip
AttackName = Literal[
    "fgsm", "pgd-sat", "pgd-trades", "cw", "square", "autoattack", "transfer-pgd", "transfer-cw"
]


def require(config: object, name: str, condition: bool, wanted: str) -> None:
    if not condition:
        value = getattr(config, name)
        raise ValueError(f"{type(config).__name__}: {name} must be {wanted}, got {value!r}")


def check_kinds(config: object) -> None:
    """Requires one of its words in every Literal of ``config``, and whole numbers in every int.

    The command line does so by itself; a configuration in Python has this.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if type(None) in get_args(hint):
            if value is None:
                continue
            hint = get_args(hint)[0]
        several = get_origin(hint) is tuple
        kind = get_args(hint)[0] if several else hint
        if get_origin(kind) is Literal:
            words = get_args(kind)
            known = all(word in words for word in (value if several else (value,)))
            require(config, name, known, f"{'of' if several else 'one of'} {', '.join(words)}")
        elif hint is int:
            require(config, name, is_integer(value), "a whole number")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackConfig:
    """The attack that makes the training images: projected gradient ascent."""

    epsilon: float = 8 / 255
    """radius of the perturbation, in pixel units"""
    step_size: float = 2 / 255
    """in pixel units"""
    steps: int = 10
    """gradient steps"""
    norm: Literal["linf", "l2"] = "linf"
    """in which epsilon and step_size are measured"""
    random_start: Literal["uniform", "gaussian", "none"] = "gaussian"
    """uniform in the ball, or Gaussian of standard deviation 0.001 as in the B-MTARD code"""
    batch_norm: Literal["eval", "train"] = "eval"
    """mode of the student during the attack"""
    as_published: bool = False
    """instead of random_start and batch_norm those of the method's own code: uniform in sat, ard
    and iad-*, which is not clipped to [0, 1] in the last two, else gaussian; "train" in ard and
    iad-*, else "eval". What the attack maximises is always the method's own; fgsm-rs and n-fgsm
    have attacks of their own throughout"""

    def __post_init__(self) -> None:
        check_kinds(self)
        require(self, "epsilon", 0 < self.epsilon < math.inf, "finite and > 0")
        require(self, "step_size", 0 < self.step_size < math.inf, "finite and > 0")
        require(self, "steps", self.steps >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """SGD with momentum; the learning rate is a function of the progress of the training."""

    lr: float = 0.1
    """highest learning rate"""
    momentum: float = 0.9
    """in [0, 1)"""
    weight_decay: float = 2e-4
    """L2, on all parameters"""
    schedule: Literal["multistep", "cosine", "cyclic", "constant"] = "multistep"
    """cosine falls to 0; cyclic rises linearly from 0, peaks at 40 % and falls to 0"""
    milestones: tuple[float, ...] = (215 / 300, 260 / 300, 285 / 300)
    """of multistep: fractions of the training at which the rate falls"""
    decay: float = 0.1
    """of multistep: factor at each milestone"""

    def __post_init__(self) -> None:
        check_kinds(self)
        require(self, "lr", 0 < self.lr < math.inf, "finite and > 0")
        require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "finite and >= 0")
        ordered = list(self.milestones) == sorted(self.milestones)
        inside = all(0 <= m <= 1 for m in self.milestones)
        require(self, "milestones", ordered and inside, "ascending fractions in [0, 1]")
        require(self, "decay", 0 < self.decay <= 1, "in (0, 1]")

    def factor(self, progress: float) -> float:
        """Learning rate / ``lr`` when ``progress``, in [0, 1), of the training is done."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "cyclic":
            return progress / 0.4 if progress < 0.4 else (1 - progress) / 0.6
        return self.balance_factor(progress)

    def balance_factor(self, progress: float) -> float:
        """What multiplies ``temperature_lr`` and ``weight_lr``: falls at the milestones, else 1."""
        if self.schedule != "multistep":
            return 1.0
        return self.decay ** sum(progress >= m for m in self.milestones)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Numbers that belong to one method each, and the scale of the distillation losses."""

    trades_beta: float = 6.0
    """weight of the divergence in trades"""
    mart_beta: float = 6.0
    """weight of the divergence in mart"""
    iad_temperature: float = 1.0
    """of students and teachers in iad-i and iad-ii"""
    iad_beta: float = 0.1
    """power of the robust teacher's probability of the label, its trust, in iad-i and iad-ii"""
    iad1_alpha: float = 1.0
    """weight of the distillation against the labels in iad-i, in [0, 1]"""
    iad1_begin: float = 0.3
    """part of the training after which the student of iad-i looks at itself (epoch 60 of 200)"""
    iad2_alpha_robust: float = 0.5
    """weight of the robust teacher in iad-ii; what both weights leave to 1 is that of the labels"""
    iad2_alpha_clean: float = 0.25
    """weight of the clean teacher in iad-ii"""
    iad2_begin: float = 0.2
    """the same as iad1_begin in iad-ii (epoch 40 of 200)"""
    fgsm_rs_step: float = 1.25
    """step of fgsm-rs, over epsilon"""
    n_fgsm_step: float = 1.0
    """step of n-fgsm, over epsilon"""
    n_fgsm_noise: float = 2.0
    """noise of n-fgsm, over epsilon"""
    label_smoothing: float = 0.0
    """spread over all classes in every cross entropy with the labels, in [0, 1)"""
    ard_temperature: float = 30.0
    """of student and teacher in ard"""
    ard_alpha: float = 1.0
    """weight of the distillation against the labels in ard, in [0, 1]"""
    rslad_adversarial_weight: float = 5 / 6
    """of the adversarial term in rslad, in [0, 1]"""
    adaad_alpha: float = 1.0
    """of the adversarial term in adaad, in [0, 1]"""
    distillation_scale: float = 1.0
    """multiplies the losses of ard, rslad, adaad, mtard and bmtard, which are means over N * C;
    the number of classes turns them into means over N (10 in the published CIFAR-100 scripts)"""

    def __post_init__(self) -> None:
        require(self, "trades_beta", 0 <= self.trades_beta < math.inf, "finite and >= 0")
        require(self, "ard_temperature", 0 < self.ard_temperature < math.inf, "finite and > 0")
        for name in (
            "ard_alpha", "rslad_adversarial_weight", "adaad_alpha", "iad1_alpha", "iad1_begin",
            "iad2_alpha_robust", "iad2_alpha_clean", "iad2_begin",
        ):  # fmt: skip
            require(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        both = self.iad2_alpha_robust + self.iad2_alpha_clean
        require(self, "iad2_alpha_clean", both <= 1, "<= 1 - iad2_alpha_robust")
        for name in ("mart_beta", "iad_beta", "n_fgsm_noise"):
            require(self, name, 0 <= getattr(self, name) < math.inf, "finite and >= 0")
        for name in ("iad_temperature", "fgsm_rs_step", "n_fgsm_step"):
            require(self, name, 0 < getattr(self, name) < math.inf, "finite and > 0")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        scale = self.distillation_scale
        require(self, "distillation_scale", 0 < scale < math.inf, "finite and > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """The balance between the teachers of bmtard; weight_lr and eps are also those of mtard."""

    mode: Literal["bisect", "sign"] = balance.MODE
    """the temperatures of equal entropy in every step, or the published fixed steps"""
    temperature_bounds: tuple[float, float] = balance.TEMPERATURE_BOUNDS
    """lowest and highest temperature"""
    temperature_lr: float = balance.TEMPERATURE_LR
    """of "sign": change in a step; the published run has about 117,000 steps"""
    temperature_momentum: float = balance.TEMPERATURE_MOMENTUM
    """of "bisect": in log space, in [0, 1)"""
    weight_lr: float = balance.WEIGHT_LR
    """of the loss weights, in [0, 1]"""
    loss_exponent: float = balance.LOSS_EXPONENT
    """of the relative losses"""
    eps: float = 1e-5
    """inside log(p + eps), p of the teachers"""

    def __post_init__(self) -> None:
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        balance.check_settings("BalanceConfig", **settings)
        require(self, "eps", self.eps < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class AWPConfig:
    """Adversarial weight perturbation (Wu et al., NeurIPS 2020) around the loss of any method."""

    gamma: float = 0.0
    """size over each weight's norm; published: 0.01 with sat, 0.005 with trades; 0: none"""
    warmup: float = 0.0
    """epochs without; published: 0 with sat, 10 of 200 with trades"""

    def __post_init__(self) -> None:
        require(self, "gamma", 0 <= self.gamma < math.inf, "finite and >= 0")
        require(self, "warmup", 0 <= self.warmup < math.inf, "finite and >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. The defaults are of the published CIFAR-10 script, all but balance.mode."""

    data: str = "cifar10"
    """digits, mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet, folder:PATH with train/CLASS
    and test/CLASS, or python:NAME for data given in Python"""
    data_dir: Path | None = None
    """folder of its files; default: the environment variable BMTARD_DATA"""
    model: str = "resnet-18"
    """cnn-WIDTH, strided-cnn-WIDTH, resnet-{18,34,50}, preact-resnet-{18,34}[-raw],
    resnet-{20,32,44,56,110}, wrn-DEPTH-WIDTH, dm-wrn-DEPTH-WIDTH[-relu] (DeepMind's),
    mobilenet-v2, or package.module:function, called with num_classes, for a network of normalised
    images"""
    method: str = "bmtard"
    """natural, sat, fgsm-rs, n-fgsm, trades or mart, which need no teacher; ard, rslad, iad-i or
    adaad, which need a robust one; iad-ii, which needs a robust and a clean one; mtard or bmtard,
    which need these two or any two or more; or package.module:Class, your own Method"""
    teacher_clean: Path | None = None
    """checkpoint of a teacher trained on clean images"""
    teacher_robust: Path | None = None
    """checkpoint of a teacher trained on adversarial images"""
    teacher: tuple[str, ...] = ()
    """ROLE=PATH[:ARCHITECTURE[:NORMALIZATION]][@clean|@adversarial] of each teacher, roles clean,
    robust and, in mtard and bmtard, any other. ARCHITECTURE: as model, for a checkpoint from
    elsewhere. NORMALIZATION: data (mean and std of the training images), none, or
    MEAN,MEAN,MEAN/STD,STD,STD; default: that in the file. @: the images it sees in mtard and
    bmtard, by default adversarial for all but the role clean"""
    check_teachers: bool = True
    """stop before the first epoch if a teacher gives no logits of these classes or only guesses"""
    epochs: int = 300
    """passes over the training images"""
    batch_size: int = 128
    """images in a step, of all processes together; the last, incomplete batch of an epoch is left
    out"""
    accumulate: int = 1
    """parts of a batch that go through the student one after the other, for less memory: gradients
    add up, and the balance moves once a step, on the whole batch; not with awp"""
    crop_padding: int = 4
    """pixels of zero padding before the random crop; 0 for no crop"""
    flip: bool = True
    """mirror half of the images left to right"""
    train_limit: int | None = None
    """only so many training images, the first ones that the validation leaves; default: all"""
    attack: AttackConfig = field(default_factory=AttackConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    awp: AWPConfig = field(default_factory=AWPConfig)
    ema: float = 0.0
    """decay of an average of the weights, which is then what is evaluated and saved, such as 0.999,
    in [0, 1); begins as (1 + t) / (10 + t) after t steps; 0: none"""
    seed: int = 0
    """of initial weights, batches and attacks"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one"""
    autocast: Literal["none", "bfloat16"] = "none"
    """type of the networks' matrix products; losses and statistics stay float32"""
    channels_last: bool = False
    """memory layout of images and convolutions"""
    compile: bool = False
    """torch.compile the student"""
    fold_batch_norm: bool = False
    """in attacks in eval mode and in teachers, batch norm as part of the convolution before it: the
    same up to rounding, and faster; not with compile"""
    sync_batch_norm: bool = False
    """with several processes: batch statistics of the whole batch, not of each process's part; on
    GPUs alone"""
    output: Path | None = None
    """folder for the checkpoints, metrics.jsonl and results.json; default:
    runs/DATA-METHOD-MODEL-seedN"""
    overwrite: bool = False
    """start anew where the output folder already holds a run"""
    resume: bool = False
    """continue from last.pt in the output folder, exactly as if never interrupted; without one,
    begin"""
    replay: Path | None = None
    """non-finite.pt of a run of these settings: do that step again, tell what was not finite, and
    write nothing"""
    validation_fraction: float = 0.0
    """part of the training images kept for choosing best.pt by weighted robust accuracy (PGD);
    with 0 the result is the last epoch. Test images never choose."""
    validation_seed: int | None = None
    """of the choice of the validation images; default: seed"""
    validation_every: int = 1
    """epochs between two looks at the validation images; the last epoch is always looked at"""
    validation_steps: int = 20
    """steps of the validation attack, of epsilon / 4 each from a uniform start"""
    test_attacks: tuple[AttackName, ...] = ("fgsm", "pgd-sat")
    """attacks on the test images after the last epoch; no transfer-*"""
    log_every: int = 50
    """steps between two lines of metrics.jsonl; only then are device values read"""
    checkpoint_every: int = 1
    """epochs between two checkpoints"""
    tensorboard: bool = False
    """also write TensorBoard files, into a folder tensorboard in the output folder"""
    max_skipped: float = 0.1
    """part of an epoch's steps that may be skipped for a non-finite loss before it is an error"""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_data_name(self.data)
        _ = self.teachers
        check_model_name(self.model)
        if self.method not in METHOD_NAMES and not is_object_name(self.method):
            names = ", ".join(METHOD_NAMES)
            require(self, "method", False, f"{names} or package.module:Class")
        require(self, "ema", 0 <= self.ema < 1, "in [0, 1)")
        for name in (
            "epochs", "batch_size", "accumulate", "log_every", "checkpoint_every",
            "validation_every", "validation_steps",
        ):  # fmt: skip
            require(self, name, getattr(self, name) >= 1, ">= 1")
        limit, seed = self.train_limit, self.validation_seed
        require(self, "train_limit", limit is None or limit >= 1, ">= 1")
        require(self, "validation_seed", seed is None or 0 <= seed < 2**40, "in [0, 2^40)")
        require(self, "crop_padding", self.crop_padding >= 0, ">= 0")
        require(self, "seed", 0 <= self.seed < 2**40, "in [0, 2^40)")
        require(self, "validation_fraction", 0 <= self.validation_fraction < 1, "in [0, 1)")
        require(self, "resume", not (self.resume and self.overwrite), "false with overwrite")
        plain = self.accumulate == 1 or not self.awp.gamma
        require(self, "accumulate", plain, "1 with awp")
        folded = not (self.fold_batch_norm and self.compile)
        require(self, "fold_batch_norm", folded, "false with compile")
        transfer = any(name.startswith("transfer") for name in self.test_attacks)
        require(self, "test_attacks", not transfer, "without transfer-*, which bmtard evaluate has")
        require(self, "max_skipped", 0 <= self.max_skipped <= 1, "in [0, 1]")

    @property
    def folder(self) -> Path:
        """The output folder."""
        parts = (self.data, self.method, self.model, f"seed{self.seed}")
        name = "-".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
        return self.output or Path("runs") / name

    @property
    def teachers(self) -> dict[str, Teacher]:
        """Of ``teacher_clean``, ``teacher_robust`` and ``teacher``, by role."""
        named = [("clean", self.teacher_clean), ("robust", self.teacher_robust)]
        given = [Teacher(role=r, path=p, images=default_images(r)) for r, p in named if p]
        given += [parse_teacher(text) for text in self.teacher]
        roles = [teacher.role for teacher in given]
        if twice := [role for role in roles if roles.count(role) > 1]:
            raise ValueError(f"TrainConfig: teacher {twice[0]} is given twice")
        return dict(zip(roles, given, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured on a trained model. Every attack runs on all the images, in eval mode."""

    attacks: tuple[AttackName, ...] = ("fgsm", "pgd-sat", "pgd-trades", "cw")
    """fgsm; pgd-sat: 20 steps of epsilon / 4 (2/255 of 8/255); pgd-trades: 20 steps of 0.003 of
    8/255; cw: 30 steps of epsilon / 4 on the margin; square and autoattack by pyautoattack;
    transfer-pgd and transfer-cw: pgd-trades and cw made on the surrogate"""
    epsilon: float | None = None
    """radius in pixel units; default: that of the checkpoint's training attack"""
    norm: Literal["linf", "l2"] | None = None
    """of epsilon; fgsm and the transfer attacks included; default: that of the training attack"""
    batch_size: int = 250
    """images at a time"""
    limit: int | None = None
    """only so many test images, the first ones"""
    model: str | None = None
    """package.module:function of a network that one makes; checkpoints call none by themselves"""
    surrogate: Path | None = None
    """checkpoint of the network on which the transfer attacks are made"""
    square_queries: int = 5000
    """of the Square attack"""
    sanity: int = 128
    """test images, the first ones, for the checks whether the robustness is to be believed; 0: no
    checks"""
    seed: int = 0
    """of the random starts"""
    data_dir: Path | None = None
    """folder of the data; default: that of the training run, then BMTARD_DATA"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one"""
    output: Path | None = None
    """JSON file; default: evaluation.json beside the checkpoint"""

    def __post_init__(self) -> None:
        check_kinds(self)
        require(self, "batch_size", self.batch_size >= 1, ">= 1")
        require(self, "square_queries", self.square_queries >= 1, ">= 1")
        require(self, "sanity", self.sanity >= 0, ">= 0")
        require(self, "seed", 0 <= self.seed < 2**40, "in [0, 2^40)")
        if self.epsilon is not None:
            require(self, "epsilon", 0 < self.epsilon < math.inf, "finite and > 0")
        if self.limit is not None:
            require(self, "limit", self.limit >= 1, ">= 1")
        if any(name.startswith("transfer") for name in self.attacks):
            require(self, "surrogate", self.surrogate is not None, "a checkpoint for transfer-*")


# temperature_lr: with the published 1e-3 a temperature would move by at most 0.36 in these 360
# steps. 0.025 lets it cross the interval [1, 10] once, as 1e-3 does in the published 117,000.
DIGITS = TrainConfig(
    data="digits",
    model="cnn-4",
    epochs=40,
    crop_padding=0,
    flip=False,
    attack=AttackConfig(epsilon=0.25, step_size=0.1, steps=5, random_start="uniform"),
    optimizer=OptimizerConfig(lr=0.1, weight_decay=5e-4, schedule="cyclic"),
    loss=LossConfig(distillation_scale=10.0),
    balance=BalanceConfig(temperature_lr=0.025),
    log_every=3,
    checkpoint_every=40,
)
MNIST = replace(
    DIGITS,
    data="mnist",
    model="cnn-16",
    epochs=10,
    attack=AttackConfig(epsilon=0.3, step_size=0.05, steps=10, random_start="uniform"),
    balance=BalanceConfig(temperature_lr=0.002),
    log_every=50,
    checkpoint_every=1,
)
CIFAR10 = TrainConfig(attack=AttackConfig(as_published=True))
CIFAR100 = replace(CIFAR10, data="cifar100", loss=LossConfig(distillation_scale=10.0))
TINY_IMAGENET = replace(CIFAR100, data="tiny-imagenet", model="mobilenet-v2")

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "digits": ("the 8x8 digits of scikit-learn: seconds on a CPU, no download", DIGITS),
    "mnist": ("MNIST, a small network", MNIST),
    "cifar10": ("CIFAR-10, ResNet-18, the published settings", CIFAR10),
    "cifar100": ("CIFAR-100, ResNet-18, the published settings", CIFAR100),
    "tiny-imagenet": ("Tiny-ImageNet, MobileNet-v2", TINY_IMAGENET),
}


def to_plain(value: Any) -> Any:
    """A configuration as dicts, lists, strings and numbers."""
    if is_dataclass(value):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def saved_settings(plain: dict[str, Any]) -> dict[str, Any]:
    """A saved :class:`TrainConfig`; an option that was not there yet has its default."""
    return _merged(to_plain(TrainConfig()), plain)


def _merged(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    nested = {
        name: _merged(default[name], value)
        for name, value in given.items()
        if isinstance(value, dict) and isinstance(default.get(name), dict)
    }
    return default | given | nested
