"""GPU run, convolutions: each layer shape of the folded ResNet-18 by itself, forward (conv + bias + ReLU) and to the input.

Inputs rotate among enough sets to leave the L2 cache, and all sets are one captured graph, so launches do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_common import NEEDS_CUDA, Bench
from bench.timing import interleaved, summary
from fastanchor.graphs import Captured

PART = "convs"
# (channels, pixels a side) of the four stages.
SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Several times the 50 MB L2 cache of an H100.
ROTATED_BYTES = 200_000_000
COMPILE_SECONDS = 8.0


def run(bench: Bench) -> None:
    """bf16 before fp16, the stem, and the compiled ones last."""
    if not bench.cuda:
        bench.results.add(PART, "all", left_out=NEEDS_CUDA)
        return
    for dtype in DTYPES:
        for channels, pixels in SHAPES:
            for batch in bench.batches:
                _measure(bench, _Layer(batch, channels, channels, pixels, dtype), _plain())
    for batch in bench.batches:
        for channels in (3, 8):
            _measure(bench, _Layer(batch, channels, 64, 32, "bf16"), _plain())
    for dtype in DTYPES:
        for channels, pixels in SHAPES:
            for batch in bench.batches:
                layer = _Layer(batch, channels, channels, pixels, dtype)
                if not bench.compile or bench.left() < COMPILE_SECONDS:
                    reason = "compiling was switched off" if not bench.compile else f"{bench.left():.0f} s were left"
                    bench.results.add(PART, "forward, compiled", **vars(layer), left_out=reason)
                else:
                    torch._dynamo.reset()
                    compiled = torch.compile(_forward_aten, fullgraph=True, dynamic=False)
                    _measure(bench, layer, {"forward, compiled": compiled})


@dataclass(frozen=True)
class _Layer:
    """A 3x3 convolution of stride 1."""

    batch: int
    channels: int
    out_channels: int
    pixels: int
    dtype: str

    def flops(self) -> int:
        """2 a multiply-add; forward and to the input alike."""
        return 18 * self.batch * self.channels * self.out_channels * self.pixels**2


Operation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]


def _plain() -> dict[str, Operation]:
    return {
        "forward, aten": _forward_aten,
        "forward, cudnn_convolution_relu": _forward_cudnn,
        "to the input": _to_input,
        "to the input, ReLU's mask first": _to_input_masked,
    }


def _forward_aten(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return F.relu_(F.conv2d(x, weight, bias, padding=1))


def _forward_cudnn(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)


def _to_input(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
    )[0]


def _to_input_masked(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return _to_input(x, weight, bias, out, torch.ops.aten.threshold_backward(gradient, out, 0))


def _tensors(layer: _Layer, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(DTYPES[layer.dtype])
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    x = random(layer.batch, layer.channels, layer.pixels, layer.pixels)
    weight = random(layer.out_channels, layer.channels, 3, 3) / (3 * layer.channels**0.5)
    gradient = random(layer.batch, layer.out_channels, layer.pixels, layer.pixels)
    bias = random(layer.out_channels)
    return x, weight, bias, _forward_aten(x, weight, bias, x, x), gradient


def _measure(bench: Bench, layer: _Layer, operations: dict[str, Operation]) -> None:
    """A row an operation; its milliseconds are of one call."""
    first = _tensors(layer, bench.device, 0)
    count = max(2, -(-ROTATED_BYTES // sum(t.numel() * t.element_size() for t in first)))
    sets = [first, *(_tensors(layer, bench.device, seed) for seed in range(1, count))]
    with torch.no_grad():
        for name, operation in operations.items():
            with bench.results.entry(PART, name, **vars(layer)):

                def every(_: Tensor, operation: Operation = operation) -> None:
                    for tensors in sets:
                        operation(*tensors)

                captured = Captured(every, (first[2],))
                times = interleaved({name: lambda captured=captured: captured(first[2])}, bench.device, rounds=5, fill=0.01)
                row = summary([seconds / count for seconds in times[name]])
                rate = layer.flops() / row["ms"] * 1e3
                row |= {"model_tflops": rate / 1e12, "share_of_bf16_matmul": rate / bench.ceiling}
                bench.results.add(PART, name, **vars(layer), **row)
        sets.clear()
    bench.tidy()
