"""What the images are: one function, `load`, turns a source string into train, validation and test tensors.

Every choice (validation split, limit, test split of digits) depends on split_seed alone, never on the training seed.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastanchor.data import cifar, folder, npz
from fastanchor.data.arrays import (
    PIXEL_STREAM,
    SUBSET_STREAM,
    TEST_LIMIT_STREAM,
    TEST_STREAM,
    TRAIN_LIMIT_STREAM,
    VAL_STREAM,
    Arrays,
    check_arrays,
    check_limit,
    limited,
    random_state,
    stratified_choice,
)
from fastanchor.data.encoded import Encoded
from fastanchor.data.files import shown
from fastanchor.errors import UserError, did_you_mean

SOURCES = ("digits", "cifar10", "cifar100", "folder:PATH", "npz:PATH", "synthetic")
DIGITS_TEST_FRACTION = 0.2
SYNTHETIC_CLASSES, SYNTHETIC_TRAIN, SYNTHETIC_TEST = 10, 2000, 500


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W, 3) and labels int64 (N,), on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return tuple(self.images.shape[1:3])

    def gather(self, indices: Tensor) -> Tensor:
        """Those images, uint8 (B, H, W, 3). indices: int64 (B,) on the CPU."""
        return self.images.index_select(0, indices)

    def digest(self) -> bytes:
        """A digest of the images and labels, in order."""
        found = hashlib.blake2b(digest_size=16)
        for part in (self.images, self.labels):
            found.update(part.contiguous().numpy())
        return found.digest()

    def subset(self, count: int) -> "Split":
        """At most `count` images, class-stratified, always the same ones."""
        if count >= len(self):
            return self
        chosen = stratified_choice(self.labels.numpy(), count, random_state(0, SUBSET_STREAM))
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageSet:
    """A data set ready for use; `notes` holds one sentence on each thing that was left out."""

    name: str
    class_names: tuple[str, ...]
    train: Split | Encoded
    val: Split | Encoded
    test: Split | Encoded
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.train.image_shape


def channel_stats(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and population standard deviation of each channel, in [0, 1] units.

    images: uint8 (N, H, W, 3) on any device. Sums and squares are integers, so the result is exact up to its last
    rounding; images are taken a piece at a time, without an fp32 copy of all.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.numel() == 0:
        raise ValueError(f"images must be uint8 (N, H, W, 3) and not empty, not {images.dtype} {tuple(images.shape)}")
    sums = torch.zeros(2, 3, dtype=torch.int64, device=images.device)
    pixels_an_image = images.shape[1] * images.shape[2]
    for piece in images.split(max(1, 2**20 // pixels_an_image)):
        values = piece.reshape(-1, 3).to(torch.int32)
        sums[0] += values.sum(0, dtype=torch.int64)
        sums[1] += (values * values).sum(0, dtype=torch.int64)
    count = len(images) * pixels_an_image
    totals, squares = sums.tolist()
    mean = tuple(total / (255 * count) for total in totals)
    std = tuple(math.sqrt(count * sq - total**2) / (255 * count) for total, sq in zip(totals, squares, strict=True))
    return mean, std


def _digits(split_seed: int) -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 levels, enlarged bilinearly to 32x32 RGB."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Levels 0..16 and weights in 64ths are exact in fp32: the pixels are the same on every machine.
    small = torch.from_numpy(bunch.images).to(torch.float32)[:, None]
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False) * (255 / 16)
    images = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    labels = bunch.target.astype(np.int64)
    count = round(DIGITS_TEST_FRACTION * len(labels))
    in_test = np.zeros(len(labels), bool)
    in_test[stratified_choice(labels, count, random_state(split_seed, TEST_STREAM))] = True
    return Arrays(tuple(str(digit) for digit in range(10)), images[~in_test], labels[~in_test], images[in_test], labels[in_test])


def _synthetic(split_seed: int) -> Arrays:
    """Noisy copies of one smooth random template a class, 32x32 RGB: easy to learn, quick to make."""
    rng = random_state(split_seed, PIXEL_STREAM)
    coarse = torch.from_numpy(rng.randint(0, 256, (SYNTHETIC_CLASSES, 3, 4, 4)).astype(np.float32))
    smooth = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    templates = smooth.round().to(torch.int16).permute(0, 2, 3, 1).numpy() // 2 + 64
    labels = np.arange(SYNTHETIC_TRAIN + SYNTHETIC_TEST) % SYNTHETIC_CLASSES
    noise = rng.randint(-64, 65, (len(labels), 32, 32, 3)).astype(np.int16)
    images = np.clip(templates[labels] + noise, 0, 255).astype(np.uint8)
    names = tuple(f"template {i}" for i in range(SYNTHETIC_CLASSES))
    return Arrays(names, images[:SYNTHETIC_TRAIN], labels[:SYNTHETIC_TRAIN], images[SYNTHETIC_TRAIN:], labels[SYNTHETIC_TRAIN:])


def parse(source: str) -> tuple[str, str]:
    """Kind and path ("" where the kind has none) of a source string. UserError with the list and the nearest name."""
    kind, colon, path = source.strip().partition(":")
    for known in SOURCES:
        name, needs_path, _ = known.partition(":")
        if kind != name:
            continue
        if needs_path and not path:
            raise UserError(f"data source {source!r} names no path, and must be {known}")
        if colon and not needs_path:
            raise UserError(f"data source {source!r} must be {name!r} alone, since it takes no path")
        return kind, path
    hint = did_you_mean(kind.lower(), [known.partition(":")[0] for known in SOURCES])
    raise UserError(f"data source {source!r} is unknown, and must be one of {', '.join(SOURCES)}{hint}")


def _check_settings(kind: str, limit: int | None, val_fraction: float, split_seed: int, image_size: int | None) -> None:
    if not 0 < val_fraction <= 0.5:
        raise UserError(f"val_fraction is {val_fraction} and must lie in (0, 0.5]")
    if not 0 <= split_seed < 2**32:
        raise UserError(f"split_seed is {split_seed} and must lie in [0, {2**32 - 1}]")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit} and must be a positive number of images")
    if image_size is not None and kind != "folder":
        raise UserError(f"image_size is {image_size}, and it must be left out for {kind}: it resizes folder: images only")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise UserError(f"image_size is {image_size} and must lie in [1, 4096] pixels")


def _split(images: np.ndarray, labels: np.ndarray, indices: np.ndarray | None = None) -> Split:
    if indices is not None:
        images, labels = images[indices], labels[indices]
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))


def _with_own_validation(arrays: Arrays, limit: int | None, split_seed: int) -> tuple[Split, Split]:
    """Train and val as the source has them; `limit` counts both, in proportion."""
    boundary = len(arrays.train_labels)
    labels = np.concatenate([arrays.train_labels, arrays.val_labels]).astype(np.int64)
    groups = 2 * labels + (np.arange(len(labels)) >= boundary)
    chosen = limited(groups, limit, random_state(split_seed, TRAIN_LIMIT_STREAM))
    if chosen is None:
        return _split(arrays.train_images, arrays.train_labels), _split(arrays.val_images, arrays.val_labels)
    return (
        _split(arrays.train_images, arrays.train_labels, chosen[chosen < boundary]),
        _split(arrays.val_images, arrays.val_labels, chosen[chosen >= boundary] - boundary),
    )


def _with_drawn_validation(
    arrays: Arrays, limit: int | None, val_fraction: float, split_seed: int, where: str
) -> tuple[Split, Split]:
    """Train, and a class-stratified val taken out of it; every class keeps a training image."""
    labels = arrays.train_labels.astype(np.int64)
    chosen = limited(labels, limit, random_state(split_seed, TRAIN_LIMIT_STREAM))
    chosen = np.arange(len(labels)) if chosen is None else chosen
    count = max(1, round(val_fraction * len(chosen)))
    in_val = stratified_choice(labels[chosen], count, random_state(split_seed, VAL_STREAM), leave=1)
    if len(in_val) == 0:
        raise UserError(
            f"{where}: no class has two training images, and every class must keep one when the validation split is taken out"
        )
    return (_split(arrays.train_images, labels, np.delete(chosen, in_val)), _split(arrays.train_images, labels, chosen[in_val]))


def load(
    source: str,
    *,
    root: str | Path | None = None,
    limit: int | None = None,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    skip_broken: bool = False,
    image_size: int | None = None,
    download: bool = False,
) -> ImageSet:
    """Load a data set.

    source: one of SOURCES. root: where the CIFAR archives are; else $FASTANCHOR_DATA, else ~/.cache/fastanchor.
    limit: at most so many images of train and val together and so many of test, class-stratified.
    val_fraction: share of the training set, in (0, 0.5], that becomes the class-stratified validation split; an npz
    file with val_images has its own. split_seed: the only seed of all these choices; torch's and numpy's global
    generators are not touched. skip_broken, image_size: for folder:, see `folder.read`. download: for cifar10 and
    cifar100, fetch the archive where it is missing.
    Raises UserError for anything wrong with the source, the files or the settings.
    """
    kind, path = parse(source)
    _check_settings(kind, limit, val_fraction, split_seed, image_size)
    data_root = Path(root or os.environ.get("FASTANCHOR_DATA") or "~/.cache/fastanchor").expanduser()
    place = Path(path).expanduser()
    readers: dict[str, Callable[[], Arrays]] = {
        "digits": lambda: _digits(split_seed),
        "synthetic": lambda: _synthetic(split_seed),
        "cifar10": lambda: cifar.read("cifar10", data_root, download=download),
        "cifar100": lambda: cifar.read("cifar100", data_root, download=download),
        "npz": lambda: npz.read(place),
        "folder": lambda: folder.read(place, limit=limit, split_seed=split_seed, skip_broken=skip_broken, image_size=image_size),
    }
    arrays = readers[kind]()
    where = shown(place) if path else kind
    check_arrays(arrays, where)
    check_limit(limit, len(arrays.class_names))
    if arrays.val_images is None:
        train, val = _with_drawn_validation(arrays, limit, val_fraction, split_seed, where)
    else:
        train, val = _with_own_validation(arrays, limit, split_seed)
    in_test = limited(arrays.test_labels.astype(np.int64), limit, random_state(split_seed, TEST_LIMIT_STREAM))
    test = _split(arrays.test_images, arrays.test_labels, in_test)
    return ImageSet(source.strip(), arrays.class_names, train, val, test, arrays.notes)
