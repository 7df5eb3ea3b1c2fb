"""The ladder: what each stage of the engine adds, one at a time, to the attack and to the whole training step.

    python -m bench.ladder [--width 32 --batch 32 --steps 2 --train-steps 10] [--compile] [--json FILE]

All rungs take turns in one process, from the naive code to the engine through its public API. Each rung's x_adv, from one and the
same start noise, is held beside the naive one's, so that no rung is faster by doing less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import cases, machine, naive, program
from bench.timing import Call, interleaved, summary
from fastanchor import environment
from fastanchor.attacks import PGD
from fastanchor.data import views
from fastanchor.errors import UserError
from fastanchor.files import make_place, write_text
from fastanchor.graphs import Captured, shared_pool

SECOND_RUNG = "naive, bf16 autocast + channels-last"
# Beyond rounding: a pixel whose gradient changed its sign has moved by a whole step, or by two.
DIFFERS = 1e-5


@dataclass
class Rung:
    """call: what is timed; x_adv: the attack from the common start noise, for the comparison."""

    name: str
    call: Call
    x_adv: Callable[[], Tensor]


def attack_rungs(width: int, images_u8: Tensor, labels: Tensor, steps: int, with_compiled: bool) -> list[Rung]:
    """The attack alone, bn = eval, from given noise."""
    device = images_u8.device
    images = views.to_float(images_u8)
    planar, noise = images.contiguous(), cases.make_noise(images)
    numbers = {"eps": cases.EPS, "step_size": cases.STEP_SIZE, "steps": steps}

    def plain(channels_last: bool, bf16: bool) -> Call:
        model = cases.make_model(width, device, channels_last=channels_last)
        given = (images, noise) if channels_last else (planar, noise.contiguous())
        return cases.make_naive_attack(model, given[0], labels, given[1], steps, bf16=bf16)

    def engine(backend: str, precision: str = "fp32", channels_last: bool = True) -> Call:
        model = cases.make_model(width, device, channels_last=channels_last)
        given = images if channels_last else planar
        start = noise if channels_last else noise.contiguous()
        attack = PGD(**numbers, start=start, precision=precision, backend=backend, check_inputs=False)
        return lambda: attack(model, given, labels)

    calls = {
        "naive: loss.backward(), NCHW, fp32": plain(channels_last=False, bf16=False),
        SECOND_RUNG: plain(channels_last=True, bf16=True),
        "input gradient only (reference)": engine("reference", channels_last=False),
        "+ channels-last": engine("reference"),
        "+ BatchNorm folded (eager)": engine("eager"),
        "+ bf16": engine("eager", "bf16"),
    }
    if device.type == "cuda":
        calls["+ one CUDA graph (graphed)"] = engine("graphed", "bf16")
    if with_compiled:
        compiled = engine("compiled", "bf16")
        calls["+ compiled step (compiled)"] = compiled
        if device.type == "cuda":
            captured = Captured(lambda _: compiled(), (labels,), pool=shared_pool(device))
            calls["+ compiled step in one CUDA graph"] = lambda: captured(labels)
    return [Rung(name, call, call) for name, call in calls.items()]


def step_rungs(width: int, images_u8: Tensor, labels: Tensor, steps: int, hsc: float, with_compiled: bool) -> list[Rung]:
    """The whole training step, from uint8 images on the device to the updated weights."""
    device = images_u8.device

    def plain(name: str, second_rung: bool) -> Rung:
        step = cases.make_naive_step(width, device, hsc, steps, second_rung=second_rung)

        def x_adv() -> Tensor:
            model = cases.make_model(width, device, channels_last=second_rung)
            images = views.augment(images_u8, "crop_flip", torch.Generator(device).manual_seed(0))
            images = images if second_rung else images.contiguous()
            return naive.attack(
                model, images, labels, cases.make_noise(images), eps=cases.EPS, step_size=cases.STEP_SIZE, steps=steps,
                bf16=second_rung,
            )  # fmt: skip

        return Rung(name, lambda: step(images_u8, labels), x_adv)

    def engine(name: str, **settings) -> Rung:
        config = cases.make_config(hsc, steps, **settings)
        model = cases.make_model(width, device, channels_last=config.channels_last)
        step = cases.make_step(config, model, device)

        def x_adv() -> Tensor:
            step.reset({"augment": 0, "attack": 1})
            attack = step.attacks[0]
            attack.start, start = cases.make_noise(views.to_float(images_u8)), attack.start
            # PGD-AT forwards x_adv alone, ANCHOR the augmented images too: "adv" is among the views of both.
            made = step.make_views(images_u8, labels)[0]["adv"]
            attack.start = start
            return made

        return Rung(name, lambda: step(images_u8, labels, progress=0.0), x_adv)

    rungs = [
        plain("naive: loss.backward(), NCHW, fp32", second_rung=False),
        plain(SECOND_RUNG, second_rung=True),
        engine("input gradient only (reference), fused SGD", backend="reference", channels_last=False),
        engine("+ channels-last", backend="reference"),
        engine("+ BatchNorm folded in the attack", backend="eager"),
        engine("+ bf16", backend="eager", precision="bf16"),
    ]
    if device.type == "cuda":
        rungs.append(engine("+ one CUDA graph", precision="bf16", graph="on"))
    if with_compiled:
        graph = "on" if device.type == "cuda" else "off"
        rungs.append(engine("+ compiled (engine.compile)", precision="bf16", graph=graph, compile=True))
    return rungs


def climb(rungs: list[Rung], judge: Callable[[Tensor], float], device: torch.device, rounds: int) -> list[dict]:
    """One row a rung; the first rung is what ratios and differing pixels are counted from. judge: x_adv -> what it raised."""
    # Before anything is timed: a training step moves the weights that the attacks are compared on.
    adversarial = [rung.x_adv().float().contiguous().clone() for rung in rungs]
    fill = 0.05 if device.type == "cuda" else 0.0
    times = interleaved({rung.name: rung.call for rung in rungs}, device, rounds=rounds, fill=fill)
    base = times[rungs[0].name]
    rows, previous = [], base
    for rung, x_adv in zip(rungs, adversarial, strict=True):
        found = times[rung.name]
        differing = ((x_adv - adversarial[0]).abs() > DIFFERS).float().mean().item()
        gains = [before / now for before, now in zip(previous, found, strict=True)]
        rows.append(
            {"name": rung.name, **summary(found, base), "gain": statistics.median(gains), "differing_percent": 100 * differing,
             "raised_loss": judge(x_adv)}
        )  # fmt: skip
        # The second rung stands beside the ladder, not on it.
        previous = previous if rung.name == SECOND_RUNG else found
    return rows


def make_judge(width: int, images: Tensor, labels: Tensor) -> Callable[[Tensor], float]:
    """By how much x_adv raises the fp32 model's cross-entropy over that of `images`: how strong an attack was."""
    model = cases.make_model(width, labels.device)

    def loss(images: Tensor) -> float:
        with torch.no_grad():
            return F.cross_entropy(model(images), labels).item()

    clean = loss(images)
    return lambda x_adv: loss(x_adv) - clean


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, list[dict]]]:
    """All ladders that were asked for, one after the other: title and rows."""
    images_u8, labels = cases.make_batch(args.batch, args.pixels, device)
    if args.only != "step":
        judge = make_judge(args.width, views.to_float(images_u8), labels)
        rungs = attack_rungs(args.width, images_u8, labels, args.steps, args.compile)
        yield f"attack alone, PGD-{args.steps}", climb(rungs, judge, device, args.rounds)
    if args.only != "attack":
        judge = make_judge(args.width, views.augment(images_u8, "crop_flip", torch.Generator(device).manual_seed(0)), labels)
        for method, hsc in cases.METHODS.items():
            rungs = step_rungs(args.width, images_u8, labels, args.train_steps, hsc, args.compile)
            yield f"whole training step, {method}, PGD-{args.train_steps}", climb(rungs, judge, device, args.rounds)


def table(title: str, rows: list[dict]) -> Table:
    """One ladder for people."""
    made = Table(title=title, title_justify="left")
    made.add_column("stage")
    for column in ("ms", "x naive", "(min to max)", "x stage before", "differing pixels %", "loss raised by"):
        made.add_column(column, justify="right")
    for row in rows:
        low, high = row["ratio_range"]
        gain = "" if row["name"] in (rows[0]["name"], SECOND_RUNG) else f"{row['gain']:.2f}"
        made.add_row(
            row["name"], f"{row['ms']:.2f}", f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", gain,
            f"{row['differing_percent']:.3f}", f"{row['raised_loss']:.5f}",
        )  # fmt: skip
    return made


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0, or 2 with one sentence for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.ladder", description=__doc__.split("\n\n")[0])
    for name, default, text in (
        ("width", 32, "channels of the ResNet-18's first stage"),
        ("batch", 32, "images a step"),
        ("pixels", 32, "pixels a side"),
        ("steps", 2, "PGD steps of the attack alone"),
        ("train-steps", 10, "PGD steps within the training step"),
        ("rounds", 7, "interleaved rounds"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--only", choices=("attack", "step"), help="one of the two (default: both)")
    parser.add_argument("--compile", action="store_true", help="also the compiled rungs: a minute or more each")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument("--threads", type=int, help="threads on a CPU (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args(arguments)
    # BatchNorm needs more than one value a channel, the network some pixels.
    for name, least in (
        ("width", 1),
        ("batch", 2),
        ("pixels", 8),
        ("steps", 1),
        ("train_steps", 1),
        ("rounds", 1),
        ("threads", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        device = environment.pick_device(args.device)
        if args.json:
            make_place(args.json)
    except UserError as error:
        print(f"bench.ladder: {error}", file=sys.stderr)
        return 2
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    where = f"{environment.device_name(device)}, torch {torch.__version__}"
    console = Console(width=150)
    ladders: dict[str, list[dict]] = {}
    for title, rows in measure(args, device):
        ladders[title] = rows
        console.print(table(title, rows))
        if args.json:  # after each, so that a kill loses one at most
            head = {"schema": 1, "kind": "bench.ladder", "started": started, "environment": machine.describe(device)}
            write_text(args.json, json.dumps({**head, "settings": settings, "ladders": ladders}, indent=1) + "\n")
    console.print(
        f"{where}; ResNet-18 of width {args.width}, batch {args.batch}, {args.rounds} interleaved rounds, medians. "
        f"differing pixels: x_adv beside the naive one, from one start noise; loss raised by: the fp32 model's, by x_adv.",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(program.run("bench.ladder", main))
