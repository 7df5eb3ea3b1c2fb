"""Optimiser, learning-rate schedules and the moving average of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from fastanchor.config import OptimConfig


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.SGD:
    """SGD, in torch's fused implementation (one kernel a step; it exists for CPU and CUDA)."""
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: OptimConfig, epoch: float, epochs: int) -> float:
    """The learning rate after `epoch` (fractional) of `epochs` epochs.

    step: lr * decay^(milestones passed); cosine: lr * (1 + cos(pi * epoch / epochs)) / 2; cyclic: a triangle with its peak
    lr at peak * epochs and 0 at both ends (Wong et al. 2020). step and cosine rise linearly over warmup_epochs.
    """
    if config.schedule == "cyclic":
        top = config.peak * epochs
        return config.lr * (epoch / top if epoch < top else max(0.0, (epochs - epoch) / (epochs - top)))
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * min(1.0, epoch / epochs))) / 2
    return config.lr * config.decay ** sum(epoch >= milestone for milestone in config.milestones)


class WeightAverage:
    """Exponential moving average of a model's parameters and floating buffers, w_avg <- d * w_avg + (1 - d) * w.

    The decay d rises as min(decay, (1 + t) / (10 + t)) over the steps t, so that the first, random weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards the model's weights."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        ours, theirs = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[n] for n in floating], [theirs[n] for n in floating], 1 - decay)
        for name in ours.keys() - set(floating):
            ours[name].copy_(theirs[name])
