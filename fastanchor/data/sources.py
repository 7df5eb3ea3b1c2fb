"""What the images are: one function, `load`, turns a source string into train, validation and test tensors.

Every choice (validation split, limit, test split of digits) depends on split_seed alone, never on the training seed.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastanchor.data import cifar, folder, npz, packed
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
from fastanchor.data.encoded import Encoded, EncodedSet
from fastanchor.data.files import shown
from fastanchor.errors import UserError, did_you_mean

SOURCES = ("digits", "cifar10", "cifar100", "cifar100:coarse", "folder:PATH", "packed:PATH", "npz:PATH", "synthetic")
BACKENDS = ("auto", "resident", "dali", "torch")
# Augmentations whose crops are taken from the stored image where that is larger than what the model sees.
CROPS_OF_STORED = ("resized_crop_flip", "simclr")
# Settings that only some kinds of source have, which ones, and what for.
FOLDER_SETTINGS = {
    "image_size": (("folder", "packed"), "it resizes images of folder: and packed:"),
    "classes": (("folder",), "it chooses among the class folders of folder:"),
    "labels": (("folder",), "it checks the class folders of folder:"),
}
# Enough for a normalisation, and soon decoded.
STATS_IMAGES = 2000
STATS_PIXELS = 2**25  # decoded at once for it: 100 MB
DIGITS_TEST_FRACTION = 0.2
SYNTHETIC_CLASSES, SYNTHETIC_TRAIN, SYNTHETIC_TEST = 10, 2000, 500


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W, 3) and labels int64 (N,), on the CPU.

    origin: int64 (N,), the numbers that the images have in the split that they were taken out of; None where none was left out.
    """

    images: Tensor
    labels: Tensor
    origin: Tensor | None = field(default=None, kw_only=True)

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

    def take(self, chosen: np.ndarray) -> "Split":
        """Those images alone. chosen: int64 (n,)."""
        chosen = torch.as_tensor(chosen)
        origin = chosen if self.origin is None else self.origin[chosen]
        return Split(self.images[chosen], self.labels[chosen], origin=origin)

    def subset(self, count: int) -> "Split":
        """At most `count` images, class-stratified, always the same ones."""
        if count >= len(self):
            return self
        return self.take(stratified_choice(self.labels.numpy(), count, random_state(0, SUBSET_STREAM)))


@dataclass(frozen=True)
class ImageSet:
    """A data set ready for use.

    notes: one sentence on each thing that was left out or decided. why: one on why the images are decoded or encoded.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split | Encoded
    val: Split | Encoded
    test: Split | Encoded
    notes: tuple[str, ...] = ()
    extra: Split | None = None  # more training images, not counted in `train`
    why: str = ""

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
    return _stats_of([images])


def _stats_of(batches: Iterable[Tensor]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """`channel_stats` of all images of the batches together."""
    sums, count = 0, 0
    for images in batches:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.numel() == 0:
            raise ValueError(f"images must be uint8 (N, H, W, 3) and not empty, not {images.dtype} {tuple(images.shape)}")
        pixels_an_image = images.shape[1] * images.shape[2]
        for piece in images.split(max(1, 2**20 // pixels_an_image)):
            values = piece.reshape(-1, 3).to(torch.int32)
            sums += torch.stack([values.sum(0, dtype=torch.int64), (values * values).sum(0, dtype=torch.int64)])
        count += len(images) * pixels_an_image
    totals, squares = sums.tolist()
    mean = tuple(total / (255 * count) for total in totals)
    std = tuple(math.sqrt(count * sq - total**2) / (255 * count) for total, sq in zip(totals, squares, strict=True))
    return mean, std


def image_stats(split: Split | Encoded) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """`channel_stats` of a split: of all its images, or, where they are encoded, of at most 2,000 fixed class-stratified ones."""
    if isinstance(split, Encoded):
        few = split.subset(STATS_IMAGES)
        pieces = torch.arange(len(few)).split(max(1, STATS_PIXELS // few.image_size**2))
        return _stats_of(few.gather(indices) for indices in pieces)
    return channel_stats(split.images)


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
    """Kind and path, or variant, of a source string ("" where it has none). UserError with the list and the nearest name."""
    kind, colon, path = source.strip().partition(":")
    forms = [known for known in SOURCES if known.partition(":")[0] == kind]
    if not forms:
        hint = did_you_mean(kind.lower(), [known.partition(":")[0] for known in SOURCES])
        raise UserError(f"data source {source!r} is unknown, and must be one of {', '.join(SOURCES)}{hint}")
    if forms[0].endswith(":PATH"):
        if not path:
            raise UserError(f"data source {source!r} names no path, and must be {forms[0]}")
    elif colon and f"{kind}:{path}" not in forms:
        if len(forms) > 1:
            raise UserError(f"data source {source!r} must be one of {', '.join(forms)}{did_you_mean(source.strip(), forms)}")
        raise UserError(f"data source {source!r} must be {kind!r} alone, since it takes no path")
    return kind, path


def _check_settings(
    kind: str, limit: int | None, val_fraction: float, split_seed: int, backend: str, of_folders: dict[str, object]
) -> None:  # fmt: skip
    if not 0 < val_fraction <= 0.5:
        raise UserError(f"val_fraction is {val_fraction} and must lie in (0, 0.5]")
    if not 0 <= split_seed < 2**32:
        raise UserError(f"split_seed is {split_seed} and must lie in [0, {2**32 - 1}]")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit} and must be a positive number of images")
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r} and must be one of {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}")
    for name, value in of_folders.items():
        kinds, purpose = FOLDER_SETTINGS[name]
        if value is not None and kind not in kinds:
            raise UserError(f"{name} is {value}, and it must be left out for {kind}: {purpose} only")
    image_size = of_folders["image_size"]
    if image_size is not None and not 1 <= image_size <= 4096:
        raise UserError(f"image_size is {image_size} and must lie in [1, 4096] pixels")


def _memory(count: int) -> str:
    return f"{count / 1e6:,.0f} MB of uint8"


def why_encoded(backend: str, budget: int | None, augment: str, needed: int, larger: bool) -> str:
    """The reason to keep images as the JPEG or PNG bytes that they are, or "" where they are to be decoded into memory.

    needed: bytes of all of them as uint8. larger: whether most stored images are larger than those that are made of them.
    """
    if backend in ("dali", "torch"):
        return f"the {backend} backend decodes them batch by batch"
    if backend == "auto" and larger and augment in CROPS_OF_STORED:
        return f"the crops of {augment} are taken from the stored images, which are larger"
    if backend == "auto" and budget is not None and needed > budget:
        return f"{_memory(needed)} are more than the {_memory(budget)} that there is room for"
    return ""


def _read_folder(
    place: Path, image_size: int | None, skip_broken: bool, backend: str, budget: int | None, augment: str, choice: dict
) -> tuple[Arrays | EncodedSet, str]:  # fmt: skip
    """The folder and why it is decoded or not. choice: the other arguments of `folder.choose`."""
    chosen = folder.choose(place, skip_broken=skip_broken, **choice)
    needed = chosen.bytes_decoded(image_size)
    larger = image_size is not None and chosen.larger_than(image_size)
    why = why_encoded(backend, budget, augment, needed, larger)
    if why:
        return folder.indexed(chosen, skip_broken=skip_broken, image_size=image_size), f"kept as JPEG and PNG files: {why}"
    crops = "; crops are cut out of the decoded squares" if larger and augment in CROPS_OF_STORED else ""
    return folder.decoded(
        chosen, skip_broken=skip_broken, image_size=image_size
    ), f"decoded into memory: {_memory(needed)}{crops}"


def _stand_in(found: EncodedSet) -> Arrays:
    """Arrays of the shapes and labels of encoded images, in no memory, for `check_arrays`."""
    images = {
        part: np.broadcast_to(np.uint8(0), (len(split), *split.image_shape, 3))
        for part, split in (("train", found.train), ("test", found.test))
    }
    train, test = found.train.labels.numpy(), found.test.labels.numpy()
    return Arrays(found.class_names, images["train"], train, images["test"], test, notes=found.notes)


def _as_split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))


def _with_own_validation(train: Split, val: Split, limit: int | None, split_seed: int) -> tuple[Split, Split]:
    """Train and val as the source has them; `limit` counts both, in proportion."""
    boundary = len(train)
    labels = np.concatenate([train.labels.numpy(), val.labels.numpy()])
    groups = 2 * labels + (np.arange(len(labels)) >= boundary)
    chosen = limited(groups, limit, random_state(split_seed, TRAIN_LIMIT_STREAM))
    if chosen is None:
        return train, val
    return train.take(chosen[chosen < boundary]), val.take(chosen[chosen >= boundary] - boundary)


def _with_drawn_validation(
    whole: Split | Encoded, limit: int | None, val_fraction: float, split_seed: int, where: str
) -> tuple[Split, Split] | tuple[Encoded, Encoded]:
    """Train, and a class-stratified val taken out of it; every class keeps a training image."""
    labels = whole.labels.numpy()
    chosen = limited(labels, limit, random_state(split_seed, TRAIN_LIMIT_STREAM))
    chosen = np.arange(len(labels)) if chosen is None else chosen
    count = max(1, round(val_fraction * len(chosen)))
    in_val = stratified_choice(labels[chosen], count, random_state(split_seed, VAL_STREAM), leave=1)
    if len(in_val) == 0:
        raise UserError(
            f"{where}: no class has two training images, and every class must keep one when the validation split is taken out"
        )
    return whole.take(np.delete(chosen, in_val)), whole.take(chosen[in_val])


def _decoded(splits: list[Encoded], where: str) -> list[Split]:
    try:
        return [Split(split.decode(range(len(split))), split.labels) for split in splits]
    except MemoryError as error:
        count, (height, width) = sum(map(len, splits)), splits[0].image_shape
        raise UserError(
            f"{where}: {count:,} images of {height}x{width} do not fit into memory: --data.limit takes fewer"
        ) from error


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
    classes: str | Path | None = None,
    labels: str | Path | None = None,
    backend: str = "auto",
    budget: int | None = None,
    augment: str = "crop_flip",
) -> ImageSet:
    """Load a data set.

    source: one of SOURCES. root: where the CIFAR archives are; else $FASTANCHOR_DATA, else ~/.cache/fastanchor.
    limit: at most so many images of train and val together and so many of test, class-stratified.
    val_fraction: share of the training set, in (0, 0.5], that becomes the class-stratified validation split; an npz
    file with val_images has its own. split_seed: the only seed of all these choices; torch's and numpy's global
    generators are not touched. skip_broken, image_size, classes, labels: for folder:, see `folder.read`; image_size for
    packed: too. download: for cifar10 and cifar100, fetch the archive where it is missing.
    backend: what is to feed the training. Images of folder: and packed: are decoded for "resident"; of a folder they stay files
    for "dali" and "torch"; "auto" keeps them encoded where they would need more than `budget` bytes as uint8 (None: no limit), or
    where `augment` takes its crops from stored images that are larger. The same images are in the same splits either way.
    Raises UserError for anything wrong with the source, the files or the settings.
    """
    kind, path = parse(source)
    of_folders = {"image_size": image_size, "classes": classes, "labels": labels}
    _check_settings(kind, limit, val_fraction, split_seed, backend, of_folders)
    data_root = Path(root or os.environ.get("FASTANCHOR_DATA") or "~/.cache/fastanchor").expanduser()
    place = Path(path).expanduser()
    readers: dict[str, Callable[[], Arrays | EncodedSet]] = {
        "digits": lambda: _digits(split_seed),
        "synthetic": lambda: _synthetic(split_seed),
        "cifar10": lambda: cifar.read("cifar10", data_root, download=download),
        "cifar100": lambda: cifar.read("cifar100", data_root, coarse=path == "coarse", download=download),
        "npz": lambda: npz.read(place),
        "packed": lambda: packed.read(place, image_size=image_size),
    }
    if kind == "folder":
        choice = {"limit": limit, "split_seed": split_seed}
        choice |= {name: Path(file).expanduser() for name, file in (("classes", classes), ("labels", labels)) if file is not None}
        found, why = _read_folder(place, image_size, skip_broken, backend, budget, augment, choice)
    else:
        found, why = readers[kind](), ""
    encoded = isinstance(found, EncodedSet)
    arrays = _stand_in(found) if encoded else found
    where = shown(place) if f"{kind}:PATH" in SOURCES else source.strip()
    check_arrays(arrays, where)
    check_limit(limit, len(arrays.class_names))
    whole = found.train if encoded else _as_split(arrays.train_images, arrays.train_labels)
    test = found.test if encoded else _as_split(arrays.test_images, arrays.test_labels)
    if arrays.val_images is None:
        train, val = _with_drawn_validation(whole, limit, val_fraction, split_seed, where)
    else:
        train, val = _with_own_validation(whole, _as_split(arrays.val_images, arrays.val_labels), limit, split_seed)
    in_test = limited(test.labels.numpy(), limit, random_state(split_seed, TEST_LIMIT_STREAM))
    splits = [train, val, test if in_test is None else test.take(in_test)]
    if not why:
        needed = sum(3 * math.prod(split.image_shape) * len(split) for split in splits)
        larger = encoded and bool((train.sizes.amax(0) > train.image_size).float().mean() > 0.5)
        why = why_encoded(backend, budget, augment, needed, larger) if encoded else ""
        if encoded and not why:
            splits = _decoded(splits, where)
        why = f"kept as JPEG and PNG bytes in shards: {why}" if why else f"decoded into memory: {_memory(needed)}"
    return ImageSet(source.strip(), arrays.class_names, *splits, arrays.notes, why=why)
