"""How batches reach the device: one interface, three backends, and the choice between them.

resident: the whole set as uint8 on the device, augmented within the training step; the fast one, where the set fits.
dali: NVIDIA DALI, for files, packed shards and sets that do not fit. torch: worker processes with Pillow, where DALI is missing.
All give the images in the same order for the same seed; dali and torch also the same views of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastanchor.config import DataConfig
from fastanchor.data.dali import DaliFeed, find_dali
from fastanchor.data.encoded import Encoded
from fastanchor.data.extra import Mixed
from fastanchor.data.loader import TorchFeed
from fastanchor.data.resident import ResidentFeed
from fastanchor.data.sources import Split
from fastanchor.data.stream import FeedSpec
from fastanchor.data.views import Prepared, Rows
from fastanchor.errors import UserError

BACKENDS = ("resident", "dali", "torch")
# Of the memory that is free when the training begins; the rest is the network's and its activations'.
RESIDENT_SHARE = 0.4
UNKNOWN = 2**63 - 1
CONTAINER = Path("/sys/fs/cgroup")


class Feed(Protocol):
    """Batches of a training split. `epoch` gives what `load` takes; `load` runs within the training step, and its graph."""

    backend: str

    def epoch(self, order: Tensor, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an order, int64 (M,) on the CPU, from number `start` on, each a tuple of tensors on the device.

        seed: of the views, where they are not drawn within the step. An incomplete last batch is given too.
        """

    def load(self, *batch: Tensor) -> tuple[Rows | Prepared, Tensor]:
        """The images, or views that are cut out already, and the labels of a batch."""

    def close(self) -> None:
        """End what works in the background; the feed is of no use after it."""


def feed_spec(data: DataConfig, names: tuple[str, ...], indexed: bool, device: torch.device) -> FeedSpec:
    """What a feed is to give by these settings."""
    return FeedSpec(names, data.augment, device, data.pad, data.workers, data.decoder, weak=data.weak, indexed=indexed)


def open_feed(backend: str, split: Split | Mixed | Encoded, spec: FeedSpec) -> Feed:
    """A feed of BACKENDS over a split. Raises UserError where the backend cannot serve here."""
    if backend == "resident":
        if isinstance(split, Encoded):
            raise UserError("data.backend = resident: keeps decoded images in memory, and these are kept encoded")
        try:
            return ResidentFeed(split, spec)
        except torch.OutOfMemoryError as error:
            needed = _bytes(_size(split))
            raise UserError(
                f"data.backend = resident: {needed} of images do not fit in the memory of {spec.device}, beside what is there; "
                "dali and torch keep them on the host"
            ) from error
    return {"dali": DaliFeed, "torch": TorchFeed}[backend](split, spec)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device: of the GPU, or for a CPU of this machine's memory and of the container's share of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_of_machine(), _free_of_container())


def _free_of_machine() -> int:
    try:
        return 1024 * int(_table(Path("/proc/meminfo"))["MemAvailable:"])
    except (OSError, KeyError):  # not Linux: nothing is known, so nothing is refused
        return UNKNOWN


def _free_of_container() -> int:
    """By Linux's control groups, version 2. Cached files count as free, as they do in MemAvailable."""
    try:
        limit, used = ((CONTAINER / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        cached = _table(CONTAINER / "memory.stat")["inactive_file"]
        return UNKNOWN if limit == "max" else max(0, int(limit) - int(used) + int(cached))
    except (OSError, KeyError):
        return UNKNOWN


def _table(path: Path) -> dict[str, str]:
    return dict(line.split()[:2] for line in path.read_text(encoding="ascii").splitlines())


def budget(device: torch.device) -> int:
    """Bytes that decoded images may take: on this device, and in this machine's memory, where they are decoded."""
    return int(RESIDENT_SHARE * min(free_memory(device), free_memory(torch.device("cpu"))))


def choose(wanted: str, split: Split | Mixed | Encoded, device: torch.device) -> tuple[str, str]:
    """The backend for `data.backend` = wanted ("auto" or one of BACKENDS) and the reason, for people. Raises UserError."""
    installed, dali = find_dali()
    if wanted != "auto":
        if wanted == "dali" and not installed:
            raise UserError(f"data.backend = dali: {dali}")
        return wanted, f"data.backend = {wanted}"
    if isinstance(split, Encoded):
        why = "the images are kept encoded"
    elif device.type == "cpu" and not isinstance(split, Mixed):
        return "resident", "the images are in memory already"
    else:
        needed, room = _size(split), int(RESIDENT_SHARE * free_memory(device))
        place = "the GPU" if device.type == "cuda" else "memory"
        if needed <= room:
            return "resident", f"{_bytes(needed)} of images fit into {place}"
        why = f"{_bytes(needed)} of images do not fit into {place}'s {_bytes(room)}"
    return ("dali", f"{why}; {dali}") if installed else ("torch", f"{why}, and {dali}")


def _size(split: Split | Mixed) -> int:
    """Bytes of all images of a split as uint8."""
    height, width = split.image_shape
    return 3 * height * width * len(split)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
