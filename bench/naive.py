"""The adversarial training step as the most copied public code writes it: the baseline that every ratio here is read against.

It is `train_pgd.py` of locuslab/fast_adversarial and `attack_pgd` of locuslab/robust_overfitting (the same loop; Bag-of-Tricks
and ASCL have it too), written anew: eager PyTorch, fp32, NCHW, and `loss.backward()` inside the attack, which computes the
gradients of all weights in every step and throws them away.

Where that code does still more, we leave it out, in the naive step's favour:
* BatchNorm in train mode while attacking. Here the attack runs in eval mode, as the engine's recipes (and TRADES, MadryLab and
  Bag-of-Tricks' --BNeval) do: both then solve the same problem, and the baseline is the faster of the two.
* `loss.item()` and an accuracy read back every step; a start noise drawn channel by channel with `.item()`; forwards made only
  for logging (robust_overfitting); a loader on the CPU. Both sides of a comparison start from one batch on the device.

About half of the public code (TRADES, MadryLab, torchattacks, MAIR) takes the gradient of the input alone, by
`torch.autograd.grad`: weight_gradients=False is that code. The second rung, bf16=True on a channels-last model under
cudnn.benchmark, is what a careful user adds to the first today.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.reference.hard_supcon import hard_supcon


def clamp(values: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Each value into its own interval, as fast_adversarial's utils do it."""
    return torch.max(torch.min(values, upper), lower)


def attack(
    model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, *, eps: float, step_size: float, steps: int,
    bf16: bool = False, weight_gradients: bool = True,
) -> Tensor:  # fmt: skip
    """PGD on the cross-entropy from images + start (linf); the model in the mode that it is in. Returns x_adv, fp32.

    images (N, C, H, W) fp32 in [0, 1], labels (N,) int64. With weight_gradients it leaves gradients in the parameters' `.grad`,
    as that code does.
    """
    delta = clamp(start, 0 - images, 1 - images)
    delta.requires_grad = True
    for _ in range(steps):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            output = model(images + delta)
        loss = F.cross_entropy(output.float() if bf16 else output, labels)
        if weight_gradients:
            loss.backward()
            gradient = delta.grad.detach()
        else:
            (gradient,) = torch.autograd.grad(loss, delta)
        delta.data = torch.clamp(delta + step_size * torch.sign(gradient), -eps, eps)
        delta.data = clamp(delta, 0 - images, 1 - images)
        if weight_gradients:
            delta.grad.zero_()
    return (images + delta).detach()


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *, eps: float, step_size: float,
    steps: int, hsc: float = 0.0, temperature: float = 0.1, beta: float = 2.0, bf16: bool = False, start: Tensor | None = None,
    weight_gradients: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """Attack, training forward, backward and update; returns the loss terms.

    images: the augmented batch. hsc = 0 is PGD-AT: CE(f(x_adv), y). hsc > 0 is ANCHOR: one forward over [images; x_adv], and
    hsc times the reference hard_supcon on both views' embeddings besides. start: the attack's noise (None: uniform in the ball).
    weight_gradients: as in `attack`.
    """
    if start is None:
        start = torch.zeros_like(images).uniform_(-eps, eps)
    model.eval()
    adversarial = attack(
        model, images, labels, start, eps=eps, step_size=step_size, steps=steps, bf16=bf16, weight_gradients=weight_gradients
    )
    model.train()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        outputs = model(torch.cat([images, adversarial]), embed=True) if hsc > 0 else (model(adversarial),)
    logits, *embeddings = (part.float() for part in outputs) if bf16 else outputs
    terms = {"ce_adv": F.cross_entropy(logits[-len(labels) :], labels)}
    if hsc > 0:
        terms["hsc"] = hsc * hard_supcon(embeddings[0], labels.repeat(2), temperature=temperature, beta=beta)
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    return {name: term.detach() for name, term in terms.items()}
