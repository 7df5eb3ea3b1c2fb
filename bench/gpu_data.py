"""GPU run, input pipelines: how fast each gives batches, and what it costs the PGD-AT step that it feeds, in percent of the step.

Resident rows with the augmentation kernel and without, a DataLoader with per-image transforms and 0 or 8 workers, and the
ceiling: one batch again and again. All take turns round by round; a turn begins after what workers had ready is taken away.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench import cases, data_cases
from bench.gpu_common import CIFAR_IMAGES, NEEDS_CUDA, Bench
from bench.timing import seconds, summary
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.ops import images as operators
from fastanchor.train.step import TrainStep, as_given

PART = "data"
METHOD, HOW = "PGD-AT", "feeding the step"
CEILING, PUBLIC = "synthetic: one batch again", "DataLoader, 0 workers"
ALONE, WITHIN = "the step alone", "resident, within the step"
# A batch size takes about this long, with the capture of its two steps; with less left it is not begun.
BATCH_SECONDS = 25.0
# A turn takes as many batches as fill so many seconds, within the bounds.
TURN_SECONDS, MOST = 0.12, 200
# Untimed at the beginning of a turn, after what the workers had ready is gone; for each worker one where there are more.
LEAD = 2
# Workers that begin together deliver together: a turn has whole cycles of them, at least so many.
CYCLES = 2


class Feed(NamedTuple):
    """Where a step's inputs come from. take: the next ones. workers: that make them, each with READY of them waiting at most."""

    take: Callable[[], tuple[Tensor, ...]]
    workers: int = 0


# torch's default of a DataLoader's prefetch_factor.
READY = 2


def run(bench: Bench) -> None:
    """Each batch size with pipelines of its own."""
    count = 2 * max(bench.batches) if bench.quick else CIFAR_IMAGES
    split = Split(*cases.make_batch(count, bench.pixels, torch.device("cpu")))
    for batch in bench.batches:
        if not bench.quick and bench.left() < BATCH_SECONDS:
            bench.results.add(PART, "all", batch=batch, left_out=f"{bench.left():.0f} s were left")
            continue
        with bench.results.entry(PART, "group", batch=batch), contextlib.ExitStack() as stack:
            _measure(bench, data_cases.Source(split, batch, bench.device), stack)
        bench.tidy()


def _measure(bench: Bench, source: data_cases.Source, stack: contextlib.ExitStack) -> None:
    # Captured before any worker is there: a capture and the threads of a loader do not meet.
    data = ResidentSplit(source.split, source.device)
    on_views, on_indices = _steps(bench, source, data)
    notes = {}
    feeds = {CEILING: Feed(_endless(stack.enter_context(data_cases.synthetic(source))))}
    for name, (make, workers, note) in _pipelines(bench, source).items():
        with bench.results.entry(PART, name, batch=source.batch):
            feed = Feed(_endless(stack.enter_context(make(source))), workers)
            feed.take()
            feeds[name], notes[name] = feed, note
    times = _take_turns(bench, {name: (feed, _nothing) for name, feed in feeds.items()})
    for name, found in times.items():
        row = summary(found, times.get(PUBLIC))
        rate = {"images_per_s": 1e3 * source.batch / row["ms"]}
        bench.results.add(PART, name, how="alone", batch=source.batch, **row, **rate, **notes.get(name, {}))
    fed = {ALONE: (feeds.pop(CEILING), on_views), **{name: (feed, on_views) for name, feed in feeds.items()}}
    fed[WITHIN] = Feed(_endless(functools.partial(_indices, source, data))), on_indices
    times = _take_turns(bench, fed)
    for name, found in times.items():
        row = summary(found, times[ALONE])
        # 0: a step that never waits.
        costs = [100 * (theirs / alone - 1) for theirs, alone in zip(found, times[ALONE], strict=True)]
        row |= {"cost_percent": statistics.median(costs), "cost_percent_range": [min(costs), max(costs)]}
        row |= {"images_per_s": 1e3 * source.batch / row["ms"], "precision": _precision(bench), **notes.get(name, {})}
        bench.results.add(PART, name, how=HOW, method=METHOD, batch=source.batch, **row)


def _pipelines(bench: Bench, source: data_cases.Source) -> dict[str, tuple[Callable, int, dict]]:
    """(what makes it, its workers, what the row says besides) by name."""
    made: dict[str, tuple[Callable, int, dict]] = {}
    fused, reason = operators.decide("augment", "auto", source.device)
    if fused:
        made["resident, kernel"] = data_cases.resident, 0, {}
    else:
        reason = reason if bench.cuda else NEEDS_CUDA
        bench.results.add(PART, "resident, kernel", batch=source.batch, left_out=reason)
    made["resident, plain torch"] = functools.partial(data_cases.resident, kernels="off"), 0, {}
    _, whose = data_cases.public_transform(bench.pixels)
    for workers in (0, 2) if bench.quick else (0, 8):
        make = functools.partial(data_cases.loader, workers=workers)
        made[f"DataLoader, {workers} workers"] = make, workers, {"transforms": whose}
    return made


def _steps(bench: Bench, source: data_cases.Source, data: ResidentSplit) -> tuple[Callable[..., None], Callable[..., None]]:
    """The engine's step on images that come transformed, and as the engine runs it: from indices, transforms included."""
    config = cases.make_config(
        cases.METHODS[METHOD], bench.steps, precision=_precision(bench), graph="on" if bench.cuda else "off"
    )

    def make(load: Callable) -> TrainStep:
        return cases.make_step(config, cases.make_model(bench.width, bench.device), bench.device, load)

    given, resident = make(as_given), make(data.rows)
    given.make_views = functools.partial(_views_of, given)
    with data_cases.synthetic(source) as run:
        given(*next(run()), progress=0.0)
    resident(*next(_indices(source, data)), progress=0.0)

    def on_views(images: Tensor, labels: Tensor) -> None:
        # A loader's images are NCHW.
        given(images.contiguous(memory_format=torch.channels_last), labels, progress=0.0)

    return on_views, functools.partial(resident, progress=0.0)


def _views_of(step: TrainStep, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`TrainStep.make_views` of images fp32 (B, 3, H, W) that are augmented already."""
    made = {"aug": images, "adv": step.attack(step.attacked, images, labels, generator=step.generators["attack"])}
    return {name: made[name] for name in step.method.views}


def _indices(source: data_cases.Source, data: ResidentSplit) -> Iterator[tuple[Tensor]]:
    """An epoch's indices alone, for a step that gathers its images."""
    generator = torch.Generator().manual_seed(0)
    return ((indices,) for indices in data.shuffled(source.batch, generator=generator, drop_last=True))


def _endless(run: Callable[[], Iterator]) -> Callable[[], tuple[Tensor, ...]]:
    """The next batch of a pipeline, pass after pass."""

    def batches() -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield from run()

    return functools.partial(next, batches())


def _take_turns(bench: Bench, pairs: dict[str, tuple[Feed, Callable]]) -> dict[str, list[float]]:
    """Seconds of a batch in every round, by name: taken from its feed and given to what uses it."""
    found: dict[str, list[float]] = {name: [] for name in pairs}
    counts: dict[str, int] = {}
    for name, (feed, use) in pairs.items():
        cycle = max(1, feed.workers)
        once = _turn(bench, feed, use, cycle)
        cycles = max(1 if cycle == 1 else CYCLES, math.ceil(TURN_SECONDS / max(once, 1e-6) / cycle))
        counts[name] = cycle * (1 if bench.quick else min(MOST, cycles))
    for _ in range(bench.rounds):
        for name, (feed, use) in pairs.items():
            found[name].append(_turn(bench, feed, use, counts[name]))
    return found


def _turn(bench: Bench, feed: Feed, use: Callable, count: int) -> float:
    for _ in range(READY * feed.workers):
        feed.take()
    for _ in range(max(LEAD, feed.workers)):
        use(*feed.take())
    return seconds(lambda: use(*feed.take()), bench.device, count)


def _nothing(*_: Tensor) -> None:
    """What uses a batch of a pipeline alone."""


def _precision(bench: Bench) -> str:
    return "bf16" if bench.cuda else "fp32"
