"""ANCHOR: PGD adversarial training with a hardness-weighted supervised contrastive loss (arXiv 2510.27599).

    x1 = aug(x);  x2 = PGD(x1, y);  L = ce_adv * CE(f(x2), y) + ce_clean * CE(f(x1), y) + hsc * L_HSC([z1; z2], [y; y])

With hsc = 0 this is PGD adversarial training (Madry et al. 2018): the augmented view is then neither needed nor forwarded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.attacks.objectives import with_clean
from fastanchor.config import Config, LossConfig
from fastanchor.errors import UserError
from fastanchor.kernels.limits import MAX_BETA
from fastanchor.losses import HardSupConLoss
from fastanchor.methods.base import CONTRASTIVE, LOSS_BACKENDS, Adversary, Method, Outputs, WithEmbeddings, build_attack, in_use
from fastanchor.reference.hard_supcon import sampled_effective_positives

# Rows whose effective number of positives is computed; all, up to here.
SAMPLED_ROWS = 512


class Anchor(Method):
    """Stage 1 of ANCHOR, as configured by `loss` and `attack`."""

    title = "ANCHOR"
    Settings = LossConfig
    objectives = ("ce", "ce+hsc", "hsc")

    def __init__(self, config: Config):
        super().__init__(config)
        self.weights = config.loss
        self.embeds = self.weights.hsc > 0
        wanted = {"adv"} | ({"aug"} if self.weights.ce_clean > 0 else set())
        if self.embeds:
            wanted |= set(self.weights.views.split("+"))
        self.views = tuple(view for view in ("clean", "aug", "adv") if view in wanted)
        # A beta that warms up is a tensor, whose value the loss does not look at.
        too_hard = self.weights.weight == "exp" and abs(self.weights.beta) > MAX_BETA
        kernels = config.engine.kernels
        if kernels == "on" and too_hard and self.embeds:
            raise UserError(f"engine.kernels = on: exp weights need |beta| <= {MAX_BETA:g}, loss.beta = {self.weights.beta:g}")
        self.loss_backend = "torch" if kernels == "auto" and too_hard else LOSS_BACKENDS[kernels]

    @classmethod
    def describe(cls, config: Config) -> str:
        """Without the contrastive term it is PGD-AT."""
        return cls.title if config.loss.hsc else "PGD-AT (ANCHOR with loss.hsc = 0)"

    @classmethod
    def check(cls, config: Config) -> None:
        """The joint objective needs the contrastive term, of two views; and one term at least must count. Raises UserError."""
        objective, loss = config.attack.objective, config.loss
        if objective != "ce" and loss.hsc == 0:
            raise UserError(f"attack.objective = {objective}: needs loss.hsc > 0, the attack would have nothing to maximise")
        if objective != "ce" and loss.views != "aug+adv":
            raise UserError(f"attack.objective = {objective}: is defined for loss.views = aug+adv only")
        if loss.ce_adv == loss.ce_clean == loss.hsc == 0:
            raise UserError("loss.ce_adv = loss.ce_clean = loss.hsc = 0: at least one must be > 0")

    def beta(self, progress: Tensor) -> float | Tensor:
        """Hardness after `progress` epochs: rises linearly over the warm-up."""
        warmup = self.weights.beta_warmup_epochs
        return self.weights.beta * (progress / warmup).clamp(max=1) if warmup > 0 else self.weights.beta

    def contrastive(self, progress: Tensor) -> HardSupConLoss:
        """The contrastive loss at this point of the training."""
        loss = self.weights
        return HardSupConLoss(
            temperature=loss.temperature, beta=self.beta(progress), weight=loss.weight, gamma=loss.gamma, k=loss.k,
            detach_weights=loss.detach_weights, normalizer=loss.normalizer, denominator=loss.denominator,
            backend=self.loss_backend, precision=loss.hsc_precision,
        )  # fmt: skip

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        kind = self.config.attack.objective
        if kind == "ce":
            return {"adv": Adversary(build_attack(self.config), model)}
        return {"adv": Adversary(build_attack(self.config, self._joint_objective(kind, progress)), WithEmbeddings(model))}

    def _joint_objective(self, kind: str, progress: Tensor):
        """The training loss as the adversary sees it: the clean views' embeddings are fixed, the adversarial ones move."""

        @with_clean
        def objective(outputs, labels, clean):
            embeddings = torch.cat([clean[1], outputs[1]])
            # The mean over rows times the batch: on one scale with a sum of cross-entropies over the batch.
            value = self.weights.hsc * len(labels) * self.contrastive(progress)(embeddings, labels.repeat(2))
            if kind == "ce+hsc":
                value = value + self.weights.ce_adv * F.cross_entropy(outputs[0], labels, reduction="sum")
            return value

        return objective

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        smoothing = self.weights.label_smoothing
        terms = {"ce_adv": self.weights.ce_adv * F.cross_entropy(out.logits["adv"], labels, label_smoothing=smoothing)}
        if self.weights.ce_clean > 0:
            terms["ce_clean"] = self.weights.ce_clean * F.cross_entropy(out.logits["aug"], labels, label_smoothing=smoothing)
        if self.embeds:
            embeddings, stacked = self._stack(out, labels)
            contrastive = self.contrastive(progress)
            terms["hsc"] = self.weights.hsc * contrastive(embeddings, stacked)
            self.notes[CONTRASTIVE] = in_use(contrastive)
        return terms

    def diagnostics(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        """The effective number of positives 1 / sum(w^2), its median over rows: below about 4, outliers rule the loss."""
        if not self.embeds:
            return {}
        embeddings, stacked = self._stack(out, labels)
        loss = self.weights
        # Of some rows: a dense matrix of all would cost more than the loss whose memory is none.
        stride = -(-len(stacked) // SAMPLED_ROWS)
        positives = sampled_effective_positives(
            embeddings, stacked, stride, weight=loss.weight, beta=self.beta(progress), gamma=loss.gamma, k=loss.k
        )
        return {"effective_positives": positives.median()}

    def _stack(self, out: Outputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        names = self.weights.views.split("+")
        return torch.cat([out.embeddings[name] for name in names]), labels.repeat(len(names))
