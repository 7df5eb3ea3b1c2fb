"""Input pipelines alone: `make bench`, CPU figures. The engine's backends beside a DataLoader with per-image transforms."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

from bench import cases, data_cases
from bench.turns import CPU, take_turns
from fastanchor.data.sources import Split

# A round decodes them once by each pipeline.
FILES, FILE_PIXELS, FILE_BATCH, FILE_ROUNDS = 256, 224, 64, 3


def test_pipeline(benchmark, sizes):
    benchmark.group = f"input pipeline, batch {sizes.data_batch}, crop and flip"
    split = Split(*cases.make_batch(sizes.data_images, sizes.pixels, CPU))
    _, whose = data_cases.public_transform(sizes.pixels)
    benchmark.extra_info["loader_transforms"] = whose
    source = data_cases.Source(split, sizes.data_batch, CPU)
    _time(benchmark, source, data_cases.PIPELINES, "resident", sizes.rounds)


def test_files(benchmark, sizes):
    """JPEG files, decoded for each batch: what a set that does not fit into memory costs."""
    images, pixels, batch, rounds = (16, 32, 4, 2) if sizes.quick else (FILES, FILE_PIXELS, FILE_BATCH, FILE_ROUNDS)
    benchmark.group = f"JPEG files of {pixels} x {pixels}, batch {batch}, resized crop and flip"
    with data_cases.jpeg_folder(images, pixels) as split:
        source = data_cases.Source(split, batch, CPU, "resized_crop_flip")
        # Torch's is always there; DALI's takes turns with it where it is installed.
        _time(benchmark, source, data_cases.FILE_PIPELINES, "torch_0_workers", rounds)


def _time(benchmark, source: data_cases.Source, pipelines: Mapping[str, Callable], engine: str, rounds: int) -> None:
    """All pipelines that can serve here, `engine` as the one that the others are compared with."""
    missing = data_cases.left_out(pipelines, CPU)
    with contextlib.ExitStack() as stack:
        calls = {
            name: functools.partial(data_cases.drain, stack.enter_context(make(source)))
            for name, make in pipelines.items()
            if name not in missing
        }
        given = {name: call() for name, call in calls.items()}  # starts the workers
        assert set(given.values()) == {source.images}
        ours = calls.pop(engine)
        take_turns(benchmark, ours, calls, rounds=rounds, images=source.images, left_out=missing)
