"""GPU run, what each method costs: the step of every packaged recipe for CIFAR-10 in turns with PGD-AT's, bf16, as one graph."""

from __future__ import annotations

from time import perf_counter

from bench import method_cases
from bench.gpu_common import CIFAR_IMAGES, Bench
from bench.timing import interleaved, peak_memory_mb, summary

PART = "methods"
PRECISION = "bf16"
# Making, capturing and timing a step takes about this long; with less left it is not begun.
METHOD_SECONDS = 5.0


def run(bench: Bench) -> None:
    """At the first batch size, each recipe in turns with PGD-AT and written at once.

    `cost`: its time over PGD-AT's; `flops_ratio`: what that would be if products alone took time;
    `first_step_s`: with what a method prepares before it, as AdvCL its clusters.
    """
    batch, graph = bench.batches[0], "on" if bench.cuda else "off"
    fields = {"batch": batch, "precision": PRECISION, "graph": graph, "cudnn_benchmark": bench.cudnn_benchmark}
    images = method_cases.make_images(batch, bench.pixels)

    def make(name: str):
        config = method_cases.make_config(name, batch, precision=PRECISION, graph=graph, width=bench.width)
        return method_cases.make_step(config, images, bench.device)

    for name, reason in method_cases.LEFT_OUT.items():
        bench.results.add(PART, name, **fields, left_out=reason)
    base, base_cost = make(method_cases.BASE)

    def measure(name: str) -> None:
        made, started = [], perf_counter()
        memory = peak_memory_mb(lambda: made.extend(make(name)) or made[0](), bench.device)
        first = perf_counter() - started
        call, cost = made
        times = interleaved({method_cases.BASE: base, "": call}, bench.device, rounds=bench.rounds, fill=bench.fill)
        row, against = summary(times[""]), summary(times[method_cases.BASE], times[""])
        row |= {"cost": against["ratio"], "cost_range": against["ratio_range"]}
        row |= {"flops_ratio": cost.total / base_cost.total, **bench.rates(cost.total, batch, row["ms"])}
        row |= {"extrapolated_s_per_epoch": row["ms"] / 1e3 * CIFAR_IMAGES / batch}
        bench.results.add(PART, name, **fields, **row, peak_memory_mb=memory, first_step_s=first)

    for name in method_cases.RECIPES:
        if not bench.quick and bench.left() < METHOD_SECONDS:
            bench.results.add(PART, name, **fields, left_out=f"{bench.left():.0f} s were left")
            continue
        with bench.results.entry(PART, name, **fields):
            measure(name)
        # Nothing holds the step any more, nor its graph.
        bench.tidy()
