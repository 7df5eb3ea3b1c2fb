"""NVIDIA apex's fused optimisers, where a real apex is installed; nothing of it is imported before it is asked for.

The name belongs to an unrelated package on PyPI, so what is there is looked at before it is run.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from fastanchor.config import OptimConfig
from fastanchor.errors import UserError
from fastanchor.train.layerwise import layer_groups

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation . (with the nvcc of torch's CUDA version)"
)


def find_apex() -> tuple[bool, str]:
    """(True, its folder) where NVIDIA apex with its CUDA extension is installed, else (False, one sentence: what is wrong).

    Executes nothing of the package.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None or spec.origin is None:  # without an origin: merely a folder of that name, such as a checkout
        return False, f"NVIDIA apex is not installed; build it: {BUILD}"
    root = Path(spec.origin).parent
    if not ((root / "optimizers" / "fused_sgd.py").is_file() and (root / "multi_tensor_apply").is_dir()):
        return False, (
            f"{spec.origin} is not NVIDIA apex but an unrelated package of that name (PyPI's is a Pyramid toolkit); "
            f"pip uninstall apex, then build NVIDIA's: {BUILD}"
        )
    if importlib.util.find_spec("amp_C") is None:
        return False, f"NVIDIA apex in {root} was built without its CUDA extension amp_C; build it with it: {BUILD}"
    return True, str(root)


def build_apex(name: str, parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """apex's FusedSGD (name "sgd") or FusedLAMB ("lamb"), with state that exists from the start; CUDA parameters only.

    Their kernels take the learning rate, and LAMB's its step count, as numbers of the host: a CUDA graph cannot hold them.
    FusedLAMB's own clipping of the gradient is off, and like our LAMB it leaves biases and normalisation alone.
    Raises UserError where apex is missing, does not load, or cannot do what the settings say.
    """
    if name == "lamb" and config.weight_decay == 0:
        raise UserError("optim.backend = apex: its FusedLAMB scales no layer where optim.weight_decay = 0; use torch")
    found, what = find_apex()
    if not found:
        raise UserError(f"optim.backend = apex: {what}")
    try:
        from apex import optimizers
    except Exception as error:  # an extension built against another torch fails in many ways
        reason = str(error).split("\n")[0]
        raise UserError(f"optim.backend = apex: the apex in {what} does not load ({reason}); rebuild it: {BUILD}") from error
    if name == "sgd":
        optimizer = _with_torch_zero_grad(optimizers.FusedSGD)(
            list(parameters),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    else:
        groups = layer_groups(parameters, config.weight_decay)
        optimizer = _with_torch_zero_grad(optimizers.FusedLAMB)(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, max_grad_norm=math.inf
        )
    for group in optimizer.param_groups:
        if name == "lamb":
            group["step"] = 0
        for p in group["params"]:
            names = ("momentum_buffer",) if name == "sgd" else ("exp_avg", "exp_avg_sq")
            optimizer.state[p].update({key: torch.zeros_like(p) for key in names})
    return optimizer


def _with_torch_zero_grad(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """`base` with torch's zero_grad(set_to_none): apex's takes no argument."""
    return type(base.__name__, (base,), {"zero_grad": torch.optim.Optimizer.zero_grad})
