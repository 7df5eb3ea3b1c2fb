"""What `fastanchor bench-data` feeds: the views of every image, and a training step, cut down to size on a CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection

import torch

from fastanchor.config import Config
from fastanchor.data.sources import ImageSet
from fastanchor.errors import UserError
from fastanchor.methods import build_method, method_class
from fastanchor.models import RobustClassifier
from fastanchor.train.optim import WeightAverage, build_optimizer, set_learning_rate
from fastanchor.train.run import model_from_config
from fastanchor.train.stages import stage_method
from fastanchor.train.step import TrainStep
from fastanchor.train.throughput import step_cost

# What a step of the usual recipe is cut down to on a CPU, unless said otherwise: half a second or so on two cores.
CPU_WIDTH, CPU_STEP_FLOPS, CPU_LEAST_BATCH = 16, 25e9, 8


def view_names(config: Config, wanted: int | None) -> tuple[str, ...]:
    """The views that are drawn of every image: those that the method's step takes, and augmented ones up to `wanted`."""
    taken = build_method(config).drawn
    if wanted is not None and not len(taken) <= wanted <= 2:
        raise UserError(f"--views = {wanted}: must be {len(taken)}{' or 2' if len(taken) == 1 else ''}, the recipe's step takes "
                        f"{len(taken)} ({', '.join(taken)})")  # fmt: skip
    return taken if wanted in (None, len(taken)) else (*taken, "aug2")


def cpu_sized(config: Config, given: Collection[str], flops: Callable[[Config], int]) -> tuple[Config, list[str]]:
    """The configuration with a step that a CPU makes in half a second or so, and the flags that say the same.

    given: dotted keys that the user has set, which stay as they are. flops: of a step of a configuration, for one image.
    """
    flags = []
    if not {"model.width", "model.name"} & set(given):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=CPU_WIDTH))
        flags.append(f"--model.width {CPU_WIDTH}")
    if "batch_size" not in given:
        fits = CPU_STEP_FLOPS / flops(config)
        batch = min(config.batch_size, max(CPU_LEAST_BATCH, 2 ** int(math.log2(max(fits, 1)))))
        config = dataclasses.replace(config, batch_size=batch)
        flags.append(f"--batch-size {batch}")
    return config, flags


def network(config: Config, classes: int) -> RobustClassifier:
    """The configuration's network, anew. By which mean and deviation its images are normalised changes no time."""
    return model_from_config(config, classes, (0.5,) * 3, (0.25,) * 3, method_class(config.method).bn_sets)


def step_flops(config: Config, images: ImageSet) -> int:
    """What a training step needs for one image of the set, in FLOPs."""
    model = network(config, images.num_classes)
    return step_cost(stage_method(config, 1, images, model, torch.device("cpu")), model, images.image_shape).total


def resting_step(config: Config, images: ImageSet, device: torch.device, load: Callable) -> TrainStep:
    """The step of the first stage on a network of its own, to be timed: it does all that it does, and the weights stay.

    A training that diverges would be timed on other numbers than one that does not. load: as of TrainStep. Raises UserError.
    """
    torch.manual_seed(config.seed)
    model = network(config, images.num_classes).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    method = stage_method(config, 1, images, model, device)
    optimizer = build_optimizer(method.trainable(model), config.optim)
    set_learning_rate(optimizer, 0.0)
    average = WeightAverage(model, config.optim.ema_decay) if config.optim.ema_decay > 0 else None
    step = TrainStep(config, method, model, optimizer, average, device, load)
    step.reset({"augment": config.seed, "attack": config.seed + 1})
    return step
