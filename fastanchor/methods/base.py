"""What a training method is: the views it needs, its adversary, and its named loss terms.

A new method is one short file with a subclass; the training loop, attacks, data and evaluation know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fastanchor.attacks import PGD

VIEWS = ("clean", "aug", "adv")


@dataclass
class Outputs:
    """One training forward over all views: fp32 logits (B, K) of each, and embeddings (B, D) where the method wants them."""

    logits: dict[str, Tensor]
    embeddings: dict[str, Tensor]


class Method:
    """Base of all methods. `views` names the inputs of the training forward, in order, out of VIEWS.

    "clean": the images as they are; "aug": augmented; "adv": made by `attack()` from the augmented ones.
    `progress`, wherever it is given, is a 0-d tensor on the device: epochs done, fractional. It is changed in place from step to
    step, so what follows from it must be computed as a tensor: a captured step has frozen every Python number.
    """

    views: tuple[str, ...] = ("adv",)
    embeds: bool = False
    # What of the method is in use and why, for people, after the first step.
    notes: Mapping[str, str] = MappingProxyType({})
    # Which validation accuracy chooses the epoch to keep; the other one breaks ties.
    selects: str = "robust"

    def attack(self, progress: Tensor) -> PGD | None:
        """The adversary, built once for the whole training; None where no view is "adv"."""
        return None

    def attacked(self, model: nn.Module) -> nn.Module:
        """What the adversary sees of the model, asked for once: a module from images to logits, or to a tuple that begins so."""
        return model

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that the optimiser moves."""
        return list(model.parameters())

    def train_mode(self, model: nn.Module) -> None:
        """Put the model in the mode of its training forward."""
        model.train()

    def forward(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and embeddings or None, of the views stacked along the batch."""
        return model(inputs, embed=True) if self.embeds else (model(inputs), None)

    def outputs(self, model: nn.Module, views: dict[str, Tensor], forward: Callable | None = None) -> Outputs:
        """One forward over all views as one batch: BatchNorm sees their mixed statistics. forward: `self.forward`, compiled."""
        stacked = torch.cat(list(views.values())) if len(views) > 1 else next(iter(views.values()))
        logits, embeddings = (forward or self.forward)(model, stacked)
        batch = len(logits) // len(views)
        embedded = {} if embeddings is None else dict(zip(views, embeddings.float().split(batch), strict=True))
        return Outputs(dict(zip(views, logits.float().split(batch), strict=True)), embedded)

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        """Named, already weighted terms, each a scalar; their sum is minimised."""
        raise NotImplementedError

    def diagnostics(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        """Named scalars to log, without gradient."""
        return {}
