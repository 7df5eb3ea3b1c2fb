"""Which rows are positives and which terms of the denominator, as N x M masks: the sets P, A, N of `reference.hard_supcon`.

The definition of every set is that module's docstring; the checks are shared with `fastanchor.losses`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastanchor.errors import UserError
from fastanchor.reference.checks import SELECTIONS, check_name, check_rows, check_view_matrices, describe

ZERO_NORM = 1e-12  # F.normalize's threshold, but without its 1 / 1e-12 gradient


class Pairs(NamedTuple):
    """All that the loss reads about pairs; (N, M) unless said otherwise."""

    similarity: Tensor  # s
    positive: Tensor  # P, empty in rows that are not anchors
    denominator: Tensor  # A
    negative: Tensor  # N
    log_coef: Tensor | float  # log C[v_i, v_p], or 0.0
    anchor: Tensor | None  # (N,) bool, or None: all rows


def check_pairs(
    embeddings: Tensor,
    labels: Tensor,
    *,
    views: Tensor | None = None,
    positive_coef: Tensor | None = None,
    denominator_mask: Tensor | None = None,
    instances: Tensor | None = None,
    selection: str = "all",
    predictions: Tensor | None = None,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_views: Tensor | None = None,
    ref_instances: Tensor | None = None,
    ref_predictions: Tensor | None = None,
) -> None:
    """Raise UserError unless shapes, dtypes and what is given with what are those of `hard_supcon`. No value is read."""
    check_name("selection", selection, SELECTIONS)
    check_rows("embeddings", embeddings, labels=labels, views=views, instances=instances, predictions=predictions)
    described = {"ref_labels": ref_labels, "ref_views": ref_views, "ref_instances": ref_instances}
    described["ref_predictions"] = ref_predictions
    if ref_embeddings is None:
        for name in (name for name, value in described.items() if value is not None):
            raise UserError(f"{name} is given without ref_embeddings, but it describes their rows")
        ref_views, ref_predictions = views, predictions
    else:
        check_rows("ref_embeddings", ref_embeddings, **described)
        if ref_embeddings.shape[1] != embeddings.shape[1]:
            columns = [value.shape[1] for value in (ref_embeddings, embeddings)]
            raise UserError(f"ref_embeddings has {columns[0]} columns, but must have {columns[1]} as embeddings has")
        if (instances is None) != (ref_instances is None):
            raise UserError("instances and ref_instances must both be given, or neither, when ref_embeddings is given")
    if selection != "all" and (predictions is None or ref_predictions is None):
        missing = "predictions" if predictions is None else "ref_predictions"
        raise UserError(f"selection is {selection!r}, but {missing}, the predicted class of each row, is missing")
    check_view_matrices(positive_coef, denominator_mask, views, ref_views)


def make_pairs(
    embeddings: Tensor,
    labels: Tensor,
    *,
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
) -> Pairs:
    """Similarities and index sets of the arguments of `hard_supcon`. Raises UserError."""
    check_pairs(
        embeddings, labels, views=views, positive_coef=positive_coef, denominator_mask=denominator_mask, instances=instances,
        selection=selection, predictions=predictions, ref_embeddings=ref_embeddings, ref_labels=ref_labels, ref_views=ref_views,
        ref_instances=ref_instances, ref_predictions=ref_predictions,
    )  # fmt: skip
    own_keys = ref_embeddings is None
    if own_keys:
        ref_labels, ref_views, ref_instances, ref_predictions = labels, views, instances, predictions

    dtype = embeddings.dtype if own_keys else torch.promote_types(embeddings.dtype, ref_embeddings.dtype)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    z = unit_rows(embeddings.to(dtype))
    z_key = z if own_keys else unit_rows(ref_embeddings.to(dtype))
    if detach_keys:
        z_key = z_key.detach()
    with torch.autocast(z.device.type, enabled=False):
        similarity = z @ z_key.T

    same_class = labels[:, None] == ref_labels[None, :]
    other = torch.ones_like(same_class)
    if own_keys:
        other.fill_diagonal_(False)
    positive, denominator, log_coef = same_class & other, other, 0.0
    if selection != "all":
        selected = _selected(selection, same_class, labels, predictions, ref_predictions)
        positive, denominator = positive & selected, denominator & selected
    if positive_coef is not None:
        coef = positive_coef.to(dtype)[views[:, None], ref_views[None, :]]
        positive, log_coef = positive & (coef > 0), coef.log()
    if denominator_mask is not None:
        denominator = denominator & (denominator_mask[views[:, None], ref_views[None, :]] != 0)
    if instances is not None:
        positive = positive & (instances[:, None] == ref_instances[None, :])
    anchor = anchor_mask(anchors, views, embeddings)
    if anchor is not None:
        positive = positive & anchor[:, None]
    return Pairs(similarity, positive, denominator, denominator & ~same_class, log_coef, anchor)


def _selected(selection: str, same_class: Tensor, labels: Tensor, predictions: Tensor, ref_predictions: Tensor) -> Tensor:
    """S[i, a] of the definition: (N, M) bool."""
    alike = predictions[:, None] == ref_predictions[None, :]
    taken_for = labels[:, None] == ref_predictions[None, :]
    if selection == "leaking":
        return alike
    return same_class | {"hard": taken_for, "soft": alike, "merge": taken_for | alike}[selection]


def unit_rows(u: Tensor) -> Tensor:
    """u / ||u|| of every row, (N, D); rows of no length are 0, without gradient."""
    norm = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    zero = norm <= ZERO_NORM
    return (u / norm.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def anchor_mask(anchors: Tensor | int | Sequence[int] | None, views: Tensor | None, embeddings: Tensor) -> Tensor | None:
    """`anchors` as an (N,) bool tensor, or None: all rows. Raises UserError."""
    if anchors is None:
        return None
    if isinstance(anchors, Tensor) and anchors.dtype == torch.bool and anchors.shape == embeddings.shape[:1]:
        return anchors
    ids = [anchors] if isinstance(anchors, int) else anchors
    if isinstance(ids, Tensor) or not isinstance(ids, Sequence) or not ids or not all(type(view) is int for view in ids):
        raise UserError(
            f"anchors is {describe(anchors)}, but must be a bool tensor of shape ({embeddings.shape[0]},), a view id or a "
            "non-empty sequence of view ids"
        )
    if views is None:
        raise UserError(f"anchors is {anchors!r}, but view ids need views, which is missing")
    return torch.stack([views == view for view in ids]).any(0)
