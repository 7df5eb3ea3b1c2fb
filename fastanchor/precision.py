"""What fp32 means, the precision in which results are judged, and why fp16 is not offered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastanchor.errors import UserError

NO_FP16 = (
    "without loss scaling, input gradients below fp16's range become 0 and the attack stands still, which passes for robustness; "
    "use bf16 or fp32"
)

_SWITCHES = (
    torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)  # fmt: skip


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 as IEEE has it: no autocast, no TF32 in matrix products and convolutions; the settings are as before afterwards."""
    before = fp32_meaning()
    try:
        for switch in _SWITCHES:
            switch.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for switch, value in zip(_SWITCHES, before, strict=True):
            switch.fp32_precision = value


def fp32_meaning() -> tuple[str, ...]:
    """What fp32 arithmetic stands for at present (IEEE, TF32, ...), a value for each kind of operation."""
    return tuple(switch.fp32_precision for switch in _SWITCHES)


def wrong_dtype(model: nn.Module, dtype: torch.dtype) -> UserError | None:
    """What to raise for a model that failed on images of `dtype`: None where its parameters are of that dtype, too."""
    others = {parameter.dtype for parameter in model.parameters()} - {dtype}
    if not others:
        return None
    return UserError(
        f"the model's parameters are {' and '.join(sorted(map(str, others)))}, and it takes no images of {dtype}: "
        "cast them in its forward, or convert it by model.float()"
    )
