"""One ANCHOR training step as a specification: attack, one forward over the views, loss, backward, SGD.

Eager, full precision of the model's dtype (fp64 included), no switches. The engine's step is tested against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.reference import attacks, objectives
from fastanchor.reference.hard_supcon import hard_supcon


def anchor_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, augmented: Tensor, labels: Tensor, start: Tensor, *, eps: float,
    step_size: float, steps: int, hsc: float, temperature: float, beta: float, ce_adv: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """L = ce_adv * CE(f(x_adv), y) + hsc * L_HSC([z_aug; z_adv], [y; y]), then one optimiser step; returns the terms.

    augmented (B, C, H, W) in [0, 1], labels (B,) int64, start: the attack's start noise. x_adv maximises the cross-entropy from
    `augmented` with the model in eval mode. With hsc = 0 the step is PGD adversarial training: only x_adv is forwarded.
    """
    model.eval()
    adversarial = attacks.pgd(
        model, augmented, labels, eps=eps, step_size=step_size, steps=steps, objective=objectives.cross_entropy, start=start
    )
    model.train()
    if hsc > 0:
        logits, embeddings = model(torch.cat([augmented, adversarial]), embed=True)
        terms = {
            "ce_adv": ce_adv * F.cross_entropy(logits[len(labels) :], labels),
            "hsc": hsc * hard_supcon(embeddings, labels.repeat(2), temperature=temperature, beta=beta),
        }
    else:
        terms = {"ce_adv": ce_adv * F.cross_entropy(model(adversarial), labels)}
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    return {name: term.detach() for name, term in terms.items()}
