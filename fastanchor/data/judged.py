"""Images to judge a model on: resident where they are decoded already, else decoded on the way, always by Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from fastanchor.data.encoded import Encoded
from fastanchor.data.resident import Batch, ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.errors import UserError


def judged_split(split: Split | Encoded, device: torch.device | str) -> ResidentSplit | DecodedSplit:
    """What `evaluate` takes. The verdict on a model never depends on the backend that fed its training."""
    return DecodedSplit(split, device) if isinstance(split, Encoded) else ResidentSplit(split, device)


class DecodedSplit:
    """An encoded split as `ResidentSplit` is for evaluation: batches in the stored order, one decoded ahead."""

    def __init__(self, split: Encoded, device: torch.device | str):
        self.split, self.device = split, torch.device(device)

    def __len__(self) -> int:
        return len(self.split)

    def epoch(self, batch_size: int, *, generator: None, drop_last: bool) -> Iterator[Batch]:
        """One pass in the stored order: (indices, images uint8 (B, H, W, 3), labels) on the device. Raises UserError."""
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size} and must be at least 1")
        if generator is not None or drop_last:
            raise ValueError("images are judged in their order, and all of them")
        pieces = torch.arange(len(self)).split(batch_size)
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.split.gather, pieces[0])
            for place, indices in enumerate(pieces):
                images = coming.result()
                if place + 1 < len(pieces):
                    coming = ahead.submit(self.split.gather, pieces[place + 1])
                yield tuple(part.to(self.device) for part in (indices, images, self.split.labels[indices]))
