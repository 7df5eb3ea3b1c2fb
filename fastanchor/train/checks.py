"""Settings that are each allowed but do not go together, or that a device cannot follow: said before a run's folder exists."""

from __future__ import annotations

import torch

from fastanchor.config import Config
from fastanchor.data.stream import MOST_VIEWS
from fastanchor.errors import UserError
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.methods import build_attack, build_method, method_class
from fastanchor.train.apex import find_apex
from fastanchor.train.optim import check_optimizer


def check_config(config: Config) -> None:
    """Settings that are each allowed but do not go together. Raises UserError."""
    method, objective = method_class(config.method), config.attack.objective
    if not isinstance(config.loss, method.Settings):
        raise UserError(f"method = {config.method}: loss holds another method's settings; use settings.with_method")
    title = method.title or method.__name__
    if method.objectives and objective not in method.objectives:
        raise UserError(f"attack.objective = {objective}: the adversary of {title} maximises {' or '.join(method.objectives)}")
    if method.selects == "last" and config.stage2.mode == "none":
        raise UserError(f"stage2.mode = none: nothing in {title} trains the classifier; write slf, alf or aff")
    method.check(config)
    drawn = build_method(config).drawn
    if len(drawn) > MOST_VIEWS:
        raise UserError(
            f"method = {config.method}: takes {len(drawn)} views of the data ({', '.join(drawn)}): {MOST_VIEWS} at most"
        )
    if not config.attack.project and config.attack.eps == 0:
        raise UserError(
            "attack.eps = 0: bounds nothing where attack.project is false; the method standard trains on clean images"
        )
    try:
        build_attack(config)
    except UserError as error:
        raise UserError(f"attack.{error}") from error  # which begins with the setting's name
    check_optimizer(config.optim)
    if config.engine.compile and config.attack.backend in ("reference", "eager", "graphed"):
        raise UserError(
            f"engine.compile: compiles the attack's step too; attack.backend = {config.attack.backend} contradicts it"
        )
    for name in ("val", "watch"):
        attack = getattr(config, name).attack
        parse_attack(attack, default_eps=config.attack.eps)
        if attack.startswith("autoattack"):
            raise UserError(f"{name}.attack = autoattack: too slow for every epoch; use pgdN or cwN")
    for text in config.eval.attacks:
        parse_attack(text, default_eps=config.attack.eps)


def check_device(config: Config, device: torch.device) -> None:
    """Settings that this device cannot follow, said before a run's folder exists. Raises UserError."""
    for name, value, wanted in (
        ("data.decoder", config.data.decoder, "mixed"),
        ("engine.graph", config.engine.graph, "on"),
        ("attack.backend", config.attack.backend, "graphed"),
        ("optim.backend", config.optim.backend, "apex"),
    ):
        if value == wanted and device.type != "cuda":
            raise UserError(f"{name} = {value}: needs a CUDA device, this is {device}")
    if config.optim.backend == "apex" and not (found := find_apex())[0]:
        raise UserError(f"optim.backend = apex: {found[1]}")
