"""Reads a data set from one .npz file; every fault is told by the file, the key and the index, nothing is unpickled."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastanchor.data.arrays import Arrays
from fastanchor.data.files import open_regular, reason, shown
from fastanchor.errors import UserError

REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
VALIDATION = ("val_images", "val_labels")


def _load(path: Path) -> dict[str, np.ndarray]:
    """The arrays that we know by name; other keys in the file are not read."""
    key, found = None, {}
    try:
        with open_regular(path) as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, Mapping):
                for key in (*REQUIRED, *VALIDATION, "class_names"):
                    if key in archive:
                        found[key] = archive[key]
    except Exception as error:  # a damaged zip file or array header can raise anything
        place = f"{shown(path)}: {key}" if key else shown(path)
        raise UserError(f"{place} cannot be read as .npz data: {reason(error)}") from error
    if not isinstance(archive, Mapping):
        raise UserError(f"{shown(path)} is a single array, and an .npz file with {', '.join(REQUIRED)} is needed")
    return found


def _pixels(array: np.ndarray, where: str) -> np.ndarray:
    """uint8 (N, H, W, 3) from uint8 or from floats in [0, 1], of shape (N, H, W, 3), (N, H, W, 1) or (N, H, W)."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise UserError(f"{where} is of type {array.dtype}, and images must be uint8, or floats in [0, 1]")
    grey = array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 1)
    if (not grey and (array.ndim != 4 or array.shape[3] != 3)) or 0 in array.shape[1:]:
        raise UserError(f"{where} has shape {array.shape}, and images must be (N, H, W, 3), or (N, H, W) for grey ones")
    if array.dtype != np.uint8:
        array = _quantised(array, where)
    if grey:
        array = np.repeat(array.reshape(*array.shape[:3], 1), 3, axis=3)
    return np.ascontiguousarray(array)


def _quantised(array: np.ndarray, where: str) -> np.ndarray:
    """Floats in [0, 1] to the nearest of 256 levels, a piece at a time so that no second large float array exists."""
    levels = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), 1024):
        piece = array[start : start + 1024]
        # Written so that NaN, for which every comparison is false, counts as bad.
        bad = ~((piece >= 0) & (piece <= 1))
        if bad.any():
            first, *rest = (int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
            index = ", ".join(str(i) for i in (first + start, *rest))
            value = piece[(first, *rest)]
            raise UserError(f"{where}[{index}] is {value}, and float images must lie in [0, 1]")
        levels[start : start + 1024] = np.rint(piece.astype(np.float64) * 255)
    return levels


def _labels(array: np.ndarray, images: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UserError(f"{where} is {array.dtype} of shape {array.shape}, and labels must be integers of shape (N,)")
    if len(array) != len(images):
        raise UserError(f"{where} has {len(array)} entries for {len(images)} images, and there must be one an image")
    return array


def _class_names(found: dict[str, np.ndarray], path: Path) -> tuple[str, ...]:
    """The file's names, or "0", "1", ... up to the largest training label; then every label below it must occur."""
    if "class_names" in found:
        names = found["class_names"]
        if names.ndim != 1 or names.dtype.kind != "U":
            raise UserError(
                f"{shown(path)}: class_names is {names.dtype} of shape {names.shape}, and it must be a list of strings"
            )
        return tuple(str(name) for name in names)
    labels = np.unique(found["train_labels"])
    expected = np.arange(len(labels))
    if (labels != expected).any():
        first = int((labels != expected).argmax())
        if labels[first] < 0:
            index = int((found["train_labels"] == labels[first]).argmax())
            raise UserError(f"{shown(path)}: train_labels[{index}] is {labels[first]}, and labels start at 0")
        raise UserError(
            f"{shown(path)}: no training image has label {first} although {labels[-1]} occurs, "
            "and without class_names the labels must be 0, 1, 2 and so on without a gap"
        )
    return tuple(str(label) for label in labels)


def read(path: Path) -> Arrays:
    """Read an .npz file.

    Keys: train_images, train_labels, test_images, test_labels; optional val_images with val_labels, and class_names.
    Images are uint8 or floats in [0, 1] (rounded to 256 levels), (N, H, W, 3) or grey (N, H, W); labels integers (N,).
    Raises UserError, with the key and where it applies the index, for every deviation.
    """
    found = _load(path)
    missing = [key for key in REQUIRED if key not in found]
    if missing:
        raise UserError(f"{shown(path)} has no {missing[0]}, and {', '.join(REQUIRED)} are needed")
    given = [key for key in VALIDATION if key in found]
    if len(given) == 1:
        raise UserError(f"{shown(path)} has {given[0]} alone, and val_images and val_labels come together or not at all")
    fields = {}
    for split in ("train", "test", "val") if given else ("train", "test"):
        images = _pixels(found[f"{split}_images"], f"{shown(path)}: {split}_images")
        fields[f"{split}_images"] = images
        fields[f"{split}_labels"] = _labels(found[f"{split}_labels"], images, f"{shown(path)}: {split}_labels")
    return Arrays(class_names=_class_names(found, path), **fields)
