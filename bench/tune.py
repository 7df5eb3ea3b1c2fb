"""Tiles of the SupCon kernels by measurement: every shape compiled, those that spill or do not fit left out, the rest timed.

    python -m bench.tune [--kernel row_stats|gradient] [--precision fp16] [--d 64,128] [--n 1024,8192] [--write]

With --write the fastest become rows of `kernels/config.py` for this architecture, with the reason "measured: ...". Without a GPU
it does the part before timing alone, for --arch, and says so.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from fastanchor.kernels import config, limits, supcon_launch, supcon_pairs
from fastanchor.kernels.config import Row, Tile

from bench import aot, cold, program
from bench import supcon_cases as cases
from bench.timing import Call, interleaved, summary
from fastanchor.errors import UserError
from fastanchor.files import make_place

KERNELS = ("row_stats", "gradient")
ROWS, COLUMNS, WARPS, STAGES = (32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
# fp32 numbers a thread holds of the similarities and of the gradient's sums: with more it spills for certain.
MOST_SIMILARITIES, MOST_SUMS = 64, 128
# A tile serves all of these: what runs most, and what costs most registers among the cases of the rows without view matrices.
VARIANTS = ({}, {"weight": "pow", "detach_weights": False})
# Tiles that are timed against one another once each has been timed alone, and rounds of either.
FINALISTS, ROUNDS_ALONE, ROUNDS, FILL = 6, 3, 9, 0.01
# What a copy's launch writes leaves the cache as well, so that few rows need no more than these.
MOST_COPIES = 256
# Relative error of a gradient on random embeddings: fp16 is near 4e-4, a broken tile near 1.
WRONG = 5e-3
# Columns of a line of the repository's Python.
LINE = 130
# Candidates of a bucket take minutes to compile: after each so many a line says how far it is.
SAID_EVERY = 16
# What --write rewrites: the table of the repository that this file is part of.
TABLE = Path(__file__).resolve().parents[1] / "kernels" / "config.py"


class Search(NamedTuple):
    """One bucket of the table: whose tile is looked for, and at which size."""

    kernel: str
    arch: int
    precision: str
    d: int
    n: int

    @property
    def small(self) -> bool:
        return self.n <= config.SMALL_N


# --- compiling -----------------------------------------------------------------------------------------------------------------


def candidates(search: Search) -> list[Tile]:
    """Shapes that could fit: wgmma needs 64 rows."""
    least = 64 if search.arch >= 90 and search.precision != "ieee" else 16
    found = []
    for rows, columns, warps, stages in itertools.product(ROWS, COLUMNS, WARPS, STAGES):
        threads = 32 * warps
        sums = rows * search.d // threads if search.kernel == "gradient" else 0
        if rows >= least and rows * columns // threads <= MOST_SIMILARITIES and sums <= MOST_SUMS:
            found.append(Tile(rows, columns, warps, stages))
    return found


@contextlib.contextmanager
def forced(search: Search, tile: Tile) -> Iterator[None]:
    """Within, the tile serves the kernel in all cases: the first row of the table that serves one is taken."""
    row = Row(search.kernel, tuple(config.SHARED_LIMIT), search.precision, limits.MAX_FEATURES, tile, "tried")
    with mock.patch.object(config, "TABLE", (row, *config.TABLE)):
        yield


def compiled(search: Search, tile: Tile) -> dict:
    """Registers, spilled and shared bytes, the worst of the variants; `faults` in words, none where the tile may be timed."""
    found: dict = {"registers": 0, "spilled": 0, "shared": 0, "faults": []}
    for changed in VARIANTS:
        options = supcon_launch.Options(precision=search.precision, **changed)
        try:
            with forced(search, tile):
                launches = aot.supcon_launches(search.arch, search.n, search.d, options)
            (launch,) = [launch for launch in launches if launch.kernel.__name__ == search.kernel]
            row = {**search._asdict(), "tile": f"{tile.rows}x{tile.columns}"}
            row |= aot.compile_launch(launch, search.arch)
        except Exception as error:  # a shape that the compiler cannot make
            found["faults"].append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:80] if str(error) else ''}")
            continue
        found |= {name: max(found[name], row[name]) for name in ("registers", "spilled", "shared")}
        found["faults"] += [fault for fault in aot.faults(row) if fault not in found["faults"]]
    return found


def compile_all(search: Search, tiles: list[Tile], jobs: int) -> dict[Tile, dict]:
    """`compiled` of each, in this many processes; prints how far it is. Triton keeps on disk what they make."""
    found = {}
    with contextlib.ExitStack() as stack:
        each = map
        if jobs > 1:
            each = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))).map
        for tile, made in zip(tiles, each(compiled, [search] * len(tiles), tiles), strict=True):
            found[tile] = made
            if len(found) % SAID_EVERY == 0:
                print(f"  {len(found)} of {len(tiles)} compiled", flush=True)
    return found


# --- timing --------------------------------------------------------------------------------------------------------------------


class _Watch:
    """Launches a kernel as it is told to and keeps how."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((grid, args, kwargs))
            return self.kernel[grid](*args, **kwargs)

        return launch


class Problem:
    """Embeddings beyond the L2 cache in copies, on the device, and the true gradient."""

    def __init__(self, search: Search, device: torch.device):
        self.search = search
        self.u, self.y, arguments = cases.batch("default", "random", search.n, search.d, device)
        self.truth = cases.truth(self.u, self.y, arguments)[1]
        self.options = supcon_launch.Options(precision=search.precision)
        stored = search.n * search.d * (2 if search.precision == "fp16" else 4)
        self.copies = [self.u.clone() for _ in range(min(MOST_COPIES, cold.sets_needed(stored, device)))]

    def call(self, tile: Tile) -> Call:
        """The kernel with this tile on every copy, as one graph. Raises ValueError where its gradient is wrong."""
        watch = _Watch(getattr(supcon_pairs, self.search.kernel))
        with forced(self.search, tile), mock.patch.object(supcon_pairs, self.search.kernel, watch):
            for u in self.copies:
                gradient = supcon_launch.loss_and_grad(u, self.y, self.options)[1]
        error = cases.relative(gradient, self.truth)
        if not error < WRONG:
            raise ValueError(f"its gradient is off by {error:.1e}")

        def again() -> None:
            for grid, args, kwargs in watch.launches:
                watch.kernel[grid](*args, **kwargs)

        return cold.replayed(again, self.u.device)

    def times(self, tiles: list[Tile], rounds: int) -> dict[Tile, list[float]]:
        """Seconds of one launch by round; the tiles take turns."""
        calls = {tile: self.call(tile) for tile in tiles}
        found = interleaved(calls, self.u.device, rounds=rounds, fill=FILL)
        return {tile: [seconds / len(self.copies) for seconds in times] for tile, times in found.items()}


def timed(problem: Problem, tiles: list[Tile], deadline: float) -> tuple[dict[Tile, dict], dict[Tile, str]]:
    """Each tile alone, then the quickest in turns, by `summary`, the quickest first; and those that failed, with the reason."""
    alone: dict[Tile, float] = {}
    failed: dict[Tile, str] = {}
    for tile in tiles:
        if time.perf_counter() > deadline:
            failed[tile] = "no time was left"
            continue
        try:
            alone[tile] = min(problem.times([tile], ROUNDS_ALONE)[tile])
        except Exception as error:  # it may need more of something than the compiler said, or be wrong
            failed[tile] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        gc.collect()  # graphs refer to themselves
        torch.cuda.empty_cache()
    times = problem.times(sorted(alone, key=alone.get)[:FINALISTS], ROUNDS)
    found = {tile: summary(seconds) for tile, seconds in times.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]["ms"])), failed


def winner(search: Search, found: dict[Tile, dict], device_name: str, date: str) -> Row:
    """The row of the quickest tile; found: quickest first."""
    best, *others = found
    ahead = f"{found[others[0]]['ms'] / found[best]['ms']:.2f}x the next" if others else "the only one"
    reason = f"measured: {ahead} at N = {search.n} ({device_name}, {date})"
    return Row(search.kernel, (search.arch,), search.precision, search.d, best, reason, small=search.small)


# --- writing -------------------------------------------------------------------------------------------------------------------


def rewritten(source: str, winners: Iterable[Row]) -> str:
    """The text of config.py with these rows: each replaces the row of its own bucket, or stands before the one that served it.

    A bucket is a kernel, one architecture, a precision, the largest D and small or not, without views. Rows shared with other
    architectures stay, so nothing changes for these.
    """
    for row in winners:
        table = _parsed(source)
        lines = source.splitlines(keepends=True)
        bucket = _bucket(row)
        same = [span for known, span in table if _bucket(known) == bucket]
        if same:
            first, last = same[0]
            lines[first - 1 : last] = [_formatted(row)]
        else:
            before, first = _serving(table, row, config.SMALL_N + 1 if not row.small else 1)
            for_few, _ = _serving(table, row, 1)
            added = [_formatted(row)]
            if before is for_few and not row.small and before is not None:
                # The tile for few rows was not measured: it stays what it is.
                kept = Row(row.kernel, row.archs, row.precision, row.max_d, before.tile, before.reason, small=True)
                added.insert(0, _formatted(kept))
            lines[first - 1 : first - 1] = added
        source = "".join(lines)
    return source


def _bucket(row: Row) -> tuple:
    return row.kernel, row.archs, row.precision, row.max_d, row.small, row.views


def _parsed(source: str) -> list[tuple[Row, tuple[int, int]]]:
    """The rows of TABLE with the first and last of the lines they stand on."""
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    (table,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "TABLE"]
    # The file's own names, as those of groups of architectures, are the module's.
    rows = [eval(compile(ast.Expression(node), "config.py", "eval"), dict(vars(config))) for node in table.elts]
    return [(row, (node.lineno, node.end_lineno)) for row, node in zip(rows, table.elts, strict=True)]


def _serving(table: list[tuple[Row, tuple[int, int]]], row: Row, n: int) -> tuple[Row | None, int]:
    """The row that serves the bucket of `row` now, and its line; None and the line after the table where none does."""
    for known, (first, _) in table:
        same = (known.kernel, known.precision, known.views) == (row.kernel, row.precision, row.views)
        if same and row.archs[0] in known.archs and row.max_d <= known.max_d and (n <= config.SMALL_N or not known.small):
            return known, first
    return None, table[-1][1][1] + 1


def _formatted(row: Row) -> str:
    """As ruff formats it."""
    tile = f"Tile({', '.join(map(str, vars(row.tile).values()))})"
    archs = f"({row.archs[0]},)"
    parts = [json.dumps(row.kernel), archs, json.dumps(row.precision), str(row.max_d), tile]
    parts += [json.dumps(row.reason, ensure_ascii=False), *(["small=True"] if row.small else [])]
    line = f"    Row({', '.join(parts)}),\n"
    exploded = "".join(f"        {part},\n" for part in parts)
    return line if len(line) <= LINE + 1 else f"    Row(\n{exploded}    ),\n"


# --- the program ---------------------------------------------------------------------------------------------------------------


def run(search: Search, device: torch.device | None, jobs: int, deadline: float, keep: Path | None) -> Row | None:
    """Compile, time where there is a device, print; the winner, where there is one."""
    tiles = candidates(search)
    how = "to be timed" if device is not None else "ahead of time, no GPU: not timed"
    bucket = f"{search.kernel} sm_{search.arch} {search.precision} D = {search.d} N = {search.n}"
    print(f"\n{bucket} ({how}): {len(tiles)} candidates", flush=True)
    made = compile_all(search, tiles, jobs)
    good = [tile for tile in tiles if not made[tile]["faults"]]
    print(f"  {len(good)} of {len(tiles)} usable", flush=True)
    times, failed = timed(Problem(search, device), good, deadline) if device is not None and good else ({}, {})
    current = config.tile(search.kernel, search.arch, search.precision, search.d, search.n, False)
    for tile in sorted(good, key=lambda tile: times[tile]["ms"] if tile in times else float("inf")):
        row = {**search._asdict(), **vars(tile), **made[tile], **times.get(tile, {}), "failed": failed.get(tile)}
        ms = f"{1e3 * row['ms']:9.1f} us" if "ms" in row else ""
        shape = f"{tile.rows}x{tile.columns} {tile.warps}w {tile.stages}s"
        notes = f"{row['failed'] or ''}{' <- the table' if tile == current else ''}"
        print(f"  {shape:14} {row['registers']:4} registers {row['shared']:7} bytes shared {ms} {notes}", flush=True)
        if keep is not None:
            with keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if not times:
        return None
    return winner(search, times, torch.cuda.get_device_name(device), time.strftime("%Y-%m-%d"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""

    def count(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
        return int(text)

    def counts(text: str) -> list[int]:
        return [count(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: both")
    parser.add_argument("--precision", choices=supcon_launch.PRECISIONS, default="fp16")
    parser.add_argument("--d", type=counts, default=[128, 64, 256, 512], help="features, in order of worth")
    parser.add_argument("--n", type=counts, default=[8192, 1024], help=f"rows; up to {config.SMALL_N} is the table's small")
    parser.add_argument("--arch", type=int, default=90, choices=sorted(config.SHARED_LIMIT), help="without a GPU: sm_90 is 90")
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, after which nothing more is timed")
    parser.add_argument("--json", type=Path, help="a line of JSON for each tile, as it comes")
    parser.add_argument("--write", action="store_true", help="put the winners into kernels/config.py")
    args = parser.parse_args(arguments)
    if args.write and not torch.cuda.is_available():
        parser.error("--write needs a CUDA device: nothing is timed without one")
    if args.write and Path(config.__file__).resolve() != TABLE:
        parser.error(f"--write would change {TABLE}, but the table in use is {config.__file__}: install this repository first")
    if max(args.d) > limits.MAX_FEATURES:
        parser.error(f"--d {max(args.d)}: the kernels take at most {limits.MAX_FEATURES} features")
    try:
        if args.json:
            make_place(args.json)
    except UserError as error:
        parser.exit(2, f"bench.tune: {error}\n")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    args = parse(arguments)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    arch = args.arch if device is None else config.architecture(device)
    deadline, failures = time.perf_counter() + args.budget, 0
    for d, n, kernel in itertools.product(args.d, args.n, args.kernel or KERNELS):
        if time.perf_counter() > deadline:
            print(f"{kernel} D = {d} N = {n}: no time was left")
            continue
        try:
            row = run(Search(kernel, arch, args.precision, d, n), device, args.jobs, deadline, args.json)
        except Exception:  # of one bucket; the others are still worth their time
            traceback.print_exc()
            failures += 1
            continue
        if row is not None and args.write:
            TABLE.write_text(rewritten(TABLE.read_text(encoding="utf-8"), [row]), encoding="utf-8")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(program.run("bench.tune", main))
