"""PGD and FGSM in their plainest form: the truth that the attack engine is tested against.

The model is called as it stands: BatchNorm mode, precision and start noise are the caller's business here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def input_gradient(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, objective: Callable) -> Tensor:
    """d/d images of the objective summed over the batch (a sum: an image's gradient does not depend on the batch size)."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(model(images), labels).sum()
    # Autocast, where the caller is inside it, is for the forward pass only.
    with torch.autocast(images.device.type, enabled=False):
        return torch.autograd.grad(value, images)[0]


def l2_norms(images: Tensor) -> Tensor:
    """Euclidean norm of every image, (N, C, H, W) -> (N, 1, 1, 1)."""
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def ascend(x_adv: Tensor, gradient: Tensor, step_size: float, norm: str) -> Tensor:
    """One step of steepest ascent: along the gradient's sign (linf), or along the unit gradient of each image (l2)."""
    if norm == "linf":
        return x_adv + step_size * gradient.sign()
    return x_adv + step_size * gradient / l2_norms(gradient).clamp_min(1e-12)


def project(x_adv: Tensor, images: Tensor, eps: float, norm: str) -> Tensor:
    """Nearest point of the eps ball around `images`, then of the box [0, 1]."""
    delta = x_adv - images
    delta = delta.clamp(-eps, eps) if norm == "linf" else delta * (eps / l2_norms(delta).clamp_min(1e-12)).clamp_max(1.0)
    return (images + delta).clamp(0, 1)


def pgd(
    model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    objective: Callable,
    start: Tensor | None = None,
    norm: str = "linf",
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018) from images + start; all tensors in one floating dtype, fp64 included.

    images (N, C, H, W) in [0, 1]; start: a delta of the same shape (None: zero); returns x_adv of the same shape.
    """
    x_adv = images if start is None else project(images + start, images, eps, norm)
    for _ in range(steps):
        gradient = input_gradient(model, x_adv, labels, objective)
        x_adv = project(ascend(x_adv, gradient, step_size, norm), images, eps, norm)
    return x_adv


def fgsm(model, images: Tensor, labels: Tensor, *, eps: float, objective: Callable) -> Tensor:
    """The fast gradient sign method (Goodfellow et al. 2015): one step of length eps, no start noise."""
    return pgd(model, images, labels, eps=eps, step_size=eps, steps=1, objective=objective)
