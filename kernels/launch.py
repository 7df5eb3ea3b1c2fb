"""What every launcher checks before it launches: one CUDA device for all tensors, and memory layouts that agree."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor


def on_device(kernel, **tensors: Tensor | None) -> contextlib.AbstractContextManager:
    """The context to launch `kernel` in: the tensors' device is the current one. Raises ValueError on another kind or on two.

    Kernels run by Triton's interpreter (then they are no JITFunction) take tensors of any device.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first, leader), *others = given.items()
    for name, tensor in others:
        if tensor.device != leader.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {leader.device}: all must be on one device")
    if leader.is_cuda:
        return torch.cuda.device(leader.device)
    if isinstance(kernel, triton.JITFunction):
        raise ValueError(f"{first} is on {leader.device}: Triton kernels need CUDA tensors")
    return contextlib.nullcontext()


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise ValueError unless the tensor is of one of these dtypes."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}: must be {' or '.join(map(str, allowed))}")


def check_same_layout(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors have the first one's shape and strides, without gaps, images outermost.

    Strides of dimensions of size 1 say nothing about memory and are not looked at.
    """
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first, leader = given[0]
    for name, tensor in given[1:]:
        if tensor.shape != leader.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {first} {tuple(leader.shape)}: must be the same")
    expected = 1
    for size, stride in sorted(_extents(leader), key=lambda extent: extent[1]):
        if stride != expected:
            raise ValueError(f"{first} has strides {leader.stride()} for shape {tuple(leader.shape)}: must be dense")
        expected *= size
    if len(leader) > 1 and leader.stride(0) * len(leader) != leader.numel():
        raise ValueError(f"{first} has strides {leader.stride()}: images must be the outermost dimension in memory")
    for name, tensor in given[1:]:
        if _extents(tensor) != _extents(leader):
            raise ValueError(
                f"{name} has strides {tensor.stride()}, {first} {leader.stride()}: must be the same memory format "
                f"(contiguous or channels_last) for both"
            )


def _extents(tensor: Tensor) -> list[tuple[int, int]]:
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
