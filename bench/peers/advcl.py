"""AdvCL: `AttackPGD` and `train` of pretraining_advCL.py with its network of three BatchNorm sets, on one device.

The script itself refuses a single GPU and wants pickled pseudo-labels, apex and a logger; its classes and functions do not.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.peers.adapter import Batches, Case, Variant, Work, random_labels
from bench.peers.clones import Session

SCRIPT, NETWORK = "pretraining_advCL.py", "models/resnet_cifar_multibn_ensembleFC.py"
CLUSTERS = (2, 10, 50, 100, 500)
STEPS = 5  # the script's default of --iter
LEAST_BATCHES = 2  # it divides by the index of the last one


def _make(session: Session, case: Case) -> Work:
    args = session.defaults(SCRIPT)
    # What the script sets after parsing; its warm-up for batches over 256 changes the learning rate alone.
    args.epochs, args.cosine, args.warm = args.epoch, True, False
    with session.inside():
        model = session.definitions(NETWORK, None, {"torch": torch, "nn": nn, "F": F})["resnet18"](
            bn_names=["normal", "pgd", "pgd_ce"]
        )
        model.to(case.device)
        contrast = session.module("losses").SupConLoss(temperature=args.nce_t)
        high = session.module("fr_util").generate_high
        torch.backends.cudnn.benchmark = True
    # Its utils asks a terminal for its width when it is imported, and there may be none.
    tools = {
        "time": time,
        "sys": sys,
        "math": math,
        "term_width": 80,
        "TOTAL_BAR_LENGTH": 86.0,
        "last_time": time.time(),
        "begin_time": time.time(),
    }
    tools = session.definitions("utils.py", ("progress_bar", "format_time", "warmup_learning_rate"), tools)
    config = {
        "epsilon": args.epsilon / 255.0,
        "num_steps": case.steps,
        "step_size": 2.0 / 255,
        "random_start": True,
        "loss_func": "xent",
    }
    namespace = {
        "torch": torch,
        "nn": nn,
        "F": F,
        "args": args,
        "device": case.device,
        "model": model,
        "generate_high": high,
        "progress_bar": tools["progress_bar"],
        "warmup_learning_rate": tools["warmup_learning_rate"],
        "contrast_criterion": contrast,
        "ce_criterion": nn.CrossEntropyLoss(ignore_index=-1),
        "train_loader": _batches(case),
    }
    session.definitions(SCRIPT, ("AttackPGD", "train"), namespace)
    net = namespace["AttackPGD"](model, config)
    namespace |= {
        "net": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=args.learning_rate, momentum=0.9, weight_decay=args.weight_decay),
    }
    return Work(session.bound(lambda: namespace["train"](0)), len(namespace["train_loader"]), model)


def _batches(case: Case) -> Batches:
    """Two SimCLR views are any two images as far as time goes: the augmented image, and its mirror images."""
    made = Batches()
    for images, labels in case.prepared() * math.ceil(LEAST_BATCHES / case.batches):
        pseudo = tuple(random_labels(case, count, len(labels), seed) for seed, count in enumerate(CLUSTERS))
        made.append(((images.flip(3), images.flip(2), images), labels, pseudo, torch.arange(len(labels))))
    return made


def _files(folder: Path, images: int) -> dict[str, Any]:
    """Random pseudo-labels for ours too, in a file."""
    path = folder / "pseudo_labels.npy"
    np.save(path, np.random.default_rng(0).integers(0, CLUSTERS, (images, len(CLUSTERS))))
    return {"loss": {"clusters": list(CLUSTERS), "pseudo_labels": str(path)}}


VARIANTS = (
    Variant(
        "train",
        _make,
        {
            "method": "AdvCL, pre-training",
            "attack": "PGD-5, linf, 8/255, step 2/255, on the contrastive loss and five cross-entropies",
            "bn": "train, three sets",
            "precision": "fp32",
            "label_smoothing": 0.0,
            "weight_average": None,
            "model": "ResNet-18, width 64, three BatchNorm sets, projection and five classifiers",
            "views": 5,
        },
        (
            "pseudo-labels are drawn at random, for ours too",
            "on one device, without DataParallel and apex's SyncBatchNorm",
            "three clean views are forwarded anew in every step of the attack; ours once, which serves the loss too",
            "the two adversaries' losses are one sum, each with its projection and a prediction that no loss uses",
            "the frequency mask is made pixel by pixel in every batch",
            "the loss is read back in every batch",
            "prepared batches: not augmented in its time, where ours makes two SimCLR views and a cropped one",
        ),
        counterpart="advcl",
        files=_files,
        forwards={"train": (5, 5)},
        steps=STEPS,
        cudnn_benchmark=True,
    ),
)
