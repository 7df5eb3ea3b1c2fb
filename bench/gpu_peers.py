"""GPU run, other people's code beside ours: `python -m bench.peers` for each in a process of its own, within this part's time.

Of its own: a clone's code may set what it likes or take its process down, and torch keeps the first algorithm that it chose for a
shape, so that a peer which switches cudnn.benchmark on would be given the choices of those before it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

from bench import program
from bench.gpu_common import Bench
from bench.peers import ATTACKS, attacks
from bench.peers.clones import recognise, recognise_all
from bench.peers.measure import PART
from fastanchor.errors import UserError

# With less left no process is begun; what it takes to end, after the last peer that it begins, is taken off its budget.
LEAST_SECONDS, LAST_PEER_SECONDS = 25.0, 15.0


def run(bench: Bench) -> None:
    """A process a peer; every result of it becomes one of this run, also where that process was stopped."""
    try:
        clones = recognise_all(bench.peer_paths)
    except UserError as error:
        bench.results.add(PART, "all", left_out=str(error))
        return
    if not clones:
        bench.results.add(PART, "clones", left_out="none was given with --peer-path")
    names = [*ATTACKS, *clones]
    for i, name in enumerate(names):
        reason = attacks.missing(attacks.PEERS[name].needs) if name in ATTACKS else None
        if reason is None and bench.left() < LEAST_SECONDS:
            reason = f"{bench.left():.0f} s were left"
        if reason is not None:
            bench.results.add(PART, name, peer=name, left_out=reason)
            continue
        bench.tidy()
        # Of the time left an even share, but never less than one needs: better some of them whole than a piece of each.
        _run_one(bench, name, max(bench.left() / (len(names) - i), LEAST_SECONDS))


def _run_one(bench: Bench, name: str, seconds: float) -> None:
    out = bench.results.whole.parent / PART / name
    command = [
        sys.executable, "-m", "bench.peers", "--only", name, "--out", str(out), "--device", str(bench.device),
        "--batch", str(bench.batches[0]), "--budget", f"{max(seconds - LAST_PEER_SECONDS, 1):.0f}",
        *(["--quick"] if bench.quick else []),
        *(part for path in bench.peer_paths if recognise(path).name == name for part in ("--peer-path", path)),
    ]  # fmt: skip
    (out / "peers.jsonl").unlink(missing_ok=True)
    try:
        # Its failed results are results; its table would stand between this run's.
        code = program.child(command, bench.left())
        if code not in (0, 1):
            bench.results.add(PART, name, peer=name, error=f"bench.peers ended with {code}")
    except subprocess.TimeoutExpired:
        bench.results.add(PART, name, peer=name, left_out="stopped at the end of this part's time")
    finally:
        lines = out / "peers.jsonl"
        for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was stopped
                row = json.loads(line)
                if row["part"] == PART:
                    kept = {key: value for key, value in row.items() if key not in ("part", "name", "at_s")}
                    bench.results.add(PART, row["name"], **kept)
