"""Names of attack objectives, the mark of those that also look at the clean images, and their gradients by one operator each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastanchor.attacks.engine import first
from fastanchor.errors import UserError, did_you_mean
from fastanchor.ops import images as operators
from fastanchor.reference import objectives


def resolve(objective: str | Callable) -> Callable:
    """A callable objective from its name; callables pass through. Raises UserError for an unknown name."""
    if callable(objective):
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        names = ", ".join(OBJECTIVES)
        hint = did_you_mean(objective, OBJECTIVES)
        raise UserError(f"objective = {objective!r}: must be one of {names}, or a callable(logits, labels){hint}")
    return OBJECTIVES[objective]


def with_clean(function: Callable) -> Callable:
    """Mark `function(outputs, labels, clean_outputs)` as one that compares with the clean images.

    The attack then runs the model once a batch on the clean images, without gradient and in the attack's own BatchNorm mode.
    """
    function.uses_clean = True
    return function


def uses_clean(objective: Callable) -> bool:
    """Whether the objective was marked by `with_clean`."""
    return getattr(objective, "uses_clean", False)


@with_clean
def _kl(outputs, labels: Tensor, clean) -> Tensor:
    return objectives.kl_divergence(first(outputs), labels, first(clean))


OBJECTIVES: dict[str, Callable] = {"ce": objectives.cross_entropy, "cw": objectives.cw_margin, "kl": _kl}


def _ce_gradient(logits: Tensor, labels: Tensor, clean: tuple) -> Tensor:
    return operators.label_head(logits, labels, "ce")[1]


def _cw_gradient(logits: Tensor, labels: Tensor, clean: tuple) -> Tensor:
    return operators.label_head(logits, labels, "cw")[1]


def _kl_gradient(logits: Tensor, labels: Tensor, clean: tuple) -> Tensor:
    return operators.kl_head(logits, first(clean[0]))[1]


def head_of(objective: Callable) -> tuple[str, Callable] | None:
    """The objective's head, if any: its name among `ops.images.CHECKS`, and (logits, labels, clean outputs) -> logit gradient."""
    return next((head for known, head in _HEADS if known is objective), None)


_HEADS = (
    (OBJECTIVES["ce"], ("label_head_ce", _ce_gradient)),
    (OBJECTIVES["cw"], ("label_head_cw", _cw_gradient)),
    (OBJECTIVES["kl"], ("kl_head", _kl_gradient)),
)
