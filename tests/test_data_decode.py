"""Pixels of JPEG and PNG files of every kind, and what is said of files that are none."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastanchor.data import decode
from fastanchor.data.decode import BrokenImage


def picture(height=6, width=5, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data, checksum=None):
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(samples, colour, *, bits=8, more=b""):
    """A PNG written by hand. samples: integers (H, W, C) of the stated bits; colour: the standard's colour type."""
    kind = ">u2" if bits == 16 else np.uint8
    lines = b"".join(b"\0" + row.astype(kind).tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, colour, 0, 0, 0)
    start, end = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head), chunk(b"IEND", b"")
    return start + more + chunk(b"IDAT", zlib.compress(lines)) + end


def grey(levels):
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, 2)


LEVELS = np.array([[0, 127, 128, 255, 256], [1000, 32768, 65279, 65408, 65535]])
COLOURS = np.stack([LEVELS, LEVELS[::-1], 65535 - LEVELS], -1)
PIXELS = picture()
KINDS = {
    "rgb png": (encoded(PIXELS, "PNG"), PIXELS, False),
    "grey png": (encoded(PIXELS[..., 0], "PNG"), grey(PIXELS[..., 0]), True),
    "16-bit grey": (png(LEVELS[..., None], 0, bits=16), grey(np.rint(LEVELS / 257)), True),
    "16-bit grey and alpha": (png(np.stack([LEVELS, LEVELS[::-1]], -1), 4, bits=16), grey(LEVELS >> 8), True),
    "16-bit colours": (png(COLOURS, 2, bits=16), (COLOURS >> 8).astype(np.uint8), True),
    "16-bit colours and alpha": (png(np.dstack([COLOURS, LEVELS]), 6, bits=16), (COLOURS >> 8).astype(np.uint8), True),
    "alpha": (png(np.dstack([PIXELS, PIXELS[..., 0]]), 6), PIXELS, True),
    "grey and alpha": (png(PIXELS[..., :2], 4), grey(PIXELS[..., 0]), True),
    "a transparent colour": (png(PIXELS, 2, more=chunk(b"tRNS", struct.pack(">HHH", *PIXELS[0, 0]))), PIXELS, True),
    "a transparent grey": (
        png(PIXELS[..., :1], 0, more=chunk(b"tRNS", struct.pack(">H", PIXELS[0, 0, 0]))), grey(PIXELS[..., 0]), True,
    ),
    "palette": (png(np.array([[[0], [1], [2]]]), 3, more=chunk(b"PLTE", bytes(range(9)))), np.arange(9).reshape(1, 3, 3), True),
    "palette with alpha": (
        png(np.array([[[0], [1], [2]]]), 3, more=chunk(b"PLTE", bytes(range(9))) + chunk(b"tRNS", b"\0\x80")),
        np.arange(9).reshape(1, 3, 3), True,
    ),
    "one bit": (encoded(Image.fromarray(LEVELS > 999), "PNG"), grey(np.where(LEVELS > 999, 255, 0)), True),
}  # fmt: skip


@pytest.mark.filterwarnings("error")  # Pillow has one for palettes with transparency
@pytest.mark.parametrize("name", KINDS)
def test_png_of_every_kind(name):
    data, pixels, odd = KINDS[name]
    assert np.array_equal(decode.decode(data), pixels)
    assert decode.header(data) == (*pixels.shape[:2], odd) == decode.header(memoryview(data), whole=True)
    plain = decode.plain_png(data)
    assert np.array_equal(decode.decode(plain), pixels) and not decode.header(plain).odd
    assert b"tRNS" not in plain


def test_jpeg_of_every_kind():
    smooth = np.asarray(Image.fromarray(picture(4, 4)).resize((48, 40), Image.Resampling.BICUBIC)).copy()
    ink = Image.fromarray(255 - np.dstack([smooth, np.full((40, 48), 255, np.uint8)]), "CMYK")  # no black
    cases = {
        "plain": (encoded(smooth, "JPEG", quality=95), smooth, False),
        "progressive": (encoded(smooth, "JPEG", quality=95, progressive=True), smooth, False),
        "grey": (encoded(smooth[..., 0], "JPEG", quality=95), grey(smooth[..., 0]), False),
        "rgb as such": (encoded(smooth, "JPEG", quality=95, keep_rgb=True), smooth, True),
        "cmyk, inverted as Adobe has it": (encoded(ink, "JPEG", quality=95), smooth, True),
    }
    for name, (data, pixels, odd) in cases.items():
        assert decode.header(data) == (40, 48, odd), name
        assert np.abs(decode.decode(data).astype(int) - pixels).mean() < 4, name
        assert np.array_equal(decode.decode(decode.plain_png(data)), decode.decode(data)), name
    assert b"Adobe" in cases["cmyk, inverted as Adobe has it"][0]


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encoded(picture(6, 5), "JPEG", exif=exif)
    assert decode.decode(data).shape == (6, 5, 3) and decode.header(data)[:2] == (6, 5)
    assert np.array_equal(decode.decode(data), decode.decode(encoded(picture(6, 5), "JPEG")))


def test_the_first_of_several_pictures():
    first, second = Image.fromarray(picture(seed=1)), Image.fromarray(picture(seed=2))
    animated = encoded(first, "PNG", save_all=True, append_images=[second], duration=10)
    assert b"acTL" in animated and np.array_equal(decode.decode(animated), np.asarray(first))
    several = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert np.array_equal(decode.decode(several), decode.decode(encoded(first, "JPEG", quality=95)))
    assert decode.header(several) == (6, 5, False)


def refusal(source, one=decode.decode):
    with pytest.raises(BrokenImage) as error:
        one(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (encoded(PIXELS, "GIF"), "GIF"),
        (encoded(PIXELS, "WEBP"), "WebP"),
        (encoded(PIXELS, "BMP"), "BMP"),
        (encoded(PIXELS, "TIFF"), "TIFF"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"<!DOCTYPE html><title>404", "HTML"),
    ],
)
def test_another_format_is_named(tmp_path, content, name):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for source in (str(path), content):
        for one in (decode.decode, decode.header, decode.plain_png):
            assert refusal(source, one) == f"is not a JPEG or PNG image but {name}, whatever its name says"


def test_empty_text_and_missing(tmp_path):
    assert refusal(b"") == "is empty, with 0 bytes where a JPEG or PNG image should be"
    assert refusal(b"file,class\n") == "is not a JPEG or PNG image, or is damaged at its beginning"
    assert refusal(str(tmp_path / "none.jpg")) == "cannot be read (No such file or directory)"
    error = BrokenImage("x")
    assert str(pickle.loads(pickle.dumps(error))) == "x"  # worker processes send it home


def test_a_header_may_be_whole_where_the_rest_is_not():
    for data in (encoded(picture(64, 64), "JPEG"), encoded(picture(64, 64), "PNG")):
        cut = data[: len(data) // 2]
        assert decode.header(cut)[:2] == (64, 64)
        assert "truncated" in refusal(cut, lambda source: decode.header(source, whole=True))
        assert decode.header(data, whole=True)[:2] == (64, 64)


def test_png_with_broken_chunks():
    data = encoded(picture(40, 40), "PNG")
    place = data.index(b"IDAT") + 4
    for at in range(place, len(data) - 16, 97):  # one bit of the pixels: zlib's checksum sees it
        refusal(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    head = data.index(b"IHDR") + 4
    assert "is not a JPEG or PNG image, or is damaged" in refusal(data[:head] + b"\1" + data[head + 1 :])
    rows = b"".join(b"\0" + bytes(15) for _ in range(6))
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 6, 8, 2, 0, 0, 0))
    refusal(b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IEND", b""))  # no pixels
    claims = b"\x89PNG\r\n\x1a\n" + ihdr + struct.pack(">I", 2**31 - 1) + b"IDAT"  # 2 GiB of pixels
    assert not decode.decode(claims + zlib.compress(rows)).any()  # all that are needed are there
    refusal(claims + zlib.compress(rows)[:-8])


def test_bombs_are_refused_by_their_header():
    empty = np.zeros((1, 1, 3), np.uint8)

    def claims(width, height):
        data = bytearray(png(empty, 2))
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return bytes(data[:8]) + chunk(b"IHDR", head) + bytes(data[33:])

    assert "has 8000x7000 pixels, more than the allowed 50,000,000" in refusal(claims(8000, 7000), decode.header)
    assert "exceeds limit" in refusal(claims(100_000, 100_000), decode.header)
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**26)))  # 64 MiB of text in 64 KiB
    assert "cannot be read" in refusal(png(empty, 2, more=text))


def test_image_size_of_one_pixel_and_of_thin_images():
    assert decode.decode(encoded(picture(1, 90), "PNG"), 8).shape == (8, 8, 3)
    assert np.array_equal(decode.decode(encoded(picture(9, 1), "PNG"), 1), picture(9, 1)[4:5])
