"""Every method of the package, on what the engine promises all of them: no host read, a step that can be captured, its cost."""

import functools

import pytest
import torch
from graph_emulator import Emulator
from test_step import NoHostReads
from test_throughput import counted

from fastanchor import graphs
from fastanchor.data import sources
from fastanchor.data.resident import ResidentFeed
from fastanchor.data.stream import FeedSpec
from fastanchor.methods import METHODS, STAGE2
from fastanchor.settings import load_recipe, parse_flags, recipe_names
from fastanchor.train.optim import build_optimizer, set_learning_rate, state_tensors
from fastanchor.train.run import model_from_config
from fastanchor.train.stages import stage_config, stage_method
from fastanchor.train.step import TrainStep
from fastanchor.train.throughput import step_cost

CPU = torch.device("cpu")
SMALL = (
    "--model.width 4 --model.head-hidden 16 --model.head-dim 8 --attack.steps 2 --attack.eps 0.1 --attack.step-size 0.05 "
    "--data.augment crop --data.weak crop --data.pad 2 --batch-size 12 --stage2.batch-size 12 --precision fp32"
).split()
MORE = {
    "advcl": ["--loss.clusters", "2", "5"],
    "ascl": ["--loss.two-transforms", "--loss.distance", "linf"],
}
# Recipes whose settings reach code that their method's own recipe does not.
OTHERS = {"fgsm_rs": [], "nfgsm": ["--attack.start-radius", "0.2"], "trades_awp": ["--optim.awp-start", "0"]}


@pytest.fixture(scope="module")
def images():
    return sources.load("digits", limit=60, val_fraction=0.1)


@pytest.fixture
def config_of(tiny_run):
    def make(name, *flags):
        more = ["--loss.source", str(tiny_run)] if name == "clead_code" else MORE.get(name, OTHERS.get(name, []))
        small = list(SMALL)
        if name in ("fgsm_rs", "nfgsm", "nuat"):
            small[small.index("--attack.steps") + 1] = "1"
        return parse_flags([*small, *more, *flags], load_recipe(name))

    return make


def make_step(config, images, stage=1, device=CPU):
    """A step on resident digits, all of it from one seed."""
    config = stage_config(config, stage)
    torch.manual_seed(0)
    model = model_from_config(config, 10, (0.3,) * 3, (0.4,) * 3, METHODS[config.method].bn_sets).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    method = stage_method(config, stage, images, model, device)
    method.start_epoch(1, model)
    spec = FeedSpec(method.drawn, config.data.augment, device, config.data.pad, weak=config.data.weak, indexed=method.indexed)
    feed = ResidentFeed(images.train, spec)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, device, feed.load)
    step.reset({"augment": 3, "attack": 4})
    return step


def run(step, steps=3):
    """Steps on changing batches, with learning rate and progress changing; the means of what they log."""
    for done in range(steps):
        set_learning_rate(step.optimizer, 0.05 / (1 + done))
        step(torch.arange(12, device=step.device).roll(done) + 3 * done, progress=0.4 * done)
    return step.read()


def everything(step):
    return [*step.network.state_dict().values(), *state_tensors(step.optimizer), *step.sums.values()]


CASES = [*((name, 1) for name in METHODS), *((name, 1) for name in OTHERS), ("clead_code", 2), ("aff", 2)]


def case(config_of, name, stage, *flags):
    if name == "aff":
        return config_of("advcl", "--stage2.mode", "aff", "--stage2.loss", "trades", *flags)
    return config_of(name, *(["--stage2.mode", "slf"] if stage == 2 else []), *flags)


@pytest.mark.parametrize("name, stage", CASES)
def test_captured_steps_are_the_plain_steps_and_read_nothing_back(images, config_of, name, stage):
    plain = make_step(case(config_of, name, stage, "--engine.graph", "off"), images, stage)
    graphed = make_step(case(config_of, name, stage, "--engine.graph", "on"), images, stage)
    with graphs.use_recorder(Emulator):
        ours = run(graphed)
    assert graphed.graphed and len(graphed._graphs) == 1
    assert ours == run(plain)
    for a, b in zip(everything(graphed), everything(plain), strict=True):
        assert torch.equal(a, b)
    with NoHostReads():
        plain(torch.arange(12), progress=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_cost_is_that_of_its_attacks(images, config_of, name):
    step = make_step(config_of(name), images)
    method, batch = step.method, 4
    cost = step_cost(method, step.model, (32, 32))
    labels = torch.arange(batch)
    made = {view: torch.rand(batch, 3, 32, 32) for view in method.drawn}
    method.train_mode(step.model)
    given = torch.stack([labels, labels], 1) if method.indexed else labels
    early = method.perturb(step.run, dict(made), given)  # makes and checks the twins
    spent = counted(functools.partial(method.perturb, step.run, made, given))
    forwarded = 0 if early is None else len(early.logits)
    of_training = forwarded * cost.training // (3 * len(method.views))
    # The objectives' own products are not the network's: embeddings of 8 dimensions, 10 logits.
    assert spent - batch * of_training == pytest.approx(batch * cost.attack, rel=5e-3, abs=1)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_name_a_stage_2_that_there_is(name):
    mode = load_recipe(name).stage2.mode
    assert mode == "none" or mode in STAGE2


@pytest.mark.gpu
@pytest.mark.parametrize("name, stage", CASES)
def test_captured_steps_are_the_plain_steps_on_a_gpu(images, config_of, name, stage):
    device = torch.device("cuda")
    steps = [
        make_step(case(config_of, name, stage, "--engine.graph", graph, "--engine.kernels", kernels), images, stage, device)
        for graph, kernels in (("on", "auto"), ("off", "auto"), ("off", "off"))
    ]
    graphed, eager, plain = (run(step) for step in steps)
    assert steps[0].graphed
    for key, value in graphed.items():
        if key.startswith("loss"):
            assert value == pytest.approx(eager[key], rel=1e-2, abs=1e-3), key
            assert value == pytest.approx(plain[key], rel=2e-2, abs=2e-3), key


@pytest.mark.parametrize(
    "name, flags",
    [
        ("nuat", ["--loss.clean-mode", "train"]),
        ("advcl", ["--attack.bn", "eval"]),
        ("trades", []),
    ],
)
def test_perturbed_weights_move_no_running_statistics_twice(images, config_of, name, flags):
    """Views that are forwarded before the attack are forwarded again at the perturbed weights: only those forwards count."""
    moved = []
    for more in ([], ["--optim.awp-gamma", "0.01"]):
        step = make_step(config_of(name, *flags, *more), images)
        run(step, steps=1)
        moved.append({key: int(value) for key, value in step.model.state_dict().items() if key.endswith("batches_tracked")})
    assert moved[0] == moved[1]


def test_flops_are_those_of_perturbed_weights_once_they_are(images, config_of):
    step = make_step(config_of("trades_awp", "--optim.awp-start", "1"), images)
    cost = step_cost(step.method, step.model, (32, 32))
    assert cost.perturbed().total == cost.attack + 2 * cost.training
    for progress, perturbs in ((0.5, False), (1.5, True)):
        step(torch.arange(12), progress=progress)
        assert step.perturbs_weights is perturbs
