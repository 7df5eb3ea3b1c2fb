"""Checks of the arguments of the hardness-weighted SupCon: on names, numbers and shapes, never on a tensor's values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastanchor.errors import UserError, did_you_mean

WEIGHTS = ("uniform", "exp", "pow", "topk")
NORMALIZERS = ("sum", "count")
DENOMINATORS = ("all", "pairwise", "negatives")
SELECTIONS = ("all", "hard", "soft", "merge", "leaking")
REDUCTIONS = ("mean_valid", "mean_all", "sum", "none")
PRECISIONS = ("fp16", "tf32", "ieee")


def check_options(**options) -> None:
    """Raise UserError for a bad option of `hard_supcon` that is a number or a name; of a tensor `beta` only the shape is read."""
    names = {
        "weight": WEIGHTS, "normalizer": NORMALIZERS, "denominator": DENOMINATORS, "selection": SELECTIONS,
        "reduction": REDUCTIONS, "precision": PRECISIONS,
    }  # fmt: skip
    if torch.compiler.is_compiling():
        return  # a compiled graph may have symbols for numbers; they are checked wherever the same call runs as it stands
    for name, value in options.items():
        if name in names:
            check_name(name, value, names[name])
        elif name in ("detach_weights", "detach_keys"):
            if not isinstance(value, bool):
                raise UserError(f"{name} is {describe(value)}, but must be True or False")
        elif name == "beta" and isinstance(value, Tensor):
            if value.dim() != 0 or not value.is_floating_point():
                raise UserError(f"beta is {describe(value)}, but must be a number or a 0-d floating tensor")
        elif name == "k":
            if type(value) is not int or value < 1:
                raise UserError(f"k is {value!r}, but must be a whole number >= 1")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{name} is {describe(value)}, but must be a finite number")
        elif name == "temperature" and value <= 0:
            raise UserError(f"temperature is {value!r}, but must be > 0")


def check_name(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise UserError unless `value` is one of the `allowed` names."""
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, but must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


def check_rows(name: str, embeddings: Tensor, **ids: Tensor | None) -> None:
    """Raise UserError unless `embeddings` is (N, D) floating and each of `ids` (N,) integer on its device.

    The first of them, labels, must be there.
    """
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or not embeddings.is_floating_point() or 0 in embeddings.shape:
        raise UserError(f"{name} is {describe(embeddings)}, but must be a floating tensor of shape (rows, features), not empty")
    for position, (id_name, value) in enumerate(ids.items()):
        if value is None and position > 0:
            continue
        tensor = isinstance(value, Tensor)
        integer = tensor and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if not integer or value.shape != embeddings.shape[:1]:
            raise UserError(
                f"{id_name} is {describe(value)}, but must be an integer tensor of shape ({embeddings.shape[0]},) as {name} has "
                f"{embeddings.shape[0]} rows"
            )
        _check_device(id_name, value, name, embeddings)


def check_view_matrices(positive_coef, denominator_mask, views, ref_views) -> None:
    """Raise UserError unless the matrices given are (V, V), of one shape, and every row has a view id."""
    matrices = {"positive_coef": positive_coef, "denominator_mask": denominator_mask}
    given = {name: value for name, value in matrices.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != value.shape[1]:
            raise UserError(f"{name} is {describe(value)}, but must be a tensor of shape (views, views)")
        if views is None or ref_views is None:
            raise UserError(f"{name} is given, but {'views' if views is None else 'ref_views'}, a view id per row, is missing")
        _check_device(name, value, "views", views)
    if len({value.shape for value in given.values()}) > 1:
        shapes = [tuple(value.shape) for value in matrices.values()]
        raise UserError(f"denominator_mask has shape {shapes[1]}, but must have that of positive_coef, {shapes[0]}")


def _check_device(name: str, value: Tensor, other: str, beside: Tensor) -> None:
    # A kernel would read an address of another device's memory.
    if value.device != beside.device:
        raise UserError(f"{name} is on {value.device}, {other} on {beside.device}: must be on one device")


def describe(value: object) -> str:
    """The value as a message shows it: of a tensor its dtype and shape."""
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
