"""What the suites of `make bench` share: their sizes, and peers that take turns with the engine, round by round in one process.

Each benchmark's extra_info says what was compared; schemas/bench.json describes its fields. CPU figures.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter

import pytest
import torch

from fastanchor.ceilings import matmul_rate

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """What is timed, as `settings` of the JSON. The first line is that of attack and whole step."""

    quick: bool = False
    width: int = 32
    batch: int = 32
    pixels: int = 32
    steps: int = 10
    rounds: int = 7
    # An epoch of PGD-2: one of PGD-10 would take the naive loop four times as long, and all loops wait for the attack alike.
    epoch_images: int = 256
    epoch_steps: int = 2
    epoch_rounds: int = 3
    # A narrower network: three evaluations of 250 images by PGD-20 would else take a minute a round.
    evaluation_width: int = 16
    evaluation_train_steps: int = 60
    evaluation_images: int = 250
    evaluation_batch: int = 125
    evaluation_steps: int = 20
    evaluation_rounds: int = 3
    # Narrow again: a round has a step of every recipe.
    method_width: int = 16
    method_rounds: int = 5
    data_images: int = 5120
    data_batch: int = 128
    # Of what takes milliseconds.
    short_rounds: int = 15


FULL = Sizes()
QUICK = Sizes(
    quick=True, width=4, batch=4, pixels=16, steps=2, rounds=2, epoch_images=8, epoch_rounds=2, evaluation_width=4,
    evaluation_train_steps=3, evaluation_images=40, evaluation_batch=20, evaluation_steps=2, evaluation_rounds=2,
    method_width=4, method_rounds=2, data_images=32, data_batch=8, short_rounds=2,
)  # fmt: skip


def not_installed(**packages: str) -> dict[str, str]:
    """Why peers are left out, by name; empty where all their packages are installed."""
    return {peer: f"{package} is not installed" for peer, package in packages.items() if find_spec(package) is None}


def take_turns(
    benchmark, engine: Callable[[], object], peers: Mapping[str, Callable[[], object]], *, rounds: int, warm: bool = True,
    images: int | None = None, flops: float | None = None, precision: str = "fp32", left_out: Mapping[str, str] | None = None,
    check: Callable[[], object] | None = None,
) -> None:  # fmt: skip
    """Time `engine` by pytest-benchmark, with a turn of every peer before each of its rounds; ratio: peer / engine of a round.

    warm: call each once before, untimed. images: of one call, for images/s. flops: what the algorithm needs for one image, for
    the share of this machine's matmul ceiling in `precision`. left_out: reasons by peer. check: called at the end; what it
    raises fails the benchmark. One that has failed, or was interrupted, leaves no figures.
    """
    if benchmark.disabled:
        pytest.skip("pytest-benchmark is disabled: nothing would be timed")
    info = benchmark.extra_info
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def turn() -> None:
        for name, call in peers.items():
            started = perf_counter()
            call()
            seconds[name].append(perf_counter() - started)

    try:
        for call in (engine, *peers.values()) if warm else ():
            call()
        # A full collection walks through all that was ever imported, a quarter of a second in the middle of someone's round.
        gc.collect()
        gc.freeze()
        benchmark.pedantic(engine, setup=turn, rounds=rounds)
        info |= {"threads": torch.get_num_threads(), "precision": precision, "left_out": dict(left_out or {})}
        ours = benchmark.stats.stats.data
        for name, theirs in seconds.items():
            ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
            info |= {
                f"{name}_median_s": statistics.median(theirs),
                f"{name}_range_s": [min(theirs), max(theirs)],
                f"{name}_ratio_median": statistics.median(ratios),
                f"{name}_ratio_range": [ratios[0], ratios[-1]],
            }
        if images is not None:
            info["images"] = images
            info["images_per_s"] = images / statistics.median(ours)
            info |= {f"{name}_images_per_s": images / statistics.median(theirs) for name, theirs in seconds.items()}
        if flops is not None:
            rate = flops * info["images_per_s"]
            info |= {"model_tflops": rate / 1e12, f"share_of_{precision}_matmul": rate / matmul_rate(CPU, DTYPES[precision])}
        if check is not None:
            check()
    except BaseException:
        # pytest-benchmark itself would keep the rounds so far, also of a benchmark that computes something else.
        benchmark.has_error = True
        raise
    finally:
        gc.unfreeze()
