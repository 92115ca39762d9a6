"""The fixture ``path``; a plugin of its own, because pytest registers each plugin once."""

from collections.abc import Iterator

import pytest
import torch
from oracles import require_native

from bmtard import _library


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on the compiled kernels and again on plain torch."""
    threads = torch.get_num_threads()
    if request.param == "native":
        require_native()
    else:
        monkeypatch.setattr(_library, "NATIVE", False)
        # Its tiny ops run tens of times slower where two threads share one busy core.
        torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)
