"""GPU run, attack alone: every way to run PGD, by batch and precision; time, rates, memory. The compiled ones last."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from bench import cases, naive
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.timing import Call, interleaved, peak_memory_mb, summary
from fastanchor.attacks import PGD
from fastanchor.attacks.modes import attack_mode
from fastanchor.data import views
from fastanchor.graphs import Captured, shared_pool
from fastanchor.models import mac_count

PART = "attack"
NAIVE = "naive, fp32"
SECOND_RUNG = "second rung (bf16 autocast, channels-last, cudnn.benchmark)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A batch's compiled rows take about this long on first sight; with less left they are not begun.
COMPILE_SECONDS = 25.0


def run(bench: Bench) -> None:
    """bf16 before fp32, and all that needs no compiler before what does."""
    for precision in ("bf16", "fp32"):
        for batch in bench.batches:
            case = Case(bench, batch, precision)
            with bench.results.entry(PART, "group", **case.fields()):
                _group(case, case.plain_rows())
            bench.tidy()
    for precision in ("bf16", "fp32"):
        for batch in bench.batches:
            case = Case(bench, batch, precision)
            reason = bench.no_compile(COMPILE_SECONDS)
            if reason is not None:
                case.leave_out(("compiled", "compiled + graphed"), reason)
            else:
                # Dynamo counts recompilations by code object and falls back to eager, silently, after eight.
                torch._dynamo.reset()
                with bench.results.entry(PART, "compiled group", **case.fields()):
                    _group(case, case.compiled_rows())
                bench.tidy()


class Case:
    """One batch in one precision: the attacks on it, made by name."""

    def __init__(self, bench: Bench, batch: int, precision: str):
        self.bench, self.batch, self.precision = bench, batch, precision
        images_u8, self.labels = cases.make_batch(batch, bench.pixels, bench.device)
        self.images = views.to_float(images_u8)
        self.generator = torch.Generator(bench.device).manual_seed(0)
        self.numbers = {"eps": cases.EPS, "step_size": cases.STEP_SIZE, "steps": bench.steps}

    def fields(self) -> dict:
        """What every row of this case says."""
        return {"batch": self.batch, "precision": self.precision, "cudnn_benchmark": self.bench.cudnn_benchmark}

    def leave_out(self, names: tuple[str, ...], reason: str) -> None:
        """Rows for what is not run."""
        for name in names:
            self.bench.results.add(PART, name, **self.fields(), left_out=reason)

    def plain_rows(self) -> dict[str, functools.partial]:
        """Makers of the calls, the naive loop first."""
        made = {
            NAIVE: functools.partial(self._naive, second_rung=False),
            "reference": functools.partial(self._engine, "reference"),
            "eager, not folded": functools.partial(self._engine, "eager", folded=False),
            "folded, aten": functools.partial(self._engine, "eager"),
        }
        on_gpu = {
            "folded, cudnn": functools.partial(self._engine, "eager", conv="cudnn"),
            "folded, aten, kernels": functools.partial(self._engine, "eager", kernels="auto"),
            "graphed, aten": functools.partial(self._engine, "graphed"),
            "graphed, cudnn": functools.partial(self._engine, "graphed", conv="cudnn"),
            "graphed, aten, kernels": functools.partial(self._engine, "graphed", kernels="auto"),
            "graphed, triton, kernels": functools.partial(self._engine, "graphed", kernels="auto", conv="triton"),
        }
        if self.bench.cudnn_benchmark and self.precision == "bf16":
            made[SECOND_RUNG] = functools.partial(self._naive, second_rung=True)
        if self.bench.cuda:
            made |= on_gpu
        else:
            self.leave_out(tuple(on_gpu), NEEDS_CUDA)
        return made

    def compiled_rows(self) -> dict[str, functools.partial]:
        """The compiled step, alone and inside a graph, as a captured training step holds it; the naive loop for the ratio."""
        made = {NAIVE: functools.partial(self._naive, second_rung=False), "compiled": functools.partial(self._engine, "compiled")}
        if self.bench.cuda:
            made["compiled + graphed"] = self._compiled_graphed
        else:
            self.leave_out(("compiled + graphed",), NEEDS_CUDA)
        return made

    def _naive(self, second_rung: bool) -> Call:
        model = cases.make_model(self.bench.width, self.bench.device, channels_last=second_rung)
        images = self.images if second_rung else self.images.contiguous()

        def call() -> Tensor:
            start = torch.empty_like(images).uniform_(-cases.EPS, cases.EPS, generator=self.generator)
            model.zero_grad()  # in a training step the optimiser's, once a step
            return naive.attack(model, images, self.labels, start, bf16=second_rung, **self.numbers)

        return call

    def _engine(self, backend: str, folded: bool = True, conv: str = "aten", kernels: str = "off") -> Call:
        model = cases.make_model(self.bench.width, self.bench.device)
        attack = PGD(**self.numbers, precision=self.precision, backend=backend, kernels=kernels, check_inputs=False)
        if not folded:
            # A model with a hook is attacked as it stands.
            model.register_forward_pre_hook(_nothing)
        elif conv != "aten":
            with attack_mode(model, "eval"):
                # The twin that the attack keeps and uses from now on.
                twin = attack.engine.network(model, self.images, "eval", DTYPES[self.precision])
            twin.allocate(DTYPES[self.precision], conv)
        return lambda: attack(model, self.images, self.labels, generator=self.generator)

    def _compiled_graphed(self) -> Call:
        attack = self._engine("compiled")
        pool = shared_pool(self.bench.device)
        captured = Captured(lambda _: attack(), (self.labels,), generators=(self.generator,), pool=pool)
        return lambda: captured(self.labels)


def _nothing(module: nn.Module, inputs: tuple) -> None:
    """A hook that does nothing."""


def _group(case: Case, makers: dict[str, functools.partial]) -> None:
    """Make the calls one by one, so that one that fails is left out alone, then time the rest in turns."""
    bench, calls, memory = case.bench, {}, {}
    for name, make in makers.items():
        with bench.results.entry(PART, name, **case.fields()):
            made: list[Call] = []
            # With its making: a graph takes its memory while it is captured.
            memory[name] = peak_memory_mb(lambda make=make, made=made: made.append(make()) or made[0](), bench.device)
            calls[name] = made[0]
    times = interleaved(calls, bench.device, rounds=bench.rounds, fill=bench.fill)
    flops = 4 * bench.steps * mac_count(cases.make_model(bench.width, torch.device("cpu")), bench.pixels)
    for name, found in times.items():
        row = summary(found, times.get(NAIVE))
        row |= bench.rates(flops, case.batch, row["ms"]) | {"peak_memory_mb": memory[name]}
        bench.results.add(PART, name, **case.fields(), **row)
