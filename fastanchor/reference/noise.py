"""Start noise of attacks in plain PyTorch, drawn by Philox from a seed: the same words as those of `kernels/noise.py`.

On a CPU, in fp64 and rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastanchor.reference.attacks import l2_norms

GAUSSIAN_SCALE = 0.001  # of the noise that TRADES starts from


def start_noise(images: Tensor, seed: Tensor, eps: float, kind: str, norm: str) -> Tensor:
    """images + noise, projected on the eps ball of `norm` ("linf" | "l2") and on [0, 1].

    images fp32 (N, C, H, W); seed int64, one element. kind: "uniform" in the ball | "gaussian" 0.001 * N(0, 1). Element
    (n, c, h, w) takes word c % 4 of the counter (h * W + w, n, c // 4, 0), the radius of an image in the l2 ball word 0 of
    (0, n, 0, 1); uniforms have 24 bits. Returns fp32, the images' layout.
    """
    count, channels, height, width = images.shape
    pixel, image, group = torch.meshgrid(
        torch.arange(height * width), torch.arange(count), torch.arange(-(-channels // 4)), indexing="ij"
    )
    unit = [_uniform(word) for word in philox(pixel, image, group, torch.zeros_like(pixel), seed)]
    if kind == "uniform" and norm == "linf":
        noise = [eps * (2 * u - 1) for u in unit]
    else:  # Box and Muller
        lengths = [(-2 * (1 - u).log()).sqrt() for u in unit[::2]]
        turns = [2 * math.pi * u for u in unit[1::2]]
        noise = [r * f(t) for r, t in zip(lengths, turns, strict=True) for f in (torch.cos, torch.sin)]
    # (pixels, N, groups, 4) -> (N, C, H, W)
    noise = torch.stack(noise, 3).permute(1, 2, 3, 0).reshape(count, -1, height, width)[:, :channels]
    if kind == "gaussian":
        noise = GAUSSIAN_SCALE * noise
        noise = noise.clamp(-eps, eps) if norm == "linf" else noise * (eps / l2_norms(noise)).clamp_max(1)
    elif norm == "l2":
        zero = torch.zeros(count, dtype=torch.int64)
        radius = 1 - _uniform(philox(zero, torch.arange(count), zero, zero + 1, seed)[0])
        noise = noise / l2_norms(noise) * (eps * radius ** (1 / images[0].numel())).view(-1, 1, 1, 1)
    return torch.empty_like(images).copy_((images.double() + noise).clamp(0, 1))


def _uniform(word: Tensor) -> Tensor:
    """In [0, 1), fp64, of a word's 24 high bits."""
    return (word >> 8).double() * 2.0**-24


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): counters and words as int64 in [0, 2^32), the key one int64."""
    mask = 0xFFFFFFFF
    k0, k1 = seed & mask, (seed >> 32) & mask

    def product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
        # In halves of 16 bits: the whole product would not fit in 63.
        low = (a & 0xFFFF) * b
        high = (a >> 16) * b + (low >> 16)
        return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(10):
        (high0, low0), (high1, low1) = product(c0, 0xD2511F53), product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
