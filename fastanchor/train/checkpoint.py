"""Crash-safe checkpoints: written aside and renamed, the generation before kept, verified and read with weights_only."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastanchor.errors import UserError

FORMAT = 1
KEYS = {"format", "config", "class_names", "mean", "std", "stage", "epoch", "weights"}
TRAINING_KEYS = {"optimizer", "best"}


def save(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write `state` (tensors and plain Python values) so that a crash at any moment leaves a whole file under `path`.

    keep_previous: the file that was there stays as `previous.pt` beside it. Raises UserError when the disk refuses; the old
    file is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, path.with_name("previous.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "the disk did not take all of it"
        before = "; the checkpoint before is intact" if path.exists() else ""
        raise UserError(f"{path}: could not be written ({reason}){before}") from error


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read and verify a checkpoint. Raises UserError that says what is wrong with the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
        size = path.stat().st_size
        raise UserError(
            f"{path}: not a whole checkpoint ({size} bytes: {error}); half written, or not a checkpoint at all"
        ) from None
    if damaged:
        raise UserError(f"{path}: damaged: the checksum of {damaged} does not match")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises whatever a hostile or foreign file provokes
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as tensors and plain values ({reason})") from None
    missing = KEYS - state.keys() if isinstance(state, dict) else KEYS
    if missing:
        raise UserError(f"{path}: not a checkpoint of fastanchor: it lacks {', '.join(sorted(missing))}")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}")
    return state


def load_latest(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest good training state of a run's checkpoints, and a sentence where it is not the newest one.

    (None, None) where no epoch was finished yet. Raises UserError when there are checkpoints and none is good.
    """
    trouble: list[str] = []
    for name in ("last.pt", "previous.pt"):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = load(path)
            if not state.keys() >= TRAINING_KEYS:
                raise UserError(f"{path}: a model, but no state of a training")
        except UserError as error:
            trouble.append(str(error))
            continue
        return state, f"{'; '.join(trouble)}; falling back to {path}" if trouble else None
    if trouble:
        raise UserError("; ".join(trouble))
    return None, None


def restore_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load weights strictly. Raises UserError where they belong to another network."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: its weights belong to another network than its configuration describes ({reason})") from None
