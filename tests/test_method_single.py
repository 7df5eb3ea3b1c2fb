"""Single-step methods: NuAT's loss, adversary and alternation, FGSM-RS and N-FGSM as recipes, each written out in fp64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from graph_emulator import Emulator

from fastanchor import graphs
from fastanchor.config import Config
from fastanchor.data import sources
from fastanchor.errors import UserError
from fastanchor.methods.base import Outputs
from fastanchor.models import build_model
from fastanchor.settings import from_dict, load_recipe, parse_flags
from fastanchor.train.checks import check_config
from fastanchor.train.optim import build_optimizer
from fastanchor.train.stages import stage_method
from fastanchor.train.step import TrainStep

CPU = torch.device("cpu")
EPS, STEP, RADIUS = 0.06, 0.05, 0.03
IMAGES = torch.randint(256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(12) % 4
SEEDS = {"augment": 0, "attack": 1}
NUAT = (
    f"--attack.eps {EPS} --attack.step-size {STEP} --attack.start bernoulli --attack.start-radius {RADIUS} --attack.steps 1 "
    "--attack.objective ce+nuclear --data.augment none --optim.lr 0.05 --model.head identity --epochs 10"
).split()


def nuat_config(*flags):
    return parse_flags([*NUAT, *flags], from_dict({"method": "nuat"}, "test"))


def make_model(seed=0):
    torch.manual_seed(seed)
    model = build_model("resnet18", num_classes=4, width=4, head="identity", mean=(0.5,) * 3, std=(0.25,) * 3)
    with torch.no_grad():  # statistics that are not the initial ones
        model.train()(torch.rand(16, 3, 16, 16))
    return model


def make_step(config, model, images=None):
    method = stage_method(config, 1, images, model, CPU)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, CPU)
    step.reset(SEEDS)
    return step


def in_pixels(images_u8=IMAGES):
    return images_u8.permute(0, 3, 1, 2).double() / 255


# -- NuAT: the loss -------------------------------------------------------------------------------------------------------------


def nuclear(matrix):
    return torch.linalg.svdvals(matrix).sum()


def weights_of_the_public_code(epochs, largest, tail):
    """Its loop: from 0, a share more after every epoch, until the last `tail` of them."""
    weight, found = 0.0, []
    for epoch in range(epochs):
        found.append(weight)
        if epoch < epochs - tail:
            weight += largest / (epochs - tail)
    return found


@pytest.mark.parametrize("epochs, largest, tail, ramp", [(100, 4.5, 10, "0.9"), (100, 4.0, 0, "1"), (55, 4.0, 0, "1")])
def test_the_weight_rises_as_in_the_public_code(epochs, largest, tail, ramp):
    method = stage_method(
        nuat_config("--epochs", str(epochs), "--loss.nuclear", str(largest), "--loss.ramp", ramp), 1, None, make_model(), CPU
    )
    for epoch, expected in enumerate(weights_of_the_public_code(epochs, largest, tail)):
        for within in (0.001, 0.5, 0.999):
            assert float(method.weight(torch.tensor(epoch + within))) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_without_a_ramp_the_weight_is_the_same_from_the_start():
    method = stage_method(nuat_config("--loss.ramp", "0"), 1, None, make_model(), CPU)
    assert float(method.weight(torch.tensor(0.1))) == 4.5


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("rows, classes", [(12, 4), (3, 10)])
def test_loss_and_gradient_are_the_formula(dtype, rtol, rows, classes):
    source = torch.Generator().manual_seed(1)
    clean, adversarial = torch.randn(2, rows, classes, generator=source, dtype=torch.float64)
    labels = torch.arange(rows) % classes
    method = stage_method(nuat_config("--loss.ce-clean", "0.7", "--loss.nuclear", "3"), 1, None, make_model(), CPU)
    weight = 3 * 4 / 9  # in the fifth of ten epochs, nine of which it rises

    truth = [x.clone().requires_grad_() for x in (clean, adversarial)]
    logs = torch.stack([row - row.exp().sum().log() for row in truth[0]])
    ce = 0.7 * -sum(logs[i, labels[i]] for i in range(rows)) / rows
    norm = weight * nuclear(truth[0] - truth[1]) / rows
    expected = torch.autograd.grad(ce + norm, truth)

    ours = [x.to(dtype).requires_grad_() for x in (clean, adversarial)]
    terms = method.loss(Outputs({"aug": ours[0], "adv": ours[1]}, {}), labels, torch.tensor(4.5, dtype=dtype))
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=rtol)
    assert terms["nuclear"].item() == pytest.approx(norm.item(), rel=rtol)
    for found, right in zip(torch.autograd.grad(sum(terms.values()), ours), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=0, atol=rtol)


# -- NuAT: the adversary --------------------------------------------------------------------------------------------------------


def nuat_step(net, images, start, labels, compared, weight):
    """One step of the public code: the mean cross-entropy and the norm over the batch size, cut to pixels, ball and pixels."""
    leaf = start.clone().requires_grad_()
    logits = net(leaf)
    cost = F.cross_entropy(logits, labels) + (weight * nuclear(compared - logits) / len(labels) if weight else 0)
    (gradient,) = torch.autograd.grad(cost, leaf)
    moved = (start + STEP * gradient.sign()).clamp(0, 1)
    return (images + (moved - images).clamp(-EPS, EPS)).clamp(0, 1)


def written_out(net, noise, flags, weight, turn):
    """The adversarial images of NuAT or NuAT2, from an fp64 copy of the network, in the given state of the alternation."""
    images = in_pixels()
    start = (images + noise).clamp(0, 1)
    if "train" in flags:
        compared = copy.deepcopy(net).train()(images).detach()
        net.train()(images)  # and it moves the running statistics that the attack uses
        net.eval()
    else:
        compared = net.eval()(images).detach()
    if "2" in flags:
        first = nuat_step(net, images, start, LABELS, compared, weight)
        return nuat_step(net, images, first, LABELS, compared, 0)
    return nuat_step(net, images, start, LABELS, compared, weight * turn)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--loss.clean-mode", "train", "--model.view-bn", "separate"),
        ("--attack.steps", "2"),
        ("--loss.no-alternate",),
    ],
    ids=["NuAT", "compared with the training mode", "NuAT2", "always"],
)
def test_the_adversary_is_the_public_code_s(flags):
    """Several batches: the norm counts in every second one, or always. At full weight it moves many pixels otherwise."""
    model = make_model()
    step = make_step(nuat_config("--loss.nuclear", "20", *flags), model)
    step.progress.fill_(9.5)
    alternates = flags in ((), ("--loss.clean-mode", "train", "--model.view-bn", "separate"))
    for number in range(3):
        net = copy.deepcopy(model).double()
        state = step.generators["attack"].get_state()
        draw = torch.Generator()
        draw.set_state(state)
        noise = step.attacks[0].start_delta(in_pixels().float().contiguous(memory_format=torch.channels_last), draw).double()
        expected = written_out(net, noise, flags, 20.0, number % 2 if alternates else 1)
        step.method.train_mode(model)
        found, early = step.make_views(IMAGES, LABELS)
        assert ((found["adv"].double() - expected).abs() > 1e-6).double().mean() < 5e-3
        other = written_out(copy.deepcopy(model).double(), noise, flags, 0.0 if number % 2 or not alternates else 20.0, 1)
        assert ((found["adv"].double() - other).abs() > 1e-6).double().mean() > 0.05
        assert (early is not None) == ("train" in flags)


def test_an_epoch_begins_with_a_batch_without_the_norm():
    step = make_step(nuat_config(), make_model())
    for epoch in (1, 2):
        step.method.start_epoch(epoch, step.model)
        turns = []
        for _ in range(3):
            turns.append(float(step.method.heads.now))
            step(IMAGES, LABELS, progress=epoch - 0.5)
        assert turns == [0, 1, 0]


def test_plain_cross_entropy_may_be_the_adversary_s_objective():
    config = nuat_config("--attack.objective", "ce")
    step = make_step(config, make_model())
    assert step.method.heads is None and [attack.objective_name for attack in step.attacks] == ["ce"]
    step(IMAGES, LABELS, progress=9.5)
    assert step.read()["loss_nuclear"] > 0


# -- NuAT: the step ---------------------------------------------------------------------------------------------------------------


def test_clean_images_are_forwarded_once_and_the_step_is_the_formula_s():
    """loss.clean_mode train: one forward a view, clean first, each moving the statistics; the update of that loss in fp64."""
    flags = ("--loss.clean-mode", "train", "--model.view-bn", "separate", "--loss.ramp", "0")
    config = nuat_config(*flags)
    model = make_model()
    net = copy.deepcopy(model).double()
    step = make_step(config, model)
    draw = torch.Generator().manual_seed(SEEDS["attack"])
    noise = step.attacks[0].start_delta(in_pixels().float().contiguous(memory_format=torch.channels_last), draw).double()
    calls = []
    forward = step.run._forward
    step.run._forward = lambda model, inputs: (calls.append(len(inputs)), forward(model, inputs))[1]
    step(IMAGES, LABELS, progress=9.5)
    assert calls == [12, 12]

    moving = copy.deepcopy(net)
    adversarial = written_out(moving, noise, flags, 4.5, 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    net.train()
    clean, moved = net(in_pixels()), net(adversarial)
    loss = F.cross_entropy(clean, LABELS) + 4.5 * nuclear(clean - moved) / 12
    loss.backward()
    optimizer.step()
    assert step.read()["loss"] == pytest.approx(loss.item(), rel=1e-3)
    for (name, a), b in zip(model.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize(
    "flags",
    [(), ("--loss.clean-mode", "train", "--model.view-bn", "separate"), ("--attack.steps", "2"), ("--precision", "bf16")],
)
def test_replayed_steps_are_the_plain_steps_to_the_bit(flags):
    """No host read, and the alternation goes on from replay to replay."""
    steps = [make_step(nuat_config("--engine.graph", g, *flags), make_model()) for g in ("on", "off")]
    with graphs.use_recorder(Emulator):
        for number in range(4):
            for step in steps:
                step.method.start_epoch(1, step.model) if number == 3 else None
                step(IMAGES.roll(number, 0), LABELS.roll(number), progress=2.4 * number)
    assert len(steps[0]._graphs) == 1 and steps[0].read() == steps[1].read()
    for a, b in zip(*(step.model.state_dict().values() for step in steps), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--attack.steps", "3"), "attack.steps = 3: with loss.alternate at most 2; write loss.alternate false"),
        (("--loss.clean-mode", "train"), "loss.clean_mode = train: needs model.view_bn = separate, which is mixed"),
        (("--attack.objective", "kl"), "attack.objective = kl: the adversary of NuAT maximises ce+nuclear or ce"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        check_config(nuat_config(*flags))
    assert str(error.value) == message


def test_a_ramp_longer_than_the_training_is_refused():
    with pytest.raises(UserError, match=r"loss.ramp = 1.5: must be in \[0, 1\]"):
        nuat_config("--loss.ramp", "1.5")


# -- FGSM-RS and N-FGSM ------------------------------------------------------------------------------------------------------------


def slope(net, images):
    leaf = images.clone().requires_grad_()
    F.cross_entropy(net(leaf), LABELS).backward()
    return leaf.grad.sign()


@pytest.mark.parametrize("recipe", ["fgsm_rs", "nfgsm"])
def test_a_recipe_s_step_is_its_public_code_s(recipe):
    """In train mode throughout: attack and training forward each move the running statistics. Update and statistics in fp64."""
    config = parse_flags(["--data.augment", "none"], load_recipe(recipe))
    model = make_model()
    net = copy.deepcopy(model).double().train()
    step = make_step(config, model)
    step(IMAGES, LABELS, progress=1.0)
    draw = torch.Generator().manual_seed(SEEDS["attack"])
    like = in_pixels().float().contiguous(memory_format=torch.channels_last)
    reach = {"fgsm_rs": 8 / 255, "nfgsm": 16 / 255}[recipe]
    noise = torch.empty_like(like).uniform_(-reach, reach, generator=draw).double()

    images = in_pixels()
    delta = (images + noise).clamp(0, 1) - images
    if recipe == "fgsm_rs":
        delta = (delta + 10 / 255 * slope(net, images + delta)).clamp(-8 / 255, 8 / 255)
    else:
        delta = delta + 8 / 255 * slope(net, images + delta)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.optim.lr, momentum=0.9, weight_decay=5e-4)
    optimizer.zero_grad()
    loss = F.cross_entropy(net((images + delta).clamp(0, 1)), LABELS)
    loss.backward()
    optimizer.step()
    assert step.read()["loss"] == pytest.approx(loss.item(), rel=1e-3)
    for (name, a), b in zip(model.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-3, atol=2e-3), name


# -- recipes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, method, attack",
    [
        ("fgsm_rs", "pgd_at", (8 / 255, 10 / 255, 1, "ce", "train", "uniform", None, True)),
        ("nfgsm", "pgd_at", (8 / 255, 8 / 255, 1, "ce", "train", "uniform", 16 / 255, False)),
        ("nuat", "nuat", (8 / 255, 8 / 255, 1, "ce+nuclear", "eval", "bernoulli", 4 / 255, True)),
    ],
)
def test_recipes_hold_what_their_papers_state(recipe, method, attack):
    config = load_recipe(recipe)
    check_config(config)
    found = config.attack
    assert config.method == method and config.watch.images == 256
    assert attack == (
        found.eps, found.step_size, found.steps, found.objective, found.bn, found.start, found.start_radius, found.project,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["fgsm_rs", "nfgsm", "nuat"])
def test_every_single_step_method_learns_the_digits(recipe):
    """Its own loss on a batch of digits falls, in a small network and with a weaker attack."""
    small = "--model.width 4 --data.augment none --attack.eps 0.03 --attack.step-size 0.03 --optim.lr 0.1".split()
    small += ["--attack.start-radius", "0.03"]
    config = parse_flags(small, load_recipe(recipe))
    digits = sources.load("digits", limit=64, val_fraction=0.1).train
    images, labels = (torch.as_tensor(part)[:32] for part in (digits.images, digits.labels))
    torch.manual_seed(0)
    step = make_step(config, build_model("resnet18", num_classes=10, width=4, head="identity"))
    totals = []
    for _ in range(20):
        step.reset(SEEDS)
        step(images, labels, progress=20.0)
        totals.append(step.read()["loss"])
    assert all(map(math.isfinite, totals)) and totals[-1] < 0.7 * totals[0], totals


def test_no_flag_of_nuat_is_one_of_another_method():
    with pytest.raises(UserError, match="unknown setting loss.nuclear"):
        parse_flags(["--loss.nuclear", "1"], Config())
