"""cifar10-airbench: its loader, which keeps the images on the GPU as ours does, and a whole run of airbench94. CUDA only.

`map_location="cuda"` stands in its loader. Both read CIFAR-10 from a file that the loader would have made; here it holds as many
random images, in the temporary folder.
"""

from __future__ import annotations

import math

import torch

from bench import cases
from bench.gpu_common import CIFAR_IMAGES
from bench.peers.adapter import Case, Variant, Work
from bench.peers.clones import Session

TEST_IMAGES = 10_000


def _write(session: Session) -> None:
    folder = session.workdir / "cifar10"
    folder.mkdir(exist_ok=True)
    for file, count in (("train.pt", CIFAR_IMAGES), ("test.pt", TEST_IMAGES)):
        images, labels = cases.make_batch(count, 32, torch.device("cpu"))
        torch.save({"images": images, "labels": labels, "classes": [str(label) for label in range(cases.CLASSES)]}, folder / file)


def _make_loader(session: Session, case: Case) -> Work:
    _write(session)
    made = session.module("airbench.utils").CifarLoader
    with session.inside():
        loader = made("cifar10", train=True, batch_size=case.batch, aug={"flip": True, "translate": 4}, altflip=False)

    def call() -> None:
        for _ in loader:
            pass

    return Work(session.bound(call), len(loader))


def _make_run(session: Session, case: Case) -> Work:
    _write(session)
    airbench, hyp = session.module("airbench"), session.module("airbench.lib_airbench94").hyp
    with session.inside():
        loader = airbench.CifarLoader("cifar10", train=True, batch_size=hyp["opt"]["batch_size"], aug=hyp["aug"], altflip=True)
    batches = math.ceil(len(loader) * hyp["opt"]["train_epochs"])
    return Work(session.bound(lambda: airbench.train94(loader, verbose=False)), batches, images=hyp["opt"]["batch_size"])


VARIANTS = (
    Variant(
        "CifarLoader",
        _make_loader,
        {"method": "crop, flip and normalise a resident set, a whole epoch at once", "precision": "fp16"},
        (
            "fp16 and normalised, ours fp32 in [0, 1]",
            "padded by reflection, ours with zeros",
            "its translate is 4 here, as in our recipe",
        ),
        what="loader",
        counterpart="pgd_at",
        needs=("torchvision",),
        needs_cuda=True,
    ),
    Variant(
        "airbench94, a whole run",
        _make_run,
        {
            "method": "standard training, 9.9 epochs of 1024",
            "attack": None,
            "bn": "train",
            "precision": "fp16",
            "label_smoothing": 0.2,
            "weight_average": "lookahead",
            "model": "airbench94's own",
        },
        ("ms is the whole run over its steps, reading the test set and initialisation included",),
        what="run",
        reason="the engine has no network like it (a whitening layer, GELU, no shortcuts)",
        needs=("torchvision",),
        needs_cuda=True,
        cudnn_benchmark=True,
    ),
)
