"""Second stages: what is trained on top of an encoder that a first stage has made.

    slf   a new linear classifier on the frozen backbone, cross-entropy on clean images      (AdvCL, Fan et al. 2021)
    alf   the same on PGD images of the whole network                                        (the same)
    aff   all weights, on adversarial images: CE(f(x'), y), or TRADES' CE(f(x), y) + beta KL(p(x) || p(x'))

Frozen means the weights and BatchNorm's running statistics. slf and alf are what AdvCL's code does; its fork A-InfoNCE
fine-tunes all weights by TRADES.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.config import Config
from fastanchor.losses.trades import mean_divergence
from fastanchor.methods.base import Adversary, Method, Outputs, build_attack


def base_view(config: Config) -> str:
    """The view of the data that a classifier learns on: simclr's distortions are for contrastive losses alone."""
    return "weak" if config.data.augment == "simclr" else "aug"


class LinearStage(Method):
    """slf and alf: the backbone is frozen with its running statistics, a new linear classifier learns on top of it."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.adversarial = config.stage2.mode == "alf"
        self.made_from = {"adv": base_view(config)}
        self.views = ("adv",) if self.adversarial else (base_view(config),)

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        # Whatever stage 1's mode: batch statistics would be another network's than the one trained here, and "train" would move
        # the frozen ones.
        return {"adv": Adversary(build_attack(self.config, bn="eval"), model)} if self.adversarial else {}

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        return list(model.classifier.parameters())

    def train_mode(self, model: nn.Module) -> None:
        model.eval()

    def forward(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            features = model.features(inputs)
        return model.classifier(features), None

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(out.logits[self.views[0]], labels)}


class FullStage(Method):
    """aff: all weights learn, BatchNorm in training mode, on adversarial images of the network as it is."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.clean, self.trades = base_view(config), config.stage2.loss == "trades"
        self.views = (self.clean, "adv") if self.trades else ("adv",)
        self.made_from = {"adv": self.clean}

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        # TRADES maximises its own divergence, from its own start: at the clean images it has no gradient.
        own = {"objective": "kl", "start": "gaussian", "start_radius": None} if self.trades else {}
        return {"adv": Adversary(build_attack(self.config, **own), model)}

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        adversarial = out.logits["adv"]
        if not self.trades:
            return {"ce_adv": F.cross_entropy(adversarial, labels)}
        clean = out.logits[self.clean]
        return {"ce": F.cross_entropy(clean, labels), "kl": self.config.stage2.beta * mean_divergence(clean, adversarial)}
