"""Starts the SupCon kernels: buffers, grids, the split of the columns. No autograd here and no read of a device value.

`forward` gives the loss and what `backward` needs; `loss_and_grad` does both, for CUDA graphs and gradient caching.
Everything runs on the current stream, 4 launches forward (2 more for top-k weights, 2 more for `pairwise`) and 3 backward (2
more for the gradient of other keys); memory beyond the inputs is O(N D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastanchor.kernels import config, limits, supcon, supcon_pairs
from fastanchor.kernels.launch import on_device
from torch import Tensor

PAD = 128  # rows of every buffer are a multiple of this, and every tile divides it
PRECISIONS = ("fp16", "tf32", "ieee")
# |G| <= 2 gain, times 1 + |phi'| (s - s_bar) with attached weights; fp16 ends at 65504.
FP16_GAIN, FP16_GAIN_ATTACHED = 2.0**13, 2.0**6


@dataclass(frozen=True)
class Options:
    """The options of the reference's `hard_supcon` that change the kernels, and `precision` of the stored unit rows.

    precision: "fp16" (fp16 unit rows and G, fp32 sums), "tf32" (fp32 rounded to TF32), "ieee" (fp32, no tensor cores).
    On embeddings of tight classes (cosine 0.98) the first two give gradients that are a few 1e-3 off, the last about 1e-4.
    splits: programs that share the columns of a block of rows, which changes the order of sums; None: enough to fill the card.
    """

    temperature: float = 0.1
    weight: str = "exp"
    gamma: float = 1.0
    k: int = 8
    detach_weights: bool = True
    normalizer: str = "sum"
    denominator: str = "all"
    hard_negative_beta: float = 0.0
    selection: str = "all"
    detach_keys: bool = False
    scale: float = 1.0
    reduction: str = "mean_valid"
    precision: str = "fp16"
    splits: int | None = None

    @property
    def constant_weights(self) -> bool:
        """Whether the weights give no gradient: detached, or of no slope."""
        return self.detach_weights or self.weight in ("uniform", "topk")

    @property
    def online(self) -> bool:
        """Whether every row needs a maximum of its own."""
        return self.temperature < limits.FIXED_MAXIMUM

    @property
    def plain(self) -> bool:
        """Whether a pair is told by labels alone and all rows share one maximum: the case that has the largest tiles."""
        ordinary = self.weight != "topk" and self.denominator != "pairwise" and self.selection == "all"
        return ordinary and self.hard_negative_beta == 0 and not self.online


@dataclass(frozen=True)
class Side:
    """Unit rows and their ids, padded: the anchors or the keys."""

    z: Tensor
    ids: Tensor
    norms: Tensor
    n: int


@dataclass(frozen=True)
class Saved:
    """What `backward` needs: O(N D)."""

    anchors: Side
    keys: Side
    rows: Tensor
    totals: Tensor
    coef: Tensor | None
    mask: Tensor | None
    instances: bool


def supported(
    options: Options,
    n_features: int,
    dtype: torch.dtype,
    beta: float | Tensor = 2.0,
    *,
    views: bool = False,
    device: torch.device | None = None,
) -> tuple[bool, str]:
    """Whether the kernels compute this variant on `device`, with the reason in words.

    views: with positive_coef or denominator_mask. The values of a tensor `beta` are not looked at; they must lie in [-40, 40].
    """
    if dtype == torch.float64:
        return False, "the kernels compute in fp32, the embeddings are fp64"
    if n_features > limits.MAX_FEATURES:
        return False, f"the kernels hold at most {limits.MAX_FEATURES} features, these are {n_features}"
    if options.precision not in PRECISIONS:
        return False, f"precision {options.precision!r} is not one of {', '.join(PRECISIONS)}"
    steep = not options.detach_weights and options.precision == "fp16"
    number = 0.0 if isinstance(beta, Tensor) else beta
    reason = limits.refused(
        options.temperature, options.weight, number, options.gamma, options.hard_negative_beta, steep=steep
    )  # fmt: skip
    if reason:
        return False, reason
    if options.weight == "topk" and options.k > limits.MAX_K:
        return False, f"topk weights keep at most k = {limits.MAX_K} positives, this is {options.k}"
    arch = config.architecture(device or torch.device("cpu"))
    many = views or not options.plain
    if not all(config.tile(kernel, arch, options.precision, n_features, 1, many) for kernel in ("row_stats", "gradient")):
        with_views = " with these options" if many else ""
        return False, f"{n_features} features in {options.precision}{with_views} do not fit on sm_{arch}"
    return True, "within the kernels' options"


def forward(
    embeddings: Tensor,
    labels: Tensor,
    options: Options,
    beta: float | Tensor = 2.0,
    *,
    anchors: Tensor | None = None,
    views: Tensor | None = None,
    positive_coef: Tensor | None = None,
    denominator_mask: Tensor | None = None,
    instances: Tensor | None = None,
    predictions: Tensor | None = None,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_views: Tensor | None = None,
    ref_instances: Tensor | None = None,
    ref_predictions: Tensor | None = None,
) -> tuple[Tensor, Saved]:
    """Loss (0-d fp32, or (N,) for reduction "none") and what `backward` needs.

    embeddings (N, D) fp32, fp16 or bf16; labels, views, instances, predictions (N,) integer, of which the low 32 bits are
    compared; anchors (N,) bool; matrices (V, V) indexed [anchor's view, key's view]; ref_* describe other keys, all on one
    device. Arguments are those of the reference's `hard_supcon`, whose checks they are taken to have passed.
    Raises NotImplementedError for what `supported` refuses.
    """
    views_matter = positive_coef is not None or denominator_mask is not None
    ok, reason = supported(options, embeddings.shape[1], embeddings.dtype, beta, views=views_matter, device=embeddings.device)
    if not ok:
        raise NotImplementedError(reason)
    with on_device(supcon.normalize, embeddings=embeddings, labels=labels, ref_embeddings=ref_embeddings):
        own = _side(embeddings, labels, instances, views, predictions, options)
        keys = own
        if ref_embeddings is not None:
            keys = _side(ref_embeddings, ref_labels, ref_instances, ref_views, ref_predictions, options)
        coef, mask = _view_matrices(positive_coef, denominator_mask, embeddings.device)
        rows, totals = own.norms.new_empty((10, len(own.z))), own.norms.new_empty(3)
        saved = Saved(own, keys, rows, totals, coef, mask, instances is not None)
        marks = own.ids if anchors is None else anchors.to(torch.int8)
        row_loss = _row_losses(saved, options, beta, marks, anchors is not None)
        supcon.reduce_rows[(1,)](
            rows, row_loss, marks, totals, own.n, len(own.z), options.scale,
            BLOCK=1024, REDUCTION=options.reduction, ANCHORS=anchors is not None, num_warps=8,
        )  # fmt: skip
    return row_loss if options.reduction == "none" else totals[0], saved


def backward(
    saved: Saved,
    upstream: Tensor,
    embeddings: Tensor,
    options: Options,
    beta: float | Tensor = 2.0,
    ref_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dL/d embeddings (N, D) and, where ref_embeddings are given here and not detached, dL/d ref_embeddings (M, D).

    Each of the dtype of what it is the gradient of. upstream: 0-d, or (N,) for reduction "none"; the rest as given to `forward`.
    """
    with on_device(supcon_pairs.gradient, embeddings=embeddings, upstream=upstream, ref_embeddings=ref_embeddings):
        own, keys = saved.anchors, saved.keys
        n_pad = len(own.z)
        per_row = options.reduction == "none"
        upstream = upstream.float().contiguous()
        # With one upstream number for all rows the largest weight of a row is that of omega, which `forward` has found.
        peak = (upstream * saved.rows[2, : own.n]).abs().amax() if per_row else saved.totals[2]
        gain = FP16_GAIN if options.constant_weights else FP16_GAIN_ATTACHED
        roles = own.norms.new_empty((5, n_pad))
        supcon.row_roles[(n_pad // PAD,)](
            saved.rows, upstream, peak, roles, options.temperature, _log2_per(options), gain, own.n, n_pad,
            ROWS=PAD, COUNT=options.normalizer == "count", DETACHED=options.constant_weights, PER_ROW=per_row,
            PAIRWISE=options.denominator == "pairwise", HARD=options.hard_negative_beta != 0, num_warps=4,
        )  # fmt: skip

        def of(side: Side, given: Tensor, as_anchors: bool, as_keys: bool) -> Tensor:
            return _gradient(saved, roles, upstream, peak, gain, options, beta, side, given, as_anchors, as_keys)

        if keys is own:
            return of(own, embeddings, True, not options.detach_keys), None
        to_keys = ref_embeddings is not None and not options.detach_keys
        return of(own, embeddings, True, False), of(keys, ref_embeddings, False, True) if to_keys else None


def loss_and_grad(
    embeddings: Tensor,
    labels: Tensor,
    options: Options,
    beta: float | Tensor = 2.0,
    *,
    upstream: Tensor | None = None,
    keys_gradient: bool = False,
    **pairs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, dL/d embeddings, dL/d ref_embeddings or None), without autograd: capturable in a CUDA graph.

    upstream: as in `backward`; None: 1, for a scalar reduction. keys_gradient: ref_embeddings get theirs. pairs: as in `forward`.
    """
    if upstream is None:
        if options.reduction == "none":
            raise ValueError("loss_and_grad needs an upstream gradient for each row with reduction 'none'")
        upstream = torch.ones((), device=embeddings.device)
    loss, saved = forward(embeddings, labels, options, beta, **pairs)
    refs = pairs.get("ref_embeddings") if keys_gradient else None
    return loss, *backward(saved, upstream, embeddings, options, beta, refs)


def _row_losses(saved, options, beta, marks, anchors) -> Tensor:
    """The passes over pairs that `saved.rows` is made of, and the loss of each row (N,)."""
    own, rows = saved.anchors, saved.rows
    n_pad, per, count = len(own.z), _log2_per(options), options.normalizer == "count"
    pairwise, hard = options.denominator == "pairwise", options.hard_negative_beta != 0
    numbers = (beta if isinstance(beta, Tensor) else float(beta), float(options.gamma))
    grid, span, tiles = _plan("row_stats", own, saved.keys, options, saved.coef is not None)
    pair, sets = _pair_arguments(saved, own, saved.keys), _set_flags(saved, options)
    weights = {"WEIGHT": options.weight, "BETA_TENSOR": isinstance(beta, Tensor), "TOPK": options.weight == "topk"}
    if options.weight == "topk":
        kept = 1 << options.k.bit_length()
        partial = own.norms.new_empty((grid[1], kept, n_pad))
        supcon_pairs.largest_distances[grid](*pair, partial, span, KEPT=kept, **sets, **tiles)
        supcon.thresholds[(n_pad // PAD,)](partial, rows, n_pad, grid[1], options.k, ROWS=PAD, KEPT=kept, num_warps=4)
    parts = 8 if hard or options.online else 4
    partial = own.norms.new_empty((grid[1], parts, n_pad))
    supcon_pairs.row_stats[grid](
        *pair, rows, partial, *numbers, float(options.hard_negative_beta), per, span, NEGATIVES=options.denominator != "all",
        HARD=hard, ONLINE=options.online, PARTS=parts, **weights, **sets, **tiles,
    )  # fmt: skip
    row_loss = own.norms.new_empty(own.n)
    supcon.finish_rows[(n_pad // PAD,)](
        partial, marks, rows, row_loss, 1 / options.temperature, per, options.scale, own.n, n_pad, grid[1],
        ROWS=PAD, COUNT=count, ANCHORS=anchors, PAIRWISE=pairwise, HARD=hard, ONLINE=options.online, PARTS=parts, num_warps=4,
    )  # fmt: skip
    if pairwise:
        partial = own.norms.new_empty((grid[1], 2, n_pad))
        supcon_pairs.row_costs[grid](*pair, rows, partial, *numbers, per, span, **weights, **sets, **tiles)
        supcon.finish_costs[(n_pad // PAD,)](
            partial, rows, row_loss, options.scale, own.n, n_pad, grid[1], ROWS=PAD, num_warps=4
        )  # fmt: skip
    return row_loss


def _gradient(saved, roles, upstream, peak, gain, options, beta, side, given, as_anchors, as_keys) -> Tensor:
    """The gradient of the rows of `side`, of which `given` are the embeddings."""
    other = saved.keys if as_anchors else saved.anchors
    n_pad, width = side.z.shape
    grid, span, tiles = _plan("gradient", side, other, options, saved.coef is not None)
    partial = side.norms.new_empty((grid[1], n_pad, width))
    supcon_pairs.gradient[grid](
        *_pair_arguments(saved, side, other), saved.rows, roles, roles.shape[1], partial,
        beta if isinstance(beta, Tensor) else float(beta), float(options.gamma), float(options.hard_negative_beta),
        _log2_per(options), span, WEIGHT=options.weight, BETA_TENSOR=isinstance(beta, Tensor),
        NEGATIVES=options.denominator != "all", PAIRWISE=options.denominator == "pairwise",
        HARD=options.hard_negative_beta != 0, TOPK=options.weight == "topk", ONLINE=options.online,
        DETACHED=options.constant_weights, AS_ANCHORS=as_anchors, AS_KEYS=as_keys, **_set_flags(saved, options), **tiles,
    )  # fmt: skip
    given = given.contiguous()
    du = torch.empty_like(given)
    rows = max(1, 2048 // width)
    supcon.finish_gradient[(n_pad // rows,)](
        partial, given, side.norms, upstream, saved.totals[1:], peak, du, 1 / (options.temperature * gain),
        side.n, n_pad, given.shape[1], grid[1], D=width, ROWS=rows, PER_ROW=options.reduction == "none", num_warps=4,
    )  # fmt: skip
    return du


def _side(u, labels, instances, views, predictions, options) -> Side:
    n, n_features = u.shape
    n_pad = -(-n // PAD) * PAD
    width = max(16, 1 << (n_features - 1).bit_length())
    if n_pad * width >= 2**31:
        raise NotImplementedError(f"{n_pad} rows of {width} features pass the kernels' 32-bit offsets")
    z = torch.empty((n_pad, width), dtype=torch.float16 if options.precision == "fp16" else torch.float32, device=u.device)
    norms = torch.empty((2, n_pad), dtype=torch.float32, device=u.device)
    ids = torch.zeros((4, n_pad), dtype=torch.int32, device=u.device)
    rows = max(1, 2048 // width)
    supcon.normalize[(n_pad // rows,)](
        u.contiguous(), labels.contiguous(), z, ids, norms, n, n_pad, n_features,
        D=width, ROWS=rows, TF32=options.precision == "tf32", ROUNDED=options.precision != "ieee", num_warps=4,
        **_registers(options),
    )  # fmt: skip
    for index, values in ((1, instances), (2, views), (3, predictions)):
        if values is not None:
            ids[index, :n] = values
    return Side(z, ids, norms, n)


def _plan(kernel, side, other, options, views=False):
    """Grid of a pass of `side`'s rows over `other`'s, the columns of one program, and the tile as the kernels' arguments."""
    arch = config.architecture(side.z.device)
    width = side.z.shape[1]
    tile = config.tile(kernel, arch, options.precision, width, side.n, views or not options.plain)
    row_blocks, column_tiles = len(side.z) // tile.rows, -(-other.n // tile.columns)
    split = min(column_tiles, options.splits or max(1, -(-2 * config.MULTIPROCESSORS[arch] // row_blocks)))
    per_program = -(-column_tiles // split)
    tiles = {"D": width, "BM": tile.rows, "BN": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
    tiles |= _registers(options)
    return (row_blocks, -(-column_tiles // per_program)), per_program * tile.columns, tiles


def _registers(options):
    """Left to itself ptxas spills a few bytes of the fp32 kernels, to have more programs at a time."""
    return {} if options.precision == "fp16" else {"maxnreg": 255}


def _log2_per(options):
    """log2(e) / tau: exponents are of base 2."""
    return supcon_pairs.LOG2E.value / options.temperature


def _pair_arguments(saved, side, other):
    unused = saved.totals
    matrices = (saved.coef, saved.mask, saved.coef.shape[1]) if saved.coef is not None else (unused, unused, 0)
    return side.z, side.ids, side.norms[1], len(side.z), other.z, other.ids, other.norms[1], len(other.z), other.n, *matrices


def _set_flags(saved, options):
    return {
        "DOT": "ieee" if options.precision == "ieee" else "tf32",
        "SELF": saved.keys is saved.anchors,
        "INSTANCES": saved.instances,
        "VIEWS": saved.coef is not None,
        "SELECTION": options.selection,
    }


def _view_matrices(coef, mask, device):
    """Both matrices in fp32, or neither; the one not given is ones. A coefficient below 0 makes no positive, as 0 does."""
    if coef is None and mask is None:
        return None, None
    given = coef if coef is not None else mask
    ones = torch.ones(given.shape, device=device)
    coef = ones if coef is None else coef.to(torch.float32).clamp_min(0).contiguous()
    return coef, ones if mask is None else (mask != 0).to(torch.float32).contiguous()
