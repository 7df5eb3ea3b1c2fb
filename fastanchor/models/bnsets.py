"""Several sets of BatchNorms in one backbone, one of them active: each kind of view keeps statistics and scales of its own.

As AdvCL has them (Fan et al. 2021): all views share the convolutions, adversarial and clean ones do not share a BatchNorm.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from fastanchor.errors import UserError
from fastanchor.models.classifier import RobustClassifier


class BatchNormSets(nn.Module):
    """One BatchNorm a name, `sets`; a forward goes through the one called `active`, and only that one's statistics move.

    norm: becomes the first set's; the others begin as copies of it. names: of the sets; the first one is active, which is what
    evaluation sees. `active` is a plain string: it is no part of the state dict, and is a part of a model's fingerprint, so a
    folded twin or a captured attack of one set is never taken for another's.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, names: Sequence[str]):
        super().__init__()
        self.sets = nn.ModuleDict({name: norm if i == 0 else copy.deepcopy(norm) for i, name in enumerate(names)})
        self.active = names[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.sets[self.active](x)

    def extra_repr(self) -> str:
        return f"active={self.active}"


class InSet(nn.Module):
    """`inner`, the model or a module around it, in one of its sets, as attacks see it; with a folded twin of its own.

    Raises UserError for an unknown name.
    """

    def __init__(self, inner: nn.Module, name: str):
        super().__init__()
        with bn_set(inner, name):
            self.inner, self.name = inner, name

    def forward(self, images: Tensor):
        with bn_set(self.inner, self.name):
            return self.inner(images)


def add_bn_sets(model: RobustClassifier, names: Sequence[str]) -> RobustClassifier:
    """Put a `BatchNormSets` in the place of every BatchNorm of the backbone, in place; returns the model.

    Heads keep the one BatchNorm that they have. names: at least one, all different, none empty or with a dot. Raises UserError,
    also for a backbone that has sets already.
    """
    names = list(names)
    good = names and len(set(names)) == len(names) and all(isinstance(name, str) and name and "." not in name for name in names)
    if not good:
        raise UserError(f"BatchNorm sets are {names!r}: must be different names, at least one, without dots")
    if _sets_of(model):
        raise UserError(f"BatchNorm sets {names!r}: the model has sets already, which can be added once only")
    for parent in list(model.backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, BatchNormSets(child, names).train(child.training))
    return model


@contextlib.contextmanager
def bn_set(model: nn.Module, name: str) -> Iterator[None]:
    """Inside the context the set `name` is the active one; afterwards, also after an exception, the one that was.

    "": all stays as it is. It changes Python strings alone: what a forward inside of it built, its backward included, may be used
    outside. Raises UserError for a name that the model does not have.
    """
    norms = _sets_of(model) if name else []
    if name and not (norms and all(name in norm.sets for norm in norms)):
        has = ", ".join(norms[0].sets) if norms else "none"
        raise UserError(f"BatchNorm set {name!r} is unknown: the model's sets are {has}")
    before = [norm.active for norm in norms]
    try:
        for norm in norms:
            norm.active = name
        yield
    finally:
        for norm, active in zip(norms, before, strict=True):
            norm.active = active


def _sets_of(model: nn.Module) -> list[BatchNormSets]:
    return [module for module in model.modules() if isinstance(module, BatchNormSets)]
