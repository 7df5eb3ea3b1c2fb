"""TRADES (Zhang et al. 2019, arXiv 1901.08573): cross-entropy on clean images, and how far the adversary moves the prediction.

    x1 = aug(x);  x2 = argmax_{|x2 - x1| <= eps} KL(p(x1) || p(x2));  L = CE(f(x1), y) + beta * mean KL(p(x1) || p(x2))

p(x1) is not detached in L. The attack needs it once a batch: in eval mode it stays the same from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.config import NOT_NEGATIVE, SHARE, Allowed, Config, Number
from fastanchor.errors import UserError
from fastanchor.losses.trades import mean_divergence
from fastanchor.methods.base import Adversary, Method, Outputs, build_attack


@dataclass(frozen=True)
class TradesSettings:
    """`loss.*` of TRADES."""

    RANGES: ClassVar[dict[str, Allowed]] = {"beta": NOT_NEGATIVE, "label_smoothing": SHARE}
    beta: Number = 6.0
    """Weight of the divergence between clean and adversarial predictions (the paper's 1 / lambda)."""
    label_smoothing: Number = 0.0
    """Label smoothing of the cross-entropy on the augmented images."""


class Trades(Method):
    """Clean cross-entropy and the divergence that the adversary maximises."""

    title = "TRADES"
    Settings = TradesSettings
    objectives = ("kl", "ce")
    # With model.view_bn = separate the clean images move BatchNorm's running statistics last, as in the public code.
    views = ("adv", "aug")

    @classmethod
    def check(cls, config: Config) -> None:
        """Of the divergence the clean images are the minimum: an attack that starts there stays. Raises UserError."""
        attack = config.attack
        if attack.objective == "kl" and attack.start == "zero":
            raise UserError("attack.start = zero: the objective kl has no gradient there; write gaussian or uniform")
        if attack.objective == "kl" and attack.start_radius == 0:
            raise UserError("attack.start_radius = 0: the objective kl has no gradient at the clean images; write a radius > 0")

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        return {"adv": Adversary(build_attack(self.config, self.config.attack.objective), model)}

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        clean, adversarial = out.logits["aug"], out.logits["adv"]
        return {
            "ce": F.cross_entropy(clean, labels, label_smoothing=self.settings.label_smoothing),
            "kl": self.settings.beta * mean_divergence(clean, adversarial),
        }
