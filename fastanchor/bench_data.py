"""How fast each data backend gives batches on this machine, to nothing and to a training step: `fastanchor bench-data`.

All take turns (see `pipes`) beside a ceiling, one batch again and again, and the answer is compared with what `auto` takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastanchor import environment, pipes
from fastanchor.bench_sizes import cpu_sized, network, resting_step, step_flops, view_names
from fastanchor.config import Config
from fastanchor.data import dali, feeds, views
from fastanchor.data.decode import threads
from fastanchor.data.encoded import Encoded
from fastanchor.data.extra import Mixed
from fastanchor.data.order import epoch_order
from fastanchor.data.sources import ImageSet, Split
from fastanchor.data.stream import FeedSpec, StreamFeed
from fastanchor.data.views import Prepared, Rows
from fastanchor.errors import UserError
from fastanchor.methods import build_method, method_class
from fastanchor.ops import images as operators
from fastanchor.pipeline import load_images
from fastanchor.pipes import Candidate, Pairs, Pipe, costs, judge, memory_now, rates
from fastanchor.settings import to_dict
from fastanchor.train.checks import check_config, check_device
from fastanchor.train.loop import cudnn_benchmark
from fastanchor.train.memory import check_narrow_convolutions, explain_out_of_memory
from fastanchor.train.step import TrainStep

SCHEMA, KIND = 1, "bench-data"
CEILING = "ceiling: one batch again"
# Seconds of all measuring, images read and networks built: fewer rounds are made, down to pipes.ENOUGH, where ROUNDS do not fit.
BUDGET_S, ROUNDS = 60.0, 5
# Batches that one call of a feed's `epoch` is asked for: small sets have many epochs in it.
STRETCH = 512
# Batches that each of torch's workers makes in advance: torch's default.
READY = 2
FILES = ("folder:", "packed:")


@dataclass
class Row:
    """One backend. flags: that choose it. left_out: why it is not measured; else where its batches come from, and what a batch
    alone is given to, which makes the finished views of it. memory: as `memory_now`, what it has taken."""

    name: str
    backend: str
    flags: str = ""
    workers: int | None = None
    decoder: str | None = None
    left_out: str | None = None
    feed: feeds.Feed | None = None
    pipe: Pipe | None = None
    finish: Callable[..., object] | None = None
    memory: dict[str, float | None] = field(default_factory=dict)


class Still(StreamFeed):
    """A feed whose views are all the same stored images, uint8: a step is captured on it before any worker is there."""

    backend = "still"

    def __init__(self, split: Split | Mixed | Encoded, spec: FeedSpec, images: Tensor):
        super().__init__(split, spec)
        self.images = images

    def _make(self, jobs):
        for job in jobs:
            yield job, (self.images,) * len(self.spec.names)


def measure(
    config: Config, *, given: Collection[str] = (), views_wanted: int | None = None, rounds: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """All that `fastanchor bench-data` finds, JSON-ready: schema, kind, environment, settings, rows, recommended, config.

    given: dotted keys that the user has set, for `cpu_sized`. views_wanted: views drawn of every image (None: as many as the
    recipe's step takes). rounds: None for ROUNDS, or as many as fit into BUDGET_S. say: what is told while it runs. UserError.
    """
    check_config(config)
    device = environment.pick_device(config.device)
    check_device(config, device)
    if config.data.backend != "auto":
        raise UserError(f"data.backend = {config.data.backend}: leave it out, all backends are measured")
    if rounds is not None and rounds < 1:
        raise UserError(f"--rounds = {rounds}: must be >= 1")
    names = view_names(config, views_wanted)
    images = load_images(config)
    for note in images.notes:
        say(f"note: {note}")
    shrunk: list[str] = []
    if device.type == "cpu":
        config, shrunk = cpu_sized(config, given, lambda config: step_flops(config, images))
    if config.channels_last:
        check_narrow_convolutions(network(config, images.num_classes), images.image_shape, device)
    run = _Run(config, images, device, names, rounds, say)
    with cudnn_benchmark(), contextlib.ExitStack() as stack:
        found = run.measure(stack, shrunk)
    return {"schema": SCHEMA, "kind": KIND, "environment": environment.describe(device), **found, "config": to_dict(config)}


class _Run:
    """One measurement: images, feeds, steps."""

    def __init__(
        self, config: Config, images: ImageSet, device: torch.device, names: tuple[str, ...], rounds: int | None,
        say: Callable[[str], None],
    ):  # fmt: skip
        self.config, self.images, self.device, self.names, self.say = config, images, device, names, say
        self.wanted_rounds, self.started = rounds, time.perf_counter()
        if config.batch_size > len(images.train):
            raise UserError(f"batch_size = {config.batch_size}: must be at most {len(images.train)}, the number of training "
                            "images, since an incomplete last batch is dropped")  # fmt: skip
        self.split = images.train if images.extra is None else Mixed(images.train, images.extra)
        self.chosen, self.why = feeds.choose("auto", self.split, device)
        self.spec = feeds.feed_spec(config.data, names, build_method(config).indexed, device)
        self.fused = config.data.augment in views.CROPS and operators.decide("augment", config.engine.kernels, device)[0]
        self.generator = torch.Generator(device).manual_seed(config.seed)

    @functools.cached_property
    def streamed(self) -> Split | Mixed | Encoded | str:
        """What --data.backend dali and torch work on: a folder's files, also where auto decodes them all. Or why not."""
        data = self.config.data
        if isinstance(self.split, Encoded) or self.images.extra is not None or not data.source.startswith(FILES):
            return self.split
        try:
            return load_images(dataclasses.replace(self.config, data=dataclasses.replace(data, backend="torch"))).train
        except UserError as error:
            return _line(error)

    def measure(self, stack: contextlib.ExitStack, shrunk: list[str]) -> dict[str, Any]:
        rows = list(self._rows())
        self._announce(rows, shrunk)
        # A capture and the threads of a loader had better not meet: what has none is opened first.
        self._open(rows[0], stack)
        ceiling, steps = self._steps(rows[0].feed)
        # Processes are forked before DALI's threads begin.
        for row in sorted(rows[1:], key=lambda row: row.backend, reverse=True):
            self._open(row, stack)
        lines = {CEILING: Row(CEILING, "none", pipe=Pipe(lambda: ceiling), finish=self._finish_prepared)}
        lines |= {row.name: row for row in rows if row.pipe is not None}
        alone: Pairs = {name: (row.pipe, row.finish) for name, row in lines.items()}
        once = pipes.estimate(alone, self.device)
        rests = {name: min(pipes.LONGEST_REST, pipe.ready * once[name]) for name, (pipe, _) in alone.items()}
        counts = {name: pipes.batches_a_turn(pipe, once[name], pipes.TURN_SECONDS) for name, (pipe, _) in alone.items()}
        rounds, _ = self._fitting(pipes.round_seconds(alone, once, once, counts, rests), 0.3 * BUDGET_S)
        by_alone = pipes.take_turns(alone, counts, self.device, rounds, rests)
        fed: Pairs = {
            name: (row.pipe, steps["resident" if row.backend == "resident" else "stream"]) for name, row in lines.items()
        }
        step_s = pipes.turn(fed[CEILING][0], fed[CEILING][1], self.device, 1)
        counts = {name: pipes.batches_a_turn(pipe, step_s, pipes.TURN_SECONDS) for name, (pipe, _) in fed.items()}
        # Where step and workers share the cores, a batch takes as long as both.
        both = {name: step_s + once[name] for name in fed}
        rounds, left = self._fitting(pipes.round_seconds(fed, once, both, counts, rests), BUDGET_S)
        self.say(f"feeding the step, which takes {1e3 * step_s:.3g} ms: {pipes.told(rounds)}, about {max(1, round(left))} s")
        by_fed = pipes.take_turns(fed, counts, self.device, rounds, rests)
        measured = [self._as_json(lines.get(row.name, row), by_alone, by_fed) for row in [lines[CEILING], *rows]]
        candidates = {name: Candidate(row.backend, row.flags, by_fed[name]) for name, row in lines.items() if name != CEILING}
        return {"settings": self._settings(), "rows": measured, "recommended": judge(self.chosen, self.why, candidates)}

    def _rows(self) -> Iterator[Row]:
        """All that is to be measured, the resident one first."""
        yield Row("resident", "resident", "--data.backend resident")
        wanted, most = self.config.data.decoder, self.config.data.workers
        if isinstance(self.streamed, Encoded):
            decoders = (wanted,) if wanted != "auto" else ("mixed", "cpu") if self.device.type == "cuda" else ("cpu",)
            for decoder in decoders:
                yield Row(f"dali, {decoder}", "dali", f"--data.backend dali --data.decoder {decoder}", most, decoder)
        else:
            yield Row("dali", "dali", "--data.backend dali", most)
        for workers in dict.fromkeys((0, threads() if most is None else most)):
            name = f"torch, {workers} worker{'' if workers == 1 else 's'}"
            yield Row(name, "torch", f"--data.backend torch --data.workers {workers}", workers)

    def _open(self, row: Row, stack: contextlib.ExitStack) -> None:
        """Take a first batch from the row's feed, or say why it cannot serve here. UserError for images that are at fault."""
        split = self.split if row.backend == "resident" else self.streamed
        if isinstance(split, str):
            row.left_out = split
            return
        if split.image_shape != self.images.image_shape:
            row.left_out = f"makes images of {_size(split)}, and the decoded ones are {_size(self.split)}: say --image-size"
            return
        if row.backend == "resident" and not isinstance(split, Encoded) and self.chosen != "resident":
            row.left_out = self.why
            return
        before = memory_now(self.device)
        spec = dataclasses.replace(self.spec, workers=row.workers, decoder=row.decoder or self.spec.decoder)
        try:
            row.feed = stack.enter_context(contextlib.closing(feeds.open_feed(row.backend, split, spec)))
        except (UserError, ImportError, RuntimeError) as error:
            row.left_out = _line(error)
            return
        # Closed before its feed: it holds what is under way.
        batches = stack.enter_context(contextlib.closing(pipes.endless(self._passes(row.feed))))
        workers = row.workers if row.backend == "torch" else 0
        take = functools.partial(next, batches)
        row.pipe = Pipe(take, workers, dali.IN_FLIGHT + dali.READ_AHEAD if row.backend == "dali" else READY * workers)
        row.finish = functools.partial(self._finish, row.feed.load)
        try:
            row.finish(*take())
        except UserError:
            raise
        except RuntimeError as error:
            row.pipe, row.left_out = None, _line(error)
            return
        now = memory_now(self.device)
        row.memory = {key: None if now[key] is None else max(0.0, now[key] - before[key]) for key in now}

    def _passes(self, feed: feeds.Feed) -> Callable[[], Iterator[tuple[Tensor, ...]]]:
        """Stretches of so many epochs in one that their begin, which a large set has once in hundreds of steps, hardly counts."""
        numbers = iter(range(2**31))

        def run() -> Iterator[tuple[Tensor, ...]]:
            orders = [self._order(next(numbers))]
            while sum(map(len, orders)) < STRETCH * self.config.batch_size:
                orders.append(self._order(next(numbers)))
            return feed.epoch(torch.cat(orders), self.config.batch_size, next(numbers))

        return run

    def _order(self, seed: int) -> Tensor:
        data = self.config.data
        return epoch_order(
            self.images.train.labels, batch_size=self.config.batch_size, generator=torch.Generator().manual_seed(seed),
            drop_last=True, sampler=data.sampler, per_class=data.per_class,
            extra=0 if self.images.extra is None else len(self.images.extra), extra_share=data.extra_share,
        )  # fmt: skip

    def _finish(self, load: Callable, *batch: Tensor) -> list[Tensor]:
        given, _ = load(*batch)
        return [self._view(given, name, self.generator) for name in self.names]

    def _finish_prepared(self, *batch: Tensor) -> list[Tensor]:
        return [self._view(self._prepared(*batch)[0], name, self.generator) for name in self.names]

    def _prepared(self, labels: Tensor, *images: Tensor) -> tuple[Prepared, Tensor]:
        return Prepared(dict(zip(self.names, images, strict=True)), {}), labels

    def _view(self, given: Rows | Prepared, name: str, generator: torch.Generator) -> Tensor:
        """The finished view of a batch, as the training step makes it."""
        if isinstance(given, Prepared):
            return given.view(name)
        if name == "clean":
            return views.to_float(given.gather())
        data = self.config.data
        return views.augment(given, data.augment, generator, pad=data.pad, fused=self.fused)

    def _steps(self, resident: feeds.Feed | None) -> tuple[tuple[Tensor, ...], dict[str, Callable[..., None]]]:
        """The ceiling's batch; and the training steps by the kind of batch, each on a network of its own."""
        split, size = self.split, self.config.batch_size
        order = self._order(0)[:size]
        stored = split.gather(order).to(self.device)
        labels = self.images.train.labels[order % len(self.images.train)]
        labels = (torch.stack([labels, order], 1) if self.spec.indexed else labels).to(self.device)
        ceiling = labels, *(views.to_float(stored) for _ in self.names)
        still = Still(split, dataclasses.replace(self.spec, workers=0), stored)

        def load(*batch: Tensor) -> tuple[Prepared, Tensor]:
            # The ceiling's views have their colours.
            return self._prepared(*batch) if len(batch) == len(ceiling) else still.load(*batch)

        steps = {"stream": self._step(load)}
        if resident is not None:
            steps["resident"] = self._step(resident.load)
        if steps["stream"].graphed:
            # A graph for every kind of batch that may come: views uint8 or fp32, with colours or without.
            for images in (stored, ceiling[1]):
                _try(steps["stream"], *next(Still(split, still.spec, images).epoch(order, size, 0)))
            _try(steps["stream"], *ceiling)
            if resident is not None:
                _try(steps["resident"], *next(resident.epoch(order, size, 0)))
        return ceiling, {kind: functools.partial(_try, step) for kind, step in steps.items()}

    def _step(self, load: Callable) -> TrainStep:
        def loaded(*batch: Tensor):
            given, labels = load(*batch)
            for name in self.names[len(step.method.drawn) :]:  # views that this recipe has no use for, asked for all the same
                self._view(given, name, step.generators["augment"])
            return given, labels

        step = resting_step(self.config, self.images, self.device, loaded)
        return step

    def _fitting(self, round_s: float, budget: float) -> tuple[int, float]:
        """How many rounds, and the seconds that they take."""
        left = budget - (time.perf_counter() - self.started)
        rounds = self.wanted_rounds or max(pipes.ENOUGH, min(ROUNDS, int(left / round_s)))
        return rounds, rounds * round_s

    def _announce(self, rows: list[Row], shrunk: list[str]) -> None:
        settings = self._settings()
        what = "CPU figures" if self.device.type == "cpu" else environment.device_name(self.device)
        self.say(f"{settings['source']}: {settings['images']} training images, {_size(self.split)}, {settings['kept']}; {what}")
        self.say(f"the step: {settings['step']}, batch size {settings['batch_size']}, {settings['precision']}"
                 + (f"; since this is a CPU: {' '.join(shrunk)}" if shrunk else ""))  # fmt: skip
        rounds = f"{ROUNDS} rounds, up to {BUDGET_S:.0f} s, more where a step is slow"
        rounds = rounds if self.wanted_rounds is None else pipes.told(self.wanted_rounds)
        self.say(f"in turns, to nothing and then to the step ({rounds}): {'; '.join(row.name for row in rows)}")

    def _settings(self) -> dict[str, Any]:
        config = self.config
        width = config.model.width
        return {
            "source": self.images.name, "images": len(self.images.train), "image_size": list(self.images.image_shape),
            "kept": "encoded" if isinstance(self.streamed, Encoded) else "decoded", "batch_size": config.batch_size,
            "augment": config.data.augment, "views": list(self.names), "precision": config.precision,
            "step": f"{config.model.name}{'' if width is None else f' of width {width}'}, "
                    + (f"PGD-{config.attack.steps}" if method_class(config.method).objectives else "no attack"),
        }  # fmt: skip

    def _as_json(self, row: Row, alone: dict[str, list[float]], fed: dict[str, list[float]]) -> dict[str, Any]:
        found = {"name": row.name, "backend": row.backend, "flags": row.flags, "workers": row.workers, "decoder": row.decoder}
        if row.pipe is None:
            return found | {"left_out": row.left_out}
        batch = self.config.batch_size
        cost = costs(fed[row.name], fed[CEILING])
        return found | {
            "alone": rates(alone[row.name], batch), "feeding": rates(fed[row.name], batch) | cost,
            "within_target": cost["cost_percent"] < pipes.TARGET_PERCENT, **row.memory,
        }  # fmt: skip


def _try(step: TrainStep, *batch: Tensor) -> None:
    try:
        step(*batch, progress=0.0)
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(error, step, *batch) from error


def _size(split: Split | Mixed | Encoded) -> str:
    height, width = split.image_shape
    return f"{width}x{height}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
