"""What a forward of a model depends on besides the values in its tensors: by it a cache knows that the model is still the same.

Modules, tensors, settings and hooks; a wrapper for parallel training counts as the module that it wraps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module whose forward is the model's: what DistributedDataParallel, or DataParallel on one device, wraps.

    On several devices DataParallel is itself: it spreads the batch over them.
    """
    while isinstance(model, DistributedDataParallel) or (isinstance(model, DataParallel) and len(model.device_ids) < 2):
        model = model.module
    return model


def has_hooks(model: nn.Module) -> bool:
    """Whether a forward of the model calls more than its modules."""
    return any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
               for module in model.modules())  # fmt: skip


def fingerprint(model: nn.Module) -> tuple:
    """All that a forward of the model may depend on besides the values in its tensors: modules, tensors, settings, hooks."""
    # A wrapper's own attributes, counters among them, change from step to step.
    return tuple((type(module), _content(vars(module))) for module in unwrapped(model).modules())


def parts(model: nn.Module) -> Iterator[object]:
    """What a fingerprint knows by its id, to be kept so that no id is used again; without the model itself, which stays free."""
    for module in model.modules():
        if module is not model:
            yield module
        yield from (v for v in vars(module).values() if not isinstance(v, nn.Module) and not hasattr(v, "__self__"))
    yield from model.parameters()
    yield from model.buffers()


def _content(value: object, depth: int = 4) -> object:
    """Settings by value, through containers; tensors by identity and by where `model.to(...)` put them; others by identity."""
    if isinstance(value, Tensor):
        return id(value), value.device, value.dtype
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if depth and isinstance(value, dict):
        return tuple((id(key) if isinstance(key, Tensor) else key, _content(item, depth - 1)) for key, item in value.items())
    if depth and isinstance(value, (list, tuple)):
        return tuple(_content(item, depth - 1) for item in value)
    return (id(value), len(value)) if isinstance(value, (dict, list, tuple, set)) else id(value)
