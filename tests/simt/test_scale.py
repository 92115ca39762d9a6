from __future__ import annotations

import numpy as np
import pytest

from . import harness as h


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("size", [0, 1, 5, 4096, 4097, 10000])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.3])  # no 16-bit type holds the last
def test_scale(size, dtype, shift, factor):
    out = h.Outputs()
    values = [h.draw(i, 1, size, dtype)[0] for i in range(3)]
    buffers = [out.new((size,), dtype, shift=shift) for _ in values]
    for buffer, value in zip(buffers, values, strict=True):
        buffer[...] = h.encode(value, dtype)
    h.simt().take_counters()
    h.simt().scale(buffers=buffers, factor=np.array(factor, h.real(dtype)))
    out.check()
    assert h.simt().take_counters()["launches"] == (1 if size else 0)
    for buffer, value in zip(buffers, values, strict=True):
        product = value.astype(h.real(dtype)) * h.real(dtype).type(factor)
        np.testing.assert_array_equal(h.decode(buffer), h.rounded(product, dtype))


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("odd", [0, 1])
def test_one_buffer_is_not_aligned(odd, dtype):
    out = h.Outputs()
    buffers = [out.new((5000,), dtype, shift=int(i == odd)) for i in range(2)]
    for buffer in buffers:
        buffer[...] = h.encode(np.ones(1), dtype)
    h.simt().take_counters()
    h.simt().scale(buffers=buffers, factor=np.array(2, h.real(dtype)))
    assert h.simt().take_counters()["packed_bytes"] > 0.99 * 2 * 2 * buffers[0].nbytes
    out.check()
    for buffer in buffers:
        np.testing.assert_array_equal(h.decode(buffer), 2)


def test_a_factor_of_one_moves_nothing():
    out = h.Outputs()
    buffer = out.new((1000,), "float32")
    bits = buffer.view(np.uint32)
    bits[...] = 0x7FA00001  # a signalling NaN, which any arithmetic would quiet
    h.simt().scale(buffers=[buffer], factor=np.array(1, np.float32))
    assert (bits == 0x7FA00001).all()
