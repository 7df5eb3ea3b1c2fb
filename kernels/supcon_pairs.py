"""Triton kernels over pairs of rows, for the hardness-weighted SupCon: statistics of the rows, top-k thresholds, gradient.

Each walks over the column tiles of its rows with one similarity tile in registers. The buffers are those of
`fastanchor.kernels.supcon`, whose kernels work row by row; `fastanchor.kernels.supcon_launch` starts both.
All pair kernels begin with the same arguments, and their flags mean the same:
    NEGATIVES     the denominator holds other classes only (`negatives`, `pairwise`)      PAIRWISE   the `pairwise` loss
    HARD          hard_negative_beta is not 0       TOPK, ONLINE   a threshold, a maximum of its own for each row
    SELF          the keys are the rows themselves, so the diagonal is left out
    INSTANCES, VIEWS, SELECTION    what makes a pair a positive or a term, by ids of the rows
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
POW_EPS = tl.constexpr(1e-6)
FAR = tl.constexpr(1e30)  # beyond every distance, and finite: differences of two stay numbers


@triton.jit
def round_tf32(x):
    """To nearest: the tensor core cuts off the 13 low bits of what it reads."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _rows(z, ids, rho, n_pad, at, D: tl.constexpr, INSTANCES: tl.constexpr, VIEWS: tl.constexpr, SELECTION: tl.constexpr):
    """The rows `at`: as stored, 1 / norm, label, instance, view, predicted class; the label stands in for what is not used."""
    stored = tl.load(z + at[:, None] * D + tl.arange(0, D)[None, :])
    inverse = tl.load(rho + at)
    y = tl.load(ids + at)
    instance = tl.load(ids + n_pad + at) if INSTANCES else y
    view = tl.load(ids + 2 * n_pad + at) if VIEWS else y
    predicted = tl.load(ids + 3 * n_pad + at) if SELECTION != "all" else y
    return stored, inverse, y, instance, view, predicted


@triton.jit
def _distance(zi, zj, rho_i, rho_j, DOT: tl.constexpr):
    """d = 1 - s of the rows as stored."""
    return 1.0 - tl.dot(zi, tl.trans(zj), input_precision=DOT) * rho_i[:, None] * rho_j[None, :]


@triton.jit
def _hardness(d, beta, gamma, WEIGHT: tl.constexpr):
    """h(s) at s = 1 - d. With |beta| <= 40 its sums stay far from the ends of fp32."""
    if WEIGHT == "exp":
        return tl.exp2((1.0 - d) * (-beta * LOG2E))
    elif WEIGHT == "pow":
        return tl.exp2(gamma * tl.log2(tl.maximum(d, 0.0) + POW_EPS))
    else:
        return tl.full(d.shape, 1.0, tl.float32)


@triton.jit
def _selected(same, anchor_label, anchor_predicted, key_predicted, SELECTION: tl.constexpr):
    """The pairs that `selection` keeps."""
    if SELECTION == "leaking":
        return anchor_predicted == key_predicted
    elif SELECTION == "hard":
        return same | (anchor_label == key_predicted)
    elif SELECTION == "soft":
        return same | (anchor_predicted == key_predicted)
    else:
        return same | (anchor_label == key_predicted) | (anchor_predicted == key_predicted)


@triton.jit
def _tile(
    zi, rho_i, row, yi, instance_i, view_i, predicted_i,  # of the block of rows
    z_key, ids_key, rho_key, n_pad_key, n_key, first,
    coef, mask, n_views,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, NEGATIVES: tl.constexpr, SELF: tl.constexpr,
    INSTANCES: tl.constexpr, VIEWS: tl.constexpr, SELECTION: tl.constexpr,
):  # fmt: skip
    """Of the columns from `first`: d, positives, terms of the denominator, pairs of one class, the positives' coefficient."""
    column = first + tl.arange(0, BN)
    zj, rho_j, yj, instance_j, view_j, predicted_j = _rows(
        z_key, ids_key, rho_key, n_pad_key, column, D, INSTANCES, VIEWS, SELECTION
    )
    d = _distance(zi, zj, rho_i, rho_j, DOT)
    other = tl.broadcast_to(column[None, :] < n_key, (BM, BN))
    if SELF:
        other = other & (row[:, None] != column[None, :])
    same = yi[:, None] == yj[None, :]
    if SELECTION != "all":
        other = other & _selected(same, yi[:, None], predicted_i[:, None], predicted_j[None, :], SELECTION)
    positive = other & same
    term = other
    if NEGATIVES:
        term = term & ~same
    if INSTANCES:
        positive = positive & (instance_i[:, None] == instance_j[None, :])
    coefficient = tl.full((BM, BN), 1.0, tl.float32)
    if VIEWS:
        pair = view_i[:, None] * n_views + view_j[None, :]
        coefficient = tl.load(coef + pair)
        positive = positive & (coefficient > 0)
        term = term & (tl.load(mask + pair) != 0)
    return d, positive, term, same, coefficient


@triton.jit
def row_stats(
    z, ids, rho, n_pad,  # anchors: unit rows, ids, 1 / ||stored z||, rows of a buffer
    z_key, ids_key, rho_key, n_pad_key, n_key,  # keys: the same buffers, or those of other rows
    coef, mask, n_views,  # (n_views, n_views) fp32 positive coefficients and 0/1 denominators, by [anchor's view, key's view]
    rows, partial,
    beta, gamma, hard,
    log2_per_tau,  # log2(e) / tau
    span,  # columns of one program, a multiple of BN
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, WEIGHT: tl.constexpr, BETA_TENSOR: tl.constexpr,
    NEGATIVES: tl.constexpr, HARD: tl.constexpr, TOPK: tl.constexpr, ONLINE: tl.constexpr, PARTS: tl.constexpr,
    SELF: tl.constexpr, INSTANCES: tl.constexpr, VIEWS: tl.constexpr, SELECTION: tl.constexpr,
):  # fmt: skip
    """Program (row block, column span): the sums of its rows over its columns. 2 N M D FLOPs over the grid."""
    if BETA_TENSOR:
        beta = tl.load(beta).to(tl.float32)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    zi, rho_i, yi, instance_i, view_i, predicted_i = _rows(z, ids, rho, n_pad, row, D, INSTANCES, VIEWS, SELECTION)
    if TOPK:
        threshold = tl.load(rows + 7 * n_pad + row)
    sum_e = tl.full((BM,), 0.0, tl.float32)
    sum_w = tl.full((BM,), 0.0, tl.float32)
    sum_wd = tl.full((BM,), 0.0, tl.float32)
    count = tl.full((BM,), 0.0, tl.float32)
    nearest = tl.full((BM,), FAR, tl.float32)
    sum_biased = tl.full((BM,), 0.0, tl.float32)
    sum_bias = tl.full((BM,), 0.0, tl.float32)
    negatives = tl.full((BM,), 0.0, tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, n_key), BN):
        d, positive, term, same, coefficient = _tile(
            zi, rho_i, row, yi, instance_i, view_i, predicted_i, z_key, ids_key, rho_key, n_pad_key, n_key, first, coef, mask,
            n_views, D, BM, BN, DOT, NEGATIVES, SELF, INSTANCES, VIEWS, SELECTION,
        )  # fmt: skip
        w = _hardness(d, beta, gamma, WEIGHT)
        if VIEWS:
            w *= coefficient
        chosen = positive
        if TOPK:
            chosen = chosen & (d >= threshold[:, None])
        w = tl.where(chosen, w, 0.0)
        if ONLINE:
            closer = tl.minimum(nearest, tl.min(tl.where(term, d, FAR), 1))
            shrink = tl.exp2((closer - nearest) * log2_per_tau)
            sum_e *= shrink
            sum_biased *= shrink
            nearest = closer
            e = tl.exp2(-tl.maximum(d - nearest[:, None], 0.0) * log2_per_tau)
        else:
            e = tl.exp2(-d * log2_per_tau)
        if HARD:
            bias = _hardness(d, -hard, gamma, "exp")
            negative = term & ~same
            sum_biased += tl.sum(tl.where(negative, e * bias, 0.0), 1)
            sum_bias += tl.sum(tl.where(negative, bias, 0.0), 1)
            negatives += tl.sum(negative.to(tl.float32), 1)
            term = term & same
        sum_e += tl.sum(tl.where(term, e, 0.0), 1)
        sum_w += tl.sum(w, 1)
        sum_wd += tl.sum(w * d, 1)
        count += tl.sum(positive.to(tl.float32), 1)
    out = partial + tl.program_id(1).to(tl.int64) * PARTS * n_pad + row
    tl.store(out, sum_e)
    tl.store(out + n_pad, sum_w)
    tl.store(out + 2 * n_pad, sum_wd)
    tl.store(out + 3 * n_pad, count)
    if PARTS == 8:
        tl.store(out + 4 * n_pad, nearest)
        tl.store(out + 5 * n_pad, sum_biased)
        tl.store(out + 6 * n_pad, sum_bias)
        tl.store(out + 7 * n_pad, negatives)


@triton.jit
def _sigmoid_softplus(x):
    """sigma(x ln 2) and log2(1 + 2^x)."""
    small = tl.exp2(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small), tl.maximum(x, 0.0) + tl.log2(1.0 + small)


@triton.jit
def row_costs(
    z, ids, rho, n_pad,
    z_key, ids_key, rho_key, n_pad_key, n_key,
    coef, mask, n_views,
    rows, partial,
    beta, gamma,
    log2_per_tau, span,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, WEIGHT: tl.constexpr, BETA_TENSOR: tl.constexpr,
    TOPK: tl.constexpr, SELF: tl.constexpr, INSTANCES: tl.constexpr, VIEWS: tl.constexpr, SELECTION: tl.constexpr,
):  # fmt: skip
    """The second pass of `pairwise`: sums of w softplus(lse - l) and w sigma(lse - l), once lse is known. 2 N M D FLOPs."""
    if BETA_TENSOR:
        beta = tl.load(beta).to(tl.float32)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    zi, rho_i, yi, instance_i, view_i, predicted_i = _rows(z, ids, rho, n_pad, row, D, INSTANCES, VIEWS, SELECTION)
    log2_lse = tl.log2(tl.load(rows + row)) - tl.load(rows + 5 * n_pad + row) * log2_per_tau
    if TOPK:
        threshold = tl.load(rows + 7 * n_pad + row)
    cost = tl.full((BM,), 0.0, tl.float32)
    pull = tl.full((BM,), 0.0, tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, n_key), BN):
        d, positive, _, _, coefficient = _tile(
            zi, rho_i, row, yi, instance_i, view_i, predicted_i, z_key, ids_key, rho_key, n_pad_key, n_key, first, coef, mask,
            n_views, D, BM, BN, DOT, True, SELF, INSTANCES, VIEWS, SELECTION,
        )  # fmt: skip
        w = _hardness(d, beta, gamma, WEIGHT)
        if VIEWS:
            w *= coefficient
        if TOPK:
            positive = positive & (d >= threshold[:, None])
        w = tl.where(positive, w, 0.0)
        sigma, softplus = _sigmoid_softplus(log2_lse[:, None] + d * log2_per_tau)
        cost += tl.sum(w * softplus, 1)
        pull += tl.sum(w * sigma, 1)
    out = partial + tl.program_id(1).to(tl.int64) * 2 * n_pad + row
    tl.store(out, cost / LOG2E)
    tl.store(out + n_pad, pull)


@triton.jit
def keep_largest(kept, left, BM: tl.constexpr, BN: tl.constexpr, KEPT: tl.constexpr):
    """The KEPT largest of both, a row each: as many rounds as the row that takes most from `left` needs, often none."""
    slot, place = tl.arange(0, KEPT)[None, :], tl.arange(0, BN)[None, :]
    best, worst = tl.max(left, 1), tl.min(kept, 1)
    while tl.max((best > worst).to(tl.int32), 0) > 0:
        out, taken = tl.argmin(kept, 1), tl.argmax(left, 1)
        kept = tl.where((slot == out[:, None]) & (best > worst)[:, None], best[:, None], kept)
        left = tl.where(place == taken[:, None], -FAR, left)
        best, worst = tl.max(left, 1), tl.min(kept, 1)
    return kept


@triton.jit
def largest_distances(
    z, ids, rho, n_pad,
    z_key, ids_key, rho_key, n_pad_key, n_key,
    coef, mask, n_views,
    partial,  # (split, KEPT, n_pad)
    span,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, KEPT: tl.constexpr, SELF: tl.constexpr,
    INSTANCES: tl.constexpr, VIEWS: tl.constexpr, SELECTION: tl.constexpr,
):  # fmt: skip
    """Program (row block, column span): the KEPT largest d among the positives of its rows, -FAR for none. 2 N M D FLOPs."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    zi, rho_i, yi, instance_i, view_i, predicted_i = _rows(z, ids, rho, n_pad, row, D, INSTANCES, VIEWS, SELECTION)
    kept = tl.full((BM, KEPT), -FAR, tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, n_key), BN):
        d, positive, _, _, _ = _tile(
            zi, rho_i, row, yi, instance_i, view_i, predicted_i, z_key, ids_key, rho_key, n_pad_key, n_key, first, coef, mask,
            n_views, D, BM, BN, DOT, True, SELF, INSTANCES, VIEWS, SELECTION,
        )  # fmt: skip
        kept = keep_largest(kept, tl.where(positive, d, -FAR), BM, BN, KEPT)
    out = partial + (tl.program_id(1).to(tl.int64) * KEPT + tl.arange(0, KEPT)[None, :]) * n_pad + row[:, None]
    tl.store(out, kept)


@triton.jit
def _role(
    d, e, bias, same, tau_ln2, log2_per_tau,
    u, v, r, u_negative, nearest, log2_lse, threshold,  # of the anchors, (BM, 1) or (1, BN)
    PAIRWISE: tl.constexpr, HARD: tl.constexpr, ONLINE: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    """One role's share of tau G: the softmax's part, and V, R of the positives' part h (V + phi' R)."""
    if ONLINE:
        e = tl.exp2(-tl.maximum(d - nearest, 0.0) * log2_per_tau)
    push = e * tl.where(same, u, bias * u_negative) if HARD else e * u
    if PAIRWISE:
        sigma, softplus = _sigmoid_softplus(log2_lse + d * log2_per_tau)
        pull = v * sigma
        lever = r - tau_ln2 * softplus * v
    else:
        pull = tl.broadcast_to(v, d.shape)
        lever = r - d * v
    if TOPK:
        pull = tl.where(d >= threshold, pull, 0.0)
    return push, pull, lever


@triton.jit
def gradient(
    z, ids, rho, n_pad,  # rows that get a gradient
    z_key, ids_key, rho_key, n_pad_key, n_key,  # rows that give it
    coef, mask, n_views,
    rows, roles, n_pad_anchor,  # of the anchors: the rows, the columns or both
    partial_dz,  # (split, n_pad, D) fp32
    beta, gamma, hard,
    log2_per_tau, span,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, WEIGHT: tl.constexpr, BETA_TENSOR: tl.constexpr,
    NEGATIVES: tl.constexpr, PAIRWISE: tl.constexpr, HARD: tl.constexpr, TOPK: tl.constexpr, ONLINE: tl.constexpr,
    SELF: tl.constexpr, INSTANCES: tl.constexpr, VIEWS: tl.constexpr, SELECTION: tl.constexpr,
    DETACHED: tl.constexpr,
    AS_ANCHORS: tl.constexpr,  # the rows' G_ij counts
    AS_KEYS: tl.constexpr,  # the columns' G_ji counts
):  # fmt: skip
    """Program (row block, column span): sum_j (G_ij + G_ji) z_j over its columns, up to a factor. 4 N M D FLOPs over the grid.

    tau G_ij = e_ij u_i - [positive] h_ij (v_i + phi' (r_i - d_ij v_i)), the phi' term only with attached weights; for `pairwise`
    v_i sigma_ij and tau softplus_ij instead of v_i and d_ij.
    """
    if BETA_TENSOR:
        beta = tl.load(beta).to(tl.float32)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    zi, rho_i, yi, instance_i, view_i, predicted_i = _rows(z, ids, rho, n_pad, row, D, INSTANCES, VIEWS, SELECTION)
    if AS_ANCHORS:
        ui, vi, ri, un_i, near_i, lse_i, least_i = _roles(
            rows, roles, n_pad_anchor, row, PAIRWISE, HARD, ONLINE, TOPK, DETACHED
        )  # fmt: skip
    acc = tl.full((BM, D), 0.0, tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, n_key), BN):
        column = first + tl.arange(0, BN)
        zj, rho_j, yj, instance_j, view_j, predicted_j = _rows(
            z_key, ids_key, rho_key, n_pad_key, column, D, INSTANCES, VIEWS, SELECTION
        )
        d = _distance(zi, zj, rho_i, rho_j, DOT)
        same = yi[:, None] == yj[None, :]
        positive = same
        if INSTANCES:
            positive = positive & (instance_i[:, None] == instance_j[None, :])
        e = tl.exp2(-d * log2_per_tau)
        bias = _hardness(d, -hard, gamma, "exp") if HARD else e
        if AS_ANCHORS:
            push, pull, lever = _role(
                d, e, bias, same, 1.0 / log2_per_tau, log2_per_tau, ui[:, None], vi[:, None], ri[:, None], un_i[:, None],
                near_i[:, None], lse_i[:, None], least_i[:, None], PAIRWISE, HARD, ONLINE, TOPK,
            )  # fmt: skip
            if SELECTION != "all":
                selected = _selected(same, yi[:, None], predicted_i[:, None], predicted_j[None, :], SELECTION)
                push, pull, lever = tl.where(selected, push, 0.0), tl.where(selected, pull, 0.0), tl.where(selected, lever, 0.0)
            if VIEWS:
                pair = view_i[:, None] * n_views + view_j[None, :]
                coefficient = tl.load(coef + pair)
                push, pull, lever = push * tl.load(mask + pair), pull * coefficient, lever * coefficient
        if AS_KEYS:
            uj, vj, rj, un_j, near_j, lse_j, least_j = _roles(
                rows, roles, n_pad_anchor, column, PAIRWISE, HARD, ONLINE, TOPK, DETACHED
            )  # fmt: skip
            push_j, pull_j, lever_j = _role(
                d, e, bias, same, 1.0 / log2_per_tau, log2_per_tau, uj[None, :], vj[None, :], rj[None, :], un_j[None, :],
                near_j[None, :], lse_j[None, :], least_j[None, :], PAIRWISE, HARD, ONLINE, TOPK,
            )  # fmt: skip
            if SELECTION != "all":
                selected = _selected(same, yj[None, :], predicted_j[None, :], predicted_i[:, None], SELECTION)
                push_j, pull_j = tl.where(selected, push_j, 0.0), tl.where(selected, pull_j, 0.0)
                lever_j = tl.where(selected, lever_j, 0.0)
            if VIEWS:
                pair = view_j[None, :] * n_views + view_i[:, None]
                coefficient = tl.load(coef + pair)
                push_j, pull_j, lever_j = push_j * tl.load(mask + pair), pull_j * coefficient, lever_j * coefficient
            if AS_ANCHORS:
                push, pull, lever = push + push_j, pull + pull_j, lever + lever_j
            else:
                push, pull, lever = push_j, pull_j, lever_j
        if not DETACHED:
            if WEIGHT == "exp":
                pull -= beta * lever
            elif WEIGHT == "pow":
                # The clamp of 1 - s at 0 has no slope below it.
                pull -= tl.where(d >= 0, gamma / (tl.maximum(d, 0.0) + POW_EPS), 0.0) * lever
        pull *= _hardness(d, beta, gamma, WEIGHT)
        if NEGATIVES:
            push = tl.where(same, 0.0, push)
        g = tl.where(positive, push - pull, push)
        # Padded columns are zero rows, but where all keys are far their G may pass the end of fp16, and inf times 0 is NaN.
        counts = column[None, :] < n_key
        if SELF:
            counts = counts & (row[:, None] != column[None, :])
        g = tl.where(counts, g, 0.0)
        if DOT == "tf32" and zj.dtype == tl.float32:
            g = round_tf32(g)
        acc = tl.dot(g.to(zj.dtype), zj, acc, input_precision=DOT)
    out = partial_dz + (tl.program_id(1).to(tl.int64) * n_pad + row[:, None]) * D + tl.arange(0, D)[None, :]
    tl.store(out, acc)


@triton.jit
def _roles(
    rows, roles, n_pad, at,
    PAIRWISE: tl.constexpr, HARD: tl.constexpr, ONLINE: tl.constexpr, TOPK: tl.constexpr, DETACHED: tl.constexpr,
):  # fmt: skip
    """u, v, r, u of negatives, smallest distance, log2 of lse and threshold of anchors; u stands in for what is not used."""
    u = tl.load(roles + at)
    v = tl.load(roles + n_pad + at)
    r = u if DETACHED else tl.load(roles + 2 * n_pad + at)
    u_negative = tl.load(roles + 3 * n_pad + at) if HARD else u
    log2_lse = tl.load(roles + 4 * n_pad + at) if PAIRWISE else u
    nearest = tl.load(rows + 5 * n_pad + at) if ONLINE else u
    threshold = tl.load(rows + 7 * n_pad + at) if TOPK else u
    return u, v, r, u_negative, nearest, log2_lse, threshold
