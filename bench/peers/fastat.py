"""FastAT_Benchmark: its PGD-AT trainer with its configuration, model, optimiser and schedule; by the trainer's own clock.

The clock is `total_training_time`, which the trainer adds up around its training batches alone. One validation batch of two
images is given, since it must validate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.peers.adapter import Batches, Case, Variant, Work
from bench.peers.clones import Session

TAU, SMOOTHING = 0.9995, 0.4
# More batches a call with its loader: its workers start anew each epoch, and what that takes should not count for much.
LOADER_BATCHES = {"cuda": 48, "cpu": 4}


class Pictures(torch.utils.data.Dataset):
    """uint8 images (N, H, W, 3) as the PIL images that torchvision's CIFAR-10 gives, through a transform."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Callable):
        self.images, self.labels, self.transform = images.numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def _make(session: Session, case: Case, *, config: str = "pgd_at", loader: bool = False, rung: bool = False) -> Work:
    if loader:
        case = dataclasses.replace(case, batches=LOADER_BATCHES[case.device.type])
    main, trainers = session.module("main"), session.module("fast_at")
    with session.inside():
        files = [str(session.folder / "configs" / "cifar10" / f"{name}.yaml") for name in ("common", config)]
        settings = main.load_config(*files)
        model = main.get_model(settings, settings["class_num"], case.device)
        if rung:
            model = model.to(memory_format=torch.channels_last)
        kept = {**settings, "total_epoch": 1, "log_dir": str(session.workdir / "log")}
        trainer = trainers.PGD_AT(model, config=kept, name=config, device=case.device)
        if rung:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
        batches = case.prepared(channels_last=rung)
        given: Iterable = _loader(session, case, settings["num_workers"]) if loader else batches

    def call() -> None:
        # A schedule of the published length, of which each call is one epoch: anew each time, as it can be stepped past its end.
        optimizer, scheduler = main.get_optimizer_and_scheduler(model, settings, given)
        validation = Batches([tuple(part[:2] for part in batches[0])])
        with torch.autocast(case.device.type, torch.bfloat16, enabled=rung):
            trainer.train(optimizer, scheduler, given, validation)

    return Work(session.bound(call), case.batches, model, lambda: trainer.total_training_time)


def _loader(session: Session, case: Case, workers: int) -> torch.utils.data.DataLoader:
    transform = session.module("utils.dataset").train_transform
    pictures = Pictures(case.data.images.cpu(), case.data.labels.cpu(), transform)
    # As on the Linux machines that the code was run on, whatever start method this Python prefers.
    context = "fork" if workers else None
    return torch.utils.data.DataLoader(pictures, case.batch, shuffle=True, num_workers=workers, multiprocessing_context=context)


COMPUTES = {
    "method": "PGD-AT",
    "attack": "PGD-10 of torchattacks, linf, 8/255, step 2/255, on the cross-entropy",
    "bn": "eval",
    "precision": "fp32",
    "label_smoothing": SMOOTHING,
    "weight_average": None,
    "model": "ResNet-18, width 64, not normalised",
}
DIFFERS = (
    "loss and accuracy are read back in every batch",
    "cudnn.deterministic is on, cudnn.benchmark off, as its set_seed leaves them",
    "prepared batches: not augmented in its time",
)
SMOOTHED = {"loss": {"label_smoothing": SMOOTHING}}
COMMON = {
    "counterpart": "pgd_at",
    "forwards": {"eval": (1, 0), "train": (0, 1)},
    "steps": 10,
    "needs": ("torchattacks", "torchvision", "yaml", "PIL"),
}
VARIANTS = (
    Variant("pgd_at", _make, COMPUTES, DIFFERS, settings=SMOOTHED, **COMMON),
    Variant(
        "pgd_at_wa",
        functools.partial(_make, config="pgd_at_wa"),
        {**COMPUTES, "weight_average": TAU},
        (*DIFFERS, "the weight average is made key by key, in Python"),
        settings={**SMOOTHED, "optim": {"ema_decay": TAU}},
        **COMMON,
    ),
    Variant(
        "pgd_at, bf16 autocast, channels-last, cudnn.benchmark",
        functools.partial(_make, rung=True),
        {**COMPUTES, "precision": "bf16"},
        (
            DIFFERS[0],
            "its code within torch.autocast, model and batches in channels-last, cudnn.benchmark on; otherwise as it is",
            DIFFERS[2],
        ),
        settings=SMOOTHED,
        cudnn_benchmark=True,
        **COMMON,
    ),
    Variant(
        "pgd_at, with its loader",
        functools.partial(_make, loader=True),
        COMPUTES,
        (*DIFFERS[:2], "its transform on PIL images in the DataLoader of its main.py, whose workers start anew each epoch"),
        settings=SMOOTHED,
        **COMMON,
    ),
)
