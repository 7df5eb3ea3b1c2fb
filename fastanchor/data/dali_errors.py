"""What DALI's failures mean, in a sentence each: its own messages are many lines, most of them on DALI's source."""

from __future__ import annotations

import itertools
import re
import traceback

from fastanchor.data.files import reason
from fastanchor.data.geometry import Job
from fastanchor.errors import UserError

FAILURES = (RuntimeError, MemoryError)  # what DALI's own errors arrive as
# As DALI, CUDA and the decoders below them say it.
NO_MEMORY = re.compile(
    r"bad_alloc|(out of|insufficient) memory|allocation failed|(can't|cannot|could not|failed to) allocate"
    r"|MemoryAllocation|ALLOCATOR_FAILURE",
    re.IGNORECASE,
)


def let_go(error: BaseException | None) -> None:
    """Clear the frames that have ended with an error: DALI's own hold the pipeline, and its threads end when nobody does."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def said(error: Exception) -> str:
    """What DALI says went wrong, on one line: of its many, not those on where the pipeline was defined or on its own source."""
    lines = (line.strip() for line in str(error).rpartition("encountered:")[2].splitlines())
    telling = (line for line in lines if line and line != "Critical error in pipeline:")
    ends = ("C++ context", "Stacktrace", "Current pipeline object")
    return " ".join(itertools.takewhile(lambda line: not line.startswith(ends), telling)) or reason(error)


def lacks_memory(error: Exception) -> bool:
    """Whether it failed for want of memory, the host's or the GPU's."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(said(error)))


def explained(error: Exception, job: Job) -> UserError:
    """DALI's failure at a batch, in a sentence."""
    batch = f"a batch of {len(job.indices)} images"
    if lacks_memory(error):
        return UserError(
            f"data.backend = dali: DALI does not get the memory for {batch} ({said(error)}); a smaller batch_size needs less, "
            "so does data.decoder = cpu where a GPU decodes, and the backends resident and torch do without DALI"
        )
    return UserError(f"data.backend = dali: DALI fails at {batch} ({said(error)}); the backends resident and torch do without it")
