"""Variants of the hardness-weighted SupCon, batches to try them on, and the loss as pure Python loops."""

import itertools
import math

import pytest
import torch

aten = torch.ops.aten
NO_HARDNESS = {"weight": "uniform"}
WEIGHTS = [
    NO_HARDNESS,
    {"weight": "exp", "beta": 2.0},
    {"weight": "exp", "beta": -1.5},
    {"weight": "pow", "gamma": 0.5},
    {"weight": "pow", "gamma": 2.0},
    {"weight": "topk", "k": 2},
]
NORMALIZERS, DENOMINATORS = ("sum", "count"), ("all", "pairwise", "negatives")
COEF = torch.tensor([[1.0, 0.5, 2.0], [0.0, 1.0, 1.5], [2.0, 1.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
VARIANTS = [
    pytest.param({**weight, "normalizer": normalizer, "denominator": denominator},
                 id="-".join([*map(str, weight.values()), normalizer, denominator]))
    for weight, normalizer, denominator in itertools.product(WEIGHTS, NORMALIZERS, DENOMINATORS)
]  # fmt: skip
with_and_without_views = pytest.mark.parametrize("in_views", [False, True], ids=["plain", "views"])


def batch(n=12, d=5, classes=3, seed=0):
    """fp64 rows, labels whose last row is alone in its class, view ids 0, 1, 2, 0, ..."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.3
    y = torch.arange(n) // 3 % classes
    y[-1] = 77
    return u, y, torch.arange(n) % 3


def view_options(v, in_views):
    return {"views": v, "positive_coef": COEF, "denominator_mask": MASK} if in_views else {}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def loop_rows(
    u,
    y,
    *,
    temperature=0.1,
    weight="exp",
    beta=2.0,
    gamma=1.0,
    k=8,
    normalizer="sum",
    denominator="all",
    hard_negative_beta=0.0,
    views=None,
    positive_coef=None,
    denominator_mask=None,
    instances=None,
    selection="all",
    predictions=None,
    weights_from=None,
):
    """L_i of every row (None if not valid) in Python floats; what is detached is computed from `weights_from` (default u)."""

    def cosines(rows):
        unit = [[x / math.sqrt(sum(x * x for x in row)) for x in row] for row in rows.tolist()]
        return [[sum(a * b for a, b in zip(p, q, strict=True)) for q in unit] for p in unit]

    s, fixed = cosines(u), cosines(u if weights_from is None else weights_from)
    label, rows, n = y.tolist(), [], len(y)
    for i in range(n):

        def coef(p, i=i):
            return 1.0 if positive_coef is None else positive_coef[views[i], views[p]].item()

        def kept(a, i=i):
            if selection == "all" or (label[a] == label[i] and selection != "leaking"):
                return True
            taken, alike = predictions[a] == label[i], predictions[a] == predictions[i]
            return {"hard": taken, "soft": alike, "merge": taken or alike, "leaking": alike}[selection]

        others = [a for a in range(n) if a != i and kept(a)]
        positives = [
            p for p in others if label[p] == label[i] and coef(p) > 0 and (instances is None or instances[p] == instances[i])
        ]
        in_denominator = [a for a in others if denominator_mask is None or denominator_mask[views[i], views[a]].item() != 0]
        negatives = [a for a in in_denominator if label[a] != label[i]]
        terms = in_denominator if denominator == "all" else negatives
        if not positives or not terms:
            rows.append(None)
            continue
        ordered = sorted(fixed[i][p] for p in positives)
        theta = (ordered[k - 1] + ordered[k]) / 2 if weight == "topk" and len(ordered) > k else math.inf
        h = {
            "uniform": lambda x: 1.0,
            "exp": lambda x: math.exp(-beta * x),
            "pow": lambda x: (1 - x + 1e-6) ** gamma,
            "topk": lambda x, theta=theta: float(x <= theta),
        }[weight]
        w = {p: coef(p) * h(fixed[i][p]) for p in positives}
        norm = sum(w.values()) if normalizer == "sum" else len(positives)
        importance = {a: math.exp(hard_negative_beta * fixed[i][a]) for a in negatives}
        mean_importance = sum(importance.values()) / len(negatives) if negatives else 1.0
        lse = math.log(sum(math.exp(s[i][a] / temperature) * importance.get(a, mean_importance) / mean_importance for a in terms))
        gap = {p: lse - s[i][p] / temperature for p in positives}
        cost = {p: math.log1p(math.exp(x)) for p, x in gap.items()} if denominator == "pairwise" else gap
        rows.append(sum(w[p] * cost[p] for p in positives) / norm)
    return rows


def mean_valid(rows):
    valid = [row for row in rows if row is not None]
    return sum(valid) / len(valid)
