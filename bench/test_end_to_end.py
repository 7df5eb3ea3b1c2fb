"""A whole epoch, end to end: the loop as public code has it beside the engine's. `make bench`, CPU figures, under a minute.

Same images, batch, steps and network. What the naive loop is: `naive_loop`. The second rung is the same loop, loader included,
with bf16 autocast on a channels-last network. Short epochs of PGD-2: seconds for 50,000 images are extrapolated, and called so.
"""

from __future__ import annotations

import math

import pytest
import torch

from bench import cases, data_cases
from bench.naive_loop import train_epoch
from bench.turns import CPU, take_turns
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.methods import build_method
from fastanchor.train.throughput import step_cost

CIFAR_IMAGES = 50_000
WORKERS = 2


def engine_epoch(step, data, batch):
    """An epoch as `train.loop` runs it, from the drawing of the order to the metrics read: their mean loss and the images."""
    step.reset({"augment": 0, "attack": 1})
    images = 0
    for indices in data.shuffled(batch, generator=torch.Generator().manual_seed(0), drop_last=True):
        step(indices, progress=0.0)
        images += len(indices)
    return step.read()["loss"], images


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["PGD-AT"])
def test_epoch(benchmark, sizes, method, precision):
    count, batch, steps = sizes.epoch_images, sizes.batch, sizes.epoch_steps
    benchmark.group = f"epoch of {count} images, {method}, PGD-{steps}"
    hsc = cases.METHODS[method]
    source = data_cases.Source(Split(*cases.make_batch(count, sizes.pixels, CPU)), batch, CPU)
    data = ResidentSplit(source.split, CPU)
    config = cases.make_config(hsc, steps, precision=precision)
    step = cases.make_step(config, cases.make_model(sizes.width, CPU), CPU, data.rows)
    numbers = {
        "eps": cases.EPS, "step_size": cases.STEP_SIZE, "steps": steps, "hsc": hsc, "temperature": cases.TEMPERATURE,
        "beta": cases.BETA,
    }  # fmt: skip
    found = {}

    def make_loop(name, second_rung):
        model = cases.make_model(sizes.width, CPU, channels_last=second_rung)
        optimizer = torch.optim.SGD(model.parameters(), lr=cases.LR, momentum=cases.MOMENTUM, weight_decay=cases.WEIGHT_DECAY)

        def loop(batches):
            found[name] = train_epoch(model, optimizer, batches, CPU, channels_last=second_rung, bf16=second_rung, **numbers)

        return loop

    def engine():
        found["ours"] = engine_epoch(step, data, batch)

    def check():
        assert {images for _, images in found.values()} == {source.images}
        assert all(math.isfinite(loss) for loss, _ in found.values())

    with data_cases.loader(source, WORKERS) as run:
        loops = {name: make_loop(name, second_rung) for name, second_rung in (("naive", False), ("second_rung", True))}
        # One step each, and the workers' start, before anything is timed: a whole epoch would take as long as a round.
        first = [next(iter(run()))]
        for loop in loops.values():
            loop(first)
        step(next(data.shuffled(batch, generator=torch.Generator().manual_seed(0), drop_last=True)), progress=0.0)
        peers = {name: lambda loop=loop: loop(run()) for name, loop in loops.items()}
        flops = step_cost(build_method(config), cases.make_model(sizes.width, CPU), (sizes.pixels, sizes.pixels)).total
        take_turns(
            benchmark, engine, peers, rounds=sizes.epoch_rounds, warm=False, images=source.images, flops=flops,
            precision=precision, check=check,
        )  # fmt: skip
    _, whose = data_cases.public_transform(sizes.pixels)
    benchmark.extra_info |= {
        "loader": f"{WORKERS} workers, {whose}",
        "losses": {name: loss for name, (loss, _) in found.items()},
        "extrapolated_s_per_50000_images": {
            name: CIFAR_IMAGES / rate
            for name, rate in [
                ("ours", benchmark.extra_info["images_per_s"]),
                *((name, benchmark.extra_info[f"{name}_images_per_s"]) for name in peers),
            ]
        },
    }
