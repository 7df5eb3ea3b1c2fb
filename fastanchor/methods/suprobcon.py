"""SupRobCon: a robust encoder from a contrastive loss alone, its adversary being that of a linear probe (wooozihui/SupRobCon).

    L = contrastive mean_i (1 / |P(i)|) sum_{p in P(i)} -log( e^{s_ip} / (e^{s_ip} + sum_{y_n != y_i} e^{s_in}) )
        + ce_adv CE(g(stopgrad(h(x'))), y)

Anchors are the embeddings of x' = PGD(x) on the cross-entropy of the probe g on the features h, keys those of x alone,
s_ia = z'_i . z_a / tau, P(i) = {p : y_p = y_i}, own image included. The probe is the model's classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.config import NOT_NEGATIVE, POSITIVE, Allowed, Config, Number
from fastanchor.losses import SupConLoss
from fastanchor.methods.base import CONTRASTIVE, LOSS_BACKENDS, Adversary, Method, Outputs, build_attack, in_use


@dataclass(frozen=True)
class SupRobConSettings:
    contrastive: Number = 1.0
    """Weight of the contrastive loss, all that the backbone learns from."""
    ce_adv: Number = 1.0
    """Weight of the probe's cross-entropy on adversarial images, which moves the classifier alone."""
    temperature: Number = 0.2
    """Temperature of the contrastive loss."""
    RANGES: ClassVar[dict[str, Allowed]] = {"contrastive": POSITIVE, "ce_adv": NOT_NEGATIVE, "temperature": POSITIVE}


class SupRobCon(Method):
    """SupRobCon as configured by `loss` and `attack`."""

    title = "SupRobCon"
    Settings = SupRobConSettings
    views = ("aug", "adv")
    embeds = True

    def __init__(self, config: Config):
        super().__init__(config)
        backend = LOSS_BACKENDS[config.engine.kernels]
        self.contrastive = SupConLoss(self.settings.temperature, denominator="pairwise", reduction="mean_all", backend=backend)

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        return {"adv": Adversary(build_attack(self.config), model)}

    def forward(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = model.features(inputs)
        return model.classifier(features.detach()), model.projection(features)

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        value = self.contrastive(out.embeddings["adv"], labels, out.embeddings["aug"], labels)
        self.notes[CONTRASTIVE] = in_use(self.contrastive)
        terms = {"contrastive": self.settings.contrastive * value}
        return terms | {"ce_adv": self.settings.ce_adv * F.cross_entropy(out.logits["adv"], labels)}
