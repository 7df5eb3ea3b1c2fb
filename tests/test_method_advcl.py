"""AdvCL against its formula in fp64, written from the paper and the authors' code: step, attack, statistics, pseudo-labels."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from attack_helpers import assert_same_images
from graph_emulator import Emulator
from torch import nn

from fastanchor import graphs
from fastanchor.config import Config
from fastanchor.data import sources
from fastanchor.data.frequency import high_frequencies
from fastanchor.errors import UserError
from fastanchor.methods import build_method
from fastanchor.methods.advcl import CLEAN, features_of
from fastanchor.methods.base import Runner
from fastanchor.models import build_model
from fastanchor.models.bnsets import BatchNormSets, add_bn_sets, bn_set
from fastanchor.settings import load_recipe, parse_flags
from fastanchor.train import checkpoint
from fastanchor.train.checks import check_config
from fastanchor.train.loop import train
from fastanchor.train.optim import build_optimizer
from fastanchor.train.run import RunDir, load_trained
from fastanchor.train.stages import stage_method
from fastanchor.train.step import TrainStep

CPU = torch.device("cpu")
B, SIZE, EPS, STEP, STEPS = 6, 16, 0.06, 0.02, 3
CLUSTERS = (2, 3, 5)
BASE = (
    "--method advcl --attack.objective ce+contrastive --attack.eps 0.06 --attack.step-size 0.02 --attack.steps 3 "
    "--model.view-bn separate --data.augment simclr --loss.clusters 2 3 5 --loss.radius 3 --stage2.mode slf --optim.lr 0.05"
).split()
TAU, SCALE, PSEUDO = 0.5, 0.5 / 0.07, 0.2


def config_of(*flags):
    return parse_flags([*BASE, *flags], Config())


def make_model(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = build_model(
        "resnet18", num_classes=4, width=4, head="mlp_bn", head_hidden=16, head_dim=8, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    return add_bn_sets(model, ("pgd", "pgd_ce", "normal")).to(dtype)


def image_set(count=30, seed=7):
    images = torch.randint(256, (count, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    split = sources.Split(images, torch.arange(count) % 4)
    return sources.ImageSet("random", tuple("abcd"), split, split, split)


def set_up(*flags, dtype=torch.float64):
    """A method with its heads, and a runner, as the training loop makes them."""
    config, model = config_of(*flags), make_model(dtype)
    method = stage_method(config, 1, image_set(), model, CPU)
    method.heads.to(dtype)
    targets = torch.stack([torch.randint(count, (30,), generator=torch.Generator().manual_seed(count)) for count in CLUSTERS], 1)
    method.heads.targets.copy_(targets)
    generators = {"attack": torch.Generator().manual_seed(5)}
    run = Runner(config, method, model, method.adversaries(model, torch.zeros(())), generators, CPU)
    method.train_mode(model)
    return method, model, run


def views(seed=1):
    """Three views with pixels so far from 0 and 1 that no start of an attack leaves [0, 1]; the authors' code does not clamp it."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 + 0.8 * torch.rand(B, 3, SIZE, SIZE, generator=generator) for name in ("weak", "aug", "aug2")}


LABELS = torch.stack([torch.arange(B) % 4, torch.tensor([3, 17, 0, 29, 8, 11])], 1)


# -- the formula, term by term ----------------------------------------------------------------------------------------------------


def ntxent(embeddings):
    """Of views, each (B, D): the mean over rows of -(1 / positives) sum log(e^{s_ip / tau} / sum_{a != i} e^{s_ia / tau})."""
    rows = [(v, i, z[i] / z[i].norm()) for v, z in enumerate(embeddings) for i in range(len(z))]
    total = 0
    for v, i, z in rows:
        others = [(w, j, torch.dot(z, other) / TAU) for w, j, other in rows if (w, j) != (v, i)]
        denominator = sum(s.exp() for _, _, s in others)
        positives = [(s.exp() / denominator).log() for w, j, s in others if j == i]
        total = total - sum(positives) / len(positives)
    return total / len(rows)


def pseudo_ce(features, heads, targets):
    """The mean over clusterings of the cross-entropy of linear classifiers, each a slice of the heads' matrix."""
    total, first = 0, 0
    for t, count in enumerate(CLUSTERS):
        weight, bias = heads.linear.weight[first : first + count], heads.linear.bias[first : first + count]
        first += count
        for i in range(len(features)):
            logits = weight @ features[i] + bias
            total = total - (logits[targets[i, t]].exp() / logits.exp().sum()).log()
    return total / (len(features) * len(CLUSTERS))


def features(model, name, images):
    with bn_set(model, name):
        return model.features(images)


def embed(model, name, images):
    return model.projection(features(model, name, images))


class Unmoved:
    """Inside, forwards may move running statistics; afterwards they are as before."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.saved = [buffer.clone() for buffer in self.model.buffers()]

    def __exit__(self, *_):
        for buffer, value in zip(self.model.buffers(), self.saved, strict=True):
            buffer.data.copy_(value)  # not seen by autograd, as BatchNorm's own updates are not


def naive_step(model, heads, weak, aug, aug2, targets, starts, bn):
    """AdvCL as its code is: every step of the attack forwards all five views; one loss, its gradient to both adversarial images.

    bn "eval": the attacked views by running statistics; the others, as in training, by the batch's, and what the training forward
    has moved is moved already. Returns adversarial images and the loss, with gradients in the parameters.
    """
    high = high_frequencies(weak, 3)
    clean = (aug, aug2, high)
    model.train()
    if bn == "eval":
        early = [embed(model, "normal", view) for view in clean]
    x_cl, x_ce = weak + starts[0], weak + starts[1]
    for _ in range(STEPS):
        x_cl, x_ce = x_cl.detach().requires_grad_(), x_ce.detach().requires_grad_()
        if bn == "eval":
            with Unmoved(model):
                fixed = [embed(model, "normal", view) for view in clean]
            model.eval()
        z, f = embed(model, "pgd", x_cl), features(model, "pgd_ce", x_ce)
        if bn == "train":
            fixed = [embed(model, "normal", view) for view in clean]
        model.train()
        loss = ntxent([z, *fixed]) + PSEUDO * pseudo_ce(f, heads, targets)
        gradients = torch.autograd.grad(loss, [x_cl, x_ce])
        x_cl, x_ce = (
            torch.min(torch.max(x.detach() + STEP * g.sign(), weak - EPS), weak + EPS).clamp(0, 1)
            for x, g in zip((x_cl, x_ce), gradients, strict=True)
        )
    z, f = embed(model, "pgd", x_cl), features(model, "pgd_ce", x_ce)
    model.projection(f)  # of no use but to its BatchNorm's statistics
    if bn == "train":
        early = [embed(model, "normal", view) for view in clean]
    loss = SCALE * ntxent([z, *early]) + PSEUDO * pseudo_ce(f, heads, targets)
    loss.backward()
    return x_cl, x_ce, loss.detach()


def our_step(method, model, run, labels=LABELS, seed=1):
    made = views(seed)
    early = method.perturb(run, made, labels)
    out = run.outputs({name: made[name] for name in method.views}, early)
    terms = method.loss(out, labels, torch.zeros(()))
    sum(terms.values()).backward()
    return made, out, {name: term.detach() for name, term in terms.items()}


def all_parameters(method, model):
    return {**dict(model.named_parameters()), **{f"heads.{name}": p for name, p in method.heads.named_parameters()}}


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_a_step_is_the_naive_one_that_forwards_every_view_in_every_step_of_the_attack(bn):
    method, model, run = set_up("--attack.bn", bn)
    theirs, heads = copy.deepcopy(model), copy.deepcopy(method.heads)
    given = views()
    noise = torch.Generator().manual_seed(5)
    starts = [torch.empty_like(given["weak"]).uniform_(-EPS, EPS, generator=noise) for _ in range(2)]
    targets = method.heads.targets[LABELS[:, 1]]
    x_cl, x_ce, loss = naive_step(
        theirs, heads, *(given[name].double() for name in ("weak", "aug", "aug2")), targets, [s.double() for s in starts], bn
    )
    made, _, terms = our_step(method, model, run)
    for ours, expected in ((made["adv"], x_cl), (made["adv_ce"], x_ce)):
        assert_same_images(ours, expected, STEP, share=0)
        assert 0.9 * EPS < (ours - given["weak"]).abs().max() < EPS + 1e-6
    assert (made["adv"] - made["adv_ce"]).abs().max() > EPS  # two attacks, not one
    # Losses are fp32; the network and so the gradients below them are fp64.
    assert sum(terms.values()).item() == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    expected |= {f"heads.{name}": p.grad for name, p in heads.named_parameters()}
    for name, parameter in all_parameters(method, model).items():
        if name.startswith("classifier."):
            assert parameter.grad is None and expected[name] is None
            continue
        scale = expected[name].abs().max()
        # A bias before a BatchNorm has no gradient but rounding.
        assert (parameter.grad - expected[name]).abs().max() <= 2e-5 * scale + 1e-8, name
        assert scale > 1e-6 or name == "projection.fc1.bias"
    if bn == "eval":
        for ours, naive in zip(model.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-7)  # adversarial images are fp32


def test_the_loss_and_the_attacks_objectives_are_the_formula():
    """Values, and gradients by autograd of the transcription; fp32 to 1e-5, and fp64 embeddings to 1e-12."""
    method, _, run = set_up()
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(B, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    found = torch.cat(embeddings).requires_grad_()
    expected = [z.clone().requires_grad_() for z in embeddings]
    for value in (method._contrastive(found), ntxent(expected)):
        value.backward()
    assert method._contrastive(found).item() == pytest.approx(ntxent(expected).item(), rel=1e-12)
    assert (found.grad - torch.cat([z.grad for z in expected])).abs().max() < 1e-12

    fixed, targets = torch.cat(embeddings[1:]).float(), method.heads.targets[LABELS[:, 1]]
    attacked = embeddings[0].float().requires_grad_()
    value = run.adversaries["adv"].attack.objective((None, attacked), LABELS[:, 0], fixed)
    value.backward()
    assert value.item() == pytest.approx(B * ntxent(expected).item(), rel=1e-5)
    assert (attacked.grad - B * expected[0].grad).abs().max() < 1e-5

    rows = torch.randn(B, 32, generator=generator, dtype=torch.float64)
    logits = method.heads(rows).detach().requires_grad_()
    value = run.adversaries["adv_ce"].attack.objective(logits, LABELS[:, 0], targets)
    assert value.item() == pytest.approx(B * pseudo_ce(rows, method.heads, targets).item(), rel=1e-12)
    value.backward()
    step = 1e-6
    for i, j in ((0, 0), (2, 4), (5, 9)):
        with torch.no_grad():
            up, down = (method.heads.cross_entropy(logits.index_put((torch.tensor([i]), torch.tensor([j])), logits[i, j] + d), targets)
                        for d in (step, -step))  # fmt: skip
        assert logits.grad[i, j].item() == pytest.approx(B * (up - down).item() / (2 * step), rel=1e-6)


@pytest.mark.parametrize("view_bn", ["separate", "mixed"])
@pytest.mark.parametrize("bn", ["eval", "train"])
def test_each_view_is_forwarded_once_and_the_attacked_ones_once_more_a_step(bn, view_bn):
    method, model, run = set_up("--attack.bn", bn, "--model.view-bn", view_bn)
    seen = []
    stem = model.backbone.bn1
    model.backbone.register_forward_hook(lambda module, args, out: seen.append((stem.active, module.training, len(args[0]))))
    our_step(method, model, run)
    clean = [("normal", True, 3 * B)] if view_bn == "mixed" else 3 * [("normal", True, B)]
    attack = [(name, bn == "train", B) for name in ("pgd", "pgd_ce") for _ in range(STEPS)]
    assert seen == [*clean, *attack, ("pgd", True, B), ("pgd_ce", True, B)]  # 2 K + 5 images' forwards; the code has 5 K + 5


@pytest.mark.parametrize("view_bn", ["separate", "mixed"])
@pytest.mark.parametrize("bn", ["eval", "train", "train_frozen"])
def test_which_statistics_each_view_moves(bn, view_bn):
    """ "normal" by the clean views once a step, where the authors' code moves it K + 1 times; the others K + 1 times with bn train."""
    method, model, run = set_up("--attack.bn", bn, "--model.view-bn", view_bn)
    stem = {name: copy.deepcopy(norm) for name, norm in model.backbone.bn1.sets.items()}
    made, _, _ = our_step(method, model, run)
    attacked, clean = (STEPS + 1 if bn == "train" else 1), (1 if view_bn == "mixed" else 3)
    for module in model.modules():
        if isinstance(module, BatchNormSets):
            counts = {name: int(norm.num_batches_tracked) for name, norm in module.sets.items()}
            assert counts == {"pgd": attacked, "pgd_ce": attacked, "normal": clean}
    # The projection's BatchNorm is one for all; the attack on pseudo-labels does not come by it.
    assert int(model.projection.bn.num_batches_tracked) == clean + 2 + (STEPS if bn == "train" else 0)
    if bn != "train":
        groups = {
            "pgd": [["adv"]],
            "pgd_ce": [["adv_ce"]],
            "normal": [list(CLEAN)] if view_bn == "mixed" else [[n] for n in CLEAN],
        }
        for name, batches in groups.items():
            mean, var = stem[name].running_mean, stem[name].running_var
            for batch in batches:
                x = model.backbone.conv1(model.normalize(torch.cat([made[view] for view in batch])))
                mean, var = 0.9 * mean + 0.1 * x.mean((0, 2, 3)), 0.9 * var + 0.1 * x.var((0, 2, 3), unbiased=True)
            torch.testing.assert_close(model.backbone.bn1.sets[name].running_mean, mean, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(model.backbone.bn1.sets[name].running_var, var, rtol=1e-9, atol=1e-12)
    # Judged is the set of the contrastive adversary.
    model.eval()
    x = made["weak"]
    assert torch.equal(model(x), model.classifier(features(model, "pgd", x)))


def test_classes_are_never_looked_at():
    """Not by the loss, nor by an attack: with other classes every gradient and image is the same to the bit."""
    found = []
    for classes in (LABELS[:, 0], LABELS[:, 0].flip(0), torch.zeros(B, dtype=torch.int64)):
        method, model, run = set_up()
        made, _, terms = our_step(method, model, run, torch.stack([classes, LABELS[:, 1]], 1))
        gradients = [p.grad for p in all_parameters(method, model).values() if p.grad is not None]
        found.append([made["adv"], made["adv_ce"], *terms.values(), *gradients])
    assert all(torch.equal(a, b) for a, b in itertools.chain(zip(found[0], found[1]), zip(found[0], found[2])))  # noqa: B905
    # The pseudo-labels are: by the images' indices.
    method, model, run = set_up()
    other = our_step(method, model, run, torch.stack([LABELS[:, 0], LABELS[:, 1].roll(1)], 1))[2]
    assert other["contrastive"] == found[0][2] and other["pseudo"] != found[0][3]


# -- in the training step and loop ------------------------------------------------------------------------------------------------


def make_step(*flags):
    config, model, images = config_of(*flags), make_model(torch.float32), image_set()
    torch.manual_seed(1)
    method = stage_method(config, 1, images, model, CPU)

    def load(indices):
        return images.train.images[indices], torch.stack([images.train.labels[indices], indices], 1)

    optimizer = build_optimizer(method.trainable(model), config.optim)
    return TrainStep(config, method, model, optimizer, None, CPU, load)


@pytest.mark.parametrize("flags", [("--attack.bn", "train"), ("--precision", "bf16", "--model.view-bn", "mixed")])
def test_replayed_steps_are_the_plain_ones_also_after_new_clusters(flags):
    steps = [make_step("--engine.graph", graph, "--loss.recluster-epochs", "1", *flags) for graph in ("on", "off")]
    seen = []
    with graphs.use_recorder(Emulator):
        for step in steps:
            for epoch in (1, 2):
                step.method.start_epoch(epoch, step.model)
                seen.append(step.method.heads.targets.clone())
                step.reset({"augment": epoch, "attack": 7})
                for batch in torch.arange(12).split(6):
                    step(batch, progress=0.0)
    for a, b in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(a, b) and (a.amax(0) < torch.tensor(CLUSTERS)).all() and (a.amax(0) > 0).all()
    assert not torch.equal(seen[0], seen[1])
    assert steps[0].graphed and steps[0].read() == steps[1].read()
    for a, b in zip(*(all_parameters(step.method, step.model).values() for step in steps), strict=True):
        assert torch.equal(a, b)


def test_when_the_features_are_clustered():
    for every, due in ((0, {1}), (1, {1, 2, 3, 4, 5}), (2, {1, 3, 5}), (10, {1})):
        step = make_step("--loss.recluster-epochs", str(every))
        address, found = step.method.heads.targets.data_ptr(), set()
        for epoch in range(1, 6):
            step.method.heads.targets.fill_(1)  # the second of two clusters: as it would not be left
            step.method.start_epoch(epoch, step.model)
            if not (step.method.heads.targets == 1).all():
                found.add(epoch)
            assert step.method.heads.targets.data_ptr() == address
        assert found == due
        assert not any(int(m.num_batches_tracked) for m in step.model.modules() if isinstance(m, nn.BatchNorm2d))


def test_what_is_clustered():
    """Features of the images as they are, in eval mode and the clean views' set; clusters keep their numbers."""
    method, model, _ = set_up("--loss.recluster-epochs", "1")
    for norm in model.backbone.bn1.sets.values():
        norm.running_mean.normal_()
    images = image_set().train.images
    found = features_of(model, image_set().train, 7)
    assert found.dtype == torch.float32 and model.training
    model.eval()
    torch.testing.assert_close(found.double(), features(model, "normal", images.permute(0, 3, 1, 2).double() / 255))
    method.start_epoch(1, model)
    first = method.heads.targets.clone()
    for turned in (first, torch.tensor(CLUSTERS) - 1 - first):
        method.heads.targets.copy_(turned)
        method.start_epoch(2, model)
        assert ((method.heads.targets == turned).float().mean(0) > 0.6).all()


SMALL = (
    "--model.width 4 --model.head mlp_bn --model.head-hidden 32 --model.head-dim 16 --batch-size 30 --loss.clusters 2 5 10 "
    "--data.augment crop --data.weak crop --data.pad 2 --attack.steps 1 --attack.eps 0.02 --stage2.epochs 1 --stage2.batch-size 32 "
    "--stage2.lr 0.1 --val.attack pgd1"
).split()


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", limit=100)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A run of both stages; to be read only."""
    run = RunDir(tmp_path_factory.mktemp("advcl") / "run")
    train(config_of(*SMALL, "--epochs", "3", "--loss.recluster-epochs", "2"), digits, run)
    return run


def test_its_loss_falls_on_digits(whole):
    rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 1), (1, 2), (1, 3), (2, 1)]
    first = [row for row in rows if row["stage"] == 1]
    assert first[0]["loss"] == pytest.approx(first[0]["loss_contrastive"] + first[0]["loss_pseudo"], rel=1e-5)
    assert first[-1]["loss_contrastive"] < 0.95 * first[0]["loss_contrastive"]
    assert first[1]["loss_pseudo"] < first[0]["loss_pseudo"]  # of one clustering; the third epoch has another
    assert "val_robust" not in first[-1] and "val_robust" in rows[-1]
    # What is judged: stage 2's classifier on stage 1's last backbone, in the set "pgd".
    trained = load_trained(whole.path, CPU).model
    assert {m.active for m in trained.modules() if isinstance(m, BatchNormSets)} == {"pgd"}


def test_resume_gives_the_same_bits_and_pseudo_labels(digits, whole, tmp_path, monkeypatch):
    """Killed between two clusterings: the first one's labels are those of weights that are no more."""
    config, cut, real = (
        config_of(*SMALL, "--epochs", "3", "--loss.recluster-epochs", "2"),
        RunDir(tmp_path / "cut"),
        checkpoint.save,
    )

    class Killed(BaseException):
        pass

    def save_then_die(path, state, **options):
        real(path, state, **options)
        if path.name == "last.pt":
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_then_die)
    with pytest.raises(Killed):
        train(config, digits, cut)
    monkeypatch.setattr(checkpoint, "save", real)
    targets = checkpoint.load(cut.checkpoints / "last.pt")["heads"]["targets"]
    assert targets.shape == (len(digits.train), 3) and len(targets[:, 2].unique()) > 3
    train(config, digits, cut, resume=True)
    ours, theirs = (checkpoint.load(run.checkpoints / "best.pt")["weights"] for run in (cut, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_pseudo_labels_of_a_file_stay(tmp_path):
    given = torch.arange(30)[:, None] % torch.tensor(CLUSTERS)
    np.save(tmp_path / "labels.npy", given.numpy())
    config = config_of("--loss.pseudo-labels", str(tmp_path / "labels.npy"), "--loss.recluster-epochs", "1")
    model = make_model()
    method = stage_method(config, 1, image_set(), model, CPU)
    for epoch in (1, 2, 3):
        method.start_epoch(epoch, model)
        assert torch.equal(method.heads.targets, given)
    fewer = image_set(20)
    with pytest.raises(UserError, match="has 30 labels, and there must be one for each of the 20 training images"):
        stage_method(config, 1, fewer, model, CPU)
    # Where the split knows which of the source's images it has, as after validation images were taken out.
    object.__setattr__(fewer.train, "origin", torch.arange(29, 9, -1))
    assert torch.equal(stage_method(config, 1, fewer, model, CPU).heads.targets, given[torch.arange(29, 9, -1)])


# -- settings ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--loss.clusters 2 1", "loss.clusters = .*: must be a list of at least one number, each >= 2"),
        ("--loss.temperature 0", "loss.temperature = 0: must be > 0"),
        ("--loss.contrastive 0", "loss.contrastive = 0: must be > 0"),
        ("--loss.pseudo=-1", "loss.pseudo = -1: must be >= 0"),
        ("--loss.radius=-1", "loss.radius = -1: must be >= 0"),
        ("--loss.recluster-epochs=-1", "loss.recluster_epochs = -1: must be >= 0"),
        ("--loss.beta 1", "unknown setting loss.beta"),
        ("--stage2.mode none", "stage2.mode = none: nothing in AdvCL trains the classifier"),
        ("--attack.objective ce", "attack.objective = ce: the adversary of AdvCL maximises ce.contrastive"),
    ],
)
def test_bad_settings(flags, said):
    with pytest.raises(UserError, match=said):
        check_config(config_of(*flags.split()))


def test_more_clusters_than_images():
    with pytest.raises(UserError, match="loss.clusters = 31: must be at most 30, the number of training images"):
        stage_method(config_of("--loss.clusters", "2", "31"), 1, image_set(), make_model(), CPU)


def test_the_recipe_is_the_authors():
    config = load_recipe("advcl")
    check_config(config)
    assert (config.method, config.epochs, config.batch_size, config.optim.lr) == ("advcl", 1000, 512, 0.5)
    assert config.loss.contrastive == pytest.approx(0.5 / 0.07) and config.loss.clusters == (2, 10, 50, 100, 500)
    assert (config.attack.bn, config.attack.steps, config.model.head, config.model.view_bn) == ("train", 5, "mlp_bn", "separate")
    assert build_method(config).drawn == ("weak", "aug", "aug2")
