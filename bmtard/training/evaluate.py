"""Clean and robust accuracy of a network."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmtard.attacks import Norm, autoattack, check_images, pgd, square
from bmtard.data import Batches, ImageData, load
from bmtard.extras import import_extra
from bmtard.training.checkpoint import load_network
from bmtard.training.config import EvaluateConfig, to_plain
from bmtard.training.files import write_json
from bmtard.training.ranks import ALONE, Ranks, joined, local_device
from bmtard.training.sanity import check_sanity

# step sizes as parts of epsilon
SUITE: dict[str, dict[str, Any]] = {
    "fgsm": {"steps": 1, "step": 1.0, "loss": "ce", "random_start": "none"},
    "pgd-sat": {"steps": 20, "step": 1 / 4, "loss": "ce", "random_start": "uniform"},
    "pgd-trades": {"steps": 20, "step": 0.003 * 255 / 8, "loss": "ce", "random_start": "uniform"},
    "cw": {"steps": 30, "step": 1 / 4, "loss": "cw", "random_start": "uniform"},
}
TRANSFER = {"transfer-pgd": "pgd-trades", "transfer-cw": "cw"}


def accuracies(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Sequence[str],
    epsilon: float,
    norm: Norm = "linf",
    max_value: int = 255,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    surrogate: nn.Module | None = None,
    square_queries: int = 5000,
    seed: int = 0,
    steps: int | None = None,
    ranks: Ranks = ALONE,
    report: Callable[[str, float], None] = lambda name, accuracy: None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, float]:
    """Fractions of correct answers: "clean", then each attack of :class:`EvaluateConfig`.

    images: uint8 [N, c, h, w]. steps: of the attacks by gradient steps, instead of their own
    number. ``report`` is called with each result as it comes, ``progress`` with the attack, the
    batches done and all of them. ranks: each takes every ``ranks.count``-th batch, and all return
    what one would: a random start is a function of ``seed`` and the number of the batch.
    """
    check_installed(attacks)
    batches = Batches(images, labels, batch_size=batch_size, device=device, max_value=max_value)
    network.eval()
    results: dict[str, float] = {}
    for name in ("clean", *attacks):
        generator = torch.Generator(device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for index, (x, y) in enumerate(batches.epoch()):
            if index % ranks.count != ranks.rank:
                continue
            progress(name, index, len(batches))
            check_images(x)
            generator.manual_seed((seed << 20) + index)
            if name in ("square", "autoattack"):
                options: dict[str, Any] = {"epsilon": epsilon, "norm": norm, "seed": seed}
                if name == "square":
                    x = square(network, x, y, queries=square_queries, **options)
                else:
                    x = autoattack(network, x, y, square_queries=square_queries, **options)
            elif name != "clean":
                attacked = surrogate if name in TRANSFER else network
                if attacked is None:
                    raise ValueError(f"accuracies: attack {name!r} needs a surrogate")
                options = dict(SUITE[TRANSFER.get(name, name)])
                options["steps"] = steps or options["steps"]
                x = pgd(
                    attacked,
                    x,
                    y,
                    epsilon=epsilon,
                    step_size=options.pop("step") * epsilon,
                    norm=norm,
                    generator=generator,
                    **options,
                )
            with torch.no_grad():
                correct += (network(x).argmax(1) == y).sum()
        results[name] = ranks.sum(int(correct)) / len(images)
        report(name, results[name])
    return results


def check_installed(attacks: Sequence[str]) -> None:
    """Raises ImportError where one of ``attacks`` needs a package that is not there."""
    if "square" in attacks or "autoattack" in attacks:
        import_extra("pyautoattack", "eval")


def weighted(results: dict[str, float]) -> dict[str, float]:
    """Weighted robust accuracy, (clean + robust) / 2, of each attack."""
    return {
        name: (results["clean"] + value) / 2 for name, value in results.items() if name != "clean"
    }


def evaluate(
    path: Path,
    config: EvaluateConfig,
    report: Callable[[str, float], None],
    data: ImageData | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on the test images of its data set and writes the JSON file.

    ``data``: already loaded, else that of the checkpoint. Where torchrun has started several
    processes, they share the images; rank 0 alone looks whether to believe it, and writes.
    """
    with joined(config.device) as ranks:
        return _evaluate(path, config, report, data, progress, ranks)


def _evaluate(
    path: Path,
    config: EvaluateConfig,
    report: Callable[[str, float], None],
    data: ImageData | None,
    progress: Callable[[str, int, int], None],
    ranks: Ranks,
) -> dict[str, Any]:
    surrogate: nn.Module | None = None
    if not ranks.main:
        report, progress = lambda name, accuracy: None, lambda name, done, total: None
    with ranks.together():
        device = resolve_device(config.device, ranks)
        network, state = load_network(path, device, config.model)
        if config.surrogate:
            surrogate = load_network(config.surrogate, device, config.model)[0]
        trained = state["config"]
        try:
            method, model, name = trained["method"], trained["model"], trained["data"]
            folder, attack = trained["data_dir"], {"norm": "linf", **trained["attack"]}
            epsilon, norm = config.epsilon or attack["epsilon"], config.norm or attack["norm"]
        except (KeyError, TypeError) as error:
            message = f"{path} is incomplete: its settings (config) have no {error}"
            raise ValueError(message) from None
        if config.epsilon is None and norm != attack["norm"]:
            raise ValueError(
                f"epsilon must be given with norm {norm}: {path} was trained in {attack['norm']}"
            )
        data = data or load(name, config.data_dir or folder)
        output = config.output or path.with_name("evaluation.json")
        if ranks.main:
            _check_output(output, (path, config.surrogate))
    config = replace(config, epsilon=epsilon, norm=norm)
    started = time.perf_counter()
    results = accuracies(
        network,
        data.test_images[: config.limit],
        data.test_labels[: config.limit],
        attacks=config.attacks,
        epsilon=epsilon,
        norm=norm,
        max_value=data.max_value,
        batch_size=config.batch_size,
        device=device,
        surrogate=surrogate,
        square_queries=config.square_queries,
        seed=config.seed,
        ranks=ranks,
        report=report,
        progress=progress,
    )
    sanity: dict[str, Any] | None = None
    if config.sanity and ranks.main:
        count = min(config.sanity, config.limit or config.sanity)
        sanity = check_sanity(
            network,
            data.test_images[:count].to(device).float() / data.max_value,
            data.test_labels[:count].to(device),
            epsilon=epsilon,
            norm=norm,
            results=results,
            seed=config.seed,
            batch_size=config.batch_size,
        )
    seconds = time.perf_counter() - started
    summary = {
        "checkpoint": str(path),
        "method": method,
        "model": model,
        "data": name,
        "images": len(data.test_labels[: config.limit]),
        "accuracy": results,
        "weighted_robust_accuracy": weighted(results),
        "sanity": sanity,
        "evaluation": to_plain(config),
        "seconds": seconds,
    }
    if ranks.main:
        write_json(output, summary)
    return summary


def _check_output(output: Path, read: Sequence[Path | None]) -> None:
    """Fails now rather than after the attacks, and never lets a checkpoint be written over."""
    if output.is_dir():
        raise ValueError(f"output must be a JSON file, got the folder {output}")
    if output.exists() and any(file and output.samefile(file) for file in read):
        raise ValueError(f"output must be a JSON file of its own, got the checkpoint {output}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        writable = output if output.exists() else output.parent
        if not os.access(writable, os.W_OK):
            raise PermissionError(f"no permission to write {writable}")
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """A device by name; "auto" is CUDA where there is one. Raises ValueError if it is not there."""
    name = local_device(name, ranks.count)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" holds no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from None
    if ranks.count > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # for whatever names none
    return device
