"""ASCL: `adv_train` of mytrain.py, with its contrastive step and its PGD-AT baseline; the attack of train_cifar10.py alone."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench import cases
from bench.peers.adapter import Case, Variant, Work
from bench.peers.clones import Session

# What run_cifar10.py and run_baseline.py hand to the script, beyond its defaults.
RECIPES = {
    "ascl_pgd": {
        "lccomw": 0.0,
        "lcsmtw": 2.0,
        "gbcomw": 1.0,
        "gbsmtw": 0.0,
        "confw": 0.0,
        "alpha": 0.0,
        "tau": 0.2,
        "feat_dim": 128,
    },
    "pgd_train": {"alpha": 0.0, "feat_dim": -1},
}
EPS, STEP_SIZE = 0.031, 0.007  # as 02a_adversarial_training.py sets them for CIFAR-10


def _model(session: Session, case: Case, feat_dim: int, normalised: bool) -> nn.Module:
    models = session.module("models")
    with session.inside():
        norm = models.Normalize(*session.literals("mysetting.py", "CIFAR10_MEAN", "CIFAR10_STD")) if normalised else None
        core, projection = models.get_model("cifar10", "resnet18"), models.get_projection("resnet18", feat_dim)
        return models.Wrapper(CoreModel=core, NormLayer=norm, ProjLayer=projection).to(case.device)


def _make(session: Session, case: Case, *, defense: str) -> Work:
    options = {**vars(session.defaults("mysetting.py")), **RECIPES[defense]}
    model = _model(session, case, options["feat_dim"], normalised=True)
    train, models = session.module("mytrain").adv_train, session.module("models")
    with session.inside():
        optimizer, _ = models.get_optimizer(ds="cifar10", model=model, architecture="resnet18")
    given: dict[str, Any] = {
        **options,
        "defense": defense,
        "epsilon": EPS,
        "step_size": STEP_SIZE,
        "num_steps": case.steps,
        "x_min": 0.0,
        "x_max": 1.0,
        "order": np.inf,
    }
    writer = SimpleNamespace(add_scalar=lambda *_: None)
    batches = case.prepared()
    call = session.bound(lambda: train(model, batches, 0, optimizer, case.device, 10, given, writer))
    return Work(call, len(batches), model)


def _make_attack(session: Session, case: Case) -> Work:
    model = _model(session, case, 128, normalised=False).train()
    (images, labels), *_ = case.prepared()
    mean, std = (
        torch.tensor(values, device=case.device).view(3, 1, 1)
        for values in session.literals("mysetting.py", "CIFAR10_MEAN", "CIFAR10_STD")
    )
    namespace = {"torch": torch, "nn": nn, "F": F, "mu": mean, "std": std, "upper_limit": 1, "lower_limit": 0}
    attack = session.definitions("train_cifar10.py", ("attack_pgd", "clamp", "normalize"), namespace)["attack_pgd"]
    call = session.bound(lambda: attack(model, images, labels, cases.EPS, cases.STEP_SIZE, case.steps, 1, "l_inf"))
    return Work(call, 1, model)


WASTE = (
    "loss.backward() in the attack makes the gradients of all weights",
    "each step of the attack moves the running statistics",
    "one more forward after the attack picks the best of one restart",
)
LOGGING = "two more forwards with their graphs, and accuracies read back, in every batch for the log"
PREPARED = "prepared batches: not augmented in its time"
COMMON = {"bn": "train", "precision": "fp32", "label_smoothing": 0.0, "weight_average": None}
VARIANTS = (
    Variant(
        "ascl_pgd",
        functools.partial(_make, defense="ascl_pgd"),
        {
            **COMMON,
            "method": "ASCL, leaking",
            "attack": "PGD, linf, 0.031, step 0.007, on the cross-entropy",
            "model": "ResNet-18, width 64, normalised, linear projection to 128",
        },
        (*WASTE, LOGGING, PREPARED, "the contrastive loss is fp64, ours fp32", "terms of weight 0 are computed"),
        counterpart="ascl",
        forwards={"train": (1, 5)},
        needs=("torchvision",),
    ),
    Variant(
        "pgd_train",
        functools.partial(_make, defense="pgd_train"),
        {
            **COMMON,
            "method": "PGD-AT",
            "attack": "PGD, linf, 0.031, step 0.007, on the cross-entropy",
            "model": "ResNet-18, width 64, normalised",
        },
        (*WASTE, LOGGING, PREPARED, "a clean forward whose loss has weight 0"),
        counterpart="pgd_at",
        settings={"attack": {"eps": EPS, "step_size": STEP_SIZE, "bn": "train"}},
        forwards={"train": (1, 5)},
        needs=("torchvision",),
    ),
    Variant(
        "attack_pgd of train_cifar10.py",
        _make_attack,
        {
            **COMMON,
            "method": "PGD attack",
            "attack": "PGD, linf, 8/255, step 2/255, on the cross-entropy",
            "model": "ResNet-18, width 64, normalised",
        },
        WASTE,
        what="attack",
        counterpart="pgd_at",
        settings={"attack": {"bn": "train"}},
        forwards={"train": (1, 1)},
        needs=("torchvision",),
    ),
)
