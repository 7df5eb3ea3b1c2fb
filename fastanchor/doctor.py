"""`fastanchor doctor`: versions, devices, what is installed, and which backend each part will use and why."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch

from fastanchor import environment
from fastanchor.data.dali import find_dali
from fastanchor.ops import folding, images
from fastanchor.ops.supcon import serves
from fastanchor.ops.verified import SWITCH
from fastanchor.train.apex import find_apex

# Optional packages: (package, what it is for, how to get it).
OPTIONAL = (
    ("pyautoattack", "standard AutoAttack", 'pip install "fastanchor[eval]"'),
    ("matplotlib", "the report's figures", 'pip install "fastanchor[plots]"'),
    ("tensorboard", "TensorBoard events", 'pip install "fastanchor[tensorboard]"'),
    ("torchvision", "downloading CIFAR archives", 'pip install "fastanchor[vision]"'),
    ("nvidia.dali", "image files and sets that do not fit the device", 'pip install "fastanchor[dali]", CUDA 13: [dali-cuda13]'),
)


def diagnose() -> dict:
    """Everything the command prints, as plain values."""
    device = environment.pick_device("auto")
    return {
        **environment.describe(device),
        "devices": _devices(),
        "optional": [{"package": name, "use": use, "installed": _installed(name), "get": get} for name, use, get in OPTIONAL],
        "backends": backends(device),
    }


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is a part of
        return False


def backends(device: torch.device) -> list[dict[str, str]]:
    """Which implementation each part will use on the device, with the reason."""
    # As in training: beta warms up on the device.
    supcon, supcon_why = serves(torch.empty(1, 128, device=device), beta=torch.zeros((), device=device))
    bf16, bf16_reason = _bf16(device)
    _, apex = find_apex()
    dali, dali_why = find_dali()
    return [
        {
            "part": "data",
            "backend": f"resident, else {'dali' if dali else 'torch'}",
            "why": f"a set that fits is kept on the device as uint8; for files and larger ones: {dali_why}; "
            "`fastanchor bench-data` measures them",
        },
        {
            "part": "attack",
            "backend": "graphed" if device.type == "cuda" else "eager",
            "why": "steps on the BN-folded twin, input gradient only"
            + (", replayed as one CUDA graph" if device.type == "cuda" else "; CUDA graphs need a CUDA device")
            + "; `attack.backend reference` is the plain loop it is tested against",
        },
        {
            "part": "training step",
            "backend": "one CUDA graph" if device.type == "cuda" else "eager",
            "why": "`engine.graph off` and `engine.compile` change it",
        },
        {
            "part": "hard-positive SupCon",
            "backend": "triton" if supcon else "torch",
            "why": f"{supcon_why}; `engine.kernels off` and {SWITCH}=off change it"
            if supcon
            else f"dense reference implementation; {supcon_why}",
        },
        _attack_kernels(device),
        _augmentation(device),
        {
            "part": "optimiser",
            "backend": "torch fused SGD",
            "why": f"one pass over all parameters; `optim.backend apex`: {apex.partition(';')[0]}",
        },
        {"part": "training precision", "backend": "bf16 is worth trying" if bf16 else "fp32", "why": bf16_reason},
        {"part": "evaluation", "backend": "fp32, TF32 off", "why": "always: a robust accuracy is judged in full precision"},
    ]


def _attack_kernels(device: torch.device) -> dict[str, str]:
    """What the usual attack's kernels are replaced by, if anything, and why."""
    asked = {"step": "pgd_step_linf", "cross-entropy": "label_head_ce"}
    found = {part: images.decide(name, "auto", device) for part, name in asked.items()}
    found["folding of BatchNorm"] = folding.trusted("bn_fold", device)
    plain = {part: why for part, (good, why) in found.items() if not good}
    backend = {0: "triton", len(found): "torch"}.get(len(plain), f"triton, but torch for the {' and the '.join(plain)}")
    return {
        "part": "attack's kernels",
        "backend": backend,
        "why": f"{', '.join(found)}: " + "; ".join(dict.fromkeys(plain.values() or (why for _, why in found.values()))),
    }


def _augmentation(device: torch.device) -> dict[str, str]:
    good, why = images.decide("augment", "auto", device)
    return {"part": "crop and mirror", "backend": "triton" if good else "torch", "why": why}


def _devices() -> list[str]:
    found = [f"cpu: {environment.device_name(torch.device('cpu'))}, {os.cpu_count()} logical cores, {platform.machine()}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(
            f"cuda:{index}: {properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        )
    return found


def _bf16(device: torch.device) -> tuple[bool, str]:
    """Whether bf16 autocast runs on matrix units here."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return native, "the GPU multiplies bf16 natively" if native else "this GPU has no bf16 tensor cores"
    flags = environment.cpu_flags()
    native = bool({"avx512_bf16", "amx_bf16"} & flags)
    return (
        native,
        "the processor has bf16 instructions (`precision: bf16`)" if native else "the processor has no bf16 instructions",
    )
