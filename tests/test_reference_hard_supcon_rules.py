"""What the dense hardness-weighted SupCon promises beside its formula: symmetries, views, edges, precision, no host reads, messages."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from supcon_helpers import (
    COEF,
    DENOMINATORS,
    NO_HARDNESS,
    NORMALIZERS,
    VARIANTS,
    WEIGHTS,
    aten,
    batch,
    relative,
    view_options,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastanchor.errors import UserError
from fastanchor.reference.hard_supcon import effective_positives, hard_supcon, positive_weights, soft_min_supcon

# ---------------------------------------------------------------- symmetries, views, degenerate batches


def test_anchors_limit_the_rows_and_the_mean():
    u, y, v = batch(n=13)
    rows = hard_supcon(u, y, reduction="none")
    chosen = (v == 0) | (v == 2)
    expected = torch.where(chosen, rows, 0.0)
    for anchors in (chosen, [0, 2], (2, 0)):
        options = {"views": v, "anchors": anchors}
        torch.testing.assert_close(hard_supcon(u, y, reduction="none", **options), expected, rtol=1e-14, atol=0)
        mean = hard_supcon(u, y, reduction="mean_all", **options)
        torch.testing.assert_close(mean, expected.sum() / chosen.sum(), rtol=1e-14, atol=0)
        assert not effective_positives(u, y, **options)[~chosen].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_rows_names_of_labels_and_lengths_do_not_matter(variant):
    u, y, v = batch(n=14)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    options = {**variant, "reduction": "none"}
    rows = hard_supcon(u, y, **view_options(v, True), **options)
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(hard_supcon(u[order], y[order], **view_options(v[order], True), **options), rows[order], **close)
    torch.testing.assert_close(hard_supcon(u, 1000 - 7 * y, **view_options(v, True), **options), rows, **close)
    lengths = torch.linspace(1e-3, 1e3, 14, dtype=torch.float64)[:, None]
    torch.testing.assert_close(hard_supcon(u * lengths, y.int(), **view_options(v, True), **options), rows, **close)


def test_view_matrices_are_indexed_by_anchor_then_key():
    u, y, v = batch(n=6, classes=1)
    y[:], v = 0, torch.tensor([0, 0, 0, 1, 1, 1])
    one_way = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    w_bar, _ = positive_weights(u, y, views=v, positive_coef=one_way)
    assert not w_bar[:3, 3:].any() and (w_bar[3:, :3] > 0).all()
    plain = hard_supcon(u, y, reduction="none", **NO_HARDNESS)
    masked = hard_supcon(u, y, views=v, denominator_mask=one_way.bool(), reduction="none", **NO_HARDNESS)
    assert (masked[:3] < plain[:3]).all()
    torch.testing.assert_close(masked[3:], plain[3:], rtol=1e-14, atol=0)
    # View 0 sees view 0 only: as if the other rows were not there.
    alone = hard_supcon(u[:3], y[:3], reduction="none")
    both = hard_supcon(u, y, views=v, positive_coef=one_way, denominator_mask=one_way, reduction="none")
    torch.testing.assert_close(both[:3], alone, rtol=1e-13, atol=0)


DEGENERATE = {
    "one row": (torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(1, dtype=torch.long)),
    "one feature": (torch.tensor([[1.0], [-2.0], [3.0], [1.0]]).double(), torch.tensor([0, 0, 1, 1])),
    "all classes differ": (batch(n=5)[0], torch.arange(5)),
    "one class": (batch(n=5)[0], torch.zeros(5, dtype=torch.long)),
    "all rows equal": (torch.ones(6, 4).double(), torch.tensor([0, 0, 0, 1, 1, 2])),
    "duplicates": (batch(n=4)[0].repeat(2, 1), torch.tensor([0, 1, 0, 1]).repeat(2)),
    "all zero": (torch.zeros(6, 4).double(), torch.tensor([0, 0, 0, 1, 1, 2])),
    "opposite rows": (torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]]).double(), torch.tensor([0, 0, 1, 1])),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_batches_are_finite(name):
    u, y = DEGENERATE[name][0].float(), DEGENERATE[name][1]
    has_positive = (y[:, None] == y).sum(1) > 1
    has_negative = (y[:, None] != y).any(1)
    for variant, detach_weights in itertools.product(VARIANTS, (True, False)):
        options = {**variant.values[0], "detach_weights": detach_weights, "hard_negative_beta": 0.5}
        x = u.clone().requires_grad_()
        rows = hard_supcon(x, y, reduction="none", **options)
        rows.sum().backward()
        assert rows.isfinite().all() and x.grad.isfinite().all(), options
        valid = has_positive if options["denominator"] == "all" else has_positive & has_negative
        assert not rows[~valid].any()
        if not valid.any() or name == "all zero":
            assert not x.grad.any()
    rows = hard_supcon(u, y, reduction="none")
    for reduction, divisor in (("mean_valid", max(1, has_positive.sum())), ("mean_all", len(y)), ("sum", 1)):
        torch.testing.assert_close(hard_supcon(u, y, reduction=reduction), rows.sum() / divisor)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_row_without_positives_gives_no_loss_and_no_gradient_of_its_own(denominator):
    u, y, _ = batch()
    u.requires_grad_()
    rows = hard_supcon(u, y, reduction="none", denominator=denominator, detach_weights=False)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        (own,) = torch.autograd.grad(rows[-1], u, retain_graph=True)
    assert rows[-1] == 0 and not own.any()
    # It is still a negative of the others.
    assert torch.autograd.grad(rows[0], u)[0][-1].any()


def test_zero_rows_have_similarity_zero_and_no_gradient():
    u, y, _ = batch(n=6)
    y[:] = torch.tensor([0, 0, 0, 1, 1, 1])
    u[0], u[4] = 0.0, 1e-13
    u.requires_grad_()
    loss = hard_supcon(u, y, reduction="none", temperature=0.5)
    z = F.normalize(u.detach()).masked_fill(torch.tensor([True, False, False, False, True, False])[:, None], 0.0)
    s = z @ z.T
    weights = torch.exp(-2 * s[3, 4:]).softmax(0) * 0 + torch.exp(-2 * s[3, 4:]) / torch.exp(-2 * s[3, 4:]).sum()
    expected = (s[3, [0, 1, 2, 4, 5]] / 0.5).logsumexp(0) - (weights * s[3, 4:]).sum() / 0.5
    torch.testing.assert_close(loss[3], expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(loss[0], torch.tensor(math.log(5), dtype=torch.float64), rtol=1e-13, atol=0)
    loss.sum().backward()
    assert not u.grad[[0, 4]].any() and u.grad[[1, 2, 3, 5]].all()


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_pow_weights_stay_finite_next_to_similarity_one(fraction):
    near = torch.tensor([[1.0, 0], [1.0, 1e-4], [1.0, 1e-9], [0.0, 1.0]])
    x, y = near.clone().requires_grad_(), torch.tensor([0, 0, 0, 1])
    loss = hard_supcon(x, y, weight="pow", gamma=fraction, detach_weights=False)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 14), d=st.integers(1, 6), classes=st.integers(1, 6), seed=st.integers(0, 2**31),
    temperature=st.floats(0.02, 2.0), weight=st.sampled_from(WEIGHTS), denominator=st.sampled_from(DENOMINATORS),
    normalizer=st.sampled_from(NORMALIZERS), detach_weights=st.booleans(), degenerate=st.sampled_from(["no", "zero", "equal"]),
)  # fmt: skip
def test_finite_and_bounded_below(n, d, classes, seed, temperature, weight, denominator, normalizer, detach_weights, degenerate):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if degenerate == "zero":
        u[::2] = 0.0
    elif degenerate == "equal":
        u[::2] = u[0].clone()
    y = torch.randint(classes, (n,), generator=generator)
    u.requires_grad_()
    loss = hard_supcon(
        u, y, temperature=temperature, **weight, denominator=denominator, normalizer=normalizer, detach_weights=detach_weights
    )
    loss.backward()
    assert loss.isfinite() and u.grad.isfinite().all()
    # all: a positive is one term of its own denominator, so lse_i >= l_ip. pairwise: softplus > 0. negatives: lse_i >= -1/tau
    # and l_ip <= 1/tau, so f_ip >= -2/tau, times omega_i <= max h (1 for `sum`).
    largest = 1.0 if normalizer == "sum" else max(1.0, math.exp(abs(weight.get("beta", 0))), 2.1 ** weight.get("gamma", 0))
    bound = -2 / temperature * largest if denominator == "negatives" else 0.0
    assert loss.item() >= bound - 1e-12 * (1 + 1 / temperature)
    # The gradient is tangent: scaling a row does not change the loss.
    assert ((u.grad * u).sum(1).abs() <= 1e-9 * (1 + u.grad.abs().max() * u.detach().abs().max())).all()


# ---------------------------------------------------------------- precision


def clustered(n, d, cosine, classes=10):
    """Unit rows whose cosine within a class is about `cosine`, around random class centres; 0 is plain noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    noise = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64))
    centres = F.normalize(torch.randn(classes, d, generator=generator, dtype=torch.float64))
    return math.sqrt(cosine) * centres[y] + math.sqrt(1 - cosine) * noise, y


# Close to convergence the class centre cancels out of sum_j (q_ij - w_bar_ij) z_j: the gradient is small, and the rounding of
# the similarities (6e-8 / tau in the logits) is large beside it.
REGIMES = {"random": (0.0, 1e-6), "mid": (0.5, 1e-6), "trained": (0.98, 1e-4)}


@pytest.mark.parametrize(("cosine", "gradient_tolerance"), REGIMES.values(), ids=REGIMES)
@pytest.mark.parametrize("weight", WEIGHTS[:5])
def test_fp32_against_fp64(weight, cosine, gradient_tolerance):
    u, y = clustered(128, 64, cosine)
    u, loss, gradient = u.float(), {}, {}
    for dtype in (torch.float32, torch.float64):
        x = u.detach().to(dtype, copy=True).requires_grad_()
        loss[dtype] = hard_supcon(x, y, **weight)
        loss[dtype].backward()
        gradient[dtype] = x.grad.double()
    assert abs(loss[torch.float32].double() / loss[torch.float64] - 1) < 2e-6
    assert relative(gradient[torch.float32], gradient[torch.float64]) < gradient_tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_fp32(dtype):
    u, y = clustered(64, 16, 0.5)
    half = u.to(dtype)
    expected = hard_supcon(half.float(), y)
    loss = hard_supcon(half.requires_grad_(), y)
    assert loss.dtype == torch.float32 and loss == expected
    loss.backward()
    assert half.grad.dtype == dtype and half.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert hard_supcon(half.float(), y) == expected
    mixed = hard_supcon(half, y, ref_embeddings=u, ref_labels=y)
    assert mixed.dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.001, 0.01])
def test_tiny_temperature_and_huge_beta_do_not_overflow(temperature):
    u, y = clustered(32, 8, 0.3)
    x = u.float().requires_grad_()
    loss = hard_supcon(x, y, temperature=temperature, beta=500.0, hard_negative_beta=300.0, detach_weights=False)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_beta_may_be_a_tensor():
    u, y, _ = batch()
    beta = torch.tensor(3.0)
    for function in (hard_supcon, soft_min_supcon):
        torch.testing.assert_close(function(u, y, beta=beta), function(u, y, beta=3.0), rtol=1e-14, atol=0)
        assert function(u.float(), y, beta=beta.double()).dtype == torch.float32


# ---------------------------------------------------------------- no host reads


HOST_READS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal, aten.allclose,
    aten._assert_async, aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
}  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Raises on every operation whose result or output shape depends on values."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        indexed = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        by_mask = indexed and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if packet in HOST_READS or by_mask or (packet is aten.repeat_interleave and func._overloadname == "Tensor"):
            raise AssertionError(f"{func} reads values on the host")
        self.seen.add(packet)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: float(x.sum()), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0), lambda x: x.index_put((x > 0,), x.sum()), lambda x: torch.equal(x, x), torch.unique,
    ],
)  # fmt: skip
def test_the_host_read_detector_detects(read):
    with pytest.raises(AssertionError, match="reads values"), NoHostReads():
        read(torch.arange(4.0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_host_reads(variant):
    u, y, v = batch()
    key, key_labels, key_views = batch(n=7, seed=1)
    refs = {"ref_embeddings": key, "ref_labels": key_labels, "ref_views": key_views}
    shared = {"beta": torch.tensor(variant.get("beta", 2.0)), "anchors": [0, 1], **view_options(v, True)}
    weights = {**variant, **shared}
    del weights["denominator"]

    def calls(convert):
        """(leaf or None, function to call) of every public function; `convert` makes the inputs' tensors."""

        def converted(options):
            return {name: convert(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()}

        x, labels = convert(u).requires_grad_(), convert(y)
        yield None, lambda: effective_positives(x, labels, **converted(weights))
        for detach_weights, keys in ((True, refs), (False, {"instances": y})):
            options = {**variant, **shared, **keys, "detach_weights": detach_weights, "hard_negative_beta": 1.0}
            yield x, lambda options=options: hard_supcon(x, labels, **converted(options))
        if variant["weight"] == "exp" and variant["denominator"] != "pairwise":
            yield x, lambda: soft_min_supcon(x, labels, denominator=variant["denominator"], **converted(shared))

    for x, call in calls(torch.clone):
        with NoHostReads() as mode:
            value = call()
            if x is not None:
                value.backward()
                assert aten.mm in mode.seen and aten.where in mode.seen
    with FakeTensorMode() as mode:  # fake tensors have no values: .tolist(), .numpy() and every other read raises
        for x, call in calls(mode.from_tensor):
            value = call()
            if x is not None:
                value.backward()
                assert x.grad.shape == u.shape


# ---------------------------------------------------------------- bad arguments


U, Y, V = batch()
BAD = [
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": "0.1"}, "temperature is '0.1'"),
    ({"beta": math.inf}, "beta is inf"),
    ({"beta": torch.ones(2)}, r"beta is a torch.float32 tensor of shape \(2,\)"),
    ({"gamma": None}, "gamma is None"),
    ({"scale": True}, "scale is True"),
    ({"weight": "expo"}, "weight is 'expo'.*uniform, exp, pow, topk.*did you mean 'exp'"),
    ({"normalizer": "summ"}, "normalizer is 'summ'.*did you mean 'sum'"),
    ({"denominator": "negative"}, "denominator is 'negative'.*did you mean 'negatives'"),
    ({"reduction": "mean"}, "reduction is 'mean'.*mean_valid, mean_all, sum, none"),
    ({"k": 0}, "k is 0"),
    ({"k": 2.0}, "k is 2.0"),
    ({"labels": Y[:-1]}, r"labels is a torch.int64 tensor of shape \(11,\).*\(12,\)"),
    ({"labels": Y.float()}, "labels is a torch.float32 tensor.*integer"),
    ({"labels": Y > 0}, "labels is a torch.bool tensor.*integer"),
    ({"labels": [0] * 12}, "labels is .*integer tensor"),
    ({"embeddings": U[0]}, r"embeddings is a torch.float64 tensor of shape \(5,\)"),
    ({"embeddings": U.long()}, "embeddings is a torch.int64 tensor.*floating"),
    ({"embeddings": U[:0], "labels": Y[:0]}, r"embeddings is .*\(0, 5\)"),
    ({"views": V[:-1]}, r"views is a torch.int64 tensor of shape \(11,\)"),
    ({"positive_coef": COEF}, "positive_coef is given, but views"),
    ({"views": V, "denominator_mask": COEF[:2]}, r"denominator_mask is .*\(2, 3\)"),
    ({"views": V, "positive_coef": COEF, "denominator_mask": COEF[:2, :2]}, r"denominator_mask has shape \(2, 2\).*\(3, 3\)"),
    ({"views": V, "positive_coef": COEF, "ref_embeddings": U, "ref_labels": Y}, "positive_coef is given, but ref_views"),
    ({"ref_labels": Y}, "ref_labels is given without ref_embeddings"),
    ({"ref_embeddings": U}, "ref_labels is None"),
    ({"ref_embeddings": U[:, :2], "ref_labels": Y}, "ref_embeddings has 2 columns.*5"),
    ({"ref_embeddings": U, "ref_labels": Y, "instances": Y}, "instances and ref_instances"),
    ({"instances": Y[None]}, r"instances is a torch.int64 tensor of shape \(1, 12\)"),
    ({"anchors": 1}, "anchors is 1, but view ids need views"),
    ({"anchors": "adv", "views": V}, "anchors is 'adv'"),
    ({"anchors": [], "views": V}, r"anchors is \[\]"),
    ({"anchors": Y, "views": V}, "anchors is a torch.int64 tensor"),
    ({"anchors": Y[1:] > 0}, r"anchors is a torch.bool tensor of shape \(11,\)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        hard_supcon(**{"embeddings": U, "labels": Y, **arguments})
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_soft_min_refuses_what_has_no_scalar():
    with pytest.raises(UserError, match=r"denominator is 'pairwise'.*all, negatives"):
        soft_min_supcon(U, Y, denominator="pairwise")
    with pytest.raises(UserError, match="beta is 0"):
        soft_min_supcon(U, Y, beta=0)
