"""Undefended training: cross-entropy on augmented images. The twin that every robust figure is read against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastanchor.config import SHARE, Allowed, Config, Number
from fastanchor.errors import UserError
from fastanchor.methods.base import Method, Outputs


@dataclass(frozen=True)
class StandardSettings:
    """`loss.*` of undefended training."""

    RANGES: ClassVar[dict[str, Allowed]] = {"label_smoothing": SHARE}
    label_smoothing: Number = 0.0
    """Label smoothing of the cross-entropy."""


class Standard(Method):
    """Cross-entropy on the augmented view."""

    title = "undefended"
    Settings = StandardSettings
    objectives = ()
    views = ("aug",)
    selects = "clean"  # before BatchNorm's statistics settle, a constant answer is the "most robust" one

    @classmethod
    def check(cls, config: Config) -> None:
        """It has no stage 2. Raises UserError."""
        if config.stage2.mode != "none":
            raise UserError(f"stage2.mode = {config.stage2.mode}: undefended training has no stage 2; write none")

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(out.logits["aug"], labels, label_smoothing=self.settings.label_smoothing)}
