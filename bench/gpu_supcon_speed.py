"""GPU run, speed of the SupCon kernels beside eager, torch.compile and peers: forward, backward, both; memory; share of floor.

Inputs rotate beyond the L2 cache. `ms` is of calls as they are made in Python, by the device's own events, its two halves
`forward_ms` and `backward_ms`; `replay_ms` is of one graph of all calls (device time alone), where N is small enough for launches
to matter, with `replay_backward_ms` the difference of both and forward.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from bench import cold
from bench import supcon_cases as cases
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.peers import losses as peers
from bench.timing import interleaved, peak_memory_mb, summary
from fastanchor.graphs import CaptureFailed

PART = "supcon_speed"
SIZES = (8192, 32768, 1024, 3072, 65536, 512)
# Up to here launches and the host show, so calls are replayed as well; beyond it a graph would hold gigabytes for nothing.
REPLAYED_N = 8192
ROUNDS, FILL = 5, 0.02
# Less than this left: not begun.
COMPILE_SECONDS = {"default": 25.0, "autotuned": 60.0}
BASE = "eager"


class Entry(NamedTuple):
    """forward(u) gives what backward(it, u) turns into the gradient; both work on one batch of labels.

    loss: what `function` computes; dense: N x N matrices are held; high: TF32 products.
    """

    forward: Callable[[Tensor], object]
    backward: Callable[[object, Tensor], object]
    function: str
    dense: bool
    high: bool


def run(bench: Bench) -> None:
    """The size of the promise with all that is compared, then the other sizes, then what takes a compiler long."""
    reason = bench.no_kernels()
    if reason is not None:
        bench.results.add(PART, "ours", left_out=reason)
    sizes, widths = (SIZES, (128, 64, 256)) if not bench.quick else ((64,), (16,))
    ours = ("fp16", "tf32", "ieee") if reason is None else ()
    _measure(bench, sizes[0], widths[0], ours, peers.PLAIN)
    _measure_compiled(bench, sizes[0], widths[0], ours[:1], peers.COMPILED, "default")
    for n in sizes[1:]:
        _measure(bench, n, widths[0], ours[:1], peers.PLAIN)
    _measure_compiled(bench, sizes[0], widths[0], ours[:1], peers.AUTOTUNED, "autotuned")
    for d in widths[1:]:
        for n in sizes:
            _measure(bench, n, d, ours[:1], {name: peers.PLAIN[name] for name in ("eager", "eager, TF32")})
    for d in widths:
        for n in sizes:
            if (n, d) != (sizes[0], widths[0]):
                _measure_compiled(bench, n, d, ours[:1], {"compiled, TF32": peers.COMPILED["compiled, TF32"]}, "default")
    for n in sizes[1:]:
        _measure_compiled(bench, n, widths[0], ours[:1], peers.AUTOTUNED, "autotuned")


def _measure_compiled(bench: Bench, n: int, d: int, ours: tuple[str, ...], found: dict[str, peers.Peer], kind: str) -> None:
    for name in found:
        reason = bench.no_compile(COMPILE_SECONDS[kind])
        if reason is not None:
            bench.results.add(PART, name, n=n, d=d, left_out=reason)
        else:
            torch._dynamo.reset()
            _measure(bench, n, d, ours, {BASE: peers.PLAIN[BASE], name: found[name]})


def _measure(bench: Bench, n: int, d: int, ours: tuple[str, ...], others: dict[str, peers.Peer]) -> None:
    """Peak memory of each alone, then all in turns."""
    u, y = (tensor.to(bench.device) for tensor in cases.embeddings("random", n, d))
    entries = _entries(bench, y, n, d, ours, others)
    memory, calls = {}, {}
    for name in list(entries):
        sets = _sets(bench, u, dense=entries[name].dense)
        with _recorded(bench, name, n, d):
            once = functools.partial(_once, entries[name], sets[0])
            once()  # what is lazy, and compilation
            memory[name] = peak_memory_mb(once, bench.device)
            calls[name] = sets
        bench.tidy()
    times = _timed(bench, {name: entries[name] for name in calls}, calls, n, d)
    for name, by_kind in times.items():
        entry = entries[name]
        row = {"n": n, "d": d, "function": entry.function, "sets": len(calls[name]), "peak_memory_mb": memory[name]}
        row |= summary(by_kind["both"], times.get(BASE, {}).get("both"))
        row |= {f"{half}_ms": 1e3 * statistics.median(by_kind[half]) for half in ("forward", "backward")}
        if "replay" in by_kind:
            replay = summary(by_kind["replay"], times.get(BASE, {}).get("replay"))
            row |= {f"replay_{key}": value for key, value in replay.items() if key != "rounds"}
            forward = statistics.median(by_kind["replay_forward"])
            row |= {"replay_forward_ms": 1e3 * forward, "replay_backward_ms": replay["ms"] - 1e3 * forward}
        row |= _shares(bench, n, d, row.get("replay_ms", row["ms"]))
        bench.results.add(PART, name, **row)
    bench.tidy()


def _entries(bench: Bench, y: Tensor, n: int, d: int, ours: tuple[str, ...], others: dict[str, peers.Peer]) -> dict[str, Entry]:
    """What can be measured here; a row for what cannot."""
    entries = {f"ours, {precision}": _ours(y, precision) for precision in ours}
    for name, peer in others.items():
        reason = peers.missing(peer)
        if reason is None and peer.needs is not None and not peer.dense and not bench.cuda:
            reason = NEEDS_CUDA
        if reason is None and peer.dense:
            reason = cases.dense_fits(n, n, bench.device)
        if reason is not None:
            bench.results.add(PART, name, n=n, d=d, function=peer.function, left_out=reason)
            continue
        with _recorded(bench, name, n, d):
            entries[name] = _peer(peer, y)
    return entries


def _ours(y: Tensor, precision: str) -> Entry:
    from fastanchor.kernels import supcon_launch

    options = supcon_launch.Options(precision=precision, temperature=peers.TEMPERATURE)
    one = torch.ones((), device=y.device)

    def forward(u: Tensor) -> object:
        return supcon_launch.forward(u, y, options)[1]

    def backward(saved: object, u: Tensor) -> object:
        return supcon_launch.backward(saved, one, u, options)

    return Entry(forward, backward, "hard SupCon", dense=False, high=False)


def _peer(peer: peers.Peer, y: Tensor) -> Entry:
    loss = peer.make()
    return Entry(
        lambda u: loss(u, y), lambda value, u: torch.autograd.grad(value, u), peer.function, dense=peer.dense, high=peer.high
    )


def _once(entry: Entry, inputs: tuple[Tensor]) -> None:
    (u,) = inputs
    with peers.matmul_precision(entry.high):
        entry.backward(entry.forward(u), u)


def _sets(bench: Bench, u: Tensor, dense: bool) -> list[tuple[Tensor]]:
    """Copies of the batch, enough to leave the cache; of dense code the matrices it goes through do most of that."""
    moved = u.numel() * u.element_size() + (8 * len(u) ** 2 if dense else 0)
    return [(u.clone().requires_grad_(),) for _ in range(cold.sets_needed(moved, bench.device))]


@contextlib.contextmanager
def _recorded(bench: Bench, name: str, n: int, d: int) -> Iterator[None]:
    """A failure is a row, and memory that runs out a reason: neither ends the part."""
    with bench.results.entry(PART, name, n=n, d=d):
        try:
            yield
        except torch.OutOfMemoryError as error:
            bench.results.add(PART, name, n=n, d=d, left_out=f"out of memory: {str(error).splitlines()[0]}"[:200])


def _timed(bench: Bench, entries: dict[str, Entry], sets: dict[str, list], n: int, d: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of one call by round: of both, forward and backward, and where N is small of a graph's replay."""
    found: dict[str, dict[str, list[float]]] = {name: {"both": [], "forward": [], "backward": []} for name in entries}
    for _ in range(ROUNDS if not bench.quick else 2):
        for name in list(found):
            with _recorded(bench, name, n, d):
                halves = _halves(entries[name], sets[name], bench.device)
                for half, seconds in zip(("forward", "backward", "both"), (*halves, sum(halves)), strict=True):
                    found[name][half].append(seconds)
                continue
            del found[name]
    replays = {}
    if bench.cuda and n <= REPLAYED_N:
        for name in found:
            entry = entries[name]
            with _recorded(bench, name, n, d):
                try:
                    both = cold.replayed(cold.sweep(lambda u, entry=entry: _once(entry, (u,)), sets[name]), bench.device)
                    replays[name] = both, cold.replayed(_forwards(entry, sets[name]), bench.device)
                except CaptureFailed as reason:
                    bench.results.add(PART, name, n=n, d=d, left_out=f"no graph: {reason}")
    calls = {f"{name}/{i}": call for name, pair in replays.items() for i, call in enumerate(pair)}
    times = interleaved(calls, bench.device, rounds=ROUNDS, fill=FILL)
    for name in replays:
        for kind, i in (("replay", 0), ("replay_forward", 1)):
            found[name][kind] = [seconds / len(sets[name]) for seconds in times[f"{name}/{i}"]]
    return found


def _forwards(entry: Entry, sets: list) -> Callable[[], None]:
    every = cold.sweep(entry.forward, sets)

    def call() -> None:
        with peers.matmul_precision(entry.high):
            every()

    return call


def _halves(entry: Entry, sets: list, device: torch.device) -> tuple[float, float]:
    """Seconds of one forward and one backward, each on average over the sets, with no wait in between."""
    marks = []
    with peers.matmul_precision(entry.high):
        for (u,) in sets:
            start = _mark(device)
            between = entry.forward(u)
            middle = _mark(device)
            entry.backward(between, u)
            marks.append((start, middle, _mark(device)))
            del between
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    forward = sum(_between(start, middle) for start, middle, _ in marks)
    return forward / len(sets), sum(_between(middle, end) for _, middle, end in marks) / len(sets)


def _mark(device: torch.device) -> torch.cuda.Event | float:
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def floor_seconds(n: int, d: int, matmul: float, exponentials: float | None) -> tuple[float, float]:
    """Least seconds of loss and gradient, by matrix products alone and with exponentials.

    Products: forward Z Z^T, 2 n^2 d FLOPs; backward Z Z^T anew and G Z, 4 n^2 d; by the matmul rate measured in this run.
    Exponentials: one of the softmax for each pair and pass, and one of the weight for each pair of a class, n^2 / CLASSES, by the
    rate of ex2 measured in this run. The units work side by side: the floor is the longer one.
    """
    products = 6 * n * n * d / matmul
    exps = 2 * n * n * (1 + 1 / cases.CLASSES)
    return products, max(products, exps / exponentials if exponentials else 0.0)


def _shares(bench: Bench, n: int, d: int, ms: float) -> dict[str, float]:
    if not bench.cuda:
        return {}
    from bench.exp_rate import exp2_rate

    products, floor = floor_seconds(n, d, bench.ceiling, exp2_rate(bench.device))
    return {"floor_ms": 1e3 * floor, "share_of_floor": 1e3 * floor / ms, "share_of_matmul_floor": 1e3 * products / ms}
