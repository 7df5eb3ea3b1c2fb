"""C-LEAD as its released code (suklav/C_Lead, commit 2b8778a) runs it: contrastive on a fixed network's adversaries, no min-max.

    x' = attack of x on a fixed, undefended network (`loss.source`), rounded to 8 bits;  z0, z1, z2 of x, aug(x), aug(x')
    l_k = mean_i -log( e^(z0_i.zk_i / t) / sum_{a in {z0_j, j != i} and {zk_j, all j}} e^(z0_i.a / t) );  L = (l_1 + l_2) / 2

No labels: images of i's own class are negatives too. The backbone starts as the fixed network's. Then a linear classifier learns
on the frozen backbone, `loss.fgsm_share` of its batches being FGSM images of the fixed network. Adversaries never see the network
that is trained: its robustness must be judged white-box, as `fastanchor eval` does, not by transfer, as the released code does.

Not copied: the released classifier stage lets BatchNorm's running statistics move while the weights are frozen, and steps its
optimiser once more after validation, on stale gradients. It keeps adversaries as PNG files, made once; here they are made anew
for each batch, from new start noise. Which of its augmented views is adversarial is not known; L does not tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastanchor.config import POSITIVE, Allowed, Config, Number
from fastanchor.data.sources import ImageSet
from fastanchor.data.views import augment
from fastanchor.errors import UserError
from fastanchor.losses import SupConLoss
from fastanchor.methods.base import CONTRASTIVE, LOSS_BACKENDS, Adversary, Method, Outputs, Runner, build_attack, in_use
from fastanchor.methods.clead import own_pairs
from fastanchor.methods.finetune import LinearStage


@dataclass(frozen=True)
class CleadCodeSettings:
    source: str | None = None
    """RUN or CHECKPOINT of the fixed network that is attacked: an undefended one, as `fastanchor train standard` makes."""
    temperature: Number = 0.1
    """Temperature of the contrastive loss."""
    fgsm_share: Number = 0.5
    """Share of stage 2's batches (stage2.mode slf) that are FGSM images of the fixed network."""
    RANGES: ClassVar[dict[str, Allowed]] = {
        "temperature": POSITIVE,
        "fgsm_share": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    }


def clean_anchor_loss(temperature: float, backend: str = "auto") -> SupConLoss:
    """l_k: called as loss(torch.cat([z0, zk]), own_pairs(labels), views=...), view 0 first, rows (B, D) of any norm.

    With the images' numbers as labels and view 0 as the anchors, SupCon's denominator is that of the formula.
    """
    return SupConLoss(temperature, anchors=0, backend=backend)


class CleadCode(Method):
    """The released code's contrastive stage; `attack` is what the fixed network meets, `data.augment` both augmented views'."""

    title = "C-LEAD (released code: static transfer adversaries)"
    Settings = CleadCodeSettings
    selects = "last"
    views = ("clean", "aug", "adv")
    embeds = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.made_from = {"adv": "clean"}
        self.contrastive = clean_anchor_loss(self.settings.temperature, LOSS_BACKENDS[config.engine.kernels])

    @classmethod
    def check(cls, config: Config) -> None:
        """There is a fixed network. Raises UserError."""
        source = config.loss.source
        if source is None or not Path(source).exists():
            raise UserError(
                f"loss.source = {source}: must be the run or checkpoint of an undefended training, whose network is attacked"
            )

    @classmethod
    def second(cls, config: Config) -> type[Method] | None:
        return CleadClassifier if config.stage2.mode == "slf" else None

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        self.source = fixed_network(self.config, images, device)

    def build(self, model: nn.Module) -> None:
        """Nothing to train besides; the backbone becomes the fixed network's, where that is of the same shape."""
        theirs, ours = (part.backbone.state_dict() for part in (self.source, model))
        same = {name: value.shape for name, value in theirs.items()} == {name: value.shape for name, value in ours.items()}
        if same:
            model.backbone.load_state_dict(theirs)
        self.notes["start from loss.source"] = "yes: its backbone" if same else "no: its backbone has another shape"

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        return {"adv": Adversary(build_attack(self.config, bn="eval"), self.source)}

    def perturb(self, run: Runner, made: dict[str, Tensor], labels: Tensor) -> None:
        adversarial = run.attack("adv", made["clean"], labels)
        data, stored = self.config.data, adversarial.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1)
        view = augment(stored, data.augment, run.generators["augment"], pad=data.pad)
        made["adv"] = view if self.config.channels_last else view.contiguous()

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        numbers, view = own_pairs(labels), torch.arange(2, device=labels.device).repeat_interleave(len(labels))
        terms = {}
        for name in ("aug", "adv"):
            rows = torch.cat([out.embeddings["clean"], out.embeddings[name]])
            terms[f"ntxent_{name}"] = self.contrastive(rows, numbers, views=view) / 2
        self.notes[CONTRASTIVE] = in_use(self.contrastive)
        return terms


class CleadClassifier(LinearStage):
    """The released code's classifier: linear, on the frozen backbone, some of its batches FGSM images of the fixed network."""

    title = "slf, a share of the batches FGSM images of the fixed network"

    def __init__(self, config: Config):
        super().__init__(config)
        # Clean images or another network's adversarial ones: no accuracy on them is robust accuracy.
        self.views, self.made_from = ("either",), {"either": self.made_from["adv"]}

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        self.source = fixed_network(self.config, images, device)

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        attack = self.config.attack
        fgsm = {"steps": 1, "step_size": attack.eps or attack.step_size, "start": "zero", "start_radius": None, "project": True}
        return {"adv": Adversary(build_attack(self.config, bn="eval", **fgsm), self.source)}

    def perturb(self, run: Runner, made: dict[str, Tensor], labels: Tensor) -> None:
        clean = made[self.made_from["either"]]
        adversarial = run.attack("adv", clean, labels)
        # Drawn and chosen on the device, for the whole batch: a captured step cannot branch on it.
        attacked = torch.rand((), device=clean.device, generator=run.generators["attack"]) < self.settings.fgsm_share
        made["either"] = torch.where(attacked, adversarial, clean)


def fixed_network(config: Config, images: ImageSet, device: torch.device) -> nn.Module:
    """The network of `loss.source` in eval mode, its weights frozen. Raises UserError where it knows other classes."""
    from fastanchor.train.run import load_trained  # it reads configurations, and these know the methods

    found = load_trained(config.loss.source, device)
    if len(found.class_names) != images.num_classes:
        counts = f"has {len(found.class_names)} classes, and must have {images.num_classes}, as {images.name} has"
        raise UserError(f"loss.source = {config.loss.source}: {counts}")
    if found.class_names != images.class_names:
        raise UserError(f"loss.source = {config.loss.source}: knows other classes than {images.name}, or in another order")
    if found.config.method != "standard":
        raise UserError(
            f"loss.source = {config.loss.source}: must be an undefended network, method standard, is {found.config.method}"
        )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return found.model.requires_grad_(False).to(memory_format=layout)
