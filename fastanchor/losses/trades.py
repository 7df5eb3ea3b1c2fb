"""The loss of TRADES (Zhang et al. 2019, arXiv 1901.08573) as functions of logits.

    CE(f(x), y) + beta (1 / N) sum_i KL(p(x_i) || p(x'_i)),   p = softmax(f), x' the adversarial image

The gradient flows into both predictions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastanchor.errors import UserError


def trades_loss(
    clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, beta: float | Tensor = 6.0, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy of the clean images plus beta times `mean_divergence`; the original's name for 1 / lambda is beta.

    clean_logits, adv_logits (N, K) floating, labels (N,) int64 -> 0-d, fp32 or fp64. label_smoothing: of the cross-entropy.
    Raises UserError for shapes that do not fit.
    """
    clean_logits, adv_logits = checked_logits(clean_logits, adv_logits, labels)
    natural = F.cross_entropy(clean_logits, labels, label_smoothing=label_smoothing)
    return natural + beta * mean_divergence(clean_logits, adv_logits)


def mean_divergence(clean_logits: Tensor, adv_logits: Tensor) -> Tensor:
    """(1 / N) sum_i KL(p(x_i) || p(x'_i)).

    Both (N, K) floating -> 0-d. Through logarithms of softmax only: finite for all finite logits.
    """
    return F.kl_div(adv_logits.log_softmax(1), clean_logits.log_softmax(1), reduction="batchmean", log_target=True)


def checked_logits(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits in fp32 at least. Raises UserError where they would broadcast instead of being compared image by image."""
    if clean_logits.ndim != 2 or clean_logits.shape != adv_logits.shape or labels.shape != clean_logits.shape[:1]:
        raise UserError(
            f"clean_logits have shape {tuple(clean_logits.shape)}, adv_logits {tuple(adv_logits.shape)} and labels "
            f"{tuple(labels.shape)}: must be (N, K), (N, K) and (N,)"
        )
    dtype = torch.promote_types(clean_logits.dtype, torch.float32)
    return clean_logits.to(dtype), adv_logits.to(dtype)
