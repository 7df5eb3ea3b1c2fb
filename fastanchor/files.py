"""Writing files so that a kill or a full disk never leaves a half one in place of a whole one, and naming them."""

from __future__ import annotations

import os
import re
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: written aside, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def slug(text: str) -> str:
    """The text as a file name: letters and digits, everything else a hyphen."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
