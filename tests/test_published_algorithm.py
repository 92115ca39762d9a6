"""BMTARDLoss against the published two-teacher algorithm, written again in NumPy float64.

Source: the released training script of B-MTARD (zhaoshiji123/MTARD-extension), lines 47-166.
"""

import numpy as np
import oracles
import pytest
import scipy.special
import torch
from oracles import randn

import bmtard

pytest_plugins = ["paths"]

EPS = 1e-5
STEPS = 300


class Published:
    """One step of the released code, for [student(x_adv), student(x)], [robust, clean]."""

    def __init__(self, temperature_lr, weight_lr):
        self.temperature_lr, self.weight_lr = temperature_lr, weight_lr
        self.temperature = np.ones(2)
        self.weight = np.array([0.5, 0.5])
        self.first_loss = None

    def __call__(self, student, teacher):
        """Two [N, C] arrays each -> total loss, its gradients by the student."""
        loss, negative_entropy, grad = np.empty(2), np.empty(2), []
        for k in range(2):
            p = scipy.special.softmax(teacher[k] / self.temperature[k], axis=1)
            log_q = scipy.special.log_softmax(student[k], axis=1)
            loss[k] = np.mean(p * np.log(p + EPS) - p * log_q)
            negative_entropy[k] = np.mean(p * np.log(p + EPS))
            grad.append((np.exp(log_q) - p) / p.size)
        if self.first_loss is None:
            self.first_loss = loss.copy()

        relative = loss / self.first_loss
        inverse_rate = relative / relative.mean()
        self.weight = self.weight - self.weight_lr * (
            self.weight - inverse_rate / inverse_rate.sum()
        )
        self.weight = np.maximum(self.weight, 0)
        self.weight = self.weight / self.weight.sum()
        total = float(self.weight @ loss)

        ratio = negative_entropy / negative_entropy[::-1]
        self.temperature = np.clip(
            self.temperature - self.temperature_lr * np.sign(ratio - 1), 1, 10
        )
        self.loss, self.negative_entropy = loss, negative_entropy
        return total, [self.weight[k] * grad[k] for k in range(2)]


def batches(steps, rows, classes, sharpness=(0.5, 3.0)):
    """Teachers of unlike sharpness, and a student that learns from them at unlike speeds."""
    start = [randn(rows, classes, scale=1.0, seed=k) for k in range(2)]
    for step in range(steps):
        teacher = [
            randn(rows, classes, scale=sharpness[k], seed=1000 + 2 * step + k) for k in range(2)
        ]
        learned = [1 - 0.997**step, 1 - 0.98**step]
        student = [learned[k] * teacher[k] + (1 - learned[k]) * start[k] for k in range(2)]
        yield student, teacher


def compare(loss, published, steps, rows=16, classes=10, decays=(), sharpness=(0.5, 3.0)):
    """Every step of both; returns the temperatures [steps, 2] and weights [steps, 2]."""
    device = loss.weights.device
    temperatures, weights = [], []
    for step, (student, teacher) in enumerate(batches(steps, rows, classes, sharpness)):
        if step in decays:
            loss.temperature_lr.mul_(0.1)
            loss.weight_lr.mul_(0.1)
            published.temperature_lr *= 0.1
            published.weight_lr *= 0.1
        x = [oracles.leaf(s.to(device)) for s in student]
        total = loss(x, [t.to(device) for t in teacher])
        grads = torch.autograd.grad(total, x)
        expected, expected_grads = published(
            [s.numpy() for s in student], [t.numpy() for t in teacher]
        )
        np.testing.assert_allclose(total.item(), expected, rtol=1e-5)
        for actual, wanted in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(oracles.numpy(actual), wanted, rtol=1e-5, atol=1e-12)
        for name, wanted in (
            ("temperatures", published.temperature),
            ("weights", published.weight),
            ("losses", published.loss),
            ("initial_losses", published.first_loss),
            # Theirs is divided by N * C, with the other sign.
            ("entropies", -classes * published.negative_entropy),
        ):
            actual = oracles.numpy(getattr(loss, name))
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, err_msg=f"{name}, step {step}")
        assert loss.step == step + 1
        assert loss.status == bmtard.BalanceStatus.UPDATED
        temperatures.append(published.temperature)
        weights.append(published.weight)
    return np.array(temperatures), np.array(weights)


def sign_loss(device, temperature_lr=1e-3, weight_lr=0.025):
    return bmtard.BMTARDLoss(
        balance="sign", temperature_lr=temperature_lr, weight_lr=weight_lr,
        reduction="mean", eps=EPS,
    ).to(device)  # fmt: skip


def test_published_settings(device, path):
    temperatures, weights = compare(sign_loss(device), Published(1e-3, 0.025), STEPS)
    # The sharper teacher, 1, has moved up by a step each time; the other stayed.
    np.testing.assert_allclose(temperatures[-1], [1.0, 1.3])
    assert abs(weights[-1] - 0.5).max() > 0.01


def test_learning_rates_that_decay_in_mid_run(device, path):
    decays = (100, 200, 250)
    temperatures, _ = compare(sign_loss(device, 5e-2), Published(5e-2, 0.025), STEPS, decays=decays)
    steps = abs(np.diff(temperatures, axis=0)).max(1)
    assert steps[:99].max() == pytest.approx(5e-2)
    assert steps[250:].max() == pytest.approx(5e-5)


def test_chatter_and_both_clips(device, path):
    # Teacher 1 is so sharp that only 10 is left for it; with 0.5 a step it is there after 18.
    temperatures, _ = compare(
        sign_loss(device, 0.5, 0.3), Published(0.5, 0.3), 60, sharpness=(0.05, 50.0)
    )
    assert (temperatures[20:, 1] == 10).all()
    assert (temperatures[:, 0] == 1).all()
    # Equal teachers on noisy batches: the sign changes often.
    temperatures, _ = compare(
        sign_loss(device, 0.05, 0.3), Published(0.05, 0.3), STEPS, sharpness=(2.0, 2.0)
    )
    moves = np.sign(np.diff(temperatures[:, 1]))
    assert (moves[1:] * moves[:-1] < 0).sum() > 20


@pytest.mark.parametrize(
    ("margins", "published_moves"),
    [((16, 8), (1, -1)), ((17, 8), (1, 1)), ((20, 18), (-1, 1))],
)
def test_the_documented_difference_for_certain_teachers(device, path, margins, published_moves):
    """From a logit margin of 17 on the published ratio of entropies changes its sign."""
    teachers = [np.zeros((4, 10)) for _ in margins]
    for teacher, margin in zip(teachers, margins, strict=True):
        teacher[:, 0] = margin
    published = Published(1e-3, 0.025)
    published([np.zeros((4, 10))] * 2, teachers)
    # Up from the lower bound is seen, down is not: look at the entropies that decide.
    ratio = published.negative_entropy / published.negative_entropy[::-1]
    assert tuple(-np.sign(ratio - 1)) == published_moves
    balance = bmtard.EntropyBalance(
        mode="sign", eps=EPS, bounds=(0.5, 10.0), temperature_lr=1e-3
    ).to(device)
    balance.temperatures.fill_(1.0)
    balance([torch.tensor(teacher, device=device) for teacher in teachers])
    assert (oracles.numpy(balance.temperatures) - 1 > 0).tolist() == [True, False]


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (128, 10), (7, 100)])
def test_other_shapes(device, path, rows, classes):
    compare(sign_loss(device, 1e-2, 0.1), Published(1e-2, 0.1), 40, rows, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_published_settings_in_lower_precision(device, path, dtype):
    loss, published = sign_loss(device), Published(1e-3, 0.025)
    for student, teacher in batches(100, 32, 10):
        student, teacher = ([x.to(device, dtype) for x in side] for side in (student, teacher))
        total = loss(student, teacher)
        expected, _ = published(*([oracles.numpy(x) for x in side] for side in (student, teacher)))
        np.testing.assert_allclose(total.item(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(oracles.numpy(loss.temperatures), published.temperature)
    np.testing.assert_allclose(oracles.numpy(loss.weights), published.weight, rtol=1e-4)


@pytest.mark.parametrize("bounds", [(1.0, 10.0), (0.5, 4.0)])
@pytest.mark.parametrize("scales", [(0.5, 1.5), (4.0, 0.7), (1.0, 1.0001)])
def test_sign_rule_on_a_fixed_batch_arrives_where_bisect_jumps(device, path, scales, bounds):
    teachers = [randn(64, 10, scale=s, seed=k, device=device) for k, s in enumerate(scales)]
    step_size = 2e-3
    sign = bmtard.EntropyBalance(mode="sign", bounds=bounds, temperature_lr=step_size).to(device)
    bisect = bmtard.EntropyBalance(mode="bisect", bounds=bounds).to(device)
    jumped = bisect(teachers)
    steps = int(1.1 * float(jumped.max() - bounds[0]) / step_size) + 10
    # The same steps as the module, without evaluating the teacher that stays at its bound.
    for _ in range(steps):
        sign(teachers)
    torch.testing.assert_close(sign.temperatures, jumped, rtol=0, atol=1.01 * step_size)
    entropies = [float(oracles.entropy(t, float(jumped[k])).mean()) for k, t in enumerate(teachers)]
    assert entropies[0] == pytest.approx(entropies[1], abs=2e-6)
    assert float(jumped.min()) == pytest.approx(bounds[0])
    slope = (sign.entropies - bisect.entropies).abs().max()
    assert slope < 20 * step_size
