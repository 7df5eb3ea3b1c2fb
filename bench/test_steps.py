"""The whole training step, from uint8 images to updated weights, naive code beside the engine: `make bench`, CPU figures."""

from __future__ import annotations

import functools

import pytest

from bench import cases
from bench.turns import CPU, take_turns
from fastanchor.methods import build_method
from fastanchor.train.throughput import step_cost


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", cases.METHODS)
def test_whole_step(benchmark, sizes, method, precision):
    benchmark.group = f"whole step, {method}, PGD-{sizes.steps}"
    batch = cases.make_batch(sizes.batch, sizes.pixels, CPU)
    config = cases.make_config(cases.METHODS[method], sizes.steps, precision=precision)
    step = cases.make_step(config, cases.make_model(sizes.width, CPU), CPU)
    options = {"naive": {}, "second_rung": {"second_rung": True}, "naive_input_gradient": {"weight_gradients": False}}
    peers = {
        name: functools.partial(cases.make_naive_step(sizes.width, CPU, cases.METHODS[method], sizes.steps, **chosen), *batch)
        for name, chosen in options.items()
    }
    flops = step_cost(build_method(config), cases.make_model(sizes.width, CPU), (sizes.pixels, sizes.pixels)).total
    engine = functools.partial(step, *batch, progress=0.0)
    take_turns(benchmark, engine, peers, rounds=sizes.rounds, images=sizes.batch, flops=flops, precision=precision)
