"""One shard of a packed folder: its files read and decoded, written aside, put into place whole, and kept by a later command."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from fastanchor.data import decode
from fastanchor.data.decode import BrokenImage
from fastanchor.data.files import reason, shown
from fastanchor.data.packplan import BLOCK, Part, Plan, Shard
from fastanchor.errors import UserError
from fastanchor.files import write_text

MAX_FILE = 256_000_000  # bytes; whoever names a film .jpg must not fill the memory with it


class Report(Protocol):
    """What a person sees of it."""

    def say(self, text: str) -> None:
        """One line."""

    def begin(self, files: int) -> None:
        """So many files are to come."""

    def advance(self, files: int, size: int, kept: bool = False) -> None:
        """So many are done, of `size` bytes together; `kept`: by an earlier command."""

    def end(self) -> None:
        """No more will come, also after an error."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusals into a UserError; a half-written file beside `path` must not go on filling the disk."""
    try:
        yield
    except OSError as error:
        for half in (path.with_name(path.name + ".tmp"), path.parent / "partial" / (path.name + ".tmp")):
            with contextlib.suppress(OSError):
                half.unlink()
        raise UserError(
            f"{shown(path)} cannot be written: {reason(error)}; what is packed stays, and the same command goes on"
        ) from error


class _Hashed:
    """A file being written that knows its SHA-256 and place, for writers that only append."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.place = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.place += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.place


@contextlib.contextmanager
def whole_file(out: Path, name: str, entry: dict[str, Any]) -> Iterator[_Hashed]:
    """Write DIR/NAME aside and put it into place once it is on the disk; then `entry` has its file, bytes and sha256."""
    temporary = out / "partial" / f"{name}.tmp"
    with writing(out / name):
        with open(temporary, "wb") as file:
            hashed = _Hashed(file)
            yield hashed
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out / name)
    entry.update(file=name, bytes=hashed.place, sha256=hashed.sha256.hexdigest())


class _File(NamedTuple):
    """One file of the source, read: digest of its bytes; why it cannot be used; else its pixels, or bytes with their header."""

    digest: str = ""
    why: str | None = None
    pixels: np.ndarray | None = None
    data: bytes = b""
    header: decode.Header | None = None


def _read(plan: Plan, part: Part, row: int) -> _File:
    path, size = part.paths[row], int(part.sizes[row])
    try:
        if size > MAX_FILE:
            raise BrokenImage(f"has {size:,} bytes, more than the allowed {MAX_FILE:,}")
        data = decode.read_file(path)
        if len(data) != size:
            raise UserError(f"{shown(path)} has {len(data):,} bytes and had {size:,} when listed: the folder changes meanwhile")
        if plan.pixels:
            pixels, header = decode.decode(data, plan.size[0] if plan.resized else None), None
            height, width = pixels.shape[:2]
        else:
            pixels, header = None, decode.header(data, whole=True)
            height, width, _ = header
        if not plan.resized and (height, width) != plan.size:
            raise BrokenImage(f"is {height}x{width} where {plan.size[0]}x{plan.size[1]} is expected (--image-size N resizes all)")
    except BrokenImage as error:
        return _File(why=str(error))
    return _File(hashlib.blake2b(data, digest_size=16).hexdigest(), None, pixels, b"" if plan.pixels else data, header)


def _read_all(plan: Plan, shard: Shard) -> Iterator[tuple[int, _File]]:
    """The files of a shard in its order, with their rows; in threads where the images are large enough to gain by it."""
    part, rows = plan.parts[shard.split], shard.rows.tolist()
    if not plan.large:
        for row in rows:
            yield row, _read(plan, part, row)
        return
    pool = ThreadPoolExecutor(decode.threads())
    try:
        yield from zip(rows, pool.map(lambda row: _read(plan, part, row), rows), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def write_shard(plan: Plan, shard: Shard, out: Path, doubtful: set[int], report: Report | None) -> dict[str, Any]:
    """Write a shard without its broken and doubtful files, then its record, which is returned and tells all that was found."""
    part = plan.parts[shard.split]
    record: dict[str, Any] = {"plan": plan.digest, "broken": [], "digests": [], "rows": [], "doubtful": sorted(doubtful)}

    def good(files: Iterator[tuple[int, _File]]) -> Iterator[tuple[int, _File]]:
        for row, file in files:
            record["digests"].append(file.digest)
            if report:
                report.advance(1, int(max(0, part.sizes[row])))
            if file.why is not None:
                record["broken"].append([row, file.why])
            elif row not in doubtful:
                record["rows"].append(row)
                yield row, file

    # Closed at once when interrupted: else its threads would go on to the end of the shard.
    with whole_file(out, shard.file, record) as target, contextlib.closing(_read_all(plan, shard)) as files:
        (_write_pixels if plan.pixels else _write_tar)(plan, shard, good(files), target, record)
    path = out / "partial" / f"{shard.file}.json"
    with writing(path):
        write_text(path, json.dumps(record))
    return record


def _write_pixels(plan: Plan, shard: Shard, files: Iterator[tuple[int, _File]], target: _Hashed, record: dict[str, Any]) -> None:
    """A .npy file of uint8 (N, H, W, 3), and the sums of values and of their squares over each channel for the record."""
    images = np.empty((len(shard.rows), *plan.size, 3), np.uint8)
    count = 0
    for count, (_, file) in enumerate(files, 1):
        images[count - 1] = file.pixels
    images = images[:count]
    np.lib.format.write_array(target, images, version=(1, 0), allow_pickle=False)
    levels = np.array([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    record["sums"] = [(levels @ np.arange(256) ** power).tolist() for power in (1, 2)]


def _write_tar(plan: Plan, shard: Shard, files: Iterator[tuple[int, _File]], target: _Hashed, record: dict[str, Any]) -> None:
    """A WebDataset shard: KEY.jpg or KEY.png with the file's bytes, then KEY.cls with the label as text; KEY is the row."""
    record["index"] = []
    labels = plan.parts[shard.split].labels
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, file in files:
            suffix = "png" if file.data.startswith(b"\x89PNG") else "jpg"
            offset = tar.offset + BLOCK
            for name, data in ((suffix, file.data), ("cls", str(labels[row]).encode())):
                member = tarfile.TarInfo(f"{row:09d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            height, width, odd = file.header
            record["index"].append([offset, len(file.data), zlib.crc32(file.data), int(labels[row]), height, width, odd])


def kept_record(plan: Plan, shard: Shard, out: Path) -> dict[str, Any] | None:
    """The record of a shard that an earlier command wrote and that is whole; None where it has to be written (again)."""
    try:
        record = json.loads((out / "partial" / f"{shard.file}.json").read_bytes())
        if record["plan"] != plan.digest or len(record["digests"]) != len(shard.rows):
            return None
        with open(out / shard.file, "rb") as file:
            found = hashlib.sha256()
            while piece := file.read(1 << 20):
                found.update(piece)
        if found.hexdigest() != record["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A file that could not be read may have been repaired: given its permission, for instance.
    repaired = any(_read(plan, plan.parts[shard.split], row).why is None for row, _ in record["broken"])
    return None if repaired else record
