"""Triton kernels of fastanchor, installed as `fastanchor.kernels`; imports nothing else of the package.

`usable` says whether kernels can run on a device, and why not where they cannot.
"""

from __future__ import annotations

import importlib.util

import torch

OLDEST_CAPABILITY = (8, 0)


def usable(device: torch.device) -> tuple[bool, str]:
    """Whether Triton kernels run on `device`, with the reason in words."""
    if device.type != "cuda":
        return False, f"Triton kernels need a CUDA device, this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return False, f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
    return True, f"triton on compute capability {capability[0]}.{capability[1]}"
