"""The training step of every packaged recipe for CIFAR-10, on random images: what each method costs on the engine.

Each as its recipe has it (attack, views, heads, BatchNorm sets, optimiser, weight average), all at one batch size and precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import cases
from fastanchor.bench_sizes import resting_step
from fastanchor.config import Config
from fastanchor.data.feeds import feed_spec
from fastanchor.data.resident import ResidentFeed
from fastanchor.data.sources import ImageSet, Split
from fastanchor.methods import METHODS
from fastanchor.settings import load_recipe, parse_flags
from fastanchor.train.throughput import StepCost, step_cost

# PGD-AT is what all others are read against: adversarial training and nothing besides.
BASE = "pgd_at"
# Recipes that reach another cost than their method's own.
MORE = ("fgsm_rs", "nfgsm", "pgd_at_awp", "pgd_at_rice", "trades_awp")
LEFT_OUT = {"clead_code": "its loss needs a trained network as loss.source"}
RECIPES = (BASE, *sorted(name for name in (*METHODS, *MORE) if name != BASE and name not in LEFT_OUT))
# AdvCL's finest clustering has 500 clusters, each of which needs an image.
LEAST_IMAGES = 512


def make_images(batch: int, pixels: int) -> ImageSet:
    """Random images with labels, enough for a batch and for what methods prepare of them."""
    split = Split(*cases.make_batch(max(batch, LEAST_IMAGES), pixels, torch.device("cpu")))
    return ImageSet("random", tuple(map(str, range(cases.CLASSES))), split, split, split)


def make_config(name: str, batch: int, *, precision: str, graph: str = "off", width: int | None = None) -> Config:
    """Stage 1 of a recipe of RECIPES; width: channels of the first stage (None: the published 64)."""
    flags = ["--batch-size", str(batch), "--precision", precision, "--engine.graph", graph]
    flags += [] if width is None else ["--model.width", str(width)]
    config = load_recipe(name)
    # From the first step on: that is what nearly all epochs cost.
    flags += ["--optim.awp-start", "0"] if config.optim.awp_gamma > 0 else []
    return parse_flags(flags, config)


def make_step(config: Config, images: ImageSet, device: torch.device) -> tuple[Callable[[], None], StepCost]:
    """(a call that trains on one batch, what the algorithm needs for one image of it).

    The weights stay, as `resting_step` says.
    """
    step = resting_step(config, images, device, lambda *batch: feed.load(*batch))
    step.method.start_epoch(1, step.model)
    feed = ResidentFeed(images.train, feed_spec(config.data, step.method.drawn, step.method.indexed, device))
    cost = step_cost(step.method, step.model, images.image_shape)
    indices = torch.arange(config.batch_size, device=device)
    return lambda: step(indices, progress=0.0), cost.perturbed() if config.optim.awp_gamma > 0 else cost
