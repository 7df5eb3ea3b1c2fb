"""What the stages of a training are made of: their settings, their images, and the order of these in an epoch."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastanchor.config import Config
from fastanchor.data.encoded import Encoded
from fastanchor.data.extra import Mixed
from fastanchor.data.order import epoch_order
from fastanchor.data.sources import ImageSet, Split
from fastanchor.errors import UserError
from fastanchor.methods import Method, build_method


def train_set(images: ImageSet) -> Split | Encoded | Mixed:
    """What a training's batches are taken from: the training images, and with them the extra ones."""
    return images.train if images.extra is None else Mixed(images.train, images.extra)


def stages(config: Config) -> tuple[int, ...]:
    """The numbers of a training's stages."""
    return (1,) if config.stage2.mode == "none" else (1, 2)


def stage_method(config: Config, number: int, images: ImageSet, model: nn.Module, device: torch.device) -> Method:
    """The method of a stage, with all that it brings besides the model, on the device.

    Its heads are drawn from torch's global generator. Raises UserError.
    """
    method = build_method(config, number)
    method.prepare(images, device)
    heads = method.build(model)
    method.heads = None if heads is None else heads.to(device)
    return method


def epoch_indices(config: Config, images: ImageSet, seed: int) -> torch.Tensor:
    """An epoch's indices; the number of them does not depend on the seed."""
    data, labels = config.data, images.train.labels
    return epoch_order(
        labels, batch_size=config.batch_size, generator=torch.Generator().manual_seed(seed),
        drop_last=len(labels) > config.batch_size, sampler=data.sampler, per_class=data.per_class,
        extra=0 if images.extra is None else len(images.extra), extra_share=data.extra_share,
    )  # fmt: skip


def check_order(config: Config, images: ImageSet) -> None:
    """Sampler and extra images go together with the batch sizes of all stages. Raises UserError, before a run's folder exists."""
    for number in stages(config):
        try:
            epoch_indices(stage_config(config, number), images, seed=0)
        except UserError as error:
            raise (UserError(f"stage 2: {error}") if number == 2 else error) from None


def check_methods(config: Config, images: ImageSet, device: torch.device) -> None:
    """What the stages' methods need besides the images is there and fits them. Raises UserError, before a run's folder exists."""
    for number in stages(config):
        build_method(stage_config(config, number), number).prepare(images, device)


def stage_config(config: Config, number: int) -> Config:
    """The configuration as a stage sees it: stage 2 has its own schedule and batch size, and neither weight average nor AWP."""
    if number == 1:
        return config
    second = config.stage2
    optim = dataclasses.replace(
        config.optim, name="sgd", backend="auto", lr=second.lr, schedule="step", milestones=second.milestones, decay=second.decay,
        weight_decay=second.weight_decay, warmup_epochs=0.0, ema_decay=0.0, awp_gamma=0.0, nesterov=False,
    )  # fmt: skip
    return dataclasses.replace(config, optim=optim, batch_size=second.batch_size, epochs=second.epochs)
