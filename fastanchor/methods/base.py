"""What a training method is: its settings, the views it needs, its adversaries, and its named loss terms.

A new method is one short file with a subclass (docs/adding-a-method.md); the training loop, attacks, data and evaluation know
nothing of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastanchor.attacks import PGD
from fastanchor.attacks.modes import untracked
from fastanchor.config import Config
from fastanchor.data.sources import ImageSet
from fastanchor.losses import HardSupConLoss
from fastanchor.models.bnsets import bn_set

# Views that the data gives, in the order in which they are drawn. clean: the image as evaluation sees it; weak: drawn by
# data.weak; aug, aug2: by data.augment.
DATA_VIEWS = ("clean", "weak", "aug", "aug2")
# `backend` of a contrastive loss by engine.kernels.
LOSS_BACKENDS = {"auto": "auto", "on": "triton", "off": "torch"}
# The note of `Method.notes` that is about a kernel.
CONTRASTIVE = "contrastive loss"
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none."""


@dataclass
class Outputs:
    """Training forwards of views, by name: fp32 logits (B, K), and embeddings (B, D) where the method wants them."""

    logits: dict[str, Tensor]
    embeddings: dict[str, Tensor]


@dataclass(frozen=True)
class Adversary:
    """An attack, and what it sees of the model: a module from images to logits, or to a tuple that begins so.

    images: how many it attacks for one image of the batch. given: whether `perturb` hands it what its objective compares with,
    so that the clean images are not forwarded for it.
    """

    attack: PGD
    model: nn.Module
    images: int = 1
    given: bool = False


class Method:
    """Base of all methods; one object serves one stage of one training.

    `progress`, wherever it is given, is a 0-d tensor on the device: epochs done, fractional. It is changed in place from step to
    step, so what follows from it must be computed as a tensor: a captured step has frozen every Python number. `labels` are
    int64 (B,), or (B, 2) where the method is `indexed`.
    """

    # For reports and tables; the class's name where it is empty.
    title: ClassVar[str] = ""
    # A frozen dataclass: the method's `loss.*` settings, with RANGES as in `config`.
    Settings: ClassVar[type] = NoSettings
    # Values of attack.objective that it knows; none: it trains without an adversary.
    objectives: ClassVar[tuple[str, ...]] = ("ce",)
    # Which validation accuracy chooses the epoch to keep, "robust" or "clean"; the other one breaks ties. "last": nothing in it
    # trains the classifier, so its last epoch is kept, and stage 2 trains one.
    selects: ClassVar[str] = "robust"
    # BatchNorm sets of the backbone, the first being the one that is judged, and the set that each view uses; (): one for all.
    bn_sets: ClassVar[tuple[str, ...]] = ()
    bn_set_of: Mapping[str, str] = NOTHING
    # Inputs of the training forward, in order, and the view of the data that each adversarial one is made from.
    views: tuple[str, ...] = ("adv",)
    made_from: Mapping[str, str] = MappingProxyType({"adv": "aug", "adv2": "aug2"})
    # Whether the forward gives embeddings too, and whether labels come with the image's index in the training set.
    embeds: bool = False
    indexed: bool = False

    def __init__(self, config: Config):
        self.config, self.settings = config, config.loss
        # What of the method is in use and why, for people, after the first step.
        self.notes: dict[str, str] = {}
        self.heads: nn.Module | None = None

    @classmethod
    def check(cls, config: Config) -> None:
        """Settings that are each allowed but do not go together. Raises UserError, before a run's folder exists."""

    @classmethod
    def describe(cls, config: Config) -> str:
        """Its name for reports, where settings make it another method."""
        return cls.title or cls.__name__

    @classmethod
    def second(cls, config: Config) -> type[Method] | None:
        """The method of stage 2, where it is another than stage2.mode says."""
        return None

    @property
    def drawn(self) -> tuple[str, ...]:
        """The views that the data is to give."""
        wanted = {self.made_from.get(view, view) for view in self.views}
        return tuple(view for view in DATA_VIEWS if view in wanted)

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Once, before the stage's first step: what the method needs to know of the training images. Raises UserError."""

    def build(self, model: nn.Module) -> nn.Module | None:
        """Further parts that are trained, on the CPU; they become `self.heads`, and are saved and resumed with the model."""
        return None

    def start_epoch(self, epoch: int, model: nn.Module) -> None:
        """Before every epoch, outside of the captured step: tensors that it holds may be changed in place only."""

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        """The adversaries by the view that they make, asked for once a stage; none for training on clean images."""
        return {}

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that the optimiser moves."""
        return [*model.parameters(), *([] if self.heads is None else self.heads.parameters())]

    def train_mode(self, model: nn.Module) -> None:
        """Put the model in the mode of its training forward."""
        model.train()
        if self.heads is not None:
            self.heads.train()

    def perturb(self, run: Runner, made: dict[str, Tensor], labels: Tensor) -> Outputs | None:
        """Add the adversarial views to `made`, which holds those of the data.

        What a method has forwarded to make them, with gradient, it may return: those views are not forwarded again.
        """
        classes = labels[:, 0] if self.indexed else labels
        for name in run.adversaries:
            made[name] = run.attack(name, made[self.made_from[name]], classes)
        return None

    def forward(self, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and embeddings or None, of one batch."""
        return model(inputs, embed=True) if self.embeds else (model(inputs), None)

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        """Named, already weighted terms, each a scalar; their sum is minimised."""
        raise NotImplementedError

    def diagnostics(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        """Named scalars to log, without gradient."""
        return {}


class Runner:
    """What a method's step works with: the network, its adversaries by name, and the training forward over views.

    generators: "augment" and "attack", on the device. forward: the method's, compiled say.
    """

    def __init__(
        self, config: Config, method: Method, model: nn.Module, adversaries: dict[str, Adversary],
        generators: dict[str, torch.Generator], device: torch.device, forward: Callable | None = None,
    ):  # fmt: skip
        self.config, self.method, self.model, self.adversaries = config, method, model, adversaries
        self.generators, self.device = generators, device
        # Whether the forwards of `perturb` leave running statistics alone, since all views will be forwarded again.
        self.repeats = False
        self._forward = forward or method.forward

    def attack(self, name: str, images: Tensor, labels: Tensor, clean: Tensor | tuple | None = None) -> Tensor:
        """Adversarial images of `images`. clean: what the objective gets besides, in place of the clean images' outputs."""
        adversary = self.adversaries[name]
        return adversary.attack(adversary.model, images, labels, generator=self.generators["attack"], clean=clean)

    def forward(self, views: dict[str, Tensor]) -> Outputs:
        """The training forward of these views: of each BatchNorm set's as one batch, or one by one (model.view_bn)."""
        groups: dict[str, list[str]] = {}
        for name in views:
            own = name if self.config.model.view_bn == "separate" else ""
            groups.setdefault(self.method.bn_set_of.get(name, "") + "/" + own, []).append(name)
        logits: dict[str, Tensor] = {}
        embeddings: dict[str, Tensor] = {}
        for key, names in groups.items():
            stacked = torch.cat([views[name] for name in names]) if len(names) > 1 else views[names[0]]
            still = untracked(self.model) if self.repeats else contextlib.nullcontext()
            with self._autocast(), still, bn_set(self.model, key.partition("/")[0]):
                found, embedded = self._forward(self.model, stacked)
            batch = len(found) // len(names)
            logits |= zip(names, found.float().split(batch), strict=True)
            if embedded is not None:
                embeddings |= zip(names, embedded.float().split(batch), strict=True)
        return Outputs(*({name: of[name] for name in views if name in of} for of in (logits, embeddings)))

    def outputs(self, views: dict[str, Tensor], early: Outputs | None) -> Outputs:
        """`forward` of those views that `early` has no outputs of, with these."""
        if early is None:
            return self.forward(views)
        rest = self.forward({name: view for name, view in views.items() if name not in early.logits})
        return Outputs(rest.logits | early.logits, rest.embeddings | early.embeddings)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


def build_attack(config: Config, objective="ce", **changed) -> PGD:
    """The training adversary of a configuration; its inputs were checked when the data was loaded.

    changed: fields of `config.attack`.
    """
    attack = dataclasses.replace(config.attack, **changed)
    return PGD(
        attack.eps, attack.step_size, attack.steps, objective, attack.bn, attack.start, attack.norm,
        start_radius=attack.start_radius, project=attack.project, precision=config.precision, backend=attack.backend,
        kernels=config.engine.kernels, check_inputs=False,
    )  # fmt: skip


def in_use(loss: HardSupConLoss) -> str:
    """Whether the kernels computed it, and why, for people."""
    backend, _, why = loss.used.partition(": ")
    return f"{'yes' if backend == 'triton' else 'no'}: {why}"


class WithEmbeddings(nn.Module):
    """The model as attacks on (logits, embeddings) see it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(images, embed=True)
