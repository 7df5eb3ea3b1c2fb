"""Which part of which image a view shows: drawn on the host before anything is decoded, so that feeds make the same views.

A view of an image is cut out (a box), resized to the size of the data set, cropped after zero padding, and mirrored; its
colours come last, on the device. All of it follows from the epoch's order and one seed, so a feed can begin at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastanchor.data import simclr
from fastanchor.data.views import RESIZED_SCALE, Colours, draw_crop_flip

# Names of views: the image as evaluation sees it, and one drawn by an augmentation of its own; others are drawn as `augment`.
CLEAN, WEAK = "clean", "weak"


def kind_of(name: str, augment: str, weak: str) -> str:
    """How the view of this name is drawn: "clean", or one of AUGMENTATIONS."""
    return {CLEAN: CLEAN, WEAK: weak}.get(name, augment)


class Place(NamedTuple):
    """Where one view of each image of a batch comes from, on the CPU. None: that operation is left out for all of them."""

    boxes: Tensor | None  # int64 (4, B): top, left, height, width in pixels of the stored image; resized to the set's size
    offsets: Tensor | None  # int64 (2, B) in [0, 2 pad]: of the crop after zero padding, rows then columns
    mirrored: Tensor | None  # bool (B,)


class ViewDraw(NamedTuple):
    """One view of a batch: its place, and the colours for those who finish it."""

    place: Place
    colours: Colours | None


class Job(NamedTuple):
    """One batch to make: which images, int64 (B,) on the CPU, and how each view of them is drawn, in the order of the names."""

    indices: Tensor
    views: tuple[ViewDraw, ...]


def centre_squares(sizes: Tensor) -> Tensor:
    """The largest centred square of each image. sizes: int64 (2, B), heights and widths. Returns boxes, int64 (4, B)."""
    side = sizes.amin(0)
    top, left = (sizes - side) // 2
    return torch.stack([top, left, side, side])


def draw_view(kind: str, sizes: Tensor, generator: torch.Generator, *, pad: int, resized: bool) -> ViewDraw:
    """One view of each image of a batch, drawn as `views.augment` draws it: the same numbers in the same order.

    kind: "clean" or one of AUGMENTATIONS. sizes: int64 (2, B), stored heights and widths. resized: whether stored images differ
    from the set's size, so that views which show the whole image show its largest centred square, resized.
    """
    whole = centre_squares(sizes) if resized else None
    batch = sizes.shape[1]
    if kind in (CLEAN, "none"):
        return ViewDraw(Place(whole, None, None), None)
    if kind in ("crop_flip", "crop"):
        offsets, mirrored = draw_crop_flip(batch, generator, pad=pad, flip=kind == "crop_flip")
        return ViewDraw(Place(whole, offsets, mirrored), None)
    height, width = sizes
    if kind == "resized_crop_flip":
        boxes, mirrored = simclr.draw_resized_crop_flip(batch, height, width, generator, scale=RESIZED_SCALE)
        return ViewDraw(Place(boxes, None, mirrored), None)
    draw = simclr.draw_simclr(batch, height, width, generator)
    return ViewDraw(Place(draw.boxes, None, draw.mirrored), Colours(*draw.jitter, draw.greyed))


def jobs(
    sizes: Tensor, order: Tensor, batch_size: int, names: tuple[str, ...], augment: str, seed: int, *,
    pad: int, resized: bool, weak: str = "crop_flip", start: int = 0, rank: int = 0, world: int = 1,
) -> Iterator[Job]:  # fmt: skip
    """The batches of an epoch from number `start` on.

    sizes: int64 (2, N) of all stored images. order: int64 (M,), the epoch's indices; batch i is the i-th piece of batch_size of
    them, and an incomplete last one is given too. names: the views, drawn as `kind_of` says.
    rank, world: the share of every batch that this process makes; the draws of a batch do not depend on them.
    """
    generator = torch.Generator().manual_seed(seed)
    for number, begin in enumerate(range(0, len(order), batch_size)):
        indices = order[begin : begin + batch_size]
        of_batch = sizes[:, indices]
        # Also for batches before `start`: the stream of random numbers has to pass them.
        views = tuple(draw_view(kind_of(name, augment, weak), of_batch, generator, pad=pad, resized=resized) for name in names)
        if number >= start:
            yield _share(Job(indices, views), rank, world)


def _share(job: Job, rank: int, world: int) -> Job:
    if world == 1:
        return job
    low, high = (len(job.indices) * r // world for r in (rank, rank + 1))

    def cut(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[..., low:high]

    return Job(
        cut(job.indices),
        tuple(
            ViewDraw(Place(*map(cut, view.place)), None if view.colours is None else Colours(*map(cut, view.colours)))
            for view in job.views
        ),
    )
