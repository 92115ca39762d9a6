"""Adversarial training with one gradient: FGSM-RS and N-FGSM.

Both published attacks run the student in train mode, so that batch norm uses and counts the batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from bmtard.attacks import pgd, random_like
from bmtard.training.config import TrainConfig
from bmtard.training.methods.standard import SAT


class FGSMRS(SAT):
    """FGSM from a random start (Wong et al., ICLR 2020: "fast is better than free").

    Uniform in the ball, clipped to [0, 1]; one step of ``loss.fgsm_rs_step`` times epsilon; back
    into the ball. It may collapse ("catastrophic overfitting"): watch the accuracy under PGD.
    """

    def perturb(self, student: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        attack = self.config.attack
        return pgd(
            student,
            x,
            labels,
            epsilon=attack.epsilon,
            step_size=self.config.loss.fgsm_rs_step * attack.epsilon,
            steps=1,
            norm=attack.norm,
            random_start="uniform",
            mode="train",
            share=self.share,
        )


class NFGSM(SAT):
    """Noise-FGSM (de Jorge et al., NeurIPS 2022).

    Noise uniform within ``loss.n_fgsm_noise`` times epsilon, clipped to [0, 1]; one step of
    ``loss.n_fgsm_step`` times epsilon; no way back into the ball.
    """

    def __init__(self, config: TrainConfig, teachers: dict[str, nn.Module]) -> None:
        super().__init__(config, teachers)
        if config.attack.norm != "linf":
            raise ValueError(f"method n-fgsm: attack.norm must be linf, got {config.attack.norm!r}")

    def perturb(self, student: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        options, epsilon = self.config.loss, self.config.attack.epsilon
        noise, step = options.n_fgsm_noise * epsilon, options.n_fgsm_step * epsilon
        start = x + random_like(x, lambda t: t.uniform_(-noise, noise), self.share)
        return pgd(
            student,
            x,
            labels,
            epsilon=noise + step,  # as far as noise and step can lead
            step_size=step,
            steps=1,
            start=start,
            clip_start=True,
            mode="train",
        )
