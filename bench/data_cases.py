"""Input pipelines, from stored uint8 images to fp32 batches: the resident split, a DataLoader as public code has it, a ceiling.

Shared by `make bench` and bench.gpu. Every pipeline gives batches of the same shape; the loaders shuffle, crop and mirror.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastanchor.data import views
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.ops import images as operators

PAD = 4
Batches = Iterator[tuple[Tensor, Tensor]]
Pass = Callable[[], Batches]


@dataclass(frozen=True)
class Source:
    """What a pipeline feeds from: images of a split in batches, the last incomplete one left out, to a device."""

    split: Split
    batch: int
    device: torch.device

    @property
    def images(self) -> int:
        """Of one pass."""
        return len(self.split) // self.batch * self.batch


@functools.cache
def torchvision_transforms():
    """torchvision.transforms, or None where it is missing or cannot be imported (its wheels beside a torch for CPUs alone)."""
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError):
        return None
    return transforms


def crop_and_flip(image: Image.Image, top: int, left: int, mirrored: bool) -> Image.Image:
    """The image, padded with PAD black pixels on all sides, cut to its size at (top, left), then mirrored."""
    width, height = image.size
    cut = ImageOps.expand(image, PAD).crop((left, top, left + width, top + height))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else cut


def to_tensor(image: Image.Image) -> Tensor:
    """fp32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class PillowTransform:
    """torchvision's RandomCrop(size, padding=4), RandomHorizontalFlip and ToTensor on Pillow's images, without torchvision."""

    def __call__(self, image: Image.Image) -> Tensor:
        top, left = torch.randint(2 * PAD + 1, (2,)).tolist()
        return to_tensor(crop_and_flip(image, top, left, torch.rand(1).item() < 0.5))


def public_transform(pixels: int) -> tuple[Callable[[Image.Image], Tensor], str]:
    """The transforms of public training code for one image, and whose they are."""
    transforms = torchvision_transforms()
    if transforms is None:
        return PillowTransform(), "Pillow: the same transforms, torchvision cannot be imported here"
    steps = [transforms.RandomCrop(pixels, padding=PAD), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return transforms.Compose(steps), "torchvision"


class PublicDataset(Dataset):
    """Image by image, as torchvision's CIFAR10 gives them: a Pillow image of the stored bytes, through the transforms."""

    def __init__(self, split: Split):
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.transform, _ = public_transform(self.images.shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


@contextlib.contextmanager
def loader(source: Source, workers: int) -> Iterator[Pass]:
    """Passes over a DataLoader, each batch moved to the device. The workers stay from pass to pass, and end with the context."""
    cuda = source.device.type == "cuda"
    made = DataLoader(
        PublicDataset(source.split), batch_size=source.batch, shuffle=True, drop_last=True, num_workers=workers,
        pin_memory=cuda, persistent_workers=workers > 0,
    )  # fmt: skip

    def run() -> Batches:
        for images, labels in made:
            yield images.to(source.device, non_blocking=True), labels.to(source.device, non_blocking=True)

    try:
        yield run
    finally:
        # Not left to the garbage collector: a traceback may hold the iterator for long.
        if made._iterator is not None:
            made._iterator._shutdown_workers()


@contextlib.contextmanager
def resident(source: Source, kernels: str = "auto") -> Iterator[Pass]:
    """Indices of an epoch, their rows and one augmentation of the batch: by the kernel where `kernels` and the device allow."""
    data = ResidentSplit(source.split, source.device)
    fused, _ = operators.decide("augment", kernels, source.device)
    order, draws = torch.Generator().manual_seed(0), torch.Generator(source.device).manual_seed(0)

    def run() -> Batches:
        for indices in data.shuffled(source.batch, generator=order, drop_last=True):
            rows, labels = data.rows(indices)
            yield views.augment(rows, "crop_flip", draws, pad=PAD, fused=fused), labels

    yield run


@contextlib.contextmanager
def synthetic(source: Source) -> Iterator[Pass]:
    """One batch again and again: what any pipeline could reach at most."""
    images = views.to_float(source.split.images[: source.batch].to(source.device))
    labels = source.split.labels[: source.batch].to(source.device)
    yield lambda: ((images, labels) for _ in range(source.images // source.batch))


# Another backend (DALI, say) is another line here: a context that gives passes.
PIPELINES: dict[str, Callable[[Source], contextlib.AbstractContextManager[Pass]]] = {
    "resident": resident,
    "synthetic": synthetic,
    "loader_0_workers": functools.partial(loader, workers=0),
    "loader_2_workers": functools.partial(loader, workers=2),
}


def drain(run: Pass) -> int:
    """Take every batch of a pass; the number of images."""
    return sum(len(labels) for _, labels in run())
