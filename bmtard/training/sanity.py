"""Whether an accuracy under attack is to be believed: signs of masked gradients.

The signs are those of Athalye et al. (ICML 2018) and Carlini et al. ("On evaluating adversarial
robustness", 2019): an attack without gradients or with one step beats one with many, an unlimited
attack fails, gradients vanish, or luck in the start decides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmtard.attacks import Norm, module_mode, pgd

BETTER = 0.02
"""By so much of the images a weaker attack may beat a stronger one, by chance."""
LUCK = 0.05
"""So much of the images may fall to another start alone, or have no gradient."""
RESTARTS = 5
QUERIES = 100
"""Of the search without gradients."""

WHITE_BOX = ("fgsm", "pgd-sat", "pgd-trades", "cw")  # AutoAttack is not by gradients alone
BLACK_BOX = ("square", "transfer-pgd", "transfer-cw")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One sign."""

    name: str
    passed: bool
    sentence: str
    """what was found, and what it means"""
    values: dict[str, float]


def check_sanity(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: Norm = "linf",
    results: dict[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, Any]:
    """Looks for masked gradients at those images [N, c, h, w] in [0, 1] that are classified right.

    results: accuracies measured already, whose black-box and white-box attacks are compared too.
    Returns "images", their number; "believable"; "verdict", in words; "checks", each a
    :class:`Check` as a dict.
    """
    with module_mode(network, "eval"):
        checks, count = _checks(network, x, labels, epsilon, norm, results or {}, seed, batch_size)
    failed = [check.sentence for check in checks if not check.passed]
    if not count:
        verdict = "Nothing could be checked: no image is classified right."
    elif failed:
        verdict = "This robustness is not to be believed. " + " ".join(failed)
    else:
        verdict = "Nothing speaks against these figures."
    return {
        "images": count,
        "believable": bool(count) and not failed,
        "verdict": verdict,
        "checks": [asdict(check) for check in checks],
    }


def _checks(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: Norm,
    results: dict[str, float],
    seed: int,
    batch_size: int,
) -> tuple[list[Check], int]:
    generator = torch.Generator(x.device).manual_seed(seed)

    def answers(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(part).argmax(1) for part in images.split(batch_size)])

    first, second = answers(x), answers(x)
    changed = (first != second).double().mean().item()
    checks = [
        Check(
            name="one answer",
            passed=changed == 0,
            sentence="The network answers the same image in the same way."
            if changed == 0
            else f"The network draws random numbers: asked twice, {_percent(changed)} of its "
            "answers change, so attack the mean of several passes (eot_samples of pgd).",
            values={"changed": changed},
        )
    ]
    right = first == labels
    x, labels = x[right], labels[right]
    if not len(x):
        return [], 0

    def attacked(radius: float, steps: int, step: float, start: str = "uniform") -> Tensor:
        """Which images are still classified right: bool [N]."""
        parts = [
            pgd(
                network, part, y, epsilon=radius, step_size=step * radius, steps=steps, norm=norm,
                random_start=start, generator=generator,  # type: ignore[arg-type]
            )
            for part, y in zip(x.split(batch_size), labels.split(batch_size), strict=True)
        ]  # fmt: skip
        return answers(torch.cat(parts)) == labels

    checks.append(_gradients(network, x, labels, batch_size))

    one_step = _share(attacked(epsilon, 1, 1.0, "none"))
    still = attacked(epsilon, 20, 1 / 4)
    many_steps = _share(still)
    passed = many_steps <= one_step + BETTER
    checks.append(
        Check(
            name="many steps",
            passed=passed,
            sentence=f"Twenty gradient steps leave {_percent(many_steps)}, one {_percent(one_step)}"
            + (", as it must be." if passed else ": the steps lead nowhere."),
            values={"one_step": one_step, "many_steps": many_steps},
        )
    )

    from_image = _share(attacked(epsilon, 20, 1 / 4, "none"))
    restarted = still
    for _ in range(RESTARTS - 1):
        restarted = restarted & attacked(epsilon, 20, 1 / 4)
    worst = _share(restarted)
    passed = max(many_steps, from_image) <= worst + LUCK
    checks.append(
        Check(
            name="start",
            passed=passed,
            sentence=f"From the image itself {_percent(from_image)} withstand, from one random "
            f"start {_percent(many_steps)}, from {RESTARTS} {_percent(worst)}: "
            + ("the start matters little." if passed else "luck in the start decides."),
            values={"no_start": from_image, "one_start": many_steps, "restarts": worst},
        )
    )

    # Within these radii every image can be made grey.
    unlimited = 0.5 if norm == "linf" else 0.5 * x[0].numel() ** 0.5
    large = _share(attacked(unlimited, 50, 1 / 10))
    guessed = labels.bincount().max().item() / len(labels)
    passed = large <= guessed
    checks.append(
        Check(
            name="large epsilon",
            passed=passed,
            sentence=f"At epsilon {unlimited:g}, where any image can be turned into any grey one, "
            f"{_percent(large)} withstand"
            + (", no more than guessing gives." if passed else ": the attack does not work."),
            values={"accuracy": large, "guessed": guessed},
        )
    )

    searched = _share(_search(answers, x, labels, epsilon, norm, generator))
    white = [results[name] for name in WHITE_BOX if name in results]
    black = {name: results[name] for name in BLACK_BOX if name in results}
    stronger = [n for n, value in black.items() if white and value < min(white) - BETTER]
    passed = searched >= many_steps - BETTER and not stronger
    sentence = (
        f"A search of {QUERIES} patterns without gradients leaves {_percent(searched)}, PGD "
        f"{_percent(many_steps)}"
    )
    if stronger:
        name = stronger[0]
        sentence += f"; {name} leaves {_percent(black[name])}, the best of the attacks by "
        sentence += f"gradients {_percent(min(white))}"
    sentence += ": gradients help." if passed else ": what knows no gradients is the better attack."
    checks.append(
        Check(
            name="black box",
            passed=passed,
            sentence=sentence,
            values={"search": searched, "pgd": many_steps, **black},
        )
    )
    return checks, len(x)


def _gradients(network: nn.Module, x: Tensor, labels: Tensor, batch_size: int) -> Check:
    zero = 0
    for part, y in zip(x.split(batch_size), labels.split(batch_size), strict=True):
        part = part.clone().requires_grad_()
        loss = F.cross_entropy(network(part).float(), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, part)
        zero += int((grad.flatten(1) == 0).all(1).sum())
    share = zero / len(x)
    passed = share <= LUCK
    return Check(
        name="gradients",
        passed=passed,
        sentence=f"{_percent(share)} of the images have no gradient at all"
        + ("." if passed else ": attacks by gradients cannot move them."),
        values={"zero": share},
    )


def _search(
    answers: Any, x: Tensor, labels: Tensor, epsilon: float, norm: Norm, generator: torch.Generator
) -> Tensor:
    """Which images withstand QUERIES random patterns of size epsilon: bool [N]."""
    height, width = x.shape[2:]
    shapes = [(1, width), (height, 1), (2, 2), (4, 4), (height, width)]
    still = torch.ones_like(labels, dtype=torch.bool)
    for query in range(QUERIES):
        shape = (*x.shape[:2], *shapes[query % len(shapes)])
        signs = torch.randint(0, 2, shape, device=x.device, generator=generator).to(x.dtype)
        pattern = F.interpolate(2 * signs - 1, size=(height, width))
        size = epsilon if norm == "linf" else epsilon / x[0].numel() ** 0.5
        still &= answers((x + size * pattern).clamp(0, 1)) == labels
    return still


def _share(still: Tensor) -> float:
    return still.double().mean().item()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
