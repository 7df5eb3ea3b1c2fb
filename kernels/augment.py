"""Random crop and mirror of stored uint8 images to network inputs in one pass: gather, pad, crop, flip, scale, cast.

`apply_crop_flip` and `to_float` of `fastanchor/reference/images.py` are the truth, to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtype, on_device
from .noise import STREAM_CROP_FLIP, check_seed, philox

# Elements a program, in the order of memory: 3 programs for a 32 x 32 x 3 image, 8 elements a thread.
BLOCK, WARPS = 1024, 4


def augment(
    images_u8: Tensor,
    offsets: Tensor,
    mirrored: Tensor | None,
    *,
    pad: int = 4,
    index: Tensor | None = None,
    out: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """Pad with zeros, cut (H, W) out at every image's offset, mirror, scale to [0, 1].

    images_u8: uint8 (M, H, W, C), contiguous; index: int64 (B,) in [0, M), which of them (None: all, B = M); offsets: int64
    (2, B) in [0, 2 * pad], rows then columns; mirrored: bool (B,) or None. No value is looked at on the host: an index
    outside its range reads beyond the store. Returns fp32 (B, C, H, W), channels_last, x / 255 correctly rounded; `out` is where
    it goes (None: new memory), `low` (bf16, the same layout) gets it as well, rounded.

    Bytes an element: 1 read, 4 written (2 more with low); one launch. Raises ValueError.
    """
    batch = _check_images(images_u8, index)
    check_dtype("offsets", offsets, torch.int64)
    if offsets.shape != (2, batch) or not offsets.is_contiguous():
        raise ValueError(f"offsets have shape {tuple(offsets.shape)}: must be (2, {batch}), contiguous")
    if mirrored is not None:
        check_dtype("mirrored", mirrored, torch.bool)
        if mirrored.shape != (batch,) or not mirrored.is_contiguous():
            raise ValueError(f"mirrored has shape {tuple(mirrored.shape)}: must be ({batch},), contiguous")
    return _launch(images_u8, index, batch, offsets, mirrored, None, pad, mirrored is not None, out, low)


def augment_random(
    images_u8: Tensor,
    seed: Tensor,
    *,
    pad: int = 4,
    flip: bool = True,
    index: Tensor | None = None,
    out: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """`augment` with offsets uniform in [0, 2 * pad] and, with flip, mirrors of probability 1/2, drawn in the kernel.

    seed: int64, one element, on the images' device. Image i of the batch takes three words of Philox4x32-10 with key `seed` and
    counter (0, i, 0, 2): rows, columns (word * (2 * pad + 1) >> 32: no value's probability is off by more than 2^-32), mirror
    (the third's top bit).
    """
    batch = _check_images(images_u8, index)
    check_seed(seed)
    return _launch(images_u8, index, batch, None, None, seed, pad, flip, out, low)


def _check_images(images_u8: Tensor, index: Tensor | None) -> int:
    check_dtype("images_u8", images_u8, torch.uint8)
    if images_u8.ndim != 4 or not images_u8.is_contiguous():
        raise ValueError(f"images_u8 have shape {tuple(images_u8.shape)}: must be (M, H, W, C), contiguous")
    if index is None:
        return len(images_u8)
    check_dtype("index", index, torch.int64)
    if index.ndim != 1 or not index.is_contiguous():
        raise ValueError(f"index has shape {tuple(index.shape)}: must be (B,), contiguous")
    return len(index)


def _launch(images_u8, index, batch, offsets, mirrored, seed, pad, flip, out, low) -> Tensor:
    if not isinstance(pad, int) or pad < 0:
        raise ValueError(f"pad = {pad!r}: must be a whole number >= 0")
    _, height, width, channels = images_u8.shape
    shape = (batch, channels, height, width)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=images_u8.device, memory_format=torch.channels_last)
    for name, tensor, dtype in (("out", out, torch.float32), ("low", low, torch.bfloat16)):
        if tensor is None:
            continue
        check_dtype(name, tensor, dtype)
        if tensor.shape != shape or not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {shape}, channels_last")
    if out.numel() == 0:
        return out
    size = height * width * channels
    with on_device(
        _augment_kernel, images_u8=images_u8, index=index, offsets=offsets, mirrored=mirrored, seed=seed, out=out, low=low
    ):
        # Where an argument is not used its place takes any pointer; the kernel is compiled without it.
        _augment_kernel[(batch, triton.cdiv(size, BLOCK))](
            images_u8, index if index is not None else images_u8, offsets if offsets is not None else images_u8,
            mirrored if mirrored is not None else images_u8, seed if seed is not None else images_u8,
            out, low if low is not None else out, batch,
            H=height, W=width, C=channels, PAD=pad, GATHER=index is not None, DRAW=seed is not None, FLIP=flip,
            HAS_LOW=low is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


@triton.jit
def _augment_kernel(
    images_ptr, index_ptr, offsets_ptr, mirrored_ptr, seed_ptr, out_ptr, low_ptr,
    batch,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,  # constants: divided by at every element
    PAD: tl.constexpr, GATHER: tl.constexpr, DRAW: tl.constexpr, FLIP: tl.constexpr, HAS_LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place, block = tl.program_id(0), tl.program_id(1)
    if DRAW:
        zero = tl.full((1,), 0, tl.uint32)
        w0, w1, w2, _ = philox(zero, zero + place.to(tl.uint32), zero, zero + STREAM_CROP_FLIP, seed_ptr)
        down = tl.umulhi(w0, zero + (2 * PAD + 1)).to(tl.int32) - PAD
        right = tl.umulhi(w1, zero + (2 * PAD + 1)).to(tl.int32) - PAD
        mirror = (w2 >> 31) == 1
    else:
        down = tl.load(offsets_ptr + place).to(tl.int32) - PAD
        right = tl.load(offsets_ptr + batch + place).to(tl.int32) - PAD
        if FLIP:
            mirror = tl.load(mirrored_ptr + place) != 0
    element = block * BLOCK + tl.arange(0, BLOCK)
    channel, pixel = element % C, element // C
    row, column = pixel // W, pixel % W
    if FLIP:
        column = tl.where(mirror, W - 1 - column, column)
    row += down
    column += right
    inside = element < H * W * C
    known = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    source = place.to(tl.int64)
    if GATHER:
        source = tl.load(index_ptr + place)
    byte = tl.load(images_ptr + source * (H * W * C) + (row * W + column) * C + channel, mask=known, other=0)
    # Rounded to nearest, as a division on a CPU; times 1/255, as a GPU divides by a constant, 126 of the 256 values differ.
    x = tl.div_rn(byte.to(tl.float32), 255.0)
    at = place.to(tl.int64) * (H * W * C) + element
    tl.store(out_ptr + at, x, mask=inside)
    if HAS_LOW:
        tl.store(low_ptr + at, x.to(tl.bfloat16), mask=inside)
