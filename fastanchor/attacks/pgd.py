"""Projected gradient descent on any module.

Only the gradient with respect to the input is taken, of the objective's sum over the batch; images, perturbation, logits and
loss are fp32 always; the model's parameters, `.grad`, buffers and flags are as before when the attack returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

from fastanchor.attacks import objectives
from fastanchor.attacks.modes import BN_MODES, attack_mode
from fastanchor.errors import UserError, did_you_mean
from fastanchor.reference import attacks as reference

STARTS = ("uniform", "gaussian", "zero")
NORMS = ("linf", "l2")
PRECISIONS = ("fp32", "bf16")
BACKENDS = ("auto", "reference")


class PGD:
    """`PGD(eps=8/255, steps=10)(model, images, labels)` -> adversarial images (Madry et al. 2018).

    eps, step_size: radius and step length in pixel units of [0, 1], of the linf or l2 ball. steps: gradient steps.
    objective: "ce", "cw" (margin), or a callable(logits, labels) -> (N,) values to maximise.
    bn: "eval" | "train" | "train_frozen", see `attacks.modes`. start: "uniform" in the ball | "gaussian" 0.001 * N(0, 1) |
    "zero" | a delta tensor of the images' shape. restarts: independent starts; each image keeps the one of highest objective.
    precision: "bf16" runs the model under autocast, for training attacks only. backend: "reference" is the plain loop.
    check_inputs: look at the values of the first batch (reads them back once); shapes are checked always.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 10,
        objective: str | Callable = "ce",
        bn: str = "eval",
        start: str | Tensor = "uniform",
        norm: str = "linf",
        *,
        restarts: int = 1,
        precision: str = "fp32",
        backend: str = "auto",
        check_inputs: bool = True,
    ):
        for name, value, allowed in (
            ("bn", bn, BN_MODES),
            ("norm", norm, NORMS),
            ("precision", precision, PRECISIONS),
            ("backend", backend, BACKENDS),
            *([] if isinstance(start, Tensor) else [("start", start, STARTS)]),
        ):
            if not isinstance(value, str) or value not in allowed:
                more = " or a delta tensor" if name == "start" else ""
                found = repr(value) if isinstance(value, str) else type(value).__name__
                hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
                raise UserError(f"{name} = {found}: must be one of {', '.join(allowed)}{more}{hint}")
        if not _is_finite(eps) or eps < 0:
            raise UserError(f"eps = {eps!r}: must be a finite number >= 0")
        if not _is_finite(step_size) or step_size <= 0:
            raise UserError(f"step_size = {step_size!r}: must be a finite number > 0")
        for name, count in (("steps", steps), ("restarts", restarts)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise UserError(f"{name} = {count!r}: must be a whole number >= 1")
        self.eps, self.step_size, self.steps, self.restarts = eps, step_size, steps, restarts
        self.objective = objectives.resolve(objective)
        self.objective_name = objective if isinstance(objective, str) else getattr(objective, "__name__", "custom")
        self.bn, self.start, self.norm, self.precision, self.backend = bn, start, norm, precision, backend
        self.check_inputs = check_inputs

    def __repr__(self) -> str:
        start = "tensor" if isinstance(self.start, Tensor) else self.start
        return (
            f"PGD(eps={self.eps:.6g}, step_size={self.step_size:.6g}, steps={self.steps}, objective={self.objective_name}, "
            f"bn={self.bn}, start={start}, norm={self.norm}, restarts={self.restarts}, precision={self.precision})"
        )

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """images (N, C, H, W) in [0, 1], labels (N,) int64, on the model's device -> fp32, same shape and memory format.

        generator: source of the start noise, on the images' device (None: the default one). Raises UserError.
        """
        if torch.is_inference_mode_enabled():
            raise UserError(
                "the attack takes gradients, which torch.inference_mode forbids; call it outside, or under torch.no_grad"
            )
        _check_shapes(images, labels)
        images = images.detach().float()
        if self.check_inputs:
            _check_values(model, images, labels)
            self.check_inputs = False
        with attack_mode(model, self.bn), torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            objective = self._bind(model, images)
            x_adv = self._attack(model, images, labels, objective, generator)
            if self.restarts == 1:
                return x_adv
            best = _value(model, x_adv, labels, objective)
            for _ in range(self.restarts - 1):
                again = self._attack(model, images, labels, objective, generator)
                value = _value(model, again, labels, objective)
                x_adv = torch.where((value > best).view(-1, 1, 1, 1), again, x_adv)
                best = torch.maximum(best, value)
        return x_adv

    def start_delta(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Start noise for these images: fp32, their shape and memory format."""
        if isinstance(self.start, Tensor):
            if self.start.shape != images.shape:
                raise UserError(f"start delta has shape {tuple(self.start.shape)}, the images {tuple(images.shape)}")
            return self.start.to(images)
        noise = torch.empty_like(images)
        if self.start == "zero" or self.eps == 0:
            return noise.zero_()
        if self.start == "gaussian":
            return noise.normal_(generator=generator).mul_(0.001)
        if self.norm == "linf":
            return noise.uniform_(-self.eps, self.eps, generator=generator)
        # Uniform in the l2 ball of d dimensions: a uniform direction, and a radius eps * u^(1/d).
        noise.normal_(generator=generator)
        radius = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator).pow_(1 / images[0].numel())
        return noise.mul_(self.eps * radius / reference.l2_norms(noise))

    def _bind(self, model: nn.Module, images: Tensor) -> Callable:
        """The objective of this batch: those that look at the clean images get their outputs, computed once."""
        if not objectives.uses_clean(self.objective):
            return self.objective
        with torch.no_grad():
            clean = _forward(model, images)
        return lambda outputs, labels: self.objective(outputs, labels, clean)

    def _attack(self, model, images: Tensor, labels: Tensor, objective: Callable, generator) -> Tensor:
        start = self.start_delta(images, generator)
        if self.backend == "reference":
            return reference.pgd(
                lambda x: _forward(model, x),
                images,
                labels,
                eps=self.eps,
                step_size=self.step_size,
                steps=self.steps,
                objective=_fp32(objective),
                start=start,
                norm=self.norm,
            )
        x_adv = reference.project(images + start, images, self.eps, self.norm)
        lower, upper = (images - self.eps).clamp_(0, 1), (images + self.eps).clamp_(0, 1)
        for _ in range(self.steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                value = _fp32(objective)(_forward(model, x_adv), labels).sum()
            (gradient,) = torch.autograd.grad(value, (x_adv,))
            x_adv = x_adv.detach()
            if self.norm == "linf":
                # Ball and box are one interval a pixel, so one clamp projects on both.
                x_adv = torch.clamp(x_adv.add_(gradient.sign(), alpha=self.step_size), lower, upper)
            else:
                x_adv = reference.project(reference.ascend(x_adv, gradient, self.step_size, "l2"), images, self.eps, "l2")
        return x_adv


def _forward(model, images: Tensor):
    """The model's outputs in fp32; a tensor, or a tuple of tensors whose first one is the logits."""
    outputs = model(images)
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(
            f"the model returns {type(outputs).__name__}: must be a tensor of logits, or a tuple of tensors that starts with it"
        )
    outputs = tuple(part.float() for part in parts) if isinstance(outputs, tuple) else outputs.float()
    logits = _first(outputs)
    if logits.ndim != 2 or len(logits) != len(images):
        raise UserError(
            f"the model's output has shape {tuple(logits.shape)} for {len(images)} images: must be ({len(images)}, classes)"
        )
    return outputs


def _first(outputs) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _fp32(objective: Callable) -> Callable:
    """The objective outside autocast: softmax and margins are never taken in low precision."""

    def evaluate(outputs, labels):
        with torch.autocast(_first(outputs).device.type, enabled=False):
            return objective(outputs, labels)

    return evaluate


def _value(model, images: Tensor, labels: Tensor, objective: Callable) -> Tensor:
    """The objective of every image, (N,)."""
    with torch.no_grad():
        value = _fp32(objective)(_forward(model, images), labels)
    if value.shape != labels.shape:
        raise UserError(f"restarts need an objective with one value an image; this one returns shape {tuple(value.shape)}")
    return value


def _is_finite(value) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _check_shapes(images: Tensor, labels: Tensor) -> None:
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise UserError(f"{name} are of type {type(value).__name__}: must be a tensor")
    if images.ndim != 4 or images.numel() == 0:
        raise UserError(f"images have shape {tuple(images.shape)}: must be (N, C, H, W), none of them 0")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise UserError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}: must be ({len(images)},) int64")


def _check_values(model, images: Tensor, labels: Tensor) -> None:
    low, high = torch.aminmax(images)
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"the images' values lie in [{low:g}, {high:g}]: must be in [0, 1]; normalisation belongs inside the model"
        )
    with attack_mode(model, "eval"), torch.no_grad():
        classes = _first(_forward(model, images[:1])).shape[1]
    low, high = torch.aminmax(labels)
    if low < 0 or high >= classes:
        raise UserError(f"labels lie in [{low}, {high}]: must be in [0, {classes - 1}], the model has {classes} classes")
