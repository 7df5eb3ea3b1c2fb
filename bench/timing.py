"""Timing of calls that take turns: rounds in one process, a GPU by its own clock, medians with their spread; kernels counted.

Taking turns, a machine that speeds up or slows down does so for all of them; a ratio is formed within each round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from fastanchor.pipes import seconds

Call = Callable[[], object]

MOST_REPEATS = 50
# What starts work on a GPU from the host; a graph's replay is one of them.
LAUNCHES = (
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync",
    "cudaMemsetAsync",
)  # fmt: skip


def interleaved(calls: dict[str, Call], device: torch.device, *, rounds: int, fill: float = 0.0) -> dict[str, list[float]]:
    """Seconds of every call in every round, by name.

    Each call is first made twice untimed: what is lazy (kernels, algorithms, captures, compilation) is then done. fill: seconds
    that a call's turn should last at least, by repeating it (at most MOST_REPEATS times).
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(MOST_REPEATS, round(fill / seconds(call, device))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call, device, repeats[name]))
    return found


def summary(times: list[float], base: list[float] | None = None) -> dict[str, float | list[float]]:
    """`ms` and its range over the rounds; with a base also `ratio` = base / times of each round: median and range."""
    found: dict = {"ms": 1e3 * statistics.median(times), "ms_range": [1e3 * min(times), 1e3 * max(times)], "rounds": len(times)}
    if base is not None:
        ratios = [theirs / ours for theirs, ours in zip(base, times, strict=True)]
        found |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    return found


def count_kernels(call: Call) -> dict[str, int]:
    """`kernels`: run on the GPU during one call, copies and fills apart; `launches`: the host's calls that started them."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = launches = 0
    for event in profile.events():
        if event.device_type == on_gpu:
            kernels += not (getattr(event, "is_user_annotation", False) or event.name.startswith(("Memcpy", "Memset")))
        else:
            launches += event.name in LAUNCHES
    return {"kernels": kernels, "launches": launches}


def peak_memory_mb(call: Call, device: torch.device) -> float | None:
    """10^6 bytes that tensors take at most during the call, beyond those that were there before; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6
