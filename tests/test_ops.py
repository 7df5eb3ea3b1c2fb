"""Hard-positive SupCon as an operator: registration, autograd around it, one graph under torch.compile, random shapes."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from supcon_helpers import COEF, MASK, batch, loop_rows, mean_valid, relative

from fastanchor import ops
from fastanchor.losses import HardSupConLoss
from fastanchor.ops import supcon
from fastanchor.reference.hard_supcon import hard_supcon

OPTIONS = {"temperature": 0.2, "detach_weights": False, "scale": 0.7}
REDUCTIONS = ("mean_valid", "none")


def value_and_grads(function, *rows, upstream=None):
    rows = [value.clone().requires_grad_() for value in rows]
    loss = function(*rows)
    upstream = torch.full_like(loss, 3.0) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, rows, upstream)


def same(ours, expected, **tolerance):
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


# ---------------------------------------------------------------- the CPU implementation is the reference


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operator_is_the_reference_on_a_cpu(dtype, reduction):
    u, y, v = batch()
    more = {"views": v, "positive_coef": COEF, "denominator_mask": MASK, "anchors": v > 0, "reduction": reduction, **OPTIONS}
    upstream = torch.arange(12.0) if reduction == "none" else torch.tensor(3.0)
    ours = value_and_grads(lambda x: ops.hard_supcon(x, y, beta=torch.tensor(1.5), **more), u.to(dtype), upstream=upstream)
    expected = value_and_grads(lambda x: hard_supcon(x, y, beta=1.5, **more), u.to(dtype), upstream=upstream)
    assert ours[1].dtype == dtype
    same(ours, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_argument_reaches_the_reference(reduction):
    """Each is given a value of its own; without it, or with another where it may not be left out alone, the gradient is another."""
    (u, y, v), (key, key_labels, key_views) = batch(), batch(n=9, seed=1)
    key_labels = key_labels.clone()
    key_labels[-1] = 1
    given = {
        "temperature": 0.3, "beta": 0.7, "detach_weights": False, "normalizer": "count", "denominator": "pairwise",
        "hard_negative_beta": 0.5, "selection": "soft", "scale": 0.9, "reduction": reduction, "views": v, "ref_views": key_views,
        "positive_coef": COEF, "denominator_mask": MASK, "instances": torch.arange(12) % 2, "ref_instances": torch.arange(9) % 2,
        "predictions": torch.arange(12) % 3, "ref_predictions": torch.arange(9) % 2, "anchors": v != 1,
    }  # fmt: skip

    def loss(function, **options):
        return value_and_grads(lambda x, k: function(x, y, ref_embeddings=k, ref_labels=key_labels, **options), u, key)

    full = loss(ops.hard_supcon, **given)
    same(full, loss(hard_supcon, **given), rtol=1e-12, atol=1e-14)
    others = {"reduction": "mean_all"}
    for name in ("views", "instances", "predictions"):
        others |= {key: given[key].roll(1) for key in (name, f"ref_{name}")}
    for name in given:
        rest = {key: value for key, value in given.items() if key != name}
        if name in others:
            rest[name] = others[name]
        assert relative(loss(ops.hard_supcon, **rest)[1], full[1]) > 1e-6, name
    for weight in ({"weight": "topk", "k": 1}, {"weight": "pow", "gamma": 3.0}, {"detach_weights": True}):
        ours, expected = (loss(function, **{**given, **weight}) for function in (ops.hard_supcon, hard_supcon))
        same(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("fixed", ["embeddings", "keys", "keys detached"])
def test_a_gradient_goes_only_where_one_is_wanted(fixed, reduction):
    (u, y, _), (key, key_labels, _) = batch(), batch(n=9, seed=1)
    found = {}
    for name, function in (("ours", ops.hard_supcon), ("theirs", hard_supcon)):
        x, k = u.clone().requires_grad_(fixed != "embeddings"), key.clone().requires_grad_(fixed != "keys")
        loss = function(
            x, y, ref_embeddings=k, ref_labels=key_labels, detach_keys=fixed == "keys detached", reduction=reduction, **OPTIONS
        )
        loss.sum().backward()
        found[name] = x.grad, k.grad
    assert [grad is None for grad in found["ours"]] == [fixed == "embeddings", fixed != "embeddings"]
    same(found["ours"], found["theirs"])


def test_nothing_is_computed_for_gradients_that_nobody_asks_for(monkeypatch):
    asked = []
    real = supcon.reference
    monkeypatch.setattr(supcon, "reference", lambda x, *a, **k: asked.append(x.requires_grad) or real(x, *a, **k))
    u, y, _ = batch()
    ops.hard_supcon(u, y)
    with torch.no_grad():
        ops.hard_supcon(u.clone().requires_grad_(), y)
    x = u.clone().requires_grad_()
    loss = ops.hard_supcon(x, y)
    assert asked == [False, False, True]
    loss.backward()
    assert len(asked) == 3  # a scalar's gradient was kept
    ops.hard_supcon(x, y, reduction="none").sum().backward()
    assert asked[3:] == [False, True]


def test_backward_may_run_twice():
    u, y, _ = batch()
    x = u.clone().requires_grad_()
    loss = ops.hard_supcon(x, y)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, 2 * torch.ones_like(loss), retain_graph=True)
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("once_more", ["backward", "grad", "by the weight of the loss"])
def test_a_second_derivative_is_refused_and_not_left_out(once_more, reduction):
    u, y, _ = batch()
    x, share = u.clone().requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = share * ops.hard_supcon(x, y, reduction=reduction).sum() + x.square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = grad.square().sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated again; backend='torch' can"):
        if once_more == "backward":
            penalty.backward()
        else:
            torch.autograd.grad(penalty, x if once_more == "grad" else share)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    (u, y, _), (key, key_labels, _) = batch(n=7, d=3), batch(n=5, d=3, seed=1)
    u.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.hard_supcon(x, y, reduction=reduction, **OPTIONS), u)
    options = {"ref_labels": key_labels, "reduction": reduction, **OPTIONS}
    assert torch.autograd.gradcheck(lambda x, k: ops.hard_supcon(x, y, ref_embeddings=k, **options), (u, key))


# ---------------------------------------------------------------- random shapes against Python loops


@st.composite
def batches(draw):
    n, d, classes = draw(st.integers(1, 14)), draw(st.integers(1, 7)), draw(st.integers(1, 14))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    u = torch.randn(n, d, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        u[draw(st.integers(0, n - 1))] = u[0]  # a duplicate
    kind = draw(st.sampled_from(["random", "one class", "all different"]))
    y = {"random": torch.randint(classes, (n,), generator=g), "one class": torch.zeros(n, dtype=torch.long)}.get(
        kind, torch.arange(n)
    )
    options = {
        "temperature": draw(st.sampled_from([0.05, 0.1, 1.0])), "beta": draw(st.sampled_from([-1.5, 0.0, 2.0])),
        "weight": draw(st.sampled_from(["uniform", "exp", "pow", "topk"])), "k": draw(st.integers(1, 4)),
        "normalizer": draw(st.sampled_from(["sum", "count"])),
        "denominator": draw(st.sampled_from(["all", "pairwise", "negatives"])),
        "hard_negative_beta": draw(st.sampled_from([0.0, 1.0])),
    }  # fmt: skip
    if draw(st.booleans()):
        options |= {"views": torch.arange(n) % 3, "positive_coef": COEF, "denominator_mask": MASK}
    if draw(st.booleans()):
        options["instances"] = torch.arange(n) % 2
    return u, y, options


@given(batches())
@settings(max_examples=60)
def test_random_batches_are_python_loops(drawn):
    u, y, options = drawn
    rows = loop_rows(u, y, **options)
    ours = ops.hard_supcon(u, y, reduction="none", **options)
    # The distance of duplicates is a rounding, which pow and the k smallest see.
    close = {"rtol": 1e-9, "atol": 1e-8}
    torch.testing.assert_close(ours, torch.tensor([row or 0.0 for row in rows], dtype=torch.float64), **close)
    mean = mean_valid(rows) if any(row is not None for row in rows) else 0.0
    loss, grad = value_and_grads(lambda x: ops.hard_supcon(x, y, **options), u)
    torch.testing.assert_close(loss, torch.tensor(mean, dtype=torch.float64), **close)
    assert torch.isfinite(grad).all()
    assert grad.any() or not any(row is not None for row in rows) or u.shape[1] == 1 or len(u) == 2


@given(batches(), st.integers(1, 9))
@settings(max_examples=40)
def test_keys_of_their_own_and_zero_rows(drawn, m):
    """Loops over a batch of anchors and keys in which the view matrices leave nothing but the pairs of an anchor with a key."""
    u, y, options = drawn
    options = {
        name: value for name, value in options.items() if name not in ("views", "positive_coef", "denominator_mask", "instances")
    }
    g = torch.Generator().manual_seed(m)
    keys, key_labels = torch.randn(m, u.shape[1], generator=g, dtype=torch.float64), torch.randint(3, (m,), generator=g)
    between = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    rows = loop_rows(
        torch.cat([u, keys]), torch.cat([y, key_labels]), views=torch.tensor([0] * len(u) + [1] * m), positive_coef=between,
        denominator_mask=between, **options,
    )[: len(u)]  # fmt: skip
    refs = {"ref_labels": key_labels, "reduction": "none", **options}
    ours = ops.hard_supcon(u, y, ref_embeddings=keys, **refs)
    torch.testing.assert_close(ours, torch.tensor([row or 0.0 for row in rows], dtype=torch.float64), rtol=1e-9, atol=1e-8)
    keys[0] = 0.0
    _, grad, key_grad = value_and_grads(lambda x, k: ops.hard_supcon(x, y, ref_embeddings=k, **refs), u, keys)
    assert not key_grad[0].any() and torch.isfinite(grad).all() and torch.isfinite(key_grad).all()


# ---------------------------------------------------------------- torch.library and torch.compile


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("keys", ["own", "given"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(needs, keys, reduction):
    u, y, v = batch()
    tensors = dict.fromkeys(supcon.TENSORS) | {"views": v, "positive_coef": COEF.float()}
    other = None
    if keys == "given":
        other = u.float().T.contiguous().T[:9] + 1
        tensors |= {"ref_labels": y[:9], "ref_views": v[:9]}
    needs = (needs[0], needs[1] and other is not None)
    upstream = torch.arange(12.0) if reduction == "none" else None
    arguments = (
        u.float(), other, y, 2.0, None, *tensors.values(), *{**supcon.SETTINGS, "reduction": reduction}.values(), upstream, *needs,
    )  # fmt: skip
    found = torch.library.opcheck(torch.ops.fastanchor.hard_supcon.default, arguments)
    assert set(found.values()) == {"SUCCESS"}
    _, *grads = torch.ops.fastanchor.hard_supcon(*arguments)
    assert [grad.numel() > 0 for grad in grads] == list(needs)


def conv_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 8))


@pytest.fixture
def compiling():
    """Recompilations are counted by code object, so one test's must not use up another's."""
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    "compiler, reduction, autocast",
    [
        ("aot_eager", "mean_valid", False),
        ("aot_eager", "none", False),
        ("aot_eager", "mean_valid", True),
        ("inductor", "sum", False),
    ],
)
def test_one_graph_of_a_model_and_the_loss(compiler, reduction, autocast):
    model, (_, y, v) = conv_net(), batch()
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = HardSupConLoss(beta=torch.tensor(1.5), reduction=reduction, anchors=[0, 1], backend="triton")

    def step(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss(model(x), y, views=v)

    compiled = torch.compile(step, backend=compiler, fullgraph=True, dynamic=False)
    ours, expected = (value_and_grads(function, images) for function in (compiled, step))
    digits = 2e-2 if autocast else 1e-5  # the compiler rounds activations to bf16 in other places
    assert ours[0].dtype == torch.float32
    assert relative(ours[0], expected[0]) < digits and relative(ours[1], expected[1]) < 4 * digits
    loss.beta.fill_(-1.0)
    assert relative(value_and_grads(compiled, images)[0], ours[0]) > 1e-3  # beta is no constant of the graph


@pytest.mark.usefixtures("compiling")
def test_one_graph_with_keys_that_move():
    (u, y, _), (key, key_labels, _) = batch(), batch(n=9, seed=1)

    def step(x, k):
        return ops.hard_supcon(2 * x, y, ref_embeddings=3 * k, ref_labels=key_labels)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    same(value_and_grads(compiled, u, key), value_and_grads(step, u, key))


@pytest.mark.usefixtures("compiling")
def test_the_graph_has_one_node_for_the_loss():
    seen = []

    def backend(graph, inputs):
        seen.append([node.target for node in graph.graph.nodes if node.op.startswith("call_")])
        return graph

    (u, y, _), loss = batch(), HardSupConLoss(backend="triton")
    with torch.no_grad():
        torch.compile(lambda x: loss(x, y), backend=backend, fullgraph=True)(u.float())
    (targets,) = seen
    node = torch.ops.fastanchor.hard_supcon
    computing = [target for target in targets if target not in ("to", operator.getitem)]
    assert computing in ([node], [node.default])
