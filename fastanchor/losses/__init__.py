"""Losses as modules with pytorch-metric-learning's argument order: `loss(embeddings, labels)`."""

from fastanchor.losses.hard_supcon import HardSupConLoss, SupConLoss

__all__ = ["HardSupConLoss", "SupConLoss"]
