"""The loss of MART (Wang et al. 2020, ICLR) as functions of logits.

    BCE(f(x'), y) + beta (1 / N) sum_i KL(p(x_i) || p(x'_i)) (1 - p_y(x_i)),   BCE = CE(f(x'), y) - log(1 - max_{k != y} p_k(x'))

The constants that keep its logarithms finite are those of the public code (YisenWang/MART, mart.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastanchor.losses.trades import checked_logits

# What stands for 1 in the margin's logarithm and in the weight, and what is added to a probability before its logarithm.
MARGIN_ONE = 1.0001
WEIGHT_ONE = 1.0000001
TINY = 1e-12


def mart_loss(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, beta: float | Tensor = 5.0) -> Tensor:
    """`boosted_cross_entropy` of the adversarial images plus beta (the paper's lambda) times `weighted_divergence`.

    clean_logits, adv_logits (N, K) floating with K >= 2, labels (N,) int64 -> 0-d, fp32 or fp64. Raises UserError for shapes that
    do not fit.
    """
    clean_logits, adv_logits = checked_logits(clean_logits, adv_logits, labels)
    return boosted_cross_entropy(adv_logits, labels) + beta * weighted_divergence(clean_logits, adv_logits, labels)


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p_y - log(1.0001 - p_k + 1e-12), with k the likeliest class but y. logits (N, K), labels (N,) -> 0-d."""
    log_p = logits.log_softmax(1)
    # One class, not the maximum's value: of equal probabilities one gets the gradient, as in the public code.
    likeliest = log_p.detach().scatter(1, labels[:, None], -torch.inf).argmax(1, keepdim=True)
    wrong = log_p.gather(1, likeliest).exp()
    return F.nll_loss(log_p, labels) - (MARGIN_ONE - wrong + TINY).log().mean()


def weighted_divergence(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> Tensor:
    """(1 / N) sum_i KL(p(x_i) || p(x'_i) + 1e-12) (1.0000001 - p_y(x_i)); the gradient flows into both, and into the weight.

    clean_logits, adv_logits (N, K), labels (N,) -> 0-d. Finite for all finite logits, and so is its gradient: the public code's
    is NaN in fp32 where a clean probability underflows.
    """
    log_p, log_q = clean_logits.log_softmax(1), adv_logits.log_softmax(1)
    # log(q + 1e-12) without q itself, which underflows.
    log_q = torch.logaddexp(log_q, torch.full_like(log_q, math.log(TINY)))
    p = log_p.exp()
    weight = WEIGHT_ONE - p.gather(1, labels[:, None]).squeeze(1)
    return ((p * (log_p - log_q)).sum(1) * weight).mean()
