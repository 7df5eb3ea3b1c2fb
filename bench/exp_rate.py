"""How many exponentials a second a GPU can do: the ceiling, beside matrix products, of every loss made of softmaxes."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from bench.timing import seconds

BLOCK, STEPS, PROGRAMS = 1024, 512, 132 * 64


@triton.jit
def _exponentials(x_ptr, out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    # Eight elements a thread: eight chains of dependent ex2 in flight. x = 2^-x stays within (0, 1).
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out_ptr + at, x)


@functools.cache
def exp2_rate(device: torch.device) -> float:
    """exp2 of fp32 a second, in registers; the best of five rounds."""
    x = torch.rand(PROGRAMS * BLOCK, device=device)
    out = torch.empty_like(x)

    def call() -> None:
        with torch.cuda.device(device):
            _exponentials[(PROGRAMS,)](x, out, STEPS=STEPS, BLOCK=BLOCK, num_warps=4)

    call()
    return x.numel() * STEPS / min(seconds(call, device, 3) for _ in range(5))
