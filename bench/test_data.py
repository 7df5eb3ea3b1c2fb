"""Input pipelines alone: `make bench`, CPU figures. The resident split beside a DataLoader with per-image transforms."""

from __future__ import annotations

import contextlib
import functools

from bench import cases, data_cases
from bench.turns import CPU, take_turns
from fastanchor.data.sources import Split


def test_pipeline(benchmark, sizes):
    benchmark.group = f"input pipeline, batch {sizes.data_batch}, crop and flip"
    split = Split(*cases.make_batch(sizes.data_images, sizes.pixels, CPU))
    source = data_cases.Source(split, sizes.data_batch, CPU)
    _, whose = data_cases.public_transform(sizes.pixels)
    benchmark.extra_info["loader_transforms"] = whose
    with contextlib.ExitStack() as stack:
        calls = {
            name: functools.partial(data_cases.drain, stack.enter_context(make(source)))
            for name, make in data_cases.PIPELINES.items()
        }
        given = {name: call() for name, call in calls.items()}  # starts the workers
        assert set(given.values()) == {source.images}
        engine = calls.pop("resident")
        take_turns(benchmark, engine, calls, rounds=sizes.rounds, images=source.images)
