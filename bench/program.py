"""What the programs of bench share at their ends: bad input is one sentence and status 2, an order to stop is obeyed in peace."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable

from fastanchor.errors import UserError

STOPPED = 130
# Seconds that a process has to write what it found and take its temporary folders away, once it is told to end.
GRACE = 10.0


def run(name: str, main: Callable[[], int | None]) -> int:
    """The exit status of `main`, the program `python -m NAME`. SIGTERM stops it as Ctrl-C does: what it found is kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main() or 0
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return STOPPED


def child(command: list[str], timeout: float) -> int:
    """Exit status of another program, its output thrown away. Raises subprocess.TimeoutExpired.

    A child that is not waited for to its end, for that or any other reason, is told to stop, and killed only if it does not.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        return process.wait(timeout)
    except BaseException:
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:  # also where a time box ends the waiting
            process.kill()
        raise
