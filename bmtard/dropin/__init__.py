"""The published functions, argument for argument: change the import and nothing else.

The names here are those in the repositories:

- TRADES ``trades.trades_loss``, MART ``mart.mart_loss``,
- RSLAD ``rslad_loss.rslad_inner_loss``, AdaAD ``AT_helper.adaad_inner_loss``,
- MTARD ``mtard_loss.mtard_inner_loss_ce``,
- ARD ``main.AttackPGD``, IAD ``IAD-I.AttackPGD``,
- HAT ``core.utils.hat.hat_loss``, LBGAT ``lbgat.lbgat_loss``,
- AWP ``utils_awp.AdvWeightPerturb``, ``utils_awp.TradesAWP``.

Each repeats the published procedure: the modes in which the model runs, the forward passes in their
order (what batch norm counts and where dropout draws), the start of the attack (``torch.randn`` on
the CPU; in AttackPGD ``uniform_`` on the device), clipping, and when gradients are zeroed. In
float64 training takes the published steps to rounding. Attack and loss run on the fused ops. One
thing is saved: where an attack has a fixed target, S(x) in eval mode, it is computed once and not
once a step. That is the same value unless the model draws random numbers in eval mode.

The losses from logits are in :mod:`bmtard.losses`, the attacks in :mod:`bmtard.attacks`.
"""

from bmtard.dropin.adaad import adaad_inner_loss
from bmtard.dropin.ard import AttackPGD
from bmtard.dropin.awp import AdvWeightPerturb, TradesAWP
from bmtard.dropin.hat import hat_loss
from bmtard.dropin.lbgat import lbgat_loss
from bmtard.dropin.mart import mart_loss
from bmtard.dropin.mtard import mtard_inner_loss_ce
from bmtard.dropin.rslad import rslad_inner_loss
from bmtard.dropin.trades import trades_loss

__all__ = [
    "AdvWeightPerturb",
    "AttackPGD",
    "TradesAWP",
    "adaad_inner_loss",
    "hat_loss",
    "lbgat_loss",
    "mart_loss",
    "mtard_inner_loss_ce",
    "rslad_inner_loss",
    "trades_loss",
]
