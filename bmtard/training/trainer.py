"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bmtard.data import Batches, ImageData, load
from bmtard.extras import import_extra
from bmtard.models import build_model
from bmtard.models.fold import FoldedBatchNorm
from bmtard.training import checkpoint
from bmtard.training.awp import perturbed_weights
from bmtard.training.config import TrainConfig, saved_settings, to_plain
from bmtard.training.evaluate import accuracies, check_installed, resolve_device, weighted
from bmtard.training.files import locked, remove_temporaries, write_json
from bmtard.training.methods import Method, find_method
from bmtard.training.metrics import Display, MetricsLog, NoLog, NoProgress, Progress
from bmtard.training.ranks import ALONE, Ranks, joined, launched
from bmtard.training.signals import Stopped, StopRequest
from bmtard.training.teachers import check_teacher, sample
from bmtard.types import WHOLE, Share

# What may differ between a run and its continuation without changing its numbers.
FREE_FIELDS = {
    "data_dir", "teacher_clean", "teacher_robust", "teacher", "check_teachers", "device", "output",
    "overwrite", "resume", "replay", "test_attacks", "log_every", "checkpoint_every", "max_skipped",
    "tensorboard",
}  # fmt: skip


CHECKPOINTS = ("last.pt", "previous.pt", "best.pt", "non-finite.pt")
"""The last one, the one before it, that of the best validation, and before a non-finite step."""


class NonFiniteLossError(RuntimeError):
    """Too many steps of an epoch had a loss or gradient that was not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run leaves."""

    checkpoint: Path
    """last.pt, or best.pt if validation images chose"""
    accuracy: dict[str, float]
    """on the test images: "clean" and each of ``test_attacks``"""
    seconds: float
    """of training and testing, without loading"""


class Trainer:
    """One run of a :class:`TrainConfig`. Its folder belongs to the caller, see ``files.locked``.

    Non-finite losses and gradients: such a step changes neither weights nor momentum nor batch
    statistics, without a look at the device; they are counted, and too many in an epoch are an
    error. The first one is saved as non-finite.pt, see :meth:`replay`. On the CPU a resumed run
    equals an uninterrupted one bit for bit.

    With several ``ranks`` each has its part of every batch, random numbers and state are the same
    on all of them, and rank 0 writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        data: ImageData | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """``data``: already loaded, else by ``config.data``."""
        self.config, self.progress, self.folder = config, progress, config.folder
        self.ranks = ranks
        anew = not (config.resume or config.overwrite or config.replay)
        if anew and checkpoint.resumable(self.folder):
            raise ValueError(
                f"{self.folder} already holds a run: resume it, overwrite it, or choose another "
                "output"
            )
        for teacher in config.teachers.values():
            path = teacher.path.resolve()
            if path.parent == self.folder.resolve() and path.name in CHECKPOINTS:
                raise ValueError(
                    f"teacher {teacher.role} {teacher.path} lies in the folder of this run, which "
                    "writes its own there; choose another output"
                )
        check_installed(config.test_attacks)
        if config.tensorboard:
            import_extra("torch.utils.tensorboard", "train")
        self.device = resolve_device(config.device, ranks)
        if config.sync_batch_norm and ranks.count > 1 and self.device.type == "cpu":
            raise ValueError(
                "sync_batch_norm needs GPUs: torch cannot synchronise batch norm on a CPU; leave "
                "it out, or take a network without batch norm"
            )
        data = data or load(config.data, config.data_dir)
        self.validation: tuple[Tensor, Tensor] | None = None
        self.data = data
        if config.validation_fraction:
            seed = config.seed if config.validation_seed is None else config.validation_seed
            self.data, *held = data.split_validation(config.validation_fraction, seed)
            self.validation = (held[0], held[1])
        if config.train_limit is not None:
            self.data = replace(
                self.data,
                train_images=self.data.train_images[: config.train_limit],
                train_labels=self.data.train_labels[: config.train_limit],
            )
        self.batches = Batches(
            self.data.train_images,
            self.data.train_labels,
            batch_size=config.batch_size,
            device=self.device,
            max_value=data.max_value,
            shuffle=True,
            crop_padding=config.crop_padding,
            flip=config.flip,
            seed=config.seed,
            channels_last=config.channels_last,
            share=ranks.share,
        )
        if self.batches.batch_size % (ranks.count * config.accumulate):
            raise ValueError(
                f"accumulate: batch_size must be a multiple of {config.accumulate} parts in each "
                f"of {ranks.count} processes, got {self.batches.batch_size}"
            )
        torch.manual_seed(config.seed)
        mean, std = data.statistics()
        self.network_options: dict[str, Any] = {
            "name": config.model,
            "num_classes": data.num_classes,
            "mean": mean,
            "std": std,
        }
        self.network = build_model(**self.network_options).to(self.device)
        if config.sync_batch_norm and ranks.count > 1:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        if config.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.method = self._build_method()
        if ranks.count > 1:
            self.method.join(ranks)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.optimizer.lr,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
            fused=True,  # the fused step can be told on the device to do nothing
        )
        if config.optimizer.momentum:
            # The fused step leaves a new momentum undefined if it is told to do nothing.
            for parameter in self.network.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.average: nn.Module | None = None
        if config.ema:
            self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.epoch, self.batch, self.step, self.best = 0, 0, 0, -1.0
        self.epoch_seconds = 0.0  # of training, in this epoch
        # summed losses of good steps, good steps, skipped steps; since the last log line, then
        # until it in this epoch
        self.recent = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.totals = [0.0, 0.0, 0.0]
        # the state at some step, and whether each step since was skipped
        self._before: dict[str, Any] = {}
        self._flags: list[Tensor] = []
        self.stop = StopRequest(ranks.highest if ranks.count > 1 else None)
        if config.replay:
            self._load(config.replay, checkpoint.load(config.replay))
        elif config.resume:
            self._resume()
        self.student: nn.Module = self.network
        if config.compile:
            self.student = cast(nn.Module, torch.compile(self.network))
        # What is attacked, which takes no gradient of a weight and no communication; and what the
        # loss is taken of.
        self.attacked = self.averaging = self.student
        if config.fold_batch_norm:
            self.attacked = FoldedBatchNorm(self.network)

    def _build_method(self) -> Method:
        method, given = find_method(self.config.method), self.config.teachers
        roles = method.roles(tuple(given))
        if useless := [role for role in given if role not in (*roles, "clean", "robust")]:
            raise ValueError(f"method {self.config.method} has no use for a teacher {useless[0]}")
        teachers: dict[str, nn.Module] = {}
        for role in roles:
            if role not in given:
                continue
            teachers[role] = given[role].load(self.data, self.config.data, self.device)
            if self.config.check_teachers:
                images, labels = sample(self.data, 256, self.device)
                name = f"{role} {given[role].path}"
                check_teacher(name, teachers[role], images, labels, self.data.num_classes)
            if self.config.fold_batch_norm:
                teachers[role] = FoldedBatchNorm(teachers[role]).eval()
        return method(self.config, teachers).to(self.device)

    @property
    def evaluated(self) -> nn.Module:
        """The network, or the average of its weights where there is one."""
        return self.network if self.average is None else self.average

    def run(self) -> TrainResult:
        """Trains to the last epoch, tests, and writes results.json.

        SIGTERM and SIGINT end it with a checkpoint, exact to the step, and raise Stopped; OSError,
        one line, tells where a file cannot be written.
        """
        config, main = self.config, self.ranks.main
        started = time.perf_counter()
        if self.ranks.count > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            # Batch statistics are averaged with each step, see _train_step.
            self.averaging = DistributedDataParallel(
                self.student, device_ids, broadcast_buffers=False
            )
        title = f"{config.method} {config.model} on {config.data}, seed {config.seed}"
        if main and not config.resume:
            for name in (*CHECKPOINTS, "results.json"):
                (self.folder / name).unlink(missing_ok=True)
        log: MetricsLog = NoLog()
        if main:
            log = MetricsLog(
                self.folder,
                resume_step=self.step if config.resume else None,
                in_epoch=self.batch > 0,
                tensorboard=config.tensorboard,
            )
        try:
            with self.stop.listening():
                again = replace(config, resume=False, overwrite=False)
                if main:
                    write_json(self.folder / "config.json", to_plain(again))
                self.progress.begin(title, config.epochs, self.epoch)
                try:
                    chosen, results = self._train_and_test(log)
                except Stopped as stopped:
                    where = "the last epoch"
                    if self.epoch < config.epochs:
                        where = f"epoch {self.epoch + 1}, batch {self.batch}"
                        self._save_non_finite()
                        self._save(log)
                    raise Stopped(
                        stopped.number,
                        f"stopped after {where}; --resume goes on exactly there, from "
                        f"{self.folder / 'last.pt'}",
                    ) from None
        except OSError as error:
            last = self.folder / "last.pt"
            kept = f"; --resume goes on from {last} as it is" if last.exists() else ""
            raise OSError(f"{error}{kept}") from error
        finally:
            log.close()
        seconds = time.perf_counter() - started
        summary = {
            "accuracy": results,
            "weighted_robust_accuracy": weighted(results),
            "checkpoint": str(chosen),
            "seconds": seconds,
        }
        if main:
            write_json(self.folder / "results.json", summary)
        numbers = ", ".join(f"{name} {100 * value:.1f} %" for name, value in results.items())
        self.progress.end(f"{numbers} ({seconds:.0f} s)")
        return TrainResult(checkpoint=chosen, accuracy=results, seconds=seconds)

    def _train_and_test(self, log: MetricsLog) -> tuple[Path, dict[str, float]]:
        """Returns the checkpoint that counts, and its accuracies."""
        config = self.config
        while self.epoch < config.epochs:
            self.progress.advance(self._train_epoch(log))
            if self.epoch % config.checkpoint_every == 0 or self.epoch == config.epochs:
                self._save(log)
        chosen = self.folder / ("best.pt" if self.validation else "last.pt")
        network = self.evaluated
        self.ranks.sum(0)  # rank 0 has written what the others may read
        if self.validation:
            network = checkpoint.load_network(chosen, self.device, config.model)[0]
        with self.stop.at_once():
            results = self._accuracies(
                network, self.data.test_images, self.data.test_labels, config.test_attacks
            )
        log.write("test", self.step, **results)
        return chosen, results

    def _save(self, log: MetricsLog) -> None:
        """Writes last.pt, and what the log has told until then."""
        if not self.ranks.main:
            return
        log.sync()
        previous = self.folder / "previous.pt"
        checkpoint.save(self.folder / "last.pt", self.state(), previous=previous)

    def _accuracies(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        attacks: tuple[str, ...],
        steps: int | None = None,
    ) -> dict[str, float]:
        return accuracies(
            network,
            images,
            labels,
            attacks=attacks,
            epsilon=self.config.attack.epsilon,
            norm=self.config.attack.norm,
            max_value=self.data.max_value,
            device=self.device,
            steps=steps,
            ranks=self.ranks,
            progress=lambda name, done, total: self.progress.within(
                self.batch / len(self.batches), f"{name}, {100 * done / total:.0f} % done"
            ),
        )

    def _train_epoch(self, log: MetricsLog) -> str:
        """The rest of this epoch; returns a line for the display."""
        config = self.config
        steps = len(self.batches)
        logged, logged_step = time.perf_counter(), self.step
        started = logged - self.epoch_seconds
        self._before = {}
        for x, labels in itertools.islice(self.batches.epoch(self.epoch), self.batch, None):
            self._watch()
            lr = self._set_rates()
            loss, skipped = self._train_step(x, labels)
            self.recent += torch.stack([loss.masked_fill(skipped, 0), ~skipped, skipped])
            self._flags.append(skipped)
            self.step += 1
            self.batch += 1
            if self.step % config.log_every == 0 or self.batch == steps:
                observed = self.method.observed()
                values = torch.cat([self.recent, *observed.values()]).tolist()  # the only wait
                loss_sum, good, bad, *rest = values
                self.totals = [a + b for a, b in zip(self.totals, values[:3], strict=True)]
                self.recent.zero_()
                now = time.perf_counter()
                fields: dict[str, Any] = {}
                for name, tensor in observed.items():
                    fields[name], rest = rest[: len(tensor)], rest[len(tensor) :]
                mean = loss_sum / good if good else None
                log.write(
                    "train",
                    self.step,
                    epoch=self.epoch + self.batch / steps,
                    loss=mean,
                    lr=lr,
                    images_per_s=(self.step - logged_step)
                    * self.batches.batch_size
                    / (now - logged),
                    skipped=int(bad),
                    **fields,
                )
                logged, logged_step = now, self.step
                if bad:
                    self._save_non_finite()
                self._before = {}
                text = "" if mean is None else f"loss {mean:.4f}"
                self.progress.within(self.batch / steps, text)
            self.epoch_seconds = time.perf_counter() - started
            self.stop.check()
        loss_sum, good, bad = self.totals
        if bad > config.max_skipped * steps:
            raise NonFiniteLossError(
                f"epoch {self.epoch + 1}: {bad:.0f} of {steps} steps had a non-finite loss or "
                f"gradient and were skipped, more than max_skipped={config.max_skipped} allows; a "
                f"lower optimizer.lr than {config.optimizer.lr} may help"
            )
        fields = {"loss": loss_sum / good, "skipped": int(bad)} if good else {"skipped": int(bad)}
        due = (self.epoch + 1) % config.validation_every == 0 or self.epoch + 1 == config.epochs
        results = self._validate() if self.validation and due else {}
        seconds = time.perf_counter() - started
        self.epoch, self.batch, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.totals = [0.0, 0.0, 0.0]
        text = f"loss {fields.get('loss', float('nan')):.4f}"
        if results:
            text += f", validation {100 * results['weighted']:.1f} %"
            if results["weighted"] > self.best:
                self.best = results["weighted"]
                if self.ranks.main:
                    checkpoint.save(self.folder / "best.pt", self.state())
        log.write("epoch", self.step, seconds=seconds, **fields, **results)
        return text

    def _set_rates(self) -> float:
        """Those of the next step; returns the optimizer's learning rate."""
        options = self.config.optimizer
        progress = (self.epoch + self.batch / len(self.batches)) / self.config.epochs
        lr = options.lr * options.factor(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.method.set_progress(progress)
        return lr

    def _train_step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss and whether the step was skipped, both 0-d on the device."""
        self.network.train()
        buffers = list(self.network.buffers())
        kept = [buffer.clone() for buffer in buffers]
        if isinstance(self.attacked, FoldedBatchNorm):
            self.attacked.refresh()
        x_adv = self._perturb(x, labels)
        with self._perturbed(x, x_adv, labels):
            self.optimizer.zero_grad()
            loss = self._backward(x, x_adv, labels)
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            # The parts are of one size, so the mean of their means is that of the batch.
            self.ranks.mean_([loss, *(b for b in buffers if b.is_floating_point())])
            skipped = ~(torch.nn.utils.get_total_norm(gradients) + loss).isfinite()
            # The fused step reads this attribute; torch.amp.GradScaler sets it in the same way.
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
        if self.average is not None:
            self._update(self.average, skipped)
        return loss, skipped

    def _perturb(self, x: Tensor, labels: Tensor) -> Tensor:
        """The images of the adversarial terms, a part at a time."""
        parts, ranks = self.config.accumulate, self.ranks
        devices = [self.device] if self.device.type == "cuda" else []
        found = []
        for k, (images, answers) in enumerate(
            zip(x.chunk(parts), labels.chunk(parts), strict=True)
        ):
            self.method.share = Share(ranks.rank * parts + k, ranks.count * parts)
            # Each part draws for the whole batch, so all but the last leave the generator alone.
            again = torch.random.fork_rng(devices, enabled=k + 1 < parts)
            with again, self._autocast():
                found.append(self.method.perturb(self.attacked, images, answers))
        self.method.share = ranks.share
        return found[0] if parts == 1 else torch.cat(found)

    def _backward(self, x: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
        """Leaves the gradients of the loss, and returns it, without graph."""
        parts, method = self.config.accumulate, self.method
        if parts == 1:
            with self._autocast():
                loss = method.loss(self.averaging, x, x_adv, labels)
            loss.backward()
            return loss.detach()
        moved = self._move(x, x_adv, labels) if list(method.buffers()) else {}
        method.eval()
        losses = []
        for k, part in enumerate(zip(*(t.chunk(parts) for t in (x, x_adv, labels)), strict=True)):
            exchange: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if isinstance(self.averaging, DistributedDataParallel) and k + 1 < parts:
                exchange = self.averaging.no_sync()
            with exchange:
                with self._autocast():
                    loss = method.loss(self.averaging, *part) / parts
                loss.backward()
            losses.append(loss.detach())
        method.train()
        for buffer, value in moved.items():
            buffer.copy_(value)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _move(self, x: Tensor, x_adv: Tensor, labels: Tensor) -> dict[Tensor, Tensor]:
        """Moves the method's state as one step on the whole batch does.

        What moves after its use is put back, to be used; returns its buffers and their new values.
        """
        parts, later = self.config.accumulate, self.method.moves_after_use()
        before = [buffer.clone() for buffer in later]
        counted = list(self.network.buffers())
        kept = [buffer.clone() for buffer in counted]

        def student(images: Tensor) -> Tensor:
            return torch.cat([self.student(part) for part in images.chunk(parts)])

        with self._autocast():
            self.method.loss(student, x, x_adv, labels)
        moved = {buffer: buffer.clone() for buffer in later}
        for buffer, value in zip([*counted, *later], [*kept, *before], strict=True):
            buffer.copy_(value)
        return moved

    def _perturbed(
        self, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> contextlib.AbstractContextManager[None]:
        """Adversarial weight perturbation of this step, where there is any."""
        awp = self.config.awp
        if not awp.gamma or self.method.progress * self.config.epochs < awp.warmup:
            return contextlib.nullcontext()

        def loss() -> Tensor:
            self.method.eval()  # its state moves with the step's own loss alone
            with self._autocast():
                value = self.method.loss(self.student, x, x_adv, labels)
            self.method.train()
            return value

        return perturbed_weights(self.network, awp.gamma, loss, self.ranks.mean_)

    def _update(self, average: nn.Module, skipped: Tensor) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        weight = torch.where(skipped, 0.0, 1 - decay)
        new = self.network.state_dict()
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], weight.to(value.dtype))
            else:
                value.copy_(new[name])

    def _autocast(self) -> torch.autocast:
        enabled = self.config.autocast != "none"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _validate(self) -> dict[str, float]:
        """Measures the validation images."""
        assert self.validation is not None
        with self.stop.at_once():
            results = self._accuracies(
                self.evaluated, *self.validation, ("pgd-sat",), self.config.validation_steps
            )
        return {**results, "weighted": weighted(results)["pgd-sat"]}

    def _watch(self) -> None:
        """Keeps the state at the first step after a log line, until the next one."""
        if not self._before:
            # Its tensors live on, so these are copies; in host memory, which is there.
            wanted = self.ranks.main and not self._non_finite.exists()
            self._before = _copied(self.state()) if wanted else {"step": 0}
            self._flags = []

    @property
    def _non_finite(self) -> Path:
        return self.folder / "non-finite.pt"

    def _save_non_finite(self) -> None:
        """Writes the first batch whose loss or gradient was not finite, and how to come to it."""
        if "model" not in self._before:
            return
        flags = torch.stack(self._flags).tolist()
        if not any(flags):
            return
        epoch, batch = self._before["epoch"], self._before["batch"] + flags.index(True)
        batches = copy.copy(self.batches)
        batches.share = WHOLE
        x, labels = next(itertools.islice(batches.epoch(epoch), batch, None))
        found = {
            "epoch": epoch,
            "batch": batch,
            "step": self._before["step"] + flags.index(True),
            "seed": self.config.seed,
            "images": x.cpu(),
            "labels": labels.cpu(),
        }
        checkpoint.save(self._non_finite, {**self._before, "non_finite": found})
        self.progress.note(
            f"epoch {epoch + 1}, batch {batch + 1}: loss or gradient not finite, skipped; the same "
            f"command with --replay {self._non_finite} does it again"
        )

    def replay(self) -> Iterator[str]:
        """Does again the steps from the state in ``config.replay`` to the one that was not finite;
        a line on each, then on what was not finite. Nothing is written."""
        path = self.config.replay
        assert path is not None
        found = checkpoint.load(path).get("non_finite")
        if found is None:
            raise ValueError(f"replay: {path} was not written because of a non-finite step")
        rest = itertools.islice(self.batches.epoch(self.epoch), self.batch, found["batch"] + 1)
        for x, labels in rest:
            self._set_rates()
            loss, skipped = self._train_step(x, labels)
            self.batch += 1
            outcome = "not finite" if skipped else "finite"
            yield f"epoch {self.epoch + 1}, batch {self.batch}: loss {float(loss):.4g}, {outcome}"
        for name, parameter in self.network.named_parameters():
            gradient = parameter.grad
            if gradient is not None and not gradient.isfinite().all():
                count = int((~gradient.isfinite()).sum())
                yield f"{name}: {count} of {gradient.numel()} gradients not finite"

    def state(self) -> dict[str, Any]:
        """Of the checkpoint. The learning rates follow from epoch and configuration."""
        cuda = self.device.type == "cuda"
        return {
            "config": to_plain(self.config),
            "network": self.network_options,
            "model": self.evaluated.state_dict(),
            "weights": None if self.average is None else self.network.state_dict(),
            "method": self.method.state_dict(),
            "teachers": self.method.seen(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "best": self.best,
            "recent": self.recent,
            "totals": self.totals,
            "epoch_seconds": self.epoch_seconds,
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            },
        }

    def _resume(self) -> None:
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        if not checkpoint.resumable(self.folder):
            self.progress.note(f"no checkpoint in {self.folder} yet: begins with the first epoch")
            return
        try:
            state = checkpoint.load(last)
        except (ValueError, FileNotFoundError) as damage:
            if not previous.exists():
                raise
            state = checkpoint.load(previous)
            self.progress.note(f"{damage}; goes on from {previous}")
            temporary = self.folder / "last.pt.tmp"
            shutil.copyfile(previous, temporary)
            os.replace(temporary, last)
        self._load(last, state)

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        now, then = to_plain(self.config), saved_settings(state["config"])
        if changed := [n for n in now if n not in FREE_FIELDS and now[n] != then[n]]:
            name = changed[0]
            raise ValueError(
                f"resume: {name} is {now[name]!r}, but {path} was trained with {then[name]!r}"
            )
        seen = self.method.seen()
        if (saw := state.get("teachers", seen)) != seen:
            raise ValueError(f"resume: the teachers see {seen}, but in {path} they saw {saw}")
        try:
            if self.average is None:
                self.network.load_state_dict(state["model"])
            else:
                self.average.load_state_dict(state["model"])
                self.network.load_state_dict(state["weights"])
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, TypeError, AttributeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"resume: {path} does not fit this run: {reason}") from None
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.batch = state.get("batch", 0)
        if self.batch:
            self.recent.copy_(state["recent"])
            self.totals, self.epoch_seconds = state["totals"], state["epoch_seconds"]
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)


def _copied(value: Any) -> Any:
    """Nested dicts and lists with their tensors copied to host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def train(
    config: TrainConfig, progress: Progress | None = None, data: ImageData | None = None
) -> TrainResult:
    """Runs one configuration to its last epoch; shows its progress if nobody else does.

    Where torchrun has started several processes, they train together and return the same; rank 0
    alone shows and writes. Raises ValueError where another process trains in the same folder, and
    with ``config.replay``, which is for :func:`replay`.
    """
    if config.replay is not None:
        raise ValueError(f"train: replay must be None, got {config.replay}; call replay() with it")
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(joined(config.device))
        with ranks.together():
            if not ranks.main:
                progress = NoProgress()
            elif progress is None:
                progress = stack.enter_context(Display()).run()
            if ranks.main:
                stack.enter_context(locked(config.folder, wait=False, name=".train.lock"))
                remove_temporaries(config.folder)
            trainer = Trainer(config, progress, data, ranks)
        return trainer.run()


def replay(config: TrainConfig, progress: Progress, data: ImageData | None = None) -> Iterator[str]:
    """See :meth:`Trainer.replay`. Raises ValueError in one of several processes."""
    if config.replay is None:
        raise ValueError("replay: config.replay must be the file of a non-finite step, got None")
    if launched():
        raise ValueError("replay: one process does it; start it without torchrun")
    return Trainer(config, progress, data).replay()
