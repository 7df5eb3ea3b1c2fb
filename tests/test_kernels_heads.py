"""The loss heads, run by Triton's interpreter, against fp64 autograd of the references (of DLR and MART: written here)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastanchor.kernels import heads
from interpreter import interpreted

from fastanchor.reference import objectives


@pytest.fixture(autouse=True)
def on_the_interpreter():
    with interpreted(heads):
        yield


def dlr(logits, labels):
    """Croce & Hein 2020, eq. 6 (untargeted), by sorting."""
    ordered, order = logits.sort(dim=1, descending=True)
    true = logits.gather(1, labels[:, None])[:, 0]
    other = torch.where(order[:, 0] == labels, ordered[:, 1], ordered[:, 0])
    return -(true - other) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def mart_bce(logits, labels):
    """Wang et al. 2020, eq. 6 with the code's 1.0001: cross-entropy, and the margin of the most probable wrong class."""
    p = logits.softmax(1)
    wrong = p.scatter(1, labels[:, None], -1.0).amax(1)
    return -logits.log_softmax(1).gather(1, labels[:, None])[:, 0] - (1.0001 - wrong).log()


TRUTHS = {"ce": objectives.cross_entropy, "cw": objectives.cw_margin, "dlr": dlr, "mart_bce": mart_bce}


def random_logits(count, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, classes, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator), scale * torch.randn(count, classes, generator=generator)


def truth_of(function, logits, *rest):
    logits = logits.double().requires_grad_()
    value = function(logits, *rest)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def assert_near(found, truth, tolerance, floor=1e-30):
    found, truth = found.double(), truth.double()
    assert (found - truth).norm() <= tolerance * truth.norm() + floor, ((found - truth).norm() / truth.norm()).item()


classes = st.one_of(st.integers(3, 17), st.sampled_from([2, 100, 128, 1000]))


@pytest.mark.parametrize("kind", heads.KINDS)
@settings(max_examples=20)
@given(count=st.integers(1, 70), classes=classes, scale=st.sampled_from([0.1, 3.0, 30.0]), seed=st.integers(0, 99))
def test_heads_with_labels_are_fp64_autograd(kind, count, classes, scale, seed):
    classes = max(classes, 3) if kind == "dlr" else classes
    logits, labels, _ = random_logits(count, classes, scale, seed)
    value, gradient = heads.label_head(kind, logits, labels)
    expected, expected_gradient = truth_of(TRUTHS[kind], logits, labels)
    # They sum to 0; that of the true class cancels, in fp64 too, where the model is sure of itself.
    others = expected_gradient.scatter(1, labels[:, None], 0.0).sum(1, keepdim=True)
    torch.testing.assert_close(expected_gradient.gather(1, labels[:, None]), -others, rtol=1e-9, atol=1e-12)
    expected_gradient.scatter_(1, labels[:, None], -others)
    assert value.dtype == torch.float32 and gradient.dtype == logits.dtype
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    # dlr divides by the gap between two logits, which amplifies rounding, and with three classes its gradient can be the 1e-12.
    tolerance = {"ce": 3e-6, "cw": 1e-7, "dlr": 1e-5, "mart_bce": 5e-6}[kind]
    assert_near(gradient, expected_gradient, tolerance, 1e-7 if kind == "dlr" else 1e-30)


@settings(max_examples=25)
@given(count=st.integers(1, 70), classes=classes, scale=st.sampled_from([0.1, 3.0, 30.0]), seed=st.integers(0, 99))
def test_the_kl_head_is_fp64_autograd_for_both_of_its_arguments(count, classes, scale, seed):
    logits, labels, clean = random_logits(count, classes, scale, seed)
    to_clean = torch.full_like(clean, 9)
    value, gradient = heads.kl_head(logits, clean, clean_gradient=to_clean)
    expected, expected_gradient = truth_of(objectives.kl_divergence, logits, labels, clean.double())
    _, expected_to_clean = truth_of(lambda c: objectives.kl_divergence(logits.double(), labels, c), clean)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    assert_near(gradient, expected_gradient, 3e-6)
    assert_near(to_clean, expected_to_clean, 2e-5)
    again, _ = heads.kl_head(logits, clean)
    assert torch.equal(again, value)


def test_ce_is_right_where_the_model_is_sure_of_itself():
    """p_y - 1 would be 0 or a multiple of 6e-8 here; minus the sum of the others is right to rounding."""
    logits = torch.tensor([[30.0, 0.0, 1.0], [100.0, 20.0, 19.0], [1e4, -1e4, 1e4 - 40]])
    labels = torch.zeros(3, dtype=torch.int64)
    _, gradient = heads.label_head("ce", logits, labels)
    _, expected = truth_of(objectives.cross_entropy, logits, labels)
    expected[:, 0] = -expected[:, 1:].sum(1)  # fp64 cancels as well, later
    assert gradient[:2].abs().min() > 0
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-6, atol=1e-38)


def test_ties_are_shared_as_amax_shares_them():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0], [5.0, 1.0, 1.0, 1.0]])
    labels = torch.tensor([0, 1, 0])
    for kind in ("cw", "mart_bce"):
        _, gradient = heads.label_head(kind, logits, labels)
        _, expected = truth_of(TRUTHS[kind], logits, labels)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def test_dlr_with_ties_takes_the_first_of_each():
    # Ordered: classes 0, 2, 3 or, for the second row, 1, 2, 0; values and gradients by hand from the formula.
    logits, labels = torch.tensor([[4.0, 1.0, 4.0, 2.0], [1.0, 3.0, 3.0, 1.0]]), torch.tensor([0, 3])
    value, gradient = heads.label_head("dlr", logits, labels)
    torch.testing.assert_close(value, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.0, 0.5, 0.0], [0.5, 0.0, 0.0, -0.5]]))


@pytest.mark.parametrize("kind", [*heads.KINDS, "kl"])
def test_extremes_are_finite_and_nan_is_seen(kind):
    logits, labels, clean = random_logits(5, 7, 1.0, 0)
    logits[0] *= 1e4
    logits[1, 3], labels[1] = float("nan"), 0
    value, gradient = heads.kl_head(logits, clean) if kind == "kl" else heads.label_head(kind, logits, labels)
    assert value.isnan().tolist() == [False, True, False, False, False]
    rest = [0, 2, 3, 4]
    assert value[rest].isfinite().all() and gradient[rest].isfinite().all()


@pytest.mark.parametrize("kind", [*heads.KINDS, "kl"])
def test_bf16_logits_in_place(kind):
    logits, labels, clean = random_logits(9, 10, 3.0, 1)
    logits, clean = logits.bfloat16(), clean.bfloat16()
    call = (
        (lambda z, g: heads.kl_head(z, clean.to(z), g)) if kind == "kl" else (lambda z, g: heads.label_head(kind, z, labels, g))
    )
    expected, expected_gradient = call(logits.float(), None)
    value, gradient = call(logits, logits)
    assert gradient is logits and torch.equal(value, expected)
    # The interpreter truncates where a GPU rounds: one unit of bf16's 8 bits.
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=2**-7, atol=1e-30)


def test_what_is_refused():
    logits, labels, clean = random_logits(4, 5, 1.0, 0)
    for kind, arguments, message in (
        ("bce", (logits, labels), "kind = 'bce'"),
        ("ce", (logits.double(), labels), "logits is torch.float64"),
        ("ce", (logits.T, labels), r"logits have shape \(5, 4\): must be \(N, K\), contiguous"),
        ("ce", (logits, labels[:2]), "labels have shape"),
        ("ce", (logits, labels.int()), "labels is torch.int32"),
        ("ce", (logits[:, :1].contiguous(), labels), "logits have 1 classes: must be 2 to 4096"),
        ("dlr", (logits[:, :2].contiguous(), labels), "logits have 2 classes: must be 3 to 4096"),
        ("ce", (logits, labels, logits[:2]), "gradient has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            heads.label_head(kind, *arguments)
    with pytest.raises(ValueError, match="clean_logits is torch.bfloat16"):
        heads.kl_head(logits, clean.bfloat16())
    with pytest.raises(ValueError, match="clean_gradient has shape"):
        heads.kl_head(logits, clean, None, clean[:2])
