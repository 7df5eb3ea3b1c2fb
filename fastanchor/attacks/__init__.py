"""Attacks on any module that maps images in [0, 1] to logits."""

from fastanchor.attacks.pgd import PGD

__all__ = ["PGD"]
