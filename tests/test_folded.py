"""The BN-folded twin against its model: in fp64 to rounding, on trained weights, in every pattern it rewrites, or not at all."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import Counted, assert_same_images
from foreign_models import (
    CHANNELS,
    OTHER_KINDS,
    PATTERNS,
    REFUSED,
    Answering,
    Around,
    Plain,
    caching,
    conv,
    norm,
    pattern,
    scramble,
    two,
    unchanged,
    usual,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from fastanchor.attacks import PGD
from fastanchor.attacks.modes import attack_mode
from fastanchor.data import sources
from fastanchor.errors import UserError
from fastanchor.models import build_model, folded
from fastanchor.models.folded import CannotFold, fold
from fastanchor.precision import full_precision
from fastanchor.reference import attacks as reference
from fastanchor.reference.objectives import cross_entropy

NETS = {"resnet18": 8, "preactresnet18": 8, "wrn10_1": 16}
EPS, STEP = 16 / 255, 4 / 255


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def outputs_and_gradient(net, x):
    """All outputs, and the gradient of a weighted sum of them with respect to the input."""
    x = x.detach().clone().requires_grad_()
    outputs = net(x)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    weights = (torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out) for out in outputs)
    (gradient,) = torch.autograd.grad(sum((out.double() * w).sum() for out, w in zip(outputs, weights, strict=True)), x)
    return [*(out.detach() for out in outputs), gradient]


def outputs_alone(net, x):
    with torch.no_grad():
        outputs = net(x)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def gap(found, expected):
    """Largest difference, relative to the largest value."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def assert_equal(twin, net, x, tolerance=1e-12, of=outputs_and_gradient):
    for ours, theirs in zip(of(twin, x), of(net, x), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and gap(ours, theirs) <= tolerance


def norms_of(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


# -- trained weights --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Images (N, 3, 16, 16) in [0, 1] and labels: 640 to train on, 96 to attack."""
    data = sources.load("digits").train
    images = F.avg_pool2d(data.images[:736].permute(0, 3, 1, 2).float() / 255, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    return (images[:640], data.labels[:640]), (images[640:], data.labels[640:736])


@pytest.fixture(scope="module")
def trained(digits):
    """Nets after a few epochs of noisy digits: nothing in them is as it was initialised. Not to be changed."""
    (images, labels), _ = digits
    nets = {}
    for name, width in NETS.items():
        torch.manual_seed(0)
        net = build_model(name, num_classes=10, width=width, head="identity", mean=(0.3,) * 3, std=(0.4,) * 3)
        net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for _ in range(3):
            for batch in torch.randperm(640).split(32):
                x = (images[batch] + torch.empty(len(batch), 3, 16, 16).uniform_(-EPS, EPS)).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(net(x), labels[batch]).backward()
                optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.4
        nets[name] = net.eval()
        for module in norms_of(net):
            assert min(module.running_mean.std(), module.running_var.std()) > 0.01
            assert min(module.weight.std(), module.bias.std()) > 1e-4
    return nets


@pytest.mark.parametrize(
    "name, folds, keeps, layers", [("resnet18", 20, 0, 20), ("preactresnet18", 8, 9, 20), ("wrn10_1", 3, 4, 9)]
)
def test_twin_equals_its_trained_model(trained, digits, name, folds, keeps, layers):
    net, (x, _) = trained[name], digits[1]
    twin = fold(net, x[:2])
    assert (twin.folded, twin.kept, len(twin.layers)) == (folds, keeps, layers)
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in twin.layers)
    double, exact_x = copy.deepcopy(net).double(), x[:16].double()
    assert_equal(fold(double, exact_x[:2]), double, exact_x)
    with full_precision(), torch.no_grad():
        logits, truth = twin(x), double(x.double())
        assert gap(logits, net(x)) <= 1e-5
        assert gap(logits, truth) <= 3 * gap(net(x), truth) <= 1e-5


def test_memory_format_of_model_and_images_does_not_matter(trained, digits):
    """The twin's own weights are channels-last whatever the model's are."""
    net, (x, _) = trained["resnet18"], digits[1]
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for model, images in ((net, x), (net, x.contiguous()), (plain, x), (plain, x.contiguous())):
        assert_equal(fold(model, images[:2]), net, images, 1e-5, outputs_alone)


@pytest.mark.parametrize("kind", ["spread", "tiny", "huge", "zero scale", "no affine"])
@pytest.mark.parametrize("name", NETS)
def test_extreme_statistics(trained, digits, name, kind):
    """Variances over twelve decades, scales that are negative or 0: equal in fp64, and in fp32 as near to it as the model is."""
    net, (x, _) = copy.deepcopy(trained[name]), digits[1]
    g = torch.Generator().manual_seed(1)
    for i, module in enumerate(norms_of(net)):
        if kind == "spread":  # scale / deviation stays near 1, or a deep net overflows
            module.running_var.copy_(10 ** module.running_var.uniform_(-6, 6, generator=g))
            module.weight.data.normal_(0, 1, generator=g).mul_((module.running_var + module.eps).sqrt())
            module.running_mean.normal_(0, 1, generator=g)
        elif kind in ("tiny", "huge") and i % 4 == 1:
            module.running_var.mul_(1e-9 if kind == "tiny" else 1e9)
        elif kind == "zero scale":
            module.weight.data[::2] = 0
            module.weight.data[1::4] *= -1
        elif kind == "no affine":
            module.weight, module.bias = None, None
    double = copy.deepcopy(net).double()
    assert_equal(fold(double, x[:2].double()), double, x[:8].double(), 1e-11)
    with torch.no_grad(), full_precision():
        truth = double(x.double())
        assert gap(fold(net, x[:2])(x), truth) <= max(1e-5, 3 * gap(net(x), truth))


def share_of_different(ours, theirs):
    return ((ours.double() - theirs.double()).abs() > 1e-6).double().mean()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("objective, share", [("ce", 1e-2), ("kl", 5e-2)])
def test_attack_success_is_that_of_the_reference(trained, digits, name, objective, share):
    """PGD-10 from one start: the same images but for a few pixels, so the same accuracy; as near to fp64 as the reference is.

    More pixels differ with KL: beside the clean images its gradient is a difference of nearly equal probabilities.
    """
    net, (x, y) = trained[name], digits[1]
    start = torch.empty_like(x).uniform_(-EPS, EPS, generator=torch.Generator().manual_seed(3)) * (
        1 if objective == "ce" else 0.1
    )
    attacks = [PGD(EPS, STEP, 10, objective, start=start, backend=backend) for backend in ("eager", "reference")]
    ours, theirs = (attack(net, x, y) for attack in attacks)
    assert attacks[0].engine.notes["folded"].startswith("yes")
    assert share_of_different(ours, theirs) <= share
    if objective == "ce":
        double = copy.deepcopy(net).double()
        truth = reference.pgd(
            double, x.double(), y, eps=EPS, step_size=STEP, steps=10, objective=cross_entropy, start=start.double()
        )
        assert share_of_different(ours, truth) <= 2 * share_of_different(theirs, truth) + 5e-3
    with torch.no_grad():
        clean, robust, expected = ((net(images).argmax(1) == y).sum() for images in (x, ours, theirs))
    assert abs(robust - expected) <= 1 and robust < 0.8 * clean


# -- half precision ---------------------------------------------------------------------------------------------------------------


class ConvolutionTypes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            self.seen.add(tuple(arg.dtype for arg in args[:2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETS)
def test_bf16_twin(trained, digits, name):
    """As near to fp32 as autocast on the model itself is, all convolutions in bf16."""
    net, (x, _) = trained[name], digits[1]
    twin, modes = fold(net, x[:2], torch.bfloat16), ConvolutionTypes()
    with torch.autocast("cpu", torch.bfloat16):
        with modes:
            logits, gradient = outputs_and_gradient(twin, x)
        cast, cast_gradient = outputs_and_gradient(net, x)
    expected, expected_gradient = outputs_and_gradient(net, x)
    assert modes.seen == {(torch.bfloat16, torch.bfloat16)} and gradient.dtype == torch.float32
    error, of_autocast = ((found.double() - expected).norm() / expected.norm() for found in (logits, cast))
    assert 1e-4 < error < 0.02 and error < 2 * of_autocast
    cosine = [F.cosine_similarity(found.flatten(), expected_gradient.flatten(), dim=0) for found in (gradient, cast_gradient)]
    assert cosine[0] > 0.95 and cosine[0] > cosine[1] - 0.02


def test_a_model_in_bf16_is_folded_in_bf16():
    net, x = pattern("residual").float(), noise(4, 3, 8, 8).float()
    half = copy.deepcopy(net).bfloat16()
    twin = fold(half, x.bfloat16())
    assert twin(x.bfloat16()).dtype == torch.bfloat16 and {layer.weight.dtype for layer in twin.layers} == {torch.bfloat16}
    assert gap(twin(x.bfloat16()), net(x)) < 0.03


def test_each_convolution_keeps_its_own_dtype():
    net = Plain(lambda net, x: net.e(net.d(F.relu(net.b(net.c(x.float()))).double())), two)
    net.c.float(), net.b.float()
    x = noise(2, 3, 8, 8)
    twin = fold(net, x)
    assert [layer.weight.dtype for layer in twin.layers] == [torch.float64, torch.float32, torch.float64]
    assert_equal(twin, net, x, 1e-5)


# -- following the model ----------------------------------------------------------------------------------------------------------


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense, "a value was read back"
        return func(*args, **(kwargs or {}))


def small_resnet(seed=0):
    torch.manual_seed(seed)
    return scramble(build_model("resnet18", num_classes=5, width=4, head="identity").double(), seed)


def optimizer_step(net):
    net(noise(4, 3, 16, 16)).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=1e-3).step()


def average(net):
    with torch.no_grad():
        for mine, other in zip(net.parameters(), small_resnet(1).parameters(), strict=True):
            mine.lerp_(other, 0.3)


def train_forward(net):
    net.train()(noise(4, 3, 16, 16))
    net.eval()


def copy_data(net):
    for parameter in net.parameters():
        parameter.data.copy_(parameter.data * 1.1)


def new_data(net):
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.1


CHANGES = {
    "optimizer": optimizer_step, "average": average, "state dict": lambda net: net.load_state_dict(small_resnet(1).state_dict()),
    "data copy": copy_data, "new data": new_data, "statistics": train_forward,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_refresh_follows_the_model_in_the_same_memory(change):
    net, x = small_resnet(), noise(3, 3, 16, 16, seed=1)
    twin = fold(net, x)
    places = [(layer.weight.data_ptr(), layer.bias.data_ptr()) for layer in twin.layers]
    CHANGES[change](net)
    with torch.no_grad():
        assert gap(twin(x), net(x)) > 1e-3
    assert twin.is_of(net)
    twin.refresh()
    assert_equal(twin, net, x)
    assert [(layer.weight.data_ptr(), layer.bias.data_ptr()) for layer in twin.layers] == places
    assert not any(layer.weight.requires_grad for layer in twin.layers)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_on_the_twin_reads_nothing_back_and_writes_nothing(dtype):
    net, x = small_resnet().float(), noise(2, 3, 16, 16).float()
    twin = fold(net, x, dtype)
    tensors = [*net.parameters(), *net.buffers()]
    versions, memory = [t._version for t in tensors], [layer.weight.data_ptr() for layer in twin.layers]
    with NoHostRead(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        twin.refresh()
        outputs_and_gradient(twin, x)
    assert [t._version for t in tensors] == versions and all(t.grad is None for t in tensors)
    assert [layer.weight.data_ptr() for layer in twin.layers] == memory


def test_twin_and_model_do_not_keep_each_other():
    net, x = small_resnet(), noise(2, 3, 16, 16)
    twin = fold(net, x)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    net = small_resnet()
    twin = fold(net, x)
    gone, weight = weakref.ref(twin), weakref.ref(twin.layers[0].weight)
    del twin
    gc.collect()
    assert gone() is None and weight() is None and net(x).shape == (2, 5)


def replace_parameter(net):
    net.backbone.bn1.weight = nn.Parameter(net.backbone.bn1.weight.data.clone())


def replace_all_tensors(net):
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)


REPLACEMENTS = {
    "module": lambda net: setattr(net.backbone, "conv1", copy.deepcopy(net.backbone.conv1)),
    "pooling": lambda net: setattr(net.backbone, "pool", nn.AdaptiveMaxPool2d(1)),
    "classifier": lambda net: net.replace_classifier(3), "parameter": replace_parameter, "all tensors": replace_all_tensors,
    "buffer": lambda net: setattr(net.backbone.bn1, "running_mean", net.backbone.bn1.running_mean.clone()),
    "float": lambda net: net.float(), "bfloat16": lambda net: net.to(torch.bfloat16),
    "data": lambda net: [setattr(parameter, "data", parameter.data.float()) for parameter in net.parameters()],
    "activation": lambda net: setattr(net, "act", nn.Tanh().eval()),
    "parametrised": lambda net: parametrizations.weight_norm(net.backbone.conv1),
    "eps": lambda net: setattr(net.backbone.bn1, "eps", 1e-2), "stride": lambda net: setattr(net.backbone.conv1, "stride", (2, 2)),
    "tensor": lambda net: setattr(net, "factor", net.factor + 1), "number": lambda net: setattr(net, "power", 3),
    "forward hook": lambda net: net.backbone.bn1.register_forward_hook(lambda *_: None),
    "pre-hook": lambda net: net.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda net: net.backbone.conv1.register_full_backward_hook(lambda *_: None),
}  # fmt: skip


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_twin_notices_what_refresh_cannot_follow(replacement):
    net, x = small_resnet(), noise(2, 3, 16, 16)
    net.factor, net.power, net.act = torch.ones(()), 2, nn.Sigmoid()
    net.eval()
    twin = fold(net, x)
    assert twin.is_of(net)
    REPLACEMENTS[replacement](net)
    assert not twin.is_of(net)


def test_twin_stays_where_refresh_can_follow():
    net, x = small_resnet(), noise(2, 3, 16, 16)
    twin = fold(net, x)
    for use in (*CHANGES.values(), lambda net: net.requires_grad_(False), lambda net: net.zero_grad()):
        use(net)
        assert twin.is_of(net)
    for bn in ("eval", "train", "train_frozen"):
        with attack_mode(net, bn), torch.no_grad():
            net(x)
    assert twin.is_of(net) and not twin.is_of(small_resnet())


def test_what_a_forward_computes_from_its_tensors_is_computed_anew():
    """Also from buffers, and from tensors that are neither: tracing must not freeze them."""
    net = Around(lambda net, x: x * net.scale.exp() + net.shift.mul(2).view(1, 3, 1, 1) + net.plain)
    net.register_buffer("scale", torch.zeros(1, dtype=torch.float64))
    net.shift, net.plain = nn.Parameter(torch.zeros(3, dtype=torch.float64)), torch.zeros(1, dtype=torch.float64)
    x = noise(2, 3, 8, 8)
    twin = fold(net, x)
    for change in (net.scale.add_, net.shift.data.add_, net.plain.add_):
        before = net(x)
        change(0.5)
        assert gap(net(x), before) > 1e-3 and twin.is_of(net)
        twin.refresh()
        assert_equal(twin, net, x)


# -- patterns ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unverified(monkeypatch):
    """Without the comparison at the end of `fold`, which would hide a wrong rewriting."""
    monkeypatch.setattr(folded, "_verify", lambda *_: None)


def sums_taken_in(twin):
    return sum(len(node.args) == 2 for node in twin.graph_module.graph.nodes if str(node.target).startswith("folded_"))


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_is_rewritten_and_right(name, unverified):
    net, x = pattern(name), noise(3, 3, 8, 8)
    twin = fold(net, x)
    found = len(twin.layers) - 1, twin.folded, twin.kept, sum(layer.relu for layer in twin.layers), sums_taken_in(twin)
    assert found == PATTERNS[name][2:]
    # autograd refuses a convolution whose input was written into; the values are compared all the same.
    of = outputs_alone if name.startswith("input written") else outputs_and_gradient
    assert_equal(twin, net, x, of=of)
    for values in net.state_dict().values():
        if values.is_floating_point():
            values.mul_(1.25)
    twin.refresh()
    assert_equal(twin, net, x, of=of)
    assert_equal(twin, net, noise(5, 3, 10, 10, seed=2), of=of)


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_passes_the_comparison(name):
    net, x = pattern(name), noise(2, 3, 8, 8)
    if name.startswith("input written"):
        with pytest.raises(CannotFold, match="modified by an inplace operation"):
            fold(net, x)
    else:
        assert_equal(fold(net, x), net, x)


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_convolutions_and_norms_of_another_kind_stay(name, unverified):
    layers, convolutions = OTHER_KINDS[name]
    net, x = Plain(usual, layers), noise(2, 3, 8, 8)
    twin = fold(net, x)
    assert (len(twin.layers) - 1, twin.folded) == (convolutions, 0)
    assert_equal(twin, net, x)


def test_images_are_channels_last_in_attacks_whatever_the_model_does_to_them():
    """`view` cannot flatten channels-last images, which is the layout that attacks on a twin use."""

    class Sides(Plain):
        def forward(self, images):
            return super().forward(images) + images.view(images.size(0), -1)[:, :5]

    net, x, y = Sides(usual, lambda: {"c": conv(), "b": norm()}).float(), noise(4, 3, 8, 8).float(), torch.arange(4)
    start = (noise(4, 3, 8, 8, seed=1).float() - 0.5) / 10
    attacks = [PGD(steps=3, start=start, backend=backend) for backend in ("eager", "reference")]
    assert_same_images(*(attack(net, x, y) for attack in attacks), 2 / 255)
    assert attacks[0].engine.notes["folded"] == "yes: 1 BatchNorms in 2 convolutions"


# -- random nets ------------------------------------------------------------------------------------------------------------------

LAYERS = {
    "conv": conv, "conv bias": lambda: conv(bias=True), "depthwise": lambda: conv(groups=CHANNELS), "norm": norm,
    "plain norm": lambda: norm(affine=False), "relu": nn.ReLU, "relu in place": lambda: nn.ReLU(inplace=True),
    "identity": nn.Identity, "dropout": nn.Dropout,
}  # fmt: skip
FUNCTIONS = {
    "functional relu": lambda x, y: F.relu(x), "method relu": lambda x, y: x.relu_(), "sum": lambda x, y: x + y,
    "sum first": lambda x, y: y + x, "sum in place": lambda x, y: x.add_(y), "other in place": lambda x, y: y.add_(x),
    "sum with factor": lambda x, y: torch.add(x, y, alpha=2), "product": lambda x, y: x * 0.5, "written": lambda x, y: y.mul_(0.9),
    "in place by keyword": lambda x, y: F.relu(y, inplace=True),
}  # fmt: skip
BLOCKS = [
    ["conv", "norm"],
    ["conv", "norm", "relu"],
    ["conv", "norm", "sum", "functional relu"],
    ["conv bias", "sum first", "relu"],
]


class RandomNet(nn.Module):
    """Operations one after the other, each on one or two of the values made so far (0: the last one)."""

    def __init__(self, program, shown, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.program, self.shown = program, shown
        self.stem = nn.Conv2d(3, CHANNELS, 1)
        self.layers = nn.ModuleDict({str(i): LAYERS[name]() for i, (name, _, _) in enumerate(program) if name in LAYERS})
        scramble(self.double(), seed).requires_grad_(False)

    def forward(self, images):
        values = [torch.sin(self.stem(images))]
        for i, (name, first, second) in enumerate(self.program):
            x, y = values[-1 - first % len(values)], values[-1 - second % len(values)]
            values.append(self.layers[str(i)](x) if name in LAYERS else FUNCTIONS[name](x, y))
        return tuple(values[-1 - i % len(values)].mean((2, 3)) for i in (0, *self.shown))


near = st.sampled_from([0, 0, 0, 0, 1, 2])
operations = st.tuples(st.sampled_from([*LAYERS, *FUNCTIONS]), near, st.integers(0, 5)).map(lambda operation: [operation])
blocks = st.tuples(st.sampled_from(BLOCKS), st.integers(1, 5)).map(lambda drawn: [(name, 0, drawn[1]) for name in drawn[0]])
parts = st.lists(st.one_of(blocks, operations), min_size=1, max_size=7)


@settings(max_examples=200)
@given(parts, st.lists(st.integers(0, 5), max_size=2), st.integers(0, 3))
def test_no_random_net_is_rewritten_wrongly(program, shown, seed):
    """Without the comparison that `fold` ends with: the rewriting alone has to be right."""
    net, x = RandomNet([operation for part in program for operation in part], shown, seed), noise(2, 3, 4, 4, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folded, "_verify", lambda *_: None)
        twin = fold(net, x)
    assert_equal(twin, net, x, of=outputs_alone)
    try:
        outputs_and_gradient(net, x)
    except RuntimeError:  # the net writes into what autograd needs: nothing can attack it
        return
    assert_equal(twin, net, x)


# -- what is not folded -----------------------------------------------------------------------------------------------------------


def attributes_of(net):
    """Identity of every attribute, and the length of lists."""
    return [{k: (id(v), len(v) if isinstance(v, list) else None) for k, v in vars(m).items()} for m in net.modules()]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_left_as_it_was(name):
    make, reason = REFUSED[name]
    net, x = make().requires_grad_(False), noise(2, 3, 8, 8)
    attributes, state, random_state = attributes_of(net), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.raises(CannotFold, match=reason) as caught:
        fold(net, x)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert attributes_of(net) == attributes
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spoil", [lambda t: t.fill_(float("nan")), lambda t: t.mul_(1.01), lambda t: t.zero_()])
def test_the_comparison_sees_a_wrong_twin(spoil):
    net, x = pattern("two branches").float(), noise(2, 3, 8, 8).float()
    twin = fold(net, x)
    folded._verify(net, twin, x)
    spoil(twin.layers[1].weight)
    with pytest.raises(CannotFold, match="what torch.fx traced is another function"):
        folded._verify(net, twin, x)


def test_a_cache_does_not_keep_what_tracing_left_in_it():
    net, x = Around(caching, cache=None), noise(2, 3, 8, 8)
    with pytest.raises(CannotFold):
        fold(net, x)
    assert torch.equal(net(x), net.net(x)) and isinstance(net.cache, torch.Tensor)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [DataParallel, DistributedDataParallel])
def test_of_a_wrapper_for_parallel_training_the_module_inside_is_folded(wrap, one_process):
    net, x, y = small_resnet().float(), noise(4, 3, 16, 16).float(), torch.arange(4)
    wrapped = wrap(net, device_ids=[] if wrap is DataParallel else None)
    start = (noise(4, 3, 16, 16, seed=1).float() - 0.5) / 10
    theirs = PGD(steps=2, start=start, backend="reference")(copy.deepcopy(net), x, y)
    attack = PGD(steps=2, start=start, backend="eager")
    for _ in range(2):
        assert_same_images(attack(wrapped, x, y), theirs, 2 / 255)
        assert attack.engine.notes["folded"] == "yes: 20 BatchNorms in 20 convolutions"
        wrapped.train()
        F.cross_entropy(wrapped(x), y).backward()  # changes the wrapper's own attributes
        with torch.no_grad():
            net.load_state_dict(small_resnet().float().state_dict())
    twin = attack.engine._twins[wrapped]
    assert twin.is_of(wrapped.eval()) and twin.is_of(net)
    net.backbone.conv1 = copy.deepcopy(net.backbone.conv1)
    assert not twin.is_of(wrapped)
    hook = wrapped.register_forward_hook(lambda *_: None)
    with pytest.raises(CannotFold, match="it has hooks"):
        fold(wrapped, x)
    hook.remove()


def test_a_model_spread_over_devices_says_so():
    wrapped = DataParallel(small_resnet(), device_ids=[])
    wrapped.device_ids = [0, 1]
    with pytest.raises(CannotFold, match="DataParallel spreads it over 2 devices"):
        fold(wrapped.eval(), noise(2, 3, 16, 16))


class Casting(nn.Module):
    def __init__(self, net, dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, images):
        return self.net(images.to(self.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_that_takes_no_images_says_so(dtype):
    net, x, y = pattern("residual").to(dtype), noise(2, 3, 8, 8).float(), torch.arange(2)
    with pytest.raises(UserError, match=f"^the model's parameters are {dtype}, and it takes no images of torch.float32"):
        fold(net, x)
    attack = PGD(steps=2, backend="eager", check_inputs=False)
    with pytest.raises(UserError, match="cast them in its forward, or convert it by model.float"):
        attack(net, x, y)
    casting = Casting(net, dtype).eval()
    attack(casting, x, y)
    assert attack.engine.notes["folded"].startswith("yes: 1 BatchNorms")
    under_autocast = PGD(steps=2, precision="bf16", backend="eager", check_inputs=False)
    if dtype == torch.bfloat16:
        assert under_autocast(net, x, y).dtype == torch.float32
    # What fails for another reason keeps its own.
    with pytest.raises(CannotFold, match="fails: .*to have 3 channels"):
        fold(casting, x[:, :2])


def test_attacks_say_why_a_model_is_not_folded():
    images, labels = noise(4, 3, 8, 8).float(), torch.arange(4)
    for name in ("counts", "perceptron", "branch on the size"):
        attack = PGD(steps=2, backend="eager")
        assert attack(REFUSED[name][0]().float(), images, labels).shape == images.shape
        assert attack.engine.notes["folded"].startswith("no: " + REFUSED[name][1])
    with pytest.raises(UserError, match="^the model returns dict"):
        PGD(steps=2, backend="eager", check_inputs=False)(Answering(unchanged).float(), images, labels)
    watched = Counted(pattern("residual").float())
    PGD(steps=2, backend="eager", check_inputs=False)(watched, images, labels)
    assert watched.calls == 2


# -- cuDNN's fused convolution ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_cudnn(monkeypatch):
    """cuDNN's two operations in plain arithmetic; the list holds the calls."""
    calls = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("relu")
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append("add relu")
        out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        assert z.shape == out.shape and z.dtype == out.dtype
        return (out + alpha * z).relu()

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", add_relu)
    return calls


@pytest.mark.parametrize("name", [name for name in PATTERNS if "written" not in name])
def test_fused_convolutions_and_their_backward(name, plain_cudnn, unverified):
    """Outputs and gradients by way of input and residual, with cuDNN's two operations replaced by what they compute."""
    net, x = pattern(name), noise(3, 3, 8, 8)
    twin = fold(net, x, backend="cudnn")
    assert_equal(twin, net, x)
    fused = [node for node in twin.graph_module.graph.nodes if str(node.target).startswith("folded_")]
    expected = []
    for node in fused:
        layer = twin.graph_module.get_submodule(node.target)
        if layer.relu and layer.bias is not None and name not in ("wider residual", "narrower residual", "parameter"):
            expected.append("relu" if len(node.args) == 1 else "add relu")
    assert plain_cudnn == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_cudnn_equals_aten_on_the_device(name, dtype):
    torch.manual_seed(0)
    net = scramble(build_model(name, num_classes=10, width=16, head="identity").double()).float().cuda()
    x = noise(8, 3, 32, 32).float().cuda().contiguous(memory_format=torch.channels_last)
    with full_precision():
        aten, cudnn = (fold(net, x, dtype, backend) for backend in ("aten", "cudnn"))
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            of_aten, of_cudnn = outputs_and_gradient(aten, x), outputs_and_gradient(cudnn, x)
    for tolerance, found, expected in zip({torch.float32: (1e-4, 1e-2)}.get(dtype, (0.05, 0.3)), of_cudnn, of_aten, strict=True):
        assert found.dtype == expected.dtype and (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["no norm", "no norm, residual", "no norm, bias, residual", "wider residual", "narrower residual"]
)
def test_cudnn_equals_the_model_on_the_device(name):
    net, x = pattern(name).float().cuda(), noise(3, 3, 8, 8).float().cuda()
    with full_precision():
        assert_equal(fold(net, x, backend="cudnn"), net, x, 1e-4)
