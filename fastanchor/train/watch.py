"""Catastrophic overfitting: single-step training that from one epoch to the next loses all robustness, and does not notice.

The network then classifies its own adversary's images better than ever, and those of PGD not at all (Wong et al. 2020).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastanchor.config import Config
from fastanchor.data.encoded import Encoded
from fastanchor.data.judged import judged_split
from fastanchor.data.sources import Split
from fastanchor.evaluate.accuracy import measure
from fastanchor.evaluate.protocol import parse_attack


class Watch:
    """`watch` of the configuration: some fixed training images, as evaluation sees them, attacked after every epoch.

    It says that training has collapsed where their robust accuracy is more than `watch.drop` points below its best so far, and
    the accuracy on the training adversary (accuracy_adv of the epoch's metrics) has since that best epoch not fallen by half as
    much: where both fall, the network is only worse. Where a method has no accuracy_adv, nothing is said.
    """

    def __init__(self, config: Config, train: Split | Encoded, num_classes: int, device: torch.device, seed: int):
        """train: the training images; seed: of the attack's start noise, the same every time. Raises UserError."""
        self.config, self.num_classes, self.seed = config.watch, num_classes, seed
        self.images = judged_split(train.subset(config.watch.images), device)
        self.attack = parse_attack(config.watch.attack, default_eps=config.attack.eps)
        self.perturb, self.batch_size = self.attack.build(), config.eval.batch_size
        self.best = {"robust": -1.0, "adversary": 0.0, "epoch": 0}
        self.collapsed = False

    def __call__(self, model: nn.Module, row: dict[str, Any]) -> tuple[dict[str, float], str | None, bool]:
        """After an epoch with these metrics: entries for its row, a warning where training has just collapsed, and whether to
        stop. A host read. The model's flags and random number generators stay as they were.
        """
        options = {"batch_size": self.batch_size, "num_classes": self.num_classes, "seed": self.seed}
        robust = measure(model, self.images, self.attack, built=self.perturb, **options).accuracy
        return {"train_robust": robust}, *self.judge(robust, row)

    def judge(self, robust: float, row: dict[str, Any]) -> tuple[str | None, bool]:
        """The warning, if any, and whether to stop, for a robust accuracy in percent."""
        best = self.best
        if robust > best["robust"]:
            self.best = {"robust": robust, "adversary": row.get("accuracy_adv"), "epoch": row["epoch"]}
        known = "accuracy_adv" in row and best["adversary"] is not None
        adversary, was = (100 * row["accuracy_adv"], 100 * best["adversary"]) if known else (0.0, 0.0)
        fall = best["robust"] - robust
        unnoticed = known and was - adversary < fall / 2
        before, self.collapsed = self.collapsed, fall > self.config.drop and (self.collapsed or unnoticed)
        if before or not self.collapsed:
            return None, False
        advice = (
            "stopping" if self.config.stop else "more attack.steps, a smaller step_size or a larger start_radius may prevent it"
        )
        return (
            f"warning: catastrophic overfitting in epoch {row['epoch']}: robust accuracy on {len(self.images)} training images, "
            f"{self.attack.describe()}, is {robust:.1f} %, after {best['robust']:.1f} % in epoch {best['epoch']}, while accuracy "
            f"on the training adversary went from {was:.1f} to {adversary:.1f} %; {advice}"
        ), self.config.stop

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know: plain numbers."""
        return {"best": dict(self.best), "collapsed": self.collapsed}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`."""
        self.best, self.collapsed = dict(state["best"]), state["collapsed"]
