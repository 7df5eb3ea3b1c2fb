"""Input pipelines that take turns, round by round in one process: seconds of a batch each, what it costs a step, memory taken.

What was made in advance is taken away before a turn is timed, and a turn takes whole cycles of the workers, so that a full queue
hides no slow loader. Nothing waits for the device within a turn.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A turn takes as many batches as fill so many seconds, within the bounds.
TURN_SECONDS, MOST = 0.2, 200
# Untimed at the beginning of a turn, after what lay waiting is gone; for each worker one where there are more.
LEAD = 1
# Workers that begin together deliver together: a turn has whole cycles of them, at least so many.
CYCLES = 2
# The longest wait, in seconds, for a pipeline to fill its queue again before the next one's turn.
LONGEST_REST = 1.0
# The share of the step's time that an input pipeline may cost.
TARGET_PERCENT = 2.0
# Rounds below which nothing contradicts anything.
ENOUGH = 3


class Pipe(NamedTuple):
    """Where batches come from. take: the next one. workers: that make whole ones, in turn. ready: how many may lie waiting."""

    take: Callable[[], tuple[Tensor, ...]]
    workers: int = 0
    ready: int = 0


Pairs = dict[str, tuple[Pipe, Callable[..., object]]]


def seconds(call: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Seconds of one call, on average over `count` in a row: by CUDA events on a GPU, waited for once at the end."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / count
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def turn(pipe: Pipe, use: Callable[..., object], device: torch.device, count: int) -> float:
    """Seconds of a batch, taken from the pipe and given to what uses it, on average over `count` of them."""
    for _ in range(pipe.ready):
        pipe.take()
    for _ in range(max(LEAD, pipe.workers)):
        use(*pipe.take())
    return seconds(lambda: use(*pipe.take()), device, count)


def batches_a_turn(pipe: Pipe, once: float, fill: float) -> int:
    """How many batches a turn takes that is to last `fill` seconds, where one takes `once` seconds."""
    cycle = max(1, pipe.workers)
    cycles = max(CYCLES if pipe.ready else 1, math.ceil(fill / max(once, 1e-6) / cycle))
    return cycle * min(max(1, MOST // cycle), cycles)


def round_seconds(
    pairs: Pairs, once: dict[str, float], used: dict[str, float], counts: dict[str, int], rests: dict[str, float]
) -> float:
    """What a round takes, where to take a batch takes `once` seconds, and to take and use it `used`."""
    found = 0.0
    for name, (pipe, _) in pairs.items():
        found += pipe.ready * once[name] + (max(LEAD, pipe.workers) + counts[name]) * used[name] + rests.get(name, 0.0)
    return found


def estimate(pairs: Pairs, device: torch.device) -> dict[str, float]:
    """Seconds of a batch by name, from one short turn of each, which also does what is done once."""
    return {name: turn(pipe, use, device, max(1, pipe.workers)) for name, (pipe, use) in pairs.items()}


def take_turns(
    pairs: Pairs, counts: dict[str, int], device: torch.device, rounds: int, rests: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """Seconds of a batch in every round, by name. rests: seconds by name to wait after a turn, while a queue fills again."""
    found: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(rounds):
        for name, (pipe, use) in pairs.items():
            found[name].append(turn(pipe, use, device, counts[name]))
            if rests and rests.get(name):
                time.sleep(rests[name])
    return found


def endless(batches: Callable[[], Iterator[tuple[Tensor, ...]]]) -> Generator[tuple[Tensor, ...], None, None]:
    """Pass after pass."""
    while True:
        yield from batches()


def rates(times: list[float], batch: int) -> dict[str, Any]:
    """images_per_s, median over the rounds, and its range; `ms` of a batch likewise."""
    found = sorted(batch / t for t in times)
    return {
        "ms": 1e3 * statistics.median(times), "ms_range": [1e3 * min(times), 1e3 * max(times)],
        "images_per_s": batch / statistics.median(times), "images_per_s_range": [found[0], found[-1]], "rounds": len(times),
    }  # fmt: skip


def costs(times: list[float], ceiling: list[float]) -> dict[str, Any]:
    """cost_percent: by how much a round's time is above the ceiling's of the same round, median and range; 0: nothing waits."""
    found = [100 * (ours / least - 1) for ours, least in zip(times, ceiling, strict=True)]
    return {"cost_percent": statistics.median(found), "cost_percent_range": [min(found), max(found)]}


class Candidate(NamedTuple):
    """A backend to choose, the flags that choose it, and the seconds of a step that it feeds, in every round."""

    backend: str
    flags: str
    times: list[float]


def told(rounds: int) -> str:
    """`1 round`, `5 rounds`."""
    return f"{rounds} round{'' if rounds == 1 else 's'}"


def judge(chosen: str, why: str, fed: dict[str, Candidate]) -> dict[str, Any]:
    """Which backend to use: what auto takes, unless another was quicker in every of ENOUGH rounds, by more than TARGET_PERCENT.

    chosen, why: what auto takes. Returns auto, why, agrees, use (flags to add, none where auto is right), says (a sentence).
    """
    own = {name: candidate for name, candidate in fed.items() if candidate.backend == chosen}
    found = {"auto": chosen, "why": why, "agrees": True, "use": ""}
    if not own:
        return found | {"says": f"auto takes {chosen} ({why}), which was not measured"}
    # Several rows of one backend differ in what its other settings decide.
    ours, best = (min(rows, key=lambda name: statistics.median(rows[name].times)) for rows in (own, fed))
    ratios = [a / b for a, b in zip(own[ours].times, fed[best].times, strict=True)]
    if best in own or len(ratios) < ENOUGH or min(ratios) <= 1 + TARGET_PERCENT / 100:
        return found | {"says": f"use {chosen}, as auto does: {why}"}
    slower = 100 * (statistics.median(ratios) - 1)
    return found | {
        "agrees": False, "use": fed[best].flags,
        "says": f"auto takes {chosen} ({why}), but the measurement disagrees: with it a step takes {slower:.1f} % longer than "
                f"with {best}; add {fed[best].flags}",
    }  # fmt: skip


def memory_now(device: torch.device) -> dict[str, float | None]:
    """10^6 bytes in use. host_mb: of this process and its workers, what they share counted once (None where the system does not
    say). device_mb: of the GPU, by whomever; None without one."""
    pids = ["self", *(child.pid for child in multiprocessing.active_children())]
    try:
        host = sum(_proportional(Path(f"/proc/{pid}/smaps_rollup")) for pid in pids)
    except (OSError, ValueError):
        host = None
    if device.type != "cuda":
        return {"host_mb": host, "device_mb": None}
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return {"host_mb": host, "device_mb": (total - free) / 1e6}


def _proportional(path: Path) -> float:
    lines = path.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6
