"""A seed of the speedrun: what is made ready before the clock, what runs on it, and the judgement after it.

The training is that of `fastanchor train`, to the bit on the same CPU build, without its validation, its files and its reads of
the device: those of its parts that a speedrun needs, in the same order, with the same seeds. bench/speedruns/README.md has the
rules that this file keeps.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastanchor.config import Config
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split, channel_stats
from fastanchor.errors import UserError
from fastanchor.evaluate.accuracy import measure
from fastanchor.evaluate.autoattack import autoattack
from fastanchor.evaluate.protocol import AttackSpec
from fastanchor.methods import build_method
from fastanchor.train.loop import cudnn_benchmark, derive_seed
from fastanchor.train.optim import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    load_optimizer,
    set_learning_rate,
    state_tensors,
)
from fastanchor.train.run import model_from_config
from fastanchor.train.step import TrainStep
from fastanchor.train.throughput import step_cost

STAGE = 1  # the training loop's number of the one stage that a speedrun has: its seeds are derived from it
JUDGE_SEED = 0  # of the judging attack's start noise, as `fastanchor eval` has it


def now(device: torch.device) -> float:
    """Seconds on the host's clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Rig:
    """One process's training, made ready on random images of the given count and size: `preparation_s` says how long it took.

    What is slow once lies behind it then: kernels compiled and checked, cuDNN's algorithms chosen, the step captured as a graph.
    A graph knows addresses, so every seed trains in the same memory; `wipe` spoils all values in it before each clock.
    """

    def __init__(self, config: Config, num_classes: int, count: int, image_size: tuple[int, int], device: torch.device):
        started = now(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.config, self.num_classes, self.device = config, num_classes, device
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, *image_size, 3), dtype=torch.uint8, generator=generator)
        self.data = ResidentSplit(Split(images, torch.randint(num_classes, (count,), generator=generator)), device)
        self.drop_last = count > config.batch_size
        self.steps = self.data.number_of_batches(config.batch_size, self.drop_last)
        self.images_seen = config.epochs * (self.steps * config.batch_size if self.drop_last else count)
        method = build_method(config, STAGE)
        self.model = self._draw(*channel_stats(images)).to(device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(method.trainable(self.model), config.optim)
        self._new_optimizer = copy.deepcopy(self.optimizer.state_dict())
        self.average = WeightAverage(self.model, config.optim.ema_decay) if config.optim.ema_decay > 0 else None
        self.step = TrainStep(config, method, self.model, self.optimizer, self.average, device, self.data.rows)
        self.flops = step_cost(method, self.model, image_size).total * self.images_seen
        with cudnn_benchmark():
            self._try_out()
        self.preparation_s = now(device) - started
        self._peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def _draw(self, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        return model_from_config(self.config, self.num_classes, mean, std)

    def _try_out(self) -> None:
        """The first step compiles and captures, the second one is like all that follow. At rate 0: nothing can diverge."""
        self.step.reset({"augment": 0, "attack": 0})
        for _ in range(2):
            order = torch.Generator().manual_seed(0)
            indices = next(iter(self.data.shuffled(self.config.batch_size, generator=order, drop_last=self.drop_last)))
            set_learning_rate(self.optimizer, 0.0)
            self.step(indices, progress=0.0)
        self.step.read()

    @torch.no_grad()
    def wipe(self) -> None:
        """Spoil every value that a training works on: NaN, and 1 where the numbers are whole. What is not set anew is seen."""
        held: list[Tensor] = [*self.model.parameters(), *self.model.buffers(), *state_tensors(self.optimizer)]
        held += [] if self.average is None else self.average.tensors()
        held += [self.data.images, self.data.labels, self.step.progress, *self.step.sums.values()]
        for tensor in held:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    def timed(self, seed: int, images: Split) -> tuple[nn.Module, float]:
        """Train from `seed` on `images`, in host memory: the network to judge, which the next call spoils, and its seconds."""
        if images.images.shape != self.data.images.shape or images.images.dtype != torch.uint8:
            raise ValueError(f"the images are {tuple(images.images.shape)}, the rig was made for {tuple(self.data.images.shape)}")
        self.wipe()
        gc.collect()  # what earlier seeds left is not cleared away on this one's clock
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with cudnn_benchmark():
            started = now(self.device)
            model = self._train(seed, images)
            seconds = now(self.device) - started
        if self._peak is not None:
            # A captured graph's memory counts while it is captured, in the preparation, and not when it is replayed.
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self.device))
        return model, seconds

    def _train(self, seed: int, images: Split) -> nn.Module:
        """All that is on the clock, in the order of the training loop."""
        config = self.config
        with torch.no_grad():
            self.data.images.copy_(images.images)
            self.data.labels.copy_(images.labels)
        mean, std = channel_stats(self.data.images)
        torch.manual_seed(derive_seed(seed, "weights"))
        self.model.load_state_dict(self._draw(mean, std).state_dict())
        load_optimizer(self.optimizer, self._new_optimizer)
        if self.average is not None:
            self.average.model.load_state_dict(self.model.state_dict())
            self.average.steps = 0
        for epoch in range(1, config.epochs + 1):
            seeds = {name: derive_seed(seed, STAGE, epoch, name) for name in ("order", "augment", "attack", "other")}
            self.step.reset(seeds)
            torch.manual_seed(seeds["other"])
            order = torch.Generator().manual_seed(seeds["order"])
            batches = self.data.shuffled(config.batch_size, generator=order, drop_last=self.drop_last)
            for i, indices in enumerate(batches):
                progress = epoch - 1 + (i + 0.5) / self.steps
                set_learning_rate(self.optimizer, learning_rate(config.optim, progress, config.epochs))
                # No look at the loss: a training that diverges takes as long as any other, and is found out when judged.
                self.step(indices, progress=progress)
        return self.model if self.average is None else self.average.model

    @property
    def peak_memory_mb(self) -> float | None:
        """10^6 bytes of all tensors at most in the preparation and on the clocks so far; None on a CPU."""
        return None if self._peak is None else self._peak / 1e6


def judge(
    model: nn.Module, test: Split, attack: AttackSpec, *, num_classes: int, batch_size: int, device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """`clean` and `robust` accuracy in percent of all test images, in fp32, and `judgement_s`; 0 for a network that diverged.

    `failed` says why in that case; AutoAttack adds the accuracy after each of its `stages`.
    """
    started = now(device)
    found: dict[str, Any] = {"clean": 0.0, "robust": 0.0}
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        return found | {"judgement_s": now(device) - started, "failed": "the training diverged: its weights are not finite"}
    data = ResidentSplit(test, device)
    try:
        found["clean"] = measure(model, data, num_classes=num_classes, batch_size=batch_size).accuracy
    except UserError as error:
        return found | {"judgement_s": now(device) - started, "failed": str(error)}
    options: dict[str, Any] = {"num_classes": num_classes, "batch_size": batch_size, "seed": JUDGE_SEED}
    if attack.name == "autoattack":
        score, more = autoattack(model, data, attack, progress=say, **options)
        found |= {"stages": more["stages"]}
    else:
        score = measure(model, data, attack, **options)
    return found | {"robust": score.accuracy, "judgement_s": now(device) - started}
