"""BatchNorm sets: each is, to the bit, the plain model that has its numbers; no forward, attack or twin touches another one."""

import copy

import pytest
import torch
from attack_helpers import assert_same_images
from torch import nn

from fastanchor.attacks import PGD
from fastanchor.attacks.engine import Engine
from fastanchor.errors import UserError
from fastanchor.models import build_model
from fastanchor.models.bnsets import BatchNormSets, InSet, add_bn_sets, bn_set
from fastanchor.models.folded import FoldedTwin, fold
from fastanchor.train.optim import WeightAverage

NAMES = ("pgd", "pgd_ce", "normal")
NETS = {"resnet18": 4, "preactresnet18": 4, "wrn10_1": 8}


def plain_model(name="resnet18", seed=0):
    torch.manual_seed(seed)
    return build_model(
        name, num_classes=5, width=NETS[name], head="mlp_bn", head_hidden=8, head_dim=6, mean=(0.5,) * 3, std=(0.25,) * 3
    )


def model_with_sets(name="resnet18", dtype=torch.float64):
    """In fp64, every number of every set drawn anew, in eval mode."""
    model = add_bn_sets(plain_model(name), NAMES).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def alone(model, name, net="resnet18"):
    """The plain model whose BatchNorms are those of one set."""
    state = {key.replace(f".sets.{name}.", "."): value for key, value in model.state_dict().items()}
    plain = plain_model(net, seed=1).to(next(model.parameters()).dtype)
    plain.load_state_dict({key: value for key, value in state.items() if ".sets." not in key})
    return plain.train(model.training)


def images(n=6, dtype=torch.float64, seed=0):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(n=6):
    return torch.arange(n) % 5


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def moved(before, model):
    return {name for name, value in model.named_buffers() if not torch.equal(before[name], value)}


def of_set(model, name):
    return {key for key, _ in model.named_buffers() if f".sets.{name}." in key}


@pytest.mark.parametrize("net", NETS)
def test_sets_take_the_place_of_every_batchnorm_of_the_backbone_alone(net):
    plain, model = plain_model(net), plain_model(net)
    assert add_bn_sets(model, NAMES) is model
    count = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    norms = [module for module in model.backbone.modules() if isinstance(module, BatchNormSets)]
    assert len(norms) == count and sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 3 * count
    assert {norm.active for norm in norms} == {"pgd"} and all(tuple(norm.sets) == NAMES for norm in norms)
    assert isinstance(model.projection.bn, nn.BatchNorm1d)
    # All begin as the one that was there, in memory of their own.
    for norm in norms:
        first, *others = norm.sets.values()
        for other in others:
            for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True):
                assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert torch.equal(model(images(dtype=torch.float32)), plain(images(dtype=torch.float32)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_the_plain_model_with_its_numbers(net, name, training):
    model = model_with_sets(net).train(training)
    twin, before = alone(model, name, net), buffers(model)
    x, y = (images().requires_grad_() for _ in range(2))
    with bn_set(model, name):
        ours = model(x)
    theirs = twin(y)
    assert torch.equal(ours, theirs)
    # Outside of the context, where another set is active: the backward pass belongs to the forward that was.
    for out in (ours, theirs):
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert torch.equal(x.grad, y.grad)
    gradients = {key.replace(f".sets.{name}.", "."): p.grad for key, p in model.named_parameters() if p.grad is not None}
    expected = {key: p.grad for key, p in twin.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and all(torch.equal(gradients[key], expected[key]) for key in expected)
    # Its running statistics are the plain model's, and no others have moved.
    after = {
        key.replace(f".sets.{name}.", "."): value
        for key, value in model.named_buffers()
        if f".sets.{name}." in key or ".sets." not in key
    }
    assert all(torch.equal(after[key], value) for key, value in twin.named_buffers())
    assert moved(before, model) == (of_set(model, name) if training else set())


def test_the_first_set_is_active_outside_of_every_context():
    model, x = model_with_sets(), images()
    assert torch.equal(model(x), alone(model, "pgd")(x))
    with bn_set(model, "normal"):
        with bn_set(model, "pgd_ce"):
            assert torch.equal(model(x), alone(model, "pgd_ce")(x))
        assert torch.equal(model(x), alone(model, "normal")(x))
        with bn_set(model, ""):
            assert torch.equal(model(x), alone(model, "normal")(x))
    with pytest.raises(RuntimeError), bn_set(model, "normal"):
        raise RuntimeError
    assert torch.equal(model(x), alone(model, "pgd")(x))
    with bn_set(plain_model(), ""):
        pass


@pytest.mark.parametrize("net", NETS)
def test_each_set_has_a_twin_of_its_own(net):
    """Folded in fp64: to rounding the plain model of that set, before and after its weights and statistics change."""
    model, x = model_with_sets(net), images()
    twins = {name: fold(InSet(model, name).eval(), x) for name in NAMES}
    for change in (False, True):
        if change:
            with torch.no_grad():
                for tensor in (*model.backbone.parameters(), *model.backbone.buffers()):
                    tensor.mul_(1.25) if tensor.is_floating_point() else None
        for name, twin in twins.items():
            twin.refresh()
            expected = alone(model, name, net)
            assert twin.folded > 0 and (expected(x) - twin(x)).abs().max() < 1e-12 * expected(x).abs().max()
        found = [twin(x) for twin in twins.values()]
        assert min((a - b).abs().max() for a, b in zip(found, found[1:] + found[:1], strict=True)) > 1e-3


def test_an_engine_never_serves_another_sets_twin():
    model, x = model_with_sets(), images()
    engine, views = Engine(), {name: InSet(model, name).eval() for name in NAMES}

    def serves(key, name):
        twin = engine.network(key, x, "eval", None)
        assert isinstance(twin, FoldedTwin)
        twin.refresh()
        expected = alone(model, name)(x)
        return (twin(x) - expected).abs().max() < 1e-12 * expected.abs().max()

    for _ in range(2):
        assert all(serves(view, name) for name, view in views.items())
        # The model itself, in whatever set it is.
        for name in NAMES:
            with bn_set(model, name):
                assert serves(model, name)
                assert all(serves(view, other) for other, view in views.items())
        assert serves(model, "pgd")
    # Unless something changed, a twin is kept.
    assert engine.network(views["normal"], x, "eval", None) is engine.network(views["normal"], x, "eval", None)


@pytest.mark.parametrize("bn", ["eval", "train", "train_frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_an_attack_in_a_set_is_the_attack_on_its_plain_model(name, bn):
    model = model_with_sets(dtype=torch.float32)
    twin, before, x = alone(model, name), buffers(model), images(dtype=torch.float32)
    flags = [module.training for module in model.modules()]
    attack = PGD(eps=0.1, step_size=0.04, steps=3, bn=bn)
    found, expected = (attack(net, x, labels(), generator=torch.Generator().manual_seed(3)) for net in (InSet(model, name), twin))
    assert_same_images(found, expected, step=0.04)
    assert moved(before, model) == (of_set(model, name) if bn == "train" else set())
    if bn == "train":
        steps = {int(m.sets[name].num_batches_tracked) for m in model.modules() if isinstance(m, BatchNormSets)}
        assert steps == {3}
    assert flags == [module.training for module in model.modules()] and all(p.grad is None for p in model.parameters())
    assert {m.active for m in model.modules() if isinstance(m, BatchNormSets)} == {"pgd"}


def test_copies_states_and_layouts():
    model, x = model_with_sets(), images()
    state = model.state_dict()
    for name in NAMES:
        keys = {key for key in state if f".sets.{name}." in key}
        assert len(keys) == 5 * 20  # weight, bias, mean, variance, count of a ResNet-18's BatchNorms
        assert of_set(model, name) == {key for key in keys if not key.endswith(("weight", "bias"))}
    other = add_bn_sets(plain_model(seed=2), NAMES).double().eval()
    other.load_state_dict(state)
    with bn_set(model, "normal"):
        copied = copy.deepcopy(model)
    average = WeightAverage(model, decay=0.5)
    for _ in range(60):
        average.update(other)
    for name in NAMES:
        with bn_set(model, name), bn_set(other, name), bn_set(copied, name), bn_set(average.model, name):
            assert torch.equal(other(x), model(x)) and torch.equal(copied(x), model(x))
            torch.testing.assert_close(average.model(x), model(x))
    assert torch.equal(average.model(x), alone(average.model, "pgd")(x))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert (last(x) - model(x)).abs().max() < 1e-12


def test_dynamo_sees_the_set_of_each_view():
    x, model = images(), nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model.forward = model.backbone.forward
    add_bn_sets(model, NAMES).double()
    expected = []
    for scale, name in enumerate(NAMES, start=1):
        nn.init.constant_(model.backbone[1].sets[name].weight, scale)
        with bn_set(model, name):
            expected.append(model(x))
    for name, out in zip(NAMES, expected, strict=True):
        assert torch.equal(torch.compile(InSet(model, name), fullgraph=True, backend="eager")(x), out)
    assert not torch.equal(*expected[:2])


@pytest.mark.parametrize(
    "names, said",
    [([], "at least one"), (["a", "a"], "different"), (["a", ""], "different names"), (["a.b"], "without dots"), ([1], "names")],
)
def test_bad_names(names, said):
    with pytest.raises(UserError, match=said):
        add_bn_sets(plain_model(), names)


def test_unknown_sets_and_sets_twice():
    model = model_with_sets()
    with pytest.raises(UserError, match="'norm' is unknown: the model's sets are pgd, pgd_ce, normal"), bn_set(model, "norm"):
        pass
    with pytest.raises(UserError, match="'pgd' is unknown: the model's sets are none"), bn_set(plain_model(), "pgd"):
        pass
    with pytest.raises(UserError, match="'norm' is unknown"):
        InSet(model, "norm")
    with pytest.raises(UserError, match="has sets already"):
        add_bn_sets(model, ["more"])
