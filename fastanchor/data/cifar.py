"""CIFAR-10 and CIFAR-100 from their official Python archives, without torchvision.

The archives hold pickles. A file's checksum is compared before a byte of it is unpickled, on the very bytes that are
used then; the unpickler admits numpy arrays and plain Python values only.
"""

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastanchor.data.arrays import Arrays
from fastanchor.data.files import open_regular, present, reason, shown
from fastanchor.errors import UserError

# The largest genuine file, cifar-10-python.tar.gz, has 163 MiB: more than this is never kept in memory.
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Edition:
    """One published data set: where it is, how its files are called, what their checksums are."""

    url: str
    archive: str
    sha256: str
    size: int  # bytes
    md5: str  # of the archive, which is what torchvision's downloader checks
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels_key: str
    names_key: str
    file_md5: dict[str, str]
    coarse: tuple[str, str] | None = None  # keys of labels and names of groups of classes, where it has them


EDITIONS = {
    "cifar10": Edition(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive="cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        size=170_498_071,
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels_key="labels",
        names_key="label_names",
        file_md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": Edition(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive="cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        size=169_001_437,
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels_key="fine_labels",
        names_key="fine_label_names",
        file_md5={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        coarse=("coarse_labels", "coarse_label_names"),
    ),
}

# Rebuilds an array from its pickle. Taken from an array, because its module was renamed in numpy 2.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Looks names up in a table instead of importing them."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file has no need of")
        return _ADMITTED[module, name]


def unpickle(data: bytes, where: str) -> dict:
    """The dictionary in a CIFAR pickle (Python 2 strings read as Latin-1). UserError for any other content."""
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a malformed pickle can raise anything
        raise UserError(f"{where} was refused as a CIFAR file: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} was refused as a CIFAR file: it holds a {type(content).__name__}, not a dictionary")
    return content


def read_checked(path: Path, algorithm: str, expected: str, size: int | None = None) -> bytes:
    """The file's bytes if their checksum (and size in bytes, where known) is the expected one, UserError otherwise."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    kept, found_size = [], 0
    try:
        with open_regular(path) as file:
            while piece := file.read(2**22):
                digest.update(piece)
                found_size += len(piece)
                if found_size <= (size or MAX_BYTES):
                    kept.append(piece)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {reason(error)}") from error
    if digest.hexdigest() != expected or found_size != (size or found_size) or found_size > MAX_BYTES:
        expected_size = f" and {size:,} bytes" if size else ""
        raise UserError(
            f"{shown(path)} is truncated or altered: expected {algorithm} {expected}{expected_size}, "
            f"found {algorithm} {digest.hexdigest()} and {found_size:,} bytes; nothing in it was used"
        )
    return b"".join(kept)


def _from_archive(edition: Edition, path: Path) -> Callable[[str], tuple[bytes, str]]:
    """A function that gives a member's bytes and its name for messages. The archive is read in memory, in one pass."""
    data = read_checked(path, "sha256", edition.sha256, edition.size)
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if folder == edition.folder and name in edition.file_md5 and member.isreg() and member.size <= MAX_BYTES:
                    members[name] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{shown(path)} cannot be read as a .tar.gz archive: {reason(error)}") from error

    def member_bytes(name: str) -> tuple[bytes, str]:
        where = f"{shown(path)}: {edition.folder}/{name}"
        if name not in members:
            raise UserError(f"{where} is not in the archive")
        return members[name], where

    return member_bytes


def _from_folder(edition: Edition, path: Path) -> Callable[[str], tuple[bytes, str]]:
    return lambda name: (read_checked(path / name, "md5", edition.file_md5[name]), shown(path / name))


def _batch(edition: Edition, data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,) of one file, which stores rows of three 32x32 colour planes."""
    content = unpickle(data, where)
    rows, labels = content.get("data"), content.get(edition.labels_key)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        raise UserError(f"{where} was refused as a CIFAR file: 'data' must be a uint8 array of shape (N, 3072)")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(type(label) is int for label in labels):
        raise UserError(f"{where} was refused as a CIFAR file: {edition.labels_key!r} must list one integer an image")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64)


def _download(edition: Edition, root: Path) -> None:
    by_hand = f"put {edition.archive} from {edition.url} into {shown(root)} by hand"
    try:
        from torchvision.datasets.utils import download_url
    except (ImportError, RuntimeError) as error:
        # RuntimeError: a CUDA build of torchvision beside a CPU build of torch misses its own operators.
        raise UserError(
            f"--data.download needs torchvision, which cannot be imported here ({reason(error)}): "
            f'`pip install "fastanchor[vision]"`, or {by_hand}'
        ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        download_url(edition.url, str(root), filename=edition.archive, md5=edition.md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the download of {edition.url} into {shown(root)} failed ({reason(error)}): try again, or {by_hand}"
        ) from error


def read(name: str, root: Path, *, coarse: bool = False, download: bool = False) -> Arrays:
    """CIFAR-10 or CIFAR-100, official train and test parts in official order.

    name: "cifar10" or "cifar100". root: the folder in which the archive or its extracted folder lies; a complete
    extracted folder is used first. coarse: cifar100's 20 groups of five classes in place of its 100 classes. download: fetch
    the archive with torchvision where neither is there.
    Raises UserError where the data are missing, altered or not what they should be; ValueError for coarse labels of cifar10.
    """
    edition = EDITIONS[name]
    if coarse:
        if edition.coarse is None:
            raise ValueError(f"{name} has no coarse labels")
        labels_key, names_key = edition.coarse
        edition = replace(edition, labels_key=labels_key, names_key=names_key)
    folder, archive = root / edition.folder, root / edition.archive
    if download and not present(folder) and not present(archive):
        _download(edition, root)
    if all(present(folder / file) for file in edition.file_md5):
        member_bytes = _from_folder(edition, folder)
    elif present(archive):
        member_bytes = _from_archive(edition, archive)
    else:
        raise UserError(
            f"{name} was looked for in {shown(root)} and neither the archive {edition.archive} nor a complete folder "
            f"{edition.folder} is there: put the archive there (it comes from {edition.url}), "
            'or add --data.download with torchvision installed (`pip install "fastanchor[vision]"`)'
        )
    data, where = member_bytes(edition.meta)
    names = unpickle(data, where).get(edition.names_key)
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise UserError(f"{where} was refused as a CIFAR file: {edition.names_key!r} must be a list of class names")
    batches = [_batch(edition, *member_bytes(file)) for file in edition.train]
    test_images, test_labels = _batch(edition, *member_bytes(edition.test))
    return Arrays(
        class_names=tuple(names),
        train_images=np.ascontiguousarray(np.concatenate([images for images, _ in batches])),
        train_labels=np.concatenate([labels for _, labels in batches]),
        test_images=np.ascontiguousarray(test_images),
        test_labels=test_labels,
    )
