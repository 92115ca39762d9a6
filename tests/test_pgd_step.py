"""pgd_step_ against NumPy in float64, and bit for bit where the arithmetic is exact."""

import math

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, accumulation, randn

import bmtard

pytest_plugins = ["paths"]

# Images, a sample smaller than a vector, one of odd size, flat samples, numbers, nothing.
SHAPES = [(2, 3, 8, 8), (5, 1), (3, 1, 7, 5), (4, 1001), (9,), (0, 3, 4, 4), (2, 0), (130, 3, 9, 9)]
STEP, EPSILON = 2 / 255, 8 / 255


def draw(shape, dtype, device):
    """x_adv somewhat outside of the ball around x, with gradients of every sign."""
    x = randn(*shape, scale=0.3, seed=1).add(0.5).clamp(0, 1).to(device, dtype)
    x_adv = (x.double() + randn(*shape, scale=0.04, seed=2).to(device)).to(dtype)
    grad = randn(*shape, scale=1e-3, seed=3).to(device, dtype)
    grad.view(-1)[::7] = 0
    return x_adv, grad, x


def expected_linf(x_adv, grad, x, step_size, epsilon, bounds):
    x_adv, grad, x = (oracles.numpy(t) for t in (x_adv, grad, x))
    moved = np.clip(x_adv + step_size * np.sign(grad), x - epsilon, x + epsilon)
    return moved if bounds is None else np.clip(moved, *bounds)


def expected_l2(x_adv, grad, x, step_size, epsilon, bounds):
    x_adv, grad, x = (oracles.numpy(t) for t in (x_adv, grad, x))
    result = np.empty_like(x)
    for n in range(len(x)):
        length = np.linalg.norm(grad[n].ravel())
        delta = x_adv[n] - x[n]
        if 0 < length < np.inf:
            delta = delta + step_size * grad[n] / length
        distance = np.linalg.norm(delta.ravel())
        result[n] = x[n] + delta * min(1.0, epsilon / distance if distance else 1.0)
    return result if bounds is None else np.clip(result, *bounds)


EXPECTED = {"linf": expected_linf, "l2": expected_l2}


def assert_rounded(actual, expected, dtype):
    """Within one rounding of the dtype, after float32 arithmetic."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(
        actual.cpu().double(), expected.double(),
        rtol=0.51 * torch.finfo(dtype).eps + 4e-7 * (accumulation(dtype) != torch.float64),
        atol=1e-7 if accumulation(dtype) != torch.float64 else 1e-15,
    )  # fmt: skip


@pytest.mark.parametrize("norm", EXPECTED)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None, (-0.2, 0.7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_numpy(device, path, shape, dtype, bounds, norm):
    x_adv, grad, x = draw(shape, dtype, device)
    epsilon = EPSILON if norm == "linf" else 0.4
    step_size = STEP if norm == "linf" else 0.1
    expected = EXPECTED[norm](x_adv, grad, x, step_size, epsilon, bounds)
    before = [grad.clone(), x.clone()]
    result = bmtard.pgd_step_(
        x_adv, grad, x, step_size=step_size, epsilon=epsilon, bounds=bounds, norm=norm
    )
    assert result is x_adv
    assert_rounded(x_adv, expected, dtype)
    assert torch.equal(grad, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linf_is_bit_for_bit_the_usual_expression(device, path, dtype):
    x_adv, grad, x = draw((130, 3, 9, 9), dtype, device)
    moved = x_adv + STEP * grad.sign()
    expected = torch.min(torch.max(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
    assert torch.equal(bmtard.pgd_step_(x_adv, grad, x, step_size=STEP, epsilon=EPSILON), expected)


@pytest.mark.parametrize("norm", EXPECTED)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded", "offset"])
def test_layouts(device, path, layout, which, norm):
    tensors = list(draw((4, 3, 6, 6), torch.float32, device))
    options = {"step_size": 0.1, "epsilon": 0.2, "norm": norm}
    t = tensors[which]
    if layout == "channels_last":
        other = t.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        other = t.transpose(0, 3).contiguous().transpose(0, 3)
    elif layout == "sliced":
        other = t.new_zeros(4, 3, 6, 13)[..., ::2][..., :6].copy_(t)
    elif layout == "offset":
        other = t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
    else:
        if which == 0:
            pytest.skip("an expanded x_adv would hold several results in one number")
        other = t[:1].expand(4, 3, 6, 6)
        tensors[which] = other.contiguous()
    expected = bmtard.pgd_step_(tensors[0].clone(), *tensors[1:], **options)
    tensors[which] = other
    result = bmtard.pgd_step_(*tensors, **options)
    assert result is tensors[0]
    torch.testing.assert_close(result, expected)


def test_slice_of_a_larger_batch_leaves_the_rest_alone(device, path):
    x_adv, grad, x = draw((6, 3, 4, 4), torch.float32, device)
    before = x_adv.clone()
    bmtard.pgd_step_(x_adv[1:5:2], grad[1:5:2], x[1:5:2], step_size=STEP, epsilon=EPSILON)
    assert torch.equal(x_adv[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
    assert not torch.equal(x_adv[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("norm", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_and_image_of_another_dtype(device, path, dtype, norm):
    x_adv, grad, x = draw((4, 3, 6, 6), torch.float32, device)
    other = [grad.to(dtype), x.to(dtype)]
    expected = EXPECTED[norm](x_adv, *other, 0.1, 0.2, (0, 1))
    bmtard.pgd_step_(x_adv, *other, step_size=0.1, epsilon=0.2, norm=norm)
    assert_rounded(x_adv, expected, torch.float32)


@pytest.mark.parametrize("norm", EXPECTED)
def test_many_steps_stay_in_the_ball_and_reach_its_surface(device, path, norm):
    _, _, x = draw((4, 3, 6, 6), torch.float64, device)
    x_adv, direction = x.clone(), randn(4, 3, 6, 6, device=device, seed=9)
    for _ in range(50):
        bmtard.pgd_step_(x_adv, direction, x, step_size=0.05, epsilon=0.3, bounds=None, norm=norm)
    order = math.inf if norm == "linf" else 2
    distance = (x_adv - x).flatten(1).norm(order, dim=1)
    torch.testing.assert_close(distance, torch.full_like(distance, 0.3))


def test_zero_nan_and_infinite_gradients(device, path):
    x = torch.full((1, 5), 0.5, device=device)
    grad = torch.tensor([[0.0, math.nan, math.inf, -math.inf, 1e-30]], device=device)
    result = bmtard.pgd_step_(x.clone(), grad, x, step_size=0.1, epsilon=0.3)
    torch.testing.assert_close(result, torch.tensor([[0.5, 0.5, 0.6, 0.4, 0.6]], device=device))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_l2_gradient_without_a_direction_moves_nothing(device, path, bad):
    x_adv, grad, x = draw((3, 3, 4, 4), torch.float32, device)
    x_adv = x.clone()
    if bad == 0:
        grad[1] = 0
    else:
        grad[1, 0, 0, 0] = bad
    bmtard.pgd_step_(x_adv, grad, x, step_size=0.1, epsilon=0.3, norm="l2")
    assert torch.equal(x_adv[1], x[1])
    assert not torch.equal(x_adv[[0, 2]], x[[0, 2]])


@pytest.mark.parametrize("norm", EXPECTED)
def test_step_and_radius_of_zero(device, path, norm):
    x_adv, grad, x = draw((3, 3, 4, 4), torch.float64, device)
    bmtard.pgd_step_(x_adv, grad, x, step_size=0.0, epsilon=10.0, bounds=None, norm=norm)
    expected, _, _ = draw((3, 3, 4, 4), torch.float64, device)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)
    bmtard.pgd_step_(x_adv, grad, x, step_size=0.1, epsilon=0.0, bounds=None, norm=norm)
    torch.testing.assert_close(x_adv, x, rtol=0, atol=1e-15)


def test_inputs_that_require_grad(device, path):
    x_adv, grad, x = draw((3, 4), torch.float32, device)
    x_adv.requires_grad_()
    x.requires_grad_()
    grad.requires_grad_()
    expected = bmtard.pgd_step_(
        x_adv.detach().clone(), grad.detach(), x.detach(), step_size=STEP, epsilon=EPSILON
    )
    with torch.no_grad():
        bmtard.pgd_step_(x_adv, grad, x, step_size=STEP, epsilon=EPSILON)
    assert x_adv.is_leaf
    assert torch.equal(x_adv.detach(), expected)


def test_overwriting_invalidates_what_autograd_saved(device, path):
    x_adv, grad, x = draw((3, 4), torch.float32, device)
    weight = torch.ones(3, 4, device=device, requires_grad=True)
    loss = (weight * x_adv).sum()
    bmtard.pgd_step_(x_adv, grad, x, step_size=STEP, epsilon=EPSILON)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_around_nan_is_nan(device, path, dtype, bounds):
    """As torch.min(torch.max(...)) has it; also in the part of a vector at the end."""
    x_adv, grad, x = draw((3, 37), dtype, device)
    x[0, 0] = x[1, 20] = x[2, 36] = math.nan
    bmtard.pgd_step_(x_adv, grad, x, step_size=STEP, epsilon=EPSILON, bounds=bounds)
    assert torch.equal(x_adv.isnan(), x.isnan())


# Squares of float32 underflow below 1e-23 and overflow above 1.8e19; of float64 at 1e-162, 1e154.
SCALES = {
    torch.float32: [1e-44, 1e-38, 1e-30, 1e-18, 1e18, 1e30, 1e38],
    torch.float64: [1e-320, 1e-300, 1e-160, 1e160, 1e300],
    torch.bfloat16: [1e-38, 1e30],
}


@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d in SCALES for s in SCALES[d]], ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 40, 40)], ids=str)
def test_l2_step_along_any_gradient(device, path, shape, dtype, scale):
    """The step has its length however small or large the gradient is."""
    x = torch.full(shape, 0.5, dtype=dtype, device=device)
    grad = (randn(*shape, seed=3).clamp(-2, 2) * scale).to(device, dtype)
    x_adv = bmtard.pgd_step_(
        x.clone(), grad, x, step_size=0.25, epsilon=100.0, bounds=None, norm="l2"
    )
    direction = grad.double() / grad.double().abs().max()
    direction = direction / direction.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))
    assert_rounded(x_adv, x.double().cpu() + 0.25 * direction.cpu(), dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, s) for s in (1e-30, 1e25)] + [(torch.float64, 1e200)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("moves", [False, True])
def test_l2_projection_of_any_perturbation(device, path, dtype, scale, moves):
    x = torch.zeros(2, 700, dtype=dtype, device=device)
    x_adv = (randn(2, 700, seed=4) * scale).to(device, dtype)
    epsilon = 0.5 * scale
    delta = x_adv.double()
    grad = x_adv / scale * moves
    step_size = float(torch.tensor(2.0 * scale, dtype=dtype)) if moves else 1.0
    if moves:
        delta = delta + step_size * grad.double() / grad.double().norm(dim=1, keepdim=True)
    bmtard.pgd_step_(x_adv, grad, x, step_size=step_size, epsilon=epsilon, bounds=None, norm="l2")
    unit = delta / scale
    expected = unit / unit.norm(dim=1, keepdim=True) * 0.5
    torch.testing.assert_close(
        x_adv.double() / scale, expected, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-7
    )
