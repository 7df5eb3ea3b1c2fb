"""Packed folders, `packed:DIR`, as `fastanchor data pack` writes them: pixels in .npy shards, or JPEG and PNG bytes in tar files.

Nothing in DIR is believed: the manifest is checked field by field, every file against the size in it, and what it points at
against the file. Of tar shards a read of all bytes at every start would take minutes, so each image has a CRC-32, compared when
a process first reads it (about 2 % of what decoding costs); every other file's SHA-256 is compared at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fastanchor.data.arrays import Arrays
from fastanchor.data.decode import MAX_PIXELS, BrokenImage
from fastanchor.data.encoded import Encoded, EncodedSet
from fastanchor.data.files import open_regular, reason, shown
from fastanchor.errors import UserError

SCHEMA = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "test")
MAX_MANIFEST = 256_000_000  # bytes; it lists what was left out, and a set may have had many broken files
MIN_SIDE, MAX_SIDE = 8, 4096  # of --image-size, in pixels
OPEN_SHARDS = 128  # files kept open by a process, far below the usual limit of 1024
# One row an image, in the order of the source's listing. shard: which of the split's; offset, length: of its bytes there.
INDEX = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4"),
     ("label", "<u4"), ("height", "<u4"), ("width", "<u4"), ("odd", "?")]
)  # fmt: skip
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HEX = re.compile(r"[0-9a-f]{64}")


def read(root: Path, *, image_size: int | None = None) -> Arrays | EncodedSet:
    """A packed folder: Arrays where it holds pixels, an EncodedSet (decoded when a batch needs it) where it holds files' bytes.

    Images come in the order in which the folder itself would give them, whatever their order in the shards.
    image_size: another side in pixels for the images made of an EncodedSet; pixels that are stored keep theirs.
    Raises UserError naming the file with what was expected and found.
    """
    manifest = read_manifest(root)
    names, notes = tuple(manifest["class_names"]), tuple(manifest["notes"])
    if manifest["kind"] == "uint8":
        height, width = manifest["shape"]
        if image_size is not None and (height, width) != (image_size, image_size):
            raise UserError(
                f"{shown(root)} holds images of {height}x{width} pixels, and image_size is {image_size}: leave it out, "
                "or pack the folder again with --image-size"
            )
        parts = [_pixels(root, manifest, split) for split in SPLITS]
        (train_images, train_labels), (test_images, test_labels) = parts
        return Arrays(names, train_images, train_labels, test_images, test_labels, notes=notes)
    size = image_size or manifest["image_size"]
    train, test = (_encoded(root, manifest, split, size) for split in SPLITS)
    return EncodedSet(names, train, test, notes)


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest, every field that is used of the stated type and range, and every file of the stated size. UserError."""
    path = root / MANIFEST
    try:
        with open_regular(path) as file:
            data = file.read(MAX_MANIFEST + 1)
    except FileNotFoundError:
        hint = "a packed folder is made by fastanchor data pack"
        if (root / "partial").is_dir():
            hint = "its packing did not finish, and the same fastanchor data pack, given again, goes on or tells why it cannot"
        raise UserError(f"{shown(path)} is not there: {hint}") from None
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {reason(error)}") from error
    try:
        if len(data) > MAX_MANIFEST:
            raise ValueError(f"more than {MAX_MANIFEST:,} bytes")
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(path)} is not the manifest of a packed folder: {reason(error)}") from None
    _check_manifest(manifest, shown(path))
    for entry in files_of(manifest):
        _check_size(root / entry["file"], entry["bytes"])
    return manifest


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries (file, bytes, sha256) of all files that a manifest names."""
    return [
        entry for split in SPLITS
        for part in (manifest["splits"][split],)
        for entry in (*part["shards"], part["labels" if manifest["kind"] == "uint8" else "index"], part["names"])
    ]  # fmt: skip


def check_files(root: Path, manifest: dict[str, Any]) -> None:
    """UserError naming the first file whose bytes are not those that were packed. Reads all of them."""
    for entry in files_of(manifest):
        found = hashlib.sha256()
        with _open(root / entry["file"]) as file:
            while piece := file.read(1 << 20):
                found.update(piece)
        _check_sum(root / entry["file"], found.hexdigest(), entry["sha256"])


def _check_manifest(manifest: Any, where: str) -> None:
    """Raises UserError with the key that is not as `pack` writes it."""

    def need(good: bool, key: str, what: str) -> None:
        if not good:
            raise UserError(f"{where}: {key} must be {what}; the file is damaged, or not from fastanchor data pack")

    def is_count(value: Any, low: int = 0, high: int = 2**62) -> bool:
        return type(value) is int and low <= value <= high

    def is_texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    def check_file(entry: Any, key: str) -> None:
        need(isinstance(entry, dict), key, "an object")
        name = entry.get("file")
        need(isinstance(name, str) and bool(_PLAIN_NAME.fullmatch(name)), f"{key}.file", "a plain file name")
        need(name not in used, f"{key}.file", "named once")
        used.add(name)
        need(is_count(entry.get("bytes")), f"{key}.bytes", "a number of bytes")
        digest = entry.get("sha256")
        need(isinstance(digest, str) and bool(_HEX.fullmatch(digest)), f"{key}.sha256", "64 hexadecimal digits")

    used: set[str] = set()
    need(isinstance(manifest, dict), "it", "an object")
    schema = manifest.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise UserError(f"{where}: schema is {schema}, and this fastanchor knows {SCHEMA}: a newer one packed it")
    need(type(schema) is int and schema == SCHEMA, "schema", str(SCHEMA))
    need(manifest.get("kind") in ("uint8", "jpeg"), "kind", "'uint8' or 'jpeg'")
    classes = manifest.get("class_names")
    need(is_texts(classes) and len(set(classes)) == len(classes) >= 2, "class_names", "a list of two or more different names")
    need(is_texts(manifest.get("notes")), "notes", "a list of sentences")
    if manifest["kind"] == "uint8":
        shape = manifest.get("shape")
        good = isinstance(shape, list) and len(shape) == 2 and all(is_count(n, 1, MAX_PIXELS) for n in shape)
        need(good and shape[0] * shape[1] <= MAX_PIXELS, "shape", "the height and width of the images")
    else:
        need(is_count(manifest.get("image_size"), 1, MAX_SIDE), "image_size", f"a number of pixels in [1, {MAX_SIDE}]")
    need(isinstance(manifest.get("splits"), dict), "splits", "an object")
    for split in SPLITS:
        part = manifest["splits"].get(split)
        need(isinstance(part, dict), f"splits.{split}", "an object")
        need(is_count(part.get("images"), 1), f"splits.{split}.images", "a number of images")
        counts = part.get("counts")
        good = isinstance(counts, list) and len(counts) == len(classes) and all(is_count(n) for n in counts)
        need(good and sum(counts) == part["images"], f"splits.{split}.counts", "a number a class, images in all")
        shards = part.get("shards")
        need(isinstance(shards, list) and len(shards) > 0, f"splits.{split}.shards", "a list of shards")
        for i, shard in enumerate(shards):
            check_file(shard, f"splits.{split}.shards[{i}]")
            need(is_count(shard.get("images"), 1), f"splits.{split}.shards[{i}].images", "a number of images")
        need(sum(s["images"] for s in shards) == part["images"], f"splits.{split}.shards", f"of {part['images']} images in all")
        for key in ("labels" if manifest["kind"] == "uint8" else "index", "names"):
            check_file(part.get(key), f"splits.{split}.{key}")


def _remedy(path: Path | str) -> str:
    """What to do about a damaged file of a packed folder."""
    return f"remove {shown(Path(path).parent)} and pack the images again"


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise UserError(f"{shown(path)} is not there, and {MANIFEST} beside it names it: {_remedy(path)}") from None
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {reason(error)}") from error


def _check_size(path: Path, expected: int) -> None:
    with _open(path) as file:
        found = os.fstat(file.fileno()).st_size
    if found != expected:
        raise UserError(
            f"{shown(path)} has {found:,} bytes, and {expected:,} were packed, so it is truncated or altered: {_remedy(path)}"
        )


def _check_sum(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{shown(path)} is altered: its SHA-256 is {found[:16]}..., and {expected[:16]}... was packed; {_remedy(path)}"
        )


def _small(root: Path, entry: dict[str, Any]) -> bytes:
    """All bytes of a file (whose size was compared), checksum compared."""
    with _open(root / entry["file"]) as file:
        data = file.read(entry["bytes"])
    _check_sum(root / entry["file"], hashlib.sha256(data).hexdigest(), entry["sha256"])
    return data


def _after_header(file: BinaryIO, path: Path, dtype: np.dtype, shape: tuple[int, ...], size: int) -> None:
    """Read the header of a .npy file, which must be of exactly this array and leave exactly its bytes. UserError."""
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found = header(file)
    except Exception as error:  # a damaged header can raise anything
        raise UserError(f"{shown(path)} is not a .npy file ({reason(error)}): {_remedy(path)}") from error
    if found != (shape, False, dtype) or size - file.tell() != np.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{shown(path)} holds {found[2]} of shape {found[0]}, and its manifest wants {dtype} of shape {shape}: "
            + _remedy(path)
        )


def _column(root: Path, entry: dict[str, Any], dtype: np.dtype, count: int) -> np.ndarray:
    """The one-dimensional array of a small .npy file."""
    data = _small(root, entry)
    file = io.BytesIO(data)
    _after_header(file, root / entry["file"], dtype, (count,), len(data))
    return np.frombuffer(data, dtype, count, file.tell())


def _check_counts(path: Path, labels: np.ndarray, counts: list[int]) -> None:
    bad = (labels < 0) | (labels >= len(counts))
    if bad.any():
        index = int(bad.argmax())
        raise UserError(f"{shown(path)}: label {index} is {labels[index]}, and labels must lie in [0, {len(counts)})")
    if np.bincount(labels, minlength=len(counts)).tolist() != counts:
        raise UserError(f"{shown(path)} has other numbers of images a class than {MANIFEST} beside it")


def _pixels(root: Path, manifest: dict[str, Any], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) uint8 and labels (N,) int64 of a split, read and checked in one pass."""
    part = manifest["splits"][split]
    try:
        images = np.empty((part["images"], *manifest["shape"], 3), np.uint8)
    except (MemoryError, ValueError) as error:
        raise UserError(f"{shown(root)}: {part['images']:,} images of {split} do not fit into memory") from error
    place = 0
    for shard in part["shards"]:
        path, rows = root / shard["file"], images[place : place + shard["images"]]
        place += len(rows)
        with _open(path) as file:
            _after_header(file, path, images.dtype, rows.shape, shard["bytes"])
            start = file.tell()
            file.seek(0)
            found = hashlib.sha256(file.read(start))
            for piece in np.split(rows, range(0, len(rows), max(1, (1 << 20) // rows[0].nbytes)))[1:]:
                if file.readinto(memoryview(piece).cast("B")) != piece.nbytes:
                    raise UserError(f"{shown(path)} became shorter while it was read")
                found.update(piece)
        _check_sum(path, found.hexdigest(), shard["sha256"])
    labels = _column(root, part["labels"], np.dtype("<i8"), part["images"])
    _check_counts(root / part["labels"]["file"], labels, part["counts"])
    return images, labels


def _encoded(root: Path, manifest: dict[str, Any], split: str, image_size: int) -> Encoded:
    """A split whose bytes stay in the tar shards; its index is checked against their sizes."""
    part = manifest["splits"][split]
    path = root / part["index"]["file"]
    index = _column(root, part["index"], INDEX, part["images"])
    shards = index["shard"]
    ends = np.array([shard["bytes"] for shard in part["shards"]])
    pixels = index["height"].astype(np.int64) * index["width"]
    known = shards < len(ends)
    offsets, lengths = index["offset"].astype(np.float64), index["length"].astype(np.float64)  # no sum of these can wrap around
    bad = ~known | (lengths == 0) | (offsets + lengths > ends[np.where(known, shards, 0)]) | (pixels < 1) | (pixels > MAX_PIXELS)
    if bad.any():
        raise UserError(f"{shown(path)}: row {int(bad.argmax())} points outside its shard, or at no image")
    if np.bincount(shards, minlength=len(ends)).tolist() != [shard["images"] for shard in part["shards"]]:
        raise UserError(f"{shown(path)} has other numbers of images a shard than {MANIFEST} beside it")
    labels = index["label"].astype(np.int64)
    _check_counts(path, labels, part["counts"])
    sizes = np.stack([index["height"], index["width"]]).astype(np.int64)
    store = Shards(root, part, index)
    return Encoded(
        store, np.arange(len(index)), torch.from_numpy(labels), torch.from_numpy(sizes), index["odd"].copy(), image_size
    )


class _Descriptor:
    """A file open for `os.pread`, closed with its last user."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class Shards:
    """The store of a packed split, see `encoded.Store`: bytes are cut out of the tar files without parsing these.

    Read with `pread`, not through a map: of a shard that is cut short or fails under our hands a map ends the process, without a
    word. Threads share the descriptors; a pickled store opens its own.
    """

    def __init__(self, root: Path, part: dict[str, Any], index: np.ndarray):
        self._paths = [str(root / shard["file"]) for shard in part["shards"]]
        self._names_path = str(root / part["names"]["file"])
        self._digest = hashlib.blake2b("".join(e["sha256"] for e in (part["index"], *part["shards"])).encode()).digest()
        self._index = index
        self._begin()

    def _begin(self) -> None:
        self._checked = np.zeros(len(self._index), bool)
        self._open = lru_cache(OPEN_SHARDS)(lambda shard: _Descriptor(self._paths[shard]))
        self._names: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("_paths", "_names_path", "_digest", "_index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> bytes:
        """The bytes of one image. BrokenImage where the shard no longer has those that were packed."""
        shard, offset, length, crc32 = (int(self._index[key][index]) for key in ("shard", "offset", "length", "crc32"))
        try:
            file = self._open(shard)  # a name of its own keeps it open, whatever other threads do to the cache
            data = os.pread(file.number, length, offset)
        except OSError as error:
            raise BrokenImage(f"cannot be read from {shown(self._paths[shard])} ({reason(error)})") from error
        path = self._paths[shard]
        if len(data) != length:
            raise BrokenImage(f"lies beyond the end of {shown(path)}, which is truncated")
        if not self._checked[index]:
            if zlib.crc32(data) != crc32:
                raise BrokenImage(f"is altered: its bytes in {shown(path)} are not those that were packed")
            self._checked[index] = True
        return data

    def name(self, index: int) -> str:
        """The path of the file that was packed, as `train/cat/1.jpg`."""
        if self._names is None:
            try:
                lines = Path(self._names_path).read_bytes().split(b"\n")
            except OSError:  # a message is worth more than the name in it
                lines = []
            self._names = [os.fsdecode(line) for line in lines]
        return self._names[index] if index < len(self._names) else f"image {index} of {self._names_path}"

    @property
    def hint(self) -> str:
        """What to do about an image that cannot be read, see `encoded.Store`."""
        return _remedy(self._names_path)

    def digest(self) -> bytes:
        """Of the shards' checksums."""
        return self._digest
