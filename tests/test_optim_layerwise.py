"""LARS and LAMB against a plain fp64 transcription of their papers' formulas, and against timm's where that is installed."""

import math

import pytest
import torch
from foreign_models import import_or_skip

from fastanchor.config import OptimConfig
from fastanchor.train.layerwise import LAMB, LARS, layer_groups
from fastanchor.train.optim import build_optimizer, set_learning_rate

SHAPES = ((6, 4, 3, 3), (5, 6), (5,), ())
RATES = (0.25, 0.25, 0.0625, 0.5)  # exact in fp32, in which the learning rate is held


def make_parameters(dtype, scale=1.0):
    g = torch.Generator().manual_seed(0)
    values = [scale * torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]
    values[0] = values[0].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(v.to(dtype)) for v in values]


def make_gradients(seed, scale=1.0):
    g = torch.Generator().manual_seed(100 + seed)
    return [scale * torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def lars_by_hand(w, steps, *, momentum, decay, eta, adapt):
    """w and each gradient as flat lists of floats; the formula number by number."""
    v = [0.0] * len(w)
    for lr, g in steps:
        ratio = 1.0
        if adapt and norm(w) > 0 and norm(g) > 0:
            ratio = eta * norm(w) / (norm(g) + decay * norm(w))
        v = [momentum * vi + ratio * (gi + decay * wi) for vi, gi, wi in zip(v, g, w, strict=True)]
        w = [wi - lr * vi for wi, vi in zip(w, v, strict=True)]
    return w


def lamb_by_hand(w, steps, *, beta1, beta2, eps, decay, adapt):
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, (lr, g) in enumerate(steps, start=1):
        m = [beta1 * mi + (1 - beta1) * gi for mi, gi in zip(m, g, strict=True)]
        v = [beta2 * vi + (1 - beta2) * gi * gi for vi, gi in zip(v, g, strict=True)]
        u = [
            (mi / (1 - beta1**t)) / (math.sqrt(vi / (1 - beta2**t)) + eps) + decay * wi
            for mi, vi, wi in zip(m, v, w, strict=True)
        ]
        ratio = norm(w) / norm(u) if adapt and norm(w) > 0 and norm(u) > 0 else 1.0
        w = [wi - lr * ratio * ui for wi, ui in zip(w, u, strict=True)]
    return w


def run(optimizer, parameters, gradients):
    for lr, step in zip(RATES, gradients, strict=True):
        set_learning_rate(optimizer, lr)
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.to(p.dtype).to(memory_format=torch.channels_last) if p.ndim == 4 else g.to(p.dtype)
        optimizer.step()


def check(parameters, start, gradients, by_hand, decay, tolerance, **settings):
    for i, p in enumerate(parameters):
        steps = [(lr, step[i].flatten().tolist()) for lr, step in zip(RATES, gradients, strict=True)]
        weight = p.ndim > 1
        found = by_hand(start[i].flatten().tolist(), steps, decay=decay if weight else 0.0, adapt=weight, **settings)
        expected = torch.tensor(found, dtype=torch.float64).reshape(p.shape)
        torch.testing.assert_close(
            p.detach().double(), expected, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"parameter {i}: {text}"
        )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("momentum, decay", [(0.9, 0.01), (0.0, 0.01), (0.9, 0.0)])
def test_lars_follows_its_formula(dtype, tolerance, momentum, decay):
    parameters, gradients = make_parameters(dtype), [make_gradients(i) for i in range(4)]
    start = [p.detach().double().clone() for p in parameters]
    config = OptimConfig(name="lars", momentum=momentum, weight_decay=decay, trust_coefficient=0.02)
    run(build_optimizer(parameters, config), parameters, gradients)
    check(parameters, start, gradients, lars_by_hand, decay, tolerance, momentum=momentum, eta=0.02)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("beta1, beta2, decay", [(0.9, 0.999, 0.01), (0.5, 0.7, 0.0), (0.0, 0.9, 0.1)])
def test_lamb_follows_its_formula(dtype, tolerance, beta1, beta2, decay):
    parameters, gradients = make_parameters(dtype), [make_gradients(i) for i in range(4)]
    start = [p.detach().double().clone() for p in parameters]
    config = OptimConfig(name="lamb", beta1=beta1, beta2=beta2, eps=1e-3, weight_decay=decay)
    run(build_optimizer(parameters, config), parameters, gradients)
    check(parameters, start, gradients, lamb_by_hand, decay, tolerance, beta1=beta1, beta2=beta2, eps=1e-3)


@pytest.mark.parametrize(
    "weight_scale, gradient_scale, decay", [(0.0, 1.0, 0.01), (1.0, 0.0, 0.01), (1.0, 0.0, 0.0), (0.0, 0.0, 0.01)]
)
def test_the_ratio_is_one_where_a_norm_is_zero(weight_scale, gradient_scale, decay):
    """New layers of zeros learn, and a layer without gradient stays finite."""
    gradients = [make_gradients(i, gradient_scale) for i in range(4)]
    for name, by_hand, settings in (
        ("lars", lars_by_hand, {"momentum": 0.9, "eta": 0.001}),
        ("lamb", lamb_by_hand, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}),
    ):
        parameters = make_parameters(torch.float64, weight_scale)
        start = [p.detach().clone() for p in parameters]
        run(build_optimizer(parameters, OptimConfig(name=name, weight_decay=decay)), parameters, gradients)
        check(parameters, start, gradients, by_hand, decay, 1e-12, **settings)
        moved = not torch.equal(parameters[0], start[0])
        assert moved == (gradient_scale > 0 or weight_scale * decay > 0)


def test_biases_and_normalisation_are_a_group_of_their_own():
    parameters = make_parameters(torch.float32)
    weights, others = layer_groups(iter(parameters), 0.01)
    assert weights["params"] == parameters[:2] and weights["weight_decay"] == 0.01 and weights["adapt"]
    assert others["params"] == parameters[2:] and others["weight_decay"] == 0 and not others["adapt"]
    assert [g["adapt"] for g in layer_groups(parameters[:2], 0.01)] == [True]
    assert [g["adapt"] for g in layer_groups(parameters[2:], 0.01)] == [False]


@pytest.mark.parametrize("make", [lambda p: LARS(p, lr=0.1), lambda p: LAMB(p, lr=0.1)])
def test_parameters_without_a_gradient_stay(make):
    used, unused = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = make([used, unused])
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(used, torch.ones(2, 2)) and torch.equal(unused, torch.ones(2, 2))
    assert not any(value.any() for value in optimizer.state[unused].values())
    used.grad = None
    before = used.detach().clone()
    optimizer.step()
    assert torch.equal(used, before)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_agrees_with_timm(name):
    """Whose LARS adds 1e-8 to the denominator, and whose LAMB would clip the gradient."""
    import_or_skip("timm")
    from timm import optim as timm

    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    gradients = [make_gradients(i) for i in range(4)]
    groups = [{"params": theirs[:2], "weight_decay": 0.01}, {"params": theirs[2:], "weight_decay": 0.0}]
    if name == "lars":
        other = timm.Lars(groups, lr=0.1, momentum=0.9, trust_coeff=0.02)
    else:
        other = timm.Lamb(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-6, max_grad_norm=None)
    config = OptimConfig(name=name, weight_decay=0.01, trust_coefficient=0.02, eps=1e-6)
    run(build_optimizer(ours, config), ours, gradients)
    for lr, step in zip(RATES, gradients, strict=True):
        for group in other.param_groups:
            group["lr"] = lr
        for p, g in zip(theirs, step, strict=True):
            p.grad = g.float()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
