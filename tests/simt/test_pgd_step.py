from __future__ import annotations

import numpy as np
import pytest

from . import harness as h

SIZES = [
    (0, 5),
    (1, 1),
    (3, 10),
    (2, 3072),
    (5, 1001),
    (3, 2047),
    (1, 4096),
    (1, 4097),
    (3, 8 * 256 + 8),
]


def step(x_adv, grad, x, dtype, *, shift=0, **settings):
    """Arrays [N, D] of float64; returns x_adv after the step, decoded."""
    out = h.Outputs()
    target = out.new(x_adv.shape, dtype, shift=shift)
    target[...] = h.encode(x_adv, dtype)
    h.simt().pgd_step(
        x_adv=target,
        grad=h.place(grad, dtype, shift=shift),
        x=h.place(x, dtype, shift=shift),
        **settings,
    )
    out.check()
    return h.decode(target)


def draw(seed, n, d, dtype):
    rng = np.random.default_rng(seed)
    x = h.rounded(rng.uniform(0, 1, (n, d)), dtype)
    x_adv = h.rounded(x + rng.uniform(-0.03, 0.03, (n, d)), dtype)
    grad = h.rounded(rng.standard_normal((n, d)), dtype)
    return x_adv, grad, x


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_linf(shape, dtype, shift):
    x_adv, grad, x = draw(0, *shape, dtype)
    if grad.size > 3:
        grad.flat[::3] = 0
        grad.flat[1] = np.nan
    settings = {"step_size": 2 / 255, "epsilon": 8 / 255, "low": 0.0, "high": 1.0, "l2": False}
    h.simt().take_counters()
    got = step(x_adv, grad, x, dtype, shift=shift, **settings)
    assert h.simt().take_counters()["launches"] == (1 if x.size else 0)
    # The constants are rounded to the type that is computed in, as torch does with scalars.
    size, epsilon = (float(h.real(dtype).type(settings[k])) for k in ("step_size", "epsilon"))
    moved = x_adv + size * np.nan_to_num(np.sign(grad))
    want = np.clip(np.clip(moved, x - epsilon, x + epsilon), 0, 1)
    h.assert_close(got, want, dtype, ulp=2)


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_linf_without_bounds(dtype):
    x_adv, grad, x = draw(1, 2, 100, dtype)
    x_adv[0, 0] = np.nan
    bounds = {"low": -np.inf, "high": np.inf}
    got = step(x_adv, grad, x - 5, dtype, step_size=0.25, epsilon=100.0, l2=False, **bounds)
    assert np.isnan(got[0, 0])
    want = x_adv + 0.25 * np.sign(grad)
    h.assert_close(got.ravel()[1:], want.ravel()[1:], dtype, ulp=2)


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_linf_bounds_come_last(dtype):
    """An image beyond its bounds: the ball around it does not reach them."""
    x_adv, grad, x = draw(8, 2, 100, dtype)
    settings = {"step_size": 0.01, "epsilon": 0.05, "low": 0.0, "high": 1.0, "l2": False}
    for beyond, bound in [(2.0, 1.0), (-2.0, 0.0)]:
        got = step(x_adv + beyond, grad, x + beyond, dtype, **settings)
        np.testing.assert_array_equal(got, bound)


@pytest.mark.parametrize("dtype", h.DTYPES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("epsilon", [0.05, 10.0])
def test_l2(shape, dtype, epsilon):
    x_adv, grad, x = draw(2, *shape, dtype)
    h.simt().take_counters()
    got = step(x_adv, grad, x, dtype, step_size=0.5, epsilon=epsilon, low=0.0, high=1.0, l2=True)
    assert h.simt().take_counters()["launches"] == (1 if x.size else 0)
    norm = np.linalg.norm(grad, axis=-1, keepdims=True)
    delta = x_adv + 0.5 * grad / norm - x
    length = np.linalg.norm(delta, axis=-1, keepdims=True)
    want = np.clip(x + delta * np.minimum(1, epsilon / length), 0, 1)
    h.assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_l2_makes_no_step_without_a_direction(dtype):
    x_adv, grad, x = draw(3, 3, 700, dtype)
    grad[0] = 0
    grad[1, 5] = np.nan
    grad[2, 5] = np.inf
    wide = {"low": -np.inf, "high": np.inf, "l2": True}
    got = step(x_adv, grad, x, dtype, step_size=0.5, epsilon=100.0, **wide)
    h.assert_close(got, x_adv, dtype, ulp=4)


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_l2_projects_without_a_direction(dtype):
    """A perturbation that is too long already."""
    x_adv, grad, x = draw(4, 2, 700, dtype)
    grad[0] = 0
    grad[1, 5] = np.nan
    wide = {"low": -np.inf, "high": np.inf, "l2": True}
    got = step(x_adv, grad, x, dtype, step_size=0.5, epsilon=0.1, **wide)
    delta = x_adv - x
    want = x + delta * 0.1 / np.linalg.norm(delta, axis=-1, keepdims=True)
    h.assert_close(got, want, dtype, ulp=4)


WIDE = {"low": -np.inf, "high": np.inf, "l2": True}


@pytest.mark.parametrize("dtype", h.DTYPES)
def test_linf_around_nan(dtype):
    x_adv, grad, x = draw(5, 3, 37, dtype)
    x[0, 0] = x[1, 20] = x[2, 36] = np.nan
    got = step(x_adv, grad, x, dtype, step_size=0.1, epsilon=0.2, low=0.0, high=1.0, l2=False)
    assert (np.isnan(got) == np.isnan(x)).all()


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-44, "float32"), (1e-30, "float32"), (1e-21, "float32"), (1e30, "float32"),
     (1e38, "float32"), (1e-300, "float64"), (1e-160, "float64"), (1e300, "float64"),
     (1e30, "bfloat16")],
)  # fmt: skip
def test_l2_step_along_any_gradient(scale, dtype):
    """Whose squares are subnormal, or under- or overflow."""
    for n, d in [(3, 10), (2, 3072)]:
        x_adv, grad, x = draw(6, n, d, dtype)
        grad = h.rounded(np.clip(grad, -2, 2) * scale, dtype)
        got = step(x_adv, grad, x, dtype, step_size=0.5, epsilon=0.4, **WIDE)
        direction = grad / np.abs(grad).max(-1, keepdims=True)
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        delta = x_adv + 0.5 * direction - x
        length = np.linalg.norm(delta, axis=-1, keepdims=True)
        want = x + delta * np.minimum(1, 0.4 / length)
        h.assert_close(got, want, dtype)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-30, "float32"), (1e25, "float32"), (1e200, "float64")]
)
def test_l2_projects_any_perturbation(scale, dtype):
    rng = np.random.default_rng(7)
    for d in (10, 3072):
        x_adv = h.rounded(scale * rng.standard_normal((2, d)), dtype)
        zero = np.zeros_like(x_adv)
        for grad in (zero, h.rounded(rng.standard_normal((2, d)), dtype)):
            moves = bool(grad.any())
            length = np.linalg.norm(grad, axis=-1, keepdims=True) if moves else 1
            unit = x_adv / scale + grad / length
            settings = {"step_size": scale, "epsilon": 0.5 * scale}
            got = step(x_adv, grad, zero, dtype, **settings, **WIDE)
            want = 0.5 * unit / np.linalg.norm(unit, axis=-1, keepdims=True)
            h.assert_close(got / scale, want, dtype)
