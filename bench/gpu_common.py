"""What the parts of the GPU run share: its sizes, the time left, which rates follow from milliseconds, what needs a GPU."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field

import torch
from fastanchor.kernels import usable

from bench.results import Results

NEEDS_CUDA = "needs a CUDA device"
CIFAR_IMAGES = 50_000


@dataclass
class Bench:
    """One run. batches: in order of worth. deadline: of the present part, on time.perf_counter().

    peer_paths: clones of other people's repositories, each "DIR" or "NAME=DIR".
    """

    results: Results
    device: torch.device
    batches: list[int]
    quick: bool
    compile: bool
    cudnn_benchmark: bool
    data: str
    ceiling: float = float("nan")
    deadline: float = float("inf")
    peer_paths: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        return 4 if self.quick else 64

    @property
    def pixels(self) -> int:
        return 16 if self.quick else 32

    @property
    def steps(self) -> int:
        """PGD steps."""
        return 2 if self.quick else 10

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 5

    @property
    def fill(self) -> float:
        """Seconds that a turn of a call should last."""
        return 0.0 if self.quick else 0.06

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds left for this part."""
        return self.deadline - time.perf_counter()

    def no_compile(self, seconds: float) -> str | None:
        """Why nothing is begun that the compiler needs this long for; None where it is."""
        if not self.compile:
            return "compiling was switched off"
        return f"{self.left():.0f} s were left" if self.left() < seconds else None

    def no_kernels(self) -> str | None:
        """Why Triton's kernels do not run here; None where they do."""
        runs, why = usable(self.device)
        if runs:
            return None
        return why if self.cuda else NEEDS_CUDA

    def rates(self, flops: float, images: int, ms: float) -> dict[str, float]:
        """flops: that the algorithm needs for one image, whatever was done."""
        per_second = images / ms * 1e3
        return {
            "images_per_s": per_second,
            "model_tflops": flops * per_second / 1e12,
            "share_of_bf16_matmul": flops * per_second / self.ceiling,
        }

    def tidy(self) -> None:
        """Give back what the last entry held."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
