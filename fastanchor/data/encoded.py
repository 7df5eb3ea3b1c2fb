"""Images that stay JPEG or PNG bytes, in files or in packed shards, until a batch needs them: for sets that outgrow memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastanchor.data.arrays import SUBSET_STREAM, random_state, stratified_choice
from fastanchor.data.decode import BrokenImage, decode, decode_many
from fastanchor.data.files import shown
from fastanchor.errors import UserError


class Store(Protocol):
    """Where encoded images lie. Must be picklable (worker processes read from it) and safe to read from threads.

    A store may have a `hint`: what to do about a broken image, where it is not to pack the folder again.
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | memoryview:
        """The bytes of one JPEG or PNG image. BrokenImage where they cannot be had."""

    def name(self, index: int) -> str:
        """What the image is called in messages: its path."""

    def digest(self) -> bytes:
        """Changes when the images do. Cheap: of names and sizes or stored checksums, not of all bytes."""


@dataclass(frozen=True)
class Encoded:
    """Labels int64 (N,) on the CPU, stored heights and widths, int64 (2, N), and which images of a store they are, int64 (N,).

    image_size: side in pixels of the square images that are made of them. As `sources.Split`: len, labels, subset, images.
    odd: bool (N,), those whose bytes only Pillow reads as it should (CMYK, 16 bits, palettes), see `decode.decode`.
    """

    store: Store
    index: np.ndarray
    labels: Tensor
    sizes: Tensor
    odd: np.ndarray
    image_size: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) in pixels of the images that are made."""
        return self.image_size, self.image_size

    def take(self, chosen: Sequence[int] | np.ndarray) -> Encoded:
        """Those images alone."""
        chosen = np.asarray(chosen, np.int64)
        return Encoded(
            self.store, self.index[chosen], self.labels[chosen], self.sizes[:, chosen], self.odd[chosen], self.image_size
        )

    def subset(self, count: int) -> Encoded:
        """At most `count` images, class-stratified, always the same ones (as `Split.subset`)."""
        if count >= len(self):
            return self
        return self.take(stratified_choice(self.labels.numpy(), count, random_state(0, SUBSET_STREAM)))

    def read(self, index: int) -> bytes | memoryview:
        """The bytes of image number `index` of this split. BrokenImage."""
        return self.store.read(int(self.index[index]))

    def name(self, index: int) -> str:
        """Its path, for messages."""
        return self.store.name(int(self.index[index]))

    @property
    def hint(self) -> str:
        """What to do about a broken image, the end of a message."""
        return getattr(self.store, "hint", "pack the folder again")

    def gather(self, indices: Tensor) -> Tensor:
        """`decode` by the name that arrays have."""
        return self.decode(indices)

    def decode(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Those images as evaluation sees them, uint8 (n, S, S, 3): the largest centred square, resized. Threads; UserError."""

        def one(index: int) -> np.ndarray:
            try:
                return decode(self.read(index), self.image_size)
            except BrokenImage as error:
                raise UserError(f"{shown(self.name(index))} {error}; {self.hint}") from None

        return torch.from_numpy(decode_many(one, [int(i) for i in indices], (*self.image_shape, 3)))

    @cached_property
    def images(self) -> Tensor:
        """All of them, decoded and kept: for small subsets, a report's for instance."""
        return self.decode(range(len(self)))

    def digest(self) -> bytes:
        """A digest of which images in which order with which labels."""
        found = hashlib.blake2b(self.store.digest(), digest_size=16)
        for part in (self.index, self.labels.numpy(), np.array([self.image_size])):
            found.update(np.ascontiguousarray(part))
        return found.digest()


@dataclass(frozen=True)
class EncodedSet:
    """A source whose images stay encoded: what `folder.index` and `packed.read` give. notes: a sentence on what was left out."""

    class_names: tuple[str, ...]
    train: Encoded
    test: Encoded
    notes: tuple[str, ...] = ()
