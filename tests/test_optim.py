"""Optimisers that a graph can hold, learning-rate schedules and the moving average of weights."""

import copy
import io
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastanchor.config import OptimConfig
from fastanchor.errors import UserError
from fastanchor.models import build_model
from fastanchor.train.optim import (
    WeightAverage,
    build_optimizer,
    capturable,
    check_optimizer,
    learning_rate,
    load_optimizer,
    set_learning_rate,
    state_tensors,
)

NAMES = ("sgd", "adamw", "lars", "lamb")


class NoHostRead(TorchDispatchMode):
    """Raises where a tensor's value is read back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense, "a value was read back"
        return func(*args, **(kwargs or {}))


class CountCalls(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def make_parameters(seed=0):
    """A convolution in channels-last, a 1x1 convolution, a matrix and a bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((8, 5, 3, 3), (4, 8, 1, 1), (7, 4), (1003,))
    values = [torch.randn(shape, generator=g) for shape in shapes]
    return [torch.nn.Parameter(v.to(memory_format=torch.channels_last) if v.ndim == 4 else v) for v in values]


def step(optimizer, parameters, seed):
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g).to(
            memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format
        )
    optimizer.step()


def addresses(tensors):
    return [t.data_ptr() for t in tensors]


def test_step_schedule_decays_at_its_milestones():
    config = OptimConfig(lr=0.1, schedule="step", milestones=(100, 105), decay=0.1)
    assert [learning_rate(config, e, 110) for e in (0, 99.99, 100, 104.9, 105, 109)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_cosine_schedule_with_warm_up():
    config = OptimConfig(lr=0.2, schedule="cosine", warmup_epochs=2)
    assert learning_rate(config, 1, 10) == pytest.approx(0.1)
    assert learning_rate(config, 5, 10) == pytest.approx(0.1)
    assert learning_rate(config, 2.5, 10) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 10, 10) == pytest.approx(0)


def test_cyclic_schedule_is_a_triangle():
    config = OptimConfig(lr=0.3, schedule="cyclic", peak=0.4)
    assert [learning_rate(config, e, 10) for e in (0, 2, 4, 7, 10)] == pytest.approx([0, 0.15, 0.3, 0.15, 0])


def test_optimizer_is_torch_sgd_to_rounding():
    """Fused or not, the update is w <- w - lr * (m * v + g + wd * w)."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = build_optimizer([parameter], OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01))
    w, v = parameter.detach().clone(), torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        parameter.grad = torch.randn(5, dtype=torch.float64)
        v = 0.9 * v + parameter.grad + 0.01 * w
        w = w - 0.1 * v
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), w)


@pytest.mark.parametrize("flags", [{}, {"nesterov": True}, {"momentum": 0.0}, {"name": "adamw"}], ids=str)
def test_state_made_beforehand_and_a_learning_rate_in_a_tensor_change_no_bit(flags):
    """As torch's own, which makes its state at the first step and is given a number."""
    config = OptimConfig(lr=0.05, weight_decay=0.01, **flags)
    ours, theirs = make_parameters(), make_parameters()
    optimizer = build_optimizer(ours, config)
    if config.name == "sgd":
        plain = torch.optim.SGD(
            theirs, lr=0.05, momentum=config.momentum, nesterov=config.nesterov, weight_decay=0.01, fused=True
        )
    else:
        plain = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.01, fused=True)
    for i, lr in enumerate((0.05, 0.05, 0.013)):
        set_learning_rate(optimizer, lr)
        plain.param_groups[0]["lr"] = lr
        step(optimizer, ours, i)
        step(plain, theirs, i)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), i


def test_the_settings_of_adamw_arrive():
    group = build_optimizer(make_parameters(), OptimConfig(name="adamw", beta1=0.8, beta2=0.7, eps=1e-3)).param_groups[0]
    assert group["betas"] == (0.8, 0.7) and group["eps"] == 1e-3 and group["weight_decay"] == 5e-4 and group["capturable"]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_nothing_back_and_moves_no_tensor(name):
    parameters = make_parameters()
    optimizer = build_optimizer(parameters, OptimConfig(name=name))
    state = state_tensors(optimizer)
    per_parameter = {"sgd": 1, "adamw": 3, "lars": 1, "lamb": 2}[name]
    assert len(state) == per_parameter * 4 + {"lamb": 3}.get(name, 1)  # the learning rate; LAMB's step of either group
    assert capturable(optimizer)
    assert all(not t.any() for t in state if t is not optimizer.param_groups[0]["lr"])
    for p in parameters:
        assert all(t.stride() == p.stride() for t in optimizer.state[p].values() if t.ndim)
    before = addresses(state)
    with NoHostRead():
        for i in range(3):
            step(optimizer, parameters, i)
            set_learning_rate(optimizer, 0.01)
    assert addresses(state_tensors(optimizer)) == before
    with pytest.raises(AssertionError, match="read back"), NoHostRead():
        float(parameters[0].detach().sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_is_set_in_place_for_all_groups(name):
    parameters = make_parameters()
    optimizer = build_optimizer(parameters, OptimConfig(name=name, lr=0.1))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(r.shape == () and r.dtype == torch.float32 and r == torch.tensor(0.1) for r in rates)
    set_learning_rate(optimizer, 0.0)
    before = [p.detach().clone() for p in parameters]
    step(optimizer, parameters, 0)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    set_learning_rate(optimizer, 0.5)
    step(optimizer, parameters, 1)
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(group["lr"] is r for group, r in zip(optimizer.param_groups, rates, strict=True))


def test_groups_with_rates_of_their_own_are_all_set():
    optimizer = build_optimizer(make_parameters(), OptimConfig(name="lars"))
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1.0)
    set_learning_rate(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5]


def saved_and_read(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_continues_to_the_same_bits(name, in_place):
    config = OptimConfig(name=name, lr=0.05)
    whole, optimizer = make_parameters(), None
    optimizer = build_optimizer(whole, config)
    for i in range(2):
        step(optimizer, whole, i)
    set_learning_rate(optimizer, 0.03)
    state = saved_and_read(optimizer.state_dict())
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    other = build_optimizer(resumed, config)
    before = addresses(state_tensors(other))
    if in_place:
        load_optimizer(other, state)
        assert addresses(state_tensors(other)) == before
    else:
        other.load_state_dict(state)
    assert capturable(other) and all(g["lr"].dtype == torch.float32 for g in other.param_groups)
    for i in range(2, 4):
        step(optimizer, whole, i)
        step(other, resumed, i)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_states_with_a_number_for_a_learning_rate_load(in_place, stepped):
    """As saved by torch's SGD with a float, which has no state before its first step."""
    theirs = make_parameters()
    plain = torch.optim.SGD(theirs, lr=0.07, momentum=0.9, weight_decay=5e-4, fused=True)
    if stepped:
        step(plain, theirs, 0)
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = build_optimizer(ours, OptimConfig(momentum=0.9))
    for value in state_tensors(optimizer):
        value.fill_(3.0)
    state = saved_and_read(plain.state_dict())
    if in_place:
        load_optimizer(optimizer, state)
    else:
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"].equal(torch.tensor(0.07)) and len(state_tensors(optimizer)) == 5
    step(plain, theirs, 1)
    step(optimizer, ours, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def state_of(name, parameters=None, **settings):
    parameters = parameters or make_parameters()
    optimizer = build_optimizer(parameters, OptimConfig(name=name, **settings))
    step(optimizer, parameters, 0)
    return optimizer.state_dict()


def with_buffer(value):
    state = copy.deepcopy(state_of("sgd"))
    state["state"][3]["momentum_buffer"] = value
    return state


@pytest.mark.parametrize(
    "name, state, message",
    [
        ("sgd", lambda: {"weights": 1}, "the saved state is not one of an optimiser"),
        ("sgd", lambda: None, "the saved state is not one of an optimiser"),
        ("sgd", lambda: state_of("sgd", make_parameters()[:2]), "is of 2 parameters; this one has 4 parameters"),
        ("lars", lambda: state_of("sgd"), r"is of 4 parameters; this one has 3 \+ 1 parameters"),
        ("lamb", lambda: state_of("lars"), "is not that of LAMB, but of another optimiser"),
        ("lars", lambda: state_of("lamb"), "is not that of LARS, but of another optimiser"),
        ("adamw", lambda: state_of("sgd"), "is not that of AdamW, but of another optimiser"),
        ("sgd", lambda: state_of("adamw"), "is not that of SGD, but of another optimiser"),
        ("sgd", lambda: with_buffer(0.5), "belongs to other parameters: momentum_buffer of parameter 3"),
        ("sgd", lambda: with_buffer(torch.ones(1)), r"belongs to other parameters: momentum_buffer of parameter 3 in group 0 should be of shape \(1003,\)"),
        ("sgd-0", lambda: state_of("sgd"), "is not that of SGD with these settings: it holds momentum_buffer"),
    ],
)  # fmt: skip
def test_a_foreign_state_is_refused_and_changes_nothing(name, state, message):
    momentum = 0.0 if name == "sgd-0" else 0.9
    parameters = make_parameters()
    optimizer = build_optimizer(parameters, OptimConfig(name=name.removesuffix("-0"), momentum=momentum, lr=0.3))
    step(optimizer, parameters, 7)
    before = [t.clone() for t in state_tensors(optimizer)]
    with pytest.raises(UserError, match=message):
        load_optimizer(optimizer, state())
    assert all(torch.equal(a, b) for a, b in zip(state_tensors(optimizer), before, strict=True))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "lars", "nesterov": True}, "optim.nesterov: is defined for optim.name = sgd, not lars"),
        ({"nesterov": True, "momentum": 0.0}, "optim.nesterov: needs optim.momentum > 0"),
        ({"name": "adamw", "backend": "apex"}, "optim.backend = apex: has sgd and lamb, not adamw; use torch"),
        ({"name": "lars", "backend": "apex"}, "optim.backend = apex: has sgd and lamb, not lars; use torch"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    for check in (check_optimizer, lambda config: build_optimizer(make_parameters(), config)):
        with pytest.raises(UserError) as error:
            check(OptimConfig(**settings))
        assert str(error.value) == message


@pytest.mark.parametrize("name", NAMES)
def test_good_settings_pass_and_torch_is_named_or_default(name):
    for backend in ("auto", "torch"):
        config = OptimConfig(name=name, backend=backend)
        check_optimizer(config)
        assert type(build_optimizer(make_parameters(), config)).__name__.lower() == name


def test_weight_average_follows_its_formula_and_copies_counters():
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, width=2)
    average = WeightAverage(model, decay=0.5)
    expected = copy.deepcopy(model.state_dict())
    for t in range(12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model.backbone.bn1.running_mean.add_(1.0)
            model.backbone.bn1.num_batches_tracked.add_(1)
        average.update(model)
        d = min(0.5, (1 + t) / (10 + t))
        for name, value in model.state_dict().items():
            expected[name] = d * expected[name] + (1 - d) * value if value.is_floating_point() else value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert not any(p.requires_grad for p in average.model.parameters())


def test_weight_average_reads_nothing_back_and_moves_no_tensor():
    model = build_model("resnet18", num_classes=3, width=2)
    average = WeightAverage(model, decay=0.9)
    before = addresses(average.tensors())
    with NoHostRead():
        for _ in range(3):
            average.update(model)
    assert addresses(average.tensors()) == before and average.steps == 3
    with CountCalls() as count:
        average.update(model)
    assert count.calls < 12  # four for all of its tensors, the rest for one number


def test_the_decay_of_the_weight_average_rises_to_its_limit():
    """A weight that jumps from 0 to 1 shows 1 - d at once; exactly the fp64 value, rounded once to fp32 and once in the product."""
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.999)
    for t in (0, 1, 7, 989, 8981, 8990, 8991, 8992, 10**6):
        average.steps = t
        with torch.no_grad():
            average.model.weight.zero_()
            model.weight.fill_(1.0)
        average.update(model)
        expected = 1 - min(0.999, (1 + t) / (10 + t))
        assert average.model.weight.item() == pytest.approx(expected, rel=1e-7) and average.steps == t + 1


def test_weight_average_goes_on_after_both_models_were_loaded():
    """load_state_dict writes in place, so what update remembers stays right; `steps` comes back as the int that was saved."""
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, width=2)
    average = WeightAverage(model, decay=0.9)
    average.update(model)
    weights = {name: v + 1 if v.is_floating_point() else v + 5 for name, v in model.state_dict().items()}
    averaged = {name: v - 1 if v.is_floating_point() else v for name, v in model.state_dict().items()}
    model.load_state_dict(weights)
    average.model.load_state_dict(averaged)
    average.steps = 3
    assert type(average.steps) is int and average.steps == 3
    average.update(model)
    d = 4 / 13
    for name, value in average.model.state_dict().items():
        expected = d * averaged[name] + (1 - d) * weights[name] if value.is_floating_point() else weights[name]
        torch.testing.assert_close(value, expected, msg=name)


def test_weight_average_follows_another_model_when_it_is_given_one():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    average = WeightAverage(first, decay=0.9)
    average.update(first)
    start = average.model.weight.clone()
    average.update(second)
    d = 2 / 11
    torch.testing.assert_close(average.model.weight, d * start + (1 - d) * second.weight.detach())


def test_weight_average_moves_tied_weights_once():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    average = WeightAverage(model, decay=0.5)
    start = average.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update(model)
    torch.testing.assert_close(average.model[1].weight, start + 0.9)
