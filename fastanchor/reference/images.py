"""Stored uint8 images to network inputs in plain PyTorch: crop, mirror, scale. No random numbers here, and no host read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def to_float(images_u8: Tensor) -> Tensor:
    """uint8 (B, H, W, C) to fp32 (B, C, H, W) in [0, 1], channels_last, which is the given order of bytes.

    x / 255 rounded to nearest, the same on every device.
    """
    images = images_u8.permute(0, 3, 1, 2)
    if images.is_cuda:
        # By a Python number a GPU multiplies with 1 / 255, which rounds 126 of the 256 values otherwise; by a tensor it divides.
        return images / torch.full((), 255.0, device=images.device)
    return images.to(torch.float32).div_(255)


def apply_crop_flip(images_u8: Tensor, offsets: Tensor, mirrored: Tensor | None, *, pad: int = 4) -> Tensor:
    """Pad every image with `pad` zeros on all sides, cut (H, W) out at its offset, then mirror left and right.

    images_u8: uint8 (B, H, W, C); offsets: int64 (2, B) in [0, 2 * pad]; mirrored: bool (B,) or None.
    Returns uint8 (B, H, W, C), contiguous.
    """
    batch, height, width, channels = images_u8.shape
    device = images_u8.device
    offsets = offsets.to(device, non_blocking=True)
    padded = F.pad(images_u8, (0, 0, pad, pad, pad, pad))
    padded_height, padded_width = padded.shape[1:3]
    rows = torch.arange(height, device=device) + offsets[0, :, None]  # (B, H)
    columns = torch.arange(width, device=device).expand(batch, width)
    if mirrored is not None:
        columns = torch.where(mirrored.to(device, non_blocking=True)[:, None], width - 1 - columns, columns)
    columns = columns + offsets[1, :, None]  # (B, W)
    rows = rows + padded_height * torch.arange(batch, device=device)[:, None]
    # One index a pixel into a flat list of pixels: on a CPU 3 to 4 times as fast as indexing with three tensors.
    pixels = rows[:, :, None] * padded_width + columns[:, None, :]  # (B, H, W)
    return padded.reshape(-1, channels).index_select(0, pixels.reshape(-1)).reshape(images_u8.shape)
