"""Losses: modules with pytorch-metric-learning's argument order, `loss(embeddings, labels)`, and functions of logits."""

from fastanchor.losses.ascl import ASCLLoss
from fastanchor.losses.hard_supcon import HardSupConLoss, SupConLoss
from fastanchor.losses.mart import mart_loss
from fastanchor.losses.trades import trades_loss

__all__ = ["ASCLLoss", "HardSupConLoss", "SupConLoss", "mart_loss", "trades_loss"]
