"""TRADES: `train` of train_trades_cifar10.py with `trades_loss`, its ResNet-18, and the script's own defaults."""

from __future__ import annotations

import torch

from bench.peers.adapter import Case, Variant, Work
from bench.peers.clones import Session

SCRIPT = "train_trades_cifar10.py"


def _make(session: Session, case: Case) -> Work:
    args = session.defaults(SCRIPT)
    args.num_steps = case.steps
    loss, models = session.module("trades").trades_loss, session.module("models.resnet")
    with session.inside():
        model = models.ResNet18().to(case.device)
    train = session.definitions(SCRIPT, ("train",), {"trades_loss": loss})["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    batches = case.prepared()
    return Work(session.bound(lambda: train(args, model, case.device, batches, optimizer, 1)), len(batches), model)


VARIANTS = (
    Variant(
        "train",
        _make,
        {
            "method": "TRADES",
            "attack": "PGD, linf, 0.031, step 0.007, on the KL divergence from the clean prediction",
            "bn": "eval",
            "precision": "fp32",
            "label_smoothing": 0.0,
            "weight_average": None,
            "beta": 6.0,
            "model": "ResNet-18, width 64, not normalised",
        },
        (
            "the clean images are forwarded in every step of the attack, and twice for the loss; ours once each",
            "the loss is read back once a call",
            "prepared batches: not augmented in its time",
        ),
        counterpart="trades",
        settings={"attack": {"eps": 0.031, "step_size": 0.007}, "optim": {"weight_decay": 2e-4}},
        forwards={"eval": (2, 0), "train": (0, 3)},
    ),
)
