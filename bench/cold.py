"""Timing with a cold cache and without launches: enough sets of inputs to leave the L2 cache, all of their calls in one graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from bench.timing import Call
from fastanchor.graphs import Captured

# Times the L2 cache that the sets together fill.
BEYOND = 3


def sets_needed(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs leave the L2 cache; 2 where there is no GPU."""
    if device.type != "cuda":
        return 2
    return max(2, math.ceil(BEYOND * torch.cuda.get_device_properties(device).L2_cache_size / bytes_of_one))


def sweep(function: Callable[..., object], sets: Sequence[tuple]) -> Call:
    """One call is `function` on every set."""

    def call() -> None:
        for inputs in sets:
            function(*inputs)

    return call


def replayed(call: Call, device: torch.device) -> Call:
    """The call as one captured graph: device time alone. Raises CaptureFailed for what cannot be captured."""
    token = torch.zeros(1, device=device)

    def function(_: torch.Tensor) -> None:
        call()

    captured = Captured(function, (token,))
    return lambda: captured(token)
