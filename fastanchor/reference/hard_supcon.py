"""Hardness-weighted supervised contrastive loss: the dense definition that every faster implementation must match.

Plain PyTorch, N x M matrices, differentiable by autograd, fp64-capable, no host reads. It is also the CPU implementation.

Definition
----------
Anchors i = 1..N with head outputs u_i, labels y_i and view ids v_i; keys a = 1..M are the same rows, or the rows of
`ref_embeddings`. z = u / ||u||, s_ia = z_i . z_a, l_ia = s_ia / tau. "a is i" below is the self pair; it exists only
when the keys are the anchors themselves, and it is told by index, never by value: a duplicate of row i is a normal pair.

    positives      P(i) = {p in S(i) : p is not i, y_p = y_i, C[v_i, v_p] > 0, the same instance id where `instances` is given}
    denominator    A(i) = {a in S(i) : a is not i, D[v_i, v_a] != 0}
    negatives      N(i) = {a in A(i) : y_a != y_i}
    C (`positive_coef`) and D (`denominator_mask`) are all ones when absent; they need not be symmetric.

`selection` leaves out pairs by the predicted classes c (`predictions`), as ASCL does (Bui et al. 2021):

    all       S(i) = every key
    hard      rows of i's class, and negatives taken for it: c_a = y_i        soft     ... and negatives with c_a = c_i
    merge     hard and soft together                                          leaking  c_a = c_i, for positives too

Weights: w_ip = C[v_i, v_p] h(s_ip) for p in P(i), 0 elsewhere, phi = log h:

    uniform   h = 1
    exp       h = exp(-beta s)               phi' = -beta                    beta > 0: hard positives, beta < 0: easy ones
    pow       h = (1 - s + POW_EPS)^gamma    phi' = -gamma / (1 - s + POW_EPS)    (1 - s is clamped at 0)
    topk      h = 1 if s <= theta_i else 0   phi' = 0       theta_i midway between the k-th and (k+1)-th smallest s_ip;
              +inf if |P(i)| <= k. Uniform over the selected; positives tied with the k-th are all selected.

    w_bar_ip = w_ip exp(-Lambda_i):   Lambda_i = log sum_p w_ip  (`sum`)   or   log |P(i)|  (`count`; P before top-k)
    omega_i = sum_p w_bar_ip          (1 for `sum`)

Loss of row i, with lse_i over A(i) for `all` and over N(i) for `pairwise` and `negatives`:

    all, negatives   f_ip = lse_i - l_ip                L_i = sum_p w_bar_ip f_ip = omega_i lse_i - sum_p w_bar_ip l_ip
    pairwise         f_ip = softplus(lse_i - l_ip)      each positive competes with the negatives only

`hard_negative_beta` b adds the constant (detached) bias b s_in + log |N(i)| - log sum_{n in N(i)} exp(b s_in) to l_in of the
negatives inside lse_i: mean weight 1, more on near negatives.

A row is valid if it is an anchor, P(i) is not empty and the set of lse_i is not empty. Other rows have loss exactly 0 and no
gradient as anchors (they still act as keys). The result is `scale` times
sum_i L_i / N_valid (`mean_valid`; 0 if no row is valid), sum_i L_i / N_anchors (`mean_all`), sum_i L_i (`sum`) or the vector
L_i (`none`).

Gradient
--------
g_i = `scale` x upstream gradient of L_i, q_ia = exp(l_ia + bias_ia - lse_i) on the set of lse_i, sigma the logistic function:

    G_ia = dL/ds_ia = (g_i / tau) (kappa_i q_ia - w_bar_ia r_ia)  [+ g_i w_bar_ia phi'_ia (f_ia - [sum] L_i)  weights attached]
    all, negatives:  r = 1, kappa_i = omega_i        pairwise:  r_ip = sigma(lse_i - l_ip), kappa_i = sum_p w_bar_ip r_ip

[sum] is 1 for the normaliser `sum`, 0 for `count`. For `all` with `sum` the attached form is the familiar
(g_i / tau)(q_ia - w_bar_ia [1 + phi'(s_ia - s_bar_i)]), s_bar_i = sum_p w_bar_ip s_ip.
dZ_anchor = G Z_key, dZ_key = G^T Z_anchor; dZ = (G + G^T) Z when both are one tensor, G Z with `detach_keys`.
dU_i = (dZ_i - (z_i . dZ_i) z_i) / ||u_i||.

Detached exp weights (`sum`, `all` or `negatives`) are the exact gradient of `soft_min_supcon`. Attached exp weights push away
easy positives with s_ip > s_bar_i + 1 / beta: keep beta below about 2 there.

Rules
-----
A row with ||u|| <= ZERO_NORM is a zero row: z = 0, similarity 0 to every row, gradient exactly 0.
fp16 and bf16 inputs are computed in fp32 and so is the result; autocast does not reach the similarities. On CUDA their product
follows torch's TF32 setting.
`sum` weights and every log-sum-exp are shifted by their row maximum. `count` weights cannot be: |beta| <= 80 in fp32.

Special cases
-------------
    SupCon L_out (Khosla et al.)       weight="uniform"
    SupContrast's code                 SupCon with reduction="mean_all", scale=tau / 0.07
    pytorch-metric-learning SupCon     SupCon with mean_valid; it averages rows of non-zero loss and returns 0 for a batch that
                                       has no positive or no negative pair at all
    NT-Xent (SimCLR)                   SupCon with instance ids as labels
    ASCL, cosine similarity            SupCon with tau = 0.2, reduction="mean_all" and its selection ("leaking" by default)
    SupRobCon                          uniform, anchors adversarial, keys clean, denominator="pairwise"
    C-LEAD joint                       uniform, denominator="pairwise", `instances` given: own counterpart is the only positive
    hardest positive only              weight="topk", k=1
    RoCL's detached keys               detach_keys=True
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastanchor.errors import UserError
from fastanchor.reference.checks import check_name, check_options
from fastanchor.reference.pairs import make_pairs

POW_EPS = 1e-6  # about ten roundings of s near 1 in fp32, so the weight of a duplicate does not depend on rounding


def hard_supcon(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    beta: float | Tensor = 2.0,
    weight: str = "exp",
    gamma: float = 1.0,
    k: int = 8,
    detach_weights: bool = True,
    normalizer: str = "sum",
    denominator: str = "all",
    hard_negative_beta: float = 0.0,
    views: Tensor | None = None,
    positive_coef: Tensor | None = None,
    denominator_mask: Tensor | None = None,
    instances: Tensor | None = None,
    selection: str = "all",
    predictions: Tensor | None = None,
    anchors: Tensor | int | Sequence[int] | None = None,
    detach_keys: bool = False,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_views: Tensor | None = None,
    ref_instances: Tensor | None = None,
    ref_predictions: Tensor | None = None,
    scale: float = 1.0,
    reduction: str = "mean_valid",
) -> Tensor:
    """The loss of the module docstring.

    embeddings (N, D) floating, labels (N,) integer, not normalised. `beta` may be a 0-d tensor, for a warm-up inside a captured
    graph. `beta` is read by exp, `gamma` by pow, `k` by topk.
    views, instances, predictions (N,) integer; positive_coef, denominator_mask (V, V) tensors indexed [anchor's view, key's
    view], view ids in [0, V) (not checked: that would read the device). anchors: (N,) bool, or the view id or ids of the rows
    that act as anchors.
    ref_embeddings (M, D), ref_labels, ref_views, ref_instances, ref_predictions (M,): keys other than the anchors; no pair is
    then a self pair.
    Returns a 0-d tensor, or (N,) for reduction="none"; fp64 if an input is fp64, else fp32.
    Raises UserError (a ValueError) for a bad argument.
    """
    check_options(
        temperature=temperature,
        beta=beta,
        weight=weight,
        gamma=gamma,
        k=k,
        normalizer=normalizer,
        denominator=denominator,
        hard_negative_beta=hard_negative_beta,
        scale=scale,
        reduction=reduction,
    )
    pairs = make_pairs(
        embeddings,
        labels,
        views=views,
        positive_coef=positive_coef,
        denominator_mask=denominator_mask,
        instances=instances,
        selection=selection,
        predictions=predictions,
        anchors=anchors,
        detach_keys=detach_keys,
        ref_embeddings=ref_embeddings,
        ref_labels=ref_labels,
        ref_views=ref_views,
        ref_instances=ref_instances,
        ref_predictions=ref_predictions,
    )
    w_bar = _weights(pairs, weight, beta, gamma, k, normalizer)
    if detach_weights:
        w_bar = w_bar.detach()
    lse, has_terms = _log_denominator(pairs, temperature, denominator, hard_negative_beta)
    cost = lse[:, None] - pairs.similarity / temperature
    if denominator == "pairwise":
        cost = -F.logsigmoid(-cost)  # softplus; F.softplus turns linear at 20, which costs 2e-9
    valid = pairs.positive.any(1) & has_terms
    return _reduce((w_bar * cost).sum(1), valid, pairs.anchor, scale, reduction)


def positive_weights(
    embeddings: Tensor,
    labels: Tensor,
    *,
    weight: str = "exp",
    beta: float | Tensor = 2.0,
    gamma: float = 1.0,
    k: int = 8,
    normalizer: str = "sum",
    **pair_options,
) -> tuple[Tensor, Tensor]:
    """w_bar (N, M), 0 outside P(i), not detached, and the (N,) bool mask of rows that have positives.

    pair_options: views, positive_coef, denominator_mask, instances, selection, predictions, anchors, detach_keys and ref_* of
    `hard_supcon`.
    """
    check_options(weight=weight, beta=beta, gamma=gamma, k=k, normalizer=normalizer)
    pairs = make_pairs(embeddings, labels, **pair_options)
    return _weights(pairs, weight, beta, gamma, k, normalizer), pairs.positive.any(1)


@torch.no_grad()
def effective_positives(
    embeddings: Tensor,
    labels: Tensor,
    *,
    weight: str = "exp",
    beta: float | Tensor = 2.0,
    gamma: float = 1.0,
    k: int = 8,
    **pair_options,
) -> Tensor:
    """Effective number of positives per row, (N,): ESS_i = 1 / sum_p w_bar_ip^2 with `sum` weights, 0 for rows without positives.

    It is |P(i)| for uniform weights and 1 when one positive takes all the weight. pair_options as in `positive_weights`.
    """
    w_bar, valid = positive_weights(embeddings, labels, weight=weight, beta=beta, gamma=gamma, k=k, **pair_options)
    return torch.where(valid, 1 / w_bar.square().sum(1), 0.0)


@torch.no_grad()
def sampled_effective_positives(embeddings: Tensor, labels: Tensor, stride: int, **weights) -> Tensor:
    """`effective_positives` of every `stride`-th row among all rows, (ceil(N / stride),), by matrices of N / stride rows.

    weights: weight, beta, gamma and k.
    """
    rows = torch.arange(len(labels), device=labels.device)
    pairs = make_pairs(embeddings[::stride], labels[::stride], ref_embeddings=embeddings, ref_labels=labels)
    pairs = pairs._replace(positive=pairs.positive & (rows[::stride, None] != rows))
    w_bar = _weights(pairs, weights["weight"], weights["beta"], weights["gamma"], weights["k"], "sum")
    return torch.where(pairs.positive.any(1), 1 / w_bar.square().sum(1), 0.0)


def soft_min_supcon(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    beta: float | Tensor = 2.0,
    denominator: str = "all",
    hard_negative_beta: float = 0.0,
    scale: float = 1.0,
    reduction: str = "mean_valid",
    **pair_options,
) -> Tensor:
    """The scalar whose gradient is that of `hard_supcon` with detached exp weights and the normaliser `sum`.

    L_i = lse_i + log( sum_p C_ip exp(-beta s_ip) / sum_p C_ip ) / (beta tau): soft-min pooling of the positives. For beta > 0
    it is the maximum over distributions q on P(i) of sum_p q_p (lse_i - l_ip) - KL(q || C / sum_p C) / (beta tau), attained at
    q = w_bar.
    beta must not be 0 (its limit is the uniform loss); denominator is `all` or `negatives`: for `pairwise` no such scalar exists.
    pair_options as in `positive_weights`.
    """
    check_options(temperature=temperature, beta=beta, hard_negative_beta=hard_negative_beta, scale=scale, reduction=reduction)
    check_name("denominator", denominator, ("all", "negatives"))
    if not isinstance(beta, Tensor) and beta == 0:
        raise UserError("beta is 0, but the soft-min form needs a non-zero beta")
    pairs = make_pairs(embeddings, labels, **pair_options)
    lse, has_terms = _log_denominator(pairs, temperature, denominator, hard_negative_beta)
    log_coef = pairs.log_coef + torch.zeros_like(pairs.similarity)
    pooled = _masked_logsumexp(log_coef - beta * pairs.similarity, pairs.positive)
    log_mean = pooled - _masked_logsumexp(log_coef, pairs.positive)
    valid = pairs.positive.any(1) & has_terms
    return _reduce(lse + log_mean / beta / temperature, valid, pairs.anchor, scale, reduction)


def _weights(pairs, weight, beta, gamma, k, normalizer):
    """w_bar = exp(phi + log C - Lambda) on P (or on its top k), 0 elsewhere."""
    s, selected = pairs.similarity, pairs.positive
    phi = torch.zeros_like(s)
    if weight == "exp":
        phi = -beta * s
    elif weight == "pow":
        phi = gamma * torch.log((1 - s).clamp_min(0) + POW_EPS)
    elif weight == "topk":
        selected = selected & (s <= _topk_threshold(s.detach(), selected, k))
    log_w = phi + pairs.log_coef
    count = pairs.positive.sum(1).clamp_min(1).to(s.dtype)
    log_norm = _masked_logsumexp(log_w, selected) if normalizer == "sum" else count.log()
    return (log_w - log_norm[:, None]).masked_fill(~selected, -math.inf).exp()


def _topk_threshold(s, positive, k):
    """theta (N, 1): midway between the k-th and (k+1)-th smallest positive similarity, +inf where there is no (k+1)-th.

    The midpoint lets an implementation that rounds s a little differently select the same positives.
    """
    if k >= s.shape[1]:
        return s.new_full((s.shape[0], 1), math.inf)
    smallest = s.masked_fill(~positive, math.inf).topk(k + 1, dim=1, largest=False, sorted=True).values
    return (smallest[:, k - 1 : k] + smallest[:, k : k + 1]) / 2


def _log_denominator(pairs, temperature, denominator, hard_negative_beta):
    """lse (N,), finite in every row, and the mask of rows whose denominator has at least one term."""
    logits = pairs.similarity / temperature
    if hard_negative_beta != 0:
        log_h = hard_negative_beta * pairs.similarity.detach()
        n_negative = pairs.negative.sum(1).clamp_min(1).to(log_h.dtype)
        bias = log_h + (n_negative.log() - _masked_logsumexp(log_h, pairs.negative))[:, None]
        logits = torch.where(pairs.negative, logits + bias, logits)
    terms = pairs.denominator if denominator == "all" else pairs.negative
    return _masked_logsumexp(logits, terms), terms.any(1)


def _masked_logsumexp(x, mask):
    """log sum exp over the True entries of each row, shifted by their maximum; 0, with zero gradient, for a row that has none."""
    empty = ~mask.any(1, keepdim=True)
    # An empty row is filled with zeros: all -inf gives NaN in logsumexp's backward, which anomaly detection stops on.
    return x.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0).logsumexp(1).masked_fill(empty[:, 0], 0.0)


def _reduce(row_loss, valid, anchor, scale, reduction):
    row_loss = scale * torch.where(valid, row_loss, 0.0)
    if reduction == "none":
        return row_loss
    if reduction == "mean_valid":
        return row_loss.sum() / valid.sum().clamp_min(1)
    if reduction == "mean_all":
        return row_loss.mean() if anchor is None else row_loss.sum() / anchor.sum().clamp_min(1)
    return row_loss.sum()
