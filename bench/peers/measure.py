"""A peer and what of ours does the same, timed in turns in one process: `python -m bench.peers`, and through it bench.gpu.

Every row: `peer` (whose comparison it belongs to), `what` (step, attack, evaluation, loader, run), `batch`, `ms` of one batch.
The peer is the base: `ratio` > 1 is that many times quicker than the peer. Where the engine cannot do the same it stands alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from bench import cases, method_cases, naive
from bench.gpu_common import CIFAR_IMAGES, NEEDS_CUDA
from bench.peers import ATTACKS, REPOSITORIES, attacks
from bench.peers.adapter import Case, Variant, Work
from bench.peers.clones import Clone, PeerFailed, Session, other_commit
from bench.results import Results
from bench.timing import Call, peak_memory_mb, seconds, summary
from fastanchor.attacks import PGD
from fastanchor.config import Config
from fastanchor.data import views
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import ImageSet, Split
from fastanchor.methods import method_class
from fastanchor.models import mac_count
from fastanchor.ops import images as operators
from fastanchor.settings import from_dict

PART = "peers"
NAIVE, SECOND_RUNG = "naive, fp32", "second rung (bf16 autocast, channels-last)"
SECOND_RUNG_CUDA = "second rung (bf16 autocast, channels-last, cudnn.benchmark)"
# Iterations of APGD in the standard evaluation; a CPU takes minutes for them, so there it does `steps`.
STANDARD_ITERATIONS = 100
MOST_REPEATS = 50
# Fewer rounds than asked for, but never fewer than these, are taken once the time is over.
LEAST_ROUNDS = 2
ON_CPU_ONLY = "their code takes the GPU where there is one: not run with --device cpu on such a machine"


@dataclass
class Run:
    """One run of the peers. batches: that one call of a peer trains on. ceiling: bf16 FLOP/s. deadline: on perf_counter."""

    results: Results
    device: torch.device
    batch: int
    steps: int = 10
    rounds: int = 5
    width: int = 64
    batches: int = 1
    fill: float = 0.0
    ceiling: float = float("nan")
    deadline: float = float("inf")

    def case(self, variant: Variant) -> Case:
        """Sizes for this variant, with what its code has fixed."""
        return Case(self.device, self.batch, variant.steps or self.steps, self.batches, variant.width or self.width)

    def late(self) -> str | None:
        """Why nothing more is begun; None while there is time."""
        left = self.deadline - perf_counter()
        return None if left > 0 else "no time was left"

    def rates(self, flops: float | None, batch: int, ms: float) -> dict[str, float]:
        """Images a second, and the rate of the FLOPs that the algorithm needs for one image, whatever was done."""
        images = batch / ms * 1e3
        if flops is None:
            return {"images_per_s": images}
        return {
            "images_per_s": images,
            "model_tflops": flops * images / 1e12,
            "share_of_bf16_matmul": flops * images / self.ceiling,
        }


def take_turns(works: dict[str, Work], run: Run) -> dict[str, list[float]]:
    """Seconds of one batch in every round, by name. All have been called once; a second call says how often a turn repeats."""

    def turn(work: Work, repeats: int) -> float:
        if work.clock is None:
            return seconds(work.call, run.device, repeats) / work.batches
        before = work.clock()
        for _ in range(repeats):
            work.call()
        return (work.clock() - before) / repeats / work.batches

    repeats = {}
    for name, work in works.items():
        once = turn(work, 1) * work.batches
        repeats[name] = max(1, min(MOST_REPEATS, round(run.fill / max(once, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in works}
    for done in range(run.rounds):
        if done >= LEAST_ROUNDS and run.late():
            break
        for name, work in works.items():
            found[name].append(turn(work, repeats[name]))
    return found


def compare(
    run: Run,
    peer: str,
    makers: dict[str, Callable[[], Work]],
    fields: dict[str, dict],
    *,
    flops: float | None = None,
    extrapolate: bool = False,
) -> None:
    """Make each, time those that can be made in turns, a row each. The first is the peer: without it there is no comparison.

    fields: what each one's row says; flops: of the algorithm, for one image (None: as one of the works knows them); extrapolate:
    ms also as an epoch of 50,000 images.
    """
    works: dict[str, Work] = {}
    memory = {}
    for name, make in makers.items():
        with _recorded(run, name, fields[name]):
            made: list[Work] = []
            # With its making: a graph takes its memory while it is captured.
            memory[name] = peak_memory_mb(lambda make=make, made=made: made.append(make()) or made[0].call(), run.device)
            works[name] = made[0]
        if peer not in works:
            return
    # In turns one that fails takes the round with it: it is known by name, recorded, and the others begin anew.
    times = None
    while times is None and peer in works:
        broken = None
        try:
            times = take_turns({name: _named(name, work) for name, work in works.items()}, run)
        except _Failed as failed:
            broken = failed
        if broken is not None:
            with _recorded(run, broken.name, fields[broken.name]):
                raise broken.error
            del works[broken.name]
    if times is None:
        return
    flops = flops or next((work.flops for work in works.values() if work.flops), None)
    for name, found in times.items():
        work, row = works[name], summary(found, times[peer])
        batch = work.images or run.batch
        if extrapolate:
            row["extrapolated_s_per_epoch"] = row["ms"] / 1e3 * CIFAR_IMAGES / batch
        row |= run.rates(flops, batch, row["ms"]) | {"peak_memory_mb": memory[name], "batches": work.batches}
        if work.clock is not None:
            row["clock"] = "its own"
        run.results.add(PART, name, **{**fields[name], "batch": batch, **row})


class _Failed(Exception):
    def __init__(self, name: str, error: Exception):
        super().__init__(name)
        self.name, self.error = name, error


def _named(name: str, work: Work) -> Work:
    def call() -> object:
        try:
            return work.call()
        except Exception as error:
            raise _Failed(name, error) from error

    return work._replace(call=call)


@contextlib.contextmanager
def _recorded(run: Run, name: str, fields: dict):
    """A failure inside is a row with its traceback; a module that is not installed is a row left out."""
    with run.results.entry(PART, name, **fields):
        try:
            yield
        except (PeerFailed, ImportError) as error:
            absent = error if isinstance(error, ModuleNotFoundError) else error.__cause__
            if not isinstance(absent, ModuleNotFoundError) or absent.name is None:
                raise
            run.results.add(PART, name, **fields, left_out=f"{absent.name} is not installed")


def tidy(run: Run) -> None:
    """Give back what the last comparison held."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def measure_attack(run: Run, name: str) -> None:
    """A peer of `attacks` beside ours on the same model and batch; a row that says why not."""
    peer = attacks.PEERS[name]
    reason = attacks.missing(peer.needs) or run.late()
    what = "evaluation" if name == "pyautoattack" else "attack"
    if reason is not None:
        run.results.add(PART, name, peer=name, what=what, left_out=reason)
        return
    case = Case(run.device, run.batch, run.steps, 1, run.width)
    (images, labels), *_ = case.prepared(channels_last=True)
    model = cases.make_model(run.width, run.device)
    common = {"peer": name, "what": what, "batch": run.batch, "width": run.width}
    if what == "attack":
        plain = images.contiguous()
        mine = functools.partial(peer.make, cases.make_model(run.width, run.device, channels_last=False), run.steps)
        makers = {name: lambda: _with(mine(), plain, labels)} | attack_makers(run, case, Config().attack.bn)
        flops = 4 * run.steps * mac_count(cases.make_model(run.width, torch.device("cpu")), case.pixels)
        fields = {key: {**common, "steps": run.steps} for key in makers}
    else:
        steps = STANDARD_ITERATIONS if run.device.type == "cuda" else run.steps
        images = images.contiguous()
        split = ResidentSplit(Split(case.data.images, attacks.judged_right(model, images)), run.device)
        makers = {
            name: lambda: _with(peer.make(model, steps), images, split.labels),
            "fastanchor.evaluate.autoattack": lambda: Work(attacks.our_evaluation(model, split, steps), 1, model),
        }
        flops, fields = None, {key: {**common, "iterations": steps} for key in makers}
    fields[name] |= {"computes": peer.computes}
    compare(run, name, makers, fields, flops=flops)
    tidy(run)


def _with(attack: attacks.Attack, images: torch.Tensor, labels: torch.Tensor) -> Work:
    return Work(lambda: attack(images, labels))


def attack_makers(run: Run, case: Case, bn: str) -> dict[str, Callable[[], Work]]:
    """Ways to run our PGD, and the naive loop, on one batch: that of the case."""
    (images, labels), *_ = case.prepared(channels_last=True)
    numbers = {"eps": cases.EPS, "step_size": cases.STEP_SIZE, "steps": case.steps}
    generator = torch.Generator(run.device).manual_seed(0)

    def plain(second_rung: bool) -> Work:
        model = cases.make_model(case.width, run.device, channels_last=second_rung)
        given = images if second_rung else images.contiguous()

        def call() -> object:
            start = torch.empty_like(given).uniform_(-cases.EPS, cases.EPS, generator=generator)
            model.zero_grad()
            return naive.attack(model, given, labels, start, bf16=second_rung, **numbers)

        return Work(_benchmarked(call, second_rung), 1, model)

    def engine(precision: str) -> Work:
        model = cases.make_model(case.width, run.device)
        attack = PGD(**numbers, bn=bn, precision=precision, check_inputs=False)
        return Work(lambda: attack(model, images, labels, generator=generator), 1, model)

    # backend auto: on a GPU the engine's attack is a graph.
    return {NAIVE: lambda: plain(False), _second_rung(run): lambda: plain(True)} | {
        f"engine, {precision}": functools.partial(engine, precision) for precision in ("fp32", "bf16")
    }


def _second_rung(run: Run) -> str:
    return SECOND_RUNG_CUDA if run.device.type == "cuda" else SECOND_RUNG


def _benchmarked(call: Call, on: bool) -> Call:
    """cudnn.benchmark during the call. Torch keeps the first choice for a shape: so the peer is called first, then this."""
    if not on:
        return call

    def switched() -> object:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            return call()
        finally:
            torch.backends.cudnn.benchmark = before

    return switched


def configured(variant: Variant, case: Case, folder: Path, images: ImageSet) -> Config:
    """The counterpart as the variant computes it, in fp32 and without a graph. folder: for files that its settings name."""
    config = method_cases.make_config(variant.counterpart, case.batch, precision="fp32", width=case.width)
    for values in ({"attack": {"steps": case.steps}}, variant.settings, variant.files(folder, len(images.train))):
        config = from_dict(values, variant.name, config)
    return config


def step_makers(run: Run, case: Case, config: Config, images: ImageSet) -> dict[str, Callable[[], Work]]:
    """The engine's step on a resident set, so configured, and before it the naive one where that computes the method.

    The naive one knows no smoothing and no average. The engine's under cudnn.benchmark, as the training loop has it.
    """
    indices = torch.arange(case.batch, device=run.device)

    def plain(second_rung: bool) -> Work:
        step = cases.make_naive_step(case.width, run.device, cases.METHODS["PGD-AT"], case.steps, second_rung=second_rung)
        return Work(_benchmarked(lambda: step(*case.data.take(indices)), second_rung))

    def engine(precision: str, graph: str = "off") -> Work:
        kept = dataclasses.replace(config, precision=precision, engine=dataclasses.replace(config.engine, graph=graph))
        call, cost = method_cases.make_step(kept, images, run.device)
        return Work(_benchmarked(call, run.device.type == "cuda"), flops=cost.total)

    made: dict[str, Callable[[], Work]] = {}
    if config.method == "pgd_at":
        made = {NAIVE: lambda: plain(False), _second_rung(run): lambda: plain(True)}
    made |= {"engine, fp32": lambda: engine("fp32"), "engine, bf16": lambda: engine("bf16")}
    return made | ({"engine, bf16, graph": lambda: engine("bf16", "on")} if run.device.type == "cuda" else {})


def loader_makers(run: Run, case: Case) -> dict[str, Callable[[], Work]]:
    """An epoch of our resident set of as many images as CIFAR-10 has: order, crop, flip, fp32 in [0, 1]."""
    fused, _ = operators.decide("augment", "auto", run.device)

    def make() -> Work:
        images, labels = cases.make_batch(CIFAR_IMAGES, case.pixels, torch.device("cpu"))
        data = ResidentSplit(Split(images, labels), run.device)
        order, generator = torch.Generator().manual_seed(0), torch.Generator(run.device).manual_seed(0)

        def call() -> None:
            for chosen in data.shuffled(case.batch, generator=order, drop_last=True):
                rows, _ = data.rows(chosen)
                views.augment(rows, "crop_flip", generator, fused=fused)

        return Work(call, data.number_of_batches(case.batch, drop_last=True))

    return {"resident": make}


def measure_clone(run: Run, clone: Clone, variants: tuple[Variant, ...] | None = None) -> None:
    """All variants of a clone's adapter; first a row with the commit that was found. variants: instead of the adapter's own."""
    known = REPOSITORIES[clone.name]
    warning = other_commit(clone)
    row = {"url": known.url, "commit": clone.commit, "written_for": known.commit, **({"warning": warning} if warning else {})}
    run.results.add(PART, f"{clone.name}: the clone", peer=clone.name, **row)
    if variants is None:
        variants = importlib.import_module(known.adapter).VARIANTS
    for variant in variants:
        name = f"{clone.name}: {variant.name}"
        ours = None if variant.counterpart is None else method_class(variant.counterpart).title
        fields = {"peer": name, "what": variant.what, "batch": run.batch, "counterpart": ours}
        reason = _left_out(run, variant)
        if reason is not None:
            run.results.add(PART, name, **fields, left_out=reason)
            continue
        with run.results.entry(PART, name, **fields), Session(clone.folder) as session:
            _measure_variant(run, session, variant, name, fields)
        tidy(run)


def _left_out(run: Run, variant: Variant) -> str | None:
    if run.device.type != "cuda" and (variant.needs_cuda or torch.cuda.is_available()):
        return NEEDS_CUDA if variant.needs_cuda else ON_CPU_ONLY
    absent = (reason for module in variant.needs if (reason := attacks.missing(module)))
    return next(absent, None) or run.late()


def _measure_variant(run: Run, session: Session, variant: Variant, name: str, fields: dict) -> None:
    case = run.case(variant)
    fields = {**fields, "width": case.width, "steps": case.steps if variant.computes.get("attack") else None}
    makers: dict[str, Callable[[], Work]] = {name: lambda: variant.make(session, case)}
    flops = None
    if variant.counterpart is not None:
        images = method_cases.make_images(case.batch, case.pixels)
        config = configured(variant, case, session.workdir, images)
        if variant.what == "step":
            makers |= step_makers(run, case, config, images)
        elif variant.what == "attack":
            makers |= attack_makers(run, case, config.attack.bn)
            flops = 4 * case.steps * mac_count(cases.make_model(case.width, torch.device("cpu")), case.pixels)
        else:
            makers |= loader_makers(run, case)
    stated = {"computes": {**variant.computes, "differs": list(variant.differs)}, "cudnn_benchmark": variant.cudnn_benchmark}
    rows = {key: dict(fields) for key in makers}
    for key, row in rows.items():
        if key.startswith("engine") and variant.what == "step":
            row["cudnn_benchmark"] = run.device.type == "cuda"
    rows[name] |= stated | ({"reason": variant.reason} if variant.reason else {})
    compare(run, name, makers, rows, flops=flops, extrapolate=variant.what == "step")


def measure_all(run: Run, clones: dict[str, Clone], only: list[str] | None) -> None:
    """Packages first, then the clones in the order given; without `only`, a row also for each repository that was not given."""
    for name in ATTACKS:
        if only is None or name in only:
            with run.results.entry(PART, name, peer=name):
                measure_attack(run, name)
    for clone in clones.values():
        if only is None or clone.name in only:
            measure_clone(run, clone)
    for name, known in REPOSITORIES.items():
        if only is None and name not in clones:
            run.results.add(PART, name, peer=name, left_out=f"no clone was given: --peer-path DIR, of {known.url}")
