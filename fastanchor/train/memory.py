"""Out of memory: find by trial which batch size would have fitted, and say it before the original error."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastanchor.errors import UserError
from fastanchor.train.step import TrainStep


def within_memory(batches: Iterable[tuple[Tensor, ...]], batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches; UserError where the device has no memory left for one that is being made."""
    try:
        yield from batches
    except torch.OutOfMemoryError as error:
        said = f"batch_size = {batch_size}: a batch of images does not fit in the memory of {device}, beside what is there"
        raise UserError(f"{said}; the original error: {' '.join(str(error).split())}") from error


def explain_out_of_memory(error: torch.OutOfMemoryError, step: TrainStep, *batch: Tensor) -> UserError:
    """Try the failed step on half the batch, a quarter, ... and report the first that fits.

    The trials train the network on, so the caller must stop; the checkpoints on disk are untouched.
    """
    # The frames of the failed step still hold its activations; the trials need that memory.
    traceback.clear_frames(error.__traceback__)
    step.without_graph("out of memory")
    given, views = len(batch[0]), len(step.method.views)
    fits = None
    size = given // 2
    while size >= 1 and fits is None:
        step.optimizer.zero_grad(set_to_none=True)
        if step.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            step(*(part[:size] for part in batch), progress=0.0)
            fits = size
        except torch.OutOfMemoryError:
            size //= 2
    names = ", ".join(step.method.views)
    tried = (
        f"batch_size = {given} with {views} view{'s' if views > 1 else ''} ({names}) does not fit in the memory of {step.device}"
    )
    advice = f"batch_size = {fits} fits (tried)" if fits else "not even batch_size = 1 fits"
    return UserError(f"{tried}; {advice}. The original error: {' '.join(str(error).split())}")
