"""Writing files so that a kill or a full disk never leaves a half one in place of a whole one, and naming them."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from fastanchor.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: written aside, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def make_folder(path: Path) -> None:
    """Create a folder with all above it, for what is written later; UserError with the system's reason where no file can be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be a folder to write into ({error.strerror or error})") from None


def make_place(path: Path) -> None:
    """The same for one file that is written later: its folder, and that it is none itself. A file that is there stays."""
    if not os.path.exists(path):
        make_folder(path.parent)
    elif os.path.isfile(path) or os.path.isdir(path):  # a pipe's reader would take the opening for the whole
        try:
            path.open("ab").close()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def slug(text: str) -> str:
    """The text as a file name: letters and digits, everything else a hyphen."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
