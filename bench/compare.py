"""Two runs side by side, a regression gate: every timing that both files hold, B over A; exits 1 where B is slower or wrong.

    python -m bench.compare A.json B.json [--slowdown 1.10] [--only PART,...] [--any-device] [--json FILE]

Reads what bench.gpu, bench.peers, bench.speedrun, `make bench` (pytest-benchmark) and bench.ladder write. A timing counts as
slower where its median is past the slowdown AND its range lies wholly above A's; where a file has no range, the medians alone
decide. Peers' own code, the naive code and the second rung are yardsticks: their times are shown and never count.
Exit status: 0; 1 where something is slower, no longer `ok`, or newly failed; 2 for bad input, with one sentence.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench import program, schema
from fastanchor.errors import UserError
from fastanchor.files import make_place

SCHEMA = 1
Key = tuple[str, str, str]  # part, what was measured, which of its times
# Fields of a row of gpu.json that say what was measured, as against what came out.
IDENTITY = (
    "peer", "what", "case", "regime", "method", "batch", "n", "d", "how", "channels", "out_channels", "pixels", "dtype", "bn",
    "objective", "precision", "backend", "graph", "compile", "kernels", "cudnn_benchmark",
)  # fmt: skip
# Times of one row by field: name and milliseconds in a unit. Left out: first_step_s, which is compilation, and what follows from
# others, such as replay_backward_ms, a difference that noise can take below zero.
TIMES = {
    "ms": ("", 1), "forward_ms": ("forward", 1), "backward_ms": ("backward", 1), "replay_ms": ("replay", 1),
    "replay_forward_ms": ("replay, forward", 1), "seconds": ("whole", 1e3),
}  # fmt: skip
CEILINGS = ("bf16_matmul_tflops", "fp32_matmul_tflops", "copy_gb_per_s")
# Settings without which two files of a kind did not time the same network on the same images. Of `make bench`, whose settings
# are sizes: all but the numbers of rounds.
SAME_WORK = ("quick", "width", "batch", "pixels", "steps", "target")
RUNS = ("bench.gpu", "bench.peers", "bench.speedrun")
# How the names of rows begin that time what the engine is held beside.
YARDSTICKS = ("naive", "second rung")
# The benchmark in which all that takes turns is the engine's.
METHODS = "test_methods"


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and range over the rounds (None where the file has none). gated: may count as slower."""

    ms: float
    span: tuple[float, float] | None = None
    gated: bool = True


@dataclass
class Run:
    """What one file holds. ok: verdicts by (part, name); failed: entries that ended in an error; ceilings: rates, any unit."""

    kind: str
    about: dict[str, str | None]
    settings: dict[str, Any] = field(default_factory=dict)
    timings: dict[Key, Timing] = field(default_factory=dict)
    ok: dict[tuple[str, str], bool] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)
    ceilings: dict[str, float] = field(default_factory=dict)

    def keep(self, parts: list[str]) -> None:
        """Leave these parts alone."""
        self.timings = {key: timing for key, timing in self.timings.items() if key[0] in parts}
        self.ok = {key: ok for key, ok in self.ok.items() if key[0] in parts}
        self.failed = {key for key in self.failed if key[0] in parts}

    def parts(self) -> set[str]:
        """Of which there is anything."""
        return {key[0] for key in (*self.timings, *self.ok, *self.failed)}


def load(path: Path) -> Run:
    """Read one file of RUNS, pytest-benchmark or bench.ladder; UserError where it is none."""
    found = schema.read(path)
    readers = {"results": (RUNS[0], _results), "ladders": ("bench.ladder", _ladder), "benchmarks": ("make bench", _pytest)}
    holds = next((key for key in readers if isinstance(found, dict) and key in found), None)
    kind, reader = readers.get(holds, (None, None))
    if holds == "results":
        kind = found.get("kind", kind)  # the first files of bench.gpu had none
    if kind is None or (holds == "results" and kind not in RUNS):
        raise UserError(f"{path}: is no file of {', '.join(RUNS)}, bench.ladder or make bench (pytest-benchmark's JSON)")
    run = Run(kind, {})
    try:
        reader(run, found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from None
        raise UserError(f"{path}: is not as {run.kind} writes it ({type(error).__name__}: {error})") from None
    return run


def _timing(what: str, ms: float, span: list[float] | None, rounds: int | None, gated: bool = True) -> Timing:
    """One round has no spread to speak of: it counts as no range."""
    for value in (ms, *(span or ())):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise UserError(f"the time of {what} is {value}, which is no time")
    return Timing(float(ms), tuple(map(float, span)) if span and (rounds or 0) > 1 else None, gated)


def _described(about: dict[str, Any]) -> dict[str, str | None]:
    """Of environment.describe: what may differ between two runs that are compared."""
    packages = about.get("packages") or {}
    found = {"device": about.get("device"), **{name: packages.get(name) for name in ("torch", "triton")}}
    found |= {name: about.get(name) for name in ("commit", "python", "cuda", "cudnn")}
    return {name: None if value is None else str(value) for name, value in found.items()}


def _results(run: Run, found: dict[str, Any]) -> None:
    run.settings = found["settings"]
    # Without the part `environment` the kind of device is all that is known.
    run.about = {"device": run.settings.get("device")}
    repeated: dict[Key, list[float]] = {}
    seen: dict[tuple[str, str], int] = {}
    for row in found["results"]:
        part, name = row["part"], _entry(row)
        if "about" in row:
            run.about = _described(row["about"])
            run.ceilings = {key: row[key] for key in CEILINGS if key in row}
        elif "error" in row:
            run.failed.add((part, name))
        elif part == "training":
            # The first one captures and compiles.
            repeated.setdefault((part, name, "epoch"), []).extend([1e3 * row["seconds"]] if row["epoch"] > 1 else [])
        elif "seed" in row and "seconds" in row:
            repeated.setdefault((part, "from random weights to the end", "every seed"), []).append(1e3 * row["seconds"])
        elif "left_out" not in row:
            # Of what stands beside several groups, as naive code does, each time is one of its own.
            seen[part, name] = seen.get((part, name), 0) + 1
            name += f" ({seen[part, name]})" if seen[part, name] > 1 else ""
            if "ok" in row:
                run.ok[part, name] = row["ok"] is True
            for key, (label, unit) in TIMES.items():
                if key in row:
                    span = row.get(f"{key}_range")
                    run.timings[part, name, label] = _timing(name, unit * row[key], span, row.get("rounds"), not _yardstick(row))
    for key, times in repeated.items():
        if times:
            run.timings[key] = _timing(key[1], statistics.median(times), [min(times), max(times)], len(times))


def _yardstick(row: dict[str, Any]) -> bool:
    """Whether it times other people's code, not ours: of the rows beside a peer that is the one that has the peer's name."""
    return row["name"] == row.get("peer") or row["name"].startswith(YARDSTICKS)


def _entry(row: dict[str, Any]) -> str:
    """A row's name with its sizes and settings: `graphed, aten | batch 128, bf16`."""
    said = []
    for key in IDENTITY:
        value = row.get(key)
        if isinstance(value, bool):
            said += [key] if value else []
        elif value is not None:
            said.append(f"{key} {value}" if not isinstance(value, str) or key in ("graph", "kernels") else value)
    return f"{row['name']} | {', '.join(said)}" if said else str(row["name"])


def _ladder(run: Run, found: dict[str, Any]) -> None:
    row = found["environment"]  # the first files have what is in its `about`, and no ceilings
    run.settings, run.about = found["settings"], _described(row.get("about", row))
    run.ceilings = {key: row[key] for key in CEILINGS if key in row}
    for title, rows in found["ladders"].items():
        part = "attack" if title.startswith("attack") else "step"
        for row in rows:
            name = f"{row['name']} | {title}"
            run.timings[part, name, ""] = _timing(name, row["ms"], row["ms_range"], row["rounds"], not _yardstick(row))


def processor_of(found: dict[str, Any]) -> str:
    """`CPU: NAME, 2 threads` of a file of pytest-benchmark, as environment.device_name has it; 1/2 where benchmarks differ."""
    machine = found["machine_info"]
    name = (machine.get("cpu") or {}).get("brand_raw") or machine.get("processor") or machine.get("machine")
    threads = "/".join(sorted({str(entry["extra_info"].get("threads")) for entry in found["benchmarks"]}))
    return f"CPU: {name}, {threads} thread{'' if threads == '1' else 's'}"


def _pytest(run: Run, found: dict[str, Any]) -> None:
    machine, commit = found["machine_info"], found.get("commit_info") or {}
    changed = " with changes" if commit.get("dirty") else ""
    run.about = {
        "device": processor_of(found),
        "commit": f"{str(commit['id'])[:12]}{changed}" if commit.get("id") else None,
        "python": machine.get("python_version"),
    }
    ours = found.get("fastanchor")  # the first files have none
    if ours is not None:
        row = ours["environment"]
        run.settings, run.about = dict(ours["settings"]), _described(row["about"])
        run.ceilings = {key: row[key] for key in CEILINGS if key in row}
        run.failed = {(_part(name), name) for name in (node.rpartition("::")[2] for node in ours.get("failed", []))}
    for entry in found["benchmarks"]:
        part, name, stats = _part(entry["name"]), entry["name"], entry["stats"]
        span = [1e3 * stats["min"], 1e3 * stats["max"]]
        run.timings[part, name, "engine"] = _timing(name, 1e3 * stats["median"], span, stats["rounds"])
        gated = name == METHODS  # else yardsticks: not what is under test
        for key, value in entry["extra_info"].items():
            if key.endswith("_median_s"):
                peer = key.removesuffix("_median_s")
                span = entry["extra_info"].get(f"{peer}_range_s")
                span = None if span is None else [1e3 * s for s in span]
                run.timings[part, name, peer.replace("_", " ")] = _timing(name, 1e3 * value, span, stats["rounds"], gated)


def _part(test: str) -> str:
    """Of `test_whole_step[PGD-AT-fp32]`: whole_step."""
    return test.split("[")[0].removeprefix("test_")


def rows(a: Run, b: Run, slowdown: float) -> Iterator[dict[str, Any]]:
    """Every timing of both. ratio: b's median over a's; ratio_range: the least and greatest that the two ranges allow (or None).

    verdict: "slower" | "faster": past the slowdown (its inverse) and, where there are ranges, these apart; "overlap": past it,
    but the ranges overlap; "yardstick": past it, but not gated; "" else.
    """
    for key, ours in a.timings.items():
        if (theirs := b.timings.get(key)) is None:
            continue
        ratio = theirs.ms / ours.ms
        span = (theirs.span[0] / ours.span[1], theirs.span[1] / ours.span[0]) if ours.span and theirs.span else None
        low, high = span or (ratio, ratio)
        verdict = ""
        if ratio > slowdown or ratio < 1 / slowdown:
            apart = low > 1 if ratio > 1 else high < 1
            verdict = "yardstick" if not ours.gated else "overlap" if not apart else "slower" if ratio > 1 else "faster"
        yield {
            "part": key[0], "name": key[1], "timing": key[2], "a_ms": ours.ms, "a_range": ours.span, "b_ms": theirs.ms,
            "b_range": theirs.span, "ratio": ratio, "ratio_range": span, "verdict": verdict,
        }  # fmt: skip


def _work(a: Run, b: Run) -> list[str]:
    """The settings that two runs must share; of `make bench` those that both state, since its first files state none."""
    return [key for key in a.settings if key in b.settings and "rounds" not in key] if a.kind == "make bench" else list(SAME_WORK)


def compare(a: Run, b: Run, *, slowdown: float = 1.10, any_device: bool = False) -> dict[str, Any]:
    """Everything that is said about two runs, as --json writes it; `exit` is 0 or 1. UserError where they cannot be compared."""
    if a.kind != b.kind:
        raise UserError(f"A is a file of {a.kind} and B one of {b.kind}: they have no timings in common")
    for name in _work(a, b):
        if a.settings.get(name) != b.settings.get(name):
            raise UserError(f"A and B did not time the same work: {name} {a.settings.get(name)} and {b.settings.get(name)}")
    devices = [run.about.get("device") for run in (a, b)]
    if devices[0] != devices[1] and not any_device:
        raise UserError(f"A ran on {devices[0]}, B on {devices[1]}; --any-device compares them all the same")
    found = list(rows(a, b, slowdown))
    verdicts = [key for key in a.ok if key in b.ok]
    if not found and not verdicts:
        raise UserError("the two files have no timing or verdict in common")
    # A row that was right, or timed, and now ends in an error has turned bad too.
    bad = [f"{part}: {name}: no longer ok" for part, name in verdicts if a.ok[part, name] and not b.ok[part, name]]
    bad += [f"{part}: {name}: failed" for part, name in sorted(b.failed - a.failed)]
    names = dict.fromkeys((*a.about, *b.about))
    entries = [{key[:2] for key in run.timings} | set(run.ok) for run in (a, b)]
    only = [sorted(f"{part}: {name}" for part, name in mine - other) for mine, other in (entries, entries[::-1])]
    settings = {key for run in (a, b) for key in run.settings} - {"out", "device", "json"}
    return {
        "schema": SCHEMA,
        "kind": a.kind,
        "device": devices[0] if devices[0] == devices[1] else devices,
        "differs": {name: [a.about.get(name), b.about.get(name)] for name in names if a.about.get(name) != b.about.get(name)},
        "settings": {
            key: [a.settings.get(key), b.settings.get(key)]
            for key in sorted(settings)
            if a.settings.get(key) != b.settings.get(key)
        },
        "ceilings": {key: b.ceilings[key] / a.ceilings[key] for key in a.ceilings if key in b.ceilings},
        "slowdown": slowdown,
        "rows": found,
        "turned_bad": bad,
        "still_bad": [f"{part}: {name}" for part, name in verdicts if not a.ok[part, name] and not b.ok[part, name]],
        "only_in_a": only[0],
        "only_in_b": only[1],
        "exit": int(bool(bad) or any(row["verdict"] == "slower" for row in found)),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The comparison for people; what matters most last."""
    changes = {**found["differs"], **found["settings"]}
    told = "; ".join(f"{name}: {before} -> {now}" for name, (before, now) in changes.items())
    console.print(f"{found['kind']}, {found['device']}; A -> B: {told or 'the same environment'}")
    if found["ceilings"]:
        told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found["ceilings"].items())
        console.print(f"the device's own ceilings, B / A: {told}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="time, B / A", title_justify="left")
    for column in ("part", "what", "time of"):
        table.add_column(column, overflow="fold")
    for column in ("A ms", "B ms", "B / A", "ranges allow"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in found["rows"]:
        span = "no range" if row["ratio_range"] is None else "{:.2f} to {:.2f}".format(*row["ratio_range"])
        table.add_row(
            row["part"], row["name"], row["timing"], f"{row['a_ms']:.4g}", f"{row['b_ms']:.4g}", f"{row['ratio']:.2f}", span,
            row["verdict"],
        )  # fmt: skip
    console.print(table)
    for where, entries in (("A", found["only_in_a"]), ("B", found["only_in_b"])):
        if entries:
            more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
            console.print(f"only in {where}: {'; '.join(entries[:5])}{more}")
    if found["still_bad"]:
        console.print(f"ok in neither: {'; '.join(found['still_bad'])}")
    kinds = {kind: sum(row["verdict"] == kind for row in found["rows"]) for kind in ("slower", "faster", "overlap")}
    console.print(
        f"{len(found['rows'])} timings: {kinds['slower']} slower and {kinds['faster']} faster by more than {found['slowdown']:g} "
        f"with ranges apart (without a range: by the medians alone); {kinds['overlap']} past it with ranges that overlap do not "
        f"count, nor do yardsticks.",
    )
    for row in found["rows"]:
        if row["verdict"] == "slower":
            what = f"{row['name']}, {row['timing']}" if row["timing"] else row["name"]
            console.print(f"SLOWER {row['ratio']:.2f} x: {row['part']}: {what}")
    for line in found["turned_bad"]:
        console.print(f"BAD: {line}")


def _select(runs: list[Run], only: str | None) -> None:
    if only is None:
        return
    asked, known = only.split(","), sorted(runs[0].parts() | runs[1].parts())
    if unknown := [part for part in asked if part not in known]:
        raise UserError(f"--only {unknown[0]}: must be of {', '.join(known)}")
    for run in runs:
        run.keep(asked)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("a", type=Path, metavar="A.json", help="before")
    parser.add_argument("b", type=Path, metavar="B.json", help="after: ratios are its time over A's")
    parser.add_argument("--slowdown", type=float, default=1.10, help="ratio past which a timing counts as slower (default: 1.10)")
    parser.add_argument("--only", metavar="PART,...", help="the files' parts: attack, steps, whole_step, ...")
    parser.add_argument("--any-device", action="store_true", help="compare runs of different devices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison here")
    args = parser.parse_args(arguments)
    try:
        if not (math.isfinite(args.slowdown) and args.slowdown >= 1):
            raise UserError(f"--slowdown = {args.slowdown:g}: must be at least 1")
        runs = [load(path) for path in (args.a, args.b)]
        _select(runs, args.only)
        found = compare(*runs, slowdown=args.slowdown, any_device=args.any_device)
        if args.json:
            make_place(args.json)
            files = {"a": str(args.a), "b": str(args.b)}
            args.json.write_text(json.dumps({**files, **found}, indent=1) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    show(found, Console(width=170, highlight=False, markup=False))
    return found["exit"]


if __name__ == "__main__":
    sys.exit(program.run("bench.compare", main))
