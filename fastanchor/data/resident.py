"""A whole split on the device as uint8: 154 MB for CIFAR-10, so that no loader and no copy stands in a step's way."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastanchor.data.sources import Split
from fastanchor.data.stream import FeedSpec
from fastanchor.data.views import Rows
from fastanchor.errors import UserError

Batch = tuple[Tensor, Tensor, Tensor]  # indices int64 (B,), images uint8 (B, H, W, 3), labels int64 (B,)


class ResidentSplit:
    """A split's images, uint8 (N, H, W, 3), and labels, int64 (N,), kept on `device`."""

    def __init__(self, split: Split, device: torch.device | str):
        self.device = torch.device(device)
        self.images = split.images.to(self.device).contiguous()
        self.labels = split.labels.to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def number_of_batches(self, batch_size: int, drop_last: bool) -> int:
        """Batches in an epoch. UserError for a batch size below 1, or one that with drop_last leaves no batch at all."""
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size} and must be at least 1")
        if drop_last and batch_size > len(self):
            raise UserError(
                f"batch size is {batch_size} and must be at most {len(self)}, the number of images, "
                "since an incomplete last batch is dropped"
            )
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def epoch(self, batch_size: int, *, generator: torch.Generator | None, drop_last: bool) -> Iterator[Batch]:
        """One pass over the split in batches that lie on the device: (indices, images, labels).

        generator: a CPU generator from which the order is drawn by this call (not by the first batch), so that it is
        the same on every device; None keeps the original order, and the batches are then views of the split, to be
        read only. The order crosses to the device in one transfer an epoch. drop_last: leave an incomplete batch out.
        Raises UserError as `number_of_batches` does, ValueError for a generator of another device.
        """
        if generator is None:
            return self._in_order(self.number_of_batches(batch_size, drop_last), batch_size)
        return ((indices, *self.take(indices)) for indices in self.shuffled(batch_size, generator=generator, drop_last=drop_last))

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, H, W, 3) and labels (B,) of these indices, int64 (B,) on the device."""
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def rows(self, indices: Tensor) -> tuple[Rows, Tensor]:
        """As `take`, but the images are left where they are, for an augmentation that gathers them itself."""
        return Rows(self.images, indices), self.labels.index_select(0, indices)

    def shuffled(self, batch_size: int, *, generator: torch.Generator, drop_last: bool) -> Iterator[Tensor]:
        """The indices alone of `epoch`'s batches, for a step that takes its images itself; same order, same errors."""
        batches = self.number_of_batches(batch_size, drop_last)
        if generator.device.type != "cpu":
            raise ValueError(f"the order of an epoch is drawn from a CPU generator, not from one on {generator.device}")
        order = torch.randperm(len(self), generator=generator)
        if self.device.type == "cuda":
            order = order.pin_memory()
        order = order.to(self.device, non_blocking=True)
        return (order[i * batch_size : (i + 1) * batch_size] for i in range(batches))

    def _in_order(self, batches: int, batch_size: int) -> Iterator[Batch]:
        indices = torch.arange(len(self), device=self.device)
        for i in range(batches):
            piece = slice(i * batch_size, (i + 1) * batch_size)
            yield indices[piece], self.images[piece], self.labels[piece]


class ResidentFeed:
    """A feed (see `feeds.Feed`) of a split that lies on the device: its batches are indices, and the step does the rest."""

    backend = "resident"

    def __init__(self, split: Split, spec: FeedSpec):
        self.data, self.spec = ResidentSplit(split, spec.device), spec

    def epoch(self, order: Tensor, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor]]:
        """Indices, int64 (B,) on the device, of each batch; the order crosses to the device in one transfer. The views are the
        step's, so `seed` is not needed."""
        spec = self.spec
        if spec.device.type == "cuda":
            order = order.pin_memory()
        order = order.to(spec.device, non_blocking=True)
        for begin in range(start * batch_size, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            low, high = (len(batch) * rank // spec.world for rank in (spec.rank, spec.rank + 1))
            yield (batch[low:high],)

    def load(self, indices: Tensor) -> tuple[Rows, Tensor]:
        """The rows of the store, left where they are, and their labels."""
        rows, labels = self.data.rows(indices)
        return rows, torch.stack([labels, indices], 1) if self.spec.indexed else labels

    def close(self) -> None:
        """Nothing works in the background."""
