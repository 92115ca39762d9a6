"""Teachers on the command line: how they are written, refused, and balanced when there are more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import published_models as published
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard import cli
from bmtard.data import ImageData, from_dataset
from bmtard.models import build_network
from bmtard.training import checkpoint
from bmtard.training.config import EvaluateConfig, TrainConfig
from bmtard.training.evaluate import evaluate
from bmtard.training.methods import METHODS
from bmtard.training.metrics import read_metrics
from bmtard.training.teachers import Teacher, check_teacher, parse_teacher, sample
from bmtard.training.trainer import Trainer, train


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clean=a.pt", ("clean", "a.pt", None, None, "clean")),
        ("robust=a.pt", ("robust", "a.pt", None, None, "adversarial")),
        ("third=../x/a.pt", ("third", "../x/a.pt", None, None, "adversarial")),
        ("third=a.pt@clean", ("third", "a.pt", None, None, "clean")),
        ("clean=a.pt@adversarial", ("clean", "a.pt", None, None, "adversarial")),
        ("robust=a.pt:wrn-34-10", ("robust", "a.pt", "wrn-34-10", None, "adversarial")),
        ("robust=a=b:c.pt:wrn-34-10", ("robust", "a=b:c.pt", "wrn-34-10", None, "adversarial")),
        ("robust=a.pt:resnet-56:data@clean", ("robust", "a.pt", "resnet-56", "data", "clean")),
        ("robust=a.pt:resnet-56:none", ("robust", "a.pt", "resnet-56", "none", "adversarial")),
        (
            "clean=a.pt:resnet-20:0.49,0.48,0.45/0.2,0.2,0.2",
            ("clean", "a.pt", "resnet-20", "0.49,0.48,0.45/0.2,0.2,0.2", "clean"),
        ),
        ("clean=a.pt:nets:make", ("clean", "a.pt", "nets:make", None, "clean")),
        ("clean=a.pt:my.nets:make:data", ("clean", "a.pt", "my.nets:make", "data", "clean")),
        ("clean=a.pt:cnn-2:1.2.3/1", ("clean", "a.pt:cnn-2:1.2.3/1", None, None, "clean")),
        ("r2=a@b.pt@clean", ("r2", "a@b.pt", None, None, "clean")),
    ],
)
def test_how_teachers_are_written(text: str, expected: tuple[Any, ...]) -> None:
    role, path, architecture, normalization, images = expected
    assert parse_teacher(text) == Teacher(
        role=role,
        path=Path(path),
        architecture=architecture,
        normalization=normalization,
        images=images,
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a.pt", r"teacher must be ROLE=PATH.*, got 'a.pt'"),
        ("=a.pt", r"teacher must be ROLE=PATH"),
        ("clean=", r"teacher must be ROLE=PATH"),
        ("two words=a.pt", r"teacher must be ROLE=PATH"),
        ("clean=a.pt:data", r"teacher clean: a normalisation comes after an architecture"),
        ("clean=a.pt:vgg-16", r"teacher clean: model must be one of .* got 'vgg-16'"),
        ("clean=a.pt:resnet-18:imagenet", r"teacher clean: model must be one of"),
    ],
)
def test_how_they_are_not(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TrainConfig(teacher=(text,))


def test_a_role_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"teacher clean is given twice"):
        TrainConfig(teacher_clean=Path("a.pt"), teacher=("clean=b.pt",))
    config = TrainConfig(teacher_clean=Path("a.pt"), teacher=("robust=b.pt", "third=c.pt"))
    assert list(config.teachers) == ["clean", "robust", "third"]


# ---- what is looked at before the first epoch ----

LABELS = torch.arange(100) % 4
IMAGES = 3 * F.one_hot(LABELS, 4).float().view(100, 1, 2, 2)


def wrong(shift: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.flatten(1).roll(shift, 1)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda x: torch.softmax(x.flatten(1), 1), r"teacher third: .* got probabilities"),
        (lambda x: x.flatten(1)[:, :3], r"logits \[N, 4\] of 4 classes, got \[64, 3\]"),
        (lambda x: F.pad(x.flatten(1), (0, 96)), r"logits \[N, 4\] of 4 classes, got \[64, 100\]"),
        (lambda x: x, r"logits \[N, 4\] of 4 classes, got \[64, 1, 2, 2\]"),
        (lambda x: (x.flatten(1), x), r"must be logits \[N, 4\], got tuple"),
        (lambda x: x.flatten(1) / 0, r"got values that are not finite"),
        (wrong(1), r"0.0 % of 100 clean training images are right, no more than guessing"),
        (lambda x: torch.ones(len(x), 4), r"25.0 % of 100 .* no more than guessing"),
        (lambda x: x.flatten(1), None),
        (lambda x: torch.log_softmax(x.flatten(1), 1), None),  # the same softmax
    ],
)
def test_check_teacher(answer: Callable[[Tensor], Any], problem: str | None) -> None:
    network = nn.Module()
    network.forward = answer  # type: ignore[method-assign]
    if problem is None:
        assert check_teacher("third", network, IMAGES, LABELS, 4) == 1.0
        return
    with pytest.raises(ValueError, match=problem):
        check_teacher("third", network, IMAGES, LABELS, 4)


def test_a_guess_may_be_lucky() -> None:
    """The bound: 25 % +- 3 standard deviations of 4.33 % of 100 images is 38 right ones."""
    network = nn.Module()
    for right, refused in ((37, True), (38, False)):
        logits = IMAGES.flatten(1).clone()
        logits[right:] = logits[right:].roll(1, 1)
        network.forward = lambda x, logits=logits: logits  # type: ignore[method-assign]
        if refused:
            with pytest.raises(ValueError, match=rf"{right}.0 % of 100"):
                check_teacher("a", network, IMAGES, LABELS, 4, batch_size=100)
        else:
            assert check_teacher("a", network, IMAGES, LABELS, 4, batch_size=100) == right / 100


def test_naming_the_most_frequent_class_is_guessing() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    labels[:40] = torch.arange(40) % 4
    network = nn.Module()
    network.forward = lambda x: F.one_hot(torch.zeros(len(x)).long(), 4) - 0.1  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"70.0 % of 100 .* no more than guessing"):
        check_teacher("a", network, IMAGES, labels, 4)


def test_the_sample_is_of_all_classes(digits: ImageData) -> None:
    """Also where the data are in the order of the classes, as in many a file."""
    order = digits.train_labels.argsort(stable=True)
    data = replace(
        digits, train_images=digits.train_images[order], train_labels=digits.train_labels[order]
    )
    images, labels = sample(data, 50, torch.device("cpu"))
    assert labels.bincount(minlength=10).min() >= 3
    assert images.max() == 1.0
    assert len(sample(data, 10**6, torch.device("cpu"))[1]) == len(order)


def test_no_normalisation_overrules_that_of_the_file(digits: ImageData, tmp_path: Path) -> None:
    network = build_network("cnn-2", num_classes=10, in_channels=1)
    state = network.state_dict() | {"mu": torch.tensor([0.5]), "sigma": torch.tensor([0.2])}
    torch.save(state, tmp_path / "net.pt")
    x = torch.rand(2, 1, 8, 8)
    expected = {"none": network.eval()(x), "0.5/0.2": network((x - 0.5) / 0.2)}
    for normalization, logits in expected.items():
        teacher = parse_teacher(f"robust={tmp_path / 'net.pt'}:cnn-2:{normalization}")
        loaded = teacher.load(digits, "digits", torch.device("cpu"))
        torch.testing.assert_close(loaded(x), logits)


# ---- in a run ----


class Stripes(torch.utils.data.Dataset):
    """Colour images whose class is the brightest channel."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        self.images = torch.randint(0, 120, (count, 3, 32, 32), generator=generator).byte()
        self.images[torch.arange(count), self.labels] += 100

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@pytest.fixture(scope="module")
def stripes() -> ImageData:
    return from_dataset(Stripes(96, 0), Stripes(30, 1), name="stripes")


def published_teacher(path: Path, stripes: ImageData) -> nn.Module:
    """A TRADES network that answers by the mean of each channel, in its published file format."""
    network = published.TradesWideResNet(10, 1, 3)
    with torch.no_grad():
        for block in (network.block1, network.block2, network.block3):
            block.layer[0].conv2.weight.zero_()
            if block.layer[0].convShortcut is not None:
                block.layer[0].convShortcut.weight.zero_()
                for channel in range(3):
                    block.layer[0].convShortcut.weight[channel, channel] = 1
        network.conv1.weight.zero_()
        for channel in range(3):
            network.conv1.weight[channel, channel, 1, 1] = 1
        network.fc.weight.zero_()
        network.fc.weight[:, :3] = 20 * torch.eye(3)
        network.fc.bias.zero_()
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 76}, path)
    return network.eval()


def short(config: TrainConfig, tmp_path: Path, **changes: Any) -> TrainConfig:
    return replace(
        config, data="python:stripes", batch_size=48, epochs=1, test_attacks=(), log_every=1,
        output=tmp_path / "student", **changes,
    )  # fmt: skip


def test_published_teachers_teach(
    config: TrainConfig, stripes: ImageData, tmp_path: Path, quiet: Any
) -> None:
    path = tmp_path / "trades.pt"
    source = published_teacher(path, stripes)
    config = short(config, tmp_path, method="rslad", teacher=(f"robust={path}:wrn-10-1",))
    trainer = Trainer(config, quiet, stripes)
    x = stripes.train_images[:8] / 255
    with torch.no_grad():
        expected = source(x)
    torch.testing.assert_close(trainer.method.teach("robust", x), expected, rtol=1e-6, atol=1e-6)
    trainer.run()
    for normalization, statistics in (
        ("data", stripes.statistics()),
        ("none", ([0.0] * 3, [1.0] * 3)),
        ("0.5,0.5,0.25/1,2,4", ([0.5, 0.5, 0.25], [1.0, 2.0, 4.0])),
    ):
        text = f"robust={path}:wrn-10-1:{normalization}"
        changed = replace(config, teacher=(text,), overwrite=True, check_teachers=False)
        teacher = Trainer(changed, quiet, stripes).method._teachers["robust"]
        assert teacher.mean.flatten().tolist() == pytest.approx(statistics[0])
        assert teacher.std.flatten().tolist() == pytest.approx(statistics[1])
    text = f"robust={path}:wrn-10-1:0,0,0/1,1,0.01"
    with pytest.raises(ValueError, match=r"teacher robust .*trades.pt: .* a wrong normalisation"):
        Trainer(replace(config, teacher=(text,), overwrite=True), quiet, stripes)
    text = f"robust={path}:wrn-16-1"
    with pytest.raises(ValueError, match=r"does not fit wrn-16-1 with 3 classes: \d+ missing"):
        Trainer(replace(config, teacher=(text,), overwrite=True), quiet, stripes)
    text = f"robust={path}"
    with pytest.raises(ValueError, match=r"is not a bmtard checkpoint .* say its architecture"):
        Trainer(replace(config, teacher=(text,), overwrite=True), quiet, stripes)


def test_swapped_teachers_are_warned_of(
    config: TrainConfig, digits: ImageData, teachers: dict[str, Path], quiet: Any
) -> None:
    swapped = {"teacher_clean": teachers["robust"], "teacher_robust": teachers["clean"]}
    with pytest.warns(UserWarning, match=r"teacher robust .* clean images alone; .* swapped\?"):
        Trainer(replace(config, method="bmtard", **swapped), quiet, digits)


def test_evaluate_data_from_python(
    config: TrainConfig, stripes: ImageData, tmp_path: Path, quiet: Any
) -> None:
    config = short(config, tmp_path, method="natural", model="cnn-2")
    result = train(config, quiet, stripes)
    options = EvaluateConfig(attacks=(), device="cpu")
    summary = evaluate(result.checkpoint, options, lambda name, accuracy: None, stripes)
    assert summary["accuracy"] == result.accuracy
    with pytest.raises(ValueError, match=r"python:stripes is made in Python"):
        evaluate(result.checkpoint, options, lambda name, accuracy: None)


def test_own_networks_train_and_are_evaluated(
    config: TrainConfig, digits: ImageData, tmp_path: Path, quiet: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "student_networks.py").write_text(
        "from torch import nn\n"
        "def linear(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    name = "student_networks:linear"
    config = replace(
        config, method="natural", model=name, epochs=6, validation_fraction=0.2, output=None
    )
    assert config.folder == Path("runs/digits-natural-student_networks-linear-seed0")
    result = train(config, quiet, digits)
    assert result.accuracy["clean"] > 0.5
    options = EvaluateConfig(attacks=(), device="cpu")
    with pytest.raises(ValueError, match=r"made by the function student_networks:linear"):
        evaluate(result.checkpoint, options, lambda name, accuracy: None, digits)
    options = replace(options, model=name)
    summary = evaluate(result.checkpoint, options, lambda name, accuracy: None, digits)
    assert summary["accuracy"]["clean"] == result.accuracy["clean"]
    # as a teacher: its function is named beside the file
    student = replace(
        config, method="rslad", model="cnn-2", output=tmp_path / "rslad", validation_fraction=0.0
    )
    Trainer(replace(student, teacher=(f"robust={result.checkpoint}:{name}",)), quiet, digits)
    with pytest.raises(ValueError, match=r"made by the function student_networks:linear"):
        Trainer(replace(student, teacher=(f"robust={result.checkpoint}",)), quiet, digits)


# ---- more than two ----


@pytest.fixture
def three(
    config: TrainConfig, teachers: dict[str, Path], tmp_path: Path, digits: ImageData
) -> TrainConfig:
    third = tmp_path / "third.pt"
    state = checkpoint.load(teachers["robust"])
    state["model"]["network.head.weight"] *= 0.5
    checkpoint.save(third, state)
    named = [f"{role}={path}" for role, path in teachers.items()]
    return replace(config, teacher=(f"third={third}@clean", *named))


def test_three_teachers_against_a_loop(three: TrainConfig, digits: ImageData, quiet: Any) -> None:
    """MTARD's loss and weights of two steps, written out for K teachers."""
    trainer = Trainer(replace(three, method="mtard"), quiet, digits)
    method = trainer.method
    assert method.seen() == [["robust", "adversarial"], ["clean", "clean"], ["third", "clean"]]
    networks = [
        checkpoint.load_network(three.teachers[role].path)[0]
        for role in ("robust", "clean", "third")
    ]
    student = trainer.network.eval()
    x, y = next(trainer.batches.epoch(0))
    weights, initial = [1 / 3] * 3, None
    for step in range(2):
        x_adv = (x + 0.1 * (step + 1)).clamp(0, 1)
        seen = (x_adv, x, x)
        losses = []
        with torch.no_grad():
            for network, images in zip(networks, seen, strict=True):
                p = torch.softmax(network(images).double(), 1)
                log_q = torch.log_softmax(student(images).double(), 1)
                losses.append((p * ((p + 1e-5).log() - log_q)).mean().item())
        initial = initial or losses
        relative = [now / first for now, first in zip(losses, initial, strict=True)]
        rate = three.balance.weight_lr
        weights = [
            (1 - rate) * w + rate * r / sum(relative)
            for w, r in zip(weights, relative, strict=True)
        ]
        expected = sum(w * value for w, value in zip(weights, losses, strict=True))
        expected *= three.loss.distillation_scale
        loss = method.loss(student, x, x_adv, y)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert method.observed()["weights"].tolist() == pytest.approx(weights, rel=1e-6)


def test_the_student_answers_once_to_each_kind(
    three: TrainConfig, digits: ImageData, quiet: Any
) -> None:
    trainer = Trainer(replace(three, method="bmtard"), quiet, digits)
    x, _ = next(trainer.batches.epoch(0))
    asked: list[Tensor] = []

    def student(images: Tensor) -> Tensor:
        asked.append(images)
        return trainer.network(images)

    x_adv = x + 0.01
    students, taught = trainer.method.logits(student, x, x_adv)
    assert len(asked) == 2
    assert (asked[0] is x_adv, asked[1] is x) == (True, True)
    assert len(students) == len(taught) == 3
    assert students[1] is students[2]
    assert not torch.equal(taught[1], taught[2])


@pytest.mark.parametrize("method", ["mtard", "bmtard"])
def test_three_teachers_train_and_resume(
    method: str, three: TrainConfig, digits: ImageData, quiet: Any, tmp_path: Path
) -> None:
    three = replace(three, method=method)
    train(three, quiet, digits)
    rows = read_metrics(three.folder / "metrics.jsonl")
    assert all(len(row["weights"]) == 3 for row in rows)
    assert sum(rows[-1]["weights"]) == pytest.approx(1)
    if method == "bmtard":
        # Every teacher as uncertain as the most uncertain one.
        entropies = rows[-1]["entropies"]
        assert entropies == pytest.approx([max(entropies)] * 3, abs=1e-3)
    state = checkpoint.load(three.folder / "last.pt")
    assert state["teachers"] == [["robust", "adversarial"], ["clean", "clean"], ["third", "clean"]]
    other = tuple(text.replace("@clean", "") for text in three.teacher)
    with pytest.raises(
        ValueError, match=r"resume: the teachers see .* they saw .*'third', 'clean'"
    ):
        Trainer(replace(three, teacher=other, resume=True), quiet, digits)
    with pytest.raises(ValueError, match=r"resume: the teachers see"):
        Trainer(replace(three, teacher=three.teacher[1:], resume=True), quiet, digits)
    Trainer(replace(three, resume=True), quiet, digits)


def test_teachers_of_other_methods(three: TrainConfig, digits: ImageData, quiet: Any) -> None:
    with pytest.raises(ValueError, match=r"method rslad has no use for a teacher third"):
        Trainer(replace(three, method="rslad"), quiet, digits)
    rest = replace(three, teacher=three.teacher[1:])
    assert list(Trainer(replace(rest, method="rslad"), quiet, digits).method._teachers) == [
        "robust"
    ]
    one = replace(three, teacher=three.teacher[:1])
    with pytest.raises(ValueError, match=r"bmtard needs --teacher-robust .* --teacher-clean"):
        METHODS["bmtard"](one, {"third": nn.Identity()})


def test_command_line(
    three: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cli"
    arguments = [
        "train", "digits", "--epochs", "1", "--model", "cnn-2", "--device", "cpu",
        "--attack.steps", "1", "--output", str(out),
    ]  # fmt: skip
    assert cli.main([*arguments, "--teacher", *three.teacher]) == 0
    assert (out / "balance.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads((out / "config.json").read_text())
    assert written["teacher"] == list(three.teacher)
    not_one = tmp_path / "not-one.pt"
    not_one.write_text("not a checkpoint")
    for text, problem in (
        (f"robust={not_one}", "not-one.pt is not a complete checkpoint"),
        (f"robust={not_one}:resnet-18", "not-one.pt is not a complete checkpoint"),
    ):
        command = [*arguments, "--overwrite", "--teacher", text, three.teacher[1]]
        capsys.readouterr()
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert len(error.splitlines()) == 1
