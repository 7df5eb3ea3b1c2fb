"""MART (Wang et al. 2020, ICLR): TRADES' divergence for images that the network gets wrong, and a boosted cross-entropy.

    x1 = aug(x);  x2 = PGD(x1, y);  L = BCE(f(x2), y) + beta * mean KL(p(x1) || p(x2)) (1 - p_y(x1))
    BCE(f(x2), y) = CE(f(x2), y) - log(1 - max_{k != y} p_k(x2))

Neither p(x1) nor the weight 1 - p_y(x1) is detached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fastanchor.config import NOT_NEGATIVE, Allowed, Number
from fastanchor.losses.mart import boosted_cross_entropy, weighted_divergence
from fastanchor.methods.base import Adversary, Method, Outputs, build_attack


@dataclass(frozen=True)
class MartSettings:
    """`loss.*` of MART."""

    RANGES: ClassVar[dict[str, Allowed]] = {"beta": NOT_NEGATIVE}
    beta: Number = 5.0
    """Weight of the divergence of misclassified images (the paper's lambda; beta in its code)."""


class Mart(Method):
    """Boosted cross-entropy on adversarial images, and the divergence weighted by how wrong the clean prediction is."""

    title = "MART"
    Settings = MartSettings
    objectives = ("ce", "cw")
    views = ("aug", "adv")

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        return {"adv": Adversary(build_attack(self.config, self.config.attack.objective), model)}

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        clean, adversarial = out.logits["aug"], out.logits["adv"]
        return {
            "bce": boosted_cross_entropy(adversarial, labels),
            "kl": self.settings.beta * weighted_divergence(clean, adversarial, labels),
        }
