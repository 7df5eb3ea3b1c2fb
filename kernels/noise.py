"""Start noise of attacks, drawn by Philox from a seed tensor and projected in one pass; and the generator, for other kernels.

Every draw is a function of the seed and of the logical place in the batch: not of block size, memory layout or launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtype, check_same_layout, on_device

KINDS = ("uniform", "gaussian")
NORMS = ("linf", "l2")
GAUSSIAN_SCALE = 0.001  # of the noise that TRADES starts from
# Pixels a program, each with up to four channels: one call of Philox gives four words.
BLOCK, WARPS = 256, 4
# The last word of Philox's counter: draws for different uses of one seed are independent.
STREAM_NOISE: tl.constexpr = tl.constexpr(0)
STREAM_RADIUS: tl.constexpr = tl.constexpr(1)
STREAM_CROP_FLIP: tl.constexpr = tl.constexpr(2)


def start_noise(
    images: Tensor,
    eps: float,
    seed: Tensor,
    kind: str = "uniform",
    norm: str = "linf",
    out: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """Where an attack starts: images + noise, projected on the eps ball of `norm` and on the box [0, 1].

    uniform: in the ball (linf: eps * (2u - 1) an element; l2: a uniform direction, radius eps * u^(1/d)).
    gaussian: 0.001 * N(0, 1).
    images: fp32 (N, C, H, W), contiguous or channels_last; seed: int64, one element, on the images' device (add to it between
    calls: seeds that follow one another are independent). out, low: as in `pgd.pgd_step`. Returns fp32, the images' layout.

    Element (n, c, h, w) takes word c % 4 of Philox4x32-10 (Salmon et al. 2011) with key `seed` and counter
    (h * W + w, n, c // 4, 0); uniforms have 24 bits, normals come from pairs of words by Box and Muller. For the radius image n
    takes word 0 of counter (0, n, 0, 1), and 1 - u.
    Bytes an element: 4 read, 4 written, one launch (linf); l2 draws twice rather than store the noise: nothing more read, two
    launches. 80 integer operations a call of Philox, a call a pixel of up to four channels. Raises ValueError.
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}: must be one of {', '.join(NORMS)}")
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}: must be (N, C, H, W)")
    check_dtype("images", images, torch.float32)
    check_seed(seed)
    out = torch.empty_like(images) if out is None else out
    check_dtype("out", out, torch.float32)
    if low is not None:
        check_dtype("low", low, torch.bfloat16)
    check_same_layout(images=images, out=out, low=low)
    if images.numel() == 0:
        return out
    count, channels, height, width = images.shape
    pixels, size = height * width, channels * height * width
    # Both memory formats as one: strides of a channel and of a pixel, rows following one another.
    planar = images.is_contiguous()
    if not planar and not images.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"images have strides {images.stride()}: must be contiguous or channels_last")
    of_channel, of_pixel = (pixels, 1) if planar else (1, channels)
    blocks, groups = triton.cdiv(pixels, BLOCK), triton.cdiv(channels, 4)
    gaussian, with_norm, with_low = kind == "gaussian", norm == "l2", low is not None
    scale = GAUSSIAN_SCALE if gaussian else float(eps)
    with on_device(_noise_kernel, images=images, seed=seed, out=out, low=low):
        squares = images
        if with_norm:
            squares = torch.empty(count, blocks * groups, dtype=torch.float32, device=images.device)
            _squares_kernel[(count, blocks, groups)](seed, squares, channels, pixels, BLOCK=BLOCK, num_warps=WARPS)
        _noise_kernel[(count, blocks, groups)](
            images, seed, squares, out, out if low is None else low, channels, pixels, size, of_channel, of_pixel,
            float(eps), scale, 1.0 / size, blocks * groups,
            GAUSSIAN=gaussian, L2=with_norm, HAS_LOW=with_low, BLOCK=BLOCK,
            PARTS=triton.next_power_of_2(blocks * groups), num_warps=WARPS,
        )  # fmt: skip
    return out


def check_seed(seed: Tensor) -> None:
    """Raise ValueError unless it is what the kernels read as a seed."""
    check_dtype("seed", seed, torch.int64)
    if seed.numel() != 1:
        raise ValueError(f"seed has shape {tuple(seed.shape)}: must be one element")


@triton.jit
def philox(c0, c1, c2, c3, seed_ptr):
    """Philox4x32-10: counters uint32 of one shape, the key one int64 in memory -> four uint32 words."""
    seed = tl.load(seed_ptr)
    zero = c0 ^ c0
    k0 = zero + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit_interval(word):
    """24 bits of a word as fp32 in [0, 1), all values exact."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _normal_pair(word0, word1):
    """Two independent N(0, 1) by Box and Muller. 1 - u is in (0, 1]: its logarithm is finite."""
    radius = tl.sqrt(-2.0 * tl.log(1.0 - unit_interval(word0)))
    # cos and sin of a turn u, from the nearest quarter: Taylor on [-pi/4, pi/4], error 3e-8. The library's sine reduces angles
    # of any size, for which it takes memory of every thread's own.
    quarters = unit_interval(word1) * 4.0
    nearest = tl.floor(quarters + 0.5)
    t = (quarters - nearest) * 1.5707963267948966
    t2 = t * t
    sine = t * (1.0 + t2 * (-1.0 / 6 + t2 * (1.0 / 120 + t2 * (-1.0 / 5040 + t2 * (1.0 / 362880)))))
    cosine = 1.0 + t2 * (-1.0 / 2 + t2 * (1.0 / 24 + t2 * (-1.0 / 720 + t2 * (1.0 / 40320))))
    quarter = nearest.to(tl.int32) & 3
    swapped = (quarter & 1) == 1
    x, y = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    x = tl.where((quarter == 1) | (quarter == 2), -x, x)
    y = tl.where(quarter >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def _squares_kernel(
    seed_ptr,
    squares_ptr,  # (N, blocks * groups): sums of squares of the normals that _noise_kernel draws
    channels, pixels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image_id, block, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    c0 = pixel.to(tl.uint32)
    zero = c0 ^ c0
    w0, w1, w2, w3 = philox(c0, zero + image_id.to(tl.uint32), zero + group.to(tl.uint32), zero + STREAM_NOISE, seed_ptr)
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    total = n0 * n0
    total += tl.where(group * 4 + 1 < channels, n1 * n1, 0.0)
    total += tl.where(group * 4 + 2 < channels, n2 * n2, 0.0)
    total += tl.where(group * 4 + 3 < channels, n3 * n3, 0.0)
    total = tl.where(pixel < pixels, total, 0.0)
    parts = tl.num_programs(1) * tl.num_programs(2)
    tl.store(squares_ptr + image_id * parts + block * tl.num_programs(2) + group, tl.sum(total, axis=0))


@triton.jit
def _noise_kernel(
    images_ptr, seed_ptr, squares_ptr, out_ptr, low_ptr,
    channels, pixels, size, of_channel, of_pixel,  # shape; strides in elements, size being an image's
    eps, scale, inverse_size, parts,
    GAUSSIAN: tl.constexpr, L2: tl.constexpr, HAS_LOW: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # parts, up to the next power of two
):  # fmt: skip
    image_id, block, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    c0 = pixel.to(tl.uint32)
    zero = c0 ^ c0
    w0, w1, w2, w3 = philox(c0, zero + image_id.to(tl.uint32), zero + group.to(tl.uint32), zero + STREAM_NOISE, seed_ptr)
    if GAUSSIAN or L2:
        n0, n1 = _normal_pair(w0, w1)
        n2, n3 = _normal_pair(w2, w3)
    else:
        n0, n1 = unit_interval(w0) * 2.0 - 1.0, unit_interval(w1) * 2.0 - 1.0
        n2, n3 = unit_interval(w2) * 2.0 - 1.0, unit_interval(w3) * 2.0 - 1.0
    if L2:
        each = tl.arange(0, PARTS)
        length = tl.sqrt(tl.sum(tl.load(squares_ptr + image_id * parts + each, mask=each < parts, other=0.0), axis=0))
        if GAUSSIAN:
            scale = tl.minimum(scale, eps / length)
        else:
            r0 = tl.full((1,), 0, tl.uint32)
            radius, _, _, _ = philox(r0, r0 + image_id.to(tl.uint32), r0, r0 + STREAM_RADIUS, seed_ptr)
            fraction = tl.exp2(tl.log2(1.0 - unit_interval(radius)) * inverse_size)
            scale = scale * tl.sum(fraction, axis=0) / length
    base = image_id.to(tl.int64) * size
    for channel in tl.static_range(4):
        noise = scale * (n0 if channel == 0 else (n1 if channel == 1 else (n2 if channel == 2 else n3)))
        inside = (pixel < pixels) & (group * 4 + channel < channels)
        at = base + (group * 4 + channel) * of_channel + pixel * of_pixel
        image = tl.load(images_ptr + at, mask=inside, other=0.0)
        if GAUSSIAN and not L2:
            noise = tl.minimum(tl.maximum(noise, -eps), eps)
        x = tl.maximum(image + noise, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 1.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + at, x, mask=inside)
        if HAS_LOW:
            tl.store(low_ptr + at, x.to(tl.bfloat16), mask=inside)
