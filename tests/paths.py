"""The fixture ``path``; a plugin of its own, because pytest registers each plugin once."""

import pytest
from oracles import require_native

from bmtard import _library


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on the compiled kernels and again on plain torch."""
    if request.param == "native":
        require_native()
    else:
        monkeypatch.setattr(_library, "NATIVE", False)
    return request.param
