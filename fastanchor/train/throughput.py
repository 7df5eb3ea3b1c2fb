"""How fast a training runs: what the algorithm needs for one image in FLOPs, and the meter that turns seconds into rates.

A FLOP counts because the algorithm needs it, not because it was done: work that is wasted lowers the share of the ceiling.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastanchor.attacks.objectives import uses_clean
from fastanchor.ceilings import matmul_rate
from fastanchor.methods import Adversary, Method
from fastanchor.models import RobustClassifier, mac_count


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a training step per image of the data set: of its attack, and of the forward and backward of its views."""

    attack: int
    training: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.attack + self.training

    def perturbed(self) -> StepCost:
        """That of a step that perturbs the weights: its views are forwarded, and the loss goes back through them, twice."""
        return StepCost(self.attack, 2 * self.training)


def step_cost(method: Method, model: RobustClassifier, image_size: tuple[int, int]) -> StepCost:
    """FLOPs that `method` needs to train `model` on one image of (H, W) pixels.

    With F = 2 * multiply-adds of a forward (`mac_count`: convolutions and matrix products):
        attack = F * (2 * steps + 1 for an objective that compares with the clean images)   each step: forward, input gradient
        training = 3 F * views                                                 forward, gradients of activations and weights
    and training = F * views where the backbone is frozen (stage 2).
    PGD-10 training of ResNet-18 on 32 x 32 pixels: F = 1.111, in all 25.5 GFLOP. F holds the projection where it is used.
    Neglected: that training needs no input gradient of the first layer (0.3 % of F), a lone classifier's gradients, BatchNorm,
    activations, the contrastive loss and the update.
    """
    channels = model.normalize.mean.shape[1]

    def forward(network: nn.Module, **options: bool) -> int:
        return 2 * mac_count(_Corner(network, image_size, options), max(image_size), channels)

    made = sum(
        _attack_forwards(adversary) * adversary.images * forward(adversary.model)
        for adversary in method.adversaries(model, torch.zeros(())).values()
    )
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    forwards = 3 if any(id(parameter) in backbone for parameter in method.trainable(model)) else 1
    return StepCost(made, forwards * len(method.views) * forward(model, embed=method.embeds))


def _attack_forwards(adversary: Adversary) -> int:
    """What an attack costs, in forwards; of several restarts each is judged by one more."""
    attack = adversary.attack
    judged = attack.restarts if attack.restarts > 1 else 0
    return 2 * attack.steps * attack.restarts + judged + (uses_clean(attack.objective) and not adversary.given)


class _Corner(nn.Module):
    """A network on the (H, W) corner of its input: `mac_count` makes square images."""

    def __init__(self, network: nn.Module, image_size: tuple[int, int], options: dict[str, bool]):
        super().__init__()
        self.network, self.image_size, self.options = network, image_size, options

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        height, width = self.image_size
        return self.network(images[:, :, :height, :width], **self.options)


class Throughput:
    """Rates, memory and time to the first step of one `train()` call.

    Make it before the model: it measures the device's bf16 matmul rate (`ceilings`; half a second on a GPU, less on a CPU, once a
    process), which takes memory for that long. started: time.perf_counter() at the beginning of the run.
    """

    def __init__(self, device: torch.device, started: float):
        self.device, self.started = device, started
        self.ceiling = matmul_rate(device, torch.bfloat16)
        self._stepped = False
        self._once: dict[str, float] = {}
        if device.type == "cuda":
            # Once only, never by epoch: a captured graph's memory is counted while it is captured, not when it is replayed.
            torch.cuda.reset_peak_memory_stats(device)

    def step_done(self) -> None:
        """To be called after every training step. The first one is waited for; after the others nothing is done."""
        if self._stepped:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._stepped = True
        self._once = {"first_step_s": time.perf_counter() - self.started}

    def epoch(self, images: int, seconds: float, cost: StepCost) -> dict[str, float]:
        """Metrics of an epoch that trained on `images` images in `seconds`, validation apart; seconds must end with a host read.

        images_per_s: images of the data set, whatever the number of views. tflops: `cost` in 10^12 FLOP/s, and
        share_of_bf16_matmul its share (1 is all) of the ceiling; above 1 where a processor has no bf16 instructions, say.
        peak_memory_mb: 10^6 bytes, since the run began; of all tensors on a GPU (validation's too), of the process on a CPU.
        first_step_s: seconds from the run's beginning to the end of its first step, in that step's epoch only.
        """
        rate = cost.total * images / seconds
        row = {
            "images_per_s": images / seconds,
            "tflops": rate / 1e12,
            "share_of_bf16_matmul": rate / self.ceiling,
            "peak_memory_mb": _peak_memory(self.device) / 1e6,
            **self._once,
        }
        self._once = {}
        return row


def _peak_memory(device: torch.device) -> int:
    """Bytes at most in use since the run began: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
