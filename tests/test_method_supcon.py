"""SupCon and SupRobCon: loss and gradient against loops over rows in fp64, who learns from what, the attack of the linear probe,
BatchNorm's statistics; both learn the digits."""

import math

import pytest
import torch

from fastanchor.config import Config
from fastanchor.data import sources, views
from fastanchor.errors import UserError
from fastanchor.methods import build_method
from fastanchor.methods.base import Outputs
from fastanchor.models import build_model
from fastanchor.settings import load_recipe, parse_flags
from fastanchor.train.loop import train
from fastanchor.train.optim import build_optimizer
from fastanchor.train.run import RunDir
from fastanchor.train.step import TrainStep

CPU = torch.device("cpu")
BASE = "--attack.steps 3 --attack.eps 0.1 --attack.step-size 0.04 --optim.lr 0.05 --no-channels-last".split()


def config_of(method, *flags):
    return parse_flags(["--method", method, *BASE, *flags], Config())


def make_model(head="mlp"):
    torch.manual_seed(0)
    return build_model(
        "resnet18", num_classes=4, width=4, head=head, head_hidden=16, head_dim=8, mean=(0.5,) * 3, std=(0.25,) * 3
    )


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


def embeddings(batch=6, d=5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, batch, d, dtype=torch.float64, generator=generator).requires_grad_()


def cosine(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True)) / (u.pow(2).sum().sqrt() * v.pow(2).sum().sqrt())


def supcon_truth(u, labels, tau):
    """Mean over all rows of -(1 / |P|) sum_p log( e^s_ip / sum_{a != i} e^s_ia )."""
    total, y = 0, labels.tolist()
    for i in range(len(u)):
        s = {a: cosine(u[i], u[a]) / tau for a in range(len(u)) if a != i}
        positive = [a for a in s if y[a] == y[i]]
        total = total - sum((s[p].exp() / sum(v.exp() for v in s.values())).log() for p in positive) / len(positive)
    return total / len(u)


def suprobcon_truth(anchors, keys, labels, tau):
    """Mean over the anchors of -(1 / |P|) sum_p log( e^s_ip / (e^s_ip + sum_{other classes} e^s_in) ), own key included."""
    total, y = 0, labels.tolist()
    for i in range(len(anchors)):
        s = [cosine(anchors[i], key) / tau for key in keys]
        below = sum((v.exp() for v, other in zip(s, y, strict=True) if other != y[i]), torch.zeros((), dtype=anchors.dtype))
        positive = [v for v, other in zip(s, y, strict=True) if other == y[i]]
        total = total - sum((v.exp() / (v.exp() + below)).log() for v in positive) / len(positive)
    return total / len(anchors)


LABELS = {
    "several": torch.tensor([0, 1, 2, 0, 1, 0]),
    "all different": torch.arange(6),
    "one class": torch.zeros(6, dtype=torch.int64),
}


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("scale", [1.0, 0.3 / 0.07])
def test_supcon_is_that_of_loops(scale, labels):
    z = embeddings()
    method = build_method(config_of("supcon", "--loss.temperature", "0.3", "--loss.scale", str(scale)))
    terms = method.loss(Outputs({}, {"aug": z[0], "aug2": z[1]}), labels, torch.zeros(()))
    truth = scale * supcon_truth(torch.cat([z[0], z[1]]), labels.repeat(2), 0.3)
    assert list(terms) == ["contrastive"] and terms["contrastive"].item() == pytest.approx(truth.item(), rel=1e-12)
    got, expected = (torch.autograd.grad(value, z)[0] for value in (terms["contrastive"], truth))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def cross_entropy_truth(logits, labels):
    return sum(-(row[label].exp() / row.exp().sum()).log() for row, label in zip(logits, labels.tolist(), strict=True)) / len(
        logits
    )


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_suprobcon_is_that_of_loops(labels):
    """Where all images are of one class no pair has a negative: the ratio is 1, the loss 0."""
    z = embeddings()
    logits = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    flags = ["--loss.temperature", "0.3", "--loss.contrastive", "0.8", "--loss.ce-adv", "1.2"]
    method = build_method(config_of("suprobcon", *flags))
    out = Outputs({"aug": torch.zeros(6, 6).double(), "adv": logits}, {"aug": z[0], "adv": z[1]})
    terms = method.loss(out, labels, torch.zeros(()))
    truth = {
        "contrastive": 0.8 * suprobcon_truth(z[1], z[0], labels, 0.3),
        "ce_adv": 1.2 * cross_entropy_truth(logits, labels),
    }
    assert set(terms) == set(truth)
    for name in truth:
        assert terms[name].item() == pytest.approx(truth[name].item(), rel=1e-11, abs=1e-15), name
    got, expected = (torch.autograd.grad(sum(of.values()), [z, logits]) for of in (terms, truth))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_suprobcon_positives_do_not_compete_with_each_other():
    """A second image of the class, nearer to the anchor than its own, changes the loss by its own term alone."""
    anchors, keys = embeddings(3)
    keys = keys.detach().clone()
    labels = torch.tensor([0, 0, 1])
    method = build_method(config_of("suprobcon", "--loss.temperature", "0.3"))
    s = [cosine(anchors[0].detach(), key).item() / 0.3 for key in keys]
    terms = [math.log1p(math.exp(s[2] - s[p])) for p in (0, 1)]
    first = method.contrastive(anchors[:1].detach(), labels[:1], keys, labels)
    assert first.item() == pytest.approx(sum(terms) / 2, rel=1e-12)


# ---------------------------------------------------------------- who learns from what


def gradients(step, images, labels, name):
    """Names of the model's parts that one term gives a gradient, by a forward in training mode."""
    made, early = step.make_views(images, labels)
    step.model.train()
    step.method.loss(step.run.outputs(made, early), labels, step.progress)[name].backward()
    return {
        part for part, module in step.model.named_children() for p in module.parameters() if p.grad is not None and p.grad.any()
    }


def test_suprobcon_backbone_and_classifier_learn_from_one_term_each(batch):
    for name, learners in (("ce_adv", {"classifier"}), ("contrastive", {"backbone", "projection"})):
        step = make_step(config_of("suprobcon"), make_model("mlp_bn"))
        assert gradients(step, *batch, name) == learners


def test_supcon_leaves_the_classifier_alone(batch):
    images, labels = batch
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    step = make_step(config_of("supcon", "--optim.weight-decay", "0.1"), model)
    assert step.run.adversaries == {} and step.method.selects == "last"
    step(images, labels, progress=0.0)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any(name.startswith("classifier") for name in changed)
    assert any(name.startswith("backbone") for name in changed) and any(name.startswith("projection") for name in changed)


def test_supcon_draws_two_views_of_every_image(batch):
    images, labels = batch
    step = make_step(config_of("supcon", "--data.augment", "simclr"), make_model())
    made = step.make_views(images, labels)[0]
    assert tuple(made) == ("aug", "aug2") and not torch.equal(made["aug"], made["aug2"])


# ---------------------------------------------------------------- the attack, and BatchNorm


def test_suprobcon_attacks_the_probe_in_eval_mode(batch):
    """Its gradient reaches the pixels through the features, which the training forward cuts off from the probe's loss."""
    images, labels = batch
    model, twin = make_model("mlp_bn"), make_model("mlp_bn").double().eval()
    step = make_step(config_of("suprobcon"), model)
    made = step.make_views(images, labels)[0]
    assert not any(int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked"))

    augment, attack = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    x = views.augment(images, "crop_flip", augment).contiguous()
    x_adv = (x + torch.empty_like(x).uniform_(-0.1, 0.1, generator=attack)).clamp(0, 1)
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        value = cross_entropy_truth(twin.classifier(twin.features(x_adv.double())), labels)
        moved = x_adv.detach() + 0.04 * torch.autograd.grad(value, x_adv)[0].sign()
        x_adv = torch.minimum(torch.maximum(moved, x - 0.1), x + 0.1).clamp(0, 1)
    assert torch.equal(made["aug"], x)
    assert ((made["adv"] - x_adv).abs() > 1e-6).float().mean() < 1e-3  # but for signs of gradients that are all but 0


@pytest.mark.parametrize("method, head", [("supcon", "mlp"), ("suprobcon", "mlp_bn")])
@pytest.mark.parametrize("view_bn", ["mixed", "separate"])
def test_training_forwards_move_the_statistics(batch, method, head, view_bn):
    images, labels = batch
    ours, theirs = make_model(head), make_model(head)
    step = make_step(config_of(method, "--model.view-bn", view_bn), ours)
    seen, made = {}, step.make_views

    def make_views(*given):
        found = made(*given)
        seen.update(found[0])
        return found

    step.make_views = make_views
    step(images, labels, progress=0.0)
    theirs.train()
    for inputs in [torch.cat(list(seen.values()))] if view_bn == "mixed" else list(seen.values()):
        theirs(inputs, embed=True)
    assert list(seen) == (["aug", "aug2"] if method == "supcon" else ["aug", "adv"])
    for (name, got), want in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", limit=120, val_fraction=0.1)


@pytest.mark.parametrize("method", ["supcon", "suprobcon"])
def test_recipe_lowers_its_own_loss_on_digits(digits, tmp_path, method):
    flags = (
        "--data.source digits --data.limit 120 --data.val-fraction 0.1 --data.augment crop --data.pad 1 --model.width 4 "
        "--attack.steps 2 --attack.eps 0.03 --attack.step-size 0.02 --epochs 5 --batch-size 36 --optim.lr 0.1 --optim.momentum 0 --optim.no-nesterov "
        "--optim.warmup-epochs 0 --stage2.epochs 1 --stage2.batch-size 36 --stage2.lr 0.1 --val.attack pgd2 --val.every 5"
    ).split()
    run = RunDir(tmp_path / "run")
    train(parse_flags(flags, load_recipe(method)), digits, run)
    history = [row for row in run.history() if row.get("loss_contrastive") is not None]
    assert len(history) == 5 and all(math.isfinite(row["loss"]) for row in history)
    assert history[-1]["loss_contrastive"] < 0.9 * history[0]["loss_contrastive"]
    assert history[-1]["loss"] < history[0]["loss"]


def test_recipes_are_those_of_the_public_code():
    supcon, suprobcon = load_recipe("supcon"), load_recipe("suprobcon")
    assert supcon.loss.scale == pytest.approx(0.1 / 0.07) and supcon.stage2.mode == "slf" and supcon.batch_size == 1024
    assert (suprobcon.attack.bn, suprobcon.model.head, suprobcon.model.view_bn) == ("eval", "mlp_bn", "separate")
    assert suprobcon.optim.nesterov and suprobcon.stage2.mode == "none"
    for config, flag, value in ((supcon, "scale", "0"), (suprobcon, "contrastive", "0"), (supcon, "beta", "2")):
        with pytest.raises(UserError, match=f"loss.{flag}"):
            parse_flags([f"--loss.{flag}", value], config)
