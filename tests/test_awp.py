"""Adversarial weight perturbation against a transcription of the public code's steps in fp64, and what it must leave alone."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from graph_emulator import Emulator
from test_method_trades import IMAGES, LABELS, assert_learns, config_of, make_model, make_step
from torch import nn

from fastanchor import graphs
from fastanchor.losses.trades import trades_loss
from fastanchor.train.awp import perturbed, perturbed_weights
from fastanchor.train.optim import build_optimizer, state_tensors

X = IMAGES.permute(0, 3, 1, 2).double() / 255
X_ADV = (X + 0.05 * torch.randn(X.shape, generator=torch.Generator().manual_seed(2)).sign()).clamp(0, 1)


def double_model(seed=0):
    return make_model(seed).double().train()


def trades_of(model):
    return trades_loss(model(X), model(X_ADV), LABELS)


def perturbed_by_hand(model, gamma, loss):
    """State dict with weights w + gamma ||w|| d / ||d||, d being what one ascent step of SGD does to a copy; buffers as given."""
    proxy = copy.deepcopy(model)
    loss(proxy).backward()
    moved = {}
    for name, value in model.state_dict().items():
        moved[name] = value.clone()
        if value.dim() >= 2 and name.endswith("weight"):
            step = 0.01 * dict(proxy.named_parameters())[name].grad
            lengths = [tensor.square().sum().sqrt() for tensor in (value, step)]
            moved[name] += gamma * lengths[0] / lengths[1] * step
    return moved


def test_weights_inside_are_those_of_the_public_code_and_afterwards_the_same_bits():
    model = double_model()
    before = copy.deepcopy(model.state_dict())
    expected = perturbed_by_hand(model, 0.02, trades_of)
    changed = 0
    with perturbed(model, model.parameters(), 0.02, lambda: trades_of(model)):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
            changed += not torch.equal(value, before[name])
    convolutions_and_classifier = 20 + 1
    assert changed == convolutions_and_classifier
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradient_is_the_one_at_the_perturbed_weights_of_everything_that_is_trained():
    model, other = double_model(), double_model()
    other.load_state_dict(perturbed_by_hand(model, 0.02, trades_of))
    trades_of(other).backward()
    with perturbed(model, model.parameters(), 0.02, lambda: trades_of(model)):
        trades_of(model).backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_the_optimiser_moves_the_weights_and_not_the_perturbed_ones():
    """Three steps of SGD with momentum and weight decay; the transcription keeps its own momentum."""
    model, theirs = double_model(), double_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
    momentum = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        with perturbed(model, model.parameters(), 0.02, lambda: trades_of(model)):
            trades_of(model).backward()
        optimizer.step()
        moved = copy.deepcopy(theirs)
        moved.load_state_dict(perturbed_by_hand(theirs, 0.02, trades_of))
        trades_of(moved).backward()
        with torch.no_grad():
            for (name, w), v in zip(theirs.named_parameters(), moved.parameters(), strict=True):
                momentum[name] = 0.9 * momentum[name] + v.grad + 5e-3 * w
                w -= 0.05 * momentum[name]
            for mine, his in zip(theirs.buffers(), moved.buffers(), strict=True):
                mine.copy_(his)
    for (name, a), b in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_running_statistics_end_as_if_only_the_second_forward_had_moved_them():
    model, other = double_model(), double_model()
    other.load_state_dict(perturbed_by_hand(model, 0.02, trades_of))
    with torch.no_grad():
        trades_of(other)
    with perturbed(model, model.parameters(), 0.02, lambda: trades_of(model)):
        trades_of(model).backward()
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12, msg=name)
    assert model.backbone.bn1.num_batches_tracked == 2  # two views, each once


@pytest.mark.parametrize("where", ["finding", "inside"])
def test_all_is_as_before_after_an_exception(where):
    model = double_model()
    before = copy.deepcopy(model.state_dict())

    def failing():
        value = trades_of(model)
        if where == "finding":
            raise RuntimeError("stop")
        return value

    with pytest.raises(RuntimeError, match="stop"), perturbed(model, model.parameters(), 0.02, failing):
        raise RuntimeError("stop")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


class Odd(nn.Module):
    """A layer without gradient at 0, one that the loss does not reach, a frozen one, one of zeros, vectors and a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.dead, self.unused, self.frozen, self.zeros = (nn.Linear(3, 3).double() for _ in range(5))
        self.norm = nn.BatchNorm1d(3).double()
        self.matrix = nn.Parameter(torch.ones(3, 3).double())
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.zeros.weight)

    def forward(self, x):
        return (self.zeros(self.frozen(self.norm(self.used(x)))) @ self.matrix + 0 * self.dead(x)) ** 2


def test_no_gradient_and_no_weight_make_no_nan_and_only_weights_move():
    model = Odd()
    before = copy.deepcopy(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in perturbed_weights(model, trained)} == {
        id(layer.weight) for layer in (model.used, model.dead, model.unused, model.zeros)
    }
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():  # else nothing before it would get a gradient
        model.zeros.weight[0, 0] = 0.5
        before["zeros.weight"] = model.zeros.weight.clone()
    with perturbed(model, trained, 0.1, lambda: model(x).sum()):
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert all(value.isfinite().all() for value in model.state_dict().values())
    assert moved == {"used.weight", "zeros.weight"}
    nn.init.zeros_(model.zeros.weight)
    with perturbed(model, trained, 0.1, lambda: model(x).sum()):
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_only_what_the_optimiser_moves_is_perturbed_and_gradients_wait():
    model = double_model()
    before = copy.deepcopy(model.state_dict())
    with perturbed(model, model.classifier.parameters(), 0.02, lambda: trades_of(model)):
        assert all(p.grad is None for p in model.parameters())
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight"}


def test_gamma_may_be_a_tensor_and_zero_perturbs_nothing():
    model = double_model()
    before = copy.deepcopy(model.state_dict())
    expected = perturbed_by_hand(model, 0.02, trades_of)
    with perturbed(model, model.parameters(), torch.tensor(0.02, dtype=torch.float64), lambda: trades_of(model)):
        torch.testing.assert_close(model.classifier.weight.detach(), expected["classifier.weight"])
    with perturbed(model, model.parameters(), 0.0, lambda: trades_of(model)):
        assert torch.equal(model.classifier.weight, before["classifier.weight"])


def test_an_autocast_region_around_it_sees_the_perturbed_weights():
    model, x = make_model().train(), X.float()

    def loss(of):
        return F.cross_entropy(of(x), LABELS)

    with torch.autocast("cpu", torch.bfloat16):
        before = loss(model).item()
        with perturbed(model, model.parameters(), 0.5, lambda: loss(model)):
            inside = loss(model).item()
            again = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            expected, after = loss(again).item(), loss(model).item()
        cached = loss(model).item()
    assert inside == pytest.approx(expected, rel=1e-6) and inside > before + 0.01
    assert cached == pytest.approx(after, rel=1e-6) and after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_captured_step_with_it_is_the_plain_one(device):
    """Recorded and replayed: nothing is read back to the host, and whatever changes does so in place. On a CPU to the bit."""

    def trainer():
        model = make_model().to(device).train()
        optimizer = build_optimizer(model.parameters(), config_of().optim)

        def step(clean, adversarial, labels):
            def loss():
                return trades_loss(model(clean), model(adversarial), labels)

            optimizer.zero_grad(set_to_none=True)
            with perturbed(model, model.parameters(), 0.01, loss):
                loss().backward()
            optimizer.step()

        return model, optimizer, step

    given = [part.contiguous().to(device) for part in (X.float(), X_ADV.float(), LABELS)]
    batches = [[part.roll(k, 0) for part in given] for k in range(3)]
    plain, _, step = trainer()
    for batch in batches:
        step(*batch)
    model, optimizer, step = trainer()
    with graphs.use_recorder(Emulator) if device == "cpu" else contextlib.nullcontext():
        state = lambda: [*model.parameters(), *model.buffers(), *state_tensors(optimizer)]  # noqa: E731
        captured = graphs.Captured(step, batches[0], state=state)
        for batch in batches:
            captured(*batch)
    tolerance = 0.0 if device == "cpu" else 1e-3
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("method", ["pgd_at", "trades", "mart"])
def test_the_training_step_perturbs_from_its_epoch_on(method):
    """`optim.awp_start` in epochs: before it the step is the plain one, to the bit; from it on it is another one."""
    flags = ["--method", method, "--attack.start", "gaussian", "--model.view-bn", "separate"]
    awp = [*flags, "--optim.awp-gamma", "0.01", "--optim.awp-start", "2"]
    found = []
    for arguments, progress in ((flags, 2.0), (awp, 1.9), (awp, 2.0)):
        model = make_model()
        make_step(config_of(*arguments), model)(IMAGES, LABELS, progress=progress)
        found.append(model)
    plain, early, on = (model.state_dict() for model in found)
    assert all(torch.equal(plain[name], early[name]) for name in plain)
    assert not torch.equal(plain["classifier.weight"], on["classifier.weight"])
    assert found[2].backbone.bn1.num_batches_tracked == found[0].backbone.bn1.num_batches_tracked


@pytest.mark.parametrize("recipe", ["pgd_at_awp", "trades_awp"])
def test_recipe_lowers_its_own_loss_on_digits(recipe):
    assert_learns(recipe, share=0.9)
