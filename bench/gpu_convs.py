"""GPU run, convolutions: each layer shape of the folded ResNet-18 by itself, forward (conv + bias + ReLU) and to the input.

Inputs rotate among enough sets to leave the L2 cache, and all sets are one captured graph, so launches do not count. Then the
refresh of all folded weights of a ResNet-18, with its launches and as a graph; these rows are of part "refresh".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases, cold
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.timing import interleaved, summary
from fastanchor.attacks.modes import attack_mode
from fastanchor.models.folded import FoldedTwin, fold
from fastanchor.ops import folding

PART, REFRESH = "convs", "refresh"
# (channels, pixels a side) of the four stages.
SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_SECONDS = 15.0


def run(bench: Bench) -> None:
    """The refresh, which is short, first; bf16 before fp16, the stem, and the compiled ones last."""
    for dtype in (torch.bfloat16, torch.float32):
        with bench.results.entry(REFRESH, "group", dtype=str(dtype)):
            _refresh(bench, dtype)
        bench.tidy()
    if not bench.cuda:
        bench.results.add(PART, "all", left_out=NEEDS_CUDA)
        return
    trusted, reason = folding.trusted("conv_epilogue", bench.device)
    if not trusted:
        bench.results.add(PART, "Triton's epilogue", left_out=reason)
    for dtype in DTYPES:
        for channels, pixels in SHAPES:
            for batch in bench.batches:
                # The kernels of the epilogue are for fp32 and bf16.
                _measure(bench, _Layer(batch, channels, channels, pixels, dtype), _plain(trusted and dtype == "bf16"))
    for batch in bench.batches:
        for channels in (3, 8):
            _measure(bench, _Layer(batch, channels, 64, 32, "bf16"), _plain(trusted, residual=False))
    for dtype in DTYPES:
        for channels, pixels in SHAPES:
            for batch in bench.batches:
                layer = _Layer(batch, channels, channels, pixels, dtype)
                reason = bench.no_compile(COMPILE_SECONDS)
                if reason is not None:
                    bench.results.add(PART, "compiled", **vars(layer), left_out=reason)
                else:
                    torch._dynamo.reset()
                    made = {"forward, compiled": _forward_aten, "forward + residual, compiled": _residual_aten,
                            "to the input, compiled": _to_input_masked}  # fmt: skip
                    _measure(bench, layer, {name: torch.compile(f, fullgraph=True, dynamic=False) for name, f in made.items()})


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


# (x, weight, bias, out, gradient); the gradient, which is of out's shape, serves as residual too.
Operation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]


def _plain(triton: bool, residual: bool = True) -> dict[str, Operation]:
    """What needs no compiler; the residual has the shape of the output."""
    made = {
        "forward, aten": _forward_aten,
        "forward, cudnn_convolution_relu": _forward_cudnn,
        "to the input": _to_input,
        "to the input, ReLU's mask first": _to_input_masked,
    }
    if triton:
        made |= {"forward, triton": _forward_triton, "to the input, triton": _to_input_triton}
    if residual:
        made |= {"forward + residual, aten": _residual_aten, "forward + residual, cudnn": _residual_cudnn}
        made |= {"forward + residual, triton": _residual_triton} if triton else {}
    return made


def _forward_aten(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return F.relu_(F.conv2d(x, weight, bias, padding=1))


def _forward_cudnn(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)


def _forward_triton(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    from fastanchor.kernels.epilogue import epilogue_

    return epilogue_(F.conv2d(x, weight, padding=1), bias)


def _residual_aten(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return F.relu_(F.conv2d(x, weight, bias, padding=1).add_(gradient))


def _residual_cudnn(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, gradient, 1.0, bias, (1, 1), (1, 1), (1, 1), 1)


def _residual_triton(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    from fastanchor.kernels.epilogue import epilogue_

    return epilogue_(F.conv2d(x, weight, padding=1), bias, gradient)


def _to_input(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
    )[0]


def _to_input_masked(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    return _to_input(x, weight, bias, out, torch.ops.aten.threshold_backward(gradient, out, 0))


def _to_input_triton(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
    from fastanchor.kernels.epilogue import relu_backward

    return _to_input(x, weight, bias, out, relu_backward(gradient, out))


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
    count = cold.sets_needed(sum(t.numel() * t.element_size() for t in first), bench.device)
    sets = [first, *(_tensors(layer, bench.device, seed) for seed in range(1, count))]
    with torch.no_grad():
        for name, operation in operations.items():
            with bench.results.entry(PART, name, **vars(layer)):
                call = cold.replayed(cold.sweep(operation, sets), bench.device)
                times = interleaved({name: call}, bench.device, rounds=5, fill=0.01)
                row = summary([seconds / count for seconds in times[name]])
                rate = layer.flops() / row["ms"] * 1e3
                row |= {"model_tflops": rate / 1e12, "share_of_bf16_matmul": rate / bench.ceiling}
                bench.results.add(PART, name, **vars(layer), **row)
        sets.clear()
    bench.tidy()


def _refresh(bench: Bench, dtype: torch.dtype) -> None:
    """Rows of plain torch, of the one kernel, and of a copy of all weights, the floor; `ratio` is plain torch's time over it."""
    model = cases.make_model(bench.width, bench.device)
    images, _ = cases.make_batch(2, bench.pixels, bench.device)
    with attack_mode(model, "eval"):
        twin = fold(model, images.permute(0, 3, 1, 2).float() / 255, dtype)
    ways = {
        "plain torch": lambda: twin.refresh(kernel=False),
        "copy alone": torch.no_grad()(lambda: _copy(twin)),
        "one kernel": twin.refresh,
    }
    fields = {"dtype": str(dtype).removeprefix("torch."), "layers": len(twin.layers)}
    trusted, reason = folding.trusted("bn_fold", bench.device)
    if not trusted:
        bench.results.add(REFRESH, "one kernel", **fields, left_out=reason)
        del ways["one kernel"]
    calls = {"eager": ways}
    if bench.cuda:
        calls["graph"] = {name: cold.replayed(way, bench.device) for name, way in ways.items()}
    moved = sum(layer.weight.numel() * (4 + layer.weight.itemsize) for layer in twin.layers)
    for how, made in calls.items():
        times = interleaved(made, bench.device, rounds=bench.rounds, fill=bench.fill / 4)
        for name, found in times.items():
            row = summary(found, times["plain torch"])
            bench.results.add(REFRESH, name, how=how, **fields, **row, gb_per_s=moved / row["ms"] / 1e6)


def _copy(twin: FoldedTwin) -> None:
    torch._foreach_copy_([layer.weight for layer in twin.layers], [layer.sources[0].weight for layer in twin.layers])
