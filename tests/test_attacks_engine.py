"""The attack's backends against the plain loop: folded, compiled, replayed as a graph (by the CPU emulator of one)."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from attack_helpers import assert_same_images, batch, generator, small_net
from graph_emulator import Emulator
from torch import nn

from fastanchor import graphs
from fastanchor.attacks import PGD, engine
from fastanchor.attacks.engine import ascend_once
from fastanchor.attacks.modes import BN_MODES
from fastanchor.data import sources
from fastanchor.data.views import to_float
from fastanchor.errors import UserError
from fastanchor.models import build_model
from fastanchor.models.folded import FoldedTwin
from fastanchor.precision import full_precision
from fastanchor.reference import attacks as reference

EPS, STEP = 0.1, 0.025
OBJECTIVES = ("ce", "cw", "kl")


@pytest.fixture(scope="module")
def trained():
    """A small ResNet that has learnt the handwritten digits for some steps, with 1,000 of them, at half their size."""
    torch.manual_seed(0)
    images = sources.load("digits")
    model = build_model("resnet18", num_classes=10, width=8, mean=(0.3,) * 3, std=(0.35,) * 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = nn.functional.avg_pool2d(to_float(images.train.images[:1000]), 2), images.train.labels[:1000]
    for _ in range(3):
        for part in torch.randperm(1000).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part] + 0.1 * torch.randn_like(x[part])), y[part]).backward()
            optimizer.step()
    return model.eval(), x, y


def attack(backend, **options):
    return PGD(EPS, STEP, 5, backend=backend, **options)


def start_of(images):
    return torch.empty_like(images).uniform_(-EPS, EPS, generator=generator(5))


@pytest.fixture
def recorder():
    with graphs.use_recorder(Emulator):
        yield


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile without its code generation: traced, differentiated and checked, in a tenth of the time."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager", **options))


# -- parity -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "graphed"])
@pytest.mark.parametrize("bn", BN_MODES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_backends_give_the_images_of_the_reference(recorder, backend, bn, objective, norm):
    images, labels = batch(8)
    start = start_of(images)
    options = {"bn": bn, "objective": objective, "norm": norm, "start": start}
    expected = attack("reference", **options)(small_net(), images, labels)
    found = attack(backend, **options)(small_net(), images, labels)
    if norm == "linf":
        assert_same_images(found, expected, STEP)
    else:  # a step is the gradient over its length: rounding passes through, and near the clean images KL is mostly rounding
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if objective != "kl" else 1e-4)


@pytest.mark.parametrize("bn", BN_MODES)
@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_robust_accuracy_on_a_trained_network_is_that_of_the_reference(recorder, traced_only, trained, bn, objective):
    """1,000 images, a model for each backend since bn="train" moves buffers; one judge: the trained network in eval mode.

    The pixels that differ are those whose gradient is 0 up to rounding: near the clean images, where KL starts, more of them.
    """
    judge, images, labels = trained
    start = start_of(images) * (1 if objective == "ce" else 0.01)

    def found(backend, count=1000):
        made = attack(backend, bn=bn, objective=objective, start=start[:count])
        return made(copy.deepcopy(judge), images[:count], labels[:count])

    def robust(x_adv):
        with torch.no_grad():
            return 100 * (judge(x_adv).argmax(1) == labels[: len(x_adv)]).double().mean().item()

    expected, made = found("reference"), found("eager")
    assert 5 < robust(expected) < 95
    assert abs(robust(made) - robust(expected)) <= 0.2 + 1e-9
    assert ((made - expected).abs() > 1e-6).double().mean() < (0.002 if objective == "ce" else 0.1)
    few = found("eager", 64)
    assert torch.equal(found("graphed", 64), few)
    if bn == "eval" or objective == "ce":  # a small network is compiled with each pair below
        assert ((found("compiled", 64) - few).abs() > 1e-6).double().mean() < (0.002 if objective == "ce" else 0.1)


@pytest.mark.parametrize("input_gradient", [engine._input_gradient, reference.input_gradient], ids=["engine", "reference"])
def test_autocast_leaves_the_backward_pass_of_an_objective_alone(input_gradient):
    """A matrix product in an objective, as of a contrastive loss, is fp32 on the way back too."""
    images, mix = torch.rand(8, 3, 4, 4), torch.randn(48, 48)

    def objective(outputs, labels, *clean):
        with torch.autocast("cpu", enabled=False):
            return (outputs @ mix).square().sum(1)

    def gradient():
        if input_gradient is reference.input_gradient:
            return reference.input_gradient(nn.Flatten(), images, None, objective)
        return engine._input_gradient(nn.Flatten(), objective, (), images, None, None)

    plain = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(), plain)


def test_bf16_on_the_twin_is_bf16_on_the_model_to_its_rounding(trained):
    """Both move the robust accuracy of an fp32 judge by little: low precision changes which near-zero signs are chosen."""
    model, images, labels = trained
    images, labels = images[:300], labels[:300]
    start = start_of(images)
    robust = {}
    for backend, precision in (("reference", "fp32"), ("reference", "bf16"), ("eager", "bf16")):
        made = attack(backend, precision=precision, start=start)(model, images, labels)
        assert made.dtype == torch.float32 and (made - images).abs().max() <= EPS + 1e-6
        with torch.no_grad():
            robust[backend, precision] = (model(made).argmax(1) == labels).float().mean().item()
    assert max(robust.values()) - min(robust.values()) <= 0.03


def test_kl_maximises_the_divergence_from_the_clean_prediction(trained):
    model, images, labels = trained
    images, labels = images[:100], labels[:100]
    made = attack("eager", objective="kl", start="gaussian")(model, images, labels, generator=generator())
    with torch.no_grad():
        clean, moved = model(images).log_softmax(1), model(made).log_softmax(1)
        noisy = model((images + 0.001 * torch.randn_like(images)).clamp(0, 1)).log_softmax(1)
    divergence = (clean.exp() * (clean - moved)).sum(1).mean()
    assert divergence > 100 * (clean.exp() * (clean - noisy)).sum(1).mean() and divergence > 0.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_of_the_images_is_kept_and_the_noise_is_that_of_the_reference(layout):
    images, labels = batch(8)
    images = images.contiguous(memory_format=layout)
    found, expected = (attack(b)(small_net(), images, labels, generator=generator()) for b in ("eager", "reference"))
    assert found.is_contiguous(memory_format=layout)
    assert_same_images(found, expected, STEP)


# -- the folded twin in use -----------------------------------------------------------------------------------------------------


def test_the_twin_follows_the_weights_from_batch_to_batch():
    net, (images, labels) = small_net(), batch(8)
    start = start_of(images)
    engine = attack("eager", start=start)
    engine(net, images, labels)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.3)
        net[1].running_mean.add_(0.2)
    assert_same_images(engine(net, images, labels), attack("reference", start=start)(net, images, labels), STEP)


def test_a_replaced_layer_is_seen():
    net, (images, labels) = small_net(), batch(8)
    start = start_of(images)
    engine = attack("eager", start=start)
    engine(net, images, labels)
    net[0] = small_net(seed=9)[0]
    net[4].running_var = torch.full_like(net[4].running_var, 3.0)
    assert_same_images(engine(net, images, labels), attack("reference", start=start)(net, images, labels), STEP)


def test_a_model_that_cannot_be_traced_is_attacked_as_it_is():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net()

        def forward(self, images):
            return self.inner(images) if images.sum() > 0 else -self.inner(images)

    (images, labels), net = batch(8), Branching().eval()
    start = start_of(images)
    engine = attack("eager", start=start)
    assert_same_images(engine(net, images, labels), attack("reference", start=start)(net.inner, images, labels), STEP)
    assert engine.engine.notes["folded"].startswith("no: torch.fx cannot trace it: symbolically traced variables")


def test_notes_name_the_mode_that_forbids_folding():
    engine = attack("eager", bn="train_frozen")
    engine(small_net(), *batch(4))
    assert engine.engine.notes["folded"].startswith("no: with bn=train_frozen BatchNorm takes the batch's statistics")


def test_an_attack_keeps_no_model_alive():
    net, engine = small_net(), attack("eager")
    engine(net, *batch(4))
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_used_attack_can_be_copied_and_pickled(copied):
    net, (images, labels) = small_net(), batch(4)
    engine = attack("eager")
    made = engine(net, images, labels, generator=generator())
    assert torch.equal(copied(engine)(net, images, labels, generator=generator()), made)


# -- graphs -----------------------------------------------------------------------------------------------------------------------


def test_replays_are_the_eager_attack_to_the_bit(recorder):
    """New images, new random numbers, weights that moved in place, another batch size: each replay is the plain attack."""
    nets = [small_net(), small_net()]
    sources_ = [generator(), generator()]
    engines = [PGD(EPS, STEP, 3, backend=b, restarts=2) for b in ("graphed", "eager")]
    for i, size in enumerate((6, 6, 4, 6)):
        images, labels = batch(size, seed=i)
        made = [e(n, images, labels, generator=g) for e, n, g in zip(engines, nets, sources_, strict=True)]
        assert torch.equal(*made)
        for net in nets:
            with torch.no_grad():
                net[0].weight.mul_(1.1)
    assert torch.equal(sources_[0].get_state(), sources_[1].get_state())
    assert len(engines[0].engine.graphs._graphs) == 2


def test_a_new_generator_each_time_needs_no_new_graph(recorder):
    """As evaluation does: a generator a call, all from one seed."""
    net, (images, labels) = small_net(), batch(6)
    engine, source = attack("graphed"), generator(3)
    made = [engine(net, images, labels, generator=generator(3)) for _ in range(3)] + [
        engine(net, images, labels, generator=source)
    ]
    assert all(torch.equal(made[0], other) for other in made[1:])
    expected = generator(3)
    assert torch.equal(made[0], attack("eager")(net, images, labels, generator=expected))
    assert torch.equal(source.get_state(), expected.get_state())
    assert not torch.equal(made[0], engine(net, images, labels, generator=source))
    assert len(engine.engine.graphs._graphs) == 1


def test_a_graph_captured_in_full_precision_serves_full_precision_alone(recorder):
    """On a GPU it holds other kernels than one captured while fp32 may mean TF32."""
    net, (images, labels) = small_net(), batch(6)
    engine = attack("graphed")
    engine(net, images, labels)
    with full_precision():
        engine(net, images, labels)
    assert len(engine.engine.graphs._graphs) == 2


def test_a_graph_is_made_anew_where_something_frozen_changed(recorder):
    net, (images, labels) = small_net(), batch(6)
    start = start_of(images)
    engine = attack("graphed", start=start)

    def check():
        options = {"bn": engine.bn, "norm": engine.norm, "objective": engine.objective, "start": engine.start}
        expected = PGD(engine.eps, engine.step_size, engine.steps, backend="eager", **options)(net, images, labels)
        assert torch.equal(engine(net, images, labels), expected)

    check()
    for name, value in (
        ("eps", 0.02),
        ("step_size", 0.3),
        ("steps", 1),
        ("norm", "l2"),
        ("start", start.flip(0)),
        ("bn", "train_frozen"),
    ):
        setattr(engine, name, value)
        check()
    net[0].weight = nn.Parameter(net[0].weight.detach() * 2)
    check()
    engine.bn, net[1].running_mean = "eval", net[1].running_mean + 1
    check()


def test_train_mode_moves_the_statistics_once_a_forward(recorder):
    images, labels = batch(6)
    nets = [small_net(), small_net()]
    for backend, net in zip(("graphed", "eager"), nets, strict=True):
        for _ in range(3):
            attack(backend, bn="train", start="zero")(net, images, labels)
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert nets[0][1].num_batches_tracked == 3 * 5 + 0


def test_what_cannot_be_captured_says_why(recorder):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net()

        def forward(self, images):
            return self.inner(images) * images.sum().item()

    net, (images, labels) = Reading().eval(), batch(4)
    with pytest.raises(UserError, match="^attack.backend = graphed: the function can not be captured as a graph: RuntimeError"):
        attack("graphed")(net, images, labels)


def test_graphs_need_a_gpu():
    with pytest.raises(UserError, match="^attack.backend = graphed: CUDA graphs need a CUDA device, this is cpu$"):
        attack("graphed")(small_net(), *batch(4))


# -- the compiled step --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", BN_MODES)
@pytest.mark.parametrize(
    "objective, norm, precision", [("ce", "linf", "fp32"), ("cw", "l2", "fp32"), ("kl", "linf", "fp32"), ("ce", "linf", "bf16")]
)
def test_compiled_step_is_the_eager_step(traced_only, bn, objective, norm, precision):
    images, labels = batch(6)
    options = {"bn": bn, "objective": objective, "norm": norm, "precision": precision, "start": start_of(images)}
    nets = [small_net(), small_net()]
    made = [attack(b, **options)(net, images, labels) for b, net in zip(("compiled", "eager"), nets, strict=True)]
    assert_same_images(*made, STEP, share=1e-3 if precision == "fp32" else 0.02)
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_compilation_happens_once_a_shape_and_sees_new_weights(traced_only):
    """The count may not grow from batch to batch: every recompilation would cost a minute of a training."""
    from torch._dynamo.utils import counters

    net, (images, labels) = small_net(), batch(6)
    engine = attack("compiled")
    counters.clear()
    found = []
    for i in range(4):
        images, labels = batch(6, seed=i)
        start = start_of(images)
        engine.start = start
        made = engine(net, images, labels)
        assert_same_images(made, attack("reference", start=start)(net, images, labels), STEP)
        with torch.no_grad():
            net[0].weight.mul_(1.2)
            net[1].running_var.mul_(1.5)
        found.append(counters["stats"]["unique_graphs"])
    assert found == [1, 1, 1, 1]
    engine.start = "zero"
    engine(net, *batch(4))
    assert counters["stats"]["unique_graphs"] == 2


def test_attacks_do_not_use_up_each_others_recompilations(traced_only):
    """torch gives up after 8 recompilations of one piece of code; every attack has its own."""
    net, (images, labels) = small_net(), batch(4)
    for steps in range(1, 12):
        PGD(EPS, 0.01 * steps, 1, backend="compiled")(net, images, labels)
    assert ascend_once.__code__ is not PGD(backend="compiled").engine.step("compiled").__code__


def test_inductor_generates_the_same_step():
    """Once through the real code generator, of a network small enough to compile in seconds."""
    net, (images, labels) = small_net(), batch(4)
    start = start_of(images)
    made = attack("compiled", start=start)(net, images, labels)
    assert_same_images(made, attack("reference", start=start)(net, images, labels), STEP, share=2e-3)


def test_a_model_that_breaks_the_compiled_graph_is_named():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net()

        def forward(self, images):
            return self.inner(images) * (1.0 if images.sum().item() > 0 else 2.0)

    with pytest.raises(UserError, match="^attack.backend = compiled: torch.compile cannot compile this attack: .*use eager$"):
        attack("compiled")(Reading().eval(), *batch(4))


# -- half precision ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_fp16_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match="without loss scaling, input gradients below fp16's range become 0"):
        PGD(precision=name)
    with pytest.raises(UserError, match="^the model's parameters are fp16: without loss scaling"):
        PGD()(small_net().half(), *batch(4))


def test_twin_is_what_the_steps_run_on():
    net, (images, labels) = small_net(), batch(4)
    engine = attack("eager")
    engine(net, images, labels)
    twin = engine.engine.network(net, images, "eval", None)
    assert isinstance(twin, FoldedTwin) and twin.folded == 2 and twin.kept == 0


# -- what may change between two calls -------------------------------------------------------------------------------------------


class Configured(nn.Module):
    """A network whose forward reads plain Python settings."""

    def __init__(self):
        super().__init__()
        self.inner, self.settings, self.scales = small_net(), {"scale": 1.0}, [1.0]

    def forward(self, images):
        return self.settings["scale"] * self.scales[0] * self.inner(images)


@pytest.mark.parametrize("backend, bn", [("eager", "eval"), ("graphed", "eval"), ("graphed", "train_frozen")])
@pytest.mark.parametrize("change", ["dict", "list", "forward of the model", "forward of a layer", "stride", "hook"])
def test_changed_settings_are_seen(recorder, backend, bn, change):
    """A twin or a graph that went on as before would be attacked in place of the model, which passes for robustness."""
    net, (images, labels) = Configured().eval(), batch(6)
    start = start_of(images)
    engine = attack(backend, bn=bn, start=start)
    engine(net, images, labels)
    if change == "dict":
        net.settings["scale"] = -1.0
    elif change == "list":
        net.scales[0] = -1.0
    elif change == "forward of the model":
        net.forward = lambda images: -net.inner(images)
    elif change == "forward of a layer":
        net.inner[2].forward = lambda x: torch.sin(3 * x)
    elif change == "stride":
        net.inner[0].stride, net.inner[3].stride = (2, 2), (1, 1)
    else:
        net.inner.register_forward_hook(lambda module, args, out: -out)
    expected = attack("reference", bn=bn, start=start)(net, images, labels)
    if change == "hook" and backend == "graphed":
        with pytest.raises(UserError, match="^attack.backend = graphed: the model has hooks"):
            engine(net, images, labels)
    else:
        assert_same_images(engine(net, images, labels), expected, STEP, share=2e-3)


def test_a_failed_capture_inside_autocast_does_not_stick(recorder):
    net, (images, labels) = small_net(), batch(4)
    engine = attack("graphed", start="zero")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="inside torch.autocast"):
        engine(net, images, labels)
    assert torch.equal(engine(net, images, labels), attack("eager", start="zero")(net, images, labels))


def test_a_model_is_looked_at_again_once_its_hooks_are_gone():
    net, (images, labels) = small_net(), batch(4)
    engine = attack("eager")
    hook = net[0].register_forward_hook(lambda *_: None)
    engine(net, images, labels)
    assert engine.engine.notes["folded"].startswith("no: it has hooks")
    hook.remove()
    engine(net, images, labels)
    assert engine.engine.notes["folded"].startswith("yes")


def test_every_shape_is_compiled_however_many(traced_only):
    net, engine = small_net(), PGD(EPS, STEP, 1, backend="compiled")
    for n in range(1, 12):
        assert engine(net, *batch(n)).shape[0] == n
