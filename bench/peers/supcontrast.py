"""SupContrast: `train` of main_supcon.py, two views, with its SupConResNet and SupConLoss. There is no adversary in it."""

from __future__ import annotations

import sys
import time

import torch

from bench.peers.adapter import Batches, Case, Variant, Work
from bench.peers.clones import Session

SCRIPT = "main_supcon.py"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # as its set_loader normalises CIFAR-10


def _make(session: Session, case: Case) -> Work:
    opt = session.defaults(SCRIPT)
    networks, losses, util = (session.module(name) for name in ("networks.resnet_big", "losses", "util"))
    with session.inside():
        model = networks.SupConResNet(name="resnet18").to(case.device)
        criterion = losses.SupConLoss(temperature=opt.temp)
        optimizer = util.set_optimizer(opt, model)
        torch.backends.cudnn.benchmark = case.device.type == "cuda"
    namespace = {
        "torch": torch,
        "time": time,
        "sys": sys,
        "AverageMeter": util.AverageMeter,
        "warmup_learning_rate": util.warmup_learning_rate,
    }
    train = session.definitions(SCRIPT, ("train",), namespace)["train"]
    mean, std = (torch.tensor(values, device=case.device).view(3, 1, 1) for values in (MEAN, STD))
    batches = Batches(([(x - mean) / std, ((x - mean) / std).flip(3)], labels) for x, labels in case.prepared())
    return Work(session.bound(lambda: train(batches, model, criterion, optimizer, 1, opt)), len(batches), model)


VARIANTS = (
    Variant(
        "train",
        _make,
        {
            "method": "SupCon, two views, no adversary",
            "attack": None,
            "bn": "train",
            "precision": "fp32",
            "label_smoothing": 0.0,
            "weight_average": None,
            "model": "ResNet-18, width 64, projection to 128",
            "views": 2,
        },
        (
            "its default network is a ResNet-50",
            "the loss is read back in every batch",
            "prepared batches: not augmented in its time, where ours makes two SimCLR views",
        ),
        counterpart="supcon",
        # Its own default temperature, at which its loss has the factor 1.
        settings={"loss": {"temperature": 0.07, "scale": 1.0}, "optim": {"lr": 0.05}},
        forwards={"train": (0, 1)},
        cudnn_benchmark=True,
    ),
)
