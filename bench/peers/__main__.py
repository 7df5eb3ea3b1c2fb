"""Other people's code beside ours, in one command: attacks from the package index, and repositories that you have cloned.

    python -m bench.peers [--peer-path [NAME=]DIR ...] [--only NAME,...] [--device auto|cpu|cuda] [--out DIR] [--quick]

A clone given by --peer-path is EXECUTED, with your rights: name only code that you trust. It is run as it is, in a temporary
folder. Results: DIR/peers.jsonl as they come, DIR/peers.json, and a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from bench import machine, program
from bench.peers import NAMES, REPOSITORIES, tables
from bench.peers.clones import recognise_all
from bench.peers.measure import PART, Run, measure_all
from bench.results import Results
from fastanchor import environment
from fastanchor.ceilings import matmul_rate
from fastanchor.errors import UserError, did_you_mean
from fastanchor.files import make_folder

# Batches that one call of a peer trains on, and seconds that a turn lasts at least: a GPU's steps are short.
GPU_BATCHES, GPU_FILL = 4, 0.25
DEFAULT_BATCH = {"cpu": 16, "cuda": 128}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. UserError for what is none."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__.split("\n\n")[0],
        epilog="A clone given by --peer-path is executed, with your rights: name only code that you trust.",
    )
    add = parser.add_argument
    add(
        "--peer-path",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help=f"a clone of {', '.join(REPOSITORIES)}; it is executed",
    )
    add("--only", metavar="NAME,...", help=f"of {', '.join(NAMES)} (default: all that can be run)")
    add("--device", default="auto", help="auto | cpu | cuda")
    add("--width", type=int, default=64, help="channels of our network where a peer takes it; clones have 64 (default: 64)")
    add("--batch", type=int, help="images a batch (default: 128 on a GPU, 16 on a CPU)")
    add("--steps", type=int, default=10, help="steps of PGD, where the peer does not fix them (default: 10)")
    add("--rounds", type=int, default=5, help="turns of each (default: 5)")
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no peer after this time")
    add("--out", type=Path, default=Path("runs/bench-peers"), metavar="DIR", help="default: runs/bench-peers")
    add("--quick", action="store_true", help="tiny sizes: a check of this program, its figures mean nothing")
    args = parser.parse_args(arguments)
    for name, least in (("width", 1), ("batch", 2), ("steps", 1), ("rounds", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not args.budget > 0:
        raise UserError(f"--budget {args.budget:g}: must be > 0")
    args.only = args.only.split(",") if args.only is not None else None
    for name in args.only or ():
        if name not in NAMES:
            raise UserError(f"--only {name}: must be of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0, 1 where a result is a failure, 2 with one sentence for bad input; UserError for a folder with a run."""
    try:
        args = parse(arguments)
        clones = recognise_all(args.peer_path)
        for name in args.only or ():
            if name in REPOSITORIES and name not in clones:
                raise UserError(f"--only {name}: give its clone with --peer-path DIR (it is at {REPOSITORIES[name].url})")
        device = environment.pick_device(args.device)
        make_folder(args.out)
    except UserError as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 2
    cuda = device.type == "cuda"
    if args.quick:
        args.width, args.batch, args.steps, args.rounds = 4, 2, 1, 1
    args.batch = args.batch or DEFAULT_BATCH[device.type]
    # Of a path only what is recognised in it: results are there to be shown.
    settings = {**vars(args), "out": args.out.name, "device": str(device), "peer_path": list(clones)}
    settings["budget"] = None if args.budget == float("inf") else args.budget
    started = perf_counter()
    results = Results(args.out, settings, kind="bench.peers")
    status = "stopped"
    try:
        results.add("environment", "device and ceilings", **machine.describe(device))
        results.part("environment", "done", perf_counter() - started)
        began = perf_counter()
        run = Run(
            results,
            device,
            args.batch,
            args.steps,
            args.rounds,
            args.width,
            batches=GPU_BATCHES if cuda else 1,
            fill=GPU_FILL if cuda and not args.quick else 0.0,
            ceiling=matmul_rate(device, torch.bfloat16),
            deadline=started + args.budget,
        )
        measure_all(run, clones, args.only)
        status = "done"
    finally:
        if "environment" in results.found["parts"]:
            results.part(PART, status, perf_counter() - began)
        tables.show(results.rows(PART), Console(width=150, highlight=False))
        print(f"{results.whole} and {results.lines.name}: {len(results.found['results'])} results", flush=True)
    return min(1, sum("error" in row for row in results.found["results"]))


if __name__ == "__main__":
    sys.exit(program.run("bench.peers", main))
