"""Out of memory: which batch size would have fitted, found by trial; and a fault of torch's that writes beyond it."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fastanchor.errors import UserError
from fastanchor.train.step import TrainStep

# See check_narrow_convolutions.
NARROW, WIDE = 16, 48


def check_narrow_convolutions(model: nn.Module, image_shape: tuple[int, int], device: torch.device) -> None:
    """UserError for a channels-last network whose weight gradients torch computes on a CPU beyond their memory.

    Seen with torch 2.13: 1x1 convolutions of stride 2 with fewer than 16 input channels, on 56 x 56 positions or more (not on 48
    or fewer), crash the process or, worse, do not. Narrow trial networks on photographs meet it, published ones do not.
    """
    if device.type != "cpu":
        return
    found: list[int] = []

    def look(module: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        strided = module.kernel_size == (1, 1) and max(module.stride) > 1
        if strided and module.in_channels < NARROW and max(inputs[0].shape[2:]) > WIDE:
            found.append(module.in_channels)

    twin = copy.deepcopy(model).to("meta").eval()
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    twin(torch.empty(1, 3, *image_shape, device="meta"))
    if found:
        raise UserError(
            f"channels_last = True: on a CPU torch's gradient of 1x1 convolutions of {min(found)} channels is broken at "
            f"{max(image_shape)} pixels; add --no-channels-last, or take a model.width of {NARROW} or more"
        )


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
