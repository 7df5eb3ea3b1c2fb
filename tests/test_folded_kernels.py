"""The twin's kernels, run by Triton's interpreter: its refresh in one launch and its convolutions' epilogues, against plain torch."""

import copy
import re

import pytest
import torch
from foreign_models import PATTERNS, pattern, scramble
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastanchor.kernels import bn_fold, epilogue
from interpreter import interpreted

from bench import aot
from fastanchor import graphs, kernels
from fastanchor.errors import UserError
from fastanchor.models import build_model
from fastanchor.models.folded import CONV_BACKENDS, FoldedConv, Norm, fold
from fastanchor.ops import folding, verified
from fastanchor.precision import full_precision

CPU = torch.device("cpu")
NETS = {"resnet18": 4, "preactresnet18": 4, "wrn10_1": 8}
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def trusting(monkeypatch):
    """Kernels trusted on a CPU, where the interpreter runs them; the list holds "kernel" or "plain" for every refresh."""
    calls = []
    launch, plain = bn_fold.bn_fold, folding.fold_all
    monkeypatch.setattr(folding, "trusted", lambda kernel, device: (True, "for a test"))
    monkeypatch.setattr(bn_fold, "bn_fold", lambda table: calls.append("kernel") or launch(table))
    monkeypatch.setattr(folding, "fold_all", lambda layers: calls.append("plain") or plain(layers))
    with interpreted(bn_fold, epilogue):
        yield calls


def make_net(name="resnet18", seed=0):
    torch.manual_seed(seed)
    return scramble(build_model(name, num_classes=5, width=NETS[name], head="identity").double(), seed).float()


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def shift(net):
    """Other values in the same memory."""
    with torch.no_grad():
        for values in (*net.parameters(), *net.buffers()):
            if values.is_floating_point():
                values.mul_(1.1).add_(0.01)


def move(net):
    """Other values in other memory."""
    for parameter in net.parameters():
        parameter.data = parameter.data * 0.9


def assert_refreshed(twin, dtype=torch.float32):
    """The twin's weights are what plain torch makes of the model now; these are in place afterwards."""
    found = [(layer.weight.clone(), None if layer.bias is None else layer.bias.clone()) for layer in twin.layers]
    for layer in twin.layers:
        layer.weight.fill_(float("nan"))
    twin.refresh(kernel=False)
    for (weight, bias), layer in zip(found, twin.layers, strict=True):
        # The interpreter truncates to bf16 where a GPU rounds: one unit of its 8 bits.
        rtol = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(weight, layer.weight, rtol=rtol, atol=0)
        if bias is not None:
            torch.testing.assert_close(bias, layer.bias, rtol=rtol, atol=1e-6 * layer.bias.abs().max().item())


# -- the refresh --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_refresh_by_the_kernel_follows_the_model(name, dtype, memory_format, trusting):
    net = make_net(name).to(memory_format=memory_format)
    twin = fold(net, noise(2, 3, 16, 16), dtype)
    shift(net)
    trusting.clear()
    twin.refresh()
    assert trusting == ["kernel"] and {layer.weight.dtype for layer in twin.layers} == {dtype}
    assert_refreshed(twin, dtype)
    assert trusting == ["kernel", "plain"]


@pytest.mark.parametrize(
    "name",
    ["bias", "groups", "depthwise", "asymmetric", "even kernel", "no norm", "no norm, bias, residual", "no affine", "no statistics",
     "functional norm", "norm first", "two norms", "shared, other norm", "two branches"],
)  # fmt: skip
def test_refresh_by_the_kernel_of_every_kind_of_layer(name, trusting):
    net = pattern(name).float()
    twin = fold(net, noise(2, 3, 8, 8))
    shift(net)
    twin.refresh()
    assert set(trusting) == {"kernel"}
    assert_refreshed(twin)


def replace(net):
    net.backbone.conv1.weight = nn.Parameter(net.backbone.conv1.weight.data * 2)


@pytest.mark.parametrize("change", [move, replace, lambda net: net.to(memory_format=torch.channels_last)])
def test_a_tensor_moved_or_replaced_is_noticed(change, trusting):
    net = make_net()
    twin = fold(net, noise(2, 3, 16, 16))
    table = twin._refresh.table
    shift(net)
    twin.refresh()
    assert twin._refresh.table is table
    change(net)
    twin.refresh()
    assert twin._refresh.table is not table and set(trusting) == {"kernel"}
    assert_refreshed(twin)


def test_other_memory_for_the_twin_is_noticed(trusting):
    net = make_net()
    twin = fold(net, noise(2, 3, 16, 16))
    twin.allocate(torch.bfloat16, "aten")
    shift(net)
    twin.refresh()
    assert set(trusting) == {"kernel"}
    assert_refreshed(twin, torch.bfloat16)


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense, "a value was read back"
        return func(*args, **(kwargs or {}))


def test_a_new_table_reads_no_value(trusting):
    net = make_net()
    twin = fold(net, noise(2, 3, 16, 16))
    move(net)
    old = twin._refresh.table
    with NoHostRead():
        assert twin._refresh._current_table(CPU) is not old


def test_a_capture_makes_no_table_and_keeps_the_one_it_uses(trusting, monkeypatch):
    net = make_net()
    twin = fold(net, noise(2, 3, 16, 16))
    table = twin._refresh.table
    monkeypatch.setattr(folding, "_capturing", lambda device: True)
    trusting.clear()
    twin.refresh()
    assert trusting == ["kernel"] and table in twin._refresh._in_graphs
    move(net)
    twin.refresh()  # made while capturing, a table would be filled by a copy that waits for the device
    assert trusting == ["kernel", "plain"] and twin._refresh.table is table
    assert_refreshed(twin)
    monkeypatch.setattr(folding, "_capturing", lambda device: False)
    trusting.clear()
    twin.refresh()
    assert trusting == ["kernel"] and twin._refresh.table is not table
    assert twin._refresh._in_graphs == {table}


def mixed():
    net = make_net()
    net.backbone.conv1.double(), net.backbone.bn1.double()
    return net


def parametrised():
    net = make_net()
    parametrizations.weight_norm(net.backbone.conv1)
    return net


@pytest.mark.parametrize("make, tables", [(lambda: make_net().double(), 1), (mixed, 1), (parametrised, 0)])
def test_what_the_kernel_cannot_fold_is_folded_in_plain_torch(make, tables, trusting, monkeypatch):
    made, table = [], bn_fold.FoldTable
    monkeypatch.setattr(bn_fold, "FoldTable", lambda layers: made.append(layers) or table(layers))
    net = make().eval()
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    sources = [(conv, norm_tensors(norm)) for conv, norm in zip(layers, norms, strict=True)]
    folded = [as_folded(conv, norm) for conv, norm in sources]
    refresh = folding.Refresh(folded)
    for _ in range(2):
        refresh()
    assert trusting == ["plain", "plain"] and len(made) == tables  # and it is not tried at every refresh
    for layer in folded:
        conv, norm = layer.sources
        scale = norm.weight / (norm.var + norm.eps).sqrt()
        torch.testing.assert_close(layer.weight, (conv.weight * scale.view(-1, 1, 1, 1)).to(layer.weight.dtype))


def norm_tensors(norm):
    return Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def as_folded(conv, norm):
    layer = FoldedConv(conv, norm)
    layer.allocate(None, "aten")
    return layer


def test_the_refresh_can_be_asked_to_be_plain(trusting):
    net = make_net()
    twin = fold(net, noise(2, 3, 16, 16))
    trusting.clear()
    shift(net)
    twin.refresh(kernel=False)
    assert trusting == ["plain"]


# -- whether kernels are trusted ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """Nothing known of any device, and a CPU that may run kernels."""
    monkeypatch.setattr(verified, "_known", {})
    monkeypatch.setattr(kernels, "usable", lambda device: (True, "for a test"))
    monkeypatch.delenv(verified.SWITCH, raising=False)


def test_on_a_cpu_no_kernel_is_trusted(monkeypatch):
    for switch in ("auto", "unchecked", "off"):
        monkeypatch.setenv(verified.SWITCH, switch)
        for kernel in ("bn_fold", "conv_epilogue"):
            assert folding.trusted(kernel, CPU)[0] is False


@pytest.mark.parametrize("kernel", ["bn_fold", "conv_epilogue"])
def test_a_kernel_is_trusted_where_it_agrees(kernel, fresh):
    before = torch.get_rng_state()
    with interpreted(bn_fold, epilogue):
        good, reason = folding.trusted(kernel, CPU)
    assert good, reason
    assert torch.equal(torch.get_rng_state(), before)


def scaled_wrongly(table):
    right(table)
    table.layers[1].out_weight.mul_(1.0001)


def biased_wrongly(table):
    right(table)
    table.layers[3].out_bias.add_(1e-4)


right = bn_fold.bn_fold
WRONG = {
    "nothing": ("bn_fold", bn_fold, "bn_fold", lambda table: None),
    "a weight": ("bn_fold", bn_fold, "bn_fold", scaled_wrongly),
    "a bias": ("bn_fold", bn_fold, "bn_fold", biased_wrongly),
    "no residual": ("conv_epilogue", epilogue, "epilogue_", lambda out, bias, residual: out.relu_()),
    "no mask": ("conv_epilogue", epilogue, "relu_backward", lambda gradient, out: gradient),
    "fails": ("conv_epilogue", epilogue, "relu_backward", lambda gradient, out: 1 / 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_disagrees_is_not_used(name, fresh, monkeypatch):
    kernel, module, function, wrong = WRONG[name]
    monkeypatch.setattr(module, function, wrong)
    with interpreted(bn_fold, epilogue):
        with pytest.warns(RuntimeWarning, match=f"the kernels for {kernel} are not used on cpu"):
            assert folding.trusted(kernel, CPU)[0] is False
        net, x = make_net(), noise(2, 3, 16, 16)
        if kernel == "bn_fold":
            twin = fold(net, x)
            assert twin._refresh.table is None
            assert_refreshed(twin)
        else:
            with pytest.raises(UserError, match="^backend = 'triton': check against the reference failed"):
                fold(net, x, backend="triton")


def test_switched_off_no_kernel_runs(fresh, monkeypatch):
    monkeypatch.setenv(verified.SWITCH, "off")
    twin = fold(make_net(), noise(2, 3, 16, 16))
    assert twin._refresh.table is None


# -- convolutions with Triton's epilogue -----------------------------------------------------------------------------------------


def outputs_and_gradient(net, x):
    x = x.detach().clone().requires_grad_()
    outputs = net(x)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    total = sum((out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs)
    return [*(out.detach() for out in outputs), torch.autograd.grad(total, x)[0]]


def counted(monkeypatch):
    """Names of the epilogue's functions, as they are called."""
    calls = []
    for name in ("epilogue_", "relu_backward"):
        function = getattr(epilogue, name)
        monkeypatch.setattr(epilogue, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k))
    return calls


@pytest.mark.parametrize("name", [name for name in PATTERNS if "written" not in name])
def test_convolutions_with_the_epilogue_equal_their_model(name, trusting):
    net, x = pattern(name).float(), noise(3, 3, 8, 8)
    exact = copy.deepcopy(net).double()
    twin = fold(net, x, backend="triton")
    for found, plain, truth in zip(
        *(outputs_and_gradient(n, i) for n, i in ((twin, x), (net, x), (exact, x.double()))), strict=True
    ):
        error, of_plain = (((t.double() - truth).norm() / truth.norm()).item() for t in (found, plain))
        assert error <= max(2 * of_plain, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_runs_on_the_epilogue_and_its_backward(dtype, trusting, monkeypatch):
    calls = counted(monkeypatch)
    net, x = make_net().to(memory_format=torch.channels_last), noise(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    aten, triton = (fold(net, x, dtype, backend) for backend in ("aten", "triton"))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = outputs_and_gradient(aten, x)
        calls.clear()
        found = outputs_and_gradient(triton, x)
    # 17 of the 20 convolutions have a ReLU; the last one's gradient, of a mean, has another layout than its output.
    assert (calls.count("epilogue_"), calls.count("relu_backward")) == (20, 16)
    for tolerance, ours, theirs in zip((1e-5, 1e-4) if dtype == torch.float32 else (0.05, 0.3), found, expected, strict=True):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= tolerance * theirs.norm()


def test_layouts_that_differ_are_brought_together(trusting):
    """A residual and a gradient in the other memory format than the convolution's output."""

    net, x = pattern("residual").float(), noise(3, 3, 8, 8)
    twin = fold(net, x, backend="triton")
    layer = next(layer for layer in twin.layers if layer.relu)
    values = noise(3, 6, 8, 8, seed=1)
    for residual_format in FORMATS:
        for gradient_format in FORMATS:
            found = []
            for backend in ("triton", "aten"):
                layer.backend = backend
                features = values.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
                residual = (values - 0.3).contiguous(memory_format=residual_format).requires_grad_()
                upstream = (values - 0.5).contiguous(memory_format=gradient_format)
                out = layer(features, residual)
                found.append((out.detach(), *torch.autograd.grad(out, (features, residual), upstream)))
            torch.testing.assert_close(*found)


def test_backends_that_cannot_be_had(trusting):
    net, x = make_net(), noise(2, 3, 16, 16)
    with pytest.raises(UserError, match="backend is 'tritn', but must be one of aten, cudnn, triton; did you mean 'triton'"):
        fold(net, x, backend="tritn")
    with pytest.raises(UserError, match="backend = 'triton': the convolutions must be fp32 or bf16"):
        fold(net.double(), x.double(), backend="triton")


def test_without_a_gpu_the_epilogue_is_refused():
    assert "triton" in CONV_BACKENDS
    with pytest.raises(UserError, match="backend = 'triton': Triton kernels need a CUDA device, this is cpu"):
        fold(make_net(), noise(2, 3, 16, 16), backend="triton")


# -- compiled without a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_epilogue_compiles_without_spills_and_in_wide_accesses(arch, dtype, memory_format):
    def tensor(*shape):
        made = torch.empty(shape, dtype=dtype, device="meta")
        return made.contiguous(memory_format=memory_format) if made.ndim == 4 else made

    out, residual, bias = tensor(8, 64, 16, 16), tensor(8, 64, 16, 16), tensor(64)
    with aot.recording() as launches:
        epilogue.epilogue_(out, bias, residual)
        epilogue.epilogue_(tensor(3, 37, 7, 7), tensor(37))
        epilogue.relu_backward(residual, out)
    assert len(launches) == 3
    for launch in launches:
        found = aot.compile_launch(launch, arch)
        assert found["spilled"] == 0 and found["registers"] <= 48 and found["shared"] == 0
        assert not re.search(r"\b(div|rem)\.[su]", found["ptx"])  # channels are known when it is compiled
        # The interpreter's maximum keeps NaN anyway, the compiler's only if told to.
        assert ("max.NaN.f32" in found["ptx"]) == (launch is not launches[2])
        if launch is not launches[1]:
            assert "ld.global.v4.b32" in found["ptx"]
            # The bias of a contiguous output is one number for many elements, read from the caches.
            assert memory_format is torch.contiguous_format or not re.search(r"ld\.global\.b(16|32)", found["ptx"])


# -- on a GPU ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["bn_fold", "conv_epilogue"])
def test_kernels_agree_on_the_device(kernel, device):
    folding._CHECKS[kernel](device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_refresh_on_the_device(name, dtype, device):
    net = make_net(name).to(device)
    twin = fold(net, noise(2, 3, 32, 32).to(device), dtype)
    for change in (shift, move):
        change(net)
        torch.cuda.set_sync_debug_mode("error")
        try:
            twin.refresh()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert twin._refresh.table is not None and twin._refresh.table.current()
        assert_refreshed(twin, dtype)


@pytest.mark.gpu
def test_a_captured_refresh_follows_values_and_survives_moves(device):
    net, x = make_net().to(device), noise(8, 3, 32, 32).to(device)

    def forward(x):
        twin.refresh()
        return twin(x).detach()

    def assert_follows():
        with torch.no_grad():
            torch.testing.assert_close(captured(x), net(x), rtol=1e-3, atol=1e-3)

    with full_precision():
        twin = fold(net, x)
        captured = graphs.Captured(forward, (x,))
        assert len(twin._refresh._in_graphs) == 1
        assert_follows()
        shift(net)
        assert_follows()
        places = [parameter.data for parameter in net.parameters()]
        move(net)
        twin.refresh()
        assert_refreshed(twin)
        for parameter, place in zip(net.parameters(), places, strict=True):
            parameter.data = place
        shift(net)
        assert_follows()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_the_epilogue_equals_aten_on_the_device(name, dtype, device):
    net = make_net(name).to(device)
    x = noise(8, 3, 32, 32).to(device).contiguous(memory_format=torch.channels_last)

    def outputs(backend):
        twin, leaf = fold(net, x, dtype, backend), x.detach().clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = twin(leaf).float()
        return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum() - logits[:, 0].sum(), leaf)[0]

    with full_precision():
        pairs = zip({torch.float32: (1e-4, 1e-2)}.get(dtype, (0.05, 0.3)), outputs("triton"), outputs("aten"), strict=True)
    for tolerance, found, expected in pairs:
        assert (found - expected).norm() <= tolerance * expected.norm()
