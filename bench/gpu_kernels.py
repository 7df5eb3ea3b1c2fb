"""GPU run, kernels: how many an attack and a training step run, and how many calls of the host start them.

A part of its own, after all timing: once a profiler has run, launches may stay slower.
"""

from __future__ import annotations

import torch

from bench import cases, gpu_attack, gpu_steps
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.timing import Call, count_kernels

PART = "kernels"


def run(bench: Bench) -> None:
    """At the first batch size and in bf16: the numbers hardly depend on either. The compiled ones last."""
    if not bench.cuda:
        bench.results.add(PART, "all", left_out=NEEDS_CUDA)
        return
    case = gpu_attack.Case(bench, bench.batches[0], "bf16")
    _count(bench, "attack", case.plain_rows())
    data = gpu_steps.resident(bench)
    settings = gpu_steps.plain_settings(bench)
    for method in cases.METHODS:
        _count(bench, f"step, {method}", gpu_steps.makers(bench, data, method, bench.batches[0], settings))
    if bench.compile and bench.left() > gpu_attack.COMPILE_SECONDS:
        torch._dynamo.reset()
        _count(bench, "attack", {"compiled + graphed": case.compiled_rows()["compiled + graphed"]})


def _count(bench: Bench, what: str, makers: dict) -> None:
    for name, make in makers.items():
        with bench.results.entry(PART, name, what=what, batch=bench.batches[0]):
            call: Call = make()
            for _ in range(2):
                call()
            bench.results.add(PART, name, what=what, batch=bench.batches[0], **count_kernels(call))
        bench.tidy()
