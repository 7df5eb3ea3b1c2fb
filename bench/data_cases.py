"""Input pipelines, from stored images to fp32 batches: the engine's backends, a DataLoader as public code has it, a ceiling.

Shared by `make bench` and bench.gpu. All give batches of the same shape; all but the ceiling shuffle, crop and mirror.
A folder of JPEG files is made here too, for the backends that decode.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastanchor.data import feeds, folder, views
from fastanchor.data.dali import find_dali
from fastanchor.data.encoded import Encoded
from fastanchor.data.order import epoch_order
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.data.stream import FeedSpec
from fastanchor.ops import images as operators

PAD = 4
Batches = Iterator[tuple[Tensor, Tensor]]
Pass = Callable[[], Batches]


@dataclass(frozen=True)
class Source:
    """What a pipeline feeds from: images of a split in batches, the last incomplete one left out, to a device."""

    split: Split | Encoded
    batch: int
    device: torch.device
    augment: str = "crop_flip"

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
def backend(source: Source, name: str, workers: int | None = None, decoder: str = "auto") -> Iterator[Pass]:
    """A data backend of the engine, one of feeds.BACKENDS, with the views finished as the training step finishes them."""
    spec = FeedSpec(("aug",), source.augment, source.device, PAD, workers, decoder)
    with contextlib.closing(feeds.open_feed(name, source.split, spec)) as feed:
        order = torch.Generator().manual_seed(0)

        def run() -> Batches:
            indices = epoch_order(source.split.labels, batch_size=source.batch, generator=order, drop_last=True)
            # Boxes and offsets of one seed: one pass costs as much as another.
            with contextlib.closing(feed.epoch(indices, source.batch, 0)) as batches:
                for batch in batches:
                    prepared, labels = feed.load(*batch)
                    yield prepared.view("aug"), labels

        yield run


@contextlib.contextmanager
def synthetic(source: Source) -> Iterator[Pass]:
    """One batch again and again: what any pipeline could reach at most."""
    images = views.to_float(source.split.images[: source.batch].to(source.device))
    labels = source.split.labels[: source.batch].to(source.device)
    yield lambda: ((images, labels) for _ in range(source.images // source.batch))


PIPELINES: dict[str, Callable[[Source], contextlib.AbstractContextManager[Pass]]] = {
    "resident": resident,
    "synthetic": synthetic,
    "dali": functools.partial(backend, name="dali"),
    "torch_0_workers": functools.partial(backend, name="torch", workers=0),
    "torch_2_workers": functools.partial(backend, name="torch", workers=2),
    "loader_0_workers": functools.partial(loader, workers=0),
    "loader_2_workers": functools.partial(loader, workers=2),
}
# Of images that are JPEG files; "mixed" decodes on the GPU.
FILE_PIPELINES: dict[str, Callable[[Source], contextlib.AbstractContextManager[Pass]]] = {
    "dali_cpu": functools.partial(backend, name="dali", decoder="cpu"),
    "dali_mixed": functools.partial(backend, name="dali", decoder="mixed"),
    "torch_0_workers": functools.partial(backend, name="torch", workers=0),
    "torch_2_workers": functools.partial(backend, name="torch", workers=2),
}


def left_out(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Why pipelines cannot serve here, by name."""
    installed, why = find_dali()
    found = {} if installed else {name: f"DALI is {why}" for name in names if name.startswith("dali")}
    if device.type != "cuda":
        found |= {name: "decodes on a GPU, and this is a CPU" for name in names if name.endswith("mixed")}
    return found


@contextlib.contextmanager
def jpeg_folder(images: int, pixels: int, classes: int = 2) -> Iterator[Encoded]:
    """The training split of a temporary folder of JPEG files, `pixels` a side: large shapes with fine grain, quality 90."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="fastanchor-jpeg-") as name:
        for split, count in (("train", images), ("test", classes)):
            for number in range(count):
                place = Path(name, split, f"class {number % classes}")
                place.mkdir(parents=True, exist_ok=True)
                shapes = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
                made = np.asarray(shapes.resize((pixels, pixels), Image.Resampling.BICUBIC)).astype(np.int16)
                made = np.clip(made + rng.integers(-12, 13, made.shape), 0, 255).astype(np.uint8)
                Image.fromarray(made).save(place / f"{number:05}.jpg", quality=90)
        yield folder.index(Path(name), image_size=pixels).train


def drain(run: Pass) -> int:
    """Take every batch of a pass; the number of images."""
    return sum(len(labels) for _, labels in run())
