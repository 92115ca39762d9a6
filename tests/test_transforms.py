"""torch.func transforms, dual numbers, and tensors made under inference_mode.

The expected derivatives are those of the same transform on plain torch in float64 (oracles.py), and
for the temperature search finite differences.
"""

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import leaf, randn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import bmtard
from bmtard import BMTARDLoss, EntropyBalance, NormalizationLossBalance, losses

pytest_plugins = ["paths"]

# What torch itself calls when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

SHAPE = (3, 4)
FIXED = [randn(*SHAPE, scale=1.0, seed=k) for k in range(4)]
LABELS = torch.tensor([0, 3, 1])


def balanced(x):
    return BMTARDLoss(temperature_bounds=(1.3, 9.0)).eval()([x, 2 * x], [FIXED[1], FIXED[2]])


# Each a function of x [3, 4], beside the same of oracles.
FUNCTIONS = {
    "softmax_entropy of logits": (
        lambda x: bmtard.softmax_entropy(x, 1.7),
        lambda x: oracles.torch_entropy(x, 1.7),
    ),
    "softmax_entropy of temperature": (
        lambda x: bmtard.softmax_entropy(FIXED[0], x[:, 0].exp(), reduction="mean"),
        lambda x: oracles.torch_entropy(FIXED[0], x[:, 0].exp()).mean(),
    ),
    "multi_teacher_kl of student": (
        lambda x: bmtard.multi_teacher_kl(x, FIXED[1], 1.7, reduction="none")[0],
        lambda x: oracles.torch_kl(x, FIXED[1], 1.7),
    ),
    "multi_teacher_kl of teacher": (
        lambda x: bmtard.multi_teacher_kl(FIXED[0], [x, 2 * x], 1.7, reduction="sum", eps=1e-3)[1],
        lambda x: oracles.torch_kl(FIXED[0], 2 * x, 1.7, eps=1e-3).sum(),
    ),
    "multi_teacher_kl of temperature": (
        lambda x: bmtard.multi_teacher_kl(FIXED[0], FIXED[1:3], x[0, :2].exp())[1],
        lambda x: oracles.torch_kl(FIXED[0], FIXED[2], x[0, 1].exp()).mean(),
    ),
    "multi_teacher_kl of weights": (
        lambda x: bmtard.multi_teacher_kl(
            FIXED[0], FIXED[1], weight=x[0, :1], sample_weight=x[:, 1], reduction="weighted_mean"
        ),
        lambda x: x[0, 0] * (oracles.torch_kl(FIXED[0], FIXED[1]) * x[:, 1]).sum() / x[:, 1].sum(),
    ),
    "BMTARDLoss": (
        balanced,
        lambda x: (
            oracles.torch_kl(x, FIXED[1], 1.3).sum() + oracles.torch_kl(2 * x, FIXED[2], 1.3).sum()
        ) / 24,
    ),
    "trades_loss": (
        lambda x: losses.trades_loss(clean_logits=x, adversarial_logits=2 * x, labels=LABELS),
        lambda x: F.cross_entropy(x, LABELS) + 6 * oracles.torch_kl(2 * x, x).mean(),
    ),
}  # fmt: skip

X, V = FIXED[0], randn(*SHAPE, scale=1.0, seed=9)


def dual(function, x=X):
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(function(forward_ad.make_dual(x, V)))
    assert output.tangent is not None
    return output.primal.detach(), output.tangent.detach()


def forward_over_reverse(function):
    """The Hessian times V: a backward inside of a dual level."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(leaf(X), V)
        (slope,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return forward_ad.unpack_dual(slope).tangent.detach()


def jacobian_by_batched_backward(function):
    return torch.autograd.functional.jacobian(function, X, vectorize=True)


TRANSFORMS = {
    "jvp": lambda f: jvp(f, (X,), (V,)),
    "jacfwd": lambda f: jacfwd(f)(X),
    "jacrev": lambda f: jacrev(f)(X),
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "vmap": lambda f: vmap(f)(torch.stack([X, V])),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).square().sum())(torch.stack([X, V])),
    "hessian": lambda f: hessian(lambda x: f(x).square().sum())(X),
    "dual level": dual,
    "dual level, requires grad": lambda f: dual(f, leaf(X)),
    "forward over reverse": forward_over_reverse,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivative_is_that_of_plain_torch(path, name, transform):
    function, expected = FUNCTIONS[name]
    actual, expected = TRANSFORMS[transform](function), TRANSFORMS[transform](expected)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_of_incoming_gradients_is_right_or_refused(path, name):
    function, expected = FUNCTIONS[name]
    expected = jacobian_by_batched_backward(expected)
    refused = name == "trades_loss" or name.startswith("multi_teacher_kl of")
    if path == "native" and refused and name != "multi_teacher_kl of weights":
        with pytest.raises(NotImplementedError, match="no batch of incoming gradients"):
            jacobian_by_batched_backward(function)
        actual = jacrev(function)(X)
    else:
        actual = jacobian_by_batched_backward(function)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def search(x, **options):
    """Temperatures of logits and a target that both depend on x."""
    target = 0.9 + 0.1 * x[:, 0].tanh()
    options = {"bounds": (0.05, 50.0), "tolerance": 0.0, "max_iterations": 100, **options}
    rows = bmtard.bisect_temperature(x * x.exp(), target, per_sample=True, **options).temperature
    whole = bmtard.bisect_temperature(x * x.exp(), target.mean(), **options).temperature
    return torch.cat([rows, whole.view(1)])


def central(function, step=1e-5):
    return (function(X + step * V) - function(X - step * V)) / (2 * step)


def test_derivatives_of_the_search_are_its_finite_differences(path):
    tangent = central(search)
    assert tangent.abs().min() > 1e-3
    near = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(jvp(search, (X,), (V,))[1], tangent, **near)
    torch.testing.assert_close(dual(search)[1], tangent, **near)
    for jacobian in (jacfwd(search)(X), jacrev(search)(X)):
        torch.testing.assert_close((jacobian * V).sum((1, 2)), tangent, **near)

    def slope(x):  # reverse mode outside of every transform
        x = leaf(x)
        return torch.autograd.grad(search(x).square().sum(), x)[0]

    torch.testing.assert_close(grad(lambda x: search(x).square().sum())(X), slope(X), **near)
    curvature = hessian(lambda x: search(x).square().sum())(X)
    torch.testing.assert_close((curvature * V).sum((2, 3)), central(slope), **near)
    third = jacfwd(hessian(lambda x: search(x).square().sum()))(X)
    along = central(lambda x: hessian(lambda x: search(x).square().sum())(x))
    torch.testing.assert_close((third * V).sum((4, 5)), along, rtol=1e-5, atol=1e-6)

    both = torch.stack([X, V])
    each = torch.stack([search(x) for x in both])
    torch.testing.assert_close(vmap(search)(both), each, rtol=1e-9, atol=0)
    batched = grad(lambda x: vmap(search)(x).square().sum())(both)
    torch.testing.assert_close(batched, torch.stack([slope(x) for x in both]), **near)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_step_under_vmap(path, norm):
    x, noise = randn(2, 3, 5, scale=1.0), randn(2, 3, 5, scale=1.0, seed=1)

    def step(x, noise):
        return bmtard.pgd_step_(x.clone(), noise, x, step_size=0.1, epsilon=0.05, norm=norm)

    expected = torch.stack([step(a, b) for a, b in zip(x, noise, strict=True)])
    torch.testing.assert_close(vmap(step)(x, noise), expected)


@pytest.mark.parametrize("name", ["x_adv", "grad", "x"])
def test_pgd_step_has_no_derivative(path, name):
    def step(z):
        given = {"x_adv": X.clone(), "grad": V, "x": X, name: z.clone()}
        return bmtard.pgd_step_(**given, step_size=0.1, epsilon=0.05)

    message = f"pgd_step_: {name} (carries a derivative|requires grad)"
    for transform in (
        lambda: jvp(step, (X,), (V,)),
        lambda: dual(step),
        lambda: grad(lambda z: step(z).sum())(X),
        lambda: grad(lambda z: vmap(step)(z).sum())(torch.stack([X, V])),
    ):
        with pytest.raises(ValueError, match=message):
            transform()
    constant = jvp(lambda z: (z, step(z.detach())), (X,), (V,))[1]
    assert torch.equal(constant[0], V)
    assert (constant[1] == 0).all()


# Two searches to a tolerance of 1e-6 nats.
NEAR = {"rtol": 1e-5, "atol": 1e-7}


# --- The modules ----------------------------------------------------------------------------


def students_and_teachers():
    return [FIXED[0], FIXED[1]], [FIXED[2], FIXED[3]]


def test_a_training_step_refuses_a_transform_over_its_state(path):
    _, teachers = students_and_teachers()
    steps = {
        BMTARDLoss(): lambda module, x: module([x, x], teachers),
        EntropyBalance(): lambda module, x: module(teachers) * x.sum(),
        NormalizationLossBalance(): lambda module, x: module(x[0, :2].exp()),
    }
    for module, step in steps.items():
        before = {name: value.clone() for name, value in module.state_dict().items()}
        for transform in (
            lambda: jvp(lambda x: step(module, x), (X,), (V,)),  # noqa: B023
            lambda: grad(lambda x: step(module, x).sum())(X),  # noqa: B023
            lambda: vmap(lambda x: step(module, x))(torch.stack([X, V])),  # noqa: B023
        ):
            with pytest.raises(NotImplementedError, match=r"training step overwrites the buffers"):
                transform()
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("balance", ["bisect", "sign"])
def test_a_training_step_in_a_dual_level(path, balance):
    students, teachers = students_and_teachers()
    module, reference = (BMTARDLoss(balance=balance, temperature_lr=0.05) for _ in range(2))
    tangent = dual(lambda x: module([x, students[1]], teachers))[1]
    x = leaf(X)
    (slope,) = torch.autograd.grad(reference([x, students[1]], teachers), x)
    torch.testing.assert_close(tangent, (slope * V).sum(), **NEAR)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], **NEAR)


@pytest.mark.parametrize("balance", ["bisect", "sign"])
def test_an_ensemble_of_losses_under_vmap(path, balance):
    """Each of two states, passed with functional_call, takes its own step."""
    _, teachers = students_and_teachers()
    modules = [BMTARDLoss(balance=balance, temperature_lr=0.05) for _ in range(2)]
    modules[1].weights.copy_(torch.tensor([0.2, 0.8]))
    state = {
        name: torch.stack([m.state_dict()[name] for m in modules])
        for name in modules[0].state_dict()
    }

    def step(state, x):
        value = functional_call(BMTARDLoss(balance=balance), state, ([x, 2 * x], teachers))
        return value, state

    values, state = vmap(step)(state, torch.stack([X, V]))
    for k, (module, x) in enumerate(zip(modules, (X, V), strict=True)):
        torch.testing.assert_close(values[k], module([x, 2 * x], teachers), **NEAR)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(state[name][k], value, **NEAR)


def test_a_teacher_with_a_tangent_is_refused(path):
    students, teachers = students_and_teachers()
    for module in (BMTARDLoss(), BMTARDLoss().eval()):
        with pytest.raises(ValueError, match=r"teacher_logits\[1\] requires grad"):
            dual(lambda x: module(students, [teachers[0], x]))  # noqa: B023
    with pytest.raises(ValueError, match=r"teacher_logits\[1\] requires grad"):
        dual(lambda x: EntropyBalance()([teachers[0], x]))
    with pytest.raises(ValueError, match=r"teacher_logits\[0\] requires grad"):
        EntropyBalance()([leaf(X), V])
    with torch.no_grad():
        EntropyBalance()([leaf(X), V])


def test_a_backward_in_a_later_dual_level_is_refused(path):
    if path == "reference":
        pytest.skip("plain torch differentiates its own backward")
    x = leaf(X)
    for output in (
        bmtard.softmax_entropy(x),
        bmtard.multi_teacher_kl(x, V),
        BMTARDLoss()([x, x], [X, V]),
    ):
        with forward_ad.dual_level():
            incoming = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                torch.autograd.grad(output, x, incoming)


# --- torch.compile ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multi_teacher_kl of student", "softmax_entropy of logits"])
def test_compiled_transforms(path, name):
    function, expected = FUNCTIONS[name]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: grad(lambda z: function(z).sum())(x) + jvp(function, (x,), (V,))[1].sum(),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    wanted = grad(lambda z: expected(z).sum())(X) + jvp(expected, (X,), (V,))[1].sum()
    torch.testing.assert_close(compiled(X), wanted)
    # The same function outside of a transform takes the kernels again.
    again = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(again(X), expected(X))


# --- inference_mode ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "temperature", "weight", "sample_weight"])
def test_inference_tensors_that_need_no_gradient(path, name):
    def fresh():
        return {
            "teacher": FIXED[1].clone(),
            "temperature": torch.tensor([1.7], dtype=torch.float64),
            "weight": torch.tensor([0.6], dtype=torch.float64),
            "sample_weight": torch.tensor([0.3, 0.0, 1.0], dtype=torch.float64),
        }

    def gradients(given):
        x = leaf(X)
        total = bmtard.multi_teacher_kl(x, given["teacher"], given["temperature"]).sum()
        total = total + bmtard.multi_teacher_kl(
            x, given["teacher"], given["temperature"], scale_by_temperature=True,
            sample_weight=given["sample_weight"],
        ).sum()  # fmt: skip
        weighted = [
            bmtard.multi_teacher_kl(x, given["teacher"], y, weight=given["weight"], reduction=r)
            for y, r in ((given["temperature"], "sum"), (x[0, :1].exp(), "batchmean"))
        ]
        total = total + sum(weighted) + bmtard.softmax_entropy(x, given["temperature"][0]).sum()
        total = (
            total
            + bmtard.bisect_temperature(
                given["teacher"],
                0.9 + 0.1 * x[0, 0],
                initial=given["temperature"][0],
                tolerance=1e-12,
            ).temperature
        )
        total = total + bmtard.bisect_temperature(x, 0.5 * given["temperature"][0]).temperature
        total = total + losses.ard_loss(
            student_adversarial_logits=x,
            student_clean_logits=x,
            teacher_clean_logits=given["teacher"],
            labels=LABELS,
            alpha=0.5,
        )
        total = total + BMTARDLoss()([x, 2 * x], [given["teacher"]] * 2)
        return torch.autograd.grad(total, x)[0]

    given, expected = fresh(), gradients(fresh())
    with torch.inference_mode():
        given[name] = given[name].clone()
    assert given[name].is_inference()
    torch.testing.assert_close(gradients(given), expected)


def test_inference_teacher_and_a_gradient_used_twice(path):
    with torch.inference_mode():
        teacher = FIXED[1].clone()
    x = leaf(X)
    value = bmtard.multi_teacher_kl(x, teacher)
    first = torch.autograd.grad(value, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(value, x)[0], first[0])
    EntropyBalance()([teacher, teacher])
