"""Two processes that train together hold what one process has with the same batches."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from quiet import Quiet
from torch import Tensor, nn

from bmtard import cli
from bmtard.data import Batches, ImageData
from bmtard.training import checkpoint
from bmtard.training.config import (
    AttackConfig,
    AWPConfig,
    BalanceConfig,
    EvaluateConfig,
    TrainConfig,
)
from bmtard.training.evaluate import accuracies, evaluate
from bmtard.training.methods.standard import SAT
from bmtard.training.metrics import read_metrics
from bmtard.training.ranks import Ranks, SharedError, joined, local_device
from bmtard.training.signals import StopRequest
from bmtard.training.trainer import Trainer, train
from bmtard.types import Share

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
ROOT = Path(__file__).parents[2]
RANKS = 2
SIGNAL_AT = "TEST_RANKS_SIGNAL_AT"


class Double(nn.Module):
    """Without batch norm, whose statistics are those of a part; in double, so that tolerances are
    those of rounding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, num_classes)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.double())


def double(num_classes: int) -> nn.Module:
    return Double(num_classes)


class NaNOnOne(SAT):
    """In the second step, on the second rank."""

    calls = 0

    def perturb(self, student: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        bad = self.calls == 2 and self.share.index == 1
        return super().perturb(student, x, labels) * (torch.nan if bad else 1)


class Signalled(SAT):
    """In some step rank 1 has SIGTERM sent to torchrun, and waits until it is here."""

    calls = 0

    def perturb(self, student: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == int(os.environ.get(SIGNAL_AT, "0")) and self.share.index == 1:
            request = signal.getsignal(signal.SIGTERM).__self__
            os.kill(os.getppid(), signal.SIGTERM)
            while request._number is None:
                time.sleep(0.01)
        return super().perturb(student, x, labels)


def images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (90, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(90) % 4
    pixels[:, 0, 0] = (60 * labels)[:, None]  # something to learn
    return ImageData(
        name="python:blobs", train_images=pixels[:50], train_labels=labels[:50],
        test_images=pixels[50:], test_labels=labels[50:], num_classes=4,
    )  # fmt: skip


BASE = TrainConfig(
    data="python:blobs", model=f"{__name__}:double", epochs=2, batch_size=12, crop_padding=1,
    attack=AttackConfig(epsilon=0.1, step_size=0.05, steps=2, random_start="uniform"),
    check_teachers=False, test_attacks=("pgd-sat",), log_every=1, device="cpu", ema=0.9,
)  # fmt: skip
SIGN = BalanceConfig(mode="sign", temperature_lr=0.05, weight_lr=0.3)
BISECT = BalanceConfig(weight_lr=0.3)
L2 = replace(BASE.attack, norm="l2", epsilon=0.5)
RUNS: dict[str, dict[str, Any]] = {
    "sat": {"method": "sat", "attack": L2, "validation_fraction": 0.2, "validation_steps": 2},
    "n-fgsm": {"method": "n-fgsm"},
    "trades": {"method": "trades", "attack": replace(BASE.attack, random_start="gaussian")},
    "bmtard-sign": {"method": "bmtard", "balance": SIGN},
    "bmtard-bisect": {"method": "bmtard", "balance": BISECT, "awp": AWPConfig(gamma=0.01)},
    "accumulated": {"method": "bmtard", "balance": SIGN, "accumulate": 3},
    "accumulated-bisect": {"method": "bmtard", "balance": BISECT, "accumulate": 2},
    "bad": {"method": f"{__name__}:NaNOnOne", "max_skipped": 0.5},
    "batch-norm": {"method": "mtard", "model": "cnn-2", "balance": BISECT},
}


def runs(folder: Path) -> dict[str, TrainConfig]:
    teachers = {"teacher_clean": folder / "clean.pt", "teacher_robust": folder / "robust.pt"}
    return {
        name: replace(
            BASE,
            output=folder / name,
            **(teachers if "mtard" in changes["method"] else {}),
            **changes,
        )
        for name, changes in RUNS.items()
    }


def together(ranks: Ranks) -> None:
    with ranks.together():
        if ranks.rank == 1:
            raise OSError("no disk")


def work(rank: int, folder: Path) -> None:
    """Every run, on one of two ranks; keeps the states that the rank ends with."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    states = {}
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.count) == (rank, RANKS)
        for name, config in runs(folder / "two").items():
            trainer = Trainer(config, Quiet(), images(), ranks)
            trainer.run()
            states[name] = trainer.state()
        data, network = images(), trainer.evaluated
        states["accuracies"] = measured(network, data, ranks)
        path = folder / "two" / "batch-norm" / "last.pt"
        options = EvaluateConfig(attacks=("pgd-sat",), batch_size=9, sanity=0, device="cpu")
        told: list[str] = []
        summary = evaluate(path, options, lambda name, accuracy: told.append(name), data)
        states["evaluated"] = summary["accuracy"]
        assert told == (["clean", "pgd-sat"] if rank == 0 else [])
        for problem, changes in (
            ("sync_batch_norm needs GPUs", {"sync_batch_norm": True}),
            ("multiple of the 2 processes, got 7", {"batch_size": 7}),
        ):
            config = replace(BASE, method="natural", output=folder / problem, **changes)
            with pytest.raises(SharedError, match=problem):
                train(config, Quiet(), data)
            assert not (folder / problem / "last.pt").exists()
        with pytest.raises(SharedError, match=r"^rank 1: no disk$"):
            together(ranks)
        stop = StopRequest(ranks.highest)
        with stop.listening():
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):  # on both, in the same step
                stop.check()
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


def measured(network: nn.Module, data: ImageData, ranks: Ranks) -> dict[str, float]:
    return accuracies(
        network, data.test_images, data.test_labels, attacks=("fgsm", "pgd-sat"), epsilon=0.2,
        batch_size=9, ranks=ranks,
    )  # fmt: skip


def compare(got: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, Tensor) and wanted.is_floating_point():
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9, msg=where)
    elif isinstance(wanted, Tensor):
        assert torch.equal(got, wanted), where
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), where
        for name in wanted:
            compare(got[name], wanted[name], f"{where}, {name}")
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=1e-6), where
    elif isinstance(wanted, list):
        assert len(got) == len(wanted), where
        for k, value in enumerate(wanted):
            compare(got[k], value, f"{where}, {k}")
    else:
        assert got == wanted, where


LEARNED = ("model", "weights", "method", "optimizer", "epoch", "step", "best", "random", "totals")


def test_two_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    data = images()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for seed, (role, method) in enumerate([("clean", "natural"), ("robust", "fgsm-rs")]):
        config = replace(
            BASE, method=method, model="cnn-2", epochs=3 + 3 * seed, seed=seed,
            output=tmp_path / role,
        )  # fmt: skip
        content = train(config, Quiet(), data).checkpoint.read_bytes()
        for side in ("one", "two"):
            (tmp_path / side / f"{role}.pt").write_bytes(content)
    mp.spawn(work, args=(tmp_path,), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for name in RUNS:
        for part in LEARNED:
            compare(first[name][part], second[name][part], f"ranks, {name}, {part}")
            equal = first[name][part], second[name][part]
            assert not isinstance(equal[0], dict) or tensors_equal(*equal), (name, part)
    for name, config in runs(tmp_path / "one").items():
        if name in ("bad", "batch-norm"):
            continue
        trainer = Trainer(replace(config, accumulate=1), Quiet(), data)
        trainer.run()
        state = trainer.state()
        if config.accumulate > 1:
            both = Trainer(replace(config, output=tmp_path / f"{name}-alone"), Quiet(), data)
            both.run()
            for part in LEARNED:
                compare(both.state()[part], state[part], f"{name} alone, {part}")
        for part in LEARNED:
            compare(first[name][part], state[part], f"{name}, {part}")
        for event in ("train", "epoch", "test"):
            one, two = (
                read_metrics(tmp_path / side / name / "metrics.jsonl", event)
                for side in ("one", "two")
            )
            for row in (*one, *two):
                row.pop("images_per_s", None), row.pop("seconds", None)
            compare(two, one, f"{name}, {event}")
    assert float(first["bmtard-bisect"]["method"]["balance.temperatures"].max()) > 1.01
    # A step that is not finite on one rank is none on both, and its whole batch is kept.
    rows = read_metrics(tmp_path / "two" / "bad" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1] + [0] * 6
    found = checkpoint.load(tmp_path / "two" / "bad" / "non-finite.pt")["non_finite"]
    assert (found["step"], len(found["images"])) == (1, BASE.batch_size)
    # The images of an evaluation are shared, and the random starts those of one process.
    assert first["accuracies"] == second["accuracies"]
    network = checkpoint.load_network(tmp_path / "two" / "batch-norm" / "last.pt")[0]
    assert first["accuracies"] == measured(network, data, Ranks())
    written = json.loads((tmp_path / "two" / "batch-norm" / "evaluation.json").read_text())
    assert first["evaluated"] == second["evaluated"] == written["accuracy"]
    options = EvaluateConfig(attacks=("pgd-sat",), batch_size=9, sanity=0, device="cpu")
    path = tmp_path / "two" / "batch-norm" / "last.pt"
    assert evaluate(path, options, lambda *_: None, data)["accuracy"] == written["accuracy"]


def tensors_equal(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return all(tensors_equal(a[name], b[name]) for name in a)
    return not isinstance(a, Tensor) or torch.equal(a, b)


def test_the_parts_of_a_batch_are_the_batch() -> None:
    data = images()

    def batches(share: Share) -> Batches:
        return Batches(
            data.train_images, data.train_labels, batch_size=12, shuffle=True, crop_padding=2,
            flip=True, seed=3, share=share,
        )  # fmt: skip

    parts = [list(batches(Share(index, 3)).epoch(1)) for index in range(3)]
    for whole, *shares in zip(batches(Share()).epoch(1), *parts, strict=True):
        for k in range(2):
            assert torch.equal(torch.cat([share[k] for share in shares]), whole[k])


def test_other_commands_are_for_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for rank, wanted in ((1, ""), (0, "bmtard demo: one process does this; start it without")):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(["demo"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(wanted)
        assert bool(error) == bool(wanted)


def test_devices_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda", 4) == "cuda:3"
    assert local_device("cuda:1", 1) == "cuda:1"
    assert local_device("cpu", 4) == "cpu"
    with pytest.raises(ValueError, match="device 'cuda:1': 4 processes need a GPU each"):
        local_device("cuda:1", 4)


@pytest.mark.parametrize(
    "changes", [{"accumulate": 0}, {"accumulate": 2, "awp": AWPConfig(gamma=0.1)}]
)
def test_options_defend_themselves(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="accumulate must be"):
        replace(BASE, **changes)


OPTIONS = (
    "train", "digits", f"--model={__name__}:double", f"--method={__name__}:Signalled",
    "--epochs=2", "--batch-size=16", "--train-limit=64", "--attack.steps=2",
    "--validation-fraction=0.1", "--device=cpu", "--log-every=1",
)  # fmt: skip


def torchrun(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    tests = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "bmtard", *OPTIONS, f"--output={folder}", *options,
        ],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": tests, "GLOO_SOCKET_IFNAME": interface, **variables},
    )  # fmt: skip


def test_torchrun_is_stopped_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    stopped = torchrun(folder, **{SIGNAL_AT: "6"})
    output = stopped.stdout + stopped.stderr
    assert stopped.returncode != 0
    message = r"bmtard train: stopped after epoch 2, batch 2; --resume goes on exactly there"
    assert len(re.findall(message, output)) == 1, output
    assert checkpoint.load(folder / "last.pt")["step"] == 6

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    finished = torchrun(folder, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("checkpoint: ") == 1
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 9))
    one = tmp_path / "one"
    assert cli.main([*OPTIONS, f"--output={one}"]) == 0
    assert cli.main([*OPTIONS, f"--output={moved}", "--resume"]) == 0  # with fewer processes
    for run in (folder, moved):
        for name in ("last.pt", "best.pt"):
            for part in ("model", "optimizer", "step", "random"):
                state, alone = (checkpoint.load(path / name)[part] for path in (run, one))
                compare(state, alone, f"{name}, {part}")
    assert not list(folder.glob("*.tmp"))
