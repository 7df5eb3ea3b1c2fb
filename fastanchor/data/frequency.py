"""The high-frequency part of images, AdvCL's fourth view (Fan et al. 2021): images without their lowest frequencies.

Nothing here reads a value back to the host, so it can run inside a captured graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def high_frequencies(images: Tensor, radius: float) -> Tensor:
    """images (N, C, H, W) in [0, 1] -> the same without frequencies below `radius`; fp64 for fp64 images, else fp32.

    With X the discrete Fourier transform of a channel and f = (i, j), -H/2 <= i < H/2, -W/2 <= j < W/2, in waves a side:

        out = Re IDFT(X'),     X'_f = X_f where sqrt(i^2 + j^2) >= radius, else 0

    The values are not clamped: their mean is 0 for radius > 0, so about half of them are negative (the authors' fr_util.py, whose
    arithmetic for square images with even sides this is). radius <= 0 gives the images back. The memory format stays.
    """
    real = images.double() if images.dtype == torch.float64 else images.float()
    height, width = real.shape[-2:]
    # Of a real image half of the frequencies say all, and which are taken out does not depend on the sign of a frequency.
    kept = torch.fft.rfft2(real) * _mask(height, width, float(radius), real.device, real.dtype)
    out = torch.fft.irfft2(kept, s=(height, width))
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@functools.lru_cache(maxsize=32)
def _mask(height: int, width: int, radius: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H, W // 2 + 1), in rfft2's layout: 1 where a frequency is kept, else 0. Kept itself: captured graphs go on reading it."""
    with torch.inference_mode(False), torch.device("cpu"):
        rows, columns = torch.fft.fftfreq(height) * height, torch.fft.rfftfreq(width) * width
        distance = torch.hypot(rows[:, None].round().double(), columns.round().double())
        return (distance >= radius).to(device, dtype)
