"""Triton kernels of the hardness-weighted SupCon: normalise, row statistics, row losses, gradient. No N x N tensor, no atomics.

With unit rows z, d_ij = 1 - z_i . z_j (exact for close rows) and e_ij = exp(-d_ij / tau), every pair needs only d_ij and
a few numbers per row, so a pass over the column tiles gives the statistics and a second one the whole gradient,
dZ = (G + G^T) Z, from one similarity tile for both roles. The formulas are derived in `fastanchor/reference/hard_supcon.py`.
d_ij is that of the rows as stored, divided by the norms that rounding left them with: on tight classes (cosine 0.98) that makes
the gradient from fp16 rows ten times better, because there a row's rounding error acts mostly through its length.
The maximum of exp is fixed (s <= 1), which makes the row sums additive: columns are split over programs, each writes its own
partial result, and these are added in a fixed order, so results repeat bit for bit.

Buffers (rows padded with zero rows to a multiple of 128, features to a power of two; pads are read without masks):
    z        (n_pad, D)            unit rows, fp16 or fp32
    norms    (2, n_pad)            1 / ||u||, 1 / ||stored z||
    ids      (3, n_pad) int32      labels, instance ids, view ids
    partial  (split, 4, n_pad)     L = sum e,  W = sum w,  T = sum w d,  n = number of positives
    rows     (5, n_pad)            L, the weights' divisor, omega, T / W, 1 if the row is valid
    roles    (3, n_pad)            u, v, r: what row i contributes to G_ij and, as a column, to G_ji
    totals   (3,)                  loss, dL / dL_i before the upstream gradient, largest omega
`fastanchor.kernels.supcon_launch` makes them and starts the kernels.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
POW_EPS = tl.constexpr(1e-6)
ZERO_NORM = tl.constexpr(1e-12)


@triton.jit
def normalize(u, labels, z, ids, norms, n, n_pad, n_features, D: tl.constexpr, ROWS: tl.constexpr, TF32: tl.constexpr):
    """z = u / ||u|| (0 for a zero row), 1 / ||u|| (0 likewise), 1 / ||z||, labels as int32. Reads and writes every row once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    inside = (row[:, None] < n) & (column[None, :] < n_features)
    x = tl.load(u + row[:, None] * n_features + column[None, :], mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    positive = norm > ZERO_NORM
    divisor = tl.where(positive, norm, 1.0)
    unit = tl.where(positive[:, None], tl.div_rn(x, tl.broadcast_to(divisor[:, None], (ROWS, D))), 0.0)
    if TF32:
        # The tensor core cuts off the 13 low bits of what it reads, so they are rounded away here.
        bits = unit.to(tl.int32, bitcast=True)
        unit = ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)
    stored = unit.to(z.dtype.element_ty)
    tl.store(z + row[:, None] * D + column[None, :], stored)
    length = tl.sqrt_rn(tl.sum(stored.to(tl.float32) * stored.to(tl.float32), 1))
    tl.store(norms + row, tl.where(positive, 1.0 / divisor, 0.0))
    tl.store(norms + n_pad + row, 1.0 / tl.where(positive, length, 1.0))
    tl.store(ids + row, tl.load(labels + row, mask=row < n, other=-1).to(tl.int32))


@triton.jit
def _hardness(d, beta, gamma, WEIGHT: tl.constexpr):
    """h(s) at s = 1 - d. With |beta| <= 40 its sums stay far from the ends of fp32."""
    if WEIGHT == "exp":
        return tl.exp2((d - 1.0) * (beta * LOG2E))
    elif WEIGHT == "pow":
        return tl.exp2(gamma * tl.log2(tl.maximum(d, 0.0) + POW_EPS))
    else:
        return tl.full(d.shape, 1.0, tl.float32)


@triton.jit
def row_stats(
    z,  # anchors
    ids,
    rho,  # 1 / ||stored z||
    n_pad,
    z_key,  # keys: the same buffers, or those of other rows
    ids_key,
    rho_key,
    n_pad_key,
    n_key,
    coef,  # (n_views, n_views) fp32 positive coefficients and 0/1 denominators, by [anchor's view, key's view]
    mask,
    n_views,
    partial,
    beta,
    gamma,
    log2_per_tau,  # log2(e) / tau
    span,  # columns of one program, a multiple of BN
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BETA_TENSOR: tl.constexpr,
    NEGATIVES: tl.constexpr,
    SELF: tl.constexpr,
    INSTANCES: tl.constexpr,
    VIEWS: tl.constexpr,
):
    """Program (row block, column span): the sums L, W, T and n of its rows over its columns. 2 N M D FLOPs over the grid."""
    if BETA_TENSOR:
        beta = tl.load(beta).to(tl.float32)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    feature = tl.arange(0, D)
    zi = tl.load(z + row[:, None] * D + feature[None, :])
    yi = tl.load(ids + row)
    rho_i = tl.load(rho + row)
    if INSTANCES:
        ii = tl.load(ids + n_pad + row)
    if VIEWS:
        vi = tl.load(ids + 2 * n_pad + row)
    sum_e = tl.full((BM,), 0.0, tl.float32)
    sum_w = tl.full((BM,), 0.0, tl.float32)
    sum_wd = tl.full((BM,), 0.0, tl.float32)
    count = tl.full((BM,), 0.0, tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, n_key), BN):
        column = first + tl.arange(0, BN)
        zj = tl.load(z_key + column[:, None] * D + feature[None, :])
        yj = tl.load(ids_key + column)
        rho_j = tl.load(rho_key + column)
        d = 1.0 - tl.dot(zi, tl.trans(zj), input_precision=DOT) * rho_i[:, None] * rho_j[None, :]
        other = tl.broadcast_to(column[None, :] < n_key, (BM, BN))
        if SELF:
            other = other & (row[:, None] != column[None, :])
        same = yi[:, None] == yj[None, :]
        positive = other & same
        term = other
        if NEGATIVES:
            term = term & (yi[:, None] != yj[None, :])
        if INSTANCES:
            ij = tl.load(ids_key + n_pad_key + column)
            positive = positive & (ii[:, None] == ij[None, :])
        w = _hardness(d, beta, gamma, WEIGHT)
        if VIEWS:
            pair = vi[:, None] * n_views + tl.load(ids_key + 2 * n_pad_key + column)[None, :]
            c = tl.load(coef + pair)
            positive = positive & (c > 0)
            term = term & (tl.load(mask + pair) != 0)
            w *= c
        w = tl.where(positive, w, 0.0)
        sum_e += tl.sum(tl.where(term, tl.exp2(-d * log2_per_tau), 0.0), 1)
        sum_w += tl.sum(w, 1)
        sum_wd += tl.sum(w * d, 1)
        count += tl.sum(positive.to(tl.float32), 1)
    out = partial + tl.program_id(1).to(tl.int64) * 4 * n_pad + row
    tl.store(out, sum_e)
    tl.store(out + n_pad, sum_w)
    tl.store(out + 2 * n_pad, sum_wd)
    tl.store(out + 3 * n_pad, count)


@triton.jit
def finish_rows(
    partial,
    anchors,
    rows,
    row_loss,
    inv_tau,
    scale,
    n,
    n_pad,
    split,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    """The splits' sums added in order; L_i = omega (log L + d_bar / tau), 0 in rows that are not valid."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sum_e = tl.full((ROWS,), 0.0, tl.float32)
    sum_w = tl.full((ROWS,), 0.0, tl.float32)
    sum_wd = tl.full((ROWS,), 0.0, tl.float32)
    count = tl.full((ROWS,), 0.0, tl.float32)
    source = partial + row
    for _ in range(split):
        sum_e += tl.load(source)
        sum_w += tl.load(source + n_pad)
        sum_wd += tl.load(source + 2 * n_pad)
        count += tl.load(source + 3 * n_pad)
        source += 4 * n_pad
    valid = (row < n) & (count > 0) & (sum_e > 0)
    if ANCHORS:
        valid = valid & (tl.load(anchors + row, mask=row < n, other=0) != 0)
    sum_e = tl.where(valid, sum_e, 1.0)
    count = tl.where(valid, count, 1.0)
    mean_d = tl.where(valid, sum_wd / tl.where(sum_w > 0, sum_w, 1.0), 0.0)
    if COUNT:
        divisor = count
        omega = tl.where(valid, sum_w / count, 0.0)
    else:
        divisor = tl.where(valid, sum_w, 1.0)
        omega = tl.where(valid, 1.0, 0.0)
    loss = omega * (tl.log(sum_e) + mean_d * inv_tau) * scale
    tl.store(row_loss + row, tl.where(valid, loss, 0.0), mask=row < n)
    tl.store(rows + row, sum_e)
    tl.store(rows + n_pad + row, divisor)
    tl.store(rows + 2 * n_pad + row, omega)
    tl.store(rows + 3 * n_pad + row, mean_d)
    tl.store(rows + 4 * n_pad + row, valid.to(tl.float32))


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
    rows,
    upstream,
    peak,
    roles,
    tau,
    gain,
    n,
    n_pad,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    DETACHED: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """u = a omega / L, v = a / divisor and, for attached weights, r, with a = upstream x gain / peak.

    gain / peak keeps G within fp16's normal range, whatever the size of the upstream gradient; `finish_gradient` undoes it.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sum_e = tl.load(rows + row)
    divisor = tl.load(rows + n_pad + row)
    valid = tl.load(rows + 4 * n_pad + row) != 0
    top = tl.load(peak)
    a = tl.where(valid, gain / tl.where(top > 0, top, 1.0), 0.0)
    if PER_ROW:
        a *= tl.load(upstream + row, mask=row < n, other=0.0)
    v = a / divisor
    tl.store(roles + row, a * tl.load(rows + 2 * n_pad + row) / sum_e)
    tl.store(roles + n_pad + row, v)
    if not DETACHED:
        pivot = -tau * tl.log(sum_e) if COUNT else tl.load(rows + 3 * n_pad + row)
        tl.store(roles + 2 * n_pad + row, v * pivot)


@triton.jit
def gradient(
    z,
    ids,
    rho,
    n_pad,
    z_key,
    ids_key,
    rho_key,
    n_pad_key,
    n_key,
    coef,
    mask,
    n_views,
    roles,
    partial_dz,  # (split, n_pad, D) fp32
    beta,
    gamma,
    log2_per_tau,
    span,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BETA_TENSOR: tl.constexpr,
    NEGATIVES: tl.constexpr,
    SELF: tl.constexpr,
    INSTANCES: tl.constexpr,
    VIEWS: tl.constexpr,
    DETACHED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Program (row block, column span): sum_j (G_ij + G_ji) z_j over its columns, up to a factor. 4 N M D FLOPs over the grid.

    G_ij + G_ji = e_ij (u_i + u_j) - [positive] h_ij ((v_i + v_j) + phi' (r_i + r_j - d_ij (v_i + v_j))); the phi' term only with
    attached weights, the column's share only if SYMMETRIC, each share with its own view coefficient and mask if VIEWS.
    """
    if BETA_TENSOR:
        beta = tl.load(beta).to(tl.float32)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    feature = tl.arange(0, D)
    zi = tl.load(z + row[:, None] * D + feature[None, :])
    yi = tl.load(ids + row)
    rho_i = tl.load(rho + row)
    ui = tl.load(roles + row)
    vi = tl.load(roles + n_pad + row)
    if not DETACHED:
        ri = tl.load(roles + 2 * n_pad + row)
    if INSTANCES:
        ii = tl.load(ids + n_pad + row)
    if VIEWS:
        view_i = tl.load(ids + 2 * n_pad + row)
    acc = tl.full((BM, D), 0.0, tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, n_key), BN):
        column = first + tl.arange(0, BN)
        zj = tl.load(z_key + column[:, None] * D + feature[None, :])
        yj = tl.load(ids_key + column)
        rho_j = tl.load(rho_key + column)
        d = 1.0 - tl.dot(zi, tl.trans(zj), input_precision=DOT) * rho_i[:, None] * rho_j[None, :]
        # Padded columns are zero rows: whatever G is there, it adds nothing.
        u = tl.broadcast_to(ui[:, None], (BM, BN))
        v = tl.broadcast_to(vi[:, None], (BM, BN))
        if VIEWS:
            view_j = tl.load(ids_key + 2 * n_pad_key + column)
            pair = view_i[:, None] * n_views + view_j[None, :]
            c_row = tl.load(coef + pair)
            u *= tl.load(mask + pair)
            v *= c_row
        if not DETACHED:
            r = tl.broadcast_to(ri[:, None], (BM, BN))
            if VIEWS:
                r *= c_row
        if SYMMETRIC:
            uj = tl.load(roles + column)[None, :]
            vj = tl.load(roles + n_pad + column)[None, :]
            if VIEWS:
                pair = view_j[None, :] * n_views + view_i[:, None]
                c_column = tl.load(coef + pair)
                uj *= tl.load(mask + pair)
                vj *= c_column
            u += uj
            v += vj
            if not DETACHED:
                rj = tl.load(roles + 2 * n_pad + column)[None, :]
                if VIEWS:
                    rj *= c_column
                r += rj
        e = tl.exp2(-d * log2_per_tau)
        h = _hardness(d, beta, gamma, WEIGHT)
        if DETACHED:
            w = h * v
        elif WEIGHT == "exp":
            w = h * (v - beta * (r - d * v))
        elif WEIGHT == "pow":
            # The clamp of 1 - s at 0 has no slope below it.
            slope = tl.where(d >= 0, gamma / (tl.maximum(d, 0.0) + POW_EPS), 0.0)
            w = h * (v - slope * (r - d * v))
        else:
            w = h * v
        same = yi[:, None] == yj[None, :]
        positive = same
        if INSTANCES:
            ij = tl.load(ids_key + n_pad_key + column)
            positive = positive & (ii[:, None] == ij[None, :])
        g = e * u
        if NEGATIVES:
            g = tl.where(same, 0.0, g)
        g = tl.where(positive, g - w, g)
        if SELF:
            g = tl.where(row[:, None] != column[None, :], g, 0.0)
        acc = tl.dot(g.to(zj.dtype), zj, acc, input_precision=DOT)
    out = partial_dz + (tl.program_id(1).to(tl.int64) * n_pad + row[:, None]) * D + feature[None, :]
    tl.store(out, acc)


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
