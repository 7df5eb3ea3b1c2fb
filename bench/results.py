"""The results of a run as they come: one line of JSON each, and the whole as one JSON file, rewritten; both survive a kill.

Also time boxes: a part that takes too long is stopped, and the next one begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastanchor.ceilings import share_text
from fastanchor.errors import UserError
from fastanchor.files import make_folder

SCHEMA = 1
# A signal that arrives while torch cannot be interrupted is lost; it is sent again after this many seconds.
AGAIN = 5.0


class OutOfTime(BaseException):
    """A time box has ended. No Exception, so that nothing on the way takes it for a failure that it can go on from."""


class Results:
    """`folder/STEM.jsonl`, a line a result, and `folder/STEM.json`: {"schema", "kind", "started", "settings", "parts",
    "results"}.

    kind: the program that writes them, such as "bench.gpu"; STEM is what follows the dot. Raises UserError for a folder that
    holds such a run, or cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, kind: str = "bench.gpu"):
        stem = kind.rpartition(".")[2]
        self.lines, self.whole = folder / f"{stem}.jsonl", folder / f"{stem}.json"
        if self.whole.exists():
            raise UserError(f"{self.whole} holds a run already, and none is overwritten: give another --out, or take it away")
        make_folder(folder)
        self.started = time.perf_counter()
        head = {"schema": SCHEMA, "kind": kind, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.found: dict[str, Any] = {**head, "settings": settings, "parts": {}, "results": []}
        self.lines.write_text("", encoding="utf-8")
        self._write()

    def add(self, part: str, name: str, **values: Any) -> None:
        """One result, written before this returns, and one line for people."""
        row = {"part": part, "name": name, "at_s": round(time.perf_counter() - self.started, 2), **values}
        self.found["results"].append(row)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._write()
        told = " ".join(
            f"{key}={shown(key, value)}" for key, value in values.items() if key != "error" and not isinstance(value, dict)
        )
        print(f"[{row['at_s']:6.1f} s] {part}: {name}  {told}", flush=True)
        if "error" in values:
            print(values["error"].strip().splitlines()[-1], flush=True)

    def part(self, name: str, status: str, seconds: float) -> None:
        """How a part ended: done | failed | out of time."""
        self.found["parts"][name] = {"status": status, "seconds": round(seconds, 2)}
        self._write()

    @contextlib.contextmanager
    def entry(self, part: str, name: str, **values: Any) -> Iterator[None]:
        """What fails inside becomes a result that holds the traceback, and the run goes on."""
        try:
            yield
        except Exception:
            self.add(part, name, **values, error=traceback.format_exc())

    def rows(self, part: str) -> list[dict[str, Any]]:
        """The results of a part so far."""
        return [row for row in self.found["results"] if row["part"] == part]

    def _write(self) -> None:
        temporary = self.whole.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.whole)


@contextlib.contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside once the seconds are over; in another thread than the main one it only lets things run."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shown(key: str, value: Any) -> str:
    """A result's field for people, in a few digits; a share of a ceiling as `ceilings.share_text` has it."""
    return share_text(value) if key.startswith("share_of_") and isinstance(value, float) else _short(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "[" + ", ".join(map(_short, value)) + "]" if isinstance(value, list) else str(value)
