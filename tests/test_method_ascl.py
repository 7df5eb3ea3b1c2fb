"""ASCL: its loss of every selection and distance, the whole objective, its attack and what BatchNorm sees of it, against loops
over rows in fp64; it learns the digits."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastanchor.config import Config
from fastanchor.data import sources, views
from fastanchor.errors import UserError
from fastanchor.losses import ascl as module
from fastanchor.losses.ascl import ASCLLoss
from fastanchor.methods import build_method
from fastanchor.methods.base import Outputs
from fastanchor.models import build_model
from fastanchor.settings import load_recipe, parse_flags
from fastanchor.train.loop import train
from fastanchor.train.optim import build_optimizer
from fastanchor.train.run import RunDir
from fastanchor.train.step import TrainStep

CPU = torch.device("cpu")
SELECTIONS = ("all", "hard", "soft", "merge", "leaking")
DISTANCES = ("linf", "cosine")
BASE = (
    "--method ascl --attack.steps 3 --attack.eps 0.1 --attack.step-size 0.04 --attack.bn train --optim.lr 0.05 "
    "--model.head linear --no-channels-last"
).split()


def config_of(*flags):
    return parse_flags([*BASE, *flags], Config())


def make_model(seed=0):
    torch.manual_seed(seed)
    return build_model(
        "resnet18", num_classes=4, width=4, head="linear", head_dim=8, mean=(0.5,) * 3, std=(0.25,) * 3
    )  # fmt: skip


def make_step(config, model):
    method = build_method(config)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, CPU)
    step.reset({"augment": 0, "attack": 1})
    return step


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(256, (8, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return images, torch.arange(8) % 4


def rows(n=14, d=5, seed=0):
    """Embeddings, labels, predictions; row 0 is alone with its prediction, rows 1 and 4 of one class with theirs, nobody takes
    a row for class 2, and the last row is alone in its class."""
    u = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(n) % 3
    y[-1] = 3
    c = torch.tensor([4, 5, 2, 0, 5, 2, 1, 1, 0, 0, 0, 2, 1, 0])[:n]
    return u.requires_grad_(), y, c


# ---------------------------------------------------------------- the transcription


def is_positive(selection, y, c, i, a):
    return a != i and y[a] == y[i] and (selection != "leaking" or c[a] == c[i])


def is_negative(selection, y, c, i, a):
    if y[a] == y[i]:
        return False
    taken_for, alike = c[a] == y[i], c[a] == c[i]
    return {"all": True, "hard": taken_for, "soft": alike, "merge": taken_for or alike, "leaking": alike}[selection]


def similarity(z, i, a, distance):
    if distance == "cosine":
        return sum(z[i][k] * z[a][k] for k in range(len(z[i])))
    return -max(abs(z[i][k] - z[a][k]) for k in range(len(z[i])))


def ascl_truth(u, y, c, tau, selection, distance):
    """(1 / N) sum_i (1 / |P_i|) sum_{p in P_i} -log( e^s_ip / sum_{a in P_i and N_i} e^s_ia ), and the sizes of these sets."""
    y, c = y.tolist(), c.tolist()
    z = [[value / row.pow(2).sum().sqrt() for value in row] for row in u]
    total, sizes = torch.zeros((), dtype=u.dtype), []
    for i in range(len(z)):
        positive = [a for a in range(len(z)) if is_positive(selection, y, c, i, a)]
        negative = [a for a in range(len(z)) if is_negative(selection, y, c, i, a)]
        sizes.append((len(positive), len(negative)))
        s = {a: similarity(z, i, a, distance) / tau for a in positive + negative}
        below = sum(value.exp() for value in s.values())
        for p in positive:
            total = total - (s[p].exp() / below).log() / len(positive)
    return total / len(z), sizes


def cross_entropy_truth(logits, labels):
    return sum(-(row[label].exp() / row.exp().sum()).log() for row, label in zip(logits, labels.tolist(), strict=True)) / len(
        logits
    )


def objective_truth(clean, adversarial, z, y, tau, selection, distance, weights):
    """Of stacked views: logits (M, K) of the clean and the adversarial images, embeddings z (2M, D) of both, labels (M,)."""
    predictions = torch.tensor([max(range(len(row)), key=row.__getitem__) for row in [*clean.tolist(), *adversarial.tolist()]])
    divergence = 0
    for row, other in zip(clean, adversarial, strict=True):
        p, q = row.exp() / row.exp().sum(), other.exp() / other.exp().sum()
        divergence = divergence + sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    return {
        "ce_adv": weights["ce_adv"] * cross_entropy_truth(adversarial, y),
        "ce_clean": weights["ce_clean"] * cross_entropy_truth(clean, y),
        "kl": weights["kl"] * divergence / clean.numel(),
        "contrastive": weights["contrastive"] * ascl_truth(z, torch.cat([y, y]), predictions, tau, selection, distance)[0],
    }


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_loss_and_gradient_are_those_of_loops(selection, distance):
    u, y, c = rows()
    truth, sizes = ascl_truth(u, y, c, 0.2, selection, distance)
    assert any(positives == 0 for positives, _ in sizes) and ((0, 0) in sizes or selection != "leaking")
    assert any(positives > 0 and negatives == 0 for positives, negatives in sizes) or selection == "all"
    expected = torch.autograd.grad(truth, u)[0]
    value = ASCLLoss(0.2, selection, distance=distance)(u, y, c)
    torch.testing.assert_close(value, truth.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, u)[0], expected, rtol=1e-10, atol=1e-13)

    single = u.detach().float().requires_grad_()
    value = ASCLLoss(0.2, selection, distance=distance)(single, y, c)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(truth.item(), rel=2e-6)
    torch.testing.assert_close(torch.autograd.grad(value, single)[0].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_class_has_positives_alone(selection, distance):
    u, _, c = rows(n=8)
    y = torch.zeros(8, dtype=torch.int64)
    truth, sizes = ascl_truth(u, y, c, 0.2, selection, distance)
    assert all(negatives == 0 for _, negatives in sizes)
    value = ASCLLoss(0.2, selection, distance=distance)(u, y, c)
    assert value.item() == pytest.approx(truth.item(), rel=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("n", [1, 5])
def test_rows_without_positives_cost_nothing(distance, n):
    u = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(n)
    with torch.autograd.detect_anomaly(check_nan=True):
        value = ASCLLoss(distance=distance)(u, labels, labels)
        gradient = torch.autograd.grad(value, u)[0]
    assert value == 0 and not gradient.any()


def test_equal_rows_have_a_finite_gradient():
    """Two views that became one image: their distance is 0, where a square root, say, would have no gradient."""
    u, y, c = rows()
    with torch.no_grad():
        u[3] = u[0]
    c[3] = c[0]
    truth = ascl_truth(u, y, c, 0.2, "leaking", "linf")[0]
    value = ASCLLoss()(u, y, c)
    torch.testing.assert_close(torch.autograd.grad(value, u)[0], torch.autograd.grad(truth, u)[0], rtol=1e-10, atol=1e-13)


def test_distances_do_not_depend_on_the_block(monkeypatch):
    u, y, c = rows()
    whole = ASCLLoss()(u, y, c)
    monkeypatch.setattr(module, "BLOCK", 4)
    parts = ASCLLoss()(u, y, c)
    assert torch.equal(whole, parts)
    torch.testing.assert_close(*(torch.autograd.grad(value, u)[0] for value in (whole, parts)), rtol=1e-14, atol=1e-16)


def test_low_precision_rows_are_computed_in_fp32():
    u, y, c = rows()
    half = u.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = ASCLLoss()(half, y, c)
    assert value.dtype == torch.float32 and torch.equal(value, ASCLLoss()(half.float(), y, c))


def test_loss_says_what_computed_it_and_refuses_bad_arguments():
    u, y, c = rows()
    loss = ASCLLoss(backend="triton")
    loss(u, y, c)
    assert loss.used.startswith("torch: ") and repr(loss).startswith("ASCLLoss(")
    loss = ASCLLoss(distance="cosine", backend="torch")
    loss(u, y, c)
    assert loss.used == "torch: as asked for"
    with pytest.raises(UserError, match="distance is 'l1', but must be one of linf, cosine"):
        ASCLLoss(distance="l1")
    with pytest.raises(UserError, match="selection is 'leak'.*did you mean 'leaking'"):
        ASCLLoss(selection="leak")
    with pytest.raises(UserError, match="temperature is 0, but must be > 0"):
        ASCLLoss(temperature=0)
    for distance in DISTANCES:
        with pytest.raises(UserError, match="predictions"):
            ASCLLoss(distance=distance)(u, y, c[:3])


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("two", [False, True])
def test_objective_and_its_gradient_are_those_of_loops(two, distance):
    flags = ["--loss.ce-clean", "0.7", "--loss.kl", "1.5", "--loss.contrastive", "0.9", "--loss.ce-adv", "1.1"]
    flags += ["--loss.distance", distance, "--loss.temperature", "0.3", *(["--loss.two-transforms"] if two else [])]
    method = build_method(config_of(*flags))
    assert method.views == (("aug", "aug2", "adv", "adv2") if two else ("aug", "adv"))
    generator = torch.Generator().manual_seed(1)
    batch, crops = 5, 2 if two else 1
    logits = torch.randn(2 * crops * batch, 4, dtype=torch.float64, generator=generator).requires_grad_()
    embeddings = torch.randn(2 * crops * batch, 6, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0, 1])
    out = Outputs(*(dict(zip(method.views, t.split(batch), strict=True)) for t in (logits, embeddings)))
    terms = method.loss(out, labels, torch.zeros(()))

    weights = {"ce_adv": 1.1, "ce_clean": 0.7, "kl": 1.5, "contrastive": 0.9}
    clean, adversarial = logits.chunk(2)
    truth = objective_truth(clean, adversarial, embeddings, labels.repeat(crops), 0.3, "leaking", distance, weights)
    assert set(terms) == set(truth)
    for name in truth:
        assert terms[name].item() == pytest.approx(truth[name].item(), rel=1e-11), name
    got, expected = (torch.autograd.grad(sum(of.values()), [logits, embeddings]) for of in (terms, truth))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_divergence_is_trades_term_over_the_number_of_classes():
    """2 times the mean over images and classes is 0.2 times the mean over images with 10 classes."""
    method = build_method(config_of("--loss.contrastive", "0"))
    clean, adversarial = torch.randn(2, 6, 10, dtype=torch.float64)
    terms = method.loss(Outputs({"aug": clean, "adv": adversarial}, {}), torch.arange(6), torch.zeros(()))
    batch_mean = F.kl_div(adversarial.log_softmax(1), clean.softmax(1), reduction="batchmean")
    assert set(terms) == {"ce_adv", "kl"}
    assert terms["kl"].item() == pytest.approx(0.2 * batch_mean.item(), rel=1e-12)


# ---------------------------------------------------------------- the attack, and BatchNorm


def transcribed_step(model, crops, labels, noise, bn, together):
    """x_adv of three steps on the cross-entropy, then the training forwards; `model` is left with its statistics moved."""
    model.train(bn == "train")
    x = torch.cat(crops)
    y = torch.cat([labels] * len(crops))
    x_adv = (x + noise).clamp(0, 1)
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        log_p = model(x_adv).log_softmax(1)
        value = -sum(row[label] for row, label in zip(log_p, y.tolist(), strict=True))
        moved = x_adv.detach() + 0.04 * torch.autograd.grad(value, x_adv)[0].sign()
        x_adv = torch.minimum(torch.maximum(moved, x - 0.1), x + 0.1).clamp(0, 1)
    model.train()
    every = [*crops, *x_adv.chunk(len(crops))]
    with torch.no_grad():
        for views_ in [torch.cat(every)] if together else every:
            model(views_)
    return x_adv


@pytest.mark.parametrize("view_bn", ["mixed", "separate"])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("bn", ["train", "eval"])
def test_attack_and_the_statistics_it_moves(batch, bn, two, view_bn):
    """In train mode each of its forwards moves the running statistics; in eval mode the training forwards alone do."""
    images, labels = batch
    flags = ["--attack.bn", bn, "--model.view-bn", view_bn, *(["--loss.two-transforms"] if two else [])]
    ours, theirs = make_model(), make_model()
    step = make_step(config_of(*flags), ours)
    assert step.run.adversaries["adv"].images == 1 + two
    augment, attack = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    crops = [views.augment(images, "crop_flip", augment).contiguous() for _ in range(1 + two)]
    noise = torch.empty_like(torch.cat(crops)).uniform_(-0.1, 0.1, generator=attack)
    expected = transcribed_step(theirs, crops, labels, noise, bn, view_bn == "mixed")

    seen, made = {}, step.make_views

    def make_views(*batch):
        found = made(*batch)
        seen.update(found[0])
        return found

    step.make_views = make_views
    step(images, labels, progress=0.0)
    found = torch.cat([seen[name] for name in step.method.attacked])
    assert ((found - expected).abs() > 1e-6).float().mean() < 1e-3  # but for signs of gradients that are all but 0
    for name, crop in zip(step.method.clean, crops, strict=True):
        assert torch.equal(seen[name], crop)
    forwards = (3 if bn == "train" else 0) + (1 if view_bn == "mixed" else 2 + 2 * two)
    for (name, got), want in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        if name.endswith("num_batches_tracked"):
            assert got == forwards


def test_both_augmented_views_are_attacked_as_one_batch(batch):
    """With the batch's own statistics the gradient of one image depends on the others."""
    images, labels = batch
    model = make_model()
    seen = []
    model.backbone.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    step = make_step(config_of("--loss.two-transforms"), model)
    made = step.make_views(images, labels)[0]
    assert seen == [16, 16, 16] and tuple(made) == ("aug", "aug2", "adv", "adv2")
    assert not torch.equal(made["aug"], made["aug2"])
    for clean, adversarial in (("aug", "adv"), ("aug2", "adv2")):
        assert 0 < (made[clean] - made[adversarial]).abs().max() <= 0.1 + 1e-6


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", limit=120, val_fraction=0.1)


def test_recipe_lowers_its_own_loss_on_digits(digits, tmp_path):
    base = (
        "--data.source digits --data.limit 120 --data.val-fraction 0.1 --data.augment crop --data.pad 1 --model.width 4 "
        "--attack.steps 2 --attack.step-size 0.02 --epochs 4 --batch-size 24 --optim.lr 0.05 --val.attack pgd2 --val.every 4"
    )
    run = RunDir(tmp_path / "run")
    train(parse_flags(base.split(), load_recipe("ascl")), digits, run)
    history = run.history()
    assert all(math.isfinite(row["loss"]) for row in history)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert history[-1]["loss_ce_adv"] < history[0]["loss_ce_adv"]


def test_recipe_is_that_of_the_public_code():
    config = load_recipe("ascl")
    assert (config.attack.bn, config.model.head, config.model.view_bn, config.epochs) == ("train", "linear", "separate", 120)
    assert config.loss.distance == "linf" and config.loss.kl == 2 and config.loss.temperature == 0.2
    for flag, value in (("temperature", "0"), ("kl", "-1"), ("selection", "some"), ("beta", "2")):
        with pytest.raises(UserError, match=f"loss.{flag}"):
            parse_flags([f"--loss.{flag}", value], config)
