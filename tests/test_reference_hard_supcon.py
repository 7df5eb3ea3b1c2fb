"""The dense hardness-weighted SupCon against independent truths: pure Python loops, hand-derived gradients, exact limits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from supcon_helpers import (
    COEF,
    DENOMINATORS,
    VARIANTS,
    WEIGHTS,
    batch,
    loop_rows,
    mean_valid,
    relative,
    view_options,
    with_and_without_views,
)

from fastanchor.errors import UserError
from fastanchor.reference.hard_supcon import (
    effective_positives,
    hard_supcon,
    positive_weights,
    sampled_effective_positives,
    soft_min_supcon,
)

# ---------------------------------------------------------------- values


@with_and_without_views
@pytest.mark.parametrize("hard_negative_beta", [0.0, 1.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_is_that_of_python_loops(variant, hard_negative_beta, in_views):
    u, y, v = batch()
    options = {**variant, **view_options(v, in_views), "hard_negative_beta": hard_negative_beta}
    rows = loop_rows(u, y, **options)
    assert rows[-1] is None
    ours = hard_supcon(u, y, reduction="none", **options)
    torch.testing.assert_close(ours, torch.tensor([row or 0.0 for row in rows], dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_reductions_and_scale():
    u, y, _ = batch()
    rows = hard_supcon(u, y, reduction="none")
    n_valid = (rows != 0).sum()
    assert n_valid == len(y) - 1
    for reduction, expected in (("sum", rows.sum()), ("mean_all", rows.mean()), ("mean_valid", rows.sum() / n_valid)):
        torch.testing.assert_close(hard_supcon(u, y, reduction=reduction, scale=0.7), 0.7 * expected, rtol=1e-14, atol=0)


@with_and_without_views
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("selection", ["hard", "soft", "merge", "leaking"])
def test_selections_by_predicted_class_are_those_of_a_loop(selection, denominator, in_views):
    u, y, v = batch(n=24)
    predictions = torch.arange(24) * 7 % 5 % 3
    options = {"selection": selection, "denominator": denominator, "hard_negative_beta": 0.5, **view_options(v, in_views)}
    rows = loop_rows(u, y, predictions=predictions.tolist(), **options)
    found = hard_supcon(u, y, predictions=predictions, reduction="none", **options)
    assert found.tolist() == pytest.approx([row or 0 for row in rows], rel=1e-12)
    assert (found - hard_supcon(u, y, **{**options, "selection": "all"}, reduction="none")).abs().max() > 1e-3
    with pytest.raises(UserError, match="selection is .*, but predictions"):
        hard_supcon(u, y, **options)


@pytest.mark.parametrize("weight", [w for w in WEIGHTS if w["weight"] != "topk"] + [{"weight": "topk", "k": 1}])
def test_positive_weights_and_effective_positives_are_those_of_a_loop(weight):
    u, y, v = batch()
    options = {**weight, **view_options(v, True)}
    w_bar, valid = positive_weights(u, y, **options)
    ess = effective_positives(u, y, **options)
    s = F.normalize(u) @ F.normalize(u).T
    for i in range(len(y)):
        positives = [p for p in range(len(y)) if p != i and y[p] == y[i] and COEF[v[i], v[p]] > 0]
        assert valid[i].item() == bool(positives)
        outside = [a for a in range(len(y)) if a not in positives]
        assert not w_bar[i, outside].any()
        if not positives:
            assert ess[i] == 0
            continue
        cosines = s[i, positives].tolist()
        h = {
            "uniform": [1.0 for _ in cosines],
            "exp": [math.exp(-weight.get("beta", 0.0) * x) for x in cosines],
            "pow": [(1 - x + 1e-6) ** weight.get("gamma", 0.0) for x in cosines],
            "topk": [float(x == min(cosines)) for x in cosines],
        }[weight["weight"]]
        w = [COEF[v[i], v[p]].item() * x for p, x in zip(positives, h, strict=True)]
        assert w_bar[i, positives].tolist() == pytest.approx([x / sum(w) for x in w], rel=1e-12)
        assert ess[i].item() == pytest.approx(sum(w) ** 2 / sum(x * x for x in w), rel=1e-12)


@pytest.mark.parametrize("stride", [1, 5, 100])
def test_effective_positives_of_some_rows_are_those_among_all(stride):
    u, y, _ = batch(n=24)
    weights = {"weight": "exp", "beta": 3.0, "gamma": 1.0, "k": 8}
    expected = effective_positives(u, y, **weights)[::stride]
    torch.testing.assert_close(sampled_effective_positives(u, y, stride, **weights), expected, rtol=1e-12, atol=0)


def test_limits_of_the_weights():
    u, y, _ = batch(n=15)
    uniform = hard_supcon(u, y, weight="uniform")
    close = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(hard_supcon(u, y, beta=0.0), uniform, **close)
    torch.testing.assert_close(hard_supcon(u, y, weight="pow", gamma=0.0), uniform, **close)
    most = int((y[:, None] == y).sum(1).max()) - 1
    for k in (most, most + 1, 100):
        torch.testing.assert_close(hard_supcon(u, y, weight="topk", k=k), uniform, **close)
    assert abs(hard_supcon(u, y, weight="topk", k=most - 1) - uniform) > 1e-3
    hardest = hard_supcon(u, y, weight="topk", k=1)
    torch.testing.assert_close(hard_supcon(u, y, beta=1e6), hardest, **close)
    s = (F.normalize(u) @ F.normalize(u).T).fill_diagonal_(math.inf)
    farthest = s.masked_fill(y[:, None] != y, math.inf).amin(1)
    lse = (s / 0.1).fill_diagonal_(-math.inf).logsumexp(1)
    torch.testing.assert_close(hardest, (lse - farthest / 0.1)[:-1].mean(), **close)
    assert hard_supcon(u, y, beta=-3.0) < uniform < hard_supcon(u, y, beta=3.0) < hardest


def test_topk_keeps_ties_and_count_divides_by_all_positives():
    z = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0.6, 0.8], [-1, 0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 0, 1])
    tied, _ = positive_weights(z, y, weight="topk", k=1)
    assert tied[0].tolist() == pytest.approx([0, 0.5, 0.5, 0, 0])
    counted, _ = positive_weights(z, y, weight="topk", k=1, normalizer="count")
    assert counted[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 0])


# ---------------------------------------------------------------- gradients


@with_and_without_views
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_with_attached_weights(variant, in_views):
    u, y, v = batch(n=6, d=2)
    options = {**variant, **view_options(v, in_views), "temperature": 0.4, "detach_weights": False}
    assert torch.autograd.gradcheck(lambda x: hard_supcon(x, y, **options), u.requires_grad_(), fast_mode=not in_views)


@with_and_without_views
@pytest.mark.parametrize("variant", VARIANTS)
def test_detached_gradient_is_the_difference_quotient_with_frozen_weights(variant, in_views):
    u, y, v = batch(n=7, d=2, classes=2)
    options = {**variant, **view_options(v, in_views), "temperature": 0.4, "hard_negative_beta": 1.0}
    expected, step = torch.zeros_like(u), 1e-5
    for i, j in itertools.product(*map(range, u.shape)):
        values = []
        for sign in (1, -1):
            moved = u.clone()
            moved[i, j] += sign * step
            values.append(mean_valid(loop_rows(moved, y, **options, weights_from=u)))
        expected[i, j] = (values[0] - values[1]) / (2 * step)
    (ours,) = torch.autograd.grad(hard_supcon(u.requires_grad_(), y, **options), u)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def analytic_gradient(
    u,
    y,
    upstream,
    *,
    key=None,
    key_labels=None,
    temperature=0.1,
    weight="exp",
    beta=2.0,
    gamma=1.0,
    k=8,
    detach_weights=True,
    normalizer="sum",
    denominator="all",
    hard_negative_beta=0.0,
    views=None,
    positive_coef=None,
    denominator_mask=None,
    detach_keys=False,
):
    """dL/du (and dL/dkey) for L = sum_i upstream_i L_i, from the hand-derived G = dL/ds, without autograd."""
    tau, own = temperature, key is None
    z, z_key = F.normalize(u), F.normalize(u if own else key)
    s = z @ z_key.T
    y_key = y if own else key_labels
    other = ~torch.eye(len(u), dtype=torch.bool) if own else torch.ones_like(s, dtype=torch.bool)
    coef = torch.ones_like(s) if positive_coef is None else positive_coef[views][:, views]
    positive = (y[:, None] == y_key) & other & (coef > 0)
    in_denominator = other if denominator_mask is None else other & (denominator_mask[views][:, views] == 1)
    negative = in_denominator & (y[:, None] != y_key)
    terms = (in_denominator if denominator == "all" else negative).to(s)
    valid = (positive.any(1) & (terms.sum(1) > 0)).to(s)[:, None]

    h, dphi = {
        "uniform": (torch.ones_like(s), torch.zeros_like(s)),
        "exp": (torch.exp(-beta * s), torch.full_like(s, -beta)),
        "pow": ((1 - s + 1e-6) ** gamma, -gamma / (1 - s + 1e-6)),
        "topk": (torch.ones_like(s), torch.zeros_like(s)),
    }[weight]
    w = coef * h * positive
    if weight == "topk":
        rank = torch.where(positive, s, torch.inf).argsort(1).argsort(1)
        w = w * (rank < k)
    total = w.sum(1, keepdim=True) if normalizer == "sum" else positive.sum(1, keepdim=True).to(s)
    w_bar = w / total.clamp_min(1e-300)
    omega = w_bar.sum(1, keepdim=True)

    boost = torch.exp(hard_negative_beta * s) * negative
    boost = torch.where(negative, boost * negative.sum(1, keepdim=True) / boost.sum(1, keepdim=True).clamp_min(1e-300), 1.0)
    e = boost * torch.exp(s / tau) * terms
    lse = e.sum(1, keepdim=True).clamp_min(1e-300).log()
    q = e / e.sum(1, keepdim=True).clamp_min(1e-300)

    gap = lse - s / tau
    if denominator == "pairwise":
        r = torch.sigmoid(gap)
        kappa, cost = (w_bar * r).sum(1, keepdim=True), torch.log1p(torch.exp(gap))
        G = (kappa * q - w_bar * r) / tau
        if not detach_weights:
            mean_cost = (w_bar * cost).sum(1, keepdim=True) if normalizer == "sum" else 0.0
            G = G + w_bar * dphi * (cost - mean_cost)
    elif detach_weights:
        G = (omega * q - w_bar) / tau
    elif normalizer == "sum":
        s_bar = (w_bar * s).sum(1, keepdim=True)
        G = (q - w_bar * (1 + dphi * (s - s_bar))) / tau
    else:
        G = (omega * q - w_bar * (1 - tau * dphi * gap)) / tau
    G = upstream[:, None] * valid * G

    def through_norm(dz, z, u):
        return (dz - (dz * z).sum(1, keepdim=True) * z) / u.norm(dim=1, keepdim=True)

    if own:
        return through_norm(G @ z if detach_keys else (G + G.T) @ z, z, u)
    return through_norm(G @ z_key, z, u), through_norm(G.T @ z, z_key, key)


@with_and_without_views
@pytest.mark.parametrize("detach_weights", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_the_analytic_one(variant, detach_weights, in_views):
    u, y, v = batch(n=16, d=6)
    for hard_negative_beta, detach_keys, temperature in ((0.0, False, 0.1), (1.5, True, 0.5)):
        options = {**variant, **view_options(v, in_views), "detach_weights": detach_weights, "temperature": temperature,
                   "hard_negative_beta": hard_negative_beta, "detach_keys": detach_keys}  # fmt: skip
        upstream = torch.linspace(0.5, 2.0, len(y), dtype=torch.float64)
        expected = analytic_gradient(u, y, upstream, **options)
        x = u.clone().requires_grad_()
        (ours,) = torch.autograd.grad(hard_supcon(x, y, reduction="none", **options), x, upstream)
        assert relative(ours, expected) < 1e-12


@pytest.mark.parametrize("detach_weights", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_with_other_keys(variant, detach_weights):
    u, y, _ = batch(n=9)
    key, key_labels, _ = batch(n=13, seed=1)
    key_labels[-1] = 5
    options = {**variant, "detach_weights": detach_weights}
    upstream = torch.linspace(0.5, 2.0, len(y), dtype=torch.float64)
    expected = analytic_gradient(u, y, upstream, key=key, key_labels=key_labels, **options)
    x, x_key = u.clone().requires_grad_(), key.clone().requires_grad_()
    rows = hard_supcon(x, y, ref_embeddings=x_key, ref_labels=key_labels, reduction="none", **options)
    ours = torch.autograd.grad(rows, (x, x_key), upstream)
    assert relative(ours[0], expected[0]) < 1e-12 and relative(ours[1], expected[1]) < 1e-12
    still = hard_supcon(x, y, ref_embeddings=x_key, ref_labels=key_labels, detach_keys=True, **options)
    assert torch.autograd.grad(still, (x, x_key), allow_unused=True)[1] is None


@with_and_without_views
@pytest.mark.parametrize("denominator", ["all", "negatives"])
@pytest.mark.parametrize(("temperature", "beta"), [(0.1, 3.0), (0.5, 10.0), (0.07, 0.5), (0.2, -2.0)])
def test_detached_exp_gradient_is_that_of_the_soft_min(temperature, beta, denominator, in_views):
    u, y, v = batch(n=18, d=5, classes=4)
    u.requires_grad_()
    options = {"temperature": temperature, "beta": beta, "denominator": denominator, "hard_negative_beta": 0.5,
               **view_options(v, in_views)}  # fmt: skip
    loss, pooled = hard_supcon(u, y, reduction="none", **options), soft_min_supcon(u, y, reduction="none", **options)
    (detached,), (exact,) = torch.autograd.grad(loss.sum(), u), torch.autograd.grad(pooled.sum(), u)
    assert relative(detached, exact) < 1e-12
    # The duality: loss - soft-min = KL(w_bar || prior) / (beta tau), prior proportional to C on the positives.
    w_bar, valid = positive_weights(u, y, beta=beta, **view_options(v, in_views))
    prior, _ = positive_weights(u, y, weight="uniform", **view_options(v, in_views))
    kl = torch.where(w_bar > 0, w_bar * (w_bar / prior).log(), 0.0).sum(1)
    torch.testing.assert_close((loss - pooled)[valid], (kl / (beta * temperature))[valid], rtol=1e-9, atol=1e-12)


def test_gradcheck_of_the_soft_min():
    u, y, v = batch(n=6, d=2)
    options = {**view_options(v, True), "temperature": 0.4, "beta": 3.0}
    assert torch.autograd.gradcheck(lambda x: soft_min_supcon(x, y, **options), u.requires_grad_())
