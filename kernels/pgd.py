"""The step of projected gradient descent in one pass: signed or unit step, projection on ball and box, cast for the network.

`reference/attacks.py` (`project(ascend(...))`) is the truth; the linf kernel rounds as the attack engine's own step does.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtype, check_same_layout, on_device

# 8 elements a thread: 16-byte accesses for fp32 (two in flight) and for bf16.
BLOCK, WARPS = 1024, 4
# Larger for l2, whose second kernel reads one triple of partial sums a block: 2 blocks for a 3 x 32 x 32 image.
L2_BLOCK, L2_WARPS = 2048, 8


def pgd_step(
    x_adv: Tensor,
    gradient: Tensor,
    images: Tensor,
    eps: float,
    step_size: float,
    norm: str = "linf",
    out: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """One step of ascent from x_adv along `gradient`, projected on the eps ball around `images` and on the box [0, 1].

    linf:  x' = min(max(x + step * sign(g), clip(images - eps)), clip(images + eps)), clip to [0, 1]
    l2:    d = x + step * g / max(|g|, 1e-12) - images;  x' = clip(images + d * min(eps / max(|d|, 1e-12), 1)), |.| per image

    x_adv, images: fp32 (N, C, H, W); gradient: fp32 or bf16; all dense and of one memory format (contiguous or channels_last).
    out: fp32, where x' goes (may be x_adv itself; None: new memory). low: bf16, gets x' as well, rounded, as the network's
    next input. Returns x'. sign is torch.sign: 0 for 0 and for NaN, 1 for inf. A NaN in x_adv or images stays one; with l2, a
    NaN gradient makes its whole image NaN, as in the reference, and no other.

    Bytes an element (gradient fp32, without low): linf 12 read, 4 written, one launch, about 6 FLOPs. l2 24 read, 4 written, two
    launches, about 16 FLOPs: |d|^2 comes from the sums of g^2, g * (x - images) and (x - images)^2, taken in one pass in a
    fixed order (no atomics: repeatable bit for bit). Its cancellation is harmless: it is large only where |d| is far below eps,
    where the factor is 1. Raises ValueError.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm = {norm!r}: must be linf or l2")
    check_dtype("x_adv", x_adv, torch.float32)
    check_dtype("images", images, torch.float32)
    check_dtype("gradient", gradient, torch.float32, torch.bfloat16)
    out = torch.empty_like(x_adv) if out is None else out
    check_dtype("out", out, torch.float32)
    if low is not None:
        check_dtype("low", low, torch.bfloat16)
    check_same_layout(x_adv=x_adv, gradient=gradient, images=images, out=out, low=low)
    if x_adv.numel() == 0:
        return out
    eps, step_size = float(eps), float(step_size)
    # Where there is no second output its place takes any pointer; the kernel is compiled without it.
    second = out if low is None else low
    with on_device(_linf_kernel, x_adv=x_adv, gradient=gradient, images=images, out=out, low=low):
        if norm == "linf":
            _linf_kernel[(triton.cdiv(x_adv.numel(), BLOCK),)](
                x_adv, gradient, images, out, second, x_adv.numel(), eps, step_size,
                HAS_LOW=low is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
            return out
        count, size = len(x_adv), math.prod(x_adv.shape[1:])
        blocks = triton.cdiv(size, L2_BLOCK)
        sums = torch.empty(count, 3, blocks, dtype=torch.float32, device=x_adv.device)
        _l2_sums_kernel[(count, blocks)](
            x_adv, gradient, images, sums, size, blocks, BLOCK=L2_BLOCK, num_warps=L2_WARPS
        )  # fmt: skip
        _l2_apply_kernel[(count, blocks)](
            x_adv, gradient, images, sums, out, second, size, blocks, eps, step_size,
            HAS_LOW=low is not None, BLOCK=L2_BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=L2_WARPS,
        )  # fmt: skip
    return out


@triton.jit
def _linf_kernel(
    x_ptr, gradient_ptr, images_ptr, out_ptr, low_ptr,  # elements in the order of memory
    numel, eps, step_size,
    HAS_LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    image = tl.load(images_ptr + at, mask=inside, other=0.0)
    # Two comparisons, both false for NaN, are torch.sign.
    x = x + tl.where(gradient > 0, step_size, tl.where(gradient < 0, -step_size, 0.0))
    # Ball and box are one interval an element. PropagateNan as torch.clamp: a lost pixel must not become a valid one.
    lower = tl.maximum(image - eps, 0.0, propagate_nan=tl.PropagateNan.ALL)
    lower = tl.minimum(lower, 1.0, propagate_nan=tl.PropagateNan.ALL)
    upper = tl.minimum(image + eps, 1.0, propagate_nan=tl.PropagateNan.ALL)
    upper = tl.maximum(upper, 0.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, lower, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, upper, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at, x, mask=inside)
    if HAS_LOW:
        tl.store(low_ptr + at, x.to(tl.bfloat16), mask=inside)


@triton.jit
def _l2_sums_kernel(
    x_ptr, gradient_ptr, images_ptr,
    sums_ptr,  # (N, 3, blocks): g * g, g * d, d * d of every block
    size, blocks,  # elements an image, programs an image
    BLOCK: tl.constexpr,
):  # fmt: skip
    image_id, block = tl.program_id(0), tl.program_id(1)
    within = block * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = image_id.to(tl.int64) * size + within
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(x_ptr + at, mask=inside, other=0.0) - tl.load(images_ptr + at, mask=inside, other=0.0)
    row = sums_ptr + image_id * 3 * blocks + block
    tl.store(row, tl.sum(gradient * gradient, axis=0))
    tl.store(row + blocks, tl.sum(gradient * delta, axis=0))
    tl.store(row + 2 * blocks, tl.sum(delta * delta, axis=0))


@triton.jit
def _l2_apply_kernel(
    x_ptr, gradient_ptr, images_ptr, sums_ptr, out_ptr, low_ptr,
    size, blocks, eps, step_size,
    HAS_LOW: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks, up to the next power of two
):  # fmt: skip
    image_id, block = tl.program_id(0), tl.program_id(1)
    each = tl.arange(0, BLOCKS)
    row = sums_ptr + image_id * 3 * blocks + each
    known = each < blocks
    gradient_norm = tl.sqrt(tl.sum(tl.load(row, mask=known, other=0.0), axis=0))
    cross = tl.sum(tl.load(row + blocks, mask=known, other=0.0), axis=0)
    before = tl.sum(tl.load(row + 2 * blocks, mask=known, other=0.0), axis=0)
    floored = tl.maximum(gradient_norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    rate = step_size / floored
    # The step's length: step_size, less for a gradient below the floor. An infinite norm (of finite values) is a step of 0.
    length = tl.where(gradient_norm < float("inf"), step_size * (gradient_norm / floored), 0.0)
    moved = tl.sqrt(tl.maximum(before + 2.0 * rate * cross + length * length, 0.0, propagate_nan=tl.PropagateNan.ALL))
    factor = eps / tl.maximum(moved, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.minimum(factor, 1.0, propagate_nan=tl.PropagateNan.ALL)
    within = block * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = image_id.to(tl.int64) * size + within
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    image = tl.load(images_ptr + at, mask=inside, other=0.0)
    delta = tl.load(x_ptr + at, mask=inside, other=0.0) + rate * gradient - image
    x = image + delta * factor
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at, x, mask=inside)
    if HAS_LOW:
        tl.store(low_ptr + at, x.to(tl.bfloat16), mask=inside)
