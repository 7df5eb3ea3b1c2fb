"""The step of every packaged recipe for CIFAR-10 in turns with PGD-AT's: what a method costs on the engine. CPU figures."""

from __future__ import annotations

from bench import method_cases
from bench.turns import CPU, take_turns


def test_methods(benchmark, sizes):
    benchmark.group = f"training step of every method, ResNet-18 of width {sizes.method_width}, batch {sizes.batch}"
    images = method_cases.make_images(sizes.batch, sizes.pixels)
    calls, flops = {}, {}
    for name in method_cases.RECIPES:
        config = method_cases.make_config(name, sizes.batch, precision="bf16", width=sizes.method_width)
        calls[name], cost = method_cases.make_step(config, images, CPU)
        flops[name] = cost.total
    base, base_flops = calls.pop(method_cases.BASE), flops.pop(method_cases.BASE)
    take_turns(
        benchmark, base, calls, rounds=sizes.method_rounds, images=sizes.batch, flops=base_flops, precision="bf16",
        left_out=method_cases.LEFT_OUT,
    )  # fmt: skip
    benchmark.extra_info["flops_ratio"] = {name: count / base_flops for name, count in flops.items()}
