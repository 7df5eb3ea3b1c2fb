"""The loss modules: agreement with the reference and with public implementations, autocast, buffers, repr, bad arguments."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from fastanchor.errors import UserError
from fastanchor.losses import HardSupConLoss, SupConLoss
from fastanchor.losses.hard_supcon import BACKENDS, choose_backend
from fastanchor.reference.hard_supcon import hard_supcon

EXACT = {"rtol": 0, "atol": 0}


def batch(n=20, d=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=generator)
    y[-1] = 9  # a class of one
    return torch.randn(n, d, generator=generator, dtype=dtype), y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3, "beta": -1.0, "reduction": "none"},
        {"weight": "pow", "gamma": 2.0, "detach_weights": False, "normalizer": "count"},
        {"weight": "topk", "k": 2, "denominator": "pairwise", "scale": 3.0, "reduction": "sum"},
        {"weight": "uniform", "denominator": "negatives", "hard_negative_beta": 1.0, "detach_keys": True},
    ],
)
def test_hard_supcon_loss_is_the_reference(options):
    u, y = batch()
    for backend in BACKENDS:
        x, x_reference = u.clone().requires_grad_(), u.clone().requires_grad_()
        ours, expected = HardSupConLoss(**options, backend=backend)(x, y), hard_supcon(x_reference, y, **options)
        torch.testing.assert_close(ours, expected, **EXACT)
        ours.sum().backward(), expected.sum().backward()
        torch.testing.assert_close(x.grad, x_reference.grad, **EXACT)


def test_the_defaults_are_those_of_the_reference():
    ours = inspect.signature(HardSupConLoss).parameters
    theirs = inspect.signature(hard_supcon).parameters
    shared = ours.keys() & theirs.keys()
    assert ours.keys() - shared == {"backend", "precision"}
    assert {name: ours[name].default for name in shared} == {name: theirs[name].default for name in shared}
    assert inspect.signature(SupConLoss).parameters.keys() < ours.keys()


def test_views_references_and_instances_reach_the_reference():
    u, y = batch()
    key, key_labels = batch(n=15, seed=1)
    v, key_views = torch.arange(20) % 2, torch.arange(15) % 2
    coef, mask = [[1, 0.5], [2, 0]], [[1, 1], [0, 1]]
    as_tensors = {"positive_coef": torch.tensor(coef), "denominator_mask": torch.tensor(mask)}
    loss = HardSupConLoss(positive_coef=coef, denominator_mask=mask, anchors=1)
    expected = hard_supcon(u, y, views=v, anchors=1, **as_tensors)
    torch.testing.assert_close(loss(u, y, views=v), expected, **EXACT)
    assert abs(expected - hard_supcon(u, y, views=v, anchors=1)) > 1e-3
    refs = {"views": v, "ref_views": key_views, "instances": torch.arange(20) % 5, "ref_instances": torch.arange(15) % 5}
    expected = hard_supcon(u, y, ref_embeddings=key, ref_labels=key_labels, anchors=1, **as_tensors, **refs)
    torch.testing.assert_close(loss(u, y, key, key_labels, **refs), expected, **EXACT)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_supcon_loss_is_that_of_pytorch_metric_learning(temperature, dtype, tolerance):
    """Its mean runs over the rows of non-zero loss, which is reduction="mean_valid"."""
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    (u, y), (key, key_labels) = batch(dtype=dtype), batch(n=11, seed=3, dtype=dtype)
    ours, theirs = SupConLoss(temperature), pml.SupConLoss(temperature=temperature)
    x, x_theirs = u.clone().requires_grad_(), u.clone().requires_grad_()
    loss, expected = ours(x, y), theirs(x_theirs, y)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    loss.backward(), expected.backward()
    assert (x.grad - x_theirs.grad).norm() < 5 * tolerance * x.grad.norm()
    torch.testing.assert_close(ours(u, y, key, key_labels), theirs(u, y, None, key, key_labels), rtol=tolerance, atol=0)
    # One class: a loss here, zero there.
    assert ours(u, torch.zeros_like(y)) > 1 and theirs(u, torch.zeros_like(y)) == 0


def test_supcon_loss_is_a_double_loop_and_supcontrast_rescales_it():
    """SupContrast's code averages all rows, those without positives as 0, and multiplies by temperature / 0.07."""
    u, y = batch()
    tau, rows = 0.2, []
    unit = [[x / math.sqrt(sum(x * x for x in row)) for x in row] for row in u.tolist()]
    for i, z in enumerate(unit):
        e = {a: math.exp(sum(p * q for p, q in zip(z, other, strict=True)) / tau) for a, other in enumerate(unit) if a != i}
        positives = [a for a in e if y[a] == y[i]]
        rows.append(-sum(math.log(e[p] / sum(e.values())) for p in positives) / max(1, len(positives)))
    assert sum(row == 0 for row in rows) == 1
    assert SupConLoss(tau)(u, y).item() == pytest.approx(sum(rows) / (len(rows) - 1), rel=1e-12)
    supcontrast = SupConLoss(tau, reduction="mean_all", scale=tau / 0.07)
    assert supcontrast(u, y).item() == pytest.approx(tau / 0.07 * sum(rows) / len(rows), rel=1e-12)


def test_nt_xent_is_instance_ids_as_labels():
    u, _ = batch(n=10)
    logits = (F.normalize(u) @ F.normalize(u).T / 0.5).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    torch.testing.assert_close(SupConLoss(0.5)(u, torch.arange(5).repeat(2)), expected, rtol=1e-12, atol=0)


def test_c_lead_joint_is_pairwise_with_the_own_counterpart():
    u, y, tau = batch(n=12)[0], torch.tensor([0, 0, 1, 1, 2, 2]).repeat(2), 0.3
    ours = SupConLoss(tau, denominator="pairwise")(u, y, instances=torch.arange(6).repeat(2))
    s, total = (F.normalize(u) @ F.normalize(u).T / tau).tolist(), 0.0
    for i in range(12):
        own = math.exp(s[i][(i + 6) % 12])
        total -= math.log(own / (own + sum(math.exp(s[i][a]) for a in range(12) if y[a] != y[i])))
    assert ours.item() == pytest.approx(total / 12, rel=1e-12)


def test_suprobcon_by_reference_rows_and_by_views():
    clean, y = batch(n=9)
    adv, tau = clean + 0.3 * batch(n=9, seed=4)[0], 0.2
    by_rows = SupConLoss(tau, denominator="pairwise")(adv, y, clean, y)
    s, total = (F.normalize(adv) @ F.normalize(clean).T / tau).exp(), 0.0
    for i in range(9):
        positives = s[i, y == y[i]]
        total -= (positives / (positives + s[i, y != y[i]].sum())).log().mean()
    torch.testing.assert_close(by_rows, total / 9, rtol=1e-12, atol=0)
    # The same with views 0 = clean, 1 = adversarial in one batch; the own clean image is another row, not a self pair.
    clean_keys = [[1.0, 0.0], [1.0, 0.0]]
    stacked = SupConLoss(tau, denominator="pairwise", anchors=1, positive_coef=clean_keys, denominator_mask=clean_keys)
    by_views = stacked(torch.cat([clean, adv]), y.repeat(2), views=torch.tensor([0] * 9 + [1] * 9))
    torch.testing.assert_close(by_views, by_rows, rtol=1e-13, atol=0)


def test_supcon_loss_is_uniform_hard_supcon():
    u, y = batch()
    torch.testing.assert_close(SupConLoss(0.2)(u, y), HardSupConLoss(0.2, beta=0.0)(u, y), rtol=1e-14, atol=0)
    assert HardSupConLoss(0.2, beta=4.0)(u, y) > SupConLoss(0.2)(u, y) + 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_loss(dtype):
    u, y = batch(dtype=torch.float32)
    for options in ({}, {"weight": "pow", "detach_weights": False}, {"weight": "topk", "denominator": "pairwise"}):
        loss = HardSupConLoss(**options)
        x, x_cast = u.clone().requires_grad_(), u.clone().requires_grad_()
        expected = loss(x, y)
        with torch.autocast("cpu", dtype):
            ours = loss(x_cast, y)
        assert ours.dtype == torch.float32
        expected.backward(), ours.backward()
        torch.testing.assert_close(ours, expected, **EXACT)
        torch.testing.assert_close(x_cast.grad, x.grad, **EXACT)
        half = u.to(dtype)
        torch.testing.assert_close(loss(half, y), loss(half.float(), y), **EXACT)


def test_a_head_trains_under_autocast():
    u, y = batch(dtype=torch.float32)
    head, loss = torch.nn.Linear(6, 4), HardSupConLoss()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    values = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(head(u), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.detach())
    assert values[-1] < values[0] - 0.1


def test_beta_tensor_is_a_buffer_that_is_changed_in_place():
    u, y = batch()
    loss = HardSupConLoss(beta=torch.tensor(0.0))
    torch.testing.assert_close(loss(u, y), SupConLoss()(u, y), rtol=1e-14, atol=0)
    loss.beta.fill_(5.0)
    torch.testing.assert_close(loss(u, y), HardSupConLoss(beta=5.0)(u, y), rtol=1e-14, atol=0)
    assert dict(loss.named_buffers()).keys() == {"beta"} and not loss.state_dict()
    assert loss.double().beta.dtype == torch.float64
    assert copy.deepcopy(loss).beta is not loss.beta
    number = HardSupConLoss(beta=1.0)
    number.beta = 5.0
    torch.testing.assert_close(number(u, y), loss(u, y), rtol=1e-14, atol=0)


@pytest.mark.parametrize("selection", ["hard", "soft", "merge", "leaking"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ascl_selects_by_predictions(selection, backend):
    (u, y), (key, key_labels) = batch(), batch(n=15, seed=1)
    right = torch.rand(20, generator=torch.Generator().manual_seed(2)) < 0.6
    p, key_p = torch.where(right, y, 0), torch.arange(15) % 4
    loss = SupConLoss(0.2, selection=selection, reduction="mean_all", backend=backend)
    options = {"temperature": 0.2, "weight": "uniform", "selection": selection, "reduction": "mean_all"}
    torch.testing.assert_close(loss(u, y, predictions=p), hard_supcon(u, y, predictions=p, **options), **EXACT)
    assert abs(loss(u, y, predictions=p) - SupConLoss(0.2, reduction="mean_all")(u, y)) > 1e-3
    expected = hard_supcon(u, y, ref_embeddings=key, ref_labels=key_labels, predictions=p, ref_predictions=key_p, **options)
    torch.testing.assert_close(loss(u, y, key, key_labels, predictions=p, ref_predictions=key_p), expected, **EXACT)


def test_precision_is_that_of_the_kernels_alone():
    u, y = batch()
    for precision in ("tf32", "ieee"):
        for backend in BACKENDS:
            torch.testing.assert_close(HardSupConLoss(precision=precision, backend=backend)(u, y), hard_supcon(u, y), **EXACT)


def test_keys_get_a_gradient_by_every_backend():
    (u, y), (key, key_labels) = batch(), batch(n=15, seed=1)
    found = []
    for backend in BACKENDS:
        x, k = u.clone().requires_grad_(), key.clone().requires_grad_()
        HardSupConLoss(backend=backend)(x, y, k, key_labels).backward()
        found.append(torch.cat([x.grad, k.grad]))
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], **EXACT)
    assert found[0][20:].any()


def test_view_matrices_are_buffers_outside_the_state_dict():
    loss = HardSupConLoss(positive_coef=[[1.0, 0.0], [0.0, 1.0]])
    assert dict(loss.named_buffers()).keys() == {"positive_coef"} and not loss.state_dict()


def test_one_graph_without_breaks():
    """fullgraph=True refuses whatever reads a value on the host."""
    u, y = batch(dtype=torch.float32)
    loss = HardSupConLoss(beta=torch.tensor(2.0), hard_negative_beta=1.0)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    x, x_eager = u.clone().requires_grad_(), u.clone().requires_grad_()
    value, expected = compiled(x, y), loss(x_eager, y)
    value.backward(), expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(x.grad, x_eager.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weight", ["uniform", "exp", "pow", "topk"])
@pytest.mark.parametrize("denominator", ["all", "pairwise", "negatives"])
def test_cuda_never_synchronises(weight, denominator):
    u, y = (value.cuda() for value in batch(dtype=torch.float32))
    loss = HardSupConLoss(weight=weight, k=2, denominator=denominator, hard_negative_beta=1.0)
    expected = HardSupConLoss(weight=weight, k=2, denominator=denominator, hard_negative_beta=1.0)(u.cpu().double(), y.cpu())
    u.requires_grad_()
    loss(u, y).backward()  # the first call may initialise libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(u, y)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)


def test_repr_names_the_options_that_bear_on_the_loss():
    assert repr(HardSupConLoss()) == "HardSupConLoss(temperature=0.1, weight=exp, beta=2.0, backend=auto)"
    assert HardSupConLoss(precision="ieee").extra_repr() == "temperature=0.1, weight=exp, beta=2.0, precision=ieee, backend=auto"
    assert repr(SupConLoss(0.2, scale=2.0)) == "SupConLoss(temperature=0.2, weight=uniform, scale=2.0, backend=auto)"
    topk = HardSupConLoss(0.2, torch.tensor(1.0), "topk", k=3, detach_keys=True, positive_coef=[[1.0]], backend="torch")
    assert topk.extra_repr() == "temperature=0.2, weight=topk, k=3, detach_keys=True, positive_coef=<tensor>, backend=torch"
    assert "beta=<tensor>" in repr(HardSupConLoss(beta=torch.tensor(1.0)))


def test_auto_chooses_an_implementation():
    assert choose_backend("auto", torch.zeros(2, 2))[0] in BACKENDS[1:]
    assert [choose_backend(name, torch.zeros(2, 2))[0] for name in BACKENDS[1:]] == list(BACKENDS[1:])
    loss = HardSupConLoss()
    loss(*batch())
    assert loss.used.startswith("torch: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0, but must be > 0"),
        ({"weight": "hard"}, "weight is 'hard', but must be one of uniform, exp, pow, topk"),
        ({"backend": "trition"}, "backend is 'trition', but must be one of auto, torch, triton; did you mean 'triton'"),
        ({"precision": "bf16"}, "precision is 'bf16', but must be one of fp16, tf32, ieee"),
        ({"selection": "leak"}, "selection is 'leak', but must be one of all, hard, soft, merge, leaking"),
        ({"k": -1}, "k is -1"),
        ({"reduction": "mean"}, "reduction is 'mean'"),
        ({"beta": "2"}, "beta is '2'"),
    ],
)
def test_bad_options_are_refused_when_the_loss_is_made(options, message):
    with pytest.raises(UserError, match=message):
        HardSupConLoss(**options)


def test_bad_inputs_are_refused():
    u, y = batch()
    with pytest.raises(UserError, match=r"labels is a torch\.float64 tensor"):
        HardSupConLoss()(u, u[:, 0])
    with pytest.raises(UserError, match="ref_labels is None"):
        SupConLoss()(u, y, u)
    with pytest.raises(UserError, match="positive_coef is given, but views"):
        HardSupConLoss(positive_coef=[[1.0]])(u, y)


def test_normalised_and_raw_embeddings_give_one_loss():
    u, y = batch()
    torch.testing.assert_close(HardSupConLoss()(F.normalize(u), y), HardSupConLoss()(37.0 * u, y), rtol=1e-12, atol=0)
