"""Optimisers, learning-rate schedules and the moving average of weights.

Fit for a captured training step: what changes from step to step is a tensor on the device, at an address that stays, and nothing
is read back. State exists from the start; never stepped and all zeros are the same thing, to the bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastanchor.config import OptimConfig
from fastanchor.errors import UserError
from fastanchor.train.apex import build_apex
from fastanchor.train.layerwise import LAMB, LARS, layer_groups


def check_optimizer(config: OptimConfig) -> None:
    """Settings of the optimiser that are each allowed but do not go together. Raises UserError."""
    if config.nesterov and config.name != "sgd":
        raise UserError(f"optim.nesterov: is defined for optim.name = sgd, not {config.name}")
    if config.nesterov and config.momentum == 0:
        raise UserError("optim.nesterov: needs optim.momentum > 0")
    if config.backend == "apex" and config.name not in ("sgd", "lamb"):
        raise UserError(f"optim.backend = apex: has sgd and lamb, not {config.name}; use torch")


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names, over parameters of one device, its state made: zeros of the parameters' layout.

    sgd and adamw are torch's fused implementations (one kernel a step; they exist for CPU and CUDA), lars and lamb those of
    `layerwise`. Their learning rate is one 0-dim fp32 tensor on the device: `set_learning_rate`. Raises UserError.
    """
    check_optimizer(config)
    parameters = list(parameters)
    device = parameters[0].device
    if config.backend == "apex":
        if device.type != "cuda":
            raise UserError(f"optim.backend = apex: its kernels run on CUDA devices only, not on {device.type}; use torch")
        return build_apex(config.name, parameters, config)
    lr = torch.tensor(config.lr, dtype=torch.float32, device=device)
    betas = (float(config.beta1), float(config.beta2))
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=lr, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay, fused=True
        )
    elif config.name == "adamw":
        optimizer = torch.optim.AdamW(
            parameters, lr=lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True, capturable=True
        )
    elif config.name == "lars":
        groups = layer_groups(parameters, config.weight_decay)
        optimizer = LARS(groups, lr=lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    else:
        optimizer = LAMB(layer_groups(parameters, config.weight_decay), lr=lr, betas=betas, eps=config.eps)
    _prepare(optimizer)
    optimizer.register_load_state_dict_post_hook(_prepare)
    return optimizer


def _prepare(optimizer: torch.optim.Optimizer) -> None:
    """Make what torch makes at the first step, and put on the device what load_state_dict takes as it was saved."""
    adamw = isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        device = group["params"][0].device
        for key, dtype in (("lr", torch.float32), ("step", torch.float64)):
            if key in group:
                group[key] = torch.as_tensor(group[key], dtype=dtype, device=device)
        names = ("exp_avg", "exp_avg_sq") if adamw else ("momentum_buffer",) if group.get("momentum") else ()
        for p in group["params"]:
            state = optimizer.state[p]
            if adamw:
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=device))
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(p)


def capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a CUDA graph may hold the step: not that of apex, whose kernels take the learning rate as a number."""
    return all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor, so that a captured step sees it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor of the optimiser's own that a step reads or writes: the state of each parameter and of each group."""
    held = [*optimizer.state.values(), *optimizer.param_groups]
    unique = {id(value): value for entry in held for value in entry.values() if isinstance(value, Tensor)}
    return list(unique.values())


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Copy a `state_dict()` into the optimiser's own tensors, on whatever device it was saved; every address stays.

    The settings (momentum, weight decay, ...) stay those that the optimiser was built with: unlike load_state_dict, which takes
    the saved ones. A parameter without saved state, one never stepped, gets zeros. Raises UserError, with nothing changed, where
    the state is that of another kind of optimiser or of other parameters.
    """
    own = optimizer.state_dict()
    try:
        saved_groups, saved_state = list(state["param_groups"]), dict(state["state"])
        sizes = [len(group["params"]) for group in saved_groups]
    except (TypeError, KeyError, ValueError):
        raise UserError("the saved state is not one of an optimiser") from None
    expected = [len(group["params"]) for group in own["param_groups"]]
    if sizes != expected:
        raise UserError(f"the optimiser's saved state is of {_counts(sizes)}; this one has {_counts(expected)}")
    copies: list[tuple[Tensor, Any]] = []
    for i, (mine, theirs) in enumerate(zip(own["param_groups"], saved_groups, strict=True)):
        # Versions of one optimiser may add settings; two that each have some of their own are two optimisers.
        if mine.keys() - theirs.keys() and theirs.keys() - mine.keys():
            raise UserError(f"the optimiser's saved state is not that of {type(optimizer).__name__}, but of another optimiser")
        for number, saved_number in zip(mine["params"], theirs["params"], strict=True):
            tensors = own["state"].get(number, {})
            values = saved_state.get(saved_number, {})
            if values and values.keys() != tensors.keys():
                found = ", ".join(sorted(values))
                raise UserError(
                    f"the optimiser's saved state is not that of {type(optimizer).__name__} with these settings: it holds {found}"
                )
            for key, tensor in tensors.items():
                value = values.get(key)
                if value is not None and (not isinstance(value, Tensor) or value.shape != tensor.shape):
                    raise UserError(
                        f"the optimiser's saved state belongs to other parameters: {key} of parameter {number} in group {i} "
                        f"should be of shape {tuple(tensor.shape)}"
                    )
                copies.append((tensor, value))
    for tensor, value in copies:
        tensor.zero_() if value is None else tensor.copy_(value)
    for group, theirs in zip(optimizer.param_groups, saved_groups, strict=True):
        for key in group.keys() & theirs.keys() & {"lr", "step"}:
            if isinstance(group[key], Tensor):
                group[key].fill_(float(theirs[key]))
            else:
                group[key] = type(group[key])(theirs[key])


def _counts(sizes: list[int]) -> str:
    return " + ".join(map(str, sizes)) + " parameters"


def learning_rate(config: OptimConfig, epoch: float, epochs: int) -> float:
    """The learning rate after `epoch` (fractional) of `epochs` epochs.

    step: lr * decay^(milestones passed); cosine: lr * (1 + cos(pi * epoch / epochs)) / 2; cyclic: a triangle with its peak
    lr at peak * epochs and 0 at both ends (Wong et al. 2020). step and cosine rise linearly over warmup_epochs.
    """
    if config.schedule == "cyclic":
        top = config.peak * epochs
        return config.lr * (epoch / top if epoch < top else max(0.0, (epochs - epoch) / (epochs - top)))
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * min(1.0, epoch / epochs))) / 2
    return config.lr * config.decay ** sum(epoch >= milestone for milestone in config.milestones)


class WeightAverage:
    """Exponential moving average of a model's parameters and floating buffers, w_avg <- w_avg + (1 - d) * (w - w_avg).

    The decay d rises as min(decay, (1 + t) / (10 + t)) over the steps t, so that the first, random weights are soon forgotten;
    1 - d is computed on the device in fp64 and rounded to fp32. Other buffers are copied. `model` is the average.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self._steps = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        self._source: nn.Module | None = None

    @property
    def steps(self) -> int:
        """Updates so far. Reading it is a host read; setting it writes in place."""
        return int(self._steps)

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps.fill_(value)

    def tensors(self) -> list[Tensor]:
        """Every tensor that an update writes."""
        return [*self.model.parameters(), *self.model.buffers(), self._steps]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards the model's weights.

        The tensors of both models are looked up once and remembered: later changes of theirs are in place, as load_state_dict's
        are. Three multi-tensor operations, since a list has no lerp with its weight in one tensor.
        """
        if self._source is not model:
            self._source, self._floating, self._others = model, *_pair(self.model, model)
        ours, theirs = self._floating
        share = (9 / (self._steps + 10)).clamp_(min=1 - self.decay).float()
        self._steps.add_(1)
        difference = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(ours, difference)
        if self._others[0]:
            torch._foreach_copy_(*self._others)


def _pair(average: nn.Module, model: nn.Module) -> tuple[tuple[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """Corresponding tensors of two models, (ours, theirs): the floating ones, and all others."""
    pairs = list(zip((*average.parameters(), *average.buffers()), (*model.parameters(), *model.buffers()), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    others = [pair for pair in pairs if not pair[0].is_floating_point()]
    return tuple(([a for a, _ in found], [b for _, b in found]) for found in (floating, others))  # type: ignore[return-value]
