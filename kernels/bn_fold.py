"""All BatchNorms of a network folded into their convolutions in one launch, from live parameters, by a table of addresses.

`fold_all` of `fastanchor/ops/folding.py` is the truth.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtype, on_device

# Elements a program: 4 a thread, whose strided reads of another memory format are in flight together.
BLOCK, WARPS = 1024, 8


class Fold(NamedTuple):
    """One convolution: what is folded (fp32) and where it goes (fp32 or bf16).

    weight: (O, I, kh, kw), contiguous or channels_last; out_weight: the same shape, either format. bias, out_bias, gamma, beta:
    (O,) or None; mean, var: (O,), both None where no BatchNorm follows (then weight and bias are copied).
    """

    weight: Tensor
    out_weight: Tensor
    bias: Tensor | None
    out_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


class FoldTable:
    """Addresses and sizes of all layers on their device, made once; `bn_fold` reads the tensors' values anew at every call.

    current() says whether the addresses still hold: parameters moved by `.data = ` need a new table. It looks at no value, on the
    host alone. The table keeps the tensors alive, but not memory that they have left. Making one does not wait for the device.
    Raises ValueError for what does not fit.
    """

    def __init__(self, layers: list[Fold]):
        if not layers:
            raise ValueError("there is no layer to fold")
        dtypes = {layer.out_weight.dtype for layer in layers}
        if len(dtypes) > 1:
            raise ValueError(f"out_weights are {' and '.join(sorted(map(str, dtypes)))}: must be of one dtype")
        self.layers = layers
        self.device = layers[0].weight.device
        self.bf16 = dtypes == {torch.bfloat16}
        rows, blocks = [], []
        for number, layer in enumerate(layers):
            rows.append(_row(layer, self.device))
            blocks += [(number, block) for block in range(triton.cdiv(layer.weight.numel(), BLOCK))]
        self.rows = _upload(rows, torch.int64, self.device)
        self.blocks = _upload(blocks, torch.int32, self.device)
        self._addresses = self._look()

    def current(self) -> bool:
        """Whether every tensor is where, and laid out as, it was when the table was made."""
        return self._look() == self._addresses

    def _look(self) -> list:
        return [(t.data_ptr(), t.stride()) for layer in self.layers for t in layer[:-1] if t is not None]


def bn_fold(table: FoldTable) -> None:
    """out_weight = weight * s and out_bias = beta + (bias - mean) * s, s = gamma / sqrt(var + eps), of all layers, in one launch.

    Multiplied in fp32 and rounded once. Bytes an element of a weight: 4 read, 4 (bf16: 2) written; 2 FLOPs; the vectors come from
    the caches. `table.current()` must hold. Raises ValueError off CUDA.
    """
    with on_device(_fold_kernel, table=table.rows, blocks=table.blocks):
        _fold_kernel[(len(table.blocks),)](table.rows, table.blocks, BF16=table.bf16, BLOCK=BLOCK, num_warps=WARPS)


def _upload(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    # From pinned memory, or the copy would wait for all that the stream has still to do.
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _row(layer: Fold, device: torch.device) -> list[int]:
    """A layer's row of the table, in the order that the kernel reads."""
    weight, out_weight = layer.weight, layer.out_weight
    check_dtype("out_weight", out_weight, torch.float32, torch.bfloat16)
    if (layer.mean is None) != (layer.var is None):
        raise ValueError("mean and var: give both or neither")
    if layer.mean is None and (layer.gamma is not None or layer.beta is not None):
        raise ValueError("gamma and beta need mean and var")
    if (layer.out_bias is None) != (layer.bias is None and layer.mean is None):
        raise ValueError("out_bias: needed where there is a bias or a BatchNorm, and only there")
    if out_weight.shape != weight.shape or weight.ndim != 4:
        raise ValueError(
            f"out_weight has shape {tuple(out_weight.shape)}, weight {tuple(weight.shape)}: must be the same, 4 axes"
        )
    channels, inner, area = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
    for name, tensor in layer._asdict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the first layer on {device}: all must be on one device")
        if name in ("weight", "out_weight"):
            continue
        check_dtype(name, tensor, out_weight.dtype if name == "out_bias" else torch.float32)
        if tensor.shape != (channels,) or not tensor.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be ({channels},), contiguous")
    check_dtype("weight", weight, torch.float32)
    formats = [_planar(name, tensor) for name, tensor in (("weight", weight), ("out_weight", out_weight))]
    # A filter is an (inner, area) matrix, or its transpose; where the two formats agree it is one row.
    if formats[0] == formats[1]:
        fast, slow = inner * area, 1
    else:
        fast, slow = (area, inner) if formats[1] else (inner, area)
    pointers = (weight, out_weight, layer.bias, layer.out_bias, layer.mean, layer.var, layer.gamma, layer.beta)
    (eps_bits,) = struct.unpack("<i", struct.pack("<f", layer.eps))
    return [*(0 if tensor is None else tensor.data_ptr() for tensor in pointers), channels, fast, slow, eps_bits]


def _planar(name: str, tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} has strides {tensor.stride()}: must be contiguous or channels_last")
    return False


@triton.jit
def _fold_kernel(
    rows_ptr,  # int64 (layers, 12): eight addresses, 0 for none; channels, fast, slow, bits of eps
    blocks_ptr,  # int32 (programs, 2): layer, block of it
    BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, block = tl.load(blocks_ptr + tl.program_id(0) * 2), tl.load(blocks_ptr + tl.program_id(0) * 2 + 1)
    row_ptr = rows_ptr + layer * 12
    weight_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    out_type: tl.constexpr = tl.pointer_type(tl.bfloat16) if BF16 else tl.pointer_type(tl.float32)
    out_ptr = tl.load(row_ptr + 1).to(out_type)
    bias, out_bias = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    mean, var = tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    gamma, beta = tl.load(row_ptr + 6), tl.load(row_ptr + 7)
    channels, fast, slow = tl.load(row_ptr + 8), tl.load(row_ptr + 9).to(tl.int32), tl.load(row_ptr + 10).to(tl.int32)
    eps = tl.load(row_ptr + 11).to(tl.int32).to(tl.float32, bitcast=True)
    # Elements in the order of the output's memory: filter, then position in it.
    element = block * BLOCK + tl.arange(0, BLOCK)
    size = fast * slow
    inside = element < channels.to(tl.int32) * size
    channel, within = element // size, element % size
    source = channel * size + (within % fast) * slow + within // fast
    f32 = tl.pointer_type(tl.float32)
    folded = var != 0
    variance = tl.load(var.to(f32) + channel, mask=inside & folded, other=1.0)
    scale = tl.where(folded, 1.0 / tl.sqrt_rn(variance + eps), 1.0)
    scale = scale * tl.load(gamma.to(f32) + channel, mask=inside & (gamma != 0), other=1.0)
    weight = tl.load(weight_ptr + source, mask=inside, other=0.0) * scale
    tl.store(out_ptr + element, weight.to(out_ptr.dtype.element_ty), mask=inside)
    # The first element of every filter brings its bias along.
    leads = inside & (within == 0)
    shift = tl.load(bias.to(f32) + channel, mask=leads & (bias != 0), other=0.0)
    shift = shift - tl.load(mean.to(f32) + channel, mask=leads & folded, other=0.0)
    shift = tl.load(beta.to(f32) + channel, mask=leads & (beta != 0), other=0.0) + shift * scale
    tl.store(out_bias.to(out_type) + channel, shift.to(out_ptr.dtype.element_ty), mask=leads & (out_bias != 0))
