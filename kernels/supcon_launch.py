"""Starts the SupCon kernels: buffers, grids, the split of the columns. No autograd here and no read of a device value.

`forward` gives the loss and what `backward` needs; `loss_and_grad` does both, for CUDA graphs and gradient caching.
Everything runs on the current stream, 4 launches forward and 3 backward; memory beyond the inputs is O(N D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastanchor.kernels import config, supcon
from fastanchor.kernels.launch import on_device
from torch import Tensor

PAD = 128  # rows of every buffer are a multiple of this, and every tile divides it
PRECISIONS = ("fp16", "tf32", "ieee")
MIN_TEMPERATURE = 0.03  # exp(-2 / tau) must stay a normal fp32 number, products with it included
MAX_BETA = 40.0
MAX_GAMMA = 5.0
MAX_FEATURES = 512
FP16_GAIN, FP16_GAIN_ATTACHED = (
    2.0**13,
    2.0**6,
)  # |G| <= 2 gain, times 1 + |phi'| (s - s_bar) with attached weights; fp16 ends at 65504


@dataclass(frozen=True)
class Options:
    """The options of the reference's `hard_supcon` that change the kernels, and `precision` of the stored unit rows.

    precision: "fp16" (fp16 unit rows and G, fp32 sums), "tf32" (fp32 rounded to TF32),
    "ieee" (fp32, no tensor cores).
    On embeddings of tight classes (cosine 0.98) the first two give gradients that are a few 1e-3 off, the last about 1e-4.
    """

    temperature: float = 0.1
    weight: str = "exp"
    gamma: float = 1.0
    detach_weights: bool = True
    normalizer: str = "sum"
    denominator: str = "all"
    detach_keys: bool = False
    scale: float = 1.0
    reduction: str = "mean_valid"
    precision: str = "fp16"


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
    hard_negative_beta: float = 0.0,
    keys_need_gradient: bool = False,
    views: bool = False,
    device: torch.device | None = None,
) -> tuple[bool, str]:
    """Whether the kernels compute this variant on `device`, with the reason in words.

    views: with positive_coef or denominator_mask. keys_need_gradient: ref_embeddings require one and are not detached.
    The values of a tensor `beta` are not looked at; they must lie in [-40, 40].
    """
    if dtype == torch.float64:
        return False, "the kernels compute in fp32, the embeddings are fp64"
    if n_features > MAX_FEATURES:
        return False, f"the kernels hold at most {MAX_FEATURES} features, these are {n_features}"
    if options.precision not in PRECISIONS:
        return False, f"precision {options.precision!r} is not one of {', '.join(PRECISIONS)}"
    if options.temperature < MIN_TEMPERATURE:
        return False, f"the fixed maximum needs temperature >= {MIN_TEMPERATURE}, this is {options.temperature}"
    if options.weight not in ("uniform", "exp", "pow"):
        return False, f"{options.weight} weights have no kernel"
    if options.denominator not in ("all", "negatives"):
        return False, f"the {options.denominator} denominator has no kernel"
    if hard_negative_beta != 0:
        return False, "hard_negative_beta has no kernel"
    if keys_need_gradient:
        return False, "the kernels give no gradient to ref_embeddings"
    if options.weight == "exp" and not isinstance(beta, Tensor) and abs(beta) > MAX_BETA:
        return False, f"exp weights need |beta| <= {MAX_BETA:g} in fp32, this is {beta}"
    if options.weight == "pow" and not 0 <= options.gamma <= MAX_GAMMA:
        return False, f"pow weights need 0 <= gamma <= {MAX_GAMMA:g} in fp32, this is {options.gamma}"
    if options.weight == "pow" and not options.detach_weights and options.precision == "fp16" and options.gamma < 1:
        return False, "attached pow weights with gamma < 1 have a slope too steep for fp16"
    arch = config.architecture(device or torch.device("cpu"))
    if not all(config.tile(kernel, arch, options.precision, n_features, 1, views) for kernel in ("row_stats", "gradient")):
        with_views = " with view matrices" if views else ""
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
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_views: Tensor | None = None,
    ref_instances: Tensor | None = None,
) -> tuple[Tensor, Saved]:
    """Loss (0-d fp32, or (N,) for reduction "none") and what `backward` needs.

    embeddings (N, D) fp32, fp16 or bf16; labels, views, instances (N,) integer, of which the low 32 bits are compared;
    anchors (N,) bool; matrices (V, V) indexed [anchor's view, key's view]; ref_* describe other keys. All on one device.
    Arguments are those of the reference's `hard_supcon`, whose checks they are taken to have passed.
    Raises NotImplementedError for what `supported` refuses.
    """
    views_matter = positive_coef is not None or denominator_mask is not None
    ok, reason = supported(options, embeddings.shape[1], embeddings.dtype, beta, views=views_matter, device=embeddings.device)
    if not ok:
        raise NotImplementedError(reason)
    with on_device(supcon.normalize, embeddings=embeddings, labels=labels, ref_embeddings=ref_embeddings):
        n, device = len(embeddings), embeddings.device
        own = _side(embeddings, labels, instances, views, options)
        keys = own if ref_embeddings is None else _side(ref_embeddings, ref_labels, ref_instances, ref_views, options)
        coef, mask = _view_matrices(positive_coef, denominator_mask, device)
        saved = Saved(own, keys, own.norms.new_empty((5, len(own.z))), own.norms.new_empty(3), coef, mask, instances is not None)
        tile, split, span = _plan("row_stats", own, keys, options, coef is not None)
        partial = own.norms.new_empty((split, 4, len(own.z)))
        supcon.row_stats[(len(own.z) // tile.rows, split)](
            *_pair_arguments(saved),
            partial,
            beta if isinstance(beta, Tensor) else float(beta),
            float(options.gamma),
            supcon.LOG2E.value / options.temperature,
            span,
            **_pair_flags(saved, options, beta),
            D=own.z.shape[1],
            BM=tile.rows,
            BN=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        row_loss = own.norms.new_empty(n)
        marks = own.ids if anchors is None else anchors.to(torch.int8)
        supcon.finish_rows[(len(own.z) // PAD,)](
            partial, marks, saved.rows, row_loss, 1 / options.temperature, options.scale, n, len(own.z), split,
            ROWS=PAD, COUNT=options.normalizer == "count", ANCHORS=anchors is not None, num_warps=4,
        )  # fmt: skip
        supcon.reduce_rows[(1,)](
            saved.rows, row_loss, marks, saved.totals, n, len(own.z), options.scale,
            BLOCK=1024, REDUCTION=options.reduction, ANCHORS=anchors is not None, num_warps=8,
        )  # fmt: skip
    return row_loss if options.reduction == "none" else saved.totals[0], saved


def backward(saved: Saved, upstream: Tensor, embeddings: Tensor, options: Options, beta: float | Tensor = 2.0) -> Tensor:
    """dL/d embeddings (N, D), of their dtype. upstream: 0-d, or (N,) for reduction "none"; the rest as given to `forward`."""
    with on_device(supcon.gradient, embeddings=embeddings, upstream=upstream):
        own, keys = saved.anchors, saved.keys
        n, n_pad, width = own.n, len(own.z), own.z.shape[1]
        per_row = options.reduction == "none"
        upstream = upstream.float().contiguous()
        # With one upstream number for all rows the largest weight of a row is that of omega, which `forward` has found.
        peak = (upstream * saved.rows[2, :n]).abs().amax() if per_row else saved.totals[2]
        gain = FP16_GAIN if options.detach_weights else FP16_GAIN_ATTACHED
        roles = own.norms.new_empty((3, n_pad))
        supcon.row_roles[(n_pad // PAD,)](
            saved.rows, upstream, peak, roles, options.temperature, gain, n, n_pad,
            ROWS=PAD, COUNT=options.normalizer == "count", DETACHED=options.detach_weights, PER_ROW=per_row, num_warps=4,
        )  # fmt: skip
        tile, split, span = _plan("gradient", own, keys, options, saved.coef is not None)
        partial = own.norms.new_empty((split, n_pad, width))
        supcon.gradient[(n_pad // tile.rows, split)](
            *_pair_arguments(saved),
            roles,
            partial,
            beta if isinstance(beta, Tensor) else float(beta),
            float(options.gamma),
            supcon.LOG2E.value / options.temperature,
            span,
            **_pair_flags(saved, options, beta),
            DETACHED=options.detach_weights,
            SYMMETRIC=keys is own and not options.detach_keys,
            D=width,
            BM=tile.rows,
            BN=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        embeddings = embeddings.contiguous()
        du = torch.empty_like(embeddings)
        rows = max(1, 2048 // width)
        supcon.finish_gradient[(n_pad // rows,)](
            partial, embeddings, own.norms, upstream, saved.totals[1:], peak, du, 1 / (options.temperature * gain),
            n, n_pad, embeddings.shape[1], split, D=width, ROWS=rows, PER_ROW=per_row, num_warps=4,
        )  # fmt: skip
    return du


def loss_and_grad(
    embeddings: Tensor, labels: Tensor, options: Options, beta: float | Tensor = 2.0, **pairs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss, dL/d embeddings) of a scalar reduction, without autograd: capturable in a CUDA graph. pairs: as in `forward`."""
    if options.reduction == "none":
        raise ValueError("loss_and_grad needs a scalar reduction, not 'none'")
    loss, saved = forward(embeddings, labels, options, beta, **pairs)
    one = torch.ones((), device=embeddings.device)
    return loss, backward(saved, one, embeddings, options, beta)


def _side(u, labels, instances, views, options) -> Side:
    n, n_features = u.shape
    n_pad = -(-n // PAD) * PAD
    width = max(16, 1 << (n_features - 1).bit_length())
    if n_pad * width >= 2**31:
        raise NotImplementedError(f"{n_pad} rows of {width} features pass the kernels' 32-bit offsets")
    z = torch.empty((n_pad, width), dtype=torch.float16 if options.precision == "fp16" else torch.float32, device=u.device)
    norms = torch.empty((2, n_pad), dtype=torch.float32, device=u.device)
    ids = torch.zeros((3, n_pad), dtype=torch.int32, device=u.device)
    rows = max(1, 2048 // width)
    supcon.normalize[(n_pad // rows,)](
        u.contiguous(), labels.contiguous(), z, ids, norms, n, n_pad, n_features,
        D=width, ROWS=rows, TF32=options.precision == "tf32", num_warps=4,
    )  # fmt: skip
    for index, values in ((1, instances), (2, views)):
        if values is not None:
            ids[index, :n] = values
    return Side(z, ids, norms, n)


def _plan(kernel, own, keys, options, views=False):
    """Tile of the kernel, number of programs that share the columns, and the columns of each."""
    arch = config.architecture(own.z.device)
    tile = config.tile(kernel, arch, options.precision, own.z.shape[1], own.n, views)
    row_blocks, column_tiles = len(own.z) // tile.rows, -(-keys.n // tile.columns)
    split = min(column_tiles, max(1, -(-2 * config.MULTIPROCESSORS[arch] // row_blocks)))
    per_program = -(-column_tiles // split)
    return tile, -(-column_tiles // per_program), per_program * tile.columns


def _pair_arguments(saved):
    own, keys, unused = saved.anchors, saved.keys, saved.totals
    views = saved.coef is not None
    matrices = (saved.coef, saved.mask, saved.coef.shape[1]) if views else (unused, unused, 0)
    return own.z, own.ids, own.norms[1], len(own.z), keys.z, keys.ids, keys.norms[1], len(keys.z), keys.n, *matrices


def _pair_flags(saved, options, beta):
    return {
        "DOT": "ieee" if options.precision == "ieee" else "tf32",
        "WEIGHT": options.weight,
        "BETA_TENSOR": isinstance(beta, Tensor),
        "NEGATIVES": options.denominator == "negatives",
        "SELF": saved.keys is saved.anchors,
        "INSTANCES": saved.instances,
        "VIEWS": saved.coef is not None,
    }


def _view_matrices(coef, mask, device):
    """Both matrices in fp32, or neither; the one not given is ones. A coefficient below 0 makes no positive, as 0 does."""
    if coef is None and mask is None:
        return None, None
    given = coef if coef is not None else mask
    ones = torch.ones(given.shape, device=device)
    coef = ones if coef is None else coef.to(torch.float32).clamp_min(0).contiguous()
    return coef, ones if mask is None else (mask != 0).to(torch.float32).contiguous()
