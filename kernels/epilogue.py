"""What follows a convolution in one pass over its output, in place: bias, residual and ReLU; and the ReLU's mask on its gradient.

torch's own operations (`out.add_(bias).add_(residual).relu_()`, `aten.threshold_backward`) are the truth.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtype, check_same_layout, on_device

# 8 elements a thread: 16-byte accesses for bf16, two of them in flight for fp32.
BLOCK, WARPS = 1024, 4


def epilogue_(out: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """out = relu(out + bias + residual), in place; bias, residual and ReLU may each be left out. Returns out.

    out: fp32 or bf16 (N, C, ...), dense, contiguous or channels_last: memory that nothing else reads. bias: (C,), contiguous;
    residual: out's shape and memory format; both of out's dtype. Added in fp32 and rounded once. NaN stays, as in torch.relu.

    Bytes an element (bf16): 2 read, 2 written, with a residual 2 more read; 1 to 3 FLOPs. Raises ValueError.
    """
    _check(out, residual=residual)
    inner, channels = _channel_of(out)
    if bias is not None:
        check_dtype("bias", bias, out.dtype)
        if bias.shape != (channels,) or not bias.is_contiguous():
            raise ValueError(f"bias has shape {tuple(bias.shape)}: must be ({channels},), contiguous")
    with on_device(_epilogue_kernel, out=out, bias=bias, residual=residual):
        if out.numel() == 0 or (bias is None and residual is None and not relu):
            return out
        # What there is none of is compiled away; its place takes any pointer.
        _epilogue_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out, out if bias is None else bias, out if residual is None else residual, out.numel(),
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, RELU=relu, CHANNELS=channels, INNER=inner, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return out


def relu_backward(gradient: Tensor, out: Tensor) -> Tensor:
    """The gradient before the ReLU whose result is `out`: gradient where out > 0 or out is NaN, else 0. New memory.

    With a residual it is the gradient of convolution and residual both. gradient, out: fp32 or bf16, one dtype, shape and dense
    memory format. Bytes an element (bf16): 4 read, 2 written. Raises ValueError.
    """
    _check(out, gradient=gradient)
    with on_device(_relu_backward_kernel, gradient=gradient, out=out):
        masked = torch.empty_like(gradient)
        if out.numel():
            _relu_backward_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                gradient, out, masked, out.numel(), BLOCK=BLOCK, num_warps=WARPS
            )  # fmt: skip
    return masked


def _check(out: Tensor, **others: Tensor | None) -> None:
    check_dtype("out", out, torch.float32, torch.bfloat16)
    for name, other in others.items():
        if other is not None:
            check_dtype(name, other, out.dtype)
    check_same_layout(out=out, **others)


def _channel_of(out: Tensor) -> tuple[int, int]:
    """(elements from one channel to the next in memory, channels)."""
    if out.ndim < 2:
        raise ValueError(f"out has shape {tuple(out.shape)}: must have channels, in its second dimension")
    if out.is_contiguous():
        return math.prod(out.shape[2:]), out.shape[1]
    if out.ndim != 4 or not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out has strides {out.stride()}: must be contiguous or channels_last")
    return 1, out.shape[1]


@triton.jit
def _epilogue_kernel(
    out_ptr, bias_ptr, residual_ptr,  # elements in the order of memory; bias: (CHANNELS,)
    numel,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    # Known when it is compiled, or a division by them would cost more than the memory traffic.
    CHANNELS: tl.constexpr, INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    start, within = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    at = start + within
    inside = at < numel
    value = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        # (at // INNER) % CHANNELS, the part in 64 bits once a program.
        channel = (((start // INNER) % CHANNELS).to(tl.int32) + ((start % INNER).to(tl.int32) + within) // INNER) % CHANNELS
        if INNER == 1 and CHANNELS % 8 == 0:
            # Channels come in runs of 8: one load of bf16 a thread, not eight.
            channel = tl.max_contiguous(tl.multiple_of(channel, 8), 8)
        value += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _relu_backward_kernel(gradient_ptr, out_ptr, masked_ptr, numel, BLOCK: tl.constexpr):  # elements in the order of memory
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    out = tl.load(out_ptr + at, mask=inside, other=0.0)
    # False for NaN, whose gradient torch lets through.
    stopped = out <= 0
    tl.store(masked_ptr + at, tl.where(stopped, 0.0, gradient.to(tl.float32)).to(masked_ptr.dtype.element_ty), mask=inside)
