"""LARS and LAMB, the optimisers of large batches: every layer's step is scaled by the norm of its weights.

Made to be captured in a CUDA graph: multi-tensor operations, state that exists from the start, the learning rate and the step
count as tensors on the device, nothing read back. State that was never stepped is zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def layer_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups in which biases and normalisation (one dimension or none) are neither decayed nor scaled by layer.

    That is how SimCLR, SupCon and the papers' own runs treat them.
    """
    parameters = list(parameters)
    weights = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, arXiv 1708.03888).

    r = trust_coefficient * |w| / (|g| + wd * |w|), or 1 where |w| or |g| is 0;   v <- momentum * v + r * (g + wd * w);
    w <- w - lr * v. The ratio is the paper's. The learning rate stands outside the momentum, as in torch's SGD and as in the
    LARS and LARC that PyTorch code uses (apex, timm, lightly); the paper and SimCLR's TensorFlow code have it inside, which is
    the same while it is constant. There is no clipping of r and no Nesterov momentum.
    A group with adapt False has r = 1. lr: a 0-dim tensor on the parameters' device (a number works, but not in a graph).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "adapt": adapt,
            },
        )

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, decay = [p.grad for p in params], group["weight_decay"]
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            updates = torch._foreach_add(grads, params, alpha=decay)
            if group["adapt"]:
                w, g = _norms(params), _norms(grads)
                _scale_layers(updates, group["trust_coefficient"] * w / (g + decay * w), (w > 0) & (g > 0))
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_sub_(params, torch._foreach_mul(buffers, group["lr"]))


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive Adam (You et al. 2020, arXiv 1904.00962, algorithm 2, with phi(x) = x).

    m <- b1 * m + (1 - b1) * g;   v <- b2 * v + (1 - b2) * g^2;   u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd * w;
    w <- w - lr * r * u with r = |w| / |u|, or 1 where either is 0. Bias correction as in the paper (and apex, timm); the global
    clipping of the gradient that those add is not part of it. The corrections are computed in fp64.
    A group with adapt False has r = 1. lr: a 0-dim tensor on the parameters' device (a number works, but not in a graph).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool = True,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["step"] = torch.zeros((), dtype=torch.float64, device=group["params"][0].device)
        for p in group["params"]:
            self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, (beta1, beta2) = [p.grad for p in params], group["betas"]
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            group["step"].add_(1)
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_mul_(roots, (1 - beta2 ** group["step"]).rsqrt().to(params[0].dtype))
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(means, roots)
            torch._foreach_mul_(updates, (1 - beta1 ** group["step"]).reciprocal().to(params[0].dtype))
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            if group["adapt"]:
                w, u = _norms(params), _norms(updates)
                _scale_layers(updates, w / u, (w > 0) & (u > 0))
            torch._foreach_mul_(updates, group["lr"])
            torch._foreach_sub_(params, updates)


def _norms(tensors: list[Tensor]) -> Tensor:
    """(len(tensors),) Euclidean norms."""
    return torch.stack(torch._foreach_norm(tensors))


def _scale_layers(updates: list[Tensor], ratios: Tensor, valid: Tensor) -> None:
    """Multiply each update by its ratio, where that one is valid, in place."""
    torch._foreach_mul_(updates, list(torch.where(valid, ratios, 1.0).unbind()))
