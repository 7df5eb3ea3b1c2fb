"""Extra images, such as millions of generated ones, from an .npz file that stays on disk, and their union with a training split.

An .npz file that `numpy.savez` writes is a zip archive whose arrays lie in it as they are, so images can be mapped into memory.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from fastanchor.data.arrays import check_labels
from fastanchor.data.files import open_regular, reason, shown
from fastanchor.data.sources import Split
from fastanchor.errors import UserError

# Names of the images' and the labels' array: in the generated sets of Rebuffi et al. 2021 and Wang et al. 2023 (DM-Improves-AT,
# core/data/semisup.py), and in this project's npz files.
KEYS = (("image", "label"), ("train_images", "train_labels"))
# Compressed images cannot be mapped: below this many bytes they are read into memory, above it the file has to be rewritten.
LARGEST_COMPRESSED = 2**30
# Up to this many bytes the images are read once and compared with the archive's checksum; more takes too long at every start.
LARGEST_CHECKED = 2**32
SAMPLES, SAMPLE_BYTES = 64, 2**20  # of the images, for a digest
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, then lengths of name and extra field


class Place(NamedTuple):
    """Where uint8 images lie in a file."""

    path: str
    offset: int
    shape: tuple[int, int, int, int]


@dataclass(frozen=True)
class ExtraSplit(Split):
    """A Split whose images may be a map of a file: then it is pickled as the file's name, for worker processes to map it again.

    place: None where the images are in memory. checksum: of the images, as the archive states it.
    """

    place: Place | None
    checksum: int

    def digest(self) -> bytes:
        """Of the labels, the images' shape and stated checksum, their first and last megabyte and others between: without
        reading gigabytes. The same whether the file is compressed or not."""
        found = hashlib.blake2b(self.labels.numpy(), digest_size=16)
        found.update(repr((tuple(self.images.shape), self.checksum)).encode())
        flat = self.images.view(-1)
        for start in np.linspace(0, max(0, len(flat) - SAMPLE_BYTES), SAMPLES).astype(np.int64).tolist():
            found.update(flat[start : start + SAMPLE_BYTES].numpy())
        return found.digest()

    def __reduce__(self):
        if self.place is None:
            return ExtraSplit, (self.images, self.labels, None, self.checksum)
        return _mapped_again, (self.place, self.labels, self.checksum)


def _mapped_again(place: Place, labels: Tensor, checksum: int) -> ExtraSplit:
    with open(place.path, "rb") as file:
        return ExtraSplit(_map(file, place), labels, place, checksum)


def _map(file: BinaryIO, place: Place) -> Tensor:
    # "c", copy on write: a tensor of a map that is read-only would be warned of, and the file stays as it is here too.
    return torch.from_numpy(np.memmap(file, np.uint8, "c", place.offset, place.shape))


@dataclass(frozen=True)
class Mixed:
    """The images of `real`, and after them those of `extra`, as one split: uint8 (N, H, W, 3) and labels int64 (N,)."""

    real: Split
    extra: Split

    def __post_init__(self):
        if self.real.image_shape != self.extra.image_shape:
            raise ValueError(f"images of {self.extra.image_shape} cannot be mixed with those of {self.real.image_shape}")

    def __len__(self) -> int:
        return len(self.real) + len(self.extra)

    @cached_property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        return torch.cat([self.real.labels, self.extra.labels])

    def __reduce__(self):
        return Mixed, (self.real, self.extra)  # without the labels, which are theirs

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.real.image_shape

    @property
    def images(self) -> Tensor:
        """All of them in memory, uint8 (N, H, W, 3), made anew by every call: for a device that has room for them."""
        return torch.cat([self.real.images, self.extra.images])

    def gather(self, indices: Tensor) -> Tensor:
        """Those images, uint8 (B, H, W, 3), in the order of the indices, int64 (B,) on the CPU."""
        is_extra = indices >= len(self.real)
        images = torch.empty(len(indices), *self.image_shape, 3, dtype=torch.uint8)
        images[~is_extra] = self.real.gather(indices[~is_extra])
        images[is_extra] = self.extra.gather(indices[is_extra] - len(self.real))
        return images

    def digest(self) -> bytes:
        """A digest of both parts."""
        return hashlib.blake2b(self.real.digest() + self.extra.digest(), digest_size=16).digest()


def read_extra(path: str | Path, num_classes: int, image_shape: tuple[int, int]) -> ExtraSplit:
    """The images and labels of an .npz file as a split whose images stay in the file.

    The file holds `image`, uint8 (N, H, W, 3), and `label`, integers (N,) in [0, num_classes); or train_images and train_labels.
    Other arrays are left alone. image_shape: (H, W) that the images must have. Images that `numpy.savez_compressed` wrote are
    read into memory, up to LARGEST_COMPRESSED bytes. Nothing is unpickled; checksums are compared, those of images up to
    LARGEST_CHECKED bytes. The file must stay as it is while the split is in use. Raises UserError, with the key and where it
    applies the index.
    """
    path, key = str(Path(path).expanduser()), None
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {reason(error)}") from error
    try:
        with file, ZipFile(file) as archive:
            names = set(archive.namelist())
            image_key, label_key = _keys(names, path)
            for key in (image_key, label_key):
                if f"{key}.npy" not in names:
                    raise UserError(f"{shown(path)} has no {key}, and extra data needs {image_key} and {label_key}")
            key = label_key
            labels = _labels(_array(archive, key), f"{shown(path)}: {key}")
            key = image_key
            info = archive.getinfo(f"{key}.npy")
            images, place = _images(archive, file, info, path, image_shape, f"{shown(path)}: {key}")
    except UserError:
        raise
    except Exception as error:  # a damaged zip file or array header can raise anything
        where = f"{shown(path)}: {key}" if key else shown(path)
        raise UserError(f"{where} cannot be read as .npz data, which may be truncated or altered: {reason(error)}") from error
    if len(labels) != len(images):
        raise UserError(
            f"{shown(path)}: {label_key} has {len(labels)} entries for {len(images)} images, and there must be one an image"
        )
    check_labels(labels, num_classes, f"{shown(path)}: {label_key}")
    return ExtraSplit(images, torch.from_numpy(labels.astype(np.int64)), place, info.CRC)


def _keys(names: set[str], path: str) -> tuple[str, str]:
    for keys in KEYS:
        if any(f"{key}.npy" in names for key in keys):
            return keys
    listed = " or ".join(f"{images} and {labels}" for images, labels in KEYS)
    raise UserError(f"{shown(path)} has neither of the arrays that extra data needs: {listed}")


def _labels(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UserError(f"{where} is {array.dtype} of shape {array.shape}, and labels must be integers of shape (N,)")
    return array


def _array(archive: ZipFile, key: str) -> np.ndarray:
    """An array read into memory; its checksum is compared with the last byte read."""
    with archive.open(f"{key}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise ValueError("there are bytes behind the array")
        return array


def _images(
    archive: ZipFile, file: BinaryIO, info: ZipInfo, path: str, image_shape: tuple[int, int], where: str
) -> tuple[Tensor, Place | None]:
    """Images uint8 (N, H, W, 3) of an archive's member, and where they are mapped, if they are."""
    with archive.open(info) as member:
        shape, fortran, dtype = _array_header(member)
        header_bytes = member.tell()
    height, width = image_shape
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{where} is {dtype} of shape {shape}, and extra images must be uint8 of shape (N, H, W, 3)")
    if shape[1:3] != (height, width):
        raise UserError(f"{where} has images of {shape[2]}x{shape[1]}, and the training images are {width}x{height}")
    if shape[0] == 0:
        raise UserError(f"{where} has no images")
    if fortran:
        raise UserError(f"{where} is in Fortran order, and must be saved as numpy.ascontiguousarray of it")
    bytes_needed = header_bytes + math.prod(shape)
    if info.file_size != bytes_needed:
        raise UserError(f"{where} has {info.file_size} bytes where shape {shape} needs {bytes_needed}: truncated or altered")
    if info.compress_type == ZIP_DEFLATED:
        if bytes_needed > LARGEST_COMPRESSED:
            size, limit = bytes_needed / 2**30, LARGEST_COMPRESSED / 2**30
            raise UserError(
                f"{where} is compressed, which is allowed up to {limit:.1f} GiB, and has {size:.1f} GiB; "
                "rewrite it uncompressed: d = numpy.load(FILE); numpy.savez(NEW_FILE, **d)"
            )
        return torch.from_numpy(_array(archive, info.filename.removesuffix(".npy"))), None
    if info.compress_type != ZIP_STORED or info.flag_bits & 1:
        raise UserError(f"{where} is stored in a way that numpy.savez does not use, and has to be written by it")
    if info.file_size <= LARGEST_CHECKED:
        with archive.open(info) as member:
            while member.read(2**20):
                pass
    place = Place(path, _data_offset(file, info) + header_bytes, shape)
    return _map(file, place), place


def _array_header(member: BinaryIO) -> tuple[Sequence[int], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the array that begins here."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f"its array format is version {version[0]}.{version[1]}")


def _data_offset(file: BinaryIO, info: ZipInfo) -> int:
    """Where a stored member's bytes begin. The lengths in the archive's directory are not those of the member's own header."""
    file.seek(info.header_offset)
    signature, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError("its local header is damaged")
    return info.header_offset + LOCAL_HEADER.size + name + extra
