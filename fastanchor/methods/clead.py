"""C-LEAD as the abstract of arXiv 2510.27249 describes it: perturbation and network are optimised on one loss, min-max.

    x1 = aug(x);  d = argmax_{|d| <= eps} ce_adv CE(f(x1 + d), y) + contrastive L_con(z(x1), z(x1 + d))
    L  = ce_adv CE(f(x1 + d), y) + contrastive L_con
    L_con = mean over the 2B rows i of both views of -log( e^(s_ii' / t) / (e^(s_ii' / t) + sum_{y_a != y_i} e^(s_ia / t)) )

i' is i's own counterpart, the one positive; negatives are both views of the other classes' images; s is the cosine. The paper's
body is not public and its released code does something else (`clead_code`): weights, temperature and schedule are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.attacks.objectives import with_clean
from fastanchor.config import NOT_NEGATIVE, POSITIVE, Config, Number
from fastanchor.losses import SupConLoss
from fastanchor.methods.base import CONTRASTIVE, LOSS_BACKENDS, Adversary, Method, Outputs, WithEmbeddings, build_attack, in_use


@dataclass(frozen=True)
class CleadSettings:
    ce_adv: Number = 1.0
    """Weight of the cross-entropy on adversarial images."""
    contrastive: Number = 0.5
    """Weight of the contrastive loss between images and their own adversaries."""
    temperature: Number = 0.1
    """Temperature of the contrastive loss."""
    RANGES: ClassVar[dict] = {"ce_adv": NOT_NEGATIVE, "contrastive": POSITIVE, "temperature": POSITIVE}


def own_pair_loss(temperature: float, backend: str = "auto") -> SupConLoss:
    """L_con: called as loss(torch.cat([z, z_adv]), labels.repeat(2), instances=own_pairs(labels)), z (B, D) of any norm.

    Uniform weights over a single positive, a denominator of that positive and the negatives alone: the formula, by the kernels
    where they serve. Where the batch has one class only, there is no negative and the loss is 0 = -log 1, as in the formula.
    """
    return SupConLoss(temperature, denominator="pairwise", backend=backend)


def own_pairs(labels: Tensor, views: int = 2) -> Tensor:
    """The number of its image of every row of `views` stacked batches: (B,) to int64 (views * B,)."""
    return torch.arange(len(labels), device=labels.device).repeat(views)


class CleadJoint(Method):
    """The joint min-max reading; `attack.objective` says what the perturbation maximises."""

    title = "C-LEAD (joint min-max, as the abstract describes)"
    Settings = CleadSettings
    views = ("aug", "adv")
    embeds = True
    objectives = ("ce+contrastive", "contrastive", "ce")

    def __init__(self, config: Config):
        super().__init__(config)
        self.contrastive = own_pair_loss(self.settings.temperature, LOSS_BACKENDS[config.engine.kernels])

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        kind = self.config.attack.objective
        if kind == "ce":
            return {"adv": Adversary(build_attack(self.config), model)}
        return {"adv": Adversary(build_attack(self.config, self.objective(kind)), WithEmbeddings(model))}

    def objective(self, kind: str):
        """The training loss, or its contrastive part, as the perturbation sees it: the clean images' embeddings are fixed."""

        @with_clean
        def objective(outputs, labels, clean):
            (logits, z_adv), z = outputs, clean[1]
            # The mean over rows times the batch: on one scale with a sum of cross-entropies over the batch.
            value = self.settings.contrastive * len(labels) * self._contrast(z, z_adv, labels)
            if kind == "ce+contrastive":
                value = value + self.settings.ce_adv * F.cross_entropy(logits, labels, reduction="sum")
            return value

        return objective

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        terms = {"ce_adv": self.settings.ce_adv * F.cross_entropy(out.logits["adv"], labels)}
        contrast = self._contrast(out.embeddings["aug"], out.embeddings["adv"], labels)
        self.notes[CONTRASTIVE] = in_use(self.contrastive)
        return terms | {"contrastive": self.settings.contrastive * contrast}

    def _contrast(self, z: Tensor, z_adv: Tensor, labels: Tensor) -> Tensor:
        return self.contrastive(torch.cat([z, z_adv]), labels.repeat(2), instances=own_pairs(labels))
