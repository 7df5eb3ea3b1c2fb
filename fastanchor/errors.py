"""The one exception that means "the input is at fault, not the program", and the hint that goes with a misspelt name."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: its text is one sentence for a person. The command line prints it and exits with status 2."""


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the nearest of `names`, or nothing where none is near."""
    match = difflib.get_close_matches(str(name), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {match[0]!r}?" if match else ""
