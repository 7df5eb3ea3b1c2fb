"""NuAT (Sriramanan et al., NeurIPS 2021): single-step training against a batch's whole matrix of moved logits.

    x1 = aug(x);  x2 = x1 + clip(b + alpha * sign grad [CE(f(x1 + b), y) + lambda ||f(x1 + b) - f(x1)||_* / B]),  b = +-radius
    L = ce * CE(f(x1), y) + lambda ||f(x2) - f(x1)||_* / B

f: logits (B, K); ||.||_*: nuclear norm. lambda rises from 0, epoch by epoch. As in the public code (val-iisc/NuAT), the adversary
sees the norm every other time only: in every second batch of NuAT, in the first of NuAT2's two steps (attack.steps 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.attacks.engine import first
from fastanchor.attacks.objectives import with_clean
from fastanchor.config import NOT_NEGATIVE, Allowed, Config, Number
from fastanchor.errors import UserError
from fastanchor.losses.nuclear import nuclear_norm
from fastanchor.methods.base import Adversary, Method, Outputs, Runner, build_attack
from fastanchor.reference.attacks import project


@dataclass(frozen=True)
class NuATSettings:
    """`loss.*` of NuAT."""

    RANGES: ClassVar[dict[str, Allowed]] = {
        "ce_clean": NOT_NEGATIVE, "nuclear": NOT_NEGATIVE, "ramp": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    }  # fmt: skip
    ce_clean: Number = 1.0
    """Weight of the cross-entropy on the augmented (not attacked) images."""
    nuclear: Number = 4.5
    """Weight (lambda) of the nuclear norm at the end of its ramp, in the loss and in the adversary's objective."""
    ramp: Number = 0.9
    """Share of the epochs over which that weight rises, from 0 in the first epoch; 0 is full weight from the start."""
    alternate: bool = True
    """The adversary sees the norm every other time only: in every second batch, or with attack.steps 2 in the first step."""
    clean_mode: Literal["attack", "train"] = "attack"
    """Where the adversary's logits of the clean images are from. attack: a forward in the attack's BatchNorm mode | train: the
    training forward, for which model.view_bn must be separate; they then cost nothing."""


class NuAT(Method):
    """NuAT, and NuAT2 with two attack steps."""

    title = "NuAT"
    Settings = NuATSettings
    objectives = ("ce+nuclear", "ce")
    views = ("aug", "adv")

    @classmethod
    def check(cls, config: Config) -> None:
        """Alternation needs one or two steps, logits of the training forward a forward a view. Raises UserError."""
        joint = config.attack.objective == "ce+nuclear"
        if joint and config.loss.alternate and config.attack.steps > 2:
            raise UserError(f"attack.steps = {config.attack.steps}: with loss.alternate at most 2; write loss.alternate false")
        if config.loss.clean_mode == "train" and config.model.view_bn != "separate":
            raise UserError(f"loss.clean_mode = train: needs model.view_bn = separate, which is {config.model.view_bn}")

    def build(self, model: nn.Module) -> nn.Module | None:
        joint = self.config.attack.objective == "ce+nuclear"
        return _Turn() if joint and self.settings.alternate and self.config.attack.steps == 1 else None

    def start_epoch(self, epoch: int, model: nn.Module) -> None:
        if self.heads is not None:
            self.heads.now.zero_()

    def weight(self, progress: Tensor) -> float | Tensor:
        """lambda after `progress` epochs: it stays the same within an epoch."""
        rise = self.settings.ramp * self.config.epochs
        return self.settings.nuclear * (progress.floor() / rise).clamp(max=1) if rise > 0 else self.settings.nuclear

    def adversaries(self, model: nn.Module, progress: Tensor) -> dict[str, Adversary]:
        attack = self.config.attack
        if attack.objective == "ce":
            return {"adv": Adversary(build_attack(self.config), model)}
        joint, given = self._objective(progress), self.settings.clean_mode == "train"
        if not self.settings.alternate or attack.steps == 1:
            return {"adv": Adversary(build_attack(self.config, joint), model, given=given)}
        # The second step starts where the first ended, and `perturb` brings it back to the ball around the clean images.
        second = build_attack(self.config, "ce", steps=1, start="zero", start_radius=None, project=False)
        return {
            "adv": Adversary(build_attack(self.config, joint, steps=1), model, given=given),
            "second": Adversary(second, model),
        }

    def _objective(self, progress: Tensor) -> Callable:
        @with_clean
        def objective(outputs, labels: Tensor, clean) -> Tensor:
            # The loss times the batch: the sign of its gradient is the same, and no pixel's gradient shrinks with the batch.
            weight = self.weight(progress) * (1 if self.heads is None else self.heads.now)
            moved = nuclear_norm(first(outputs) - first(clean))
            return F.cross_entropy(first(outputs), labels, reduction="sum") + weight * moved

        return objective

    def perturb(self, run: Runner, made: dict[str, Tensor], labels: Tensor) -> Outputs | None:
        early = run.forward({"aug": made["aug"]}) if self.settings.clean_mode == "train" else None
        made["adv"] = run.attack("adv", made["aug"], labels, None if early is None else early.logits["aug"])
        if "second" in run.adversaries:
            attack = run.adversaries["adv"].attack
            made["adv"] = project(run.attack("second", made["adv"], labels), made["aug"], attack.ball, attack.norm)
        if self.heads is not None:
            self.heads.now.copy_(1 - self.heads.now)
        return early

    def loss(self, out: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        clean, adversarial = out.logits["aug"], out.logits["adv"]
        return {
            "ce": self.settings.ce_clean * F.cross_entropy(clean, labels),
            "nuclear": self.weight(progress) * nuclear_norm(adversarial - clean) / len(labels),
        }


class _Turn(nn.Module):
    """Whether the adversary sees the norm in this batch: 0 in an epoch's first, then 1, 0, ... A captured step moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("now", torch.zeros(()))
