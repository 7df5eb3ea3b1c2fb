"""ASCL: PGD adversarial training with a contrastive loss among the images that the network confuses (Bui et al. 2021).

    L = ce_adv CE(f(x'), y) + ce_clean CE(f(x), y) + contrastive L_ASCL([z; z']) + kl (1 / (B K)) sum_i KL(p(x_i) || p(x'_i))

x: the augmented images, x' = PGD(x) on the cross-entropy, p: softmax over K classes, L_ASCL: `losses.ascl`. The loss and its
weights are those of `ascl_pgd` and `ascl_pgd_2trans` in tuananhbui89/ASCL, whose paper is arXiv 2101.10027.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.config import NOT_NEGATIVE, POSITIVE, Allowed, Config, Number
from fastanchor.losses.ascl import ASCLLoss
from fastanchor.losses.trades import mean_divergence
from fastanchor.methods.base import CONTRASTIVE, LOSS_BACKENDS, Adversary, Method, Outputs, Runner, build_attack, in_use


@dataclass(frozen=True)
class AsclSettings:
    ce_adv: Number = 1.0
    """Weight of the cross-entropy on adversarial images."""
    ce_clean: Number = 0.0
    """Weight of the cross-entropy on the augmented (not attacked) images."""
    contrastive: Number = 1.0
    """Weight of the contrastive loss."""
    kl: Number = 2.0
    """Weight of the divergence of the adversarial prediction from the clean one, a mean over images and classes as in ASCL's
    code: 2 with 10 classes weighs TRADES' term, the mean over images of the sum over classes, by 0.2."""
    temperature: Number = 0.2
    """Temperature of the contrastive loss."""
    selection: Literal["all", "hard", "soft", "merge", "leaking"] = "leaking"
    """Which pairs enter it, by the classes predicted at this step: see fastanchor.reference.hard_supcon."""
    distance: Literal["linf", "cosine"] = "linf"
    """Distance of its unit embeddings: linf: the largest difference of a coordinate, ASCL's own | cosine, which has kernels."""
    two_transforms: bool = False
    """Two augmented views of every image and an adversarial one of each, in one contrastive loss."""
    RANGES: ClassVar[dict[str, Allowed]] = {
        "ce_adv": NOT_NEGATIVE, "ce_clean": NOT_NEGATIVE, "contrastive": NOT_NEGATIVE, "kl": NOT_NEGATIVE,
        "temperature": POSITIVE,
    }  # fmt: skip


class Ascl(Method):
    """ASCL as configured by `loss` and `attack`."""

    title = "ASCL"
    Settings = AsclSettings
    embeds = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.clean = ("aug", "aug2") if self.settings.two_transforms else ("aug",)
        self.attacked = tuple(name.replace("aug", "adv") for name in self.clean)
        self.views = self.clean + self.attacked
        backend = LOSS_BACKENDS[config.engine.kernels]
        self.contrastive = ASCLLoss(
            self.settings.temperature, self.settings.selection, distance=self.settings.distance, backend=backend
        )

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        return {"adv": Adversary(build_attack(self.config), model, images=len(self.clean))}

    def perturb(self, run: Runner, made: dict[str, Tensor], labels: Tensor) -> None:
        # Both augmented views are one batch of the attack, whose BatchNorm statistics they share where it takes the batch's.
        x_adv = run.attack("adv", torch.cat([made[name] for name in self.clean]), labels.repeat(len(self.clean)))
        made |= zip(self.attacked, x_adv.chunk(len(self.clean)), strict=True)

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        weights, labels = self.settings, labels.repeat(len(self.clean))
        clean, adv = (torch.cat([out.logits[name] for name in names]) for names in (self.clean, self.attacked))
        terms = {"ce_adv": weights.ce_adv * F.cross_entropy(adv, labels)}
        if weights.ce_clean > 0:
            terms["ce_clean"] = weights.ce_clean * F.cross_entropy(clean, labels)
        if weights.kl > 0:
            terms["kl"] = weights.kl * mean_divergence(clean, adv) / clean.shape[1]
        if weights.contrastive > 0:
            embeddings = torch.cat([out.embeddings[name] for name in self.views])
            value = self.contrastive(embeddings, labels.repeat(2), torch.cat([clean, adv]).argmax(1))
            terms["contrastive"] = weights.contrastive * value
            self.notes[CONTRASTIVE] = in_use(self.contrastive)
        return terms
