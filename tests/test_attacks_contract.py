"""What an attack promises: the model and its inputs left as they were, its output, its messages, and no host reads."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import ULP, Counted, assert_same_images, batch, generator, small_net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastanchor.attacks import PGD
from fastanchor.attacks.modes import BN_MODES
from fastanchor.attacks.objectives import with_clean
from fastanchor.errors import UserError
from fastanchor.precision import NO_FP16
from fastanchor.reference import attacks as reference
from fastanchor.reference.objectives import cross_entropy

# -- what is left as it was -------------------------------------------------------------------------------------------------


def state_of(net):
    """Everything of a model that an attack must not change, by name."""
    tensors = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    wanted = {name: p.requires_grad for name, p in net.named_parameters()}
    identities = {name: (id(p), p.data_ptr(), p._version) for name, p in net.named_parameters()}
    flags = {name: (m.training, getattr(m, "track_running_stats", None)) for name, m in net.named_modules()}
    return tensors, gradients, wanted, identities, flags


def assert_same_state(net, before, moving=()):
    tensors, gradients, *others = state_of(net)
    for name, value in before[0].items():
        assert torch.equal(tensors[name], value) or name in moving, name
    for name, value in before[1].items():
        assert (gradients[name] is None) == (value is None), name
        assert value is None or torch.equal(gradients[name], value), name
    assert others == list(before[2:])


def prepare(kind):
    """The small net in a state that a careless attack would spoil."""
    net = small_net()
    if kind == "training":
        net.train()
    elif kind == "mixed flags":
        net.train()
        net[4].eval()
        net[2].eval()
    elif kind == "gradients":
        for i, parameter in enumerate(net.parameters()):
            if i % 2:
                parameter.grad = torch.full_like(parameter, float(i))
    elif kind == "frozen":
        net.requires_grad_(False)
    elif kind == "partly frozen":
        net[0].requires_grad_(False)
    elif kind == "untracked":  # a BatchNorm without running statistics among others
        net[4] = nn.BatchNorm2d(8, track_running_stats=False)
    return net


RUNNING = [f"{layer}.{name}" for layer in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")]
STATES = ["eval", "training", "mixed flags", "gradients", "frozen", "partly frozen", "untracked"]


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("bn", BN_MODES)
@pytest.mark.parametrize("fail_at", [None, 1, 2, 4])
def test_attack_leaves_the_model_as_it_was(kind, bn, fail_at):
    """With and without an exception: at call 1, the look at the inputs; at 2, the first step; at 4, in the middle."""
    net, (images, labels) = prepare(kind), batch()
    before, images_before = state_of(net), images.clone()
    model = Counted(net, fail_at=fail_at)
    model.training = net.training
    attack = PGD(steps=4, bn=bn)
    if fail_at is None:
        attack(model, images, labels, generator=generator())
    else:
        with pytest.raises(RuntimeError, match="the forward broke"):
            attack(model, images, labels, generator=generator())
    assert_same_state(net, before, moving=RUNNING if bn == "train" else ())
    assert model.training == net.training
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch.equal(images, images_before) and not images.requires_grad and images.grad is None


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["zero", "tensor"])
def test_attack_leaves_its_input_tensors_as_they_were(backend, norm, start):
    net, (images, labels) = small_net(), batch()
    images.requires_grad_()
    start = 0.01 * torch.randn(images.shape, generator=generator()) if start == "tensor" else start
    versions = images._version, labels._version, getattr(start, "_version", 0)
    made = PGD(steps=2, norm=norm, start=start, backend=backend, restarts=2)(net, images, labels)
    assert (images._version, labels._version, getattr(start, "_version", 0)) == versions
    assert images.requires_grad and images.is_leaf and images.grad is None
    assert not made.requires_grad and made.grad_fn is None and made.data_ptr() != images.data_ptr()


def test_a_start_or_model_with_gradients_leaks_no_graph():
    net, (images, labels) = small_net(), batch()
    start = torch.zeros_like(images).requires_grad_()
    made = PGD(steps=2, start=start)(net, images, labels)
    assert not made.requires_grad and start.grad is None


def test_gradient_mode_is_kept_and_does_not_matter():
    net, (images, labels) = small_net(), batch()
    attack = PGD(steps=3)
    expected = attack(net, images, labels, generator=generator())
    with torch.no_grad():
        assert torch.equal(attack(net, images, labels, generator=generator()), expected)
        assert not torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match="broke"):
            attack(Counted(net, fail_at=2), images, labels)
        assert not torch.is_grad_enabled()


def test_bn_train_moves_the_running_statistics_once_a_step():
    net, (images, labels) = small_net(), batch()
    twin = copy.deepcopy(net).train()
    attack = PGD(steps=3, bn="train", start="gaussian")
    made = attack(net, images, labels, generator=generator())  # its look at the inputs must not count
    truth = reference.pgd(
        twin, images, labels, eps=8 / 255, step_size=2 / 255, steps=3, objective=cross_entropy,
        start=attack.start_delta(images, generator()),
    )  # fmt: skip
    assert_same_images(made, truth, 2 / 255)
    assert net[1].num_batches_tracked == net[4].num_batches_tracked == 3
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(net[1].running_mean, small_net()[1].running_mean)


@pytest.mark.parametrize("bn, batch_statistics", [("eval", False), ("train", True), ("train_frozen", True)])
def test_bn_mode_decides_which_statistics_are_used(bn, batch_statistics):
    """Seen from the objective: the logits of the first step are those of the eval or of the train mode."""
    net, (images, labels) = small_net(), batch()
    with torch.no_grad():
        expected = {False: net(images), True: copy.deepcopy(net).train()(images)}
    seen = []

    def objective(logits, labels):
        seen.append(logits.detach().clone())
        return cross_entropy(logits, labels)

    PGD(steps=2, bn=bn, start="zero", objective=objective)(net, images, labels)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], expected[batch_statistics], rtol=1e-5, atol=1e-5)
    assert (seen[0] - expected[not batch_statistics]).abs().max() > 0.1


# -- the output -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero", "tensor"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.7])
def test_output_contract(backend, norm, start, precision, eps):
    net, (images, labels) = small_net(), batch(4)
    start = torch.randn(images.shape, generator=generator()) if start == "tensor" else start
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given_images = images.to(memory_format=memory_format)
        attack = PGD(eps, 0.1, 2, norm=norm, start=start, backend=backend, precision=precision, restarts=2)
        made = attack(net, given_images, labels, generator=generator())
        assert made.dtype == torch.float32 and made.shape == images.shape
        assert made.is_contiguous(memory_format=memory_format)
        assert made.min() >= 0 and made.max() <= 1
        delta = made.double() - images.double()
        if norm == "linf":
            assert delta.abs().max() <= eps + ULP
        else:
            assert delta.flatten(1).norm(dim=1).max() <= eps * (1 + 1e-5) + ULP * math.sqrt(images[0].numel())
        if eps == 0:
            assert torch.equal(made, images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_of_another_dtype_come_back_as_fp32(dtype):
    net, (images, labels) = small_net(), batch(4)
    made = PGD(steps=1)(net, images.to(dtype), labels, generator=generator())
    assert made.dtype == torch.float32
    assert torch.equal(made, PGD(steps=1)(net, images.to(dtype).float(), labels, generator=generator()))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bf16_runs_the_model_under_autocast_and_keeps_the_perturbation_fp32(norm):
    net, (images, labels) = small_net(), batch()
    dtypes, inputs = set(), set()

    def note_dtypes(module, args, out):
        dtypes.add(out.dtype)
        inputs.add(args[0].dtype)

    net[0].register_forward_hook(note_dtypes)
    seen = set()

    def objective(logits, labels):
        seen.add((logits.dtype, torch.is_autocast_enabled("cpu")))
        return cross_entropy(logits, labels)

    attack = PGD(steps=3, precision="bf16", norm=norm, objective=objective, check_inputs=False)
    made = attack(net, images, labels, generator=generator())
    assert dtypes == {torch.bfloat16} and inputs == {torch.float32}
    assert seen == {(torch.float32, False)}
    for values in (made, made - images):
        assert (values.bfloat16().float() != values).double().mean() > 0.5
    exact = PGD(steps=3, norm=norm)(net, images, labels, generator=generator())
    assert (made - exact).abs().mean() < 0.3 * (exact - images).abs().mean()


def test_an_outer_autocast_region_changes_nothing():
    net, (images, labels) = small_net(), batch()
    for precision in ("fp32", "bf16"):
        for norm in ("linf", "l2"):
            attack = PGD(steps=3, norm=norm, precision=precision, restarts=2)
            expected = attack(net, images, labels, generator=generator())
            with torch.autocast("cpu", torch.bfloat16):
                again = PGD(steps=3, norm=norm, precision=precision, restarts=2)
                assert torch.equal(again(net, images, labels, generator=generator()), expected)
                assert torch.is_autocast_enabled("cpu")


def test_training_after_an_attack_in_the_same_autocast_region_gets_its_gradients():
    """Autocast keeps the casts of weights: those made without gradient inside the attack must not reach the training forward."""
    net, (images, labels) = small_net(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        attacked = PGD(steps=1, precision="bf16", objective=with_clean(lambda out, y, clean: (out - clean).square().sum(1)))(
            net, images, labels, generator=generator()
        )
        loss = F.cross_entropy(net(attacked).float(), labels)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


# -- objectives that look at the clean images -------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", BN_MODES)
@pytest.mark.parametrize("check_inputs", [False, True])
@pytest.mark.parametrize("restarts", [1, 3])
def test_clean_outputs_are_computed_once_in_the_mode_of_the_attack(bn, check_inputs, restarts):
    net, (images, labels) = small_net().train(), batch()
    expected = copy.deepcopy(net).train(bn != "eval")(images).detach()
    cleans = []

    @with_clean
    def distance(outputs, labels, clean):
        cleans.append(clean)
        assert not clean.requires_grad
        return (outputs - clean).square().sum(1)

    def mode(model):
        return model.inner[1].training, model.inner[1].track_running_stats

    model = Counted(net, observe=mode)
    PGD(steps=3, bn=bn, objective=distance, start="gaussian", restarts=restarts, check_inputs=check_inputs)(
        model, images, labels, generator=generator()
    )
    # one look at the inputs, one clean forward, the steps, and the judging of each restart
    assert model.calls == check_inputs + 1 + 3 * restarts + (restarts if restarts > 1 else 0)
    assert all(clean is cleans[0] for clean in cleans)
    torch.testing.assert_close(cleans[0], expected, rtol=1e-5, atol=1e-5)
    assert set(model.seen[check_inputs:]) == {(bn != "eval", bn != "train_frozen")}


def test_plain_objectives_cost_one_forward_a_step():
    net, (images, labels) = small_net(), batch()
    model = Counted(net)
    attack = PGD(steps=7)
    attack(model, images, labels)
    assert model.calls == 8  # the values of the first batch are looked at
    attack(model, images, labels)
    assert model.calls == 15  # of later ones not


def test_outputs_may_be_a_tuple_that_starts_with_the_logits(tiny_model):
    class WithEmbeddings(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images, embed=True)

    images, labels = batch(3, size=32, classes=10)
    shapes = set()

    def objective(outputs, labels):
        shapes.add((tuple(outputs[0].shape), tuple(outputs[1].shape)))
        return cross_entropy(outputs[0], labels)

    made = PGD(steps=2, objective=objective)(WithEmbeddings(tiny_model), images, labels, generator=generator())
    assert shapes == {((3, 10), (3, 8))}
    assert torch.equal(made, PGD(steps=2)(tiny_model, images, labels, generator=generator()))


# -- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bn": "evla"}, "bn = 'evla': must be one of eval, train, train_frozen; did you mean 'eval'?"),
        ({"bn": "train-frozen"}, "bn = 'train-frozen': must be one of eval, train, train_frozen; did you mean 'train_frozen'?"),
        ({"bn": True}, "bn = bool: must be one of eval, train, train_frozen"),
        ({"norm": "l1"}, "norm = 'l1': must be one of linf, l2; did you mean 'l2'?"),
        ({"norm": "Linf"}, "norm = 'Linf': must be one of linf, l2; did you mean 'linf'?"),
        ({"precision": "fp16"}, "precision = 'fp16': " + NO_FP16),
        ({"backend": "autox"}, "backend = 'autox': must be one of auto, reference, eager, compiled, graphed; did you mean 'auto'?"),
        ({"start": "unifrom"}, "start = 'unifrom': must be one of uniform, bernoulli, gaussian, zero or a delta tensor; did you mean 'uniform'?"),
        ({"start": None}, "start = NoneType: must be one of uniform, bernoulli, gaussian, zero or a delta tensor"),
        ({"objective": "dlr"}, "objective = 'dlr': must be one of ce, cw, kl, or a callable(logits, labels)"),
        ({"objective": "cee"}, "objective = 'cee': must be one of ce, cw, kl, or a callable(logits, labels); did you mean 'ce'?"),
        ({"objective": 3}, "objective = 3: must be one of ce, cw, kl, or a callable(logits, labels)"),
        ({"eps": -0.1}, "eps = -0.1: must be a finite number >= 0"),
        ({"eps": float("nan")}, "eps = nan: must be a finite number >= 0"),
        ({"eps": float("inf")}, "eps = inf: must be a finite number >= 0"),
        ({"eps": "8/255"}, "eps = '8/255': must be a finite number >= 0"),
        ({"step_size": 0}, "step_size = 0: must be a finite number > 0"),
        ({"step_size": -1.0}, "step_size = -1.0: must be a finite number > 0"),
        ({"step_size": None}, "step_size = None: must be a finite number > 0"),
        ({"steps": 0}, "steps = 0: must be a whole number >= 1"),
        ({"steps": 2.5}, "steps = 2.5: must be a whole number >= 1"),
        ({"steps": True}, "steps = True: must be a whole number >= 1"),
        ({"restarts": 0}, "restarts = 0: must be a whole number >= 1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        PGD(**arguments)
    assert str(error.value) == message


def refused(images, labels, inner=None, **options):
    """The message, and the number of forwards before it."""
    model = Counted(small_net() if inner is None else inner)
    with pytest.raises(UserError) as error:
        PGD(**options)(model, images, labels)
    assert "\n" not in str(error.value)
    return str(error.value), model.calls


def test_bad_images_are_refused_before_the_first_forward():
    images, labels = batch()
    low, high = (images - 0.5, labels), (images * 255, labels)
    assert refused(*low) == (
        "the images' values lie in [-0.5, 0.5]: must be in [0, 1]; normalisation belongs inside the model",
        0,
    )
    assert refused(*high) == ("the images' values lie in [0, 255]: must be in [0, 1]; normalisation belongs inside the model", 0)
    spoilt = images.clone()
    spoilt[3, 1, 2, 2] = float("nan")
    message, calls = refused(spoilt, labels)
    assert message.startswith("the images' values lie in [nan, nan]: must be in [0, 1]") and calls == 0
    assert refused(images[0], labels) == ("images have shape (3, 8, 8): must be (N, C, H, W), none of them 0", 0)
    assert refused(images[:0], labels[:0]) == ("images have shape (0, 3, 8, 8): must be (N, C, H, W), none of them 0", 0)
    assert refused(images.numpy(), labels) == ("images are of type ndarray: must be a tensor", 0)


def test_bad_labels_are_refused_before_the_first_step():
    images, labels = batch(4)
    must = "must be (4,) int64"
    assert refused(images, labels.int()) == (f"labels have shape (4,) and dtype torch.int32: {must}", 0)
    assert refused(images, labels.float()) == (f"labels have shape (4,) and dtype torch.float32: {must}", 0)
    assert refused(images, labels[:3]) == (f"labels have shape (3,) and dtype torch.int64: {must}", 0)
    assert refused(images, F.one_hot(labels, 5)) == (f"labels have shape (4, 5) and dtype torch.int64: {must}", 0)
    assert refused(images, labels.tolist()) == ("labels are of type list: must be a tensor", 0)
    one = "must be in [0, 4], the model has 5 classes"
    assert refused(images, torch.tensor([0, 1, 2, 5])) == (f"labels lie in [0, 5]: {one}", 1)
    assert refused(images, torch.tensor([0, -1, 2, 4])) == (f"labels lie in [-1, 4]: {one}", 1)


class Reshaped(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.net, self.change = small_net(), change

    def forward(self, images):
        return self.change(self.net(images))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda out: out[:, :, None, None], "the model's output has shape (1, 5, 1, 1) for 1 images: must be (1, classes)"),
        (lambda out: out[:, 0], "the model's output has shape (1,) for 1 images: must be (1, classes)"),
        (lambda out: torch.cat([out, out]), "the model's output has shape (2, 5) for 1 images: must be (1, classes)"),
        (lambda out: (out[0], out), "the model's output has shape (5,) for 1 images: must be (1, classes)"),
        (lambda out: {"logits": out}, "the model returns dict: must be a tensor of logits, or a tuple of tensors that starts with it"),
        (lambda out: (out, None), "the model returns tuple: must be a tensor of logits, or a tuple of tensors that starts with it"),
        (lambda out: (), "the model returns tuple: must be a tensor of logits, or a tuple of tensors that starts with it"),
    ],
)  # fmt: skip
def test_wrong_outputs_are_refused_at_the_first_look(change, message):
    images, labels = batch(4)
    assert refused(images, labels, Reshaped(change)) == (message, 1)


def test_wrong_outputs_are_refused_without_the_look_at_values_too():
    images, labels = batch(4)
    message = "the model's output has shape (4, 5, 1) for 4 images: must be (4, classes)"
    assert refused(images, labels, Reshaped(lambda out: out[..., None]), check_inputs=False) == (message, 1)


def test_start_tensor_of_another_shape_is_refused():
    images, labels = batch(4)
    message, _ = refused(images, labels, start=torch.zeros(3, 3, 8, 8))
    assert message == "start delta has shape (3, 3, 8, 8), the images (4, 3, 8, 8)"


def test_inference_mode_is_refused_with_a_way_out():
    images, labels = batch(4)
    with torch.inference_mode():
        message, calls = refused(images, labels)
    assert "torch.inference_mode forbids" in message and "torch.no_grad" in message and calls == 0


# -- no host reads ----------------------------------------------------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Raises at every operation that would make a GPU's host wait."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "nonzero_static",
        "masked_select",
        "equal",
        "is_nonzero",
        "unique_dim",
        "_unique2",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in self.FORBIDDEN or by_mask:
            raise AssertionError(f"host read: {name}")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_host_reads(monkeypatch):
    """The mode, and the reads that bypass dispatch on a CPU made to fail as well."""

    def forbidden(*_, **__):
        raise AssertionError("host read")

    for name in ("tolist", "numpy", "cpu", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    return NoHostReads


@pytest.mark.parametrize(
    "read",
    [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x[x > 0], lambda x: x.tolist(), lambda x: x.nonzero(),
     lambda x: torch.masked_select(x, x > 0), lambda x: f"{x[0]:g}", lambda x: torch.equal(x, x)],
)  # fmt: skip
def test_the_check_for_host_reads_sees_them(no_host_reads, read):
    with pytest.raises(AssertionError, match="host read"), no_host_reads():
        read(torch.ones(3))


@with_clean
def away_from_clean(outputs, labels, clean):
    return (outputs - clean).square().sum(1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", ["ce", "cw", away_from_clean])
@pytest.mark.parametrize("bn", BN_MODES)
def test_attack_reads_nothing_back(no_host_reads, backend, norm, objective, bn):
    net, (images, labels) = small_net(), batch(4)
    for start, precision in (("uniform", "fp32"), ("gaussian", "bf16"), ("zero", "fp32"), (torch.zeros_like(images), "bf16")):
        attack = PGD(
            steps=2, norm=norm, objective=objective, bn=bn, start=start, precision=precision, backend=backend, restarts=2,
            check_inputs=False,
        )  # fmt: skip
        attack(net, images, labels, generator=generator())  # on first sight the folded twin is compared with the network
        with no_host_reads():
            attack(net, images, labels, generator=generator())


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["ce", "cw", away_from_clean])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_never_waits_for_the_gpu(objective, norm):
    net, (images, labels) = small_net().cuda(), batch(4)
    images, labels, source = images.cuda(), labels.cuda(), torch.Generator("cuda").manual_seed(0)
    attack = PGD(steps=2, norm=norm, objective=objective, restarts=2, check_inputs=False)
    attack(net, images, labels, generator=source)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = attack(net, images, labels, generator=source)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made.min() >= 0 and made.max() <= 1
