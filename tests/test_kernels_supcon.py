"""The SupCon kernels under Triton's interpreter against fp64 autograd of the dense reference."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fastanchor.kernels import config, supcon, supcon_launch, supcon_pairs
from fastanchor.kernels.supcon_launch import Options, loss_and_grad, supported
from interpreter import interpreted
from supcon_helpers import COEF, MASK, relative
from supcon_truth import check, data, ours, truth
from torch.utils._python_dispatch import TorchDispatchMode

from bench.supcon_cases import REGIMES
from fastanchor.reference.hard_supcon import hard_supcon


@pytest.fixture(autouse=True)
def on_the_interpreter():
    with interpreted(supcon, supcon_pairs):
        yield


# ---------------------------------------------------------------- sizes, regimes, precisions


@pytest.mark.parametrize("precision", ["ieee", "fp16"])
@pytest.mark.parametrize("d", [32, 64, 128, 256])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 130, 257])
def test_sizes(n, d, precision):
    check(*data("random", n, d), precision=precision)


@pytest.mark.parametrize("d", [5, 48])
def test_features_that_are_no_power_of_two(d):
    check(*data("mid", 40, d))


@pytest.mark.parametrize("n, d", [(130, 128), (65, 256)])
@pytest.mark.parametrize("regime", ["mid", "trained"])
def test_embeddings_of_classes(regime, n, d):
    check(*data(regime, n, d))


@pytest.mark.parametrize("precision, stored", [("fp16", torch.float16), ("tf32", torch.float16)])  # both keep 11 bits
@pytest.mark.parametrize("regime", REGIMES)
def test_reduced_storage_is_no_worse_than_twice_eager(regime, precision, stored):
    u, y = data(regime, 130, 64)
    loss, grad = ours(u, y, precision=precision)
    exact_loss, exact = truth(u, y)
    eager_loss, eager = truth(u, y, dtype=torch.float32, unit=stored)
    assert relative(grad.double(), exact) <= 2 * relative(eager.double(), exact)
    assert relative(loss.double(), exact_loss) <= max(2 * relative(eager_loss.double(), exact_loss), 1e-5)
    if regime != "trained":
        assert F.cosine_similarity(grad.double(), exact).min() > 0.9999


def test_fp16_and_bf16_embeddings_get_gradients_of_their_dtype():
    for dtype, digits in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        u, y = data("random", 33, 32)
        u = u.to(dtype)
        loss, grad = ours(u, y)
        exact_loss, exact = truth(u, y)
        assert grad.dtype == dtype and loss.dtype == torch.float32
        assert relative(loss.double(), exact_loss) < 1e-6
        assert relative(grad.double(), exact) < digits


# ---------------------------------------------------------------- labels and rows


def test_degenerate_batches():
    u, y = data("random", 66, 32)
    check(u, torch.zeros_like(y))
    check(u, torch.arange(66))  # no positives: loss and gradient are exactly 0
    twins = u.clone()
    twins[1::2] = twins[::2]
    check(twins, torch.arange(66) // 4)
    check(u, y + 2**31 + torch.arange(66) % 2)  # labels beyond int32


def test_zero_rows_and_a_row_without_positives():
    u, y = (tensor.clone() for tensor in data("random", 66, 32))
    u[[3, 64]] = 0
    y[[3, 64, 5]] = torch.tensor([0, 0, 99])
    check(u, y)
    assert not ours(u, y)[1][[3, 64]].any()
    check(torch.zeros_like(u), y)


# ---------------------------------------------------------------- options

WEIGHTS = [
    {"weight": "uniform"},
    {"beta": 2.0},
    {"beta": -1.5},
    {"beta": 20.0},
    {"weight": "pow", "gamma": 0.5},
    {"weight": "pow", "gamma": 2.0},
]


@pytest.mark.parametrize("detach_weights", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("normalizer", ["sum", "count"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: "-".join(map(str, weight.values())))
def test_weights(weight, normalizer, detach_weights):
    check(*data("mid", 66, 32), **weight, normalizer=normalizer, detach_weights=detach_weights)


@pytest.mark.parametrize(
    "options", [{"normalizer": "count", "beta": 10.0}, {"detach_weights": False}, {"detach_weights": False, "weight": "pow"}]
)
def test_weights_in_fp16(options):
    for regime in ("random", "trained"):
        u, y = data(regime, 66, 32)
        _, grad = ours(u, y, precision="fp16", **options)
        _, exact = truth(u, y, **options)
        _, eager = truth(u, y, dtype=torch.float32, unit=torch.float16, **options)
        assert relative(grad.double(), exact) <= 2 * relative(eager.double(), exact)


def test_beta_as_a_tensor_is_beta():
    u, y = data("mid", 66, 32)
    for normalizer in ("sum", "count"):
        numbers = ours(u, y, beta=1.5, normalizer=normalizer, detach_weights=False)
        tensors = ours(u, y, beta=torch.tensor(1.5), normalizer=normalizer, detach_weights=False)
        assert all(map(torch.equal, numbers, tensors))


@pytest.mark.parametrize("temperature", [0.03, 0.5, 10.0])
def test_temperatures(temperature):
    check(*data("random", 66, 32), temperature=temperature)
    check(*data("random", 66, 32), temperature=temperature, normalizer="count", detach_weights=False)


def test_opposite_rows_at_the_lowest_temperature():
    u, _ = data("random", 2, 32)
    z = torch.cat([u[:1], -u[:1] + 1e-3, u[1:]])
    check(z, torch.tensor([0, 0, 1]), temperature=0.03, normalizer="count", detach_weights=False)
    check(z, torch.tensor([0, 0, 0]), temperature=0.03)


@pytest.mark.parametrize("reduction", ["mean_valid", "mean_all", "sum"])
def test_reductions(reduction):
    u, y = (tensor.clone() for tensor in data("random", 66, 32))
    y[:5] = 100 + torch.arange(5)
    check(u, y, reduction=reduction, scale=0.7)
    check(u, y, reduction=reduction, anchors=torch.arange(66) % 3 != 0)
    upstream = torch.tensor(3.0)
    _, grad = ours(u, y, upstream=upstream, reduction=reduction)
    torch.testing.assert_close(grad, 3 * ours(u, y, reduction=reduction)[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision, bound", [("ieee", 1e-6), ("fp16", 1e-3)])
@pytest.mark.parametrize("size", [1.0, 1e-6, 65536.0])
def test_rows_with_their_own_upstream_gradient(size, precision, bound):
    u, y = data("random", 66, 32)
    upstream = size * torch.linspace(-1, 2, 66)
    for normalizer in ("sum", "count"):
        options = {"reduction": "none", "scale": 0.7, "normalizer": normalizer}
        rows, grad = ours(u, y, upstream=upstream, precision=precision, **options)
        exact_rows, exact = truth(u, y, upstream=upstream.double(), **options)
        assert relative(rows.double(), exact_rows) <= bound
        assert relative(grad.double(), exact) <= bound
    assert not ours(u, y, upstream=torch.zeros(66), reduction="none")[1].any()


def test_upstream_gradients_that_are_all_negative_stay_in_range():
    u, y = data("random", 66, 32)
    upstream = -65536 * torch.linspace(1, 2, 66)
    _, grad = ours(u, y, upstream=upstream, precision="fp16", reduction="none")
    assert relative(grad.double(), truth(u, y, upstream=upstream.double(), reduction="none")[1]) <= 1e-3


def test_one_program_and_many_agree():
    u, y = data("mid", 257, 32)
    few, many = (ours(u, y, precision="fp16", splits=splits) for splits in (1, None))
    assert all(relative(a, b) < 1e-5 for a, b in zip(few, many, strict=True))


VIEWS = torch.arange(66) % 3


@pytest.mark.parametrize(
    "pairs",
    [
        {"views": VIEWS, "positive_coef": COEF},
        {"views": VIEWS, "denominator_mask": MASK},
        {"views": VIEWS, "positive_coef": COEF, "denominator_mask": MASK, "detach_weights": False},
        {"views": VIEWS, "positive_coef": COEF, "normalizer": "count", "detach_weights": False, "weight": "pow"},
        {"instances": torch.arange(66) // 3, "views": VIEWS, "positive_coef": COEF},
        {"denominator": "negatives"},
        {"denominator": "negatives", "views": VIEWS, "denominator_mask": MASK, "normalizer": "count"},
        {"detach_keys": True},
        {"detach_keys": True, "views": VIEWS, "positive_coef": COEF, "denominator_mask": MASK, "detach_weights": False},
    ],
    ids=lambda pairs: "-".join(pairs),
)
def test_pairs(pairs):
    u, y = data("random", 66, 32, classes=4)
    if "instances" in pairs:
        y = pairs["instances"] % 4
    check(u, y, **pairs)


def test_instances_of_one_class_are_told_apart():
    u, _ = data("random", 66, 32)
    y, instances = torch.arange(66) % 2, torch.arange(66) // 6
    check(u, y, instances=instances)
    assert abs(ours(u, y, instances=instances)[0] - ours(u, y)[0]) > 1e-3


@pytest.mark.parametrize("n_keys", [3, 200])
def test_other_keys(n_keys):
    u, y = data("random", 66, 32, classes=4)
    keys, key_labels = data("random", n_keys, 32, classes=4, seed=1)
    refs = {"ref_embeddings": keys, "ref_labels": key_labels}
    check(u, y, **refs)
    check(u, y, **refs, views=VIEWS, ref_views=torch.arange(n_keys) % 3, positive_coef=COEF, denominator_mask=MASK)
    check(u, y, **refs, instances=y // 2, ref_instances=key_labels // 2, detach_weights=False)


# ---------------------------------------------------------------- promises


def test_results_repeat_bit_for_bit_and_every_buffer_is_written(monkeypatch):
    """The second run starts from buffers full of NaN: nothing may be read that was not written."""
    u, y = data("random", 130, 32)
    first = ours(u, y, precision="fp16")
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: _poison(make(*a, **k)))
    make_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: _poison(make_new(self, *a, **k)))
    again = ours(u, y, precision="fp16")
    assert all(map(torch.equal, first, again))


def _poison(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-7)


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns; a value read back is an error."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense, "a value was read back"
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return out


def test_a_whole_run_allocates_no_tensor_of_n_times_n_elements():
    u, y = data("random", 512, 16)
    with Allocations() as seen:
        _, grad = ours(u, y, precision="fp16")
    assert seen.largest <= 512 * 512  # of fp16 alone it would be twice that
    assert relative(grad.double(), truth(u, y)[1]) < 1e-3


def test_no_tensor_of_n_times_n_elements_and_no_host_read(monkeypatch):
    """The launches are left out, so that N can be large; what torch allocates around them is counted."""
    for module in (supcon, supcon_pairs):
        for name, value in list(vars(module).items()):
            if hasattr(value, "arg_names"):
                monkeypatch.setattr(module, name, _Idle())
    n = 16384
    with Allocations() as seen:
        ours(torch.zeros(n, 64), torch.zeros(n, dtype=torch.long), precision="fp16")
    assert n * 64 * 4 <= seen.largest <= 8 * n * 64 * 4 < n * n
    with Allocations() as dense:
        hard_supcon(torch.zeros(200, 4), torch.zeros(200, dtype=torch.long))
    assert dense.largest >= 4 * 200 * 200


class _Idle:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    "n, d, precision", [(1, 32, "fp16"), (130, 128, "fp16"), (1024, 128, "fp16"), (8192, 256, "tf32"), (65536, 512, "ieee")]
)
@pytest.mark.parametrize("kernel", ["row_stats", "gradient"])
def test_the_split_covers_every_column_once_and_no_program_is_idle(kernel, n, d, precision):
    side = supcon_launch.Side(torch.empty(-(-n // 128) * 128, d, device="meta"), None, None, n)
    (row_blocks, split), span, tile = supcon_launch._plan(kernel, side, side, Options(precision=precision))
    assert 128 % tile["BM"] == 0 and 128 % tile["BN"] == 0 and span % tile["BN"] == 0
    assert row_blocks * tile["BM"] == len(side.z) and (split - 1) * span < n <= split * span
    assert split == -(-n // tile["BN"]) or split * row_blocks >= config.MULTIPROCESSORS[90]


# ---------------------------------------------------------------- what is not covered


@pytest.mark.parametrize(
    "change, says",
    [
        ({"temperature": 0.0005}, "temperature >= 0.001"),
        ({"weight": "topk", "k": 64}, "k = 63"),
        ({"hard_negative_beta": -41.0}, "hard_negative_beta"),
        ({"precision": "bf16"}, "bf16"),
        ({"weight": "pow", "gamma": 0.5, "detach_weights": False}, "too steep"),
        ({"weight": "pow", "gamma": 6.0}, "gamma"),
    ],
)
def test_unsupported_options_are_named(change, says):
    ok, reason = supported(Options(**change), 128, torch.float32)
    assert not ok and says in reason
    with pytest.raises(NotImplementedError, match=says):
        loss_and_grad(*data("random", 2, 64), Options(**change))


def test_unsupported_inputs_are_named():
    assert supported(Options(), 512, torch.bfloat16) == (True, "within the kernels' options")
    for arguments, says in (
        ((Options(), 513, torch.float32), "513"),
        ((Options(), 128, torch.float64), "fp64"),
        ((Options(), 128, torch.float32, 41.0), "beta"),
        ((Options(denominator="pairwise"), 512, torch.float32), "do not fit"),
    ):
        ok, reason = supported(*arguments)
        assert not ok and says in reason
