"""Image folders: decoded into memory, or kept as files of which only the headers are read; for their layouts see `listing`.

Which files are used is settled before the first one is decoded, so that a few images of a large folder are quick.
"""

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastanchor.data import listing
from fastanchor.data.arrays import (
    TEST_LIMIT_STREAM,
    TRAIN_LIMIT_STREAM,
    Arrays,
    check_limit,
    limited,
    listed,
    random_state,
)
from fastanchor.data.decode import PIXELS_WORTH_THREADS, BrokenImage, decode, header, read_file, threads
from fastanchor.data.encoded import Encoded, EncodedSet
from fastanchor.data.files import shown
from fastanchor.errors import UserError

PROBED_FILES = 101
FILES_A_TASK = 64
Size = tuple[int, int]  # (H, W)


class Files:
    """The store (see `encoded.Store`) of images that are files. A million names take some 30 bytes each, pickled as well."""

    hint = listing.SKIP.format("files")

    def __init__(self, paths: Sequence[str]):
        folders: dict[str, int] = {}
        names = []
        self._folder_of = np.empty(len(paths), np.int32)
        for index, path in enumerate(paths):
            folder, name = os.path.split(path)
            self._folder_of[index] = folders.setdefault(folder, len(folders))
            names.append(os.fsencode(name))
        self._folders = tuple(folders)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._names = b"".join(names)
        self._digest: bytes | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """The path of file number `index`."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self._folders[self._folder_of[index]], os.fsdecode(self._names[start : self._ends[index]]))

    def read(self, index: int) -> bytes:
        """Its bytes. BrokenImage."""
        return read_file(self.name(index))

    def digest(self) -> bytes:
        """Of all names, as seen from the folder that they have in common, and of all files' sizes, which are looked up once."""
        if self._digest is None:
            found = hashlib.blake2b(digest_size=16)
            common = os.path.commonpath(self._folders) if self._folders else ""
            for folder in self._folders:
                found.update(os.fsencode(os.path.relpath(folder, common)) + b"\0")
            for part in (self._folder_of, self._ends, self._names, np.array([_bytes_of(self.name(i)) for i in range(len(self))])):
                found.update(part)
            self._digest = found.digest()
        return self._digest


def _bytes_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # told, with its reason, when its turn comes


@dataclass(frozen=True)
class Chosen:
    """The files of a folder that are used, by part ("train", "test"): paths, str objects (N,), and labels, int64 (N,).

    sizes: how many of about a hundred training files have which stored (H, W). slow: whether reading these meant waiting.
    """

    found: listing.Listing
    paths: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    sizes: Counter
    slow: bool

    @property
    def size(self) -> Size:
        """The most frequent stored (H, W)."""
        # No file readable: any size will do, since the decoding finds every one of them broken.
        return self.sizes.most_common(1)[0][0] if self.sizes else (1, 1)

    def bytes_decoded(self, image_size: int | None) -> int:
        """What all images take as uint8 in memory."""
        height, width = (image_size, image_size) if image_size else self.size
        return 3 * height * width * sum(len(labels) for labels in self.labels.values())

    def larger_than(self, image_size: int) -> bool:
        """Whether most stored images are."""
        return 2 * sum(n for size, n in self.sizes.items() if max(size) > image_size) > self.sizes.total()


def choose(
    root: Path,
    *,
    limit: int | None = None,
    split_seed: int = 0,
    skip_broken: bool = False,
    classes: Path | None = None,
    labels: Path | None = None,
) -> Chosen:
    """The first half of `read` and `index`, with their arguments: all that can be said without decoding. Raises UserError."""
    found = listing.find(root, classes=classes, labels=labels, skip_broken=skip_broken)
    check_limit(limit, len(found.names))
    paths, of = {}, {}
    for part, folder, stream in (("train", "train", TRAIN_LIMIT_STREAM), ("test", found.held_out, TEST_LIMIT_STREAM)):
        paths[part], of[part] = found.files(folder)
        chosen = limited(of[part], limit, random_state(split_seed, stream))
        if chosen is not None:
            paths[part], of[part] = paths[part][chosen], of[part][chosen]
    wall, busy = time.perf_counter(), time.thread_time()
    train = paths["train"]
    sizes = _sizes(train[:: max(1, len(train) // PROBED_FILES)]) or _sizes(train)
    slow = time.perf_counter() - wall > 2 * (time.thread_time() - busy)
    return Chosen(found, paths, of, sizes, slow)


def _sizes(paths: Sequence[str]) -> Counter:
    sizes = Counter()
    for path in paths:
        try:
            found = header(path)
            sizes[found.height, found.width] += 1
        except BrokenImage:
            continue  # told, with its reason, when it is its turn to be decoded
    return sizes


def _each(
    paths: np.ndarray, one: Callable[[int], None], skip_broken: bool, workers: int
) -> tuple[np.ndarray, list[str]]:  # fmt: skip
    """Call `one` with every index, in threads; which did not raise BrokenImage, bool (N,), and the paths of those that did.

    The outcome does not depend on the threads. Without skip_broken the first bad file raises UserError.
    """

    def one_task(start: int) -> list[tuple[int, str]]:
        problems = []
        for index in range(start, min(start + FILES_A_TASK, len(paths))):
            try:
                one(index)
            except BrokenImage as error:
                problems.append((index, str(error)))
                if not skip_broken:
                    break
        return problems

    good, left_out = np.ones(len(paths), bool), []
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        for problems in pool.map(one_task, range(0, len(paths), FILES_A_TASK)):
            for index, text in problems:
                if not skip_broken:
                    raise UserError(f"{shown(paths[index])} {text}; {listing.SKIP.format('files')}")
                good[index] = False
                left_out.append(paths[index])
    finally:
        pool.shutdown(cancel_futures=True)
    return good, left_out


def _check_size(found: Size, size: Size) -> None:
    if found != size:
        raise BrokenImage(
            f"is {found[1]}x{found[0]} where {size[1]}x{size[0]} is expected (--data.image-size N resizes all images)"
        )


@dataclass(frozen=True)
class _Settled:
    """What is left once broken files are known: class names, and by part the indices that stay, (M,), and their new labels."""

    class_names: tuple[str, ...]
    stays: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    notes: tuple[str, ...]


def _settle(chosen: Chosen, good: dict[str, np.ndarray], left_out: list[str], *notes: str) -> _Settled:
    found, of = chosen.found, chosen.labels
    # A class all of whose images turned out to be broken, in train or in test, is as good as an empty one.
    whole = [i for i in range(len(found.names)) if all((of[part][good[part]] == i).any() for part in of)]
    names = [found.names[i] for i in whole]
    if len(whole) < len(found.names):
        files = "file is" if len(left_out) == 1 else "files are"
        found.check_number(len(whole), f" once {len(left_out)} broken or odd-sized {files} left out")
    stays = {part: np.flatnonzero(good[part] & np.isin(of[part], whole)) for part in of}
    labels = {part: np.searchsorted(whole, of[part][stays[part]]) for part in of}
    empty = sorted(found.empty + [name for name in found.names if name not in set(names)])
    notes = [*found.notes, *notes]
    if left_out:
        relative = [os.path.relpath(path, found.root) for path in left_out]
        notes.append(f"Left out {len(left_out)} broken or odd-sized file{'s' if len(left_out) > 1 else ''}: {listed(relative)}.")
    if empty:
        notes.append(f"Left out {len(empty)} class{'es' if len(empty) > 1 else ''} without images: {listed(empty)}.")
    return _Settled(tuple(found.title(name) for name in names), stays, labels, tuple(notes))


def _decode_all(paths: np.ndarray, size: Size, image_size: int | None, skip_broken: bool, workers: int):
    """Images uint8 (N, H, W, 3), and what `_each` says of them."""
    try:
        images = np.empty((len(paths), *size, 3), np.uint8)
    except MemoryError as error:
        raise UserError(
            f"{len(paths):,} images of {size[1]}x{size[0]} do not fit into memory: "
            "--data.limit takes fewer, --data.image-size makes them smaller"
        ) from error

    def one(index: int) -> None:
        image = decode(paths[index], image_size)
        _check_size(image.shape[:2], size)
        images[index] = image

    return images, *_each(paths, one, skip_broken, workers)


def decoded(chosen: Chosen, *, skip_broken: bool, image_size: int | None) -> Arrays:
    """The second half of `read`."""
    size = (image_size, image_size) if image_size else chosen.size
    workers = threads() if math.prod(chosen.size) >= PIXELS_WORTH_THREADS else 1
    images, good, left_out = {}, {}, []
    for part, paths in chosen.paths.items():
        images[part], good[part], bad = _decode_all(paths, size, image_size, skip_broken, workers)
        left_out += bad
    settled = _settle(chosen, good, left_out)
    images = {
        part: images[part] if len(stays) == len(images[part]) else images[part][stays] for part, stays in settled.stays.items()
    }
    return Arrays(
        class_names=settled.class_names,
        train_images=images["train"],
        train_labels=settled.labels["train"],
        test_images=images["test"],
        test_labels=settled.labels["test"],
        notes=settled.notes,
    )


def indexed(chosen: Chosen, *, skip_broken: bool, image_size: int | None) -> EncodedSet:
    """The second half of `index`."""
    size = chosen.size
    if image_size is None and size[0] != size[1]:
        raise UserError(
            f"{shown(chosen.found.root)} has images of {size[1]}x{size[0]}, and images that are kept as files are made square: "
            "--data.image-size N says their side"
        )
    # Headers are the interpreter's work, for which threads would only wait in turn, unless the disk is what is waited for.
    workers = threads() if chosen.slow or (skip_broken and math.prod(size) >= PIXELS_WORTH_THREADS) else 1
    sizes, odd, good, left_out = {}, {}, {}, []
    for part, paths in chosen.paths.items():
        sizes[part], odd[part] = np.zeros((2, len(paths)), np.int64), np.zeros(len(paths), bool)

        def one(index: int, paths=paths, sizes=sizes[part], odd=odd[part]) -> None:
            found = header(paths[index], whole=skip_broken)
            if image_size is None:
                _check_size((found.height, found.width), size)
            sizes[:, index], odd[index] = (found.height, found.width), found.odd

        good[part], bad = _each(paths, one, skip_broken, workers)
        left_out += bad
    # The header of a truncated file is whole.
    checked = [f"Checked {sum(map(len, good.values())):,} files by decoding each once."] if skip_broken else []
    settled = _settle(chosen, good, left_out, *checked)
    parts = {}
    for part, stays in settled.stays.items():
        parts[part] = Encoded(
            Files(chosen.paths[part][stays]),
            np.arange(len(stays)),
            torch.from_numpy(settled.labels[part]),
            torch.from_numpy(sizes[part][:, stays]),
            odd[part][stays],
            image_size or size[0],
        )
    return EncodedSet(settled.class_names, parts["train"], parts["test"], settled.notes)


def read(
    root: Path,
    *,
    limit: int | None = None,
    split_seed: int = 0,
    skip_broken: bool = False,
    image_size: int | None = None,
    classes: Path | None = None,
    labels: Path | None = None,
) -> Arrays:
    """Read an image folder into memory; labels follow the sorted names of the folders in PATH/train, or `classes`.

    limit: at most so many files of train and of test, class-stratified, chosen by split_seed before any is decoded.
    image_size: side length in pixels to which all images are brought, see `decode`; without it all must have one size.
    skip_broken: leave out (and put into the notes) unusable and odd-sized files and classes without images.
    classes: a file that lists the class folders to use, one a line, in the order of labels. labels: a CSV of file,class to check
    the folder against. Raises UserError naming the file, class or line.
    """
    chosen = choose(root, limit=limit, split_seed=split_seed, skip_broken=skip_broken, classes=classes, labels=labels)
    return decoded(chosen, skip_broken=skip_broken, image_size=image_size)


def index(
    root: Path,
    *,
    limit: int | None = None,
    split_seed: int = 0,
    skip_broken: bool = False,
    image_size: int | None = None,
    classes: Path | None = None,
    labels: Path | None = None,
) -> EncodedSet:
    """As `read`, for the same files in the same order, but the images stay files and only their headers are read.

    image_size: side length of the squares made of them; without it all must be stored as squares of one size. A truncated file,
    whose header is whole, is found when its turn comes; with skip_broken every file is decoded once to leave such ones out.
    """
    chosen = choose(root, limit=limit, split_seed=split_seed, skip_broken=skip_broken, classes=classes, labels=labels)
    return indexed(chosen, skip_broken=skip_broken, image_size=image_size)
