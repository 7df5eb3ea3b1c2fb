"""SupCon: supervised contrastive learning on two augmented views, without an adversary (Khosla et al. 2020, arXiv 2004.11362).

    L = scale mean_i ( log sum_{a != i} exp(z_i . z_a / tau) - (1 / |P(i)|) sum_{p in P(i)} z_i . z_p / tau ),   z = [z1; z2]

L_out of the paper over the 2B embeddings, of z = u / ||u||, as in HobbitLong/SupContrast. Nothing of it trains the classifier:
stage 2 does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastanchor.config import POSITIVE, Allowed, Config, Number
from fastanchor.losses import SupConLoss
from fastanchor.methods.base import CONTRASTIVE, LOSS_BACKENDS, Method, Outputs, in_use


@dataclass(frozen=True)
class SupConSettings:
    temperature: Number = 0.1
    """Temperature (tau) of the contrastive loss."""
    scale: Number = 1.0
    """Factor of the loss, and so of the learning rate; SupContrast's code has temperature / 0.07."""
    RANGES: ClassVar[dict[str, Allowed]] = {"temperature": POSITIVE, "scale": POSITIVE}


class SupCon(Method):
    """Stage 1 of SupCon."""

    title = "SupCon"
    Settings = SupConSettings
    objectives = ()
    selects = "last"
    views = ("aug", "aug2")
    embeds = True

    def __init__(self, config: Config):
        super().__init__(config)
        backend = LOSS_BACKENDS[config.engine.kernels]
        # The mean is over all rows, as in SupContrast's code: one without a positive cannot be, its other view is one.
        self.contrastive = SupConLoss(self.settings.temperature, scale=self.settings.scale, reduction="mean_all", backend=backend)

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        embeddings = torch.cat([out.embeddings[name] for name in self.views])
        value = self.contrastive(embeddings, labels.repeat(len(self.views)))
        self.notes[CONTRASTIVE] = in_use(self.contrastive)
        return {"contrastive": value}
