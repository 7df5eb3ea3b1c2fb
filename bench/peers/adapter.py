"""What an adapter says and makes: a variant states what its repository computes, and makes the work that is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import cases
from bench.peers.clones import Session
from fastanchor.data import views
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split

CLASSES = 10


class Batches(list):
    """Prepared batches where a loader is expected: a list, with the loader's `dataset`, of which public code takes the length."""

    @property
    def dataset(self) -> range:
        """As long as the images of all batches."""
        return range(sum(len(batch[-1]) for batch in self))


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison. batches: how many of them one call of the peer trains on. width: channels of the first stage."""

    device: torch.device
    batch: int
    steps: int
    batches: int
    width: int = 64
    pixels: int = 32

    @functools.cached_property
    def data(self) -> ResidentSplit:
        """Random images, uint8 (batch * batches, pixels, pixels, 3), and labels, on the device."""
        images, labels = cases.make_batch(self.batch * self.batches, self.pixels, torch.device("cpu"))
        return ResidentSplit(Split(images, labels), self.device)

    def prepared(self, channels_last: bool = False) -> Batches:
        """The data as a loader would give it after augmentation: fp32 (batch, 3, pixels, pixels) in [0, 1] and labels.

        They lie on the device already and nothing augments them in the peer's time, both in the peer's favour.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        pieces = zip(self.data.images.split(self.batch), self.data.labels.split(self.batch), strict=True)
        return Batches((views.to_float(images).contiguous(memory_format=layout), labels) for images, labels in pieces)


class Work(NamedTuple):
    """call: trains on `batches` batches. clock: seconds that the peer's own clock has counted so far (None: ours is used).

    model: the network that is trained, or attacked; None where there is none. images: in a batch (None: as the run has it).
    flops: that the algorithm needs for one image, where the work knows them.
    """

    call: Callable[[], object]
    batches: int = 1
    model: nn.Module | None = None
    clock: Callable[[], float] | None = None
    images: int | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Variant:
    """One thing that a repository does. what: "step" | "attack" | "loader" | "run".

    computes: the method in data. forwards: of its network in a step, by mode, as (for each step of the attack, besides them).
    differs: how it is other than our step. counterpart: of fastanchor.methods.METHODS, by its packaged recipe with `settings`, in
    groups, where the repository has others, and with what `files` (a folder to write into, how many images there are) returns;
    None where the engine cannot do the same, and then `reason` says why. steps, width: what the code has fixed. needs: modules.
    cudnn_benchmark: its script switches that on.
    """

    name: str
    make: Callable[[Session, Case], Work]
    computes: dict[str, Any]
    differs: tuple[str, ...] = ()
    what: str = "step"
    counterpart: str | None = None
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    files: Callable[[Path, int], dict[str, Any]] = lambda folder, images: {}
    forwards: dict[str, tuple[int, int]] = field(default_factory=dict)
    steps: int | None = None
    width: int | None = 64
    needs: tuple[str, ...] = ()
    needs_cuda: bool = False
    cudnn_benchmark: bool = False


def random_labels(case: Case, classes: int, count: int, seed: int = 1) -> Tensor:
    """int64 (count,) on the device."""
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed)).to(case.device)
