"""The training methods: what each attacks to make its images, and its loss from the logits."""

from __future__ import annotations

from bmtard.extras import import_object
from bmtard.training.methods.adaad import AdaAD
from bmtard.training.methods.ard import ARD
from bmtard.training.methods.base import Method, Network
from bmtard.training.methods.fast import FGSMRS, NFGSM
from bmtard.training.methods.iad import IAD1, IAD2
from bmtard.training.methods.mart import MART
from bmtard.training.methods.mtard import BMTARD, MTARD
from bmtard.training.methods.rslad import RSLAD
from bmtard.training.methods.standard import SAT, Natural
from bmtard.training.methods.trades import TRADES

__all__ = ["METHODS", "Method", "Network", "find_method"]

METHODS: dict[str, type[Method]] = {
    "natural": Natural,
    "sat": SAT,
    "fgsm-rs": FGSMRS,
    "n-fgsm": NFGSM,
    "trades": TRADES,
    "mart": MART,
    "ard": ARD,
    "rslad": RSLAD,
    "iad-i": IAD1,
    "iad-ii": IAD2,
    "adaad": AdaAD,
    "mtard": MTARD,
    "bmtard": BMTARD,
}


def find_method(name: str) -> type[Method]:
    """The method of that name, or the class ``package.module:Class``.

    Raises ValueError where there is none, or it is no :class:`Method`.
    """
    if name in METHODS:
        return METHODS[name]
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(
            f"method {name}: it must be a subclass of bmtard.training.methods.Method, got {found!r}"
        )
    return found
