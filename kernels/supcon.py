"""Triton kernels of the hardness-weighted SupCon: unit rows, row losses, gradient of the rows. No N x N tensor, no atomics.

With unit rows z, d_ij = 1 - z_i . z_j (exact for close rows) and e_ij = exp(-d_ij / tau), every pair needs only d_ij and
a few numbers per row, so a pass over the column tiles gives the statistics and a second one the whole gradient,
dZ = (G + G^T) Z, from one similarity tile for both roles. The formulas are derived in `fastanchor/reference/hard_supcon.py`,
the passes over pairs are in `fastanchor.kernels.supcon_pairs`; the kernels here work on rows only.
d_ij is that of the rows as stored, divided by the norms that rounding left them with: on tight classes (cosine 0.98) that makes
the gradient from fp16 rows ten times better, because there a row's rounding error acts mostly through its length.
The maximum of exp is fixed (s <= 1), which makes the row sums additive: columns are split over programs, each writes its own
partial result, and these are added in a fixed order, so results repeat bit for bit. Below tau = 0.03 exp(-2 / tau) leaves fp32;
there every row has its own maximum, exp(-(d_ij - nearest_i) / tau), found in the same pass.

Buffers (rows padded with zero rows to a multiple of 128, features to a power of two; pads are read without masks):
    z        (n_pad, D)            unit rows, fp16 or fp32
    norms    (2, n_pad)            1 / ||u||, 1 / ||stored z||
    ids      (4, n_pad) int32      labels, instance ids, view ids, predicted classes
    partial  (split, 4, n_pad)     sum e, sum w, sum w d, number of positives; with biased negatives or a maximum a row also
             (split, 8, n_pad)     the row's smallest d, sum of e bias, sum of bias, number of negatives
    rows     (10, n_pad)           L = exp(lse) up to the maximum, the weights' divisor, omega, d_bar, 1 if the row is valid,
                                   smallest d, bias of the negatives, top-k threshold of d, kappa and L_i of `pairwise`
    roles    (5, n_pad)            u, v, r: what row i contributes to G_ij and, as a column, to G_ji; u of its negatives; log2 lse
    totals   (3,)                  loss, dL / dL_i before the upstream gradient, largest omega
`fastanchor.kernels.supcon_launch` makes them and starts the kernels.
"""

import triton
import triton.language as tl
from fastanchor.kernels.supcon_pairs import FAR, keep_largest, round_tf32

ZERO_NORM = tl.constexpr(1e-12)
# Distances recomputed in another kernel may differ in the last digits: positives this close to the threshold are selected.
TIE = tl.constexpr(1e-6)


@triton.jit
def normalize(
    u, labels, z, ids, norms, n, n_pad, n_features,
    D: tl.constexpr, ROWS: tl.constexpr, TF32: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """z = u / ||u|| (0 for a zero row), 1 / ||u|| (0 likewise), 1 / ||z||, labels as int32. Reads and writes every row once.

    1 / ||z|| of rows that are not ROUNDED is 1 but for roundings that are no smaller than what they would correct.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    inside = (row[:, None] < n) & (column[None, :] < n_features)
    x = tl.load(u + row[:, None] * n_features + column[None, :], mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    positive = norm > ZERO_NORM
    divisor = tl.where(positive, norm, 1.0)
    unit = tl.where(positive[:, None], tl.div_rn(x, tl.broadcast_to(divisor[:, None], (ROWS, D))), 0.0)
    if TF32:
        unit = round_tf32(unit)
    stored = unit.to(z.dtype.element_ty)
    tl.store(z + row[:, None] * D + column[None, :], stored)
    tl.store(norms + row, tl.where(positive, 1.0 / divisor, 0.0))
    length = tl.full((ROWS,), 1.0, tl.float32)
    if ROUNDED:
        square = tl.sum(stored.to(tl.float32) * stored.to(tl.float32), 1)
        length = tl.where(positive, tl.sqrt_rn(square), length)
    tl.store(norms + n_pad + row, 1.0 / length)
    tl.store(ids + row, tl.load(labels + row, mask=row < n, other=-1).to(tl.int32))


@triton.jit
def thresholds(
    partial, rows, n_pad, split, rank,
    ROWS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The d from which positives belong to the top k: midway between the k-th and the next largest, -FAR where there is none.

    partial (split, KEPT, n_pad) of `largest_distances`; rank = k < KEPT.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, KEPT)[None, :]
    source = partial + slot * n_pad + row[:, None]
    kept = tl.load(source)
    for _ in range(1, split):
        source += KEPT * n_pad
        kept = keep_largest(kept, tl.load(source), ROWS, KEPT, KEPT)
    last = tl.max(kept, 1)
    for _ in range(rank):
        last = tl.max(kept, 1)
        kept = tl.where(slot == tl.argmax(kept, 1)[:, None], -FAR, kept)
    following = tl.max(kept, 1)
    # A row of k positives or fewer keeps them all.
    tl.store(rows + 7 * n_pad + row, tl.where(following > -1.0, 0.5 * (last + following) - TIE, -FAR))


@triton.jit
def finish_rows(
    partial, anchors, rows, row_loss, inv_tau, log2_per_tau, scale, n, n_pad, split,
    ROWS: tl.constexpr, COUNT: tl.constexpr, ANCHORS: tl.constexpr, PAIRWISE: tl.constexpr, HARD: tl.constexpr,
    ONLINE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The splits' sums added in order; L_i = omega (lse + d_bar / tau), 0 in rows that are not valid (`pairwise`: not yet)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    nearest = tl.full((ROWS,), FAR if ONLINE else 0.0, tl.float32)
    if ONLINE:
        source = partial + 4 * n_pad + row
        for _ in range(split):
            nearest = tl.minimum(nearest, tl.load(source))
            source += PARTS * n_pad
    sum_e = tl.full((ROWS,), 0.0, tl.float32)
    sum_w = tl.full((ROWS,), 0.0, tl.float32)
    sum_wd = tl.full((ROWS,), 0.0, tl.float32)
    count = tl.full((ROWS,), 0.0, tl.float32)
    sum_biased = tl.full((ROWS,), 0.0, tl.float32)
    sum_bias = tl.full((ROWS,), 0.0, tl.float32)
    negatives = tl.full((ROWS,), 0.0, tl.float32)
    source = partial + row
    for _ in range(split):
        shrink = tl.full((ROWS,), 1.0, tl.float32)
        if ONLINE:
            shrink = tl.exp2((nearest - tl.load(source + 4 * n_pad)) * log2_per_tau)
        sum_e += tl.load(source) * shrink
        sum_w += tl.load(source + n_pad)
        sum_wd += tl.load(source + 2 * n_pad)
        count += tl.load(source + 3 * n_pad)
        if HARD:
            sum_biased += tl.load(source + 5 * n_pad) * shrink
            sum_bias += tl.load(source + 6 * n_pad)
            negatives += tl.load(source + 7 * n_pad)
        source += PARTS * n_pad
    if HARD:
        mean_one = negatives / tl.where(sum_bias > 0, sum_bias, 1.0)
        sum_e += mean_one * sum_biased
        tl.store(rows + 6 * n_pad + row, mean_one)
    valid = (row < n) & (count > 0) & (sum_e > 0)
    if ANCHORS:
        valid = valid & (tl.load(anchors + row, mask=row < n, other=0) != 0)
    sum_e = tl.where(valid, sum_e, 1.0)
    count = tl.where(valid, count, 1.0)
    nearest = tl.where(valid, nearest, 0.0)
    mean_d = tl.where(valid, sum_wd / tl.where(sum_w > 0, sum_w, 1.0), 0.0)
    if COUNT:
        divisor = count
        omega = tl.where(valid, sum_w / count, 0.0)
    else:
        divisor = tl.where(valid, sum_w, 1.0)
        omega = tl.where(valid, 1.0, 0.0)
    if not PAIRWISE:
        loss = omega * (tl.log(sum_e) + (mean_d - nearest) * inv_tau) * scale
        tl.store(row_loss + row, tl.where(valid, loss, 0.0), mask=row < n)
    tl.store(rows + row, sum_e)
    tl.store(rows + n_pad + row, divisor)
    tl.store(rows + 2 * n_pad + row, omega)
    tl.store(rows + 3 * n_pad + row, mean_d)
    tl.store(rows + 4 * n_pad + row, valid.to(tl.float32))
    tl.store(rows + 5 * n_pad + row, nearest)


@triton.jit
def finish_costs(partial, rows, row_loss, scale, n, n_pad, split, ROWS: tl.constexpr):
    """`pairwise`: L_i and kappa_i from the splits' sums of `row_costs`, added in order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cost = tl.full((ROWS,), 0.0, tl.float32)
    pull = tl.full((ROWS,), 0.0, tl.float32)
    source = partial + row
    for _ in range(split):
        cost += tl.load(source)
        pull += tl.load(source + n_pad)
        source += 2 * n_pad
    valid = tl.load(rows + 4 * n_pad + row) != 0
    divisor = tl.load(rows + n_pad + row)
    loss = tl.where(valid, cost / divisor, 0.0)
    tl.store(rows + 8 * n_pad + row, tl.where(valid, pull / divisor, 0.0))
    tl.store(rows + 9 * n_pad + row, loss)
    tl.store(row_loss + row, loss * scale, mask=row < n)


@triton.jit
def reduce_rows(
    rows, row_loss, anchors, totals, n, n_pad, scale, BLOCK: tl.constexpr, REDUCTION: tl.constexpr, ANCHORS: tl.constexpr
):
    """One program: the loss, dL / dL_i without the upstream gradient, the largest omega."""
    total = tl.full((BLOCK,), 0.0, tl.float32)
    members = tl.full((BLOCK,), 0.0, tl.float32)
    peak = tl.full((BLOCK,), 0.0, tl.float32)
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(row_loss + row, mask=row < n, other=0.0)
        peak = tl.maximum(peak, tl.load(rows + 2 * n_pad + row, mask=row < n, other=0.0))
        if REDUCTION == "mean_valid":
            members += tl.load(rows + 4 * n_pad + row, mask=row < n, other=0.0)
        elif REDUCTION == "mean_all":
            if ANCHORS:
                members += (tl.load(anchors + row, mask=row < n, other=0) != 0).to(tl.float32)
            else:
                members += (row < n).to(tl.float32)
    divisor = 1.0
    if REDUCTION == "mean_valid" or REDUCTION == "mean_all":
        divisor = tl.maximum(tl.sum(members, 0), 1.0)
    tl.store(totals, tl.sum(total, 0) / divisor)
    tl.store(totals + 1, scale / divisor)
    tl.store(totals + 2, tl.max(peak, 0))


@triton.jit
def row_roles(
    rows, upstream, peak, roles, tau, log2_per_tau, gain, n, n_pad,
    ROWS: tl.constexpr, COUNT: tl.constexpr, DETACHED: tl.constexpr, PER_ROW: tl.constexpr, PAIRWISE: tl.constexpr,
    HARD: tl.constexpr,
):  # fmt: skip
    """u = a kappa / L, v = a / divisor and, for attached weights, r, with a = upstream x gain / peak.

    kappa is omega but for `pairwise`. gain / peak keeps G within fp16's normal range, whatever the size of the upstream gradient;
    `finish_gradient` undoes it.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sum_e = tl.load(rows + row)
    divisor = tl.load(rows + n_pad + row)
    valid = tl.load(rows + 4 * n_pad + row) != 0
    nearest = tl.load(rows + 5 * n_pad + row)
    top = tl.load(peak)
    a = tl.where(valid, gain / tl.where(top > 0, top, 1.0), 0.0)
    if PER_ROW:
        a *= tl.load(upstream + row, mask=row < n, other=0.0)
    u = a * tl.load(rows + (8 if PAIRWISE else 2) * n_pad + row) / sum_e
    v = a / divisor
    tl.store(roles + row, u)
    tl.store(roles + n_pad + row, v)
    if not DETACHED:
        # tau times what a positive's cost is compared with: nothing for `count`, else L_i; `count` has lse left over.
        if PAIRWISE:
            pivot = 0.0 if COUNT else tau * tl.load(rows + 9 * n_pad + row)
        else:
            pivot = nearest - tau * tl.log(sum_e) if COUNT else tl.load(rows + 3 * n_pad + row)
        tl.store(roles + 2 * n_pad + row, v * pivot)
    if HARD:
        tl.store(roles + 3 * n_pad + row, u * tl.load(rows + 6 * n_pad + row))
    if PAIRWISE:
        tl.store(roles + 4 * n_pad + row, tl.log2(sum_e) - nearest * log2_per_tau)


@triton.jit
def finish_gradient(
    partial_dz,
    u,
    norms,
    upstream,
    factor,  # totals + 1 for a scalar loss
    peak,
    du,
    inv_tau_gain,  # 1 / (tau gain)
    n,
    n_pad,
    n_features,
    split,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """dU_i = (dZ_i - (z_i . dZ_i) z_i) / ||u_i||, dZ_i the sum of its parts in order, z_i from u_i in fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    dz = tl.full((ROWS, D), 0.0, tl.float32)
    source = partial_dz + row[:, None] * D + column[None, :]
    for _ in range(split):
        dz += tl.load(source)
        source += n_pad * D
    inside = (row[:, None] < n) & (column[None, :] < n_features)
    at = row[:, None] * n_features + column[None, :]
    inverse = tl.load(norms + row)
    zi = tl.load(u + at, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
    top = tl.load(peak)
    size = tl.where(top > 0, top, 1.0) * inv_tau_gain * tl.load(factor)
    if not PER_ROW:
        size *= tl.load(upstream).to(tl.float32)
    tangent = (dz - tl.sum(dz * zi, 1)[:, None] * zi) * (inverse * size)[:, None]
    tl.store(du + at, tangent.to(du.dtype.element_ty), mask=inside)
