"""Whether a kernel is trusted on a device: after it has agreed there, once a process, with the reference.

A compiler, a driver or a card that was never tried makes a loss slower then, not wrong. FASTANCHOR_KERNELS is the switch.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from fastanchor.reference.checks import check_name

SWITCH = "FASTANCHOR_KERNELS"

_lock = threading.Lock()
_known: dict[tuple[str, torch.device], tuple[bool, str]] = {}


def switch() -> str:
    """The environment's word on kernels: "auto" (once they agree with the reference), "unchecked" or "off". Raises UserError."""
    value = os.environ.get(SWITCH, "").strip().lower() or "auto"
    check_name(SWITCH, value, ("auto", "unchecked", "off"))
    return value


def verified(name: str, check: Callable[[torch.device], None], device: torch.device) -> tuple[bool, str]:
    """Whether the kernels called `name` are trusted on `device`, with the reason in words.

    check: raises where the kernels and the reference disagree on the device. It runs at the first call for this name and device,
    in a thread of its own; it may read values, and must draw no random numbers but from generators of its own. What it raises is
    said in one warning, and the answer is False until the process ends.
    While a CUDA graph is being captured nothing runs: the answer is what is known, else False.
    Raises UserError for a bad FASTANCHOR_KERNELS.
    """
    wanted = switch()
    if wanted != "auto":
        return wanted == "unchecked", f"{SWITCH}={wanted}"
    key = (name, _with_index(device))
    found = _known.get(key)
    if found is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False, "not yet checked against the reference, which cannot be done while a CUDA graph is captured"
    with _lock:
        found = found or _known.get(key)
        if found is None:
            found = _run(name, check, key[1])
            if found is None:
                return False, "no memory left to check them against the reference"
            _known[key] = found
    return found


def _run(name: str, check: Callable[[torch.device], None], device: torch.device) -> tuple[bool, str] | None:
    """The verdict, or None where the device's memory was full: that says nothing about the kernels."""
    try:
        # A first call may come from within autocast, no_grad, a tracer, a function transform, a checkpoint's hooks: all of these
        # are of the caller's thread alone.
        with ThreadPoolExecutor(1) as fresh, _plain_settings():
            fresh.submit(_check_on, device, check).result()
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        reason = f"check against the reference failed: {type(error).__name__}: {lines[0]}"
        warnings.warn(
            f"the kernels for {name} are not used on {device}, plain PyTorch is: {reason}", RuntimeWarning, stacklevel=4
        )
        return False, reason
    return True, "checked against the reference on this device"


def _check_on(device: torch.device, check: Callable[[torch.device], None]) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        check(device)


@contextlib.contextmanager
def _plain_settings():
    """Of what all threads share, what a check would see: the default dtype, and whether waiting for a GPU is an error."""
    dtype = torch.get_default_dtype()
    waiting = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    torch.set_default_dtype(torch.float32)
    if waiting:  # to set it, even to what it is, draws a warning
        torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if waiting:
            torch.cuda.set_sync_debug_mode(waiting)


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
