"""Opening files that may be missing, folders, pipes or unreadable, and naming them in one-line messages."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from fastanchor.errors import UserError


def shown(path: str | Path) -> str:
    """The path in quotes, safe to print: newlines and undecodable bytes are escaped, other letters stay as they are."""
    return repr(str(path))


def reason(error: BaseException) -> str:
    """What went wrong, on one line and without the path: the system's word for it or the error's own text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def present(path: Path) -> bool:
    """Whether something lies at `path`; UserError where the system does not let us look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be looked at: {reason(error)}") from error
    return True


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; OSError for anything else. A named pipe would otherwise block for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError("is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError("is not a regular file")
    return open(path, "rb")
