"""The whole training step as a captured graph, by the CPU emulator of one: the same bits as the step run plainly."""

import copy

import pytest
import torch
from graph_emulator import Emulator
from test_step import CPU, make_config, make_model

from fastanchor import graphs
from fastanchor.errors import UserError
from fastanchor.methods import build_method
from fastanchor.train.memory import explain_out_of_memory
from fastanchor.train.optim import WeightAverage, build_optimizer, set_learning_rate, state_tensors
from fastanchor.train.step import TrainStep

SEEDS = {"augment": 3, "attack": 4}
IMAGES = torch.randint(256, (60, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(60) % 4


def take(indices):
    return IMAGES.index_select(0, indices), LABELS.index_select(0, indices)


def make_step(*flags, stage=1):
    config = make_config(*flags)
    model = make_model()
    method = build_method(config, stage)
    average = WeightAverage(model, config.optim.ema_decay) if config.optim.ema_decay else None
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), average, CPU, take)
    step.reset(SEEDS)
    return step


def run(step, sizes=(12, 12, 12, 12), epochs=1):
    """Steps on changing batches, with learning rate and progress changing from step to step; the sums of every epoch."""
    order, read, done = torch.randperm(60, generator=torch.Generator().manual_seed(1)), [], 0
    for epoch in range(epochs):
        step.reset({name: seed + epoch for name, seed in SEEDS.items()})
        for size in sizes:
            set_learning_rate(step.optimizer, 0.05 / (1 + done))
            step(order[:size].roll(done), progress=0.4 * done)
            order, done = order.roll(-size), done + 1
        read.append(step.read())
    return read


def everything(step):
    averaged = [] if step.average is None else step.average.tensors()
    return [*step.model.state_dict().values(), *state_tensors(step.optimizer), *averaged, *step.sums.values(), step.steps]


def assert_same(ours, theirs):
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(a, b)
    for name, generator in ours.generators.items():
        assert torch.equal(generator.get_state(), theirs.generators[name].get_state())


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--loss.hsc", "0"],
        ["--precision", "bf16"],
        ["--loss.beta-warmup-epochs", "2"],
        ["--attack.objective", "ce+hsc", "--loss.beta-warmup-epochs", "2"],
        ["--attack.objective", "hsc", "--attack.bn", "train"],
        ["--attack.bn", "train_frozen", "--attack.start", "gaussian"],
        ["--attack.norm", "l2", "--attack.eps", "0.5"],
        ["--attack.backend", "reference"],
        ["--optim.ema-decay", "0.9", "--optim.clip-grad-norm", "1"],
        ["--optim.name", "adamw"],
        ["--optim.name", "lars"],
        ["--optim.name", "lamb", "--loss.weight", "topk"],
        ["--loss.views", "clean+aug+adv", "--loss.label-smoothing", "0.1"],
        ["--method", "standard"],
        ["--data.augment", "simclr", "--optim.nesterov"],
    ],
)
def test_replayed_steps_are_the_plain_steps_to_the_bit(flags):
    graphed, plain = make_step("--engine.graph", "on", *flags), make_step("--engine.graph", "off", *flags)
    with graphs.use_recorder(Emulator):
        ours = run(graphed, epochs=2)
    assert ours == run(plain, epochs=2)
    assert_same(graphed, plain)
    assert len(graphed._graphs) == 1 and len(plain._graphs) == 0


def test_stage_2_is_captured_too():
    graphed, plain = (make_step("--engine.graph", g, "--stage2.mode", "alf", stage=2) for g in ("on", "off"))
    with graphs.use_recorder(Emulator):
        run(graphed)
    run(plain)
    assert_same(graphed, plain)


def test_another_batch_size_gets_a_graph_of_its_own():
    graphed, plain = make_step("--engine.graph", "on"), make_step("--engine.graph", "off")
    with graphs.use_recorder(Emulator):
        run(graphed, sizes=(12, 7, 12, 7))
    run(plain, sizes=(12, 7, 12, 7))
    assert_same(graphed, plain)
    assert len(graphed._graphs) == 2


def test_capturing_in_the_middle_of_a_training_changes_nothing():
    """Momentum, averages, sums and random numbers are not those of a fresh step any more."""
    graphed, plain = (make_step("--engine.graph", "off", "--optim.ema-decay", "0.9") for _ in range(2))
    run(graphed)
    run(plain)
    graphed.graphed = True
    before = copy.deepcopy(everything(graphed))
    with graphs.use_recorder(Emulator):
        graphed._captured((torch.arange(12),))
        assert all(torch.equal(a, b) for a, b in zip(everything(graphed), before, strict=True))
        run(graphed)
    run(plain)
    assert_same(graphed, plain)


def test_a_step_that_cannot_be_captured_goes_on_without_and_says_why():
    graphed, plain = make_step(), make_step("--engine.graph", "off")
    graphed.graphed = True  # as `auto` decides on a GPU
    real = type(graphed.method).diagnostics

    def reads_back(method, out, labels, progress):
        return {**real(method, out, labels, progress), "host": torch.tensor(out.logits["adv"].sum().item())}

    for step in (graphed, plain):
        step.method.diagnostics = reads_back.__get__(step.method)
    with graphs.use_recorder(Emulator):
        run(graphed)
    run(plain)
    assert_same(graphed, plain)
    assert graphed.notes["graphed"].startswith("no: the function can not be captured as a graph: RuntimeError")


def test_a_graph_that_was_asked_for_is_an_error_where_there_is_none():
    with pytest.raises(UserError, match="^engine.graph = on: CUDA graphs need a CUDA device, this is cpu$"):
        run(make_step("--engine.graph", "on"))


def test_notes_say_how_the_step_runs():
    step = make_step()
    run(step)
    assert step.notes["graphed"] == "no: CUDA graphs need a CUDA device, this is cpu"
    assert step.notes["folded"] == "yes: 20 BatchNorms in 20 convolutions"
    step = make_step("--attack.bn", "train")
    run(step)
    assert step.notes["folded"].startswith("no: with bn=train BatchNorm takes the batch's statistics")


def test_the_trials_after_an_out_of_memory_run_without_the_graph():
    step = make_step("--engine.graph", "on")
    with graphs.use_recorder(Emulator):
        run(step)
        text = str(explain_out_of_memory(torch.OutOfMemoryError("out of memory"), step, torch.arange(12)))
    assert "batch_size = 6 fits (tried)" in text and not step.graphed and len(step._graphs) == 0


def test_a_captured_attack_is_a_part_of_the_step():
    step = make_step("--engine.graph", "on", "--attack.backend", "graphed")
    assert step.attacks[0].backend == "eager"
