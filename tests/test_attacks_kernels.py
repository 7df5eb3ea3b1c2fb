"""Attacks and training steps on the operators of `ops.images`, by interpreted kernels and by plain torch, against those without."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("triton")

from attack_helpers import assert_same_images, batch, generator, logit_norm, small_net
from fastanchor.kernels import pgd as pgd_kernels
from graph_emulator import Emulator
from test_ops_images import kernels_on_cpu
from test_step_graphed import CPU, IMAGES, LABELS, SEEDS, assert_same, make_config, make_model, run
from torch.utils._python_dispatch import TorchDispatchMode

from fastanchor import graphs
from fastanchor.attacks import PGD
from fastanchor.data import views
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.errors import UserError
from fastanchor.methods import build_method
from fastanchor.ops import images as operators
from fastanchor.ops import verified
from fastanchor.train.optim import build_optimizer
from fastanchor.train.step import TrainStep

EPS, STEP = 0.1, 0.025


@pytest.fixture
def recorder():
    with graphs.use_recorder(Emulator):
        yield


@pytest.fixture
def interpreted():
    with kernels_on_cpu():
        yield


@pytest.fixture
def fresh(monkeypatch):
    """No verdicts yet, no word from the environment, and the CPU passes for a device that kernels run on."""
    monkeypatch.setattr(verified, "_known", {})
    monkeypatch.delenv(verified.SWITCH, raising=False)
    monkeypatch.setattr(operators, "usable", lambda device: (True, "usable"))


def attack(kernels, backend="eager", **options):
    return PGD(EPS, STEP, 3, backend=backend, kernels=kernels, **options)


def start_of(images):
    return torch.empty_like(images).uniform_(-EPS, EPS, generator=generator(5))


class Listed(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def operators_of(attack, *arguments):
    with Listed() as listed:
        attack(*arguments)
    return listed.names


# -- parity ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ce", "cw", "kl"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("backend, bn", [("eager", "eval"), ("graphed", "eval"), ("eager", "train_frozen")])
def test_images_by_kernels_are_those_without(recorder, interpreted, objective, norm, backend, bn):
    images, labels = batch(6)
    options = {"objective": objective, "norm": norm, "bn": bn, "start": start_of(images), "restarts": 2}
    expected = attack("off", **options)(small_net(), images, labels)
    made = attack("on", backend, **options)
    found = made(small_net(), images, labels)
    assert made.engine.notes["kernels"].startswith("yes: step and logit gradient of 2 to 4096 classes")
    if norm == "linf":
        assert_same_images(found, expected, STEP)
    else:  # as for the backends without kernels
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if objective != "kl" else 1e-4)
    if backend == "graphed":
        assert torch.equal(found, attack("on", **options)(small_net(), images, labels))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_linf_steps_are_plain_torchs_to_the_bit(interpreted, layout):
    """With the same gradients, which a callable's are: the step alone is a kernel's."""
    images, labels = batch(6)
    images = images.contiguous(memory_format=layout)
    for bn in ("eval", "train_frozen"):
        options = {"objective": logit_norm, "start": start_of(images), "bn": bn}
        made = [attack(kernels, **options)(small_net(), images, labels) for kernels in ("on", "off")]
        assert torch.equal(*made) and made[0].stride() == images.stride()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_of_an_odd_layout(interpreted, norm):
    images, labels = batch(6)
    start = start_of(images)
    expected = attack("off", norm=norm, bn="train_frozen", start=start)(small_net(), images, labels)
    for odd in (images.transpose(0, 1).contiguous().transpose(0, 1), images.repeat(1, 1, 1, 2)[..., ::2]):
        odd.copy_(images)
        made = attack("on", norm=norm, bn="train_frozen", start=start)(small_net(), odd, labels)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_bf16_attacks(interpreted):
    images, labels = batch(6)
    options = {"precision": "bf16", "start": start_of(images)}
    made, expected = (attack(kernels, **options)(small_net(), images, labels) for kernels in ("on", "off"))
    assert made.dtype == torch.float32
    assert_same_images(made, expected, STEP, share=0.02)


def test_noise_and_random_numbers_are_the_same(interpreted):
    images, labels = batch(6)
    sources = [generator(), generator()]
    made = [attack(k)(small_net(), images, labels, generator=g) for k, g in zip(("on", "off"), sources, strict=True)]
    assert_same_images(*made, STEP)
    assert torch.equal(*(source.get_state() for source in sources))


# -- what runs ------------------------------------------------------------------------------------------------------------------


def test_a_step_is_one_operator_and_a_logit_gradient_another():
    net, (images, labels) = small_net(), batch(4)
    names = operators_of(attack("on", check_inputs=False), net, images, labels)
    assert names.count("fastanchor::pgd_step") == names.count("fastanchor::label_head") == 3
    assert not {"aten::sign", "aten::_log_softmax", "aten::nll_loss_forward"} & set(names)
    plain = operators_of(attack("off", check_inputs=False), net, images, labels)
    assert plain.count("aten::sign") == 3 and not any(name.startswith("fastanchor") for name in plain)
    # Signs, sum and clamp, and a log-softmax with its backward: at least 8 launches a step are gone.
    assert len(plain) - len(names) >= 3 * 8
    divergence = operators_of(attack("on", objective="kl", check_inputs=False), net, images, labels)
    assert divergence.count("fastanchor::kl_head") == 3


def test_objectives_without_a_head_and_logits_it_does_not_take(monkeypatch):
    net, (images, labels) = small_net(), batch(4)
    names = operators_of(attack("on", objective=logit_norm), net, images, labels)
    assert names.count("fastanchor::pgd_step") == 3 and "fastanchor::label_head" not in names

    class Unhashable:
        __hash__ = None

        def __call__(self, logits, labels):
            return logit_norm(logits, labels)

    assert "fastanchor::label_head" not in operators_of(attack("on", objective=Unhashable()), net, images, labels)
    monkeypatch.setattr(operators, "MAX_CLASSES", 4)
    names = operators_of(attack("on"), net, images, labels)
    assert names.count("fastanchor::pgd_step") == 3 and "fastanchor::label_head" not in names


def test_the_compiled_step_and_the_reference_are_without(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager", **options))
    images, labels = batch(4)
    start = start_of(images)
    made = attack("on", "compiled", start=start)
    assert_same_images(made(small_net(), images, labels), attack("off", start=start)(small_net(), images, labels), STEP)
    assert made.engine.notes["kernels"] == "no: the compiler fuses the step"
    names = operators_of(attack("on", "reference"), small_net(), images, labels)
    assert not any(name.startswith("fastanchor") for name in names)


# -- the decision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernels, objective, note",
    [
        ("auto", "ce", "no: Triton kernels need a CUDA device, this is cpu"),
        ("off", "ce", "no: kernels = off"),
        ("on", "ce", "yes: step and logit gradient of 2 to 4096 classes, as plain torch on a CPU"),
        ("on", logit_norm, "yes: step, as plain torch on a CPU"),
    ],
)
def test_notes(monkeypatch, kernels, objective, note):
    monkeypatch.delenv(verified.SWITCH, raising=False)
    made = attack(kernels, objective=objective)
    made(small_net(), *batch(4))
    assert made.engine.notes["kernels"] == note


def test_a_bad_switch_is_named():
    with pytest.raises(UserError, match="^kernels = 'fast': must be one of auto, on, off"):
        PGD(kernels="fast")
    with pytest.raises(UserError, match="^kernels = bool: must be one of auto, on, off"):
        PGD(kernels=True)


def test_on_where_they_do_not_run_is_an_error(monkeypatch):
    monkeypatch.setattr(operators, "usable", lambda device: (False, "triton is not installed"))
    real = operators.decide
    # On a CPU `on` means plain torch, so another device is asked about.
    monkeypatch.setattr(operators, "decide", lambda name, mode, device: real(name, mode, torch.device("cuda", 0)))
    with pytest.raises(UserError, match="^kernels = on: pgd_step_linf: triton is not installed$"):
        attack("on")(small_net(), *batch(4))


def test_kernels_are_checked_once_and_before_anything_is_captured(fresh, interpreted, recorder, monkeypatch):
    asked, recording = [], []
    real = Emulator.record

    def record(self, function):
        recording.append(True)
        try:
            return real(self, function)
        finally:
            recording.pop()

    monkeypatch.setattr(Emulator, "record", record)
    for name, check in list(operators.CHECKS.items()):
        monkeypatch.setitem(operators.CHECKS, name, lambda d, name=name, c=check: (asked.append((name, bool(recording))), c(d)))
    images, labels = batch(4)
    start = start_of(images)
    for _ in range(2):
        made = attack("auto", "graphed", start=start)
        found = made(small_net(), images, labels)
    assert asked == [("pgd_step_linf", False), ("label_head_ce", False)]
    assert (
        made.engine.notes["kernels"]
        == "yes: step and logit gradient of 2 to 4096 classes, checked against the reference on this device"
    )
    assert_same_images(found, attack("off", start=start)(small_net(), images, labels), STEP)


def test_a_kernel_that_fails_its_check_is_replaced_by_plain_torch(fresh, interpreted, monkeypatch):
    """And the other one still serves."""
    images, labels = batch(4)
    options = {"start": start_of(images), "objective": "cw"}
    expected = attack("off", **options)(small_net(), images, labels)
    with monkeypatch.context() as patched:
        patched.setattr(pgd_kernels, "pgd_step", lambda *arguments: torch.full_like(arguments[0], 0.5))
        made = attack("auto", **options)
        with pytest.warns(RuntimeWarning, match="the kernels for pgd_step_linf are not used on cpu, plain PyTorch is"):
            found = made(small_net(), images, labels)
    assert_same_images(found, expected, STEP)
    note = made.engine.notes["kernels"]
    assert note.startswith(
        "yes: logit gradient of 2 to 4096 classes, checked against the reference on this device; no step: check against the ref"
    )


def test_a_captured_attack_is_captured_anew_where_the_decision_changes(recorder, interpreted):
    net, (images, labels) = small_net(), batch(4)
    made = attack("on", "graphed", start=start_of(images))
    first = made(net, images, labels)
    made.kernels = "off"
    second = made(net, images, labels)
    assert len(made.engine.graphs._graphs) == 2
    for kernels, found in (("on", first), ("off", second)):
        assert torch.equal(found, attack(kernels, start=made.start)(net, images, labels))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_used_attack_can_be_copied_and_pickled(copied):
    net, (images, labels) = small_net(), batch(4)
    made = attack("on")
    found = made(net, images, labels, generator=generator())
    again = copied(made)
    assert again.kernels == "on" and torch.equal(again(net, images, labels, generator=generator()), found)


# -- the training step ----------------------------------------------------------------------------------------------------------


SPLIT = ResidentSplit(Split(IMAGES, LABELS), CPU)


def make_step(kernels, graph, *flags, load=SPLIT.rows):
    config = make_config("--engine.kernels", kernels, "--engine.graph", graph, "--loss.hsc", "0", *flags)
    model = make_model()
    method = build_method(config, 1)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, CPU, load)
    step.attacks[0].kernels = kernels
    step.reset(SEEDS)
    return step


@pytest.mark.parametrize("flags", [[], ["--attack.norm", "l2", "--attack.eps", "0.5"], ["--precision", "bf16"]])
def test_replayed_steps_are_the_plain_steps_to_the_bit(recorder, flags):
    graphed, plain = make_step("on", "on", *flags), make_step("on", "off", *flags)
    assert run(graphed, epochs=2) == run(plain, epochs=2)
    assert_same(graphed, plain)
    assert len(graphed._graphs) == 1
    assert graphed.notes["kernels"].startswith("attack: yes: step and logit gradient of 2 to 4096 classes, as plain")
    assert "augmentation: yes" in graphed.describe()


def test_a_captured_step_on_kernels(recorder, interpreted):
    """Interpreted kernels, few steps: the same as without kernels but for rounding."""
    graphed, eager, plain = make_step("on", "on"), make_step("on", "off"), make_step("off", "off", load=SPLIT.take)
    read = [run(step, sizes=(8, 8)) for step in (graphed, eager, plain)]
    assert read[0] == read[1]
    assert_same(graphed, eager)
    assert read[2][0]["loss"] == pytest.approx(read[0][0]["loss"], rel=1e-3)
    assert plain.notes["kernels"] == "attack, augmentation, refresh of the twin: no: kernels = off"


def test_a_step_decides_before_it_captures(fresh, interpreted, recorder, monkeypatch):
    """`verified` refuses to check anything while capturing; then the step would run without."""
    step = make_step("auto", "on")
    assert step.fused_views
    run(step, sizes=(8,))
    assert step.notes["kernels"].count("checked against the reference") == 2


def test_the_images_of_a_step_are_one_operator():
    """Gathered, cropped, mirrored and scaled: with `rows` the labels alone are picked by themselves."""
    step = make_step("on", "off")
    names = operators_of(lambda indices: step.make_views(*step.load(indices)), torch.arange(6))
    assert names.count("fastanchor::augment") == names.count("aten::index_select") == 1 and "aten::constant_pad_nd" not in names


def test_augmentations_without_a_kernel_are_named():
    for kind in ("none", "simclr"):
        step = make_step("on", "off", "--data.augment", kind)
        run(step, sizes=(8,))
        assert step.notes["kernels"].count(f"; augmentation: no: data.augment = {kind} has no kernel")


@pytest.mark.parametrize("kind", ["crop_flip", "crop", "none", "simclr"])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_of_a_store_become_the_same_views(interpreted, kind, fused):
    indices, sources = torch.tensor([7, 0, 59, 7]), [generator(3), generator(3)]
    expected = views.augment(SPLIT.take(indices)[0], kind, sources[0], pad=2)
    rows, labels = SPLIT.rows(indices)
    for given in (rows, rows.gather()):
        sources[1].manual_seed(3)
        made = views.augment(given, kind, sources[1], pad=2, fused=fused)
        assert torch.equal(made, expected) and made.stride() == expected.stride()
        assert torch.equal(sources[0].get_state(), sources[1].get_state())
    assert torch.equal(labels, SPLIT.take(indices)[1])


def test_all_views_of_a_step_are_the_same(interpreted):
    flags = ["--loss.views", "clean+aug+adv", "--loss.hsc", "0.5", "--loss.ce-clean", "1", "--attack.eps", "0"]
    for more in ([], ["--no-channels-last"]):
        made = [
            step.make_views(*step.load(torch.arange(6)))[0]
            for step in (make_step("on", "off", *flags, *more), make_step("off", "off", *flags, *more, load=SPLIT.take))
        ]
        assert list(made[0]) == list(made[1]) == ["clean", "aug", "adv"]
        for name, view in made[0].items():
            torch.testing.assert_close(view, made[1][name], rtol=0, atol=0)
