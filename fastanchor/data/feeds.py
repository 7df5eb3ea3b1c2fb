"""How batches reach the device: one interface, three backends, and the choice between them.

resident: the whole set as uint8 on the device, augmented within the training step; the fast one, where the set fits.
dali: NVIDIA DALI, for files, packed shards and sets that do not fit. torch: worker processes with Pillow, where DALI is missing.
All give the same images in the same order for the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

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


def open_feed(backend: str, split: Split | Mixed | Encoded, spec: FeedSpec) -> Feed:
    """A feed of BACKENDS over a split. Raises UserError where the backend cannot serve here."""
    if backend == "resident":
        if isinstance(split, Encoded):
            raise UserError("data.backend = resident: keeps decoded images in memory, and these are kept encoded")
        return ResidentFeed(split, spec)
    return {"dali": DaliFeed, "torch": TorchFeed}[backend](split, spec)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device: of the GPU, or of this machine's memory for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":") for line in file)
        return 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError):  # not Linux: nothing is known, so nothing is refused
        return 2**63 - 1


def budget(device: torch.device) -> int:
    """Bytes that a resident set may take on this device."""
    return int(RESIDENT_SHARE * free_memory(device))


def choose(wanted: str, split: Split | Mixed | Encoded, device: torch.device) -> tuple[str, str]:
    """The backend for `data.backend` = wanted ("auto" or one of BACKENDS) and the reason, for people. Raises UserError."""
    installed, dali = find_dali()
    if wanted != "auto":
        if wanted == "dali" and not installed:
            raise UserError(f"data.backend = dali: {dali}")
        return wanted, f"data.backend = {wanted}"
    if not isinstance(split, Encoded):
        height, width = split.image_shape
        needed, room = 3 * height * width * len(split), budget(device)
        place = "the GPU" if device.type == "cuda" else "memory"
        if needed <= room:
            return "resident", f"{_bytes(needed)} of images fit into {place}"
        why = f"{_bytes(needed)} of images do not fit into {place}'s {_bytes(room)}"
    else:
        why = "the images are kept encoded"
    return ("dali", f"{why}; {dali}") if installed else ("torch", f"{why}, and {dali}")


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
