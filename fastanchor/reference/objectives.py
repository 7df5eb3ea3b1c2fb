"""What attacks maximise, one value an image: cross-entropy, the CW margin, and TRADES' divergence from the clean prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)_y; logits (N, K) floating, labels (N,) int64 -> (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def cw_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max over k != y of logits_k, minus logits_y (Carlini & Wagner 2017, without the clamp); > 0 where misclassified.

    logits (N, K) floating with K >= 2, labels (N,) int64 -> (N,).
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - true


def kl_divergence(logits: Tensor, labels: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)), what the attack of TRADES maximises (Zhang et al. 2019); labels are not looked at.

    logits, clean_logits (N, K) floating -> (N,).
    """
    return F.kl_div(logits.log_softmax(1), clean_logits.log_softmax(1), reduction="none", log_target=True).sum(1)
