"""The attack and the whole training step, the plain reference beside the engine: `make bench` (pytest-benchmark).

The reference runs in fp32 and NCHW throughout; bf16 is the engine's. The two take turns round by round in one process, so that a
machine that speeds up or slows down does so for both. CPU figures.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from fastanchor.attacks import PGD
from fastanchor.config import Config
from fastanchor.data import views
from fastanchor.methods import build_method
from fastanchor.models import build_model
from fastanchor.reference import attacks as reference
from fastanchor.reference.objectives import cross_entropy
from fastanchor.reference.step import anchor_step
from fastanchor.settings import parse_flags
from fastanchor.train.optim import build_optimizer
from fastanchor.train.step import TrainStep

BATCH, WIDTH, STEPS, ROUNDS = 64, 16, 3, 7
EPS, STEP_SIZE = 8 / 255, 2 / 255
PRECISIONS = ("fp32", "bf16")


def make_model():
    torch.manual_seed(0)
    return build_model("resnet18", num_classes=10, width=WIDTH, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator), torch.arange(BATCH) % 10


def interleaved(benchmark, ours, theirs):
    """Time `ours` by pytest-benchmark with a round of `theirs` before each of its rounds; store the ratio of medians."""
    theirs()
    ours()
    seconds = []

    def setup():
        started = time.perf_counter()
        theirs()
        seconds.append(time.perf_counter() - started)

    benchmark.pedantic(ours, setup=setup, rounds=ROUNDS)
    ratios = sorted(a / b for a, b in zip(seconds, benchmark.stats.stats.data, strict=True))
    benchmark.extra_info |= {
        "reference_median_s": statistics.median(seconds),
        "ratio_median": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "threads": torch.get_num_threads(),
    }
    print(f"\nreference / engine: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {ROUNDS} rounds, CPU")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attack(benchmark, batch, precision):
    benchmark.group = "attack"
    images, labels = views.to_float(batch[0]), batch[1]
    plain, model = make_model().eval(), make_model().eval().to(memory_format=torch.channels_last)
    nchw = images.contiguous()
    start = torch.empty_like(nchw).uniform_(-EPS, EPS)
    attack = PGD(EPS, STEP_SIZE, STEPS, start=start, precision=precision, check_inputs=False)
    interleaved(
        benchmark,
        lambda: attack(model, images, labels),
        lambda: reference.pgd(
            plain, nchw, labels, eps=EPS, step_size=STEP_SIZE, steps=STEPS, objective=cross_entropy, start=start
        ),
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_step(benchmark, batch, precision):
    benchmark.group = "whole step, ANCHOR"
    images, labels = batch
    flags = f"--attack.steps {STEPS} --attack.eps {EPS} --attack.step-size {STEP_SIZE} --precision {precision}"
    config = parse_flags(flags.split(), Config())
    plain, model = make_model(), make_model().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    method = build_method(config)
    generators = {name: torch.Generator().manual_seed(0) for name in ("augment", "attack")}
    fused = build_optimizer(method.trainable(model), config.optim)
    step = TrainStep(config, method, model, fused, None, generators, torch.device("cpu"))

    def naive():
        augmented = views.augment(images, "crop_flip", generators["augment"]).contiguous()
        start = torch.empty_like(augmented).uniform_(-EPS, EPS)
        anchor_step(
            plain,
            optimizer,
            augmented,
            labels,
            start,
            eps=EPS,
            step_size=STEP_SIZE,
            steps=STEPS,
            hsc=0.5,
            temperature=0.1,
            beta=2.0,
        )

    interleaved(benchmark, lambda: step(images, labels, 0.0), naive)
