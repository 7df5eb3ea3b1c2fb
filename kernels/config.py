"""Tile shapes of the SupCon kernels, checked in: by architecture, stored precision, features D and rows N, each with its reason.

Chosen by ahead-of-time compilation with Triton 3.6.0 and 3.7.1 (no variant runs out of registers, shared memory within the limit,
tensor-core instructions: `python -m bench.aot`), not yet by timing.
Not `@triton.autotune`: it would make results depend on a race, fail without a driver and hide the decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shared memory that one block may use, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Of the usual card: A100, RTX 3090, RTX 4090, H100 SXM (NVIDIA's architecture white papers), B200 (2 dies of 74). They set how
# many programs share the columns, and stand here so that results do not depend on which card of a kind computes them.
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148}
SMALL_N = 4096  # up to here 128-row blocks are too few to fill the card even with the columns split
AMPERE, HOPPER, EVERY = (80, 86, 89), (90, 100), tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Tile:
    """rows x columns of one similarity tile, warps of a program, depth of the software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Row:
    """The tile of `kernel` on `archs` for z stored in `precision` and D <= max_d.

    small: for N <= SMALL_N only. views: with what costs registers: view matrices, and all that `Options.plain` is not (top-k
    weights, `pairwise`, hard negatives, a selection, a maximum for each row); the other rows are for none of it.
    "row_stats" stands for all passes of the forward.
    """

    kernel: str
    archs: tuple[int, ...]
    precision: str
    max_d: int
    tile: Tile
    reason: str
    small: bool = False
    views: bool = False


# The first row that serves a case is taken.
TABLE = (
    # H100 and B200. wgmma needs 64 rows, tcgen05 takes 64 or 128; 8 warps over 128 rows, or over 64 and columns enough for two.
    Row("row_stats", (90,), "fp16", 128, Tile(64, 64, 4, 3), "more programs for small N, two to a multiprocessor", small=True),
    Row("row_stats", HOPPER, "fp16", 128, Tile(128, 32, 8, 3), "128 rows halve the reads of z; 64 columns spill (Triton 3.6.0)"),
    Row("row_stats", HOPPER, "fp16", 256, Tile(128, 32, 8, 2), "as up to 128; 3 stages would leave room for one program"),
    Row("row_stats", HOPPER, "fp16", 512, Tile(64, 64, 8, 2), "the row tile alone is 64 KB at D = 512"),
    Row("row_stats", HOPPER, "tf32", 128, Tile(128, 32, 8, 2), "as fp16"),
    Row("row_stats", HOPPER, "tf32", 256, Tile(64, 32, 4, 2), "the row tile is 64 KB"),
    Row("row_stats", HOPPER, "tf32", 512, Tile(64, 32, 8, 1), "the row tile is 128 KB: no room for a second column tile"),
    Row("gradient", (90,), "fp16", 128, Tile(64, 64, 4, 3), "more programs for small N", small=True),
    Row("gradient", (90,), "fp16", 128, Tile(128, 64, 8, 3), "128 x 128 spills; on sm_100 64 columns do (Triton 3.6.0)"),
    Row("gradient", HOPPER, "fp16", 256, Tile(128, 32, 8, 2), "64 rows would make both warpgroups do the same exps"),
    Row("gradient", HOPPER, "fp16", 512, Tile(64, 32, 8, 2), "128 registers of accumulator; the exps are done twice"),
    Row("gradient", HOPPER, "tf32", 128, Tile(128, 32, 8, 2), "as fp16, with half the columns for twice the bytes"),
    Row("gradient", HOPPER, "tf32", 256, Tile(64, 16, 8, 2), "32 columns, or 128 rows, spill"),
    Row("row_stats", HOPPER, "fp16", 256, Tile(64, 32, 8, 2), "128 rows spill with all options at once", views=True),
    Row("row_stats", HOPPER, "tf32", 256, Tile(64, 32, 8, 2), "as fp16", views=True),
    Row("gradient", (90,), "fp16", 128, Tile(128, 32, 8, 2), "64 columns spill with `pairwise` alone", views=True),
    Row("gradient", HOPPER, "fp16", 256, Tile(128, 16, 8, 2), "32 columns spill with all options at once", views=True),
    Row("gradient", (90,), "tf32", 256, Tile(64, 16, 8, 2), "128 rows or 32 columns spill with all options at once", views=True),
    Row(
        "gradient", (100,), "tf32", 128, Tile(64, 16, 8, 2), "as sm_90; D = 256 spills in every shape that was tried", views=True
    ),
    # A100 and the consumer cards after it, in 99 KB where that is possible. mma keeps one operand in registers.
    Row("row_stats", AMPERE, "fp16", 256, Tile(64, 64, 8, 2), "4 warps or 128 rows take all 255 registers"),
    Row("row_stats", AMPERE, "fp16", 512, Tile(64, 32, 8, 1), "80 KB"),
    Row("row_stats", AMPERE, "tf32", 128, Tile(64, 32, 4, 2), "4-byte z"),
    Row("row_stats", AMPERE, "tf32", 256, Tile(64, 32, 8, 1), "80 KB"),
    Row("row_stats", (80,), "tf32", 512, Tile(64, 32, 8, 1), "160 KB: A100 only"),
    Row("gradient", AMPERE, "fp16", 128, Tile(64, 64, 8, 3), "59 KB; 4 warps take all 255 registers"),
    Row("gradient", AMPERE, "fp16", 256, Tile(64, 64, 8, 2), "74 KB"),
    Row("gradient", AMPERE, "fp16", 512, Tile(32, 32, 8, 1), "64 rows spill"),
    Row("gradient", AMPERE, "tf32", 128, Tile(64, 32, 8, 2), "4-byte z"),
    Row("gradient", AMPERE, "tf32", 256, Tile(32, 32, 8, 1), "64 rows take all 255 registers"),
    Row("gradient", (80,), "tf32", 512, Tile(32, 16, 8, 1), "128 KB: A100 only"),
    Row("row_stats", AMPERE, "fp16", 256, Tile(64, 32, 8, 2), "64 columns spill with view matrices", views=True),
    Row("row_stats", AMPERE, "tf32", 256, Tile(32, 32, 8, 1), "4 warps take all 255 registers (Triton 3.6.0)", views=True),
    Row("gradient", AMPERE, "fp16", 128, Tile(32, 32, 8, 2), "64 rows spill with all options at once", views=True),
    Row("gradient", AMPERE, "fp16", 256, Tile(32, 32, 8, 1), "2 stages spill a few bytes", views=True),
    Row("gradient", AMPERE, "tf32", 256, Tile(16, 32, 8, 1), "32 rows spill with all options at once", views=True),
    # fp32 without tensor cores: both operands pass through registers, so tiles are small.
    Row("row_stats", EVERY, "ieee", 128, Tile(32, 16, 8, 1), "32 columns spill a few bytes"),
    Row("row_stats", EVERY, "ieee", 256, Tile(32, 32, 8, 1), "64 rows spill"),
    Row("row_stats", (80, 90, 100), "ieee", 512, Tile(32, 32, 8, 1), "128 KB"),
    Row("gradient", EVERY, "ieee", 256, Tile(16, 16, 8, 1), "32 rows spill a few bytes"),
    Row("gradient", (80, 90, 100), "ieee", 512, Tile(32, 32, 8, 1), "132 KB"),
    Row("row_stats", EVERY, "ieee", 256, Tile(32, 16, 8, 1), "32 columns spill a few bytes", views=True),
    Row("gradient", EVERY, "ieee", 128, Tile(16, 16, 8, 1), "as without", views=True),
    Row("gradient", EVERY, "ieee", 256, Tile(16, 32, 8, 1), "16 columns spill a few bytes", views=True),
)


def architecture(device: torch.device) -> int:
    """The architecture whose rows serve `device`; that of the H100 where there is none, for the interpreter.

    Of those in between, and of consumer Blackwell (12.x, with the shared memory of 8.9), the newest that asks for no more memory.
    """
    if device.type != "cuda":
        return 90
    capability = torch.cuda.get_device_capability(device)
    if (10, 0) <= capability < (12, 0):
        return 100
    if (9, 0) <= capability < (10, 0):
        return 90
    if capability >= (8, 9):
        return 89
    return 80 if capability == (8, 0) else 86


def row(kernel: str, arch: int, precision: str, n_features: int, n: int, views: bool) -> Row | None:
    """The first row of the table that serves the case, or None. n_features may be padded or not."""
    for known in TABLE:
        serves = (known.kernel, known.precision, known.views) == (kernel, precision, views) and arch in known.archs
        if serves and n_features <= known.max_d and (n <= SMALL_N or not known.small):
            return known
    return None


def tile(kernel: str, arch: int, precision: str, n_features: int, n: int, views: bool) -> Tile | None:
    """The tile of that row, or None."""
    found = row(kernel, arch, precision, n_features, n, views)
    return None if found is None else found.tile
