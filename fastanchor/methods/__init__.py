"""Training methods: one short file each, on one engine."""

from fastanchor.config import Config
from fastanchor.methods.anchor import Anchor, LinearStage
from fastanchor.methods.base import Method, Outputs
from fastanchor.methods.standard import Standard

METHODS = {"anchor": Anchor, "standard": Standard}


def build_method(config: Config, stage: int = 1) -> Method:
    """The method of a configuration; stage 2 is the linear classifier on the frozen backbone."""
    return METHODS[config.method](config) if stage == 1 else LinearStage(config)


__all__ = ["METHODS", "Method", "Outputs", "build_method"]
