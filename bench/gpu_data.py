"""GPU run, input pipelines: how fast each gives batches, and what it costs the PGD-AT step that it feeds, in percent of the step.

Resident rows with the augmentation kernel and without, the engine's other backends, a DataLoader with per-image transforms, and
the ceiling: one batch again and again. Then JPEG files. All take turns round by round, see `fastanchor.pipes`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench import cases, data_cases
from bench.gpu_common import CIFAR_IMAGES, NEEDS_CUDA, Bench
from bench.timing import summary
from fastanchor import pipes
from fastanchor.data import dali, feeds
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.data.views import Prepared
from fastanchor.ops import images as operators
from fastanchor.pipes import Pairs, Pipe
from fastanchor.train.step import TrainStep

PART = "data"
METHOD, HOW, FILES = "PGD-AT", "feeding the step", "JPEG files"
CEILING, PUBLIC = "synthetic: one batch again", "DataLoader, 0 workers"
ALONE, WITHIN = "the step alone", "resident, within the step"
# A batch size takes about this long, with the capture of its two steps; with less left it is not begun. Files likewise.
BATCH_SECONDS, FILES_SECONDS = 30.0, 20.0
# What a turn should last.
TURN_SECONDS = 0.12
FILE_IMAGES, FILE_PIXELS, FILE_BATCH = 512, 224, 64
# torch's default of a DataLoader's prefetch_factor: batches that each worker has waiting at most.
READY = 2


class Pipeline(NamedTuple):
    """make: the context that gives its passes. ready: batches that may lie waiting. note: what its rows say besides."""

    make: Callable
    workers: int = 0
    ready: int = 0
    note: dict = {}  # noqa: RUF012


def run(bench: Bench) -> None:
    """Each batch size with pipelines of its own, then files."""
    count = 2 * max(bench.batches) if bench.quick else CIFAR_IMAGES
    split = Split(*cases.make_batch(count, bench.pixels, torch.device("cpu")))
    for batch in bench.batches:
        if _too_late(bench, BATCH_SECONDS, batch=batch):
            continue
        with bench.results.entry(PART, "group", batch=batch), contextlib.ExitStack() as stack:
            _measure(bench, data_cases.Source(split, batch, bench.device), stack)
        bench.tidy()
    images, pixels, batch = (16, 2 * bench.pixels, 4) if bench.quick else (FILE_IMAGES, FILE_PIXELS, FILE_BATCH)
    if not _too_late(bench, FILES_SECONDS, how=FILES, batch=batch):
        with bench.results.entry(PART, "files", batch=batch), contextlib.ExitStack() as stack:
            files = stack.enter_context(data_cases.jpeg_folder(images, pixels))
            _measure_files(bench, data_cases.Source(files, batch, bench.device, "resized_crop_flip"), stack)
        bench.tidy()


def _too_late(bench: Bench, needed: float, **row) -> bool:
    if bench.quick or bench.left() >= needed:
        return False
    bench.results.add(PART, "all", **row, left_out=f"{bench.left():.0f} s were left")
    return True


def _measure(bench: Bench, source: data_cases.Source, stack: contextlib.ExitStack) -> None:
    # Captured before any worker is there: a capture and the threads of a loader do not meet.
    data = ResidentSplit(source.split, source.device)
    on_views, on_indices = _steps(bench, source, data)
    opened, notes = _open(bench, source, _pipelines(bench, source), stack, how="alone")
    opened = {CEILING: Pipe(_taken(stack.enter_context(data_cases.synthetic(source)), stack)), **opened}
    rests = _rests(bench, opened)
    times = _take_turns(bench, {name: (pipe, _nothing) for name, pipe in opened.items()}, rests)
    for name, found in times.items():
        row = summary(found, times.get(PUBLIC))
        rate = {"images_per_s": 1e3 * source.batch / row["ms"]}
        bench.results.add(PART, name, how="alone", batch=source.batch, **row, **rate, **notes.get(name, {}))
    fed = {ALONE: (opened.pop(CEILING), on_views), **{name: (pipe, on_views) for name, pipe in opened.items()}}
    fed[WITHIN] = Pipe(_taken(functools.partial(_indices, source, data), stack)), on_indices
    chosen, why = feeds.choose("auto", source.split, source.device)
    times = _take_turns(bench, fed, rests)
    for name, found in times.items():
        # 0: a step that never waits.
        row = summary(found, times[ALONE]) | pipes.costs(found, times[ALONE])
        row |= {"images_per_s": 1e3 * source.batch / row["ms"], "precision": _precision(bench), **notes.get(name, {})}
        if name == {"resident": WITHIN}.get(chosen, chosen):
            target = pipes.TARGET_PERCENT
            row |= {"chosen": why, "target_percent": target, "within_target": row["cost_percent"] < target}
        bench.results.add(PART, name, how=HOW, method=METHOD, batch=source.batch, **row)


def _measure_files(bench: Bench, source: data_cases.Source, stack: contextlib.ExitStack) -> None:
    opened, notes = _open(bench, source, _file_pipelines(bench), stack, how=FILES)
    times = _take_turns(bench, {name: (pipe, _nothing) for name, pipe in opened.items()}, _rests(bench, opened))
    height, _ = source.split.image_shape
    for name, found in times.items():
        row = summary(found)
        row |= {"images_per_s": 1e3 * source.batch / row["ms"], "pixels": height, **notes[name]}
        bench.results.add(PART, name, how=FILES, batch=source.batch, **row)


def _open(
    bench: Bench, source: data_cases.Source, pipelines: dict[str, Pipeline], stack: contextlib.ExitStack, how: str
) -> tuple[dict[str, Pipe], dict[str, dict]]:
    """Those that can serve here, each with its first batch taken, and what their rows say besides; the others with a reason."""
    opened, notes = {}, {}
    missing = data_cases.left_out(pipelines, source.device)
    # Processes are forked before DALI's threads begin.
    for name, pipeline in sorted(pipelines.items(), key=lambda item: -item[1].workers):
        if name in missing:
            bench.results.add(PART, name, how=how, batch=source.batch, left_out=missing[name])
            continue
        with bench.results.entry(PART, name, how=how, batch=source.batch):
            take = _taken(stack.enter_context(pipeline.make(source)), stack)
            take()
            opened[name] = Pipe(take, pipeline.workers, pipeline.ready)
            notes[name] = pipeline.note
    return {name: opened[name] for name in pipelines if name in opened}, notes


def _pipelines(bench: Bench, source: data_cases.Source) -> dict[str, Pipeline]:
    """Of images in memory, by name."""
    made: dict[str, Pipeline] = {}
    fused, reason = operators.decide("augment", "auto", source.device)
    if fused:
        made["resident, kernel"] = Pipeline(data_cases.resident)
    else:
        reason = reason if bench.cuda else NEEDS_CUDA
        bench.results.add(PART, "resident, kernel", batch=source.batch, left_out=reason)
    made["resident, plain torch"] = Pipeline(functools.partial(data_cases.resident, kernels="off"))
    made["dali"] = _dali()
    workers = _workers(bench)
    made[f"torch, {workers} workers"] = _torch(workers)
    _, whose = data_cases.public_transform(bench.pixels)
    for count in (0, workers):
        make = functools.partial(data_cases.loader, workers=count)
        made[f"DataLoader, {count} workers"] = Pipeline(make, count, READY * count, {"transforms": whose})
    return made


def _file_pipelines(bench: Bench) -> dict[str, Pipeline]:
    workers = _workers(bench)
    return {
        "dali, mixed": _dali(decoder="mixed"), "dali, cpu": _dali(decoder="cpu"),
        **{f"torch, {count} workers": _torch(count) for count in (0, workers)},
    }  # fmt: skip


def _dali(**options) -> Pipeline:
    return Pipeline(functools.partial(data_cases.backend, name="dali", **options), ready=dali.IN_FLIGHT + dali.READ_AHEAD)


def _torch(workers: int) -> Pipeline:
    return Pipeline(functools.partial(data_cases.backend, name="torch", workers=workers), workers, READY * workers)


def _workers(bench: Bench) -> int:
    return 2 if bench.quick else 8


def _steps(bench: Bench, source: data_cases.Source, data: ResidentSplit) -> tuple[Callable[..., None], Callable[..., None]]:
    """The engine's step on images that come transformed, and as the engine runs it: from indices, transforms included."""
    config = cases.make_config(
        cases.METHODS[METHOD], bench.steps, precision=_precision(bench), graph="on" if bench.cuda else "off"
    )

    def make(load: Callable) -> TrainStep:
        return cases.make_step(config, cases.make_model(bench.width, bench.device), bench.device, load)

    given, resident = make(prepared), make(data.rows)
    with data_cases.synthetic(source) as run:
        given(*next(run()), progress=0.0)
    resident(*next(_indices(source, data)), progress=0.0)

    def on_views(images: Tensor, labels: Tensor) -> None:
        # A loader's images are NCHW.
        given(images.contiguous(memory_format=torch.channels_last), labels, progress=0.0)

    return on_views, functools.partial(resident, progress=0.0)


def prepared(images: Tensor, labels: Tensor) -> tuple[Prepared, Tensor]:
    """A step's batch whose images, fp32 (B, 3, H, W), are augmented already."""
    return Prepared({"aug": images}, {}), labels


def _indices(source: data_cases.Source, data: ResidentSplit) -> Iterator[tuple[Tensor]]:
    """An epoch's indices alone, for a step that gathers its images."""
    generator = torch.Generator().manual_seed(0)
    return ((indices,) for indices in data.shuffled(source.batch, generator=generator, drop_last=True))


def _taken(run: Callable[[], Iterator], stack: contextlib.ExitStack) -> Callable[[], tuple[Tensor, ...]]:
    """The next batch of a pipeline, pass after pass; what is under way ends with the stack."""
    return functools.partial(next, stack.enter_context(contextlib.closing(pipes.endless(run))))


def _take_turns(bench: Bench, pairs: Pairs, rests: dict[str, float] | None = None) -> dict[str, list[float]]:
    """Seconds of a batch in every round, by name: taken from its pipe and given to what uses it. rests: of `pipes.take_turns`."""
    once = pipes.estimate(pairs, bench.device)
    fill = 0.0 if bench.quick else TURN_SECONDS
    counts = {name: pipes.batches_a_turn(pipe, once[name], fill) for name, (pipe, _) in pairs.items()}
    return pipes.take_turns(pairs, counts, bench.device, bench.rounds, rests)


def _rests(bench: Bench, opened: dict[str, Pipe]) -> dict[str, float]:
    """Seconds that each pipeline's queue takes to fill again."""
    once = pipes.estimate({name: (pipe, _nothing) for name, pipe in opened.items()}, bench.device)
    return {name: min(pipes.LONGEST_REST, pipe.ready * once[name]) for name, pipe in opened.items()}


def _nothing(*_: Tensor) -> None:
    """What uses a batch of a pipeline alone."""


def _precision(bench: Bench) -> str:
    return "bf16" if bench.cuda else "fp32"
