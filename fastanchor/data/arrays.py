"""What every reader returns, the checks common to all sources, and class-stratified choices.

All choices come from `numpy.random.RandomState`, whose stream is frozen: the same split on every numpy version.
"""

from dataclasses import dataclass

import numpy as np

from fastanchor.errors import UserError

# One stream of random numbers for each purpose, so that changing one choice leaves the others as they are.
TEST_STREAM, TRAIN_LIMIT_STREAM, TEST_LIMIT_STREAM, VAL_STREAM, PIXEL_STREAM, SUBSET_STREAM = range(6)


@dataclass(frozen=True)
class Arrays:
    """Images uint8 (N, H, W, 3) and integer labels (N,) as read; `val_*` only where the source has a split of its own."""

    class_names: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    val_images: np.ndarray | None = None
    val_labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def random_state(split_seed: int, stream: int) -> np.random.RandomState:
    return np.random.RandomState([split_seed, stream])


def stratified_choice(
    groups: np.ndarray, total: int, rng: np.random.RandomState, *, at_least: int = 0, leave: int = 0
) -> np.ndarray:
    """Sorted indices of `total` items of which every group has its proportional share (largest remainders).

    groups: (N,) integers >= 0. Every group gives at least `at_least` items (or all it has) and keeps `leave` of them;
    what cannot be taken under these two rules is left out of `total`. Ties between remainders are broken by `rng`.
    """
    counts = np.bincount(groups)
    highest = np.maximum(counts - leave, 0)
    lowest = np.minimum(highest, at_least)
    total = int(np.clip(total, lowest.sum(), highest.sum()))
    ideal = counts * (total / max(len(groups), 1))
    take = np.clip(np.floor(ideal).astype(np.int64), lowest, highest)
    ties = rng.random_sample(len(counts))
    while take.sum() != total:
        step = 1 if take.sum() < total else -1
        movable = np.flatnonzero(take < highest if step > 0 else take > lowest)
        # Rounded, so that shares equal on paper are equal here on every machine.
        want = np.round(step * (ideal - take)[movable], 9)
        take[movable[np.lexsort((ties[movable], want))[-1]]] += step
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(counts)[:-1])
    chosen = [rng.permutation(group)[:n] for group, n in zip(members, take, strict=True)]
    return np.sort(np.concatenate(chosen))


def check_limit(limit: int | None, classes: int) -> None:
    """UserError where `limit` images could not hold two of every class: one to train on and one to validate on."""
    if limit is not None and limit < 2 * classes:
        raise UserError(f"limit is {limit} and must be at least {2 * classes}, two images for each of {classes} classes")


def limited(groups: np.ndarray, limit: int | None, rng: np.random.RandomState) -> np.ndarray | None:
    """Sorted indices of at most `limit` items, at least one from every group; None where all may stay."""
    if limit is None or limit >= len(groups):
        return None
    return stratified_choice(groups, limit, rng, at_least=1)


def check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """UserError with the index of the first label outside [0, classes)."""
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        index = int(bad.argmax())
        raise UserError(f"{where}[{index}] is {labels[index]}, and labels must lie in [0, {classes})")


def check_arrays(arrays: Arrays, where: str) -> None:
    """The rules that hold for every source; `where` names it in the UserError.

    Every split non-empty, of one image size, its labels in range; at least two classes, every one of them trained on.
    """
    classes = len(arrays.class_names)
    for split in ("train", "val", "test"):
        images, labels = getattr(arrays, f"{split}_images"), getattr(arrays, f"{split}_labels")
        if split == "val" and images is None:
            continue
        if len(images) == 0:
            raise UserError(f"{where} has no {split} images")
        if images.shape[1:] != arrays.train_images.shape[1:]:
            (h, w), (train_h, train_w) = images.shape[1:3], arrays.train_images.shape[1:3]
            raise UserError(
                f"{where}: {split} images are {h}x{w} and training images {train_h}x{train_w}, and all must have one size"
            )
        check_labels(labels, classes, f"{where}: {split}_labels")
    if classes < 2:
        raise UserError(f"{where} has {classes} class, and at least 2 are needed")
    untrained = np.flatnonzero(np.bincount(arrays.train_labels.astype(np.int64), minlength=classes) == 0)
    if len(untrained):
        name = arrays.class_names[untrained[0]]
        raise UserError(f"{where}: class {name!r} (label {untrained[0]}) has no training image, and every class needs one")


def listed(names: list[str], shown: int = 5) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more
