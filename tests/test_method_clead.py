"""C-LEAD, both readings: losses, objectives and adversaries against loops over rows in fp64, and what training moves."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from graph_emulator import Emulator
from test_step import CPU, make_model
from test_step_graphed import SEEDS, assert_same, run

from fastanchor import graphs
from fastanchor.config import Config
from fastanchor.data import sources
from fastanchor.data.views import augment
from fastanchor.errors import UserError
from fastanchor.methods import build_method, method_class
from fastanchor.methods.base import Outputs
from fastanchor.methods.clead import own_pair_loss, own_pairs
from fastanchor.methods.clead_code import clean_anchor_loss
from fastanchor.models import build_model
from fastanchor.settings import load_recipe, parse_flags
from fastanchor.train.checks import check_config
from fastanchor.train.loop import train
from fastanchor.train.optim import build_optimizer
from fastanchor.train.run import RunDir, load_trained
from fastanchor.train.step import TrainStep

ATTACK = "--attack.steps 2 --attack.eps 0.1 --attack.step-size 0.05 --optim.lr 0.05".split()
JOINT = ["--method", "clead_joint", "--attack.objective", "ce+contrastive", *ATTACK]
CODE = ["--method", "clead_code", *ATTACK]
IMAGES = torch.randint(256, (60, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(60) % 4
BATCHES = {
    "mixed": [0, 1, 2, 0, 1, 0, 3],
    "one image a class": [3, 2, 1, 0],
    "one class": [2, 2, 2],
}


def take(indices):
    return IMAGES.index_select(0, indices), LABELS.index_select(0, indices)


def make_step(*flags, stage=1, source=None):
    config = parse_flags(list(flags), Config())
    model, method = make_model(), build_method(config, stage)
    if source is not None:
        method.source = source
    if stage == 1:
        method.build(model)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, CPU, take)
    step.reset(SEEDS)
    return step


@pytest.fixture
def source():
    """A fixed network with statistics that are not those of its making."""
    model = make_model(seed=5)
    model.train()
    model(IMAGES.permute(0, 3, 1, 2) / 255)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- the formulas, row by row


def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def joint_formula(z, z_adv, labels, temperature):
    """methods.md 2.3: every row of both views is an anchor, its counterpart the positive, other classes the negatives."""
    rows = []
    for anchors, others in ((z, z_adv), (z_adv, z)):
        for i, y in enumerate(labels):
            positive = (cosine(anchors[i], others[i]) / temperature).exp()
            negatives = 0
            for a, y_a in enumerate(labels):
                if y_a != y:
                    for keys in (z, z_adv):
                        negatives = negatives + (cosine(anchors[i], keys[a]) / temperature).exp()
            rows.append(-(positive / (positive + negatives)).log())
    return sum(rows) / len(rows)


def released_formula(z0, z1, z2, temperature):
    """methods.md 2.2, item 3."""
    total = 0
    for zk in (z1, z2):
        for i in range(len(z0)):
            negatives = 0
            for j in range(len(z0)):
                negatives = negatives + (cosine(z0[i], zk[j]) / temperature).exp()
                if j != i:
                    negatives = negatives + (cosine(z0[i], z0[j]) / temperature).exp()
            total = total - ((cosine(z0[i], zk[i]) / temperature).exp() / negatives).log() / len(z0)
    return total / 2


def rows(count, views, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(views, count, 6, dtype=torch.float64, generator=generator)
    return [view.to(dtype).requires_grad_() for view in made]


def assert_same_gradients(ours, theirs, leaves, rtol, atol):
    """Of two scalars of copies of the same leaves, in fp64."""
    assert torch.allclose(ours.double(), theirs, rtol=rtol, atol=atol)
    found = [torch.autograd.grad(value, of, allow_unused=True) for value, of in zip((ours, theirs), leaves, strict=True)]
    for a, b in zip(*found, strict=True):
        # Where no row has a negative, the formula's loss is the constant log 1.
        a, b = (torch.zeros(1, dtype=torch.float64) if part is None else part.double() for part in (a, b))
        assert torch.allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_own_pair_loss_is_the_formula(labels, backend, dtype, tolerance):
    ours, theirs = rows(len(labels), 2, dtype), rows(len(labels), 2)
    y = torch.tensor(labels)
    value = own_pair_loss(0.3, backend)(torch.cat(ours), y.repeat(2), instances=own_pairs(y))
    expected = joint_formula(*theirs, labels, 0.3)
    assert (expected.item() == 0) == (len(set(labels)) == 1)
    assert_same_gradients(value, expected, (ours, theirs), tolerance, tolerance)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_clean_anchor_loss_is_the_formula(count, backend, dtype, tolerance):
    ours, theirs = rows(count, 3, dtype, seed=1), rows(count, 3, seed=1)
    loss, numbers = clean_anchor_loss(0.3, backend), own_pairs(torch.zeros(count))
    view = torch.arange(2).repeat_interleave(count)
    value = sum(loss(torch.cat([ours[0], zk]), numbers, views=view) for zk in ours[1:]) / 2
    assert_same_gradients(value, released_formula(*theirs, 0.3), (ours, theirs), tolerance, tolerance)


def made_outputs(names, count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    logits = {name: torch.randn(count, 4, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for name in names}
    return Outputs(logits, dict(zip(names, rows(count, len(names), dtype), strict=True)))


def test_the_joint_loss_is_the_weighted_sum():
    labels = BATCHES["mixed"]
    flags = ["--loss.ce-adv", "0.7", "--loss.contrastive", "1.5", "--loss.temperature", "0.2"]
    method = build_method(parse_flags([*JOINT, *flags], Config()))
    ours, theirs = (made_outputs(("aug", "adv"), len(labels)) for _ in range(2))
    terms = method.loss(ours, torch.tensor(labels), torch.zeros(()))
    entropy = sum(-theirs.logits["adv"][i].log_softmax(0)[y] for i, y in enumerate(labels)) / len(labels)
    contrast = joint_formula(theirs.embeddings["aug"], theirs.embeddings["adv"], labels, 0.2)
    assert terms["ce_adv"].item() == pytest.approx(0.7 * entropy.item(), rel=1e-12)
    assert terms["contrastive"].item() == pytest.approx(1.5 * contrast.item(), rel=1e-12)
    leaves = [[*found.embeddings.values(), found.logits["adv"]] for found in (ours, theirs)]
    assert_same_gradients(sum(terms.values()), 0.7 * entropy + 1.5 * contrast, leaves, 1e-11, 1e-13)


def test_the_released_loss_is_the_mean_over_both_views_and_blind_to_labels():
    method = build_method(parse_flags([*CODE, "--loss.temperature", "0.2"], Config()))
    names = ("clean", "aug", "adv")
    ours, theirs = (made_outputs(names, 5) for _ in range(2))
    for labels in ([1] * 5, [0, 1, 2, 3, 0]):
        terms = method.loss(ours, torch.tensor(labels), torch.zeros(()))
        expected = released_formula(*(theirs.embeddings[name] for name in names), 0.2)
        leaves = [[part.embeddings[name] for name in names] for part in (ours, theirs)]
        assert_same_gradients(sum(terms.values()), expected, leaves, 1e-11, 1e-13)


# ---------------------------------------------------------------- adversaries


def joint_ascent(model, images, delta, labels, kind, weights=(0.7, 1.5), temperature=0.2):
    """Gradient with respect to the perturbation of what it maximises, times the batch, in fp64."""
    delta = delta.clone().requires_grad_()
    logits, z_adv = model(images + delta, embed=True)
    with torch.no_grad():
        _, z = model(images, embed=True)
    value = 0
    if "ce" in kind.split("+"):
        factor = weights[0] if "+" in kind else 1.0
        value = value - factor * sum(logits[i].log_softmax(0)[y] for i, y in enumerate(labels))
    if "contrastive" in kind:
        value = value + weights[1] * len(labels) * joint_formula(z, z_adv, labels, temperature)
    return torch.autograd.grad(value, delta)[0]


@pytest.mark.parametrize("kind", ["ce+contrastive", "contrastive"])
def test_the_joint_objective_has_the_formulas_gradient_on_the_images(kind):
    labels = BATCHES["mixed"]
    flags = ["--loss.ce-adv", "0.7", "--loss.contrastive", "1.5", "--loss.temperature", "0.2", "--attack.objective", kind]
    model = make_model().double().eval()
    images = torch.rand(len(labels), 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    delta = 0.05 * torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    adversary = build_method(parse_flags([*JOINT, *flags], Config())).adversaries(model, torch.zeros(()))["adv"]
    x_adv = (images + delta).requires_grad_()
    with torch.no_grad():
        clean = adversary.model(images)
    value = adversary.attack.objective(adversary.model(x_adv), torch.tensor(labels), clean)
    found = torch.autograd.grad(value.sum(), x_adv)[0]
    expected = joint_ascent(model, images, delta, labels, kind)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["ce+contrastive", "contrastive", "ce"])
def test_the_attack_climbs_that_objective(kind):
    """Two steps of the whole attack, on the BN-folded twin in fp32, against signed steps of the formula's gradient in fp64."""
    step = make_step(
        *JOINT, "--loss.ce-adv", "0.7", "--loss.contrastive", "1.5", "--loss.temperature", "0.2", "--attack.objective", kind
    )
    images, labels = take(torch.arange(6))
    clean = images.permute(0, 3, 1, 2).float() / 255
    found = step.run.attack("adv", clean, labels)
    start = torch.empty_like(clean).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(SEEDS["attack"])).double()
    model, clean = copy.deepcopy(step.model).double().eval(), clean.double()
    x_adv = (clean + start).clamp(0, 1)
    for _ in range(2):
        gradient = joint_ascent(model, clean, x_adv - clean, labels.tolist(), kind)
        x_adv = torch.min(torch.max(x_adv + 0.05 * gradient.sign(), clean - 0.1), clean + 0.1).clamp(0, 1)
    # A gradient that is all but zero may have either sign in fp32.
    assert ((found.double() - x_adv).abs() < 1e-5).double().mean() > 0.995


def test_static_adversaries_are_the_fixed_networks_and_have_eight_bits(source):
    step = make_step(*CODE, "--data.augment", "none", source=source)
    images, labels = take(torch.arange(10))
    made, _ = step.make_views(images, labels)
    assert list(made) == ["clean", "aug", "adv"]
    clean = made["clean"].double()
    assert torch.equal(made["clean"], made["aug"])
    model = copy.deepcopy(source).double()
    noise = torch.empty_like(made["clean"]).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(SEEDS["attack"]))
    x_adv = (clean + noise.double()).clamp(0, 1)
    for _ in range(2):
        x = x_adv.clone().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)[0]
        x_adv = torch.min(torch.max(x_adv + 0.05 * gradient.sign(), clean - 0.1), clean + 0.1).clamp(0, 1)
    levels = made["adv"].double() * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    # All but those whose fp64 value lies on the edge between two levels, or whose gradient is all but zero.
    assert ((levels - x_adv * 255).abs() < 0.5 + 1e-3).double().mean() > 0.995
    assert (made["adv"] - made["clean"]).abs().amax() > 0.05
    # They are not of the network that is trained: that may become another one.
    torch.nn.init.normal_(next(step.model.parameters()))
    step.reset(SEEDS)
    assert torch.equal(step.make_views(images, labels)[0]["adv"], made["adv"])


def test_the_adversarial_view_is_augmented_by_a_draw_of_its_own(source):
    step = make_step(*CODE, "--data.augment", "crop", "--attack.eps", "0", source=source)
    images, labels = take(torch.arange(10))
    made, _ = step.make_views(images, labels)
    # Without a perturbation both are views of one image, from one generator, one after the other.
    assert not torch.equal(made["aug"], made["adv"])
    generator = torch.Generator().manual_seed(SEEDS["augment"])
    for name in ("aug", "adv"):
        assert torch.equal(made[name], augment(images, "crop", generator))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_classifiers_batches_are_clean_or_fgsm_images_of_the_fixed_network(source, share):
    flags = ["--stage2.mode", "slf", "--loss.fgsm-share", str(share), "--data.augment", "none"]
    step = make_step(*CODE, *flags, stage=2, source=source)
    images, labels = take(torch.arange(12))
    clean = images.permute(0, 3, 1, 2).double() / 255
    x = clean.clone().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(copy.deepcopy(source).double()(x), labels, reduction="sum"), x)[0]
    fgsm = (clean + 0.1 * gradient.sign()).clamp(0, 1)
    attacked = 0
    for _ in range(24):
        made = step.make_views(images, labels)[0]["either"].double()
        is_clean = torch.allclose(made, clean, atol=1e-6)
        is_fgsm = ((made - fgsm).abs() < 1e-5).double().mean() > 0.995
        assert is_clean != is_fgsm
        attacked += is_fgsm
    assert attacked == 24 * share or (share == 0.5 and 4 <= attacked <= 20)


# ---------------------------------------------------------------- what training moves


@pytest.mark.parametrize("flags", [JOINT, [*CODE, "--data.augment", "crop"]], ids=["joint", "code"])
def test_running_statistics_are_those_of_all_views_as_one_batch(flags, source):
    step = make_step(*flags, source=source)
    twin = copy.deepcopy(step.model).train()
    views, _ = step.make_views(*take(torch.arange(12)))
    with torch.no_grad():
        twin(torch.cat(list(views.values())))
    step.reset(SEEDS)
    step(torch.arange(12), progress=0.0)
    for (name, ours), theirs in zip(step.model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("stage, extra", [(1, []), (2, ["--stage2.mode", "slf"])])
def test_the_fixed_network_stays_as_it_is(source, stage, extra):
    step = make_step(*CODE, "--attack.bn", "train", *extra, stage=stage, source=source)
    kept, before = copy.deepcopy(source.state_dict()), copy.deepcopy(step.model.state_dict())
    for _ in range(2):
        step(torch.arange(12), progress=0.0)
    assert all(torch.equal(value, kept[name]) for name, value in source.state_dict().items())
    assert not any(module.training for module in source.modules())
    assert all(p.grad is None for p in source.parameters())
    moved = {name for name, value in step.model.state_dict().items() if not torch.equal(value, before[name])}
    classifier = {"classifier.weight", "classifier.bias"}
    # Stage 1 has no term for the classifier; stage 2 leaves weights and statistics of all else, to the bit.
    if stage == 2:
        assert moved == classifier
    else:
        assert moved == {name for name in before if not name.startswith(("classifier", "normalize"))}


def test_the_backbone_starts_as_the_fixed_networks(source):
    step = make_step(*CODE, source=source)
    fresh = make_model()
    for name, value in step.model.state_dict().items():
        wanted = source if name.startswith("backbone") else fresh
        assert torch.equal(value, wanted.state_dict()[name]), name
    assert step.method.notes["start from loss.source"] == "yes: its backbone"
    other = build_model("resnet18", num_classes=4, width=8)
    method = build_method(parse_flags(CODE, Config()))
    method.source, model = other, make_model()
    method.build(model)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    assert method.notes["start from loss.source"].startswith("no: ")


@pytest.mark.parametrize(
    "flags, stage",
    [(JOINT, 1), ([*JOINT, "--attack.objective", "contrastive"], 1), (CODE, 1), ([*CODE, "--stage2.mode", "slf"], 2)],
    ids=["joint", "contrastive", "code", "code's classifier"],
)
def test_the_step_is_captured(flags, stage, source):
    graphed, plain = (
        make_step(*flags, "--engine.graph", state, stage=stage, source=copy.deepcopy(source)) for state in ("on", "off")
    )
    with graphs.use_recorder(Emulator):
        assert run(graphed) == run(plain)
    assert_same(graphed, plain)
    assert graphed.graphed


# ---------------------------------------------------------------- recipes and runs


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", limit=200, val_fraction=0.1)


DIGITS = (
    "--data.source digits --data.limit 200 --data.augment crop --data.weak crop --model.width 4 --batch-size 60 --attack.steps 1 "
    "--optim.lr 0.05 --optim.schedule cosine --val.every 10 --eval.batch-size 200"
).split()


@pytest.fixture(scope="module")
def undefended(digits, tmp_path_factory):
    """A run of a few epochs whose network is the fixed one."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "standard")
    train(parse_flags(["--method", "standard", *DIGITS, "--epochs", "2"], Config()), digits, run)
    return run.path


def losses(run, stage):
    return [row["loss"] for row in run.history() if row["stage"] == stage]


def test_joint_lowers_its_own_loss_on_digits(digits, tmp_path):
    joint = RunDir(tmp_path / "run")
    train(parse_flags([*DIGITS, "--epochs", "3", "--optim.lr", "0.02"], load_recipe("clead_joint")), digits, joint)
    found = losses(joint, 1)
    assert found[-1] < found[0]
    last = joint.history()[-1]
    assert last["loss"] == pytest.approx(last["loss_ce_adv"] + last["loss_contrastive"], rel=1e-4)


def test_released_code_lowers_both_its_losses_on_digits(digits, undefended, tmp_path):
    # Small steps: after so few, the frozen running statistics are not yet those of the weights, and features are large.
    flags = "--epochs 6 --optim.lr 0.02 --stage2.epochs 4 --stage2.batch-size 60 --stage2.lr 0.003".split()
    recipe, released = load_recipe("clead_code"), RunDir(tmp_path / "run")
    config = parse_flags([*DIGITS, *flags, "--loss.source", str(undefended)], recipe)
    train(config, digits, released)
    for stage in (1, 2):
        found = losses(released, stage)
        assert found[-1] < found[0], stage
    first, last = (load_trained(released.checkpoints / name, CPU).model for name in ("stage1_best.pt", "best.pt"))
    for name, value in first.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(value, last.state_dict()[name]), name


def test_the_fixed_network_must_be_there_and_know_the_classes(undefended, tmp_path):
    recipe = load_recipe("clead_code")
    with pytest.raises(UserError, match=r"loss.source = None: must be the run or checkpoint of an undefended training"):
        check_config(recipe)
    with pytest.raises(UserError, match=r"loss.source = .*nowhere: must be"):
        check_config(parse_flags(["--loss.source", str(tmp_path / "nowhere")], recipe))
    with pytest.raises(UserError, match=r"stage2.mode = none: nothing in C-LEAD \(released code"):
        check_config(parse_flags(["--loss.source", str(undefended), "--stage2.mode", "none"], recipe))
    config = parse_flags(["--loss.source", str(undefended), *DIGITS], recipe)
    check_config(config)
    for stage in (1, 2):
        method = build_method(config, stage)
        with pytest.raises(UserError, match=r"loss.source = .*standard: has 10 classes, and must have 7, as letters has"):
            method.prepare(SimpleNamespace(name="letters", num_classes=7), CPU)


def test_the_two_readings_are_told_apart():
    titles = [method_class(name).title for name in ("clead_joint", "clead_code")]
    assert len(set(titles)) == 2 and all(title.startswith("C-LEAD (") for title in titles)
    assert math.isclose(load_recipe("clead_code").attack.step_size, 3 / 255)
    assert load_recipe("clead_joint").attack.objective == "ce+contrastive"
