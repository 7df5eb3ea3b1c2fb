"""Attacks that a package index has: `torchattacks`' PGD, and the first stage of AutoAttack by pyautoattack, the original's code.

None of them is needed: what is not installed is a row that says so. Of AutoAttack the question is what our evaluation adds
around that code: it hashes the model and the images, judges the clean images and keeps the verdicts of every batch.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from bench import cases
from fastanchor.data.resident import ResidentSplit
from fastanchor.evaluate import autoattack as evaluation
from fastanchor.evaluate.protocol import AttackSpec
from fastanchor.precision import full_precision

# (images fp32 in [0, 1], labels) -> x_adv
Attack = Callable[[Tensor, Tensor], Tensor]


class AttackPeer(NamedTuple):
    """needs: the module to be installed. computes: what. make: (model in eval mode, steps) -> attack."""

    needs: str
    computes: dict[str, str]
    make: Callable[[nn.Module, int], Attack]


def _torchattacks(model: nn.Module, steps: int) -> Attack:
    import torchattacks

    return torchattacks.PGD(model, cases.EPS, cases.STEP_SIZE, steps, random_start=True)


def _pyautoattack(model: nn.Module, steps: int) -> Attack:
    attacker = _attacker(steps)(
        model, device=next(model.parameters()).device, eps=cases.EPS, norm="Linf", seed=0, version="standard"
    )
    attacker.attacks_to_run = ["apgd-ce"]

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        # In the precision of our evaluation: fp32 with TF32 off.
        with full_precision():
            return attacker.run_standard_evaluation(images, labels, batch_size=len(labels))[0]

    return attack


def _attacker(steps: int) -> Callable:
    """What makes AutoAttack, its APGD with this many iterations (standard: 100)."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.WARNING)

    def make(*args, **kwargs):
        attacker = AutoAttack(*args, **kwargs)
        attacker.apgd.n_iter = steps
        return attacker

    return make


PGD_COMPUTES = {
    "method": "PGD, linf, 8/255, step 2/255, on the cross-entropy",
    "bn": "eval",
    "precision": "fp32",
    "start": "uniform",
}
PEERS = {
    "torchattacks": AttackPeer("torchattacks", PGD_COMPUTES, _torchattacks),
    "pyautoattack": AttackPeer(
        "pyautoattack",
        {"method": "APGD on the cross-entropy, linf, 8/255, one restart", "bn": "eval", "precision": "fp32, TF32 off"},
        _pyautoattack,
    ),
}


def missing(needs: str) -> str | None:
    """Why what needs this module cannot be run here; None where it can."""
    return None if importlib.util.find_spec(needs) else f"{needs} is not installed"


def our_evaluation(model: nn.Module, data: ResidentSplit, steps: int) -> Callable[[], tuple]:
    """fastanchor's evaluation by AutoAttack, stopped after the same stage with as many iterations."""
    attack = AttackSpec("autoattack", cases.EPS, cases.STEP_SIZE, steps)
    make = _attacker(steps)

    def call() -> tuple:
        with (
            mock.patch.object(evaluation, "STAGES", ("apgd-ce",)),
            mock.patch.object(evaluation, "require_autoattack", lambda classes: make),
        ):
            return evaluation.autoattack(model, data, attack, num_classes=cases.CLASSES, batch_size=len(data))

    return call


def judged_right(model: nn.Module, images: Tensor) -> Tensor:
    """The labels that the model itself gives, int64 (N,): AutoAttack leaves out what is wrong from the start."""
    with torch.no_grad():
        return model(images).argmax(1)
