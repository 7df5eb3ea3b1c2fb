"""AdvCL: robust features without classes, by contrastive learning and pseudo-labels (Fan et al. 2021, LijieFan/AdvCL).

    x' = PGD(x) on NTX;   x'' = PGD(x) on PCE;   h = x without its low frequencies;   t1, t2 = strong augmentations
    L  = contrastive NTX(z(x'), z(t1), z(t2), z(h)) + pseudo PCE(x''),     PCE(x'') = mean_k CE(fc_k(f(x'')), pseudo_k)

NTX is SupCon with an image's number in the batch as its label: its four views are each other's positives. x' and x'' have a
BatchNorm set of their own, the other views share one. While x' is searched for, t1, t2 and h do not change, so one training
forward of theirs serves every step of the attack and the loss: with the batch's statistics each forward gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.attacks.modes import attack_mode
from fastanchor.attacks.objectives import with_clean
from fastanchor.config import NOT_NEGATIVE, POSITIVE, Config, Number
from fastanchor.data.extra import Mixed
from fastanchor.data.frequency import high_frequencies
from fastanchor.data.pseudo import check_clusters, cluster, read_pseudo_labels
from fastanchor.data.sources import ImageSet
from fastanchor.data.views import to_float
from fastanchor.losses import SupConLoss
from fastanchor.methods.base import (
    CONTRASTIVE,
    LOSS_BACKENDS,
    Adversary,
    Method,
    Outputs,
    Runner,
    WithEmbeddings,
    build_attack,
    in_use,
)
from fastanchor.models.bnsets import InSet, bn_set

CLEAN = ("aug", "aug2", "high")


@dataclass(frozen=True)
class AdvCLSettings:
    """What `loss.*` says of AdvCL."""

    contrastive: Number = 0.5 / 0.07
    """Weight of the contrastive loss; the authors' code multiplies it by temperature / 0.07."""
    pseudo: Number = 0.2
    """Weight of the pseudo-labels' cross-entropy, a mean over the clusterings."""
    temperature: Number = 0.5
    """Temperature of the contrastive loss."""
    radius: Number = 8.0
    """Frequencies below it, in waves a side, are taken out of the high-frequency view."""
    clusters: tuple[int, ...] = (2, 10, 50, 100, 500)
    """Clusters of each clustering."""
    pseudo_labels: str | None = None
    """File of pseudo-labels, .npz or .npy (None: the encoder's own features are clustered before the first epoch)."""
    recluster_epochs: int = 10
    """Without a file: cluster anew every so many epochs, each cluster growing out of the one before; 0 is never."""
    RANGES: ClassVar[dict] = {
        "contrastive": POSITIVE,
        "pseudo": NOT_NEGATIVE,
        "temperature": POSITIVE,
        "radius": NOT_NEGATIVE,
        "clusters": (lambda v: v and all(x >= 2 for x in v), "a list of at least one number, each >= 2"),
        "recluster_epochs": NOT_NEGATIVE,
    }


class AdvCL(Method):
    """Stage 1 of AdvCL: the backbone, its projection and the pseudo-labels' classifiers; the classifier is stage 2's."""

    title = "AdvCL"
    Settings = AdvCLSettings
    objectives = ("ce+contrastive",)
    selects = "last"
    bn_sets = ("pgd", "pgd_ce", "normal")
    bn_set_of: ClassVar = {"adv": "pgd", "adv_ce": "pgd_ce", **dict.fromkeys(CLEAN, "normal")}
    views = ("adv", "adv_ce", *CLEAN)
    made_from: ClassVar = {"adv": "weak", "adv_ce": "weak"}
    embeds = True
    indexed = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.contrastive = SupConLoss(self.settings.temperature, backend=LOSS_BACKENDS[config.engine.kernels])

    @classmethod
    def describe(cls, config: Config) -> str:
        """Without the authors' pseudo-labels its figures are not theirs."""
        return cls.title if config.loss.pseudo_labels is not None else "AdvCL (pseudo-labels by its own features)"

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        file, clusters = self.settings.pseudo_labels, self.settings.clusters
        self.images = images.train if images.extra is None else Mixed(images.train, images.extra)
        # Which images of its source a split has: without validation images a file for all of CIFAR-10 would be too long.
        origin = getattr(self.images, "origin", None)
        self.given = None if file is None else read_pseudo_labels(file, clusters, len(self.images), origin)
        if file is None:
            check_clusters(clusters, len(self.images))

    def build(self, model: nn.Module) -> nn.Module:
        heads = PseudoHeads(model.backbone.num_features, self.settings.clusters, len(self.images))
        if self.given is not None:
            heads.targets.copy_(self.given)
        return heads

    def start_epoch(self, epoch: int, model: nn.Module) -> None:
        """Cluster the encoder's features where it is time, in place: a captured step goes on reading the same targets."""
        every = self.settings.recluster_epochs
        if self.given is not None or not (epoch == 1 or (every and (epoch - 1) % every == 0)):
            return
        before = None if epoch == 1 else self.heads.targets
        features = features_of(model, self.images, self.config.eval.batch_size)
        self.heads.targets.copy_(cluster(features, self.settings.clusters, self.config.seed, before))

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        @with_clean
        def contrastive(outputs, labels, clean):
            return len(labels) * self._contrastive(torch.cat([outputs[1], clean]))

        @with_clean
        def pseudo(outputs, labels, targets):
            return len(labels) * self.heads.cross_entropy(outputs, targets)

        return {
            "adv": Adversary(build_attack(self.config, contrastive), InSet(WithEmbeddings(model), "pgd"), given=True),
            "adv_ce": Adversary(build_attack(self.config, pseudo), InSet(_OnFeatures(model, self.heads), "pgd_ce"), given=True),
        }

    def perturb(self, run: Runner, made: dict[str, Tensor], labels: Tensor) -> Outputs:
        classes, targets = labels[:, 0], self.heads.targets[labels[:, 1]]
        made["high"] = high_frequencies(made["weak"], self.settings.radius)
        early = run.forward({name: made[name] for name in CLEAN})
        fixed = torch.cat([early.embeddings[name].detach() for name in CLEAN])
        made["adv"] = run.attack("adv", made["weak"], classes, clean=fixed)
        made["adv_ce"] = run.attack("adv_ce", made["weak"], classes, clean=targets)
        return early

    def forward(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = model.features(inputs)
        return self.heads(features), model.projection(features)

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        contrastive = self._contrastive(torch.cat([out.embeddings[name] for name in ("adv", *CLEAN)]))
        self.notes[CONTRASTIVE] = in_use(self.contrastive)
        pseudo = self.heads.cross_entropy(out.logits["adv_ce"], self.heads.targets[labels[:, 1]])
        return {"contrastive": self.settings.contrastive * contrastive, "pseudo": self.settings.pseudo * pseudo}

    def _contrastive(self, stacked: Tensor) -> Tensor:
        batch = len(stacked) // (1 + len(CLEAN))
        return self.contrastive(stacked, torch.arange(batch, device=stacked.device).repeat(1 + len(CLEAN)))


class PseudoHeads(nn.Module):
    """A linear classifier for each clustering, all of them one matrix; and `targets`, every image's pseudo-labels, int64 (N, T).

    The targets are a buffer, to be saved with a checkpoint: features of later weights would be clustered differently.
    """

    def __init__(self, features: int, clusters: tuple[int, ...], images: int):
        super().__init__()
        self.clusters = tuple(clusters)
        self.linear = nn.Linear(features, sum(clusters))
        self.register_buffer("targets", torch.zeros(images, len(clusters), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, F) -> logits (B, sum of clusters), one clustering's after the other's."""
        return self.linear(features)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over images and clusterings. logits: as `forward` gives them; targets: int64 (B, T)."""
        pairs = zip(logits.split(self.clusters, dim=1), targets.unbind(1), strict=True)
        return torch.stack([F.cross_entropy(own, target) for own, target in pairs]).mean()


class _OnFeatures(nn.Module):
    """The pseudo-labels' classifiers on top of the backbone, as the attack on them sees the network."""

    def __init__(self, inner: nn.Module, heads: nn.Module):
        super().__init__()
        self.inner, self.heads = inner, heads

    def forward(self, images: Tensor) -> Tensor:
        return self.heads(self.inner.features(images))


@torch.no_grad()
def features_of(model: nn.Module, images, batch_size: int) -> Tensor:
    """Features (N, F), fp32, of all images of a split as evaluation sees them, in the set of the clean views."""
    device, found = next(model.parameters()).device, []
    with attack_mode(model, "eval"), bn_set(model, "normal"):
        for indices in torch.arange(len(images)).split(batch_size):
            found.append(model.features(to_float(images.gather(indices).to(device))).float())
    return torch.cat(found)
