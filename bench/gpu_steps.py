"""GPU run, the whole iteration: PGD-AT and ANCHOR, naive and engine, with and without graph and compiler, and a timed epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import perf_counter

import torch

from bench import cases, cost
from bench.gpu_common import CIFAR_IMAGES, NEEDS_CUDA, Bench
from bench.timing import Call, interleaved, peak_memory_mb, summary
from fastanchor.ceilings import copy_bandwidth, matmul_rate
from fastanchor.config import Config
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.methods import build_method
from fastanchor.train.step import TrainStep
from fastanchor.train.throughput import step_cost

PART = "steps"
NAIVE = "naive, fp32"
SECOND_RUNG = "second rung (bf16 autocast, channels-last, cudnn.benchmark)"
# Compiling one step on first sight takes about this long; with less left it is not begun.
COMPILE_SECONDS = 75.0


def run(bench: Bench) -> None:
    """Without the compiler first; then an epoch with the best setting so far; then compiled, batch by batch."""
    data = resident(bench)
    best: dict[str, tuple[float, int, dict]] = {}
    for batch in bench.batches:
        for method in cases.METHODS:
            with bench.results.entry(PART, "group", method=method, batch=batch):
                _note(best, method, batch, _group(bench, data, method, batch, plain_settings(bench)))
            bench.tidy()
    for method, (_, batch, settings) in best.items():
        with bench.results.entry(PART, "timed epoch", method=method, batch=batch, **settings):
            _epoch(bench, data, method, batch, settings)
        bench.tidy()
    for batch in bench.batches:
        for method in cases.METHODS:
            _compiled(bench, data, method, batch, best)


def _compiled(bench: Bench, data: ResidentSplit, method: str, batch: int, best: dict) -> None:
    """The compiled settings of one method and batch, and an epoch where they are the best so far."""
    names = ("engine, bf16, graph, compile", "engine, bf16, compile")
    fields = {"method": method, "batch": batch, "cudnn_benchmark": bench.cudnn_benchmark}
    reason = bench.no_compile(COMPILE_SECONDS)
    if reason is not None:
        for name in names:
            bench.results.add(PART, name, **fields, left_out=reason)
        return
    # The graph first: without it the compiler's work is found in its cache.
    settings = dict(zip(names, ({"graph": "on"}, {"graph": "off"}), strict=True))
    if not bench.cuda:
        bench.results.add(PART, names[0], **fields, left_out=NEEDS_CUDA)
        del settings[names[0]]
    torch._dynamo.reset()
    compiled = {name: {**kept, "precision": "bf16", "compile": True} for name, kept in settings.items()}
    with bench.results.entry(PART, "compiled group", method=method, batch=batch):
        if _note(best, method, batch, _group(bench, data, method, batch, compiled)) and bench.left() > COMPILE_SECONDS / 2:
            _epoch(bench, data, method, batch, best[method][2])
    bench.tidy()


def plain_settings(bench: Bench) -> dict[str, dict]:
    """The engine's settings that need no compiler, by name."""
    if not bench.cuda:
        return {"engine, bf16": {"precision": "bf16"}, "engine, fp32": {"precision": "fp32"}}
    return {
        "engine, bf16, no graph": {"precision": "bf16", "backend": "eager"},
        # backend auto: the attack is a graph of its own where the step is none.
        "engine, bf16, attack graphed": {"precision": "bf16"},
        "engine, bf16, graph": {"precision": "bf16", "graph": "on"},
        "engine, bf16, graph, no kernels": {"precision": "bf16", "graph": "on", "kernels": "off"},
        "engine, fp32, graph": {"precision": "fp32", "graph": "on"},
    }


def _note(best: dict, method: str, batch: int, found: dict[str, tuple[float, dict]]) -> bool:
    """Remember the engine's setting of fewest seconds an image; whether it is one of `found`."""
    per_image, settings = min(((s / batch, kept) for s, kept in found.values()), default=(float("inf"), {}), key=lambda x: x[0])
    if (method in best and best[method][0] <= per_image) or not settings:
        return False
    best[method] = per_image, batch, settings
    return True


def resident(bench: Bench) -> ResidentSplit:
    """As many random images as CIFAR-10 has for training, on the device."""
    count = 2 * max(bench.batches) if bench.quick else CIFAR_IMAGES
    images, labels = cases.make_batch(count, bench.pixels, torch.device("cpu"))
    return ResidentSplit(Split(images, labels), bench.device)


def _config(bench: Bench, method: str, settings: dict) -> Config:
    return cases.make_config(cases.METHODS[method], bench.steps, **settings)


def _make_engine(bench: Bench, data: ResidentSplit, method: str, settings: dict) -> TrainStep:
    return cases.make_step(_config(bench, method, settings), cases.make_model(bench.width, bench.device), bench.device, data.rows)


def makers(
    bench: Bench, data: ResidentSplit, method: str, batch: int, settings: dict[str, dict]
) -> dict[str, Callable[[], Call]]:
    """What makes the calls of one method and batch, by name: naive, the second rung under cudnn.benchmark, the engine's."""
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:batch].to(bench.device)

    def make_naive(second_rung: bool) -> Call:
        hsc = cases.METHODS[method]
        step = cases.make_naive_step(bench.width, bench.device, hsc, bench.steps, second_rung=second_rung)
        return lambda: step(*data.take(indices))

    def make_engine(kept: dict) -> Call:
        step = _make_engine(bench, data, method, kept)
        return lambda: step(indices, progress=0.0)

    made: dict[str, Callable[[], Call]] = {NAIVE: functools.partial(make_naive, second_rung=False)}
    if bench.cudnn_benchmark:
        made[SECOND_RUNG] = functools.partial(make_naive, second_rung=True)
    return made | {name: functools.partial(make_engine, kept) for name, kept in settings.items()}


def _group(
    bench: Bench, data: ResidentSplit, method: str, batch: int, settings: dict[str, dict]
) -> dict[str, tuple[float, dict]]:
    """Naive and engine in turns; a row each. Returns median seconds and settings of the engine's."""
    fields = {"method": method, "batch": batch, "cudnn_benchmark": bench.cudnn_benchmark}
    calls, memory, first = {}, {}, {}
    for name, make in makers(bench, data, method, batch, settings).items():
        with bench.results.entry(PART, name, **fields):
            made: list[Call] = []
            started = perf_counter()
            memory[name] = peak_memory_mb(lambda make=make, made=made: made.append(make()) or made[0](), bench.device)
            first[name] = perf_counter() - started
            calls[name] = made[0]
    times = interleaved(calls, bench.device, rounds=bench.rounds, fill=4 * bench.fill)
    flops = _flops(bench, method)
    found = {}
    for name, seconds in times.items():
        row = summary(seconds, times.get(NAIVE))
        row |= {"extrapolated_s_per_epoch": row["ms"] / 1e3 * CIFAR_IMAGES / batch, **bench.rates(flops, batch, row["ms"])}
        row |= {"peak_memory_mb": memory[name], "first_step_s": first[name]}
        bench.results.add(PART, name, **fields, **row)
        if name in settings:
            found[name] = row["ms"] / 1e3, settings[name]
    for precision in dict.fromkeys(kept["precision"] for kept in settings.values()):
        with bench.results.entry(PART, f"predicted, {precision}", **fields):
            bench.results.add(PART, f"predicted, {precision}", **fields, **_predicted(bench, method, batch, precision, flops))
    return found


def _predicted(bench: Bench, method: str, batch: int, precision: str, flops: int) -> dict[str, float]:
    """A row as if measured, by the cost model at this device's ceilings: operators in turn, and both of its bounds."""
    rates = cost.Rates(matmul_rate(bench.device, cost.DTYPES[precision]), copy_bandwidth(bench.device), "measured in this run")
    made = cost.predict(
        _config(bench, method, {"precision": precision}), rates, width=bench.width, pixels=bench.pixels, images=CIFAR_IMAGES,
        batch=batch, gpu=bench.cuda,
    )  # fmt: skip
    ms = made.in_turn_s * 1e3 * batch / CIFAR_IMAGES
    bounds = {"full_overlap_s_per_epoch": made.full_overlap_s, "no_overlap_s_per_epoch": made.no_overlap_s}
    return {"ms": ms, "extrapolated_s_per_epoch": made.in_turn_s, **bounds, **bench.rates(flops, batch, ms)}


def _flops(bench: Bench, method: str) -> int:
    built = build_method(_config(bench, method, {}))
    return step_cost(built, cases.make_model(bench.width, torch.device("cpu")), (bench.pixels, bench.pixels)).total


def _epoch(bench: Bench, data: ResidentSplit, method: str, batch: int, settings: dict) -> None:
    """One epoch over the resident images as the training loop runs it, from the drawing of the order to the metrics read."""
    step = _make_engine(bench, data, method, settings)
    step(torch.arange(batch, device=bench.device), progress=0.0)  # captures and compiles; not timed
    if bench.cuda:
        torch.cuda.synchronize(bench.device)
    started = perf_counter()
    step.reset({"augment": 2, "attack": 3})
    trained = 0
    for indices in data.shuffled(batch, generator=torch.Generator().manual_seed(0), drop_last=True):
        step(indices, progress=0.5)
        trained += batch
    metrics = step.read()
    seconds = perf_counter() - started
    bench.results.add(
        PART, "timed epoch", method=method, batch=batch, cudnn_benchmark=bench.cudnn_benchmark, **settings, images=trained,
        seconds=seconds, **bench.rates(_flops(bench, method), trained, 1e3 * seconds), loss=metrics["loss"],
        notes=dict(step.notes),
    )  # fmt: skip
