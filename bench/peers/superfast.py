"""Super-Fast-Adversarial-Training: `train` of fast_pretrain_adv.py with its PGD; channels-last, fp16 autocast, GradScaler.

It was written for torchattacks before 3.3, whose attacks knew `_targeted`: the present name is `targeted`. The attack is given
the old one too, False as then; nothing else of it is touched. The script's loader (ffcv) and its processes are not needed.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from bench import cases
from bench.peers.adapter import Case, Variant, Work
from bench.peers.clones import Session

SCRIPT = "fast_pretrain_adv.py"


def _own(session: Session, case: Case) -> nn.Module:
    networks = session.module("utils.fast_network_utils")
    with session.inside():
        return networks.get_network(network="resnet", depth=18, dataset="cifar10").to(case.device)


def _ours(session: Session, case: Case) -> nn.Module:
    return cases.make_model(case.width, case.device)


def _make(session: Session, case: Case, *, network) -> Work:
    args = session.defaults(SCRIPT)
    net = network(session, case).to(memory_format=torch.channels_last)
    loader = session.module("attack.fastattack").attack_loader
    with session.inside():
        from torch.cuda.amp import GradScaler, autocast
        from tqdm import tqdm

        attack = loader(net=net, attack="pgd", eps=args.eps, steps=case.steps)
        attack._targeted = False
        scaler = GradScaler()
        torch.backends.cudnn.benchmark = True
    batches = case.prepared(channels_last=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.learning_rate, momentum=0.9, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CyclicLR(
        optimizer,
        base_lr=0,
        max_lr=args.learning_rate,
        step_size_up=5 * len(batches),
        step_size_down=(args.epoch - 5) * len(batches),
    )
    # The script uses F without importing it.
    train = session.definitions(SCRIPT, ("train",), {"tqdm": tqdm, "autocast": autocast, "F": F})["train"]
    return Work(session.bound(lambda: train(net, batches, optimizer, scheduler, scaler, attack)), len(batches), net)


COMPUTES = {
    "method": "PGD-AT",
    "attack": "PGD, linf, 0.03, step 2.3 * 0.03 / steps, on the cross-entropy",
    "bn": "eval",
    "precision": "fp16 (fp32 on a CPU, where its autocast switches itself off)",
    "label_smoothing": 0.0,
    "weight_average": None,
}
DIFFERS = (
    "_targeted = False is set on its attack, which torchattacks now calls otherwise",
    "loss and accuracy are read back in every batch",
    "on one device, without DistributedDataParallel and SyncBatchNorm",
    "its ffcv loader is left out: prepared batches, not augmented in its time",
    "its autocast is fp16 with a GradScaler, ours bf16 without",
)
COMMON = {"forwards": {"eval": (1, 0), "train": (0, 1)}, "needs": ("torchattacks", "tqdm"), "cudnn_benchmark": True}
VARIANTS = (
    Variant(
        "train, on our ResNet-18",
        functools.partial(_make, network=_ours),
        {**COMPUTES, "model": "ours: ResNet-18, normalised"},
        (*DIFFERS, "the network is ours: its ResNet-18 has the stem of ImageNet", "its steps are 2.3 * 0.03 / steps, ours 2/255"),
        counterpart="pgd_at",
        settings={"attack": {"eps": 0.03}, "optim": {"weight_decay": 2e-4}},
        width=None,
        **COMMON,
    ),
    Variant(
        "train, its ResNet-18",
        functools.partial(_make, network=_own),
        {**COMPUTES, "model": "its ResNet-18: 7 x 7 stem of stride 2 and max-pooling, so a twentieth of the work at 32 pixels"},
        DIFFERS,
        reason="the engine's ResNet-18 has the CIFAR stem alone, which is twenty times the work",
        **COMMON,
    ),
)
