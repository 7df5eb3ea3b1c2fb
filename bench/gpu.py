"""The GPU run in one command: is the engine right on this device, how fast is it, and what is each stage worth?

    python -m bench.gpu [--out DIR] [--only PART,PART] [--batches 128,1024] [--no-compile] [--quick]

Parts in order of worth, each in a time box, under nine minutes in all. Every result is written as it comes (DIR/gpu.jsonl,
DIR/gpu.json: see bench/README.md), a failure is a result with its traceback, and a kill at any moment leaves what was found.
--quick is a check of this program in a minute, also on a CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from bench import (
    gpu_attack,
    gpu_convs,
    gpu_correctness,
    gpu_data,
    gpu_kernels,
    gpu_methods,
    gpu_peers,
    gpu_small,
    gpu_steps,
    gpu_supcon,
    gpu_supcon_speed,
    gpu_tables,
    gpu_training,
    machine,
    program,
)  # fmt: skip
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.peers.clones import recognise_all
from bench.results import OutOfTime, Results, time_box
from fastanchor import environment
from fastanchor.ceilings import matmul_rate
from fastanchor.data import sources
from fastanchor.errors import UserError

# With less left no other process is begun.
LEAST_SECONDS = 25.0
# 128 is the batch of the recipes; the largest shows the device's limit.
BATCHES = (128, 1024, 512)


def run_environment(bench: Bench) -> None:
    """Device, versions, settings that decide speed, and the ceilings that all shares are shares of."""
    bench.results.add("environment", "device and ceilings", **machine.describe(bench.device))


def run_benchmark(bench: Bench) -> None:
    """Attack and step anew under cudnn.benchmark, at the first batch size, in a process of its own.

    In this one it would change nothing: the first choice of an algorithm for a shape is kept, whatever the setting says later.
    """
    if not bench.cuda:
        bench.results.add("benchmark", "all", left_out=NEEDS_CUDA)
    elif bench.left() < LEAST_SECONDS:
        bench.results.add("benchmark", "all", left_out=f"{bench.left():.0f} s were left")
    else:
        options = ["--cudnn-benchmark", "--no-compile", "--batches", str(bench.batches[0])]
        run_apart(bench, "benchmark", ["attack", "steps"], "cudnn_benchmark", options)


def run_apart(bench: Bench, part: str, names: list[str], folder: str, options: list[str]) -> None:
    """Parts in another process, within this part's time; their results become this run's, also of a process that was stopped."""
    out = bench.results.whole.parent / folder
    command = [
        sys.executable, "-m", "bench.gpu", "--only", ",".join(names), "--out", str(out), "--budget", str(int(bench.left() - 10)),
        "--device", str(bench.device), "--data", bench.data, *options, *(["--quick"] if bench.quick else []),
    ]  # fmt: skip
    try:
        # Its failed results are results; what it prints at its end would hide this run's tables.
        code = program.child(command, bench.left())
        if code not in (0, 1):
            bench.results.add(part, "the process", error=f"{' '.join(command)} ended with {code}")
    except subprocess.TimeoutExpired as error:
        bench.results.add(part, "the process", error=str(error))
    finally:
        lines = out / "gpu.jsonl"
        for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was stopped
                row = json.loads(line)
                bench.results.add(row.pop("part"), row.pop("name"), **{key: value for key, value in row.items() if key != "at_s"})


# Seconds for each, of which it gets the share that the budget allows: a part may use what those before it left over, never what
# those after it need.
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "environment": (run_environment, 15),
    "correctness": (gpu_correctness.run, 90),
    "supcon": (gpu_supcon.run, 55),
    "attack": (gpu_attack.run, 85),
    "steps": (gpu_steps.run, 190),
    "supcon_speed": (gpu_supcon_speed.run, 60),
    "small": (gpu_small.run, 20),
    "methods": (gpu_methods.run, 60),
    "data": (gpu_data.run, 60),
    "peers": (gpu_peers.run, 60),
    "benchmark": (run_benchmark, 60),
    "convs": (gpu_convs.run, 55),
    "kernels": (gpu_kernels.run, 20),
    "training": (gpu_training.run, 20),
    "sanitizer": (gpu_supcon.run_sanitizer, 25),
}
# All of them do not fit: each then has its share, and what the quick ones leave.
BUDGET, MOST_BUDGET = 535.0, 86_400.0


def run_parts(bench: Bench, names: list[str], budget: float) -> None:
    """Each part in its time box; what fails is recorded and the next begins."""
    ends, share = perf_counter() + budget, budget / sum(PARTS[name][1] for name in names)
    for i, name in enumerate(names):
        reserved = share * sum(PARTS[later][1] for later in names[i + 1 :])
        started = perf_counter()
        bench.deadline = ends - reserved
        status = "stopped"
        try:
            with time_box(bench.left()):
                PARTS[name][0](bench)
            status = "done"
        except OutOfTime:
            status = "out of time"
        except Exception:
            status = "failed"
            bench.results.add(name, "the part itself", error=traceback.format_exc())
        finally:
            bench.results.part(name, status, perf_counter() - started)
        if names[i + 1 :] and not _device_works(bench):
            # Once a kernel has failed, nothing more runs on the device in this process.
            bench.results.add(name, "the device", error="the device no longer answers; the other parts run in another process")
            bench.deadline = ends
            if bench.left() >= LEAST_SECONDS:
                options = ["--batches", ",".join(map(str, bench.batches)), *([] if bench.compile else ["--no-compile"])]
                options += [part for path in bench.peer_paths for part in ("--peer-path", path)]
                run_apart(bench, name, names[i + 1 :], "rest", options)
            return


def _device_works(bench: Bench) -> bool:
    try:
        bench.tidy()
        if bench.cuda:
            torch.zeros(1, device=bench.device).add_(1).item()
    except RuntimeError:
        return False
    return True


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; exits with a sentence for a part or batch size that is none."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), metavar="DIR", help="default: runs/bench-gpu")
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--batches", metavar="N,...", help=f"in order of worth (default: {','.join(map(str, BATCHES))})")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all (default: {BUDGET:.0f})")
    parser.add_argument("--data", default="synthetic", help="data set of correctness and training (default: synthetic)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument("--peer-path", action="append", default=[], metavar="[NAME=]DIR",
                        help="a clone for the part peers, as of python -m bench.peers; it is executed")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="run all of it under cudnn.benchmark")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing compiled: a check of this program")
    args = parser.parse_args(arguments)
    args.only = list(PARTS) if args.only is None else list(dict.fromkeys(args.only.split(",")))
    if unknown := [name for name in args.only if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: must be of {', '.join(PARTS)}")
    try:
        args.batches = [int(part) for part in args.batches.split(",")] if args.batches else [8] if args.quick else list(BATCHES)
    except ValueError:
        parser.error(f"--batches {args.batches}: must be whole numbers with commas between")
    if min(args.batches) < 2:
        parser.error(f"--batches {min(args.batches)}: must be at least 2")
    if not 0 < args.budget <= MOST_BUDGET:
        parser.error(f"--budget {args.budget:g}: must be > 0 and at most {MOST_BUDGET:.0f} seconds, a day")
    try:
        recognise_all(args.peer_path)
        environment.pick_device(args.device)
        if args.data != "synthetic":
            sources.load(args.data, limit=40)  # what is not there is said now, not after minutes
    except UserError as error:
        parser.error(str(error))
    return args


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns how many results are failures. Raises UserError for a folder that no run can be written to."""
    args = parse(arguments)
    device = environment.pick_device(args.device)
    # Of a path only what is recognised in it: results are there to be shown.
    settings = {**vars(args), "out": args.out.name, "device": str(device), "peer_path": list(recognise_all(args.peer_path))}
    results = Results(args.out, settings)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    bench = Bench(
        results, device, args.batches, quick=args.quick, compile=not (args.no_compile or args.quick),
        cudnn_benchmark=args.cudnn_benchmark, data=args.data, ceiling=matmul_rate(device, torch.bfloat16),
        peer_paths=args.peer_path,
    )  # fmt: skip
    try:
        run_parts(bench, args.only, args.budget - (perf_counter() - results.started))
    finally:
        torch.backends.cudnn.benchmark = before
        gpu_tables.show(results, Console(width=170, highlight=False))
        with (args.out / "tables.txt").open("w", encoding="utf-8") as file:
            gpu_tables.show(results, Console(width=170, file=file))
        print(f"{results.whole} and {results.lines.name}: {len(results.found['results'])} results", flush=True)
    return sum("error" in row for row in results.found["results"])


if __name__ == "__main__":
    sys.exit(program.run("bench.gpu", lambda: min(main(), 1)))
