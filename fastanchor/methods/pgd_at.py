"""PGD adversarial training (Madry et al. 2018, arXiv 1706.06083): cross-entropy on the images that PGD makes of the batch.

    x1 = aug(x);  x2 = PGD(x1, y);  L = ce_adv * CE(f(x2), y) + ce_clean * CE(f(x1), y)

The recipes are Rice et al. 2020's (arXiv 2002.11569) and Pang et al. 2021's (arXiv 2010.00467).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.config import NOT_NEGATIVE, SHARE, Allowed, Config, Number
from fastanchor.errors import UserError
from fastanchor.methods.base import Adversary, Method, Outputs, build_attack


@dataclass(frozen=True)
class PGDATSettings:
    """`loss.*` of PGD adversarial training."""

    RANGES: ClassVar[dict[str, Allowed]] = {"ce_adv": NOT_NEGATIVE, "ce_clean": NOT_NEGATIVE, "label_smoothing": SHARE}
    ce_adv: Number = 1.0
    """Weight of the cross-entropy on adversarial images."""
    ce_clean: Number = 0.0
    """Weight of the cross-entropy on the augmented (not attacked) images; at 0 they are not forwarded."""
    label_smoothing: Number = 0.0
    """Label smoothing of the cross-entropies that train the network (never of the attack's)."""


class PGDAT(Method):
    """Cross-entropy on adversarial images, and on clean ones where `loss.ce_clean` says so."""

    title = "PGD-AT"
    Settings = PGDATSettings
    objectives = ("ce", "cw")

    def __init__(self, config: Config):
        super().__init__(config)
        self.views = ("aug", "adv") if self.settings.ce_clean > 0 else ("adv",)

    @classmethod
    def describe(cls, config: Config) -> str:
        """With a single step it is one of the fast methods."""
        attack = config.attack
        if attack.steps > 1 or attack.start not in ("uniform", "zero"):
            return cls.title
        return ("FGSM-RS" if attack.project else "N-FGSM") if attack.start == "uniform" else "FGSM-AT"

    @classmethod
    def check(cls, config: Config) -> None:
        """One term at least must count. Raises UserError."""
        if config.loss.ce_adv == config.loss.ce_clean == 0:
            raise UserError("loss.ce_adv = loss.ce_clean = 0: at least one must be > 0")

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        return {"adv": Adversary(build_attack(self.config, self.config.attack.objective), model)}

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        smoothing = self.settings.label_smoothing
        terms = {"ce_adv": self.settings.ce_adv * F.cross_entropy(out.logits["adv"], labels, label_smoothing=smoothing)}
        if self.settings.ce_clean > 0:
            terms["ce_clean"] = self.settings.ce_clean * F.cross_entropy(out.logits["aug"], labels, label_smoothing=smoothing)
        return terms
