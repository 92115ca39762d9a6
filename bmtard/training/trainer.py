"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bmtard.data import Batches, ImageData, load
from bmtard.models import build_model
from bmtard.training import checkpoint
from bmtard.training.awp import perturbed_weights
from bmtard.training.config import TrainConfig, saved_settings, to_plain
from bmtard.training.evaluate import accuracies, resolve_device, weighted
from bmtard.training.files import write_json
from bmtard.training.methods import Method, find_method
from bmtard.training.metrics import Display, MetricsLog, Progress
from bmtard.training.teachers import check_teacher, sample

# What may differ between a run and its continuation without changing its numbers.
FREE_FIELDS = {
    "data_dir", "teacher_clean", "teacher_robust", "teacher", "check_teachers", "device", "output",
    "overwrite", "resume", "test_attacks", "log_every", "checkpoint_every", "max_skipped",
    "tensorboard",
}  # fmt: skip


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
    """One run of a :class:`TrainConfig`.

    Non-finite losses and gradients: such a step changes neither weights nor momentum nor batch
    statistics, without a look at the device; they are counted, and too many in an epoch are an
    error. On the CPU a resumed run equals an uninterrupted one bit for bit.
    """

    def __init__(
        self, config: TrainConfig, progress: Progress, data: ImageData | None = None
    ) -> None:
        """``data``: already loaded, else by ``config.data``."""
        self.config, self.progress, self.folder = config, progress, config.folder
        if (self.folder / "last.pt").exists() and not (config.resume or config.overwrite):
            raise ValueError(
                f"{self.folder} already holds a run: resume it, overwrite it, or choose another "
                "output"
            )
        self.device = resolve_device(config.device)
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
        if config.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.method = self._build_method()
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
        self.epoch, self.step, self.best = 0, 0, -1.0
        if config.resume:
            self._resume()
        self.student: nn.Module = self.network
        if config.compile:
            self.student = cast(nn.Module, torch.compile(self.network))

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
        return method(self.config, teachers).to(self.device)

    @property
    def evaluated(self) -> nn.Module:
        """The network, or the average of its weights where there is one."""
        return self.network if self.average is None else self.average

    def run(self) -> TrainResult:
        """Trains to the last epoch, tests, and writes results.json."""
        config = self.config
        started = time.perf_counter()
        title = f"{config.method} {config.model} on {config.data}, seed {config.seed}"
        log = MetricsLog(
            self.folder,
            resume_step=self.step if config.resume else None,
            tensorboard=config.tensorboard,
        )
        again = replace(config, resume=False, overwrite=False)
        write_json(self.folder / "config.json", to_plain(again))
        self.progress.begin(title, config.epochs, self.epoch)
        try:
            while self.epoch < config.epochs:
                self.progress.advance(self._train_epoch(log))
                if self.epoch % config.checkpoint_every == 0 or self.epoch == config.epochs:
                    checkpoint.save(self.folder / "last.pt", self.state())
            chosen = self.folder / ("best.pt" if self.validation else "last.pt")
            network = self.evaluated
            if self.validation:
                network = checkpoint.load_network(chosen, self.device, config.model)[0]
            results = self._accuracies(
                network, self.data.test_images, self.data.test_labels, config.test_attacks
            )
            log.write("test", self.step, **results)
        finally:
            log.close()
        seconds = time.perf_counter() - started
        summary = {
            "accuracy": results,
            "weighted_robust_accuracy": weighted(results),
            "checkpoint": str(chosen),
            "seconds": seconds,
        }
        write_json(self.folder / "results.json", summary)
        numbers = ", ".join(f"{name} {100 * value:.1f} %" for name, value in results.items())
        self.progress.end(f"{numbers} ({seconds:.0f} s)")
        return TrainResult(checkpoint=chosen, accuracy=results, seconds=seconds)

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
        )

    def _train_epoch(self, log: MetricsLog) -> str:
        """Returns a line for the display."""
        config = self.config
        steps = len(self.batches)
        started = logged = time.perf_counter()
        # summed losses of good steps, good steps, skipped steps; since the last log, then in all
        recent = torch.zeros(3, dtype=torch.float64, device=self.device)
        totals = [0.0, 0.0, 0.0]
        for index, (x, labels) in enumerate(self.batches.epoch(self.epoch)):
            progress = (self.epoch + index / steps) / config.epochs
            lr = config.optimizer.lr * config.optimizer.factor(progress)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.method.set_progress(progress)
            loss, skipped = self._train_step(x, labels)
            recent += torch.stack([loss.masked_fill(skipped, 0), ~skipped, skipped])
            self.step += 1
            if self.step % config.log_every == 0 or index == steps - 1:
                observed = self.method.observed()
                values = torch.cat([recent, *observed.values()]).tolist()  # the only wait
                loss_sum, good, bad, *rest = values
                totals = [a + b for a, b in zip(totals, values[:3], strict=True)]
                recent.zero_()
                now = time.perf_counter()
                fields: dict[str, Any] = {}
                for name, tensor in observed.items():
                    fields[name], rest = rest[: len(tensor)], rest[len(tensor) :]
                log.write(
                    "train",
                    self.step,
                    epoch=self.epoch + (index + 1) / steps,
                    loss=loss_sum / good if good else None,
                    lr=lr,
                    images_per_s=(good + bad) * self.batches.batch_size / (now - logged),
                    skipped=int(bad),
                    **fields,
                )
                logged = now
        self.epoch += 1
        loss_sum, good, bad = totals
        if bad > config.max_skipped * steps:
            raise NonFiniteLossError(
                f"epoch {self.epoch}: {bad:.0f} of {steps} steps had a non-finite loss or gradient "
                f"and were skipped, more than max_skipped={config.max_skipped} allows; a lower "
                f"optimizer.lr than {config.optimizer.lr} may help"
            )
        fields = {"loss": loss_sum / good, "skipped": int(bad)} if good else {"skipped": int(bad)}
        due = self.epoch % config.validation_every == 0 or self.epoch == config.epochs
        if self.validation and due:
            fields |= self._validate()
        log.write("epoch", self.step, seconds=time.perf_counter() - started, **fields)
        text = f"loss {fields.get('loss', float('nan')):.4f}"
        validation = fields.get("weighted")
        return text + (f", validation {100 * validation:.1f} %" if validation is not None else "")

    def _train_step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss and whether the step was skipped, both 0-d on the device."""
        self.network.train()
        buffers = list(self.network.buffers())
        kept = [buffer.clone() for buffer in buffers]
        with self._autocast():
            x_adv = self.method.perturb(self.student, x, labels)
        with self._perturbed(x, x_adv, labels):
            with self._autocast():
                loss = self.method.loss(self.student, x, x_adv, labels)
            self.optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            loss = loss.detach()
            skipped = ~(torch.nn.utils.get_total_norm(gradients) + loss).isfinite()
            # The fused step reads this attribute; torch.amp.GradScaler sets it in the same way.
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
        if self.average is not None:
            self._update(self.average, skipped)
        return loss, skipped

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

        return perturbed_weights(self.network, awp.gamma, loss)

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
        """Measures the validation images; keeps the best network so far as best.pt."""
        assert self.validation is not None
        steps = self.config.validation_steps
        results = self._accuracies(self.evaluated, *self.validation, ("pgd-sat",), steps)
        score = weighted(results)["pgd-sat"]
        if score > self.best:
            self.best = score
            checkpoint.save(self.folder / "best.pt", self.state())
        return {**results, "weighted": score}

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
            "step": self.step,
            "best": self.best,
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            },
        }

    def _resume(self) -> None:
        path = self.folder / "last.pt"
        state = checkpoint.load(path)
        now, then = to_plain(self.config), saved_settings(state["config"])
        if changed := [n for n in now if n not in FREE_FIELDS and now[n] != then[n]]:
            name = changed[0]
            raise ValueError(
                f"resume: {name} is {now[name]!r}, but {path} was trained with {then[name]!r}"
            )
        seen = self.method.seen()
        if (saw := state.get("teachers", seen)) != seen:
            raise ValueError(f"resume: the teachers see {seen}, but in {path} they saw {saw}")
        if self.average is None:
            self.network.load_state_dict(state["model"])
        else:
            self.average.load_state_dict(state["model"])
            self.network.load_state_dict(state["weights"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)


def train(
    config: TrainConfig, progress: Progress | None = None, data: ImageData | None = None
) -> TrainResult:
    """Runs one configuration to its last epoch; shows its progress if nobody else does."""
    if progress is not None:
        return Trainer(config, progress, data).run()
    with Display() as display:
        return Trainer(config, display.run(), data).run()
