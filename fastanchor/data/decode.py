"""JPEG and PNG bytes to pixels with Pillow: what evaluation relies on, and what judges whether a file is broken."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastanchor.data.files import open_regular, reason

# Pillow would try all its formats, whatever the name says; some of them start other programs.
FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 50_000_000  # a tiny file can ask for gigabytes; photographs of data sets stay far below
# Pillow decodes without the interpreter's lock, but below this size a file is mostly Python's work, and two threads
# that wait for the lock in turn take longer than one: 32x32 JPEG 107 against 93 us an image, 224x224 252 against 401.
PIXELS_WORTH_THREADS = 128 * 128


class BrokenImage(Exception):
    """Why one image cannot be used, as the end of a sentence that begins with its name."""


class Header(NamedTuple):
    """What a file says of itself at its beginning. odd: only Pillow's conversion reads it as `decode` promises."""

    height: int
    width: int
    odd: bool


def read_file(path: str) -> bytes:
    """The bytes of a regular file. BrokenImage."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise BrokenImage(f"cannot be read ({reason(error)})") from error


@contextmanager
def opened(source: str | bytes | memoryview) -> Iterator[Image.Image]:
    """The image of a path or of bytes, header read and pixels not; BrokenImage for whatever fails here or in the body."""
    try:
        with _stream(source) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"has {image.width}x{image.height} pixels, more than the allowed {MAX_PIXELS:,}")
            yield image
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("is not a JPEG or PNG image, or is damaged at its beginning") from error
    except Exception as error:  # damaged files make the decoders raise almost anything
        raise BrokenImage(f"cannot be read ({reason(error)})") from error


def _stream(source: str | bytes | memoryview) -> BinaryIO:
    return open_regular(source) if isinstance(source, str) else io.BytesIO(source)


def header(source: str | bytes | memoryview) -> Header:
    """Size and kind of a JPEG or PNG image from its first bytes. BrokenImage."""
    with opened(source) as image:
        plain = image.mode == "RGB" if image.format == "PNG" else image.mode in ("RGB", "L")
        return Header(image.height, image.width, not plain)


def decode(source: str | bytes | memoryview, image_size: int | None = None) -> np.ndarray:
    """One JPEG or PNG image, a path or its bytes, as uint8 (H, W, 3), RGB.

    Grey, palette and CMYK images are converted, transparency is dropped, 16-bit grey is scaled to 8 bits. The
    orientation tag of cameras is ignored, as is the custom for data sets. image_size: the largest centred square,
    resized to that side length (bilinear with antialiasing): "shorter side to image_size, then centre crop".
    Raises BrokenImage.
    """
    with opened(source) as image:
        image = _rgb(image)
        if image_size is not None and image.size != (image_size, image_size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def plain_png(source: str | bytes | memoryview) -> bytes:
    """An odd image (see `Header`) as an 8-bit RGB PNG of the same pixels as `decode`, for other decoders. BrokenImage."""
    with opened(source) as image:
        file = io.BytesIO()
        _rgb(image).save(file, "PNG", compress_level=1)
        return file.getvalue()


def threads() -> int:
    """How many threads decode: one a core that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def decode_many(one: Callable[[int], np.ndarray], indices: Sequence[int], shape: tuple[int, int, int]) -> np.ndarray:
    """`one(index)` of every index, each uint8 of `shape`, stacked in order; in threads where the images are large enough."""
    images = np.empty((len(indices), *shape), np.uint8)

    def put(place: int) -> None:
        images[place] = one(indices[place])

    if shape[0] * shape[1] < PIXELS_WORTH_THREADS:
        for place in range(len(indices)):
            put(place)
        return images
    with ThreadPoolExecutor(threads()) as pool:
        for _ in pool.map(put, range(len(indices))):
            pass
    return images
