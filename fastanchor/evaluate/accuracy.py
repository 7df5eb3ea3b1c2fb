"""Clean and robust accuracy, in fp32 with TF32 off.

An image counts as robust only if the fp32 model classifies it correctly under every restart of the attack, and correctly clean.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastanchor.attacks import PGD
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.views import to_float
from fastanchor.errors import UserError
from fastanchor.evaluate.protocol import AttackSpec
from fastanchor.precision import full_precision


@dataclass(frozen=True)
class Score:
    """Accuracy in percent of `count` images, overall and by class (None: no image of it), and which images were correct."""

    accuracy: float
    per_class: list[float | None]
    count: int
    seconds: float
    correct: Tensor


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()`, and every module's own flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def measure(model: nn.Module, data: ResidentSplit, attack: AttackSpec | None = None, *, batch_size: int = 500, seed: int = 0,
            num_classes: int, built: PGD | None = None) -> Score:  # fmt: skip
    """Accuracy on `data`, clean (attack None) or under a PGD-family attack, whose start noise is drawn from `seed`.

    built: `attack.build()` of an earlier call, which keeps what it prepared for the model.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    perturb = built or (attack.build() if attack else None)
    verdicts, labels_seen = [], []
    with full_precision(), eval_mode(model):
        for _, images_u8, labels in data.epoch(batch_size, generator=None, drop_last=False):
            images = to_float(images_u8)
            correct = _correct(model, images, labels, must_be_finite=True)
            if perturb is not None:
                # A restart that fools the model is enough: each is judged by itself, not only the one of highest loss.
                for _ in range(attack.restarts):
                    correct &= _correct(model, perturb(model, images, labels, generator=generator), labels)
            verdicts.append(correct)
            labels_seen.append(labels)
    # To the host first: only then is the device's work done and the time right.
    correct, labels = torch.cat(verdicts).cpu(), torch.cat(labels_seen).cpu()
    return score(correct, labels, num_classes, time.perf_counter() - started)


def score(correct: Tensor, labels: Tensor, num_classes: int, seconds: float) -> Score:
    """Sum up verdicts (N,) bool for images of labels (N,)."""
    correct, labels = correct.cpu(), labels.cpu()
    return Score(
        accuracy=100 * correct.double().mean().item(),
        per_class=[_percent(correct[labels == c]) for c in range(num_classes)],
        count=len(correct),
        seconds=seconds,
        correct=correct,
    )


def _correct(model: nn.Module, images: Tensor, labels: Tensor, must_be_finite: bool = False) -> Tensor:
    """Which images are classified correctly; logits that are not finite never are. Raises UserError for them where asked to."""
    with torch.no_grad():
        logits = model(images)
    finite = logits.isfinite().all(1)
    if must_be_finite and not finite.all():
        raise UserError("the model's logits on clean images are not all finite: there is nothing to judge")
    return (logits.argmax(1) == labels) & finite


def _percent(correct: Tensor) -> float | None:
    return 100 * correct.double().mean().item() if len(correct) else None
