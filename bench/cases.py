"""What the benchmarks run on: a ResNet-18 whose running statistics have settled, batches of random images, configured steps."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import naive
from fastanchor.config import Config
from fastanchor.data import views
from fastanchor.methods import build_method
from fastanchor.models import RobustClassifier, build_model
from fastanchor.train.optim import WeightAverage, build_optimizer
from fastanchor.train.step import TrainStep, as_given

EPS, STEP_SIZE = 8 / 255, 2 / 255
CLASSES = 10
TEMPERATURE, BETA = 0.1, 2.0
# Small enough that a network learning random labels stays finite for as long as it is timed.
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
# Weight of the contrastive loss: 0 is PGD adversarial training, 0.5 the recipe of ANCHOR.
METHODS = {"PGD-AT": 0.0, "ANCHOR": 0.5}


@functools.cache
def _settled(width: int) -> RobustClassifier:
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=CLASSES, width=width, mean=(0.5,) * 3, std=(0.25,) * 3).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(32, 3, 16, 16, generator=generator))
    return model.eval()


def make_model(width: int, device: torch.device, *, channels_last: bool = True) -> RobustClassifier:
    """A new copy of one seeded ResNet-18 in eval mode."""
    model = copy.deepcopy(_settled(width)).to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def make_batch(batch: int, pixels: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images, uint8 (batch, pixels, pixels, 3), and labels; never zeros, on which a GPU runs faster."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (batch, pixels, pixels, 3), dtype=torch.uint8, generator=generator)
    return images.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device)


def make_noise(images: Tensor, eps: float = EPS) -> Tensor:
    """Start noise like the images, uniform in the ball; always the same."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) * (2 * eps) - eps
    return torch.empty_like(images).copy_(noise)


def make_config(
    hsc: float, steps: int, *, precision: str = "fp32", channels_last: bool = True, backend: str = "auto", graph: str = "off",
    compile: bool = False, kernels: str = "auto", ema_decay: float = 0.0, eps: float = EPS,
) -> Config:  # fmt: skip
    """Stage 1 of ANCHOR, or of PGD-AT with hsc = 0, with the engine's settings as given."""
    base = Config()
    return dataclasses.replace(
        base,
        attack=dataclasses.replace(base.attack, eps=eps, step_size=eps / 4, steps=steps, backend=backend),
        loss=dataclasses.replace(base.loss, hsc=hsc, temperature=TEMPERATURE, beta=BETA, beta_warmup_epochs=0.0),
        optim=dataclasses.replace(
            base.optim, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, ema_decay=ema_decay, milestones=(100.0,)
        ),
        engine=dataclasses.replace(base.engine, graph=graph, compile=compile, kernels=kernels),
        precision=precision,
        channels_last=channels_last,
    )


def make_step(config: Config, model: nn.Module, device: torch.device, load: Callable = as_given) -> TrainStep:
    """The engine's step on this model (moved in place), its epoch begun."""
    method = build_method(config)
    optimizer = build_optimizer(method.trainable(model), config.optim)
    average = WeightAverage(model, config.optim.ema_decay) if config.optim.ema_decay else None
    step = TrainStep(config, method, model, optimizer, average, device, load)
    step.reset({"augment": 0, "attack": 1})
    return step


def make_naive_attack(
    model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, steps: int, *, bf16: bool = False
) -> Callable[[], Tensor]:
    """The naive attack alone, as it stands in a training step: the gradients of the weights begin anew with each call."""

    def call() -> Tensor:
        model.zero_grad()  # in a training step the optimiser's, once a step
        return naive.attack(model, images, labels, start, eps=EPS, step_size=STEP_SIZE, steps=steps, bf16=bf16)

    return call


def make_naive_step(
    width: int, device: torch.device, hsc: float, steps: int, *, second_rung: bool = False, weight_gradients: bool = True
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """The naive step on a model of its own: (images uint8, labels) -> loss terms. It augments as the engine's step does.

    second_rung: bf16 autocast and channels-last; cudnn.benchmark, its third part, is a setting of the whole process.
    weight_gradients: as in `naive.attack`.
    """
    model = make_model(width, device, channels_last=second_rung)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator(device).manual_seed(0)

    def step(images_u8: Tensor, labels: Tensor) -> dict[str, Tensor]:
        images = views.augment(images_u8, "crop_flip", generator)
        return naive.train_step(
            model, optimizer, images if second_rung else images.contiguous(), labels, eps=EPS, step_size=STEP_SIZE, steps=steps,
            hsc=hsc, temperature=TEMPERATURE, beta=BETA, bf16=second_rung, weight_gradients=weight_gradients,
        )  # fmt: skip

    return step
