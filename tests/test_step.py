"""The engine's training step against the reference step, and what a step must never do."""

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastanchor.config import Config
from fastanchor.data import views
from fastanchor.methods import build_method
from fastanchor.models import build_model
from fastanchor.reference.attacks import pgd as reference_pgd
from fastanchor.reference.hard_supcon import hard_supcon
from fastanchor.reference.step import anchor_step
from fastanchor.settings import parse_flags
from fastanchor.train.memory import explain_out_of_memory
from fastanchor.train.optim import WeightAverage, build_optimizer
from fastanchor.train.step import NonFinite, TrainStep

CPU = torch.device("cpu")


def make_config(*flags):
    base = "--attack.steps 2 --attack.eps 0.1 --attack.step-size 0.05 --optim.lr 0.05".split()
    warmup = [] if "standard" in flags else ["--loss.beta-warmup-epochs", "0"]
    return parse_flags([*base, *warmup, *flags], Config())


def make_step(config, model, stage=1):
    method = build_method(config, stage)
    average = WeightAverage(model, config.optim.ema_decay) if config.optim.ema_decay else None
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), average, CPU)
    step.reset({"augment": 0, "attack": 1})
    return step


def make_model(seed=0):
    torch.manual_seed(seed)
    return build_model("resnet18", num_classes=4, width=4, head_hidden=16, head_dim=8, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(256, (12, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return images, torch.arange(12) % 4


@pytest.mark.parametrize("hsc", [0.0, 0.5])
@pytest.mark.parametrize("channels_last", [True, False])
def test_engine_step_is_the_reference_step(batch, hsc, channels_last):
    images, labels = batch
    config = make_config("--loss.hsc", str(hsc), "--channels-last" if channels_last else "--no-channels-last")
    ours = make_model()
    if channels_last:
        ours = ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(make_model()).double()
    step = make_step(config, ours)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    augment, attack = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    expected = []
    for _ in range(2):
        step(images, labels, progress=1.0)
        augmented = views.augment(images, "crop_flip", augment)
        if not channels_last:
            augmented = augmented.contiguous()
        start = torch.empty_like(augmented).uniform_(-0.1, 0.1, generator=attack)
        terms = anchor_step(
            theirs, optimizer, augmented.double(), labels, start.double(), eps=0.1, step_size=0.05, steps=2, hsc=hsc,
            temperature=0.1, beta=2.0,
        )  # fmt: skip
        expected.append(terms)
    means = step.read()
    assert set(expected[0]) == {name.removeprefix("loss_") for name in means if name.startswith("loss_")}
    for name in expected[0]:
        assert means[f"loss_{name}"] == pytest.approx(sum(terms[name].item() for terms in expected) / 2, rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=2e-5), name


def test_engine_step_equals_the_reference_in_one_dtype_to_rounding(batch):
    """With the same dtype and layout nothing but the order of additions differs."""
    images, labels = batch
    ours, theirs = make_model(), make_model()
    step = make_step(make_config("--no-channels-last"), ours)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    augment, attack = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for _ in range(3):
        step(images, labels, progress=1.0)
        augmented = views.augment(images, "crop_flip", augment).contiguous()
        start = torch.empty_like(augmented).uniform_(-0.1, 0.1, generator=attack)
        anchor_step(
            theirs, optimizer, augmented, labels, start, eps=0.1, step_size=0.05, steps=2, hsc=0.5, temperature=0.1, beta=2.0
        )
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_lambda_zero_forwards_the_adversarial_view_alone(batch):
    images, labels = batch
    model = make_model()
    seen = []
    model.backbone.register_forward_hook(lambda module, args, out: seen.append((module.training, len(args[0]))))
    make_step(make_config("--loss.hsc", "0"), model)(images, labels, progress=0.0)
    assert seen == [(False, 12), (False, 12), (True, 12)]  # two attack steps in eval mode, one training forward


@pytest.mark.parametrize(
    "flags, views_",
    [
        ([], ("aug", "adv")),
        (["--loss.views", "clean+aug+adv"], ("clean", "aug", "adv")),
        (["--loss.hsc", "0"], ("adv",)),
        (["--loss.hsc", "0", "--loss.ce-clean", "0.5"], ("aug", "adv")),
        (["--method", "standard"], ("aug",)),
    ],
)
def test_views_follow_from_the_terms(batch, flags, views_):
    images, labels = batch
    model = make_model()
    step = make_step(make_config(*flags), model)
    assert step.method.views == views_
    made = step.make_views(images, labels)[0]
    assert tuple(made) == views_
    for view in made.values():
        assert view.shape == (12, 3, 16, 16) and view.dtype == torch.float32 and 0 <= view.min() and view.max() <= 1
    if "adv" in made and "aug" in made:
        distance = (made["adv"] - made["aug"]).abs().max()
        assert 0.05 < distance <= 0.1 + 1e-6
    if "clean" in made:
        assert torch.equal(made["clean"], images.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize("objective", ["ce", "ce+hsc", "hsc"])
def test_attack_objectives_raise_what_they_maximise(batch, objective):
    images, labels = batch
    model = make_model()
    step = make_step(make_config("--attack.objective", objective, "--attack.steps", "10", "--attack.step-size", "0.02"), model)
    made = step.make_views(images, labels)[0]

    def value(adv):
        with torch.no_grad():
            model.eval()
            logits, embeddings = model(torch.cat([made["aug"], adv]), embed=True)
        ce = torch.nn.functional.cross_entropy(logits[12:], labels, reduction="sum")
        hsc = 0.5 * 12 * step.method.contrastive(torch.tensor(1.0))(embeddings, labels.repeat(2))
        return {"ce": ce, "ce+hsc": ce + hsc, "hsc": hsc}[objective].item()

    noise = 0.1 * torch.randn(made["aug"].shape, generator=torch.Generator().manual_seed(0)).sign()
    assert value(made["adv"]) > max(value(made["aug"]), value((made["aug"] + noise).clamp(0, 1))) + 1e-3


@pytest.mark.parametrize("kind", ["ce+hsc", "hsc"])
def test_joint_attack_is_the_reference_attack_on_the_written_out_objective(batch, kind):
    images, labels = batch
    model = make_model()
    step = make_step(make_config("--attack.objective", kind, "--no-channels-last"), model)
    made = step.make_views(images, labels)[0]
    model.eval()
    with torch.no_grad():
        fixed = model(made["aug"], embed=True)[1]

    def objective(outputs, labels):
        logits, embeddings = outputs
        value = 0.5 * 12 * hard_supcon(torch.cat([fixed, embeddings]), labels.repeat(2), temperature=0.1, beta=2.0)
        return value + torch.nn.functional.cross_entropy(logits, labels, reduction="sum") if kind == "ce+hsc" else value

    start = torch.empty_like(made["aug"]).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    expected = reference_pgd(
        lambda x: model(x, embed=True), made["aug"], labels, eps=0.1, step_size=0.05, steps=2, objective=objective, start=start
    )
    torch.testing.assert_close(made["adv"], expected, rtol=0, atol=1e-6)


def test_label_smoothing_is_in_the_training_terms_and_not_in_the_attack(batch):
    images, labels = batch
    smooth, plain = (
        make_step(make_config("--loss.label-smoothing", s, "--loss.ce-clean", "0.5"), make_model()) for s in ("0.3", "0")
    )
    made = [step.make_views(images, labels)[0] for step in (smooth, plain)]
    assert torch.equal(made[0]["adv"], made[1]["adv"])
    smooth.model.eval()
    out = smooth.run.forward(made[0])
    terms = smooth.method.loss(out, labels, torch.tensor(1.0))
    for name, view, weight in (("ce_adv", "adv", 1.0), ("ce_clean", "aug", 0.5)):
        log_p = out.logits[view].log_softmax(1)
        expected = -0.7 * log_p[range(12), labels].mean() - 0.3 * log_p.mean()
        torch.testing.assert_close(terms[name], weight * expected)


def test_beta_rises_over_the_warm_up():
    method = build_method(parse_flags(["--loss.beta", "4", "--loss.beta-warmup-epochs", "10"], Config()))
    assert [method.beta(torch.tensor(progress)) for progress in (0.0, 2.5, 5.0, 10.0, 50.0)] == [0, 1, 2, 4, 4]


def test_effective_positives_are_logged_and_fall_with_hardness(batch):
    images, labels = batch
    found = {}
    for beta in ("0", "20"):
        step = make_step(make_config("--loss.beta", beta), make_model())
        step(images, labels, progress=1.0)
        found[beta] = step.read()["effective_positives"]
    assert found["0"] == pytest.approx(2 * 3 - 1)  # 12 images of 4 classes in two views: 6 a class, less oneself
    assert found["20"] < found["0"] - 0.01


class NoHostReads(TorchDispatchMode):
    """Raises where a value would have to come back from the device."""

    FORBIDDEN = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in self.FORBIDDEN:
            raise AssertionError(f"{func._schema.name} reads a value back")
        if func._schema.name == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("boolean indexing reads a size back")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [[], ["--attack.objective", "ce+hsc"], ["--loss.weight", "topk"], ["--optim.ema-decay", "0.9"],
                                   ["--optim.clip-grad-norm", "1"], ["--method", "standard"], ["--precision", "bf16"]])  # fmt: skip
def test_no_value_is_read_back_inside_the_step(batch, flags):
    images, labels = batch
    step = make_step(make_config(*flags), make_model())
    step(images, labels, progress=0.0)
    with NoHostReads():
        step(images, labels, progress=0.5)
    with pytest.raises(AssertionError, match="reads a value back"), NoHostReads():
        step.check_finite(1)


def test_divergence_names_the_step_and_the_terms(batch):
    images, labels = batch
    model = make_model()
    step = make_step(make_config(), model)
    step(images, labels, progress=0.0)
    step.check_finite(41)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    step(images, labels, progress=0.0)
    step(images, labels, progress=0.0)
    with pytest.raises(NonFinite, match=r"diverged at step 42: ce_adv = nan, hsc = .*grad_norm = nan; try a lower optim.lr"):
        step.check_finite(41)


def test_gradient_clipping_bounds_the_update(batch):
    images, labels = batch
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    step = make_step(make_config("--optim.clip-grad-norm", "0.01", "--optim.momentum", "0", "--optim.weight-decay", "0"), model)
    step(images, labels, progress=0.0)
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(0.05 * 0.01, rel=1e-3)
    assert step.read()["grad_norm"] > 0.01  # what is logged is the norm before clipping


def test_stage_2_moves_the_classifier_alone(batch):
    images, labels = batch
    for mode, views_ in (("alf", ("adv",)), ("slf", ("aug",))):
        model = make_model()
        before = copy.deepcopy(model.state_dict())
        step = make_step(make_config("--stage2.mode", mode), model, stage=2)
        assert step.method.views == views_
        step(images, labels, progress=0.0)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"classifier.weight", "classifier.bias"}


def test_stage_2_attacks_the_frozen_network_whatever_stage_1_did(batch):
    images, labels = batch
    for bn in ("train", "train_frozen"):
        model = make_model()
        before = copy.deepcopy(model.state_dict())
        made = make_step(make_config("--stage2.mode", "alf", "--attack.bn", bn), model, stage=2).make_views(images, labels)[0]
        expected = make_step(make_config("--stage2.mode", "alf"), make_model(), stage=2).make_views(images, labels)[0]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(made["adv"], expected["adv"])


def test_the_trials_after_an_out_of_memory_do_not_hold_the_failed_step(batch, monkeypatch):
    images, labels = batch
    step = make_step(make_config(), make_model())
    alive, real = [], type(step.method).loss

    def watch(method, out, labels, progress):
        alive.append((weakref.ref(out.logits["adv"]), [ref() is not None for ref, _ in alive]))
        if len(alive) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(method, out, labels, progress)

    monkeypatch.setattr(type(step.method), "loss", watch)
    try:
        step(images, labels, progress=0.0)
    except torch.OutOfMemoryError as error:
        assert "batch_size = 6 fits (tried)" in str(explain_out_of_memory(error, step, images, labels))
    assert alive[1][1] == [False]


@pytest.mark.parametrize("limit, says", [(5, "batch_size = 3 fits"), (0, "not even batch_size = 1 fits")])
def test_out_of_memory_reports_a_size_that_was_tried(batch, limit, says):
    """A network that runs out of memory above `limit` images stands for a GPU too small."""
    images, labels = batch
    model = make_model()

    def refuse(module, args):
        if len(args[0]) > 2 * limit:  # two views
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model.backbone.register_forward_pre_hook(refuse)
    step = make_step(make_config(), model)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step(images, labels, progress=0.0)
    text = str(explain_out_of_memory(caught.value, step, images, labels))
    assert text.startswith("batch_size = 12 with 2 views (aug, adv) does not fit in the memory of cpu")
    assert says in text and text.endswith("The original error: CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("flags", [[], ["--precision", "bf16"], ["--attack.bn", "train"], ["--loss.hsc", "0"]])
def test_compiled_step_is_the_eager_step_and_compiles_once(batch, monkeypatch, flags):
    """Two graphs, the attack's step and the training forward, however many steps follow."""
    from torch._dynamo.utils import counters

    images, labels = batch
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager", **options))
    torch._dynamo.reset()
    compiled, eager = (make_step(make_config(*flags, *more), make_model()) for more in (["--engine.compile"], []))
    assert compiled.attacks[0].backend == "compiled"
    counters.clear()
    counted = []
    for i in range(3):
        compiled(images.roll(i, 0), labels, progress=0.5)
        eager(images.roll(i, 0), labels, progress=0.5)
        counted.append(counters["stats"]["unique_graphs"])
    assert len(set(counted)) == 1 and counted[0] <= 2
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if "bf16" not in flags else {"rtol": 0.05, "atol": 0.02}
    for (name, a), b in zip(compiled.model.state_dict().items(), eager.model.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), **tolerance), name
