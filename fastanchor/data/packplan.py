"""What `fastanchor data pack` will write, planned from an image folder's listing: which files go into which shard, in what form.

Names, classes and sizes in bytes of the files and the options decide it alone, so the same command plans the same shards again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastanchor.data import decode, folder, packed
from fastanchor.data.arrays import listed
from fastanchor.data.files import shown
from fastanchor.errors import UserError

SMALL = 64  # pixels a side up to which pixels take hardly more room than files, and far less time
MOSTLY = 0.9  # share of the probed files that have one size where the others are taken for mistakes
SHARD_BYTES = 256_000_000
ORDER_SEED = 0
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Options:
    """kind: auto, uint8 or jpeg. image_size: side in pixels, 8 to 4096. classes, labels: files, see `listing.find`.

    skip_broken: leave out broken and mislabelled files instead of stopping once all were looked at.
    """

    kind: str = "auto"
    image_size: int | None = None
    shard_bytes: int = SHARD_BYTES
    classes: Path | None = None
    labels: Path | None = None
    skip_broken: bool = False


class Part(NamedTuple):
    """A split of the source: paths, labels int64 and sizes in bytes int64 (-1: unknown), in the listing's order."""

    paths: list[str]
    labels: np.ndarray
    sizes: np.ndarray


class Shard(NamedTuple):
    """rows: which images of the split's listing, in the order in which they are written, int64."""

    split: str
    file: str
    rows: np.ndarray


@dataclass(frozen=True)
class Plan:
    """All that decides what is written.

    pixels: whether pixels are stored, else files' bytes. size: (H, W) of the images that are made. resized: whether that was
    asked for; else every stored image must have it. large: whether threads are worth it. described: what a plan is told apart by.
    """

    source: Path
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    parts: dict[str, Part]
    pixels: bool
    size: tuple[int, int]
    resized: bool
    large: bool
    shards: tuple[Shard, ...]
    described: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()

    def name(self, split: str, row: int) -> str:
        """A file's path below the source, as `train/cat/1.jpg`."""
        return self.parts[split].paths[row][len(str(self.source / "train")) - len("train") :]


def make_plan(source: Path, options: Options) -> Plan:
    """Lists the folder, looks into about a hundred files for their size, and says what each shard will hold. UserError."""
    side = options.image_size
    if side is not None and not packed.MIN_SIDE <= side <= packed.MAX_SIDE:
        raise UserError(f"--image-size is {side} and must lie in [{packed.MIN_SIDE}, {packed.MAX_SIDE}] pixels")
    try:
        chosen = folder.choose(source, skip_broken=options.skip_broken, classes=options.classes, labels=options.labels)
    except UserError as error:
        raise UserError(str(error).replace("--data.", "--")) from error
    parts = {}
    for split, paths in chosen.paths.items():
        sizes = np.array([_bytes_of(path) for path in paths], np.int64)
        parts[split] = Part(list(paths), chosen.labels[split].astype(np.int64), sizes)
    pixels, size = _layout(source, options, chosen.sizes)
    shards = []
    for split, part in parts.items():
        order = np.arange(len(part.paths))
        if pixels:
            cost = np.full(len(order), math.prod(size) * 3)
        else:
            # Pixels are read whole, in whatever order; of files' bytes a sequential reader wants the classes mixed.
            order = np.random.RandomState(ORDER_SEED).permutation(len(order)) if split == "train" else order
            cost = 3 * BLOCK + -(-part.sizes[order].clip(0) // BLOCK) * BLOCK
        suffix = "npy" if pixels else "tar"
        shards += [Shard(split, f"{split}-{i:05d}.{suffix}", r) for i, r in enumerate(_cut(order, cost, options.shard_bytes))]
    names = tuple(chosen.found.title(name) for name in chosen.found.names)
    notes = [*chosen.found.notes]
    if chosen.found.empty:
        notes.append(f"Left out {counted(len(chosen.found.empty), 'class', 'es')} without images: {listed(chosen.found.empty)}.")
    plan = Plan(source, names, tuple(notes), parts, pixels, size, options.image_size is not None,
                math.prod(chosen.size) >= decode.PIXELS_WORTH_THREADS, tuple(shards), {})  # fmt: skip
    plan.described.update(
        schema=packed.SCHEMA, kind="uint8" if pixels else "jpeg", size=list(size), resized=plan.resized,
        shard_size=options.shard_bytes, files={split: len(part.paths) for split, part in parts.items()}, listing=_digest(plan),
    )  # fmt: skip
    return plan


def _bytes_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # told, with its reason, when its turn comes


def _digest(plan: Plan) -> str:
    found = hashlib.sha256(json.dumps(plan.class_names).encode())
    for split, part in plan.parts.items():
        found.update(b"\0".join(os.fsencode(plan.name(split, row)) for row in range(len(part.paths))))
        found.update(part.labels.tobytes() + part.sizes.tobytes())
    return found.hexdigest()


def _cut(order: np.ndarray, cost: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Pieces of `order` that cost at most `limit` bytes each, or hold a single image."""
    start, total = 0, 0
    for place, one in enumerate(cost.tolist()):
        if total + one > limit and place > start:
            yield order[start:place]
            start, total = place, 0
        total += one
    yield order[start:]


def _layout(source: Path, options: Options, stored: Counter) -> tuple[bool, tuple[int, int]]:
    """Whether pixels are stored, and the (H, W) of the images that are made. stored: how often which size was found."""
    side = options.image_size
    if not stored:
        raise UserError(f"{shown(source)}: none of its training files can be read as a JPEG or PNG image")
    common, count = stored.most_common(1)[0]
    size = (side, side) if side else common if count >= MOSTLY * stored.total() else None
    pixels = options.kind == "uint8" or (options.kind == "auto" and size is not None and max(size) <= SMALL)
    if size is None or not (pixels or size[0] == size[1]):
        found = ", ".join(f"{height}x{width}" for (height, width), _ in stored.most_common(3))
        what = "pixels are stored in one size" if pixels else "squares of one size are made of them in training"
        raise UserError(f"{shown(source)} has images of {found}{', ...' if len(stored) > 3 else ''}, and {what}: "
                        "--image-size N says the side")  # fmt: skip
    return pixels, size


def counted(count: int, noun: str, plural: str = "s") -> str:
    """`1 file`, `2,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else plural}"
