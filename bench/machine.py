"""The machine that a benchmark ran on: device, versions, settings that decide speed, and ceilings measured in the same run."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Any

import torch

from fastanchor import environment
from fastanchor.ceilings import measure_ceilings


def describe(device: torch.device) -> dict[str, Any]:
    """JSON-ready: `device` (name), `about` (as a run's env.json), processor and GPU, `ceilings` (FLOP/s, B/s)."""
    about = environment.describe(device)
    found = {"device": about["device"], "about": about, "cpu_cores": os.cpu_count(), "processor": platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    ceilings = measure_ceilings(device)
    return found | {
        "threads": torch.get_num_threads(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "fp32_of_convolutions": torch.backends.cudnn.conv.fp32_precision,
        "fp32_of_matmul": torch.backends.cuda.matmul.fp32_precision,
        "bf16_matmul_tflops": ceilings.bf16_matmul / 1e12,
        "fp32_matmul_tflops": ceilings.fp32_matmul / 1e12,
        "copy_gb_per_s": ceilings.copy_bandwidth / 1e9,
        "ceilings": asdict(ceilings),
    }
