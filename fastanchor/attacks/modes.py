"""BatchNorm's mode while attacking, stated and undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BN_MODES = ("eval", "train", "train_frozen")


@contextlib.contextmanager
def attack_mode(model: nn.Module, bn: str) -> Iterator[None]:
    """Put the model in the mode of the attack and back again, also after an exception.

    * "eval": `model.eval()`: running statistics are used and stay (TRADES, MadryLab, torchattacks).
    * "train": `model.train()`: batch statistics are used and every forward moves the running ones, as in the code bases that
      attack in train mode (fast_adversarial, robust_overfitting). The one mode that changes buffers: that is its definition.
    * "train_frozen": batch statistics are used, the running ones stay.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train(bn != "eval")
        with untracked(model) if bn == "train_frozen" else contextlib.nullcontext():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Running statistics stay as they are inside of it, whatever is forwarded; in training mode those of the batch are used."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
