"""Image folders: PATH/train/CLASS/*.jpg|jpeg|png and PATH/test/CLASS/*, read with Pillow in a few threads.

Which files are used is settled before the first one is decoded, so that a few images of a large folder are quick.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastanchor.data.arrays import (
    TEST_LIMIT_STREAM,
    TRAIN_LIMIT_STREAM,
    Arrays,
    check_limit,
    limited,
    listed,
    random_state,
)
from fastanchor.data.decode import PIXELS_WORTH_THREADS, BrokenImage, decode, header, threads
from fastanchor.data.files import reason, shown
from fastanchor.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")
PROBED_FILES = 101
FILES_A_TASK = 64
Size = tuple[int, int]  # (H, W)


def _scan(folder: Path) -> dict[str, list[str]]:
    """File names by class name, both sorted; hidden entries and files beside the class folders do not count.

    Only one level is entered, so links in a circle cannot hang it; one that leads nowhere is an empty class.
    """
    classes = {}
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and (_dangling(e) or e.is_dir()))
        for name in names:
            path = folder / name
            if not path.is_dir():
                classes[name] = []
                continue
            with os.scandir(path) as entries:
                classes[name] = sorted(
                    e.name for e in entries if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")
                )
    except FileNotFoundError as error:
        raise UserError(
            f"{shown(folder)} is not there: an image folder has {folder.name}/CLASS/*.jpg, jpeg or png in both train and test"
        ) from error
    except OSError as error:
        raise UserError(f"{shown(error.filename or folder)} cannot be listed: {reason(error)}") from error
    if not classes:
        raise UserError(f"{shown(folder)} has no class folders, and it needs one for each class")
    return classes


def _dangling(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def common_size(paths: Sequence[str]) -> Size:
    """The most frequent (H, W) among about a hundred files spread over all, from their headers alone."""

    def count(some: Sequence[str]) -> Counter:
        sizes = Counter()
        for path in some:
            try:
                found = header(path)
                sizes[found.height, found.width] += 1
            except BrokenImage:
                continue  # told, with its reason, when it is its turn to be decoded
        return sizes

    sizes = count(paths[:: max(1, len(paths) // PROBED_FILES)]) or count(paths)
    # No file readable: any size will do, since the decoding finds every one of them broken.
    return sizes.most_common(1)[0][0] if sizes else (1, 1)


def _decode_all(
    paths: list[str], size: Size, image_size: int | None, skip_broken: bool, workers: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, H, W, 3), which of them are good (N,), and a sentence on each of the others.

    Order and outcome do not depend on the threads. Without skip_broken the first bad file raises UserError.
    """
    try:
        images = np.empty((len(paths), *size, 3), np.uint8)
    except MemoryError as error:
        raise UserError(
            f"{len(paths):,} images of {size[0]}x{size[1]} do not fit into memory: "
            "--data.limit takes fewer, --data.image-size makes them smaller"
        ) from error

    def one_task(start: int) -> list[tuple[int, str]]:
        problems = []
        for index in range(start, min(start + FILES_A_TASK, len(paths))):
            try:
                image = decode(paths[index], image_size)
                if image.shape[:2] != size:
                    raise BrokenImage(
                        f"is {image.shape[0]}x{image.shape[1]} where {size[0]}x{size[1]} is expected "
                        "(--data.image-size N resizes all images)"
                    )
                images[index] = image
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
                    raise UserError(f"{shown(paths[index])} {text}; --data.skip-broken leaves such files out")
                good[index] = False
                left_out.append(paths[index])
    finally:
        pool.shutdown(cancel_futures=True)
    return images, good, left_out


def _without_empty_classes(
    root: Path, train: dict[str, list[str]], test: dict[str, list[str]], skip_broken: bool
) -> tuple[list[str], list[str]]:
    """Class names to use and those left out for having no files. UserError where the two parts differ in classes."""
    differing = sorted(train.keys() ^ test.keys())
    if differing:
        name = differing[0]
        has, lacks = ("train", "test") if name in train else ("test", "train")
        raise UserError(f"{shown(root)}: class {name!r} is in {has} but not in {lacks}, and both need the same classes")
    empty = [name for name in train if not (train[name] and test[name])]
    if empty and not skip_broken:
        part = root / ("test" if train[empty[0]] else "train") / empty[0]
        raise UserError(
            f"class {empty[0]!r} is empty: no jpg, jpeg or png file in {shown(part)}; --data.skip-broken leaves such classes out"
        )
    return [name for name in train if name not in empty], empty


def _check_number(names: list[str], root: Path, when: str = "") -> None:
    if len(names) < 2:
        raise UserError(f"{shown(root)} has {len(names)} classes with images in train and test{when}, and at least 2 are needed")


def _files(folder: Path, classes: dict[str, list[str]], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Paths and labels of all files of the named classes, in the order of classes and then of file names."""
    paths = [os.path.join(folder, name, file) for name in names for file in classes[name]]
    return np.array(paths, object), np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])


def read(
    root: Path,
    *,
    limit: int | None = None,
    split_seed: int = 0,
    skip_broken: bool = False,
    image_size: int | None = None,
) -> Arrays:
    """Read an image folder; class names are the sorted names of the folders in PATH/train.

    limit: at most so many files of train and of test, class-stratified, chosen by split_seed before any is decoded.
    image_size: side length in pixels to which all images are brought, see `decode`; without it all must have one size.
    skip_broken: leave out (and put into the notes) unusable and odd-sized files and classes without images.
    Raises UserError naming the file or class.
    """
    classes = {part: _scan(root / part) for part in ("train", "test")}
    names, empty = _without_empty_classes(root, classes["train"], classes["test"], skip_broken)
    _check_number(names, root)
    check_limit(limit, len(names))
    streams = {"train": TRAIN_LIMIT_STREAM, "test": TEST_LIMIT_STREAM}
    paths, labels = {}, {}
    for part, stream in streams.items():
        paths[part], labels[part] = _files(root / part, classes[part], names)
        chosen = limited(labels[part], limit, random_state(split_seed, stream))
        if chosen is not None:
            paths[part], labels[part] = paths[part][chosen], labels[part][chosen]

    stored = common_size(paths["train"])
    size = (image_size, image_size) if image_size else stored
    workers = threads() if math.prod(stored) >= PIXELS_WORTH_THREADS else 1
    images, left_out = {}, []
    for part in streams:
        images[part], good, bad = _decode_all(list(paths[part]), size, image_size, skip_broken, workers)
        if bad:
            images[part], labels[part] = images[part][good], labels[part][good]
            left_out += [os.path.relpath(path, root) for path in bad]

    # A class all of whose images turned out to be broken, in train or in test, is as good as an empty one.
    whole = [i for i in range(len(names)) if all((labels[part] == i).any() for part in streams)]
    if len(whole) < len(names):
        empty = sorted(empty + [name for i, name in enumerate(names) if i not in whole])
        for part in streams:
            stays = np.isin(labels[part], whole)
            images[part], labels[part] = images[part][stays], np.searchsorted(whole, labels[part][stays])
        names = [names[i] for i in whole]
        _check_number(names, root, f" once {len(left_out)} broken or odd-sized files are left out")

    notes = []
    if left_out:
        notes.append(f"Left out {len(left_out)} broken or odd-sized file{'s' if len(left_out) > 1 else ''}: {listed(left_out)}.")
    if empty:
        notes.append(f"Left out {len(empty)} class{'es' if len(empty) > 1 else ''} without images: {listed(empty)}.")
    return Arrays(
        # A name that is not valid UTF-8 keeps its odd bytes as escapes, so that it can be printed and saved.
        class_names=tuple(name.encode("utf-8", "backslashreplace").decode() for name in names),
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        notes=tuple(notes),
    )
