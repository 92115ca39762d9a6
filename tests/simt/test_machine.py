"""The machine itself: what its conversions give, and that it sees what it should see."""

from __future__ import annotations

import numpy as np

from . import harness as h


def test_half_types_convert_as_numpy_does():
    simt = h.simt()
    every = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    for bits in every.tolist():
        want16 = float(np.uint16(bits).view(np.float16))
        wide16 = simt.widen_float16(bits)
        wide_b = simt.widen_bfloat16(bits)
        assert wide16 == want16 or np.isnan([wide16, want16]).all()
        assert np.isnan(wide_b) or wide_b == h.decode(np.uint16([bits]))[0]
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.standard_normal(500) * 10.0 ** rng.integers(-9, 6, 500),
            [0.0, -0.0, 65519.0, 65520.0, -1e9, np.inf, -np.inf, 6e-8, 2.9e-8, 3e-8, 1 + 2**-11],
            [1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8],  # ties
        ]
    )
    for value in values.astype(np.float32).tolist():
        assert simt.narrow_float16(value) == h.encode(np.array([value]), "float16").view(np.uint16)
        assert simt.narrow_bfloat16(value) == h.encode(np.array([value]), "bfloat16")
