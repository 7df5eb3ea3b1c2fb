"""PGD: truth in fp64, the engine against it and against torchattacks, start noise and restarts."""

import math

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import assert_same_images, batch, generator, logit_norm, small_net
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastanchor.attacks import PGD
from fastanchor.data import sources
from fastanchor.data.views import to_float
from fastanchor.errors import UserError
from fastanchor.reference import attacks as reference
from fastanchor.reference.objectives import cross_entropy, cw_margin

# -- the reference ----------------------------------------------------------------------------------------------------------


def linear_problem():
    """Two classes, logits x @ W.T in fp64: the objective rises along one direction everywhere."""
    torch.manual_seed(0)
    weight = torch.randn(2, 3 * 4 * 4, dtype=torch.float64)
    images, labels = torch.rand(6, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
    direction = (weight[1 - labels] - weight[labels]).view_as(images)
    return lambda x: x.flatten(1) @ weight.T, images, labels, direction


@pytest.mark.parametrize("objective", [cross_entropy, cw_margin])
def test_reference_pgd_finds_the_linf_optimum_of_a_linear_model(objective):
    model, images, labels, direction = linear_problem()
    found = reference.pgd(model, images, labels, eps=0.1, step_size=0.03, steps=7, objective=objective)
    expected = (images + 0.1 * direction.sign()).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(reference.fgsm(model, images, labels, eps=0.1, objective=objective), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("objective", [cross_entropy, cw_margin])
def test_reference_pgd_finds_the_l2_optimum_of_a_linear_model(objective):
    model, images, labels, direction = linear_problem()
    images = 0.4 + 0.2 * images  # the ball of radius 0.3 stays inside the box
    found = reference.pgd(model, images, labels, eps=0.3, step_size=0.1, steps=5, objective=objective, norm="l2")
    expected = images + 0.3 * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm, eps, step", [("linf", 0.06, 0.025), ("l2", 0.5, 0.2)])
def test_reference_pgd_is_the_loop_of_the_definition(norm, eps, step):
    """Image by image and step by step, with the projections written out in numbers."""
    net = small_net().double()
    images, labels = batch(4)
    images = images.double()
    start = (torch.rand(images.shape, generator=generator(), dtype=torch.float64) - 0.5) * (2 * eps if norm == "linf" else 0.1)
    found = reference.pgd(net, images, labels, eps=eps, step_size=step, steps=4, objective=cross_entropy, start=start, norm=norm)

    def project(point, centre):
        if norm == "linf":
            return point.clamp(centre - eps, centre + eps).clamp(0, 1)
        delta = point - centre
        length = math.sqrt(delta.square().sum().item())
        return (centre + delta * min(1.0, eps / length)).clamp(0, 1)

    for i in range(len(images)):
        point = project(images[i] + start[i], images[i])
        for _ in range(4):
            leaf = point[None].clone().requires_grad_()
            F.cross_entropy(net(leaf), labels[i : i + 1]).backward()
            slope = leaf.grad[0]
            move = slope.sign() if norm == "linf" else slope / math.sqrt(slope.square().sum().item())
            point = project(point + step * move, images[i])
        torch.testing.assert_close(found[i], point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [cross_entropy, cw_margin, logit_norm])
def test_input_gradient_agrees_with_central_differences(objective):
    net = small_net().double()
    images, labels = batch(3)
    images = images.double()
    slope = reference.input_gradient(net, images, labels, objective)
    direction = torch.randn(images.shape, generator=generator(), dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        for i in range(len(images)):  # an image's gradient is that of its own value: no mean over the batch
            one, along = images[i : i + 1], direction[i : i + 1]
            rise = objective(net(one + h * along), labels[i : i + 1]) - objective(net(one - h * along), labels[i : i + 1])
            torch.testing.assert_close((slope[i] * direction[i]).sum(), rise.sum() / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("objective", [cross_entropy, cw_margin])
def test_objectives_pass_gradcheck(objective):
    logits = torch.randn(4, 6, generator=generator(), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda x: objective(x, labels), logits)


def test_objectives_are_their_definitions():
    logits = torch.randn(20, 4, generator=generator(), dtype=torch.float64)
    logits[0] = 1.0  # a tie
    labels = torch.randint(4, (20,), generator=generator(1))
    for row, label, margin, loss in zip(
        logits.tolist(), labels.tolist(), cw_margin(logits, labels), cross_entropy(logits, labels), strict=True
    ):
        others = [value for k, value in enumerate(row) if k != label]
        assert margin.item() == max(others) - row[label]
        assert loss.item() == pytest.approx(math.log(sum(map(math.exp, row))) - row[label], rel=1e-12)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    eps=st.one_of(st.just(0.0), st.floats(1e-4, 3.0)),
    reach=st.floats(0, 4),
    seed=st.integers(0, 1000),
)
def test_projections(shape, eps, reach, seed):
    source = generator(seed)
    centre = torch.rand(shape, generator=source, dtype=torch.float64)
    point = centre + reach * torch.randn(shape, generator=source, dtype=torch.float64)
    linf, l2 = (reference.project(point, centre, eps, norm) for norm in ("linf", "l2"))
    for projected in (linf, l2):
        assert projected.min() >= 0 and projected.max() <= 1
    assert (linf - centre).abs().max() <= eps + 1e-12
    assert (l2 - centre).flatten(1).norm(dim=1).max() <= eps + 1e-12
    # Ball and box are an interval a pixel, and its nearest point is the nearest point of both.
    torch.testing.assert_close(linf, point.clamp((centre - eps).clamp_min(0), (centre + eps).clamp_max(1)), rtol=0, atol=1e-12)
    for norm, projected in (("linf", linf), ("l2", l2)):
        torch.testing.assert_close(reference.project(projected, centre, eps, norm), projected, rtol=0, atol=1e-12)
    inside = (point - centre).flatten(1).norm(dim=1) <= eps
    torch.testing.assert_close(l2[inside], point.clamp(0, 1)[inside], rtol=0, atol=1e-12)


# -- the engine against the reference ---------------------------------------------------------------------------------------

OBJECTIVES = {"ce": cross_entropy, "cw": cw_margin, logit_norm: logit_norm}


@pytest.mark.parametrize("norm, eps, step", [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.1)])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero", "tensor"])
def test_engine_is_the_reference(norm, eps, step, objective, start):
    net, (images, labels) = small_net(), batch()
    if start == "tensor":
        start = 0.05 * torch.randn(images.shape, generator=generator(3))  # leaves the linf ball: it is projected first
    settings = {"eps": eps, "step_size": step, "steps": 10, "objective": objective, "start": start, "norm": norm}
    attack = PGD(**settings)
    ours = attack(net, images, labels, generator=generator())
    delta = attack.start_delta(images, generator())
    truth = reference.pgd(
        net, images, labels, eps=eps, step_size=step, steps=10, objective=OBJECTIVES[objective], start=delta, norm=norm
    )
    assert_same_images(ours, truth, step)
    assert_same_images(PGD(**settings, backend="reference")(net, images, labels, generator=generator()), truth, 0, 0)
    assert not torch.equal(ours, images)
    assert torch.equal(ours, attack(net, images, labels, generator=generator()))
    if start in ("uniform", "gaussian"):
        assert not torch.equal(ours, attack(net, images, labels, generator=generator(1)))


def test_default_generator_is_the_global_one():
    net, (images, labels) = small_net(), batch()
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(PGD(steps=2)(net, images, labels))
    assert torch.equal(*made)


def test_engine_raises_the_objective_on_an_untouched_tiny_model(tiny_model):
    images, labels = batch(4, size=32, classes=10)
    attacked = PGD(eps=0.1, step_size=0.025, steps=5)(tiny_model, images, labels, generator=generator())
    with torch.no_grad():
        assert (cross_entropy(tiny_model(attacked), labels) > cross_entropy(tiny_model(images), labels)).all()


# -- agreement with torchattacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_start", [False, True])
def test_linf_agrees_with_torchattacks(random_start):
    torchattacks = pytest.importorskip("torchattacks")
    net, (images, labels) = small_net(), batch(16)
    theirs = torchattacks.PGD(net, eps=8 / 255, alpha=2 / 255, steps=10, random_start=random_start)
    torch.manual_seed(7)  # both draw one uniform tensor of the images' shape from the global generator
    expected = theirs(images, labels)
    torch.manual_seed(7)
    ours = PGD(8 / 255, 2 / 255, 10, start="uniform" if random_start else "zero")(net, images, labels)
    assert_same_images(ours, expected, 2 / 255)


@pytest.mark.parametrize("random_start", [False, True])
def test_l2_agrees_with_torchattacks(random_start):
    torchattacks = pytest.importorskip("torchattacks")
    net, (images, labels) = small_net(), batch(16)
    theirs = torchattacks.PGDL2(net, eps=0.5, alpha=0.1, steps=10, random_start=random_start)
    torch.manual_seed(7)
    expected = theirs(images, labels)
    start = "zero"
    if random_start:  # its radius is uniform, not that of the uniform ball: its start is drawn here as it draws it
        torch.manual_seed(7)
        start = torch.empty_like(images).normal_()
        start *= torch.zeros(16, 1, 1, 1).uniform_(0, 1) / reference.l2_norms(start) * 0.5
    ours = PGD(0.5, 0.1, 10, start=start, norm="l2")(net, images, labels)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_fgsm_agrees_with_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    net, (images, labels) = small_net(), batch(16)
    expected = torchattacks.FGSM(net, eps=8 / 255)(images, labels)
    assert_same_images(PGD(8 / 255, 8 / 255, 1, start="zero")(net, images, labels), expected, 8 / 255)
    assert_same_images(reference.fgsm(net, images, labels, eps=8 / 255, objective=cross_entropy), expected, 8 / 255)


@pytest.fixture(scope="module")
def trained():
    """A small network trained for a few seconds on the digits, and their 359 test images."""
    data = sources.load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    images, labels = to_float(data.train.images), data.train.labels
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return net.eval(), to_float(data.test.images).contiguous(), data.test.labels


def accuracy(net, images, labels):
    with torch.no_grad():
        return 100 * (net(images).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("norm, eps", [("linf", 0.04), ("l2", 1.0)])
def test_robust_accuracy_agrees_with_torchattacks(trained, norm, eps):
    torchattacks = pytest.importorskip("torchattacks")
    net, images, labels = trained
    theirs = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm](net, eps=eps, alpha=eps / 4, steps=20)
    torch.manual_seed(1)
    expected = accuracy(net, theirs(images, labels), labels)
    ours = accuracy(net, PGD(eps, eps / 4, 20, norm=norm)(net, images, labels, generator=generator(2)), labels)
    assert accuracy(net, images, labels) > 95
    assert 30 < expected < 80  # a middling figure: agreement at 0 or 100 would say nothing
    assert abs(ours - expected) <= 1


# -- starts and restarts ----------------------------------------------------------------------------------------------------


def distance_from_uniform(values):
    """Kolmogorov-Smirnov distance of values in [0, 1] from the uniform distribution."""
    ordered = values.double().sort().values
    n = len(ordered)
    above, below = torch.arange(1, n + 1, dtype=torch.float64) / n - ordered, ordered - torch.arange(n, dtype=torch.float64) / n
    return max(above.max().item(), below.max().item())


def test_l2_start_is_uniform_in_the_ball():
    n, shape = 6000, (3, 2, 2)
    delta = PGD(eps=0.7, norm="l2").start_delta(torch.zeros(n, *shape), generator()).flatten(1)
    d = delta.shape[1]
    radii = delta.norm(dim=1) / 0.7
    assert radii.max() <= 1
    critical = 1.95 / math.sqrt(n)  # of the KS test at 0.1 %
    assert distance_from_uniform(radii**d) < critical
    assert distance_from_uniform(radii) > 10 * critical  # a uniform radius, as other libraries draw it, is told apart
    directions = delta / delta.norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions.T @ directions / n, torch.eye(d) / d, rtol=0, atol=0.01)
    assert directions.mean(0).abs().max() < 5 / math.sqrt(n * d)


def test_linf_and_gaussian_starts():
    images = torch.zeros(40, 3, 10, 10)
    uniform = PGD(eps=0.2).start_delta(images, generator()).flatten()
    assert distance_from_uniform(uniform / 0.4 + 0.5) < 1.95 / math.sqrt(len(uniform))
    gaussian = PGD(eps=0.2, start="gaussian").start_delta(images, generator()).flatten()
    assert gaussian.std().item() == pytest.approx(0.001, rel=0.03) and gaussian.mean().abs() < 1e-4
    normal = 0.5 * (1 + torch.erf(gaussian / 0.001 / math.sqrt(2)))
    assert distance_from_uniform(normal) < 1.95 / math.sqrt(len(gaussian))
    assert not PGD(start="zero").start_delta(images).any()
    assert not PGD(eps=0.0).start_delta(images).any()


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_restarts_keep_the_best_of_their_own_starts(norm, eps, backend):
    net, (images, labels) = small_net(), batch(16)
    source = generator()
    once = PGD(eps, eps / 4, 2, norm=norm, backend=backend)
    singles = torch.stack([once(net, images, labels, generator=source) for _ in range(4)])
    made = PGD(eps, eps / 4, 2, norm=norm, backend=backend, restarts=4)(net, images, labels, generator=generator())
    with torch.no_grad():
        values = torch.stack([cross_entropy(net(x), labels) for x in singles])
        assert (cross_entropy(net(made), labels) >= values[0]).all()
    winners = values.argmax(0)
    assert len(set(winners.tolist())) > 1
    assert torch.equal(made, singles[winners, torch.arange(16)])


def test_restarts_need_one_value_an_image():
    net, (images, labels) = small_net(), batch()
    attack = PGD(restarts=2, steps=1, objective=lambda logits, y: cross_entropy(logits, y).sum())
    with pytest.raises(UserError, match=r"restarts need an objective with one value an image; this one returns shape \(\)"):
        attack(net, images, labels)
