"""The attack and the whole training step, naive code beside the engine: `make bench` (pytest-benchmark), CPU figures.

Naive, second rung and engine take turns round by round in one process. What is stored with each: the ratios to both, by round,
as median and range. `python -m bench.ladder` shows what each stage contributes.
"""

from __future__ import annotations

import functools
import statistics
from time import perf_counter

import pytest
import torch

from bench import cases, naive
from fastanchor.attacks import PGD
from fastanchor.data import views

WIDTH, BATCH, PIXELS, STEPS, ROUNDS = 32, 32, 32, 10, 7
CPU = torch.device("cpu")
NUMBERS = {"eps": cases.EPS, "step_size": cases.STEP_SIZE, "steps": STEPS}


@pytest.fixture(scope="module")
def batch():
    return cases.make_batch(BATCH, PIXELS, CPU)


def take_turns(benchmark, engine, peers):
    """Time `engine` by pytest-benchmark, with a turn of every peer before each of its rounds."""
    seconds = {name: [] for name in peers}
    for call in (engine, *peers.values()):
        call()

    def turn():
        for name, call in peers.items():
            started = perf_counter()
            call()
            seconds[name].append(perf_counter() - started)

    benchmark.pedantic(engine, setup=turn, rounds=ROUNDS)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    for name, theirs in seconds.items():
        ratios = sorted(a / b for a, b in zip(theirs, benchmark.stats.stats.data, strict=True))
        benchmark.extra_info |= {
            f"{name}_median_s": statistics.median(theirs),
            f"{name}_ratio_median": statistics.median(ratios),
            f"{name}_ratio_range": [ratios[0], ratios[-1]],
        }
        print(
            f"\n{name} / engine: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {ROUNDS} rounds, CPU, "
            f"{torch.get_num_threads()} threads"
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attack(benchmark, batch, precision):
    benchmark.group = f"attack, PGD-{STEPS}"
    images, labels = views.to_float(batch[0]), batch[1]
    noise = cases.make_noise(images)

    def peer(second_rung):
        model = cases.make_model(WIDTH, CPU, channels_last=second_rung)
        given, start = (images, noise) if second_rung else (images.contiguous(), noise.contiguous())
        return functools.partial(naive.attack, model, given, labels, start, bf16=second_rung, **NUMBERS)

    attack = PGD(**NUMBERS, start=noise, precision=precision, check_inputs=False)
    engine = functools.partial(attack, cases.make_model(WIDTH, CPU), images, labels)
    take_turns(benchmark, engine, {"naive": peer(False), "second_rung": peer(True)})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", cases.METHODS)
def test_whole_step(benchmark, batch, method, precision):
    benchmark.group = f"whole step, {method}, PGD-{STEPS}"
    hsc = cases.METHODS[method]
    step = cases.make_step(cases.make_config(hsc, STEPS, precision=precision), cases.make_model(WIDTH, CPU), CPU)
    peers = {
        name: functools.partial(cases.make_naive_step(WIDTH, CPU, hsc, STEPS, second_rung=second_rung), *batch)
        for name, second_rung in (("naive", False), ("second_rung", True))
    }
    take_turns(benchmark, functools.partial(step, *batch, progress=0.0), peers)
