"""The hardness-weighted SupCon and its gradient in blocks of rows, by the closed form: the truth where N x N is too much to hold.

No autograd: `fastanchor/reference/hard_supcon.py` derives what is written out here, and the tests compare the two. Memory is a
dozen block x M matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastanchor.reference.hard_supcon import POW_EPS
from fastanchor.reference.pairs import ZERO_NORM

# Elements of one matrix of a block: 0.5 GB in fp64.
BLOCK_ELEMENTS = 2**26


def blockwise(
    embeddings: Tensor,
    labels: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    block: int | None = None,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    detach_keys: bool = False,
    scale: float = 1.0,
    reduction: str = "mean_valid",
    **options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss (0-d), dL/d embeddings (N, D) and dL/d ref_embeddings (M, D; None without keys of their own), computed in `dtype`.

    Arguments are those of the reference's `hard_supcon`, with a scalar reduction and `anchors` as an (N,) bool tensor; block:
    rows at a time. On CUDA the products of fp32 follow torch's TF32 setting.
    """
    own = ref_embeddings is None
    z, norm = _unit(embeddings.to(dtype))
    z_key, norm_key = (z, norm) if own else _unit(ref_embeddings.to(dtype))
    key_labels = labels if own else ref_labels
    dz, dz_key = torch.zeros_like(z), torch.zeros_like(z_key)
    total, valid_rows = z.new_zeros(()), z.new_zeros(())
    for rows in torch.arange(len(z), device=z.device).split(block or max(1, BLOCK_ELEMENTS // len(z_key))):
        similarity = z[rows] @ z_key.T
        row_loss, valid, slopes = _rows(similarity, rows, labels, key_labels, own=own, **options)
        total, valid_rows = total + row_loss.sum(), valid_rows + valid.sum()
        dz[rows] = slopes @ z_key
        dz_key += slopes.T @ z[rows]
    anchors = options.get("anchors")
    members = {
        "mean_valid": valid_rows,
        "mean_all": z.new_tensor(len(z)) if anchors is None else anchors.sum().to(z.dtype),
        "sum": None,
    }
    factor = scale if members[reduction] is None else scale / members[reduction].clamp_min(1)
    if own and not detach_keys:
        dz += dz_key
    keys_gradient = None if own else _to_input(dz_key, z_key, norm_key) * (0.0 if detach_keys else factor)
    return total * factor, _to_input(dz, z, norm) * factor, keys_gradient


def _rows(
    s, rows, labels, key_labels, *, own, temperature=0.1, beta=2.0, weight="exp", gamma=1.0, k=8, detach_weights=True,
    normalizer="sum", denominator="all", hard_negative_beta=0.0, selection="all", predictions=None, ref_predictions=None,
    views=None, ref_views=None, positive_coef=None, denominator_mask=None, instances=None, ref_instances=None, anchors=None,
):  # fmt: skip
    """Of a block of rows: L_i (0 where not valid), the valid rows, and dL_i / ds_ia for every key."""
    keys = {"views": views, "instances": instances, "predictions": predictions}
    if not own:
        keys = {"views": ref_views, "instances": ref_instances, "predictions": ref_predictions}
    same = labels[rows][:, None] == key_labels[None, :]
    term = torch.ones_like(same)
    if own:
        term[torch.arange(len(rows), device=s.device), rows] = False
    positive, log_coef = same & term, 0.0
    if positive_coef is not None:
        coef = positive_coef.to(s.dtype)[views[rows][:, None], keys["views"][None, :]]
        positive, log_coef = positive & (coef > 0), coef.log()
    if denominator_mask is not None:
        term = term & (denominator_mask[views[rows][:, None], keys["views"][None, :]] != 0)
    if instances is not None:
        positive = positive & (instances[rows][:, None] == keys["instances"][None, :])
    if selection != "all":
        hard = keys["predictions"][None, :] == labels[rows][:, None]
        soft = keys["predictions"][None, :] == predictions[rows][:, None]
        chosen = {"hard": hard, "soft": soft, "merge": hard | soft, "leaking": soft}[selection]
        if selection == "leaking":
            positive, term = positive & soft, term & chosen
        else:
            term = term & (same | chosen)
    if anchors is not None:
        positive = positive & anchors[rows][:, None]
    negative = term & ~same

    phi, slope, selected = torch.zeros_like(s), 0.0, positive
    if weight == "exp":
        phi, slope = -beta * s, -beta
    elif weight == "pow":
        room = (1 - s).clamp_min(0) + POW_EPS
        phi, slope = gamma * room.log(), torch.where(s <= 1, -gamma / room, 0.0)
    elif weight == "topk" and k < s.shape[1]:
        nearest = s.masked_fill(~positive, math.inf).topk(k + 1, dim=1, largest=False, sorted=True).values
        selected = positive & (s <= (nearest[:, k - 1 : k] + nearest[:, k : k + 1]) / 2)
    log_weight = phi + log_coef
    log_norm = _log_sum(log_weight, selected) if normalizer == "sum" else positive.sum(1).clamp_min(1).to(s.dtype).log()
    weights = (log_weight - log_norm[:, None]).masked_fill(~selected, -math.inf).exp()

    logits = s / temperature
    biased = logits
    if hard_negative_beta != 0:
        log_h = hard_negative_beta * s
        mean = negative.sum(1).clamp_min(1).to(s.dtype).log() - _log_sum(log_h, negative)
        biased = torch.where(negative, logits + log_h + mean[:, None], logits)
    terms = term if denominator == "all" else negative
    lse = _log_sum(biased, terms)
    q = (biased - lse[:, None]).masked_fill(~terms, -math.inf).exp()
    cost, pull = lse[:, None] - logits, 1.0
    if denominator == "pairwise":
        pull = torch.sigmoid(cost)
        cost = -torch.nn.functional.logsigmoid(-cost)

    valid = positive.any(1) & terms.any(1)
    row_loss = torch.where(valid, (weights * cost).sum(1), 0.0)
    slopes = ((weights * pull).sum(1, keepdim=True) * q - weights * pull) / temperature
    if not detach_weights:
        slopes = slopes + weights * slope * (cost - (row_loss[:, None] if normalizer == "sum" else 0.0))
    return row_loss, valid, torch.where(valid[:, None], slopes, 0.0)


def _log_sum(x: Tensor, mask: Tensor) -> Tensor:
    """log sum exp over the True entries of each row, 0 where there is none."""
    found = x.masked_fill(~mask, -math.inf).logsumexp(1)
    return torch.where(mask.any(1), found, 0.0)


def _unit(u: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows, 0 for a zero row, and the norms to divide gradients by, infinite for a zero row."""
    norm = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    norm = norm.masked_fill(norm <= ZERO_NORM, math.inf)
    return u / norm, norm


def _to_input(dz: Tensor, z: Tensor, norm: Tensor) -> Tensor:
    return (dz - (z * dz).sum(1, keepdim=True) * z) / norm
