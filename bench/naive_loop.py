"""An epoch as a careful researcher writes it today: what `naive.train_step` leaves out in its own favour is here counted.

It is the loop of `train_fgsm.py` and `train_pgd.py` in locuslab/fast_adversarial and of robust_overfitting's `train_cifar.py`,
written anew: a DataLoader whose two workers transform image by image on the CPU (torchvision's random crop with padding 4 and
mirror), the batch moved to the device, the step, and the loss read back by `.item()` once a step, to be averaged over the epoch.

In its favour: that code also reads the accuracy back, starts its workers anew every epoch (here they stay, see `data_cases`),
and evaluates between epochs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bench import naive


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, *,
    channels_last: bool = False, **numbers,
) -> tuple[float, int]:  # fmt: skip
    """One pass over `batches`: images fp32 (B, C, H, W) in [0, 1], labels (B,), on any device. Returns mean loss and images.

    channels_last: the images' memory format, to be the model's own. numbers: those of `naive.train_step`.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    total, count = 0.0, 0
    for images, labels in batches:
        images = images.to(device, memory_format=memory_format, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        terms = naive.train_step(model, optimizer, images, labels, **numbers)
        total += sum(terms.values()).item() * len(labels)
        count += len(labels)
    return total / count, count
