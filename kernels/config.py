"""Tile shapes of the SupCon kernels, checked in: by architecture, stored precision, features D and rows N, each with its reason.

Chosen by ahead-of-time compilation (no spills with any weights, shared memory within the limit, tensor-core instructions:
tests/test_kernels_aot.py), not yet by timing.
Not `@triton.autotune`: it would make results depend on a race, fail without a driver and hide the decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shared memory that one block may use, in bytes, and multiprocessors of the usual card (A100, RTX 3090, H100). The latter sets
# how many programs share the columns; it stands here so that results do not depend on which card of a kind computes them.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
MULTIPROCESSORS = {80: 108, 86: 82, 90: 132}
SMALL_N = 4096  # up to here 128-row blocks are too few to fill the card even with the columns split
AMPERE = (80, 86)


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

    small: for N <= SMALL_N only. views: with view matrices, whose gathers cost registers; the other rows are for none.
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
    # H100. wgmma needs 64 rows; 4 warps hold 64 x 64, 8 warps 128 x 64.
    Row(
        "row_stats",
        (90,),
        "fp16",
        128,
        Tile(64, 64, 4, 3),
        "more programs for small N, two or three to a multiprocessor",
        small=True,
    ),
    Row("row_stats", (90,), "fp16", 128, Tile(128, 64, 8, 3), "128 rows halve the reads of z; at D = 256 Triton 3.6.0 spills"),
    Row("row_stats", (90,), "fp16", 512, Tile(64, 64, 8, 2), "the row tile alone is 64 KB at D = 512"),
    Row("row_stats", (90,), "tf32", 128, Tile(128, 32, 8, 2), "as fp16, with half the columns for twice the bytes"),
    Row("row_stats", (90,), "tf32", 256, Tile(64, 32, 4, 2), "the row tile is 64 KB"),
    Row("row_stats", (90,), "tf32", 512, Tile(64, 32, 8, 1), "the row tile is 128 KB: no room for a second column tile"),
    Row("gradient", (90,), "fp16", 128, Tile(64, 64, 4, 3), "more programs for small N", small=True),
    Row("gradient", (90,), "fp16", 128, Tile(128, 64, 8, 3), "128 x 128 spills"),
    Row("gradient", (90,), "fp16", 256, Tile(128, 32, 8, 2), "64 rows would make both warpgroups do the same exps"),
    Row("gradient", (90,), "fp16", 512, Tile(64, 32, 8, 2), "128 registers of accumulator; the exps are done twice"),
    Row("gradient", (90,), "tf32", 128, Tile(128, 32, 8, 2), "as fp16, with half the columns for twice the bytes"),
    Row("gradient", (90,), "tf32", 256, Tile(64, 16, 8, 2), "32 columns spill"),
    Row("row_stats", (90,), "fp16", 256, Tile(64, 32, 8, 2), "64 columns with gathers spill", views=True),
    Row("row_stats", (90,), "tf32", 256, Tile(64, 32, 8, 2), "as fp16", views=True),
    Row("gradient", (90,), "fp16", 256, Tile(64, 32, 8, 2), "64 columns with gathers spill", views=True),
    Row("gradient", (90,), "tf32", 128, Tile(64, 32, 8, 2), "as fp16", views=True),
    # A100 and the consumer cards after it, in 99 KB where that is possible. mma keeps one operand in registers.
    Row("row_stats", AMPERE, "fp16", 256, Tile(64, 64, 8, 2), "4 warps or 128 rows take all 255 registers"),
    Row("row_stats", AMPERE, "fp16", 512, Tile(64, 32, 8, 1), "80 KB"),
    Row("row_stats", AMPERE, "tf32", 128, Tile(64, 32, 4, 2), "4-byte z"),
    Row("row_stats", AMPERE, "tf32", 256, Tile(64, 32, 8, 1), "80 KB"),
    Row("row_stats", (80,), "tf32", 512, Tile(64, 32, 8, 1), "160 KB: A100 only"),
    Row("gradient", AMPERE, "fp16", 128, Tile(64, 64, 8, 3), "58 KB; 4 warps take all 255 registers"),
    Row("gradient", AMPERE, "fp16", 256, Tile(64, 64, 8, 2), "73 KB"),
    Row("gradient", AMPERE, "fp16", 512, Tile(32, 32, 8, 1), "64 rows spill"),
    Row("gradient", AMPERE, "tf32", 128, Tile(64, 32, 8, 2), "4-byte z"),
    Row("gradient", AMPERE, "tf32", 256, Tile(32, 32, 8, 1), "64 rows take all 255 registers"),
    Row("gradient", (80,), "tf32", 512, Tile(32, 16, 8, 1), "128 KB: A100 only"),
    Row("row_stats", AMPERE, "fp16", 256, Tile(64, 32, 8, 2), "64 columns with gathers spill", views=True),
    Row("gradient", AMPERE, "fp16", 256, Tile(64, 32, 8, 2), "64 columns with gathers spill", views=True),
    # fp32 without tensor cores: both operands pass through registers, so tiles are small.
    Row("row_stats", (80, 86, 90), "ieee", 256, Tile(32, 32, 8, 1), "64 rows spill"),
    Row("row_stats", (80, 90), "ieee", 512, Tile(32, 32, 8, 1), "128 KB"),
    Row("gradient", (80, 86, 90), "ieee", 256, Tile(32, 32, 8, 1), "64 rows spill"),
    Row("gradient", (80, 90), "ieee", 512, Tile(32, 32, 8, 1), "132 KB"),
    Row("row_stats", (80, 86, 90), "ieee", 256, Tile(32, 32, 8, 1), "as without", views=True),
    Row("gradient", (80, 86, 90), "ieee", 256, Tile(32, 32, 8, 1), "as without", views=True),
)


def architecture(device: torch.device) -> int:
    """The architecture whose rows serve `device`; that of the H100 where there is none, for the interpreter.

    Ada (8.9) and consumer Blackwell (12.x) have the shared memory of 8.6, data-centre Blackwell (10.x) that of 9.0.
    """
    if device.type != "cuda":
        return 90
    capability = torch.cuda.get_device_capability(device)
    if (9, 0) <= capability < (12, 0):
        return 90
    return 80 if capability == (8, 0) else 86


def tile(kernel: str, arch: int, precision: str, n_features: int, n: int, views: bool) -> Tile | None:
    """The first row of the table that serves the case, or None. n_features may be padded or not."""
    for row in TABLE:
        serves = (row.kernel, row.precision, row.views) == (kernel, precision, views) and arch in row.archs
        if serves and n_features <= row.max_d and (n <= SMALL_N or not row.small):
            return row.tile
    return None
