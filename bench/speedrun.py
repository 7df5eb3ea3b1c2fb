"""The speedrun: seconds from random weights to a stated robust accuracy, over several seeds, with a test of the claim.

    python -m bench.speedrun TRACK [--seeds N | --seeds 0,1,2] [--out DIR] [--device cpu|cuda] [--data-root DIR]
                             [--set key=value]... [--resume]
    python -m bench.speedrun --list
    python -m bench.speedrun --compare A1.json B1.json A2.json B2.json A3.json B3.json ...

What is on the clock and what a record needs: bench/speedruns/README.md. Every seed is written as it ends (DIR/speedrun.jsonl,
DIR/speedrun.json); after a kill the same command with --resume goes on. Exit status: 0 the claim holds (--compare: B is quicker),
1 it does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import machine, schema, speedrun_claim, speedrun_track
from bench.results import SCHEMA, Results
from bench.speedrun_clock import Rig, judge
from bench.speedrun_track import Track
from fastanchor import environment, settings
from fastanchor.config import Config
from fastanchor.errors import UserError
from fastanchor.evaluate.autoattack import require_autoattack
from fastanchor.pipeline import load_images
from fastanchor.train.checks import check_device

KIND = "bench.speedrun"
PART = "seeds"
BEGUN = "begun"  # a row before each seed's clock: a seed that was killed on it leaves a trace
CLOCK_STEP = timedelta(seconds=1)  # of `started`
PAIRS = 3  # of runs, at least, for a comparison


def run(track: Track, config: Config, seeds: list[int], overrides: dict[str, Any], out: Path, resume: bool) -> dict[str, Any]:
    """Train and judge every seed that `out` does not have yet, and write the summary, which is returned. Raises UserError."""
    device = environment.pick_device(config.device)
    check_device(config, device)
    about = environment.describe(device)
    resolved = settings.to_dict(config)
    resolved["data"]["root"] = None  # where this machine keeps its archives is no part of the entry
    described = {
        "track": track.given, "target": {"attack": track.attack.text(), "accuracy": track.accuracy}, "seeds": seeds,
        "overrides": overrides, "config": resolved,
    }  # fmt: skip
    earlier = _earlier(out, described, about) if resume else []
    if not resume and (out / "speedrun.json").exists():
        raise UserError(
            f"{out}: holds a speedrun, and no seed of one is ever dropped; --resume goes on with it, --out DIR elsewhere"
        )
    images = load_images(config)
    if track.attack.name == "autoattack":
        require_autoattack(images.num_classes)  # better said now than after the training
    results = _open(out, described, earlier)
    if not results.rows("environment"):
        results.add("environment", "device and ceilings", **machine.describe(device))
    started = perf_counter()
    done = {row["seed"] for row in results.rows(PART)}
    rig = None
    for seed in seeds:
        if seed in done:
            continue
        if rig is None:
            rig = Rig(config, images.num_classes, len(images.train), images.image_shape, device)
            print(f"prepared in {rig.preparation_s:.1f} s, not on the clock: {rig.step.describe()}", flush=True)
        results.add(BEGUN, f"seed {seed}", seed=seed)
        model, seconds = rig.timed(seed, images.train)
        # The test images are first looked at here, with the clock stopped.
        judged = judge(
            model, images.test, track.attack, num_classes=images.num_classes, batch_size=config.eval.batch_size, device=device,
            say=lambda line: print(f"  {line}", flush=True),
        )  # fmt: skip
        results.add(
            PART, f"seed {seed}", seed=seed, seconds=seconds, preparation_s=rig.preparation_s, cold_s=rig.preparation_s + seconds,
            **judged, epochs=config.epochs, images_seen=rig.images_seen, pflop=rig.flops / 1e15,
            peak_memory_mb=rig.peak_memory_mb, test_images=len(images.test),
        )  # fmt: skip
    results.part(PART, "done", perf_counter() - started)
    summary = speedrun_claim.summarise(results.rows(PART), track.accuracy, track.alpha, track.seeds)
    restarted = _restarted(results.rows(BEGUN))
    against = _against(track, results.rows("environment")[0]["about"], device, seeds, overrides, restarted)
    summary |= {"restarted": len(restarted), "counts": summary["holds"] and not against, "against": against}
    results.add("summary", track.name, **summary)
    return results.found


def _restarted(begun: list[dict[str, Any]]) -> list[int]:
    """The seeds that were begun more than once, so that their time is not the first that was drawn."""
    return [seed for seed, times in Counter(row["seed"] for row in begun).items() if times > 1]


def _of_a_commit(about: dict[str, Any]) -> bool:
    return about["commit"] is not None and not about["commit"].endswith("+")


def _against(
    track: Track, about: dict[str, Any], device: torch.device, seeds: list[int], overrides: dict[str, Any], restarted: list[int]
) -> list[str]:
    """Why this run is no record, whatever it reached; empty where nothing speaks against it."""
    found = speedrun_track.outside(track)
    if device.type != track.device:
        found.append(f"it ran on {device.type}, the track is one of {track.device}")
    if track.device_name is not None and track.device_name.lower() not in about["device"].lower():
        found.append(f"it ran on {about['device']}, the track is one of {track.device_name}")
    if seeds != list(range(len(seeds))):
        found.append("its seeds are not 0, 1, 2, ...")
    if overrides:
        found.append(f"its settings are not the track's file alone: {', '.join(overrides)} set by hand")
    if not _of_a_commit(about):
        found.append("its code is not that of a commit")
    if restarted:
        found.append(f"{len(restarted)} of its seeds restarted, so their times were drawn anew: {', '.join(map(str, restarted))}")
    return found


def _earlier(out: Path, described: dict[str, Any], about: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the run that is gone on with; none where it has not begun. Raises UserError where it was another run."""
    if not (out / "speedrun.json").exists():
        return []
    found = _read(out / "speedrun.json")
    for key, value in json.loads(json.dumps(described)).items():
        if found["settings"].get(key) != value:
            raise UserError(f"{out}: its speedrun was begun with another {key}; --resume needs the same command")
    for row in found["results"]:
        before = row.get("about", about)
        for key in ("commit", "device", "python", "packages"):
            if before.get(key) != about[key]:
                raise UserError(
                    f"{out}: its speedrun was begun with another {key}: the seeds of one run share it; use another --out"
                )
    return [row for row in found["results"] if row["part"] != "summary"]


def _open(out: Path, described: dict[str, Any], earlier: list[dict[str, Any]]) -> Results:
    """The files of the run in `out`, with its earlier results in them.

    They are written anew aside and moved: a kill at any moment leaves the former ones or these.
    """
    aside = out / ".new"
    try:
        out.mkdir(parents=True, exist_ok=True)
        results = Results(aside, described, kind=KIND)
        for row in earlier:
            results.add(row["part"], row["name"], **{k: v for k, v in row.items() if k not in ("part", "name", "at_s")})
        for name in ("whole", "lines"):
            path = getattr(results, name)
            os.replace(path, out / path.name)
            setattr(results, name, out / path.name)
        aside.rmdir()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return results


def _read(path: Path) -> dict[str, Any]:
    """A file that this program wrote. Raises UserError for any other."""
    found = schema.read(path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path}: is no file of bench.speedrun")
    if found.get("schema") != SCHEMA or not {"settings", "results"} <= found.keys():
        raise UserError(f"{path}: is not as this version of bench.speedrun writes it")
    return found


def compare(paths: list[Path]) -> dict[str, Any]:
    """Is B's entry quicker than A's? paths: A1, B1, A2, B2, ...: runs to one target on one device, made in turns.

    `claims`: of each run; `ratios`, `ratio`, `p`: of speedrun_claim.quicker on the runs' mean seconds; `verdict`: in words;
    `exit`: 0 if every claim holds and p < alpha, else 1. Raises UserError for runs that cannot be compared.
    """
    if len(paths) % 2 or len(paths) < 2 * PAIRS:
        raise UserError(
            f"--compare takes at least {PAIRS} pairs of runs, found {len(paths)} files: A1.json B1.json A2.json B2.json ..."
        )
    runs = [_made(f"{'AB'[i % 2]}{i // 2 + 1}", path) for i, path in enumerate(paths)]
    first = runs[0]
    for run in runs[1:]:
        for key, value in run["task"].items():
            if value != first["task"][key]:
                raise UserError(f"A1 and {run['name']} are runs of two tracks: their {key} differs")
        if run["device"] != first["device"]:
            raise UserError(
                f"A1 and {run['name']} ran on two devices: {first['device']} and {run['device']}; seconds of one say nothing "
                "about the other"
            )
    for before, run in zip(runs, runs[2:], strict=False):
        for key, value in run["entry"].items():
            if value != before["entry"][key]:
                raise UserError(f"{before['name']} and {run['name']} are runs of two entries: their {key} differs")
    for before, run in itertools.pairwise(runs):
        if run["started"] <= before["started"] or run["started"] < before["ended"] - CLOCK_STEP:
            raise UserError(
                f"{run['name']} began before {before['name']} had ended: the runs are made in turns, and given as they were made"
            )
    claims = {run["name"]: run["claim"] for run in runs}
    test = speedrun_claim.quicker(*([run["claim"]["seconds_mean"] for run in runs[i::2]] for i in range(2)))
    weak = [name for name, claim in claims.items() if not claim["holds"]]
    if weak:
        verdict = f"B is not shown to be quicker: the claim of {', '.join(weak)} does not hold"
    elif test["p"] is None:
        verdict = "B is not shown to be quicker: all pairs have the same ratio, of which no test can say anything"
    else:
        verdict = f"B is {'' if test['p'] < first['task']['alpha'] else 'not shown to be '}quicker"
    return {"claims": claims, **test, "verdict": verdict, "exit": int(verdict != "B is quicker")}


def _made(name: str, path: Path) -> dict[str, Any]:
    """What a comparison needs to know of one run. Raises UserError unless it is one process's, whole, from a commit."""
    found = _read(path)
    try:
        rows = {
            part: [row for row in found["results"] if row["part"] == part] for part in ("environment", PART, BEGUN, "summary")
        }
        if not rows["summary"]:
            raise UserError(f"{path}: its run has not ended")
        if len({row["preparation_s"] for row in rows[PART]}) > 1 or _restarted(rows[BEGUN]):
            raise UserError(f"{path}: its run was killed and gone on with; each run of a comparison is one process")
        about, given, track = rows["environment"][0]["about"], found["settings"], found["settings"]["track"]
        if not _of_a_commit(about):
            raise UserError(f"{path}: its code is not that of a commit, so nothing says what was timed")
        started = datetime.strptime(found["started"], "%Y-%m-%dT%H:%M:%S%z")
        return {
            "name": name,
            "task": {key: track.get(key) for key in ("name", "target", "data", "device", "seeds", "alpha")},
            "entry": {key: about[key] for key in ("commit", "python", "packages")}
            | {key: given[key] for key in ("track", "seeds", "overrides", "config")},
            "device": about["device"],
            "started": started,
            "ended": started + timedelta(seconds=found["results"][-1]["at_s"]),
            "claim": speedrun_claim.summarise(rows[PART], given["target"]["accuracy"], track["alpha"], track["seeds"]),
        }
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: is not as bench.speedrun writes it ({error!r})") from None


def show(found: dict[str, Any], console: Console) -> None:
    """A finished run for people."""
    given = found["settings"]
    console.print(f"{given['track']['task']}: {given['target']['attack']} above {given['target']['accuracy']:g} %")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("seed", "clock s", "preparation s", "cold s", "clean %", "robust %", "epochs", "images", "PFLOP", "peak MB"):
        table.add_column(column, justify="right")
    table.add_column("")
    rows = [row for row in found["results"] if row["part"] == PART]
    for row in rows:
        peak = "" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"
        table.add_row(
            str(row["seed"]), f"{row['seconds']:.2f}", f"{row['preparation_s']:.2f}", f"{row['cold_s']:.2f}",
            f"{row['clean']:.2f}", f"{row['robust']:.2f}", str(row["epochs"]), f"{row['images_seen']:,}", f"{row['pflop']:.4g}",
            peak, row.get("failed", ""),
        )  # fmt: skip
    console.print(table)
    summary = found["results"][-1]
    console.print(_said(summary) + f": {summary['verdict']}")
    if summary["failed"]:
        console.print(f"of these {summary['failed']} failed; each counts with the accuracy that it has")
    console.print(
        "counts as a record" if summary["counts"] else "no record: " + "; ".join(summary["against"] or ["see the verdict"])
    )


def _said(claim: dict[str, Any]) -> str:
    """The figures of a claim in one line."""
    figures = (("clock", "seconds", "s"), ("cold", "cold_s", "s"), ("clean", "clean", "%"), ("robust", "robust", "%"))
    told = [f"{label} {claim[f'{key}_mean']:.2f} {unit}{_spread(claim[f'{key}_std'])}" for label, key, unit in figures]
    return f"n = {claim['n']}: {', '.join(told)}"


def _spread(std: float | None) -> str:
    return "" if std is None else f" (sd {std:.2f})"


def show_comparison(found: dict[str, Any], console: Console) -> None:
    """The claim of each run, and whether one entry is quicker."""
    for name, claim in found["claims"].items():
        console.print(f"{name}: {_said(claim)}: {claim['verdict']}")
    told = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
    p = "none" if found["p"] is None else f"{found['p']:.2g}"
    console.print(f"clock, A / B of each pair: {told}; geometric mean {found['ratio']:.3f}")
    console.print(f"paired one-sided t-test over {len(found['ratios'])} pairs that B is quicker: p = {p}")
    console.print(found["verdict"])


def show_tracks(console: Console) -> None:
    """The tracks that there are."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("track", "task", "target", "device", "seeds", "record"):
        table.add_column(column, overflow="fold")
    for name in speedrun_track.TRACKS:
        track = speedrun_track.load(name)
        device = track.device if track.device_name is None else f"{track.device}: {track.device_name}"
        target = f"> {track.accuracy:g} % under {track.attack.describe()}"
        table.add_row(name, track.task, target, device, str(track.seeds), track.record or "no entry yet")
    console.print(table)


def parse_seeds(text: str | None, default: int) -> list[int]:
    """`5`: 0 to 4; `0,3,7`: these. Raises UserError."""
    if text is None:
        return list(range(default))
    wrong = UserError(f"--seeds {text}: must be how many, at least 1, or which, as in 0,1,2")
    try:
        numbers = [int(part) for part in text.rstrip(",").split(",")]
    except ValueError:
        raise wrong from None
    single = "," not in text
    if min(numbers) < single:
        raise wrong
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {text}: names a seed twice, which is no second sample")
    return list(range(numbers[0])) if single else numbers


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.speedrun", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "track", nargs="?", metavar="TRACK", help=f"{', '.join(speedrun_track.TRACKS)}, or the path of a .yaml file"
    )
    parser.add_argument(
        "--seeds", metavar="N|0,1,2", help="how many, from 0, or which ones (default: as many as the track needs)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/speedrun-NAME")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: auto)")
    parser.add_argument("--data-root", metavar="DIR", help="where the archives of CIFAR are")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="a setting of the entry, as in --set epochs=3"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the seeds that are missing")
    parser.add_argument("--list", action="store_true", help="the tracks")
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="A1 B1 A2 B2 ...: runs made in turns: is B quicker at the same target?",
    )
    args = parser.parse_args(arguments)
    console = Console(width=170, highlight=False, markup=False)
    try:
        if args.list:
            show_tracks(console)
            return 0
        if args.compare:
            found = compare(args.compare)
            show_comparison(found, console)
            return found["exit"]
        if args.track is None:
            raise UserError(
                f"which track? {', '.join(speedrun_track.TRACKS)}, or the path of a .yaml file; --list describes them"
            )
        track = speedrun_track.load(args.track)
        overrides = speedrun_track.parse_overrides(args.set)
        seeds = parse_seeds(args.seeds, track.seeds)
        config = speedrun_track.resolve(track, overrides, device=args.device, root=args.data_root)
        out = args.out or Path("runs") / f"speedrun-{track.name}"
        found = run(track, config, seeds, overrides, out, args.resume)
    except UserError as error:
        print(f"bench.speedrun: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.speedrun: stopped; the seeds that are done are kept, and --resume goes on", file=sys.stderr)
        return 130
    show(found, console)
    print(f"{out / 'speedrun.json'}", flush=True)
    return int(not found["results"][-1]["holds"])


if __name__ == "__main__":
    sys.exit(main())
