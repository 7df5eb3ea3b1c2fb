"""Image classifiers that take pixels in [0, 1]: backbones, the composed model and its registry."""

from fastanchor.models.classifier import (
    HEADS,
    MODELS,
    Normalize,
    RobustClassifier,
    build_model,
    mac_count,
    parameter_count,
)
from fastanchor.models.resnet import Backbone, BasicBlock, Bottleneck, PreActBlock, preactresnet18, resnet18, resnet50
from fastanchor.models.wideresnet import wide_resnet

__all__ = [
    "HEADS",
    "MODELS",
    "Backbone",
    "BasicBlock",
    "Bottleneck",
    "Normalize",
    "PreActBlock",
    "RobustClassifier",
    "build_model",
    "mac_count",
    "parameter_count",
    "preactresnet18",
    "resnet18",
    "resnet50",
    "wide_resnet",
]
