"""Second stages: what each trains and what it leaves as it is, to the bit; and what its adversary maximises."""

import copy

import pytest
import torch
from test_step import CPU, make_model

from fastanchor.config import Config
from fastanchor.data import sources
from fastanchor.methods import build_method
from fastanchor.methods.base import Outputs
from fastanchor.models import build_model
from fastanchor.settings import parse_flags
from fastanchor.train.optim import build_optimizer
from fastanchor.train.step import TrainStep

BASE = "--attack.steps 2 --attack.eps 0.1 --attack.step-size 0.05 --optim.lr 0.1 --data.augment crop".split()
MODES = {
    "slf": ["--stage2.mode", "slf"],
    "alf": ["--stage2.mode", "alf"],
    "aff": ["--stage2.mode", "aff"],
    "aff trades": ["--stage2.mode", "aff", "--stage2.loss", "trades", "--stage2.beta", "3"],
}
IMAGES = torch.randint(256, (24, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(24) % 4


def make_step(*flags):
    config = parse_flags([*BASE, *flags], Config())
    model, method = make_model(), build_method(config, stage=2)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, CPU)
    step.reset({"augment": 0, "attack": 1})
    return step


def changed(before, model):
    """Names of the parameters and buffers that are not what they were, to the bit."""
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("mode", MODES)
def test_what_each_mode_moves(mode):
    # With an attack mode that would move statistics, were it listened to where the backbone is frozen.
    step = make_step(*MODES[mode], *(["--attack.bn", "train"] if mode in ("slf", "alf") else []))
    before = copy.deepcopy(step.model.state_dict())
    for _ in range(2):
        step(IMAGES, LABELS, progress=0.0)
    moved = changed(before, step.model)
    if not mode.startswith("aff"):
        assert moved == {"classifier.weight", "classifier.bias"}
        return
    parameters = {name for name, _ in step.model.named_parameters()}
    # Nothing of a second stage asks the projection, which therefore stays; normalisation has no statistics.
    wanted = {name for name in parameters if not name.startswith("projection")}
    wanted |= {name for name in before if "running_" in name or "num_batches" in name}
    assert moved == wanted


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_lowers_its_own_loss_on_digits(mode):
    data = sources.load("digits", limit=200, val_fraction=0.1).train
    config = parse_flags([*BASE, *MODES[mode], "--attack.steps", "1"], Config())
    torch.manual_seed(0)
    model, method = build_model("resnet18", num_classes=10, width=4, head="identity"), build_method(config, stage=2)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, CPU)
    means = []
    for epoch in range(5):
        step.reset({"augment": epoch, "attack": epoch})
        for part in torch.arange(len(data.labels)).split(60):
            step(data.images[part], data.labels[part], progress=float(epoch))
        means.append(step.read()["loss"])
    assert means[-1] < means[0]


def formula(mode, clean, adversarial, labels, beta=3.0):
    """Row by row: mean cross-entropy of what the mode learns on; for TRADES the clean images' plus beta KL(p(x) || p(x'))."""
    total = 0
    for x, x_adv, y in zip(clean, adversarial, labels, strict=True):
        p, p_adv = (logits.exp() / logits.exp().sum() for logits in (x, x_adv))
        judged = p if mode in ("slf", "aff trades") else p_adv
        total = total - judged[y].log()
        if mode == "aff trades":
            total = total + beta * sum(a * (a / b).log() for a, b in zip(p, p_adv, strict=True))
    return total / len(labels)


@pytest.mark.parametrize("mode", MODES)
def test_each_modes_loss_is_its_formula(mode):
    method = build_method(parse_flags([*BASE, *MODES[mode]], Config()), stage=2)
    made = torch.randn(2, 2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # Twice the same logits: ours, and the transcription's.
    ours, theirs = (dict(zip(("aug", "adv"), (x.clone().requires_grad_() for x in made[0]), strict=True)) for _ in range(2))
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    terms = method.loss(Outputs({name: ours[name] for name in method.views}, {}), labels, torch.zeros(()))
    expected = formula(mode, theirs["aug"], theirs["adv"], labels.tolist())
    assert sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-12)
    sum(terms.values()).backward()
    expected.backward()
    for name in method.views:
        assert torch.allclose(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", ["alf", "aff", "aff trades"])
def test_each_adversary_climbs_its_objective_through_the_whole_network(mode):
    """Two signed steps by gradients in fp64: of the cross-entropy, or of TRADES' divergence from its own start."""
    step = make_step(*MODES[mode], "--data.augment", "none")
    clean = IMAGES[:8].permute(0, 3, 1, 2).float() / 255
    made = step.make_views(IMAGES[:8], LABELS[:8])[0]
    generator, noise = torch.Generator().manual_seed(1), torch.empty_like(made["adv"])
    trades = mode == "aff trades"
    noise = noise.normal_(generator=generator) * 0.001 if trades else noise.uniform_(-0.1, 0.1, generator=generator)
    model, clean = copy.deepcopy(step.model).double().eval(), clean.double()
    x_adv = (clean + noise.double()).clamp(0, 1)
    for _ in range(2):
        x = x_adv.clone().requires_grad_()
        log_p, log_q = model(clean).detach().log_softmax(1), model(x).log_softmax(1)
        value = (log_p.exp() * (log_p - log_q)).sum() if trades else -log_q[torch.arange(8), LABELS[:8]].sum()
        x_adv = x_adv + 0.05 * torch.autograd.grad(value, x)[0].sign()
        x_adv = torch.min(torch.max(x_adv, clean - 0.1), clean + 0.1).clamp(0, 1)
    # A gradient that is all but zero may have either sign in fp32, as the divergence's often is so near the clean images.
    assert ((made["adv"].double() - x_adv).abs() < 1e-5).double().mean() > (0.9 if trades else 0.995)


def test_after_a_contrastive_recipe_a_classifier_learns_on_mildly_augmented_images():
    views = {
        (augment, mode): build_method(parse_flags([*BASE, *MODES[mode], "--data.augment", augment], Config()), stage=2).drawn
        for augment in ("crop_flip", "simclr")
        for mode in MODES
    }
    assert views == {(augment, mode): ("weak",) if augment == "simclr" else ("aug",) for augment, mode in views}


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_move_where_all_weights_learn_and_once_a_step(mode):
    step = make_step(*MODES[mode])
    twin = copy.deepcopy(step.model).train(mode.startswith("aff"))
    views = step.make_views(IMAGES[:12], LABELS[:12])[0]
    with torch.no_grad():
        twin(torch.cat(list(views.values())))
    step.reset({"augment": 0, "attack": 1})
    step(IMAGES[:12], LABELS[:12], progress=0.0)
    for (name, ours), theirs in zip(step.model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-6), name
