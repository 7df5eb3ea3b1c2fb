"""Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884), for any loss: the gradient is taken where the weights,
moved by gamma times their own norm, make the loss of this batch larger, and the optimiser then moves the weights themselves.

    v = gamma ||w|| g / ||g||,  g = dL/dw at w, layer by layer;   the step takes dL/dw at w + v and applies it to w
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

# Added to a gradient's norm, as in the public code: a layer without gradient stays where it is.
TINY = 1e-20


def perturbed_weights(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of `parameters`, which the optimiser moves, that AWP perturbs: in `model` named weight, of two or more dimensions.

    That leaves out biases and the vectors of normalisation layers, as the public code does (csdongxian/AWP, utils_awp.py).
    """
    moved = {id(p) for p in parameters}
    named = model.named_parameters()
    return [p for name, p in named if id(p) in moved and p.ndim > 1 and "weight" in name]


@contextlib.contextmanager
def perturbed(
    model: nn.Module, parameters: Iterable[nn.Parameter], gamma: float | Tensor, loss: Callable[[], Tensor]
) -> Iterator[None]:
    """Inside of it the weights are w + v. Afterwards, also after an exception, they are w again, to the bit.

        with perturbed(model, parameters, gamma, lambda: total_loss(model)):
            total_loss(model).backward()
        optimizer.step()

    model: all that `loss` forwards (an nn.ModuleList of a model and its heads, say); its parameters' `.grad` are not touched by
    entering. gamma: length of v relative to the norm of w; a number or a 0-d tensor, 0 perturbs nothing. loss: forwards the batch
    in the mode of the training and returns the 0-d loss to be raised; called once, here. Whatever it does to the model's buffers
    is undone: BatchNorm's running statistics end as if only the forwards inside the context had moved them.
    Nothing is read back to the host, and weights and buffers change in place: fit for a captured step.

    Other than in the public code the optimiser acts on w and not on w + v, so that weight decay is that of w, and v does not go
    through (w + v) - v, which would leave rounding errors in the weights.
    """
    weights, buffers = perturbed_weights(model, parameters), list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    try:
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    finally:
        _restore(buffers, kept)
    reached = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
    saved = [w.detach().clone() for w, _ in reached]
    try:
        _ascend(reached, gamma)
        # An autocast region around all of this would go on with its casts of the weights as they were.
        torch.clear_autocast_cache()
        yield
    finally:
        _restore([w for w, _ in reached], saved)
        torch.clear_autocast_cache()


@torch.no_grad()
def _ascend(reached: list[tuple[nn.Parameter, Tensor]], gamma: float | Tensor) -> None:
    """w += gamma ||w|| g / ||g|| for all of them."""
    if not reached:
        return
    weights, gradients = map(list, zip(*reached, strict=True))
    steps = torch._foreach_norm(weights)
    lengths = torch._foreach_norm(gradients)
    torch._foreach_add_(lengths, TINY)
    torch._foreach_div_(steps, lengths)
    torch._foreach_mul_(steps, gamma)
    torch._foreach_add_(weights, torch._foreach_mul(gradients, steps))


@torch.no_grad()
def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(tensors, values)
