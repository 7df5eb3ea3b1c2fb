"""Start noise of any radius, attacks without projection, and what a caller knows of the clean images already.

The single-step adversaries of Wong et al. 2020, de Jorge et al. 2022 and Sriramanan et al. 2021 are written out in fp64.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import ULP, Counted, assert_same_images, batch, generator, small_net
from graph_emulator import Emulator

from fastanchor import graphs
from fastanchor.attacks import PGD
from fastanchor.attacks.objectives import with_clean
from fastanchor.errors import UserError

EPS, STEP = 8 / 255, 10 / 255
BACKENDS = ["reference", "eager", "graphed"]


@pytest.fixture
def recorder():
    with graphs.use_recorder(Emulator):
        yield


def slope(net, images, labels):
    leaf = images.clone().requires_grad_()
    F.cross_entropy(net(leaf), labels).backward()  # a mean: its sign is the sum's
    return leaf.grad.sign()


# -- single-step adversaries, written out -------------------------------------------------------------------------------------


def fgsm_rs(net, images, labels, noise, eps, alpha):
    """Uniform noise in the ball, cut to pixels; one step; cut to the ball, then to pixels."""
    delta = torch.max(torch.min(noise, 1 - images), 0 - images)
    delta = (delta + alpha * slope(net, images + delta, labels)).clamp(-eps, eps)
    return images + torch.max(torch.min(delta, 1 - images), 0 - images)


def n_fgsm(net, images, labels, noise, eps, alpha):
    """The same from larger noise, cut to pixels alone."""
    eta = torch.max(torch.min(noise, 1 - images), 0 - images)
    return images + torch.max(torch.min(eta + alpha * slope(net, images + eta, labels), 1 - images), 0 - images)


def nuat(net, images, labels, noise, eps, alpha):
    """Signs as noise, cut to pixels; one step, cut to pixels; the difference cut to the ball, the sum to pixels."""
    start = (images + noise).clamp(0, 1)
    moved = (start + alpha * slope(net, start, labels)).clamp(0, 1)
    return (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize(
    "written_out, options",
    [
        (fgsm_rs, {"start": "uniform"}),
        (n_fgsm, {"start": "uniform", "start_radius": 2 * EPS, "project": False}),
        (nuat, {"start": "bernoulli", "start_radius": EPS / 2}),
    ],
)
def test_single_step_adversaries_are_those_written_out_in_fp64(recorder, backend, kernels, written_out, options):
    images, labels = batch(16)
    attack = PGD(EPS, STEP, 1, backend=backend, kernels=kernels, **options)
    noise = attack.start_delta(images, generator(3)).double()
    expected = written_out(small_net().double(), images.double(), labels, noise, EPS, STEP)
    found = attack(small_net(), images, labels, generator=generator(3))
    assert_same_images(found.double(), expected, STEP)
    reach = (found - images).abs().max()
    assert reach > 2 * EPS if written_out is n_fgsm else reach <= EPS + ULP


# -- start noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [None, 0.0, 0.01, 0.3])
def test_bernoulli_noise_is_a_fair_sign_times_the_radius(radius):
    attack = PGD(EPS, start="bernoulli", start_radius=radius)
    noise = attack.start_delta(torch.rand(50, 3, 16, 16), generator(1))
    expected = torch.tensor(EPS if radius is None else radius)
    assert torch.equal(noise.abs(), expected.expand_as(noise))
    if expected > 0:
        assert 0.49 < (noise > 0).double().mean() < 0.51  # 38,400 signs: 4 standard deviations
        neighbours = (noise[..., 1:].sign() * noise[..., :-1].sign()).mean()
        assert abs(neighbours) < 0.02
    assert torch.equal(noise, attack.start_delta(torch.rand(50, 3, 16, 16), generator(1)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("radius", [0.0, 0.02, 0.5])
def test_uniform_noise_fills_the_ball_of_its_radius(norm, radius):
    images = torch.rand(200, 3, 8, 8)
    plain = PGD(0.1, norm=norm).start_delta(images, generator(1))
    noise = PGD(0.1, norm=norm, start_radius=radius).start_delta(images, generator(1))
    torch.testing.assert_close(noise, plain * (radius / 0.1), rtol=1e-5, atol=1e-9)
    size = noise.abs().amax() if norm == "linf" else noise.flatten(1).norm(dim=1).max()
    assert 0.99 * radius <= size <= radius * (1 + 1e-5)


def test_a_start_outside_of_the_ball_is_brought_to_it_before_the_first_step():
    images, labels = batch(8)
    net, seen = small_net(), []

    def objective(logits, labels):
        seen.append(logits.detach())
        return F.cross_entropy(logits, labels, reduction="none")

    options = {"start": "uniform", "start_radius": 0.4, "backend": "reference", "objective": objective}
    for project in (True, False):
        attack = PGD(0.05, 0.01, 1, project=project, **options)
        attack(net, images, labels, generator=generator(2))
        noise = attack.start_delta(images, generator(2))
        began = (images + (noise.clamp(-0.05, 0.05) if project else noise)).clamp(0, 1)
        with torch.no_grad():
            torch.testing.assert_close(seen.pop(), net(began), rtol=1e-4, atol=1e-5)


# -- without projection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_projection_steps_add_up_and_eps_does_not_count(recorder, backend, norm):
    images, labels = batch(8)
    start = torch.rand(images.shape, generator=generator(4)) - 0.5

    def found(eps):
        attack = PGD(eps, 0.25, 4, norm=norm, start=start, project=False, backend=backend)
        return attack(small_net(), images, labels)

    net, point = small_net().double(), (images + start).double().clamp(0, 1)
    for _ in range(4):
        leaf = point.clone().requires_grad_()
        F.cross_entropy(net(leaf), labels, reduction="sum").backward()
        length = leaf.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        point = (point + 0.25 * (leaf.grad.sign() if norm == "linf" else leaf.grad / length)).clamp(0, 1)
    if norm == "linf":
        # Four large steps carry a chance sign of the first one on: only the bulk of the pixels can be compared.
        assert ((found(0.01).double() - point).abs() > 1e-6).double().mean() < 0.02
    else:
        torch.testing.assert_close(found(0.01).double(), point, rtol=0, atol=1e-4)
    assert torch.equal(found(0.01), found(0.5)) and torch.equal(found(0.0), found(0.5))
    assert (found(0.01) - images).abs().max() > 0.5


def test_all_pixels_are_within_reach_without_projection():
    """Half a step from 0 to 1: where the radius that never binds is not that, images are cut short."""
    images, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    made = PGD(0.1, 1.0, 1, start="zero", project=False)(small_net(), images, labels)
    assert set(made.unique().tolist()) == {0.0, 1.0}


# -- graphs -----------------------------------------------------------------------------------------------------------------------


def test_a_graph_is_made_anew_for_another_radius_or_projection(recorder):
    net, (images, labels) = small_net(), batch(6)
    graphed = PGD(EPS, STEP, 2, backend="graphed")
    made = []
    for name, value in (("start_radius", None), ("start_radius", 0.2), ("project", False), ("start", "bernoulli")):
        setattr(graphed, name, value)
        options = {"start": graphed.start, "start_radius": graphed.start_radius, "project": graphed.project}
        made.append(graphed(net, images, labels, generator=generator(1)))
        assert torch.equal(made[-1], PGD(EPS, STEP, 2, backend="eager", **options)(net, images, labels, generator=generator(1)))
    assert len(graphed.engine.graphs._graphs) == 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(made))


# -- what is known of the clean images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernels", ["off", "on"])
def test_given_clean_outputs_stand_in_for_the_forward(recorder, backend, kernels):
    net, (images, labels) = small_net(), batch(6)
    attack = PGD(EPS, STEP, 3, objective="kl", start="gaussian", backend=backend, kernels=kernels)
    own = attack(net, images, labels, generator=generator(1))
    clean = net(images)
    for given in (clean, (clean,), clean.double()):
        assert_same_images(attack(net, images, labels, generator=generator(1), clean=given), own, STEP)
    for seed in range(2):  # other values of one shape: no graph may have frozen the first ones
        other = torch.randn(clean.shape, generator=generator(seed))
        moved = attack(net, images, labels, generator=generator(1), clean=other)
        reference = PGD(EPS, STEP, 3, objective="kl", start="gaussian", backend="reference")
        assert_same_images(moved, reference(net, images, labels, generator=generator(1), clean=other), STEP)
        assert not torch.equal(moved, own)
    assert torch.equal(attack(net, images, labels, generator=generator(1)), own)
    if backend == "graphed":
        assert len(attack.engine.graphs._graphs) == 3  # without, with a tensor, with a tuple


@pytest.mark.parametrize("restarts", [1, 2])
def test_given_clean_outputs_cost_no_forward_and_are_constants_in_fp32(restarts):
    net, (images, labels) = small_net(), batch(4)
    seen = []

    @with_clean
    def objective(logits, labels, clean):
        seen.append(clean)
        return (logits - clean[0]).square().sum(1) * clean[1]

    model = Counted(net)
    attack = PGD(steps=3, objective=objective, restarts=restarts, check_inputs=False)
    logits = net(images)
    attack(model, images, labels, clean=(logits.bfloat16(), labels))
    assert model.calls == 3 * restarts + (restarts if restarts > 1 else 0)
    assert all(part.dtype == torch.float32 and not part.requires_grad for part, _ in seen)
    assert all(torch.equal(whole, labels) and whole.dtype == torch.int64 for _, whole in seen)
    logits.sum().backward()  # its graph was left alone


def test_objectives_that_do_not_look_at_clean_images_are_given_nothing():
    net, (images, labels) = small_net(), batch(4)
    made = [PGD(steps=2)(net, images, labels, generator=generator(), clean=clean) for clean in (None, net(images), "nothing")]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("clean, found", [([1.0], "list"), ((), "tuple"), ((None,), "tuple"), (3, "int")])
def test_clean_outputs_of_another_kind_are_refused(clean, found):
    with pytest.raises(UserError, match=f"^clean is of type {found}: must be a tensor or a tuple of tensors$"):
        PGD(steps=1, objective="kl")(small_net(), *batch(2), clean=clean)


# -- bad input --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"start_radius": -1.0}, "start_radius = -1.0: must be None (eps) or a finite number >= 0"),
        ({"start_radius": float("inf")}, "start_radius = inf: must be None (eps) or a finite number >= 0"),
        ({"start_radius": "16/255"}, "start_radius = '16/255': must be None (eps) or a finite number >= 0"),
        ({"start_radius": 0.1, "start": "zero"}, "start_radius = 0.1: is that of start = uniform or bernoulli, not of zero"),
        ({"start_radius": 0.1, "start": "gaussian"}, "start_radius = 0.1: is that of start = uniform or bernoulli, not of gaussian"),
        ({"start_radius": 0.1, "start": torch.zeros(1)}, "start_radius = 0.1: is that of start = uniform or bernoulli, not of a delta tensor"),
        ({"start": "bernoulli", "norm": "l2"}, "start = bernoulli: fills the linf ball's corners and needs norm = linf, not l2"),
        ({"project": 0}, "project = 0: must be True or False"),
        ({"start": "bernouli"}, "start = 'bernouli': must be one of uniform, bernoulli, gaussian, zero or a delta tensor; did you mean 'bernoulli'?"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        PGD(**arguments)
    assert str(error.value) == message


def test_repr_tells_what_differs_from_the_usual():
    assert "radius" not in repr(PGD()) and "project" not in repr(PGD())
    assert "start=bernoulli, start_radius=0.1, norm=linf, project=False" in repr(
        PGD(start="bernoulli", start_radius=0.1, project=False)
    )
