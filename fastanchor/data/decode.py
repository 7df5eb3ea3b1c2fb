"""JPEG and PNG bytes to pixels with Pillow: what evaluation relies on, and what judges whether a file is broken.

What it cannot see: JPEG data damaged in the middle, which libjpeg replaces by grey without a word; PNG data carry a checksum.
"""

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
# How other formats begin, to name those that often go by the name of a JPEG file: "brand" bytes lie at the given place.
OTHERS = (
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<!DOCTYPE", "HTML"),
    (0, b"<html", "HTML"),
)
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
        with _stream(source) as file:
            try:
                image = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError as error:
                raise BrokenImage(_what_else(file)) from error
            with image:
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenImage(f"has {image.width}x{image.height} pixels, more than the allowed {MAX_PIXELS:,}")
                yield image
    except BrokenImage:
        raise
    except Exception as error:  # damaged files make the decoders raise almost anything
        raise BrokenImage(f"cannot be read ({reason(error)})") from error


def _stream(source: str | bytes | memoryview) -> BinaryIO:
    return open_regular(source) if isinstance(source, str) else io.BytesIO(source)


def _what_else(file: BinaryIO) -> str:
    """What a file is that is no image for us, as far as its first bytes tell."""
    file.seek(0)
    start = file.read(16)
    if not start:
        return "is empty, with 0 bytes where a JPEG or PNG image should be"
    for place, brand, name in OTHERS:
        if start[place:].startswith(brand):
            return f"is not a JPEG or PNG image but {name}, whatever its name says"
    return "is not a JPEG or PNG image, or is damaged at its beginning"


def header(source: str | bytes | memoryview, *, whole: bool = False) -> Header:
    """Size and kind of a JPEG or PNG image from its first bytes; with `whole`, all of it is decoded too. BrokenImage."""
    with opened(source) as image:
        found = Header(image.height, image.width, _odd(image))
        if whole:
            to_rgb(image).load()
        return found


def _odd(image: Image.Image) -> bool:
    if image.format == "PNG":
        # Pillow calls 16-bit colours RGB as well; a colour that stands for "transparent" other decoders may turn black.
        plain = image.mode == "RGB" and image.tile[0][3] == "RGB" and "transparency" not in image.info
    else:
        # Adobe's transform 0 is RGB stored as such, which a decoder that expects YCbCr shows in wrong colours.
        plain = image.mode == "L" or (image.mode == "RGB" and image.info.get("adobe_transform") != 0)
    return not plain


def decode(source: str | bytes | memoryview, image_size: int | None = None) -> np.ndarray:
    """One JPEG or PNG image, a path or its bytes, as uint8 (H, W, 3), RGB.

    Grey, palette and CMYK images are converted, transparency is dropped, 16-bit grey is rounded to 8 bits and 16-bit
    colours keep their upper 8; of several pictures in a file the first is taken. The orientation tag of cameras is ignored,
    as is the custom for data sets. image_size: the largest centred square, cut out and resized to that side length (bilinear
    with antialiasing). Raises BrokenImage.
    """
    with opened(source) as image:
        image = to_rgb(image)
        if image_size is not None and image.size != (image_size, image_size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            # Cut out first, as the training views are: their decoders know nothing of pixels beyond the box.
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image that Pillow opened as 8-bit RGB, by the rules of `decode`. What it raises, `opened` makes a BrokenImage."""
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
        # From the bare pixels: what else the file says (a transparent colour, a colour profile) must not be repeated.
        Image.fromarray(np.asarray(to_rgb(image))).save(file, "PNG", compress_level=1)
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
