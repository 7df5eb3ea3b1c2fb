"""Feeds that make batches on the way, from files, shards or large arrays: what DALI's and the torch loader's share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastanchor.data import geometry
from fastanchor.data.encoded import Encoded
from fastanchor.data.geometry import Job
from fastanchor.data.sources import Split
from fastanchor.data.views import AUGMENTATIONS, Colours, Prepared

# Views of one image that a feed can make.
MOST_VIEWS = 3


@dataclass(frozen=True)
class FeedSpec:
    """What a feed is to give.

    names: the views of a batch: "clean" (the image as evaluation sees it), "weak" (drawn as `weak`), or any other name for one
    drawn as `augment`; one to three of them. augment, weak: of AUGMENTATIONS. indexed: labels are (B, 2), the class and the
    index of the image. pad: of the crop, in pixels. workers: processes or threads that decode
    (None: one a core, at most 16). decoder: of DALI, "auto", "cpu" or "mixed". rank, world: this process's share of every batch.
    """

    names: tuple[str, ...]
    augment: str
    device: torch.device
    pad: int = 4
    workers: int | None = None
    decoder: str = "auto"
    rank: int = 0
    world: int = 1
    weak: str = "crop_flip"
    indexed: bool = False

    def __post_init__(self):
        if self.augment not in AUGMENTATIONS or not 1 <= len(self.names) <= MOST_VIEWS:
            raise ValueError(f"a feed gives one to three views, augmented by one of {AUGMENTATIONS}, not {self}")


class StreamFeed:
    """Base of the feeds that cut views out of images. A subclass has `backend`, `_make` and `close`."""

    backend: str

    def __init__(self, split: Split | Encoded, spec: FeedSpec):
        self.split, self.spec = split, spec
        self.resized = isinstance(split, Encoded) and bool((split.sizes != split.image_size).any())
        if isinstance(split, Encoded):
            self.sizes = split.sizes
        else:
            self.sizes = torch.tensor(split.image_shape)[:, None].expand(2, len(split))

    def epoch(self, order: Tensor, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Batches for `load`, on the device: labels int64 (B,), one tensor a view, then the colours' draws, all (B, ...).

        order: int64 (M,) on the CPU. seed: of what is random about the views. start: the batch to begin with; batch number i is
        the same, bit for bit, whatever the start, so an epoch that was broken off goes on where it stood.
        """
        spec = self.spec
        planned = geometry.jobs(
            self.sizes, order, batch_size, spec.names, spec.augment, seed,
            pad=spec.pad, resized=self.resized, weak=spec.weak, start=start, rank=spec.rank, world=spec.world,
        )  # fmt: skip
        for job, images in self._make(planned):
            labels = self.split.labels.index_select(0, job.indices)
            labels = self._to_device(torch.stack([labels, job.indices], 1) if spec.indexed else labels)
            colours = [self._to_device(_turned(part)) for view in job.views if view.colours is not None for part in view.colours]
            yield labels, *images, *colours

    def load(self, *batch: Tensor) -> tuple[Prepared, Tensor]:
        """The views and labels of a batch, for `TrainStep`: nothing but names for what `epoch` gave."""
        names = self.spec.names
        labels, images, rest = batch[0], batch[1 : 1 + len(names)], iter(batch[1 + len(names) :])
        coloured = [name for name in names if geometry.kind_of(name, self.spec.augment, self.spec.weak) == "simclr"]
        colours = {name: Colours(*(_turned(next(rest)) for _ in Colours._fields)) for name in coloured}
        return Prepared(dict(zip(names, images, strict=True)), colours), labels

    def close(self) -> None:
        """End what works in the background."""

    def _make(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, tuple[Tensor, ...]]]:
        """Each job with its views, on the device, in order: uint8 (B, H, W, 3), or fp32 (B, 3, H, W) in [0, 1] and channels_last.

        To be made ahead, so that the device does not wait. UserError names a file that cannot be decoded.
        """
        raise NotImplementedError

    def _to_device(self, part: Tensor) -> Tensor:
        if self.spec.device.type == "cuda":
            part = part.pin_memory()
        return part.to(self.spec.device, non_blocking=True)


def _turned(part: Tensor) -> Tensor:
    """Draws are (3, B) or (B,); in a batch every tensor begins with B, so that a part of a batch can be taken."""
    return part.T.contiguous() if part.ndim == 2 else part
