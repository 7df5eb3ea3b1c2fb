"""What a device can do at most, measured: matrix products in bf16 and fp32 (on a CPU convolutions too), and copying of memory.

Every "share of the ceiling" is a share of these, measured in the process that reports it: clocks and neighbours change.
`share_text` is how a share is shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F

from fastanchor.precision import full_precision

ROUNDS = 5
# Seconds of measuring a ceiling, shared by the rounds; a GPU's clock takes some of them to rise.
SECONDS = {"cpu": 0.2, "cuda": 0.5}
SMALLEST_MATRIX, LARGEST_MATRIX = 128, {"cpu": 4096, "cuda": 8192}
# Channels, pixels a side and kernel of the convolution that is timed on a CPU, and its most images.
CHANNELS, PIXELS, KERNEL, MOST_IMAGES = 256, 8, 3, 32
# Far beyond the last cache: 50 MiB on an H100, some 32 MiB on most processors.
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}

# What was measured as a ceiling and then passed is none, so a share of it says nothing.
PASSED = "passed"
WHY_PASSED = f"{PASSED}: the ceiling was measured low (a busy device), or is none for this work (a processor slow in bf16)"


@dataclass(frozen=True)
class Ceilings:
    """Matrix products in FLOP/s, 2 a multiply-add, fp32 with TF32 off; copying in B/s, each byte moved twice (read, written).

    On a CPU the quicker of a matrix product and a convolution: the two come from different libraries, of which that of the
    matrix products may leave a processor's widest instructions unused (fp32 on an AMD EPYC: less than half of a convolution's).
    """

    bf16_matmul: float
    fp32_matmul: float
    copy_bandwidth: float


def measure_ceilings(device: str | torch.device, *, seconds: float | None = None) -> Ceilings:
    """All ceilings of a device, each measured for about `seconds` (None: SECONDS), once a process.

    Neither torch's settings nor its random state change, and the memory taken is given back.
    """
    bf16, fp32 = (matmul_rate(device, dtype, seconds=seconds) for dtype in (torch.bfloat16, torch.float32))
    return Ceilings(bf16, fp32, copy_bandwidth(device, seconds=seconds))


def share_text(share: float) -> str:
    """A share of a ceiling for people, 1 being all: `40 %`, `0.31 %`, or PASSED where it rounds to more than all."""
    return PASSED if share >= 1.005 else f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def matmul_rate(device: str | torch.device, dtype: torch.dtype, *, seconds: float | None = None) -> float:
    """FLOP/s of the product of two large square matrices of `dtype`, 2 n^3 FLOPs each: the best of ROUNDS rounds.

    n is a power of two from 128 to 8192 (4096 on a CPU), as large as one product fits into a round: where a processor
    emulates bf16, a small product is all there is time for. On a CPU a 3 x 3 convolution of 256 channels is timed as well,
    where there is time, and the quicker of both counts. Measured once a process and number of threads.
    """
    device = _with_index(device)
    return _matmul_rate(device, dtype, seconds or SECONDS[device.type], torch.get_num_threads())


def copy_bandwidth(device: str | torch.device, *, seconds: float | None = None) -> float:
    """B/s of copying a buffer far beyond the caches within the device's memory, each byte moved twice: the best round."""
    device = _with_index(device)
    return _copy_bandwidth(device, seconds or SECONDS[device.type], torch.get_num_threads())


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float, threads: int) -> float:
    with full_precision(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        size = SMALLEST_MATRIX
        product = _product(device, dtype, size)
        once = _quickest(product, device, calls=1, rounds=2)
        while size < LARGEST_MATRIX[device.type] and 8 * once <= seconds / ROUNDS:
            size *= 2
            product = _product(device, dtype, size)
            once = _quickest(product, device, calls=1, rounds=2)
        rate = 2 * size**3 / _best(product, device, once, seconds)
        del product
        if device.type == "cpu":
            flops = 2 * (CHANNELS * KERNEL * PIXELS) ** 2
            # As many as fit into a round at that rate: none where bf16 is emulated, which no convolution makes quick.
            if images := min(MOST_IMAGES, int(rate * seconds / ROUNDS / flops)):
                convolution = _convolution(device, dtype, images)
                once = _quickest(convolution, device, calls=1, rounds=2)
                rate = max(rate, images * flops / _best(convolution, device, once, seconds))
    _release(device)
    return rate


@functools.cache
def _copy_bandwidth(device: torch.device, seconds: float, threads: int) -> float:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    once = _quickest(copy, device, calls=1, rounds=2)
    bandwidth = 2 * source.numel() / _best(copy, device, once, seconds)
    del copy, source
    _release(device)
    return bandwidth


def _product(device: torch.device, dtype: torch.dtype, size: int) -> Callable[[], object]:
    """A call that multiplies two matrices of normal random values: on zeros a GPU draws less power and clocks higher."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return functools.partial(torch.mm, a, b, out=torch.empty_like(a))


def _convolution(device: torch.device, dtype: torch.dtype, images: int) -> Callable[[], object]:
    """A call that convolves as many channels-last images of normal random values, without padding."""
    generator = torch.Generator(device).manual_seed(0)
    side = PIXELS + KERNEL - 1
    x, weight = (
        torch.randn(n, CHANNELS, size, size, generator=generator, device=device, dtype=dtype)
        .contiguous(memory_format=torch.channels_last)
        for n, size in ((images, side), (CHANNELS, KERNEL))
    )  # fmt: skip
    return functools.partial(F.conv2d, x, weight)


def _best(call: Callable[[], object], device: torch.device, once: float, seconds: float) -> float:
    """Seconds of a call, the best of ROUNDS rounds that take `seconds` together where a call takes `once`."""
    return min(once, _quickest(call, device, calls=max(1, int(seconds / ROUNDS / once)), rounds=ROUNDS))


def _quickest(call: Callable[[], object], device: torch.device, calls: int, rounds: int) -> float:
    """Seconds of a call, on average over a round of `calls`, in the quickest round; one call before them is not timed."""
    call()
    return min(_round(call, device, calls) for _ in range(rounds)) / calls


def _round(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of `calls` calls, on a GPU by its own clock."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for _ in range(calls):
            call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = perf_counter()
    for _ in range(calls):
        call()
    return perf_counter() - started


def _with_index(device: str | torch.device) -> torch.device:
    """The device as a key of the caches: "cuda" is another name for one of the numbered ones."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
