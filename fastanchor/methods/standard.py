"""Undefended training: cross-entropy on augmented images. The twin that every robust figure is read against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastanchor.config import Config
from fastanchor.methods.base import Method, Outputs


class Standard(Method):
    """Cross-entropy on the augmented view, with the recipe's label smoothing."""

    views = ("aug",)
    selects = "clean"  # before BatchNorm's statistics settle, a constant answer is the "most robust" one

    def __init__(self, config: Config):
        self.smoothing = config.loss.label_smoothing

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(out.logits["aug"], labels, label_smoothing=self.smoothing)}
