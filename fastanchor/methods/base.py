"""What a training method is: the views it needs, its adversary, and its named loss terms.

A new method is one short file with a subclass; the training loop, attacks, data and evaluation know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    views: tuple[str, ...] = ("adv",)
    embeds: bool = False
    # Which validation accuracy chooses the epoch to keep; the other one breaks ties.
    selects: str = "robust"

    def attack(self, progress: float) -> PGD | None:
        """The adversary at this point of the training (epochs done, fractional); None where no view is "adv"."""
        return None

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """The adversarial view of `images`: fp32, same shape."""
        return self.attack(progress)(model, images, labels, generator=generator)

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that the optimiser moves."""
        return list(model.parameters())

    def train_mode(self, model: nn.Module) -> None:
        """Put the model in the mode of its training forward."""
        model.train()

    def forward(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and embeddings or None, of the views stacked along the batch."""
        return model(inputs, embed=True) if self.embeds else (model(inputs), None)

    def outputs(self, model: nn.Module, views: dict[str, Tensor]) -> Outputs:
        """One forward over all views as one batch: BatchNorm sees their mixed statistics."""
        logits, embeddings = self.forward(
            model, torch.cat(list(views.values())) if len(views) > 1 else next(iter(views.values()))
        )
        batch = len(logits) // len(views)
        embedded = {} if embeddings is None else dict(zip(views, embeddings.float().split(batch), strict=True))
        return Outputs(dict(zip(views, logits.float().split(batch), strict=True)), embedded)

    def loss(self, out: Outputs, labels: Tensor, progress: float) -> dict[str, Tensor]:
        """Named, already weighted terms, each a scalar; their sum is minimised."""
        raise NotImplementedError

    def diagnostics(self, out: Outputs, labels: Tensor, progress: float) -> dict[str, Tensor]:
        """Named scalars to log, without gradient."""
        return {}
