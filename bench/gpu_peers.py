"""GPU run, other people's code beside ours: `python -m bench.peers` in a process of its own, within this part's time.

Of its own: a clone's code may set what it likes or take its process down, and torch keeps the first algorithm that it chose for a
shape, so that a peer which switches cudnn.benchmark on would be given the choices of the parts before it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

from bench.gpu_common import Bench
from bench.peers import ATTACKS, attacks
from bench.peers.clones import recognise_all
from bench.peers.measure import PART
from fastanchor.errors import UserError

# With less left no process is begun; what it takes to end, after the last peer that it begins, is taken off its budget.
LEAST_SECONDS, LAST_PEER_SECONDS = 25.0, 15.0


def run(bench: Bench) -> None:
    """Every result of the other process becomes one of this run, also where that process was stopped."""
    try:
        clones = recognise_all(bench.peer_paths)
    except UserError as error:
        bench.results.add(PART, "all", left_out=str(error))
        return
    reasons = [attacks.missing(attacks.PEERS[name].needs) for name in ATTACKS]
    if not clones and all(reasons):
        bench.results.add(PART, "all", left_out=f"no clone was given with --peer-path, and {' and '.join(map(str, reasons))}")
        return
    if bench.left() < LEAST_SECONDS:
        bench.results.add(PART, "all", left_out=f"{bench.left():.0f} s were left")
        return
    bench.tidy()
    out = bench.results.whole.parent / PART
    command = [
        sys.executable, "-m", "bench.peers", "--out", str(out), "--device", str(bench.device), "--batch", str(bench.batches[0]),
        "--budget", f"{max(bench.left() - LAST_PEER_SECONDS, 1):.0f}", *(["--quick"] if bench.quick else []),
        *(part for path in bench.peer_paths for part in ("--peer-path", path)),
    ]  # fmt: skip
    (out / "peers.jsonl").unlink(missing_ok=True)
    try:
        # Its failed results are results; its table would stand between this run's.
        code = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=bench.left(), check=False).returncode
        if code not in (0, 1):
            bench.results.add(PART, "the process", error=f"bench.peers ended with {code}")
    except subprocess.TimeoutExpired:
        bench.results.add(PART, "the process", left_out="stopped at the end of this part's time")
    finally:
        lines = out / "peers.jsonl"
        for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was stopped
                row = json.loads(line)
                if row["part"] == PART:
                    kept = {key: value for key, value in row.items() if key not in ("part", "name", "at_s")}
                    bench.results.add(PART, row["name"], **kept)
