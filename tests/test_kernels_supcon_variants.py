"""The rarer variants of the SupCon kernels under Triton's interpreter: top-k, pairwise, biased negatives, low temperatures, other keys."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastanchor.kernels import supcon, supcon_pairs
from interpreter import interpreted
from supcon_helpers import COEF, MASK
from supcon_truth import check, data, ours, truth

from bench import supcon_cases

VIEWS = torch.arange(66) % 3
IN_VIEWS = {"views": VIEWS, "positive_coef": COEF, "denominator_mask": MASK}
PREDICTIONS = torch.arange(66) * 7 % 5 % 4


@pytest.fixture(autouse=True)
def on_the_interpreter():
    with interpreted(supcon, supcon_pairs):
        yield


@pytest.mark.parametrize("precision", ["ieee", "fp16"])
@pytest.mark.parametrize("regime", supcon_cases.REGIMES)
@pytest.mark.parametrize("case", supcon_cases.CASES)
def test_every_option_in_every_regime(case, regime, precision):
    """By one program for each block of rows, which goes over all column tiles; small batches are else split to one tile each."""
    u, y, options = supcon_cases.batch(case, regime, 66, 32, torch.device("cpu"))
    check(u, y, precision=precision, splits=1, **options)


# ---------------------------------------------------------------- top-k


@pytest.mark.parametrize("k", [1, 3, 8, 63])
@pytest.mark.parametrize("normalizer", ["sum", "count"])
def test_topk(k, normalizer):
    check(*data("random", 66, 32, classes=4), weight="topk", k=k, normalizer=normalizer)
    check(*data("mid", 66, 32, classes=2), weight="topk", k=k, normalizer=normalizer, detach_weights=False)


def test_topk_with_every_option():
    u, y = data("random", 66, 32, classes=4)
    check(u, y, weight="topk", k=2, **IN_VIEWS)
    check(u, y, weight="topk", k=2, denominator="pairwise", hard_negative_beta=1.0)
    check(u, y, weight="topk", k=2, temperature=0.01, selection="leaking", predictions=PREDICTIONS)
    keys, key_labels = data("random", 200, 32, classes=4, seed=1)
    check(u, y, weight="topk", k=5, ref_embeddings=keys, ref_labels=key_labels)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_topk_of_rounded_rows(precision):
    u, y = data("random", 66, 32)
    check(u, y, precision=precision, weight="topk", k=2)


def test_topk_selects_all_that_tie_with_the_last():
    u, _ = data("random", 12, 32)
    u, y = u.repeat(6, 1), torch.arange(72) % 3
    check(u, y, weight="topk", k=7)
    copies = 2.0 ** torch.arange(-3, 3).repeat_interleave(12)[:, None]  # equal unit rows to the last bit
    check(u * copies, y, weight="topk", k=7)


# ---------------------------------------------------------------- pairwise, biased negatives

WEIGHTS = [{"weight": "uniform"}, {"beta": 2.0}, {"beta": -1.5}, {"weight": "pow", "gamma": 2.0}]


@pytest.mark.parametrize("detach_weights", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("normalizer", ["sum", "count"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: "-".join(map(str, weight.values())))
def test_pairwise(weight, normalizer, detach_weights):
    check(*data("mid", 66, 32), denominator="pairwise", normalizer=normalizer, detach_weights=detach_weights, **weight)


@pytest.mark.parametrize("regime", ["random", "mid", "trained"])
@pytest.mark.parametrize("precision", ["ieee", "fp16"])
def test_pairwise_in_every_regime(regime, precision):
    u, y = data(regime, 130, 64)
    check(u, y, precision=precision, denominator="pairwise")
    check(u, y, precision=precision, denominator="pairwise", hard_negative_beta=2.0, detach_weights=False)


def test_pairwise_with_views_instances_and_rows_of_their_own():
    u, y = data("random", 66, 32, classes=4)
    check(u, y, denominator="pairwise", detach_weights=False, **IN_VIEWS)
    check(u, y, denominator="pairwise", instances=y // 2, anchors=VIEWS > 0, reduction="mean_all")
    for denominator in ("pairwise", "negatives"):
        check(u, torch.zeros_like(y), denominator=denominator)  # no negatives: exactly 0
        assert not any(part.any() for part in ours(u, torch.zeros_like(y), denominator=denominator))
    upstream = torch.linspace(-1, 2, 66)
    for got, want in zip(
        ours(u, y, upstream=upstream, denominator="pairwise", reduction="none"),
        truth(u, y, upstream=upstream.double(), denominator="pairwise", reduction="none"),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [1.0, -1.5, 20.0])
@pytest.mark.parametrize("denominator", ["all", "negatives", "pairwise"])
def test_biased_negatives(denominator, bias):
    u, y = data("mid", 66, 32, classes=4)
    check(u, y, denominator=denominator, hard_negative_beta=bias)
    check(u, y, denominator=denominator, hard_negative_beta=bias, normalizer="count", detach_weights=False, **IN_VIEWS)


def test_biased_negatives_of_one_class_or_none():
    u, y = data("random", 66, 32)
    check(u, torch.zeros_like(y), hard_negative_beta=1.0)
    check(u, torch.arange(66), hard_negative_beta=1.0)


# ---------------------------------------------------------------- low temperatures


@pytest.mark.parametrize("temperature", [0.02, 0.005, 0.001])
@pytest.mark.parametrize("regime", ["random", "mid", "trained"])
def test_low_temperatures(regime, temperature):
    u, y = data(regime, 66, 32)
    check(u, y, temperature=temperature)
    check(u, y, temperature=temperature, normalizer="count", detach_weights=False, hard_negative_beta=1.0, splits=1)


@pytest.mark.parametrize("denominator", ["negatives", "pairwise"])
def test_low_temperatures_with_other_options(denominator):
    u, y = data("random", 66, 32, classes=4)
    check(u, y, temperature=0.01, denominator=denominator, hard_negative_beta=1.0)
    check(u, y, temperature=0.01, denominator=denominator, detach_weights=False, **IN_VIEWS)
    keys, key_labels = data("random", 3, 32, classes=4, seed=1)
    check(u, y, temperature=0.01, denominator=denominator, ref_embeddings=keys, ref_labels=key_labels)


def test_far_rows_at_a_low_temperature():
    """Every other row is at the opposite end, where a maximum fixed at s = 1 would leave nothing of exp(-2 / tau)."""
    u, _ = data("random", 2, 32)
    rows = torch.cat([u[:1], -u[:1] + 1e-3, -2 * u[:1] - 1e-3])
    check(rows, torch.tensor([0, 0, 1]), temperature=0.01)
    check(rows[:2], torch.tensor([0, 0]), temperature=0.001)


# ---------------------------------------------------------------- selections by prediction


@pytest.mark.parametrize("denominator", ["all", "negatives", "pairwise"])
@pytest.mark.parametrize("selection", ["hard", "soft", "merge", "leaking"])
def test_selections(selection, denominator):
    u, y = data("random", 66, 32, classes=4)
    chosen = {"selection": selection, "denominator": denominator}
    check(u, y, predictions=PREDICTIONS, detach_weights=False, **chosen)
    check(u, y, predictions=PREDICTIONS, detach_keys=True, **chosen, **IN_VIEWS)
    keys, key_labels = data("random", 40, 32, classes=4, seed=1)
    refs = {"ref_embeddings": keys, "ref_labels": key_labels, "ref_predictions": key_labels.flip(0)}
    check(u, y, predictions=PREDICTIONS, **chosen, **refs)


# ---------------------------------------------------------------- other keys


@pytest.mark.parametrize("denominator", ["all", "pairwise"])
@pytest.mark.parametrize("n_keys", [1, 200])
def test_other_keys_get_their_gradient(n_keys, denominator):
    u, y = data("random", 66, 32, classes=4)
    keys, key_labels = data("random", n_keys, 32, classes=4, seed=1)
    refs = {"ref_embeddings": keys, "ref_labels": key_labels, "denominator": denominator}
    if n_keys > 1:
        assert len(ours(u, y, **refs)) == 3
    check(u, y, **refs)
    check(u, y, **refs, detach_weights=False, hard_negative_beta=1.0)
    check(u, y, **refs, ref_views=torch.arange(n_keys) % 3, **IN_VIEWS)
    check(u, y, **refs, detach_keys=True)
    check(u, y, **refs, precision="fp16")


@pytest.mark.parametrize("precision", ["fp16", "ieee"])
def test_padding_is_no_row_even_where_all_keys_are_far(precision):
    """A padded column is closer than the only key: its G would pass the end of fp16. Labels of -1 are those of pads."""
    u, _ = data("random", 3, 32)
    for y in (torch.tensor([0, 0, 1]), torch.tensor([-1, -1, 1])):
        rows = torch.cat([u[:1], -u[:1] + 1e-2, 2 * u[:1]])
        check(rows, y, precision=precision, ref_embeddings=-u[:1] + 2e-2, ref_labels=y[:1])
        check(rows[:2], y[:2], precision=precision, beta=-20.0, normalizer="count")


def test_zero_rows_among_other_keys():
    u, y = (x.clone() for x in data("random", 40, 32, classes=4))
    keys, key_labels = (x.clone() for x in data("random", 20, 32, classes=4, seed=1))
    u[3], keys[7] = 0, 0
    refs = {"ref_embeddings": keys, "ref_labels": key_labels}
    check(u, y, **refs)
    assert not ours(u, y, **refs)[2][7].any()


# ---------------------------------------------------------------- random shapes and options


# Shrinking a failure would take minutes: a kernel of the interpreter is slow.
@settings(
    max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_random_shapes_and_options(data):
    pick = data.draw
    n, d = pick(st.integers(1, 140), label="n"), pick(st.integers(3, 70), label="d")
    generator = torch.Generator().manual_seed(pick(st.integers(0, 99), label="seed"))
    classes = pick(st.sampled_from([1, 2, 5, 100]), label="classes")

    def rows(count):
        labels = torch.randint(classes, (count,), generator=generator)
        return torch.randn(count, d, generator=generator) + 0.3, labels

    u, y = rows(n)
    options = {
        "weight": pick(st.sampled_from(["exp", "uniform", "pow"]), label="weight"),
        "beta": pick(st.sampled_from([2.0, -1.0]), label="beta"),
        "detach_weights": pick(st.booleans(), label="detached"),
        "normalizer": pick(st.sampled_from(["sum", "count"]), label="normalizer"),
        "denominator": pick(st.sampled_from(["all", "pairwise", "negatives"]), label="denominator"),
        "hard_negative_beta": pick(st.sampled_from([0.0, 1.0]), label="hard"),
        "temperature": pick(st.sampled_from([0.1, 0.5, 0.01]), label="temperature"),
        "reduction": pick(st.sampled_from(["mean_valid", "mean_all", "sum"]), label="reduction"),
        "detach_keys": pick(st.booleans(), label="detach_keys"),
        "precision": pick(st.sampled_from(["ieee", "fp16"]), label="precision"),
    }
    if pick(st.booleans(), label="keys"):
        keys, key_labels = rows(pick(st.integers(1, 140), label="m"))
        options |= {"ref_embeddings": keys, "ref_labels": key_labels}
    # With few features the rounding of G to fp16 is no less than that of the rows, which alone the comparison has.
    check(u, y, floor=2e-3 if options["precision"] == "fp16" else 1e-6, **options)
