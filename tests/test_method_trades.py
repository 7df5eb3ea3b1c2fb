"""TRADES and PGD-AT: loss and gradient, attack, forwards and BatchNorm statistics against transcriptions in fp64; they learn.

The transcriptions go over rows in Python numbers; their gradients are central differences.
"""

import copy
import math

import pytest
import torch
from torch import nn

from fastanchor.config import Config
from fastanchor.data import sources, views
from fastanchor.errors import UserError
from fastanchor.losses.trades import mean_divergence, trades_loss
from fastanchor.methods import build_method
from fastanchor.methods.base import Outputs
from fastanchor.models import build_model
from fastanchor.settings import load_recipe, parse_flags
from fastanchor.train.checks import check_config
from fastanchor.train.optim import build_optimizer
from fastanchor.train.step import TrainStep

CPU = torch.device("cpu")
IMAGES = torch.randint(256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(12) % 4
BASE = "--attack.steps 3 --attack.eps 0.1 --attack.step-size 0.04 --optim.lr 0.05 --model.head identity".split()
TRADES = ("--method", "trades", "--attack.objective", "kl", "--attack.start", "gaussian")


def config_of(*flags):
    return parse_flags([*BASE, *flags], Config())


def make_model(seed=0):
    torch.manual_seed(seed)
    return build_model("resnet18", num_classes=4, width=4, head="identity", mean=(0.5,) * 3, std=(0.25,) * 3)


def make_step(config, model):
    method = build_method(config)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, CPU)
    step.reset({"augment": 0, "attack": 1})
    return step


def assert_learns(recipe, *flags, steps=10, share=0.7):
    """The recipe's own loss on a batch of digits falls, in a small network and with a weak attack."""
    small = "--model.width 4 --data.augment none --attack.steps 2 --attack.eps 0.03 --attack.step-size 0.02 --optim.lr 0.05"
    config = parse_flags([*small.split(), *flags], load_recipe(recipe))
    digits = sources.load("digits", limit=64, val_fraction=0.1).train
    images, labels = (torch.as_tensor(part)[:32] for part in (digits.images, digits.labels))
    torch.manual_seed(0)
    step = make_step(config, build_model("resnet18", num_classes=10, width=4, head="identity"))
    totals = []
    for _ in range(steps):
        step.reset({"augment": 0, "attack": 1})
        step(images, labels, progress=20.0)
        totals.append(step.read()["loss"])
    assert all(map(math.isfinite, totals)) and totals[-1] < share * totals[0], [round(t, 2) for t in totals]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    clean, adversarial = 2 * torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    return clean, adversarial, torch.tensor([0, 1, 2, 3, 4, 0])


def softmax(row):
    top = max(row)
    total = sum(math.exp(v - top) for v in row)
    return [math.exp(v - top) / total for v in row]


def smoothed_cross_entropy(rows, labels, smoothing):
    """(1 - s) * that of the label + s * its mean over all classes as labels, mean over rows."""
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        logs = [math.log(p) for p in softmax(row)]
        total += -(1 - smoothing) * logs[label] - smoothing * sum(logs) / len(row)
    return total / len(rows)


def divergence(row, other):
    return sum(p * math.log(p / q) for p, q in zip(softmax(row), softmax(other), strict=True))


def trades_truth(clean, adversarial, labels, beta, smoothing=0.0):
    pairs = zip(clean, adversarial, strict=True)
    return smoothed_cross_entropy(clean, labels, smoothing) + beta * sum(divergence(a, b) for a, b in pairs) / len(clean)


def central_differences(function, tensor, width=1e-6):
    """d function / d tensor; function takes a list of rows."""
    gradient = torch.zeros_like(tensor)
    for index in range(tensor.numel()):
        values = []
        for sign in (1, -1):
            moved = tensor.clone()
            moved.view(-1)[index] += sign * width
            values.append(function(moved.tolist()))
        gradient.view(-1)[index] = (values[0] - values[1]) / (2 * width)
    return gradient


def own_gradients(function, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    return value, torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("beta, smoothing", [(6.0, 0.0), (1.5, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-8), (torch.float32, 2e-6)])
def test_loss_and_gradient_are_the_formulas(logits, beta, smoothing, dtype, rtol):
    clean, adversarial, labels = logits
    value, (d_clean, d_adv) = own_gradients(
        lambda a, b: trades_loss(a, b, labels, beta, smoothing), clean.to(dtype), adversarial.to(dtype)
    )
    rows, others, classes = clean.tolist(), adversarial.tolist(), labels.tolist()
    assert value.dtype == dtype and value.item() == pytest.approx(trades_truth(rows, others, classes, beta, smoothing), rel=rtol)
    expected = central_differences(lambda r: trades_truth(r, others, classes, beta, smoothing), clean)
    torch.testing.assert_close(d_clean.double(), expected, rtol=rtol, atol=max(1e-8, rtol))
    expected = central_differences(lambda r: trades_truth(rows, r, classes, beta, smoothing), adversarial)
    torch.testing.assert_close(d_adv.double(), expected, rtol=rtol, atol=max(1e-8, rtol))


def test_method_gives_the_loss_by_terms_and_the_target_is_not_detached(logits):
    clean, adversarial, labels = logits
    method = build_method(config_of(*TRADES, "--loss.beta", "4", "--loss.label-smoothing", "0.2"))

    def total(a, b):
        return sum(method.loss(Outputs({"aug": a, "adv": b}, {}), labels, torch.tensor(0.0)).values())

    terms = method.loss(Outputs({"aug": clean, "adv": adversarial}, {}), labels, torch.tensor(0.0))
    rows, others, classes = clean.tolist(), adversarial.tolist(), labels.tolist()
    assert terms["ce"].item() == pytest.approx(smoothed_cross_entropy(rows, classes, 0.2))
    assert terms["kl"].item() == pytest.approx(4 * sum(map(divergence, rows, others)) / len(rows))
    _, (d_clean, _) = own_gradients(total, clean, adversarial)
    expected = central_differences(lambda r: trades_truth(r, others, classes, 4.0, 0.2), clean)
    torch.testing.assert_close(d_clean, expected, rtol=1e-7, atol=1e-8)


def test_loss_is_finite_where_probabilities_underflow():
    clean = torch.tensor([[300.0, -300.0, 0.0], [0.0, 200.0, -200.0]])
    adversarial = torch.tensor([[0.0, 0.0, 300.0], [200.0, -200.0, 0.0]])
    value, gradients = own_gradients(lambda a, b: trades_loss(a, b, torch.tensor([1, 2])), clean, adversarial)
    assert value.isfinite() and all(g.isfinite().all() for g in gradients)
    # Cross-entropies 600 and 400; KL(p(x) || p(x')): p(x) is certain of a class whose -log p(x') is 300 and 400.
    assert value.item() == pytest.approx((600 + 400) / 2 + 6 * (300 + 400) / 2, rel=1e-6)


def test_low_precision_logits_are_summed_in_fp32(logits):
    clean, adversarial, labels = logits
    low = clean.bfloat16(), adversarial.bfloat16()
    value = trades_loss(*low, labels)
    assert value.dtype == torch.float32
    expected = trades_truth(low[0].tolist(), low[1].tolist(), labels.tolist(), 6.0)
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shapes", [((1, 5), (6, 5), (6,)), ((6, 5), (1, 5), (6,)), ((6, 5), (6, 5), (1,)), ((5,), (5,), (5,))])
def test_shapes_that_would_broadcast_are_refused(shapes):
    with pytest.raises(UserError, match="must be \\(N, K\\)"):
        trades_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), torch.zeros(shapes[2], dtype=torch.int64))


def test_attack_objective_is_the_divergence_and_its_gradient(logits):
    clean, adversarial, labels = logits
    model = make_model()
    method = build_method(config_of(*TRADES))
    attack = method.adversaries(model, torch.tensor(0.0))["adv"].attack
    assert attack.objective_name == "kl" and attack.start == "gaussian" and attack.bn == "eval"
    value, (gradient,) = own_gradients(lambda b: attack.objective(b, labels, clean).sum(), adversarial)
    rows = clean.tolist()
    assert value.item() == pytest.approx(sum(map(divergence, rows, adversarial.tolist())), rel=1e-12)
    expected = central_differences(lambda r: sum(map(divergence, rows, r)), adversarial)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


def attacked_by_hand(model, images, labels, noise, objective, eps=0.1, step_size=0.04, steps=3):
    """The public code's loop in fp64, the clean prediction computed anew in every step."""
    model = copy.deepcopy(model).double().eval()
    images, made = images.double(), images.double() + noise.double()
    for _ in range(steps):
        made = made.detach().requires_grad_()
        out = model(made)
        if objective == "kl":
            target = model(images).detach().softmax(1)
            value = (target * (target.log() - out.softmax(1).log())).sum()
        elif objective == "ce":
            value = -out.softmax(1).log()[torch.arange(len(labels)), labels].sum()
        else:
            others = out - 1e9 * nn.functional.one_hot(labels, out.shape[1])
            value = (others.max(1).values - out[torch.arange(len(labels)), labels]).sum()
        (gradient,) = torch.autograd.grad(value, made)
        made = made.detach() + step_size * gradient.sign()
        made = torch.minimum(torch.maximum(made, images - eps), images + eps).clamp(0, 1)
    return made


@pytest.mark.parametrize(
    "method, objective, start",
    [("trades", "kl", "gaussian"), ("trades", "ce", "gaussian"), ("pgd_at", "ce", "uniform"), ("pgd_at", "cw", "uniform")],
)
def test_adversarial_images_are_those_of_the_public_loop(method, objective, start):
    model = make_model()
    with torch.no_grad():  # of an untrained network the divergence is lost in the rounding of fp32
        model.classifier.weight.mul_(20)
    step = make_step(config_of("--method", method, "--attack.objective", objective, "--attack.start", start), model)
    made, _ = step.make_views(IMAGES, LABELS)
    augmented = views.augment(IMAGES, "crop_flip", torch.Generator().manual_seed(0))
    noise, generator = torch.empty_like(augmented), torch.Generator().manual_seed(1)
    if start == "gaussian":
        noise.normal_(generator=generator).mul_(0.001)
    else:
        noise.uniform_(-0.1, 0.1, generator=generator)
    # The start is projected too: the public code of TRADES takes its first gradient up to 0.001 outside of [0, 1].
    noise = (augmented + noise).clamp(0, 1) - augmented
    expected = attacked_by_hand(model, augmented, LABELS, noise, objective)
    # In fp32 the sign of a gradient next to 0 may be the other one.
    assert ((made["adv"].double() - expected).abs() < 1e-5).double().mean() > 0.98


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("view_bn, trained", [("separate", [12, 12]), ("mixed", [24])])
def test_clean_prediction_is_computed_once_a_batch(backend, view_bn, trained):
    model = make_model()
    seen = []
    model.backbone.register_forward_hook(lambda module, args, out: seen.append((module.training, len(args[0]))))
    make_step(config_of(*TRADES, "--attack.backend", backend, "--model.view-bn", view_bn), model)(IMAGES, LABELS, progress=0.0)
    assert seen == [(False, 12)] * (1 + 3) + [(True, count) for count in trained]


def test_each_view_moves_the_running_statistics_once_the_clean_one_last():
    model = make_model()
    into, statistics = [], []

    def watch(module, args):
        if module.training:
            x = args[0].detach().double()
            statistics.append((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)))

    model.backbone.bn1.register_forward_pre_hook(watch)
    model.normalize.register_forward_pre_hook(lambda module, args: into.append((model.training, args[0].detach())))
    step = make_step(config_of(*TRADES, "--model.view-bn", "separate"), model)
    step(IMAGES, LABELS, progress=0.0)
    augmented = views.augment(IMAGES, "crop_flip", torch.Generator().manual_seed(0))
    adversarial, clean = [x for training, x in into if training]
    assert torch.equal(clean, augmented) and 0.02 < (adversarial - augmented).abs().max() <= 0.1 + 1e-6
    mean, variance = torch.zeros(4).double(), torch.ones(4).double()
    for batch_mean, batch_variance in statistics:
        mean, variance = 0.9 * mean + 0.1 * batch_mean, 0.9 * variance + 0.1 * batch_variance
    norm = model.backbone.bn1
    assert len(statistics) == 2 and norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bn, moved", [("eval", 1), ("train", 4), ("train_frozen", 1)])
def test_pgd_at_moves_the_statistics_by_the_training_forward_and_by_an_attack_in_train_mode(bn, moved):
    model = make_model()
    make_step(config_of("--method", "pgd_at", "--attack.bn", bn), model)(IMAGES, LABELS, progress=0.0)
    assert model.backbone.bn1.num_batches_tracked == moved


@pytest.mark.parametrize("ce_clean, smoothing", [(0.0, 0.0), (0.5, 0.1)])
def test_pgd_at_is_weighted_cross_entropies(logits, ce_clean, smoothing):
    clean, adversarial, labels = logits
    flags = ("--method", "pgd_at", "--loss.ce-adv", "2", "--loss.ce-clean", str(ce_clean))
    method = build_method(config_of(*flags, "--loss.label-smoothing", str(smoothing)))
    assert method.views == (("aug", "adv") if ce_clean else ("adv",))

    def total(a, b):
        return sum(method.loss(Outputs({"aug": a, "adv": b}, {}), labels, torch.tensor(0.0)).values())

    def truth(rows, others):
        classes = labels.tolist()
        natural = smoothed_cross_entropy(rows, classes, smoothing)
        return 2 * smoothed_cross_entropy(others, classes, smoothing) + ce_clean * natural

    value, (d_adv,) = own_gradients(lambda b: total(clean, b), adversarial)
    assert value.item() == pytest.approx(truth(clean.tolist(), adversarial.tolist()))
    expected = central_differences(lambda r: truth(clean.tolist(), r), adversarial)
    torch.testing.assert_close(d_adv, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--method", "pgd_at", "--loss.ce-adv", "0"), "loss.ce_adv = loss.ce_clean = 0"),
        (("--method", "trades", "--attack.objective", "kl", "--attack.start", "zero"), "attack.start = zero"),
        (("--method", "trades", "--attack.objective", "cw"), "attack.objective = cw"),
        (("--method", "pgd_at", "--attack.objective", "kl"), "attack.objective = kl"),
        (("--method", "trades", "--loss.beta", "-1"), "loss.beta = -1"),
        (("--method", "pgd_at", "--loss.beta", "6"), "loss.beta"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        check_config(config_of(*flags))


# Epochs, learning rate, weight decay, milestones, BatchNorm in the attack, its start, AWP's gamma and first epoch.
RECIPES = {
    "pgd_at": (110, 0.1, 5e-4, (100, 105), "eval", "uniform", 0, 0),
    "pgd_at_rice": (200, 0.1, 5e-4, (100, 150), "train", "uniform", 0, 0),
    "pgd_at_awp": (200, 0.1, 5e-4, (100, 150), "train", "uniform", 0.01, 0),
    "trades": (110, 0.1, 5e-4, (100, 105), "eval", "gaussian", 0, 0),
    "trades_awp": (200, 0.1, 5e-4, (99, 149), "eval", "gaussian", 0.005, 9),
    "mart": (120, 0.01, 3.5e-3, (74, 89, 99), "eval", "gaussian", 0, 0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_their_sources_do(name):
    config = load_recipe(name)
    check_config(config)
    optim, attack = config.optim, config.attack
    schedule = (config.epochs, optim.lr, optim.weight_decay, optim.milestones)
    assert (*schedule, attack.bn, attack.start, optim.awp_gamma, optim.awp_start) == RECIPES[name]
    assert config.method == name.removesuffix("_awp").removesuffix("_rice")
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 10)
    assert attack.objective == ("kl" if config.method == "trades" else "ce")
    assert config.model.view_bn == ("mixed" if config.method == "pgd_at" else "separate")
    assert getattr(config.loss, "beta", None) == {"trades": 6.0, "mart": 5.0}.get(config.method)


@pytest.mark.parametrize("recipe", ["pgd_at", "trades"])
def test_recipe_lowers_its_own_loss_on_digits(recipe):
    assert_learns(recipe)


def test_divergence_alone_is_the_mean_over_images(logits):
    clean, adversarial, _ = logits
    expected = sum(map(divergence, clean.tolist(), adversarial.tolist())) / len(clean)
    assert mean_divergence(clean, adversarial).item() == pytest.approx(expected, rel=1e-12)
