"""Projected gradient descent on any module.

Only the gradient with respect to the input is taken, of the objective's sum over the batch; images, perturbation, logits and
loss are fp32 always; the model's parameters, `.grad`, buffers and flags are as before when the attack returns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

from fastanchor.attacks import objectives
from fastanchor.attacks.engine import BACKENDS, Engine, Fused, evaluate, first, forward
from fastanchor.attacks.modes import BN_MODES, attack_mode
from fastanchor.errors import UserError, did_you_mean
from fastanchor.models.folded import FoldedTwin
from fastanchor.ops import images as operators
from fastanchor.precision import NO_FP16, wrong_dtype
from fastanchor.reference import attacks as reference

STARTS = ("uniform", "bernoulli", "gaussian", "zero")
WITH_RADIUS = ("uniform", "bernoulli")
NORMS = ("linf", "l2")
PRECISIONS = ("fp32", "bf16")
# The radius where there is no projection: it never binds, so that pixels are cut at 0 and 1 alone, to the bit.
NO_BALL = 1e6


class PGD:
    """`PGD(eps=8/255, steps=10)(model, images, labels)` -> adversarial images (Madry et al. 2018).

    eps, step_size: radius and step length in pixel units of [0, 1], of the linf or l2 ball. steps: gradient steps.
    objective: "ce", "cw" (margin), "kl" (TRADES: from the clean images' prediction; start it from "gaussian" noise, at the clean
    images it has no gradient), or a callable(logits, labels) -> (N,) values to maximise.
    bn: "eval" | "train" | "train_frozen", see `attacks.modes`. start: "uniform" in a ball | "bernoulli" a random sign times the
    radius in every pixel | "gaussian" 0.001 * N(0, 1) | "zero" | a delta tensor of the images' shape. start_radius: that of the
    uniform and bernoulli starts, in pixel units (None: eps). project: False leaves the eps ball alone, only [0, 1] bounds
    (N-FGSM). restarts: independent starts; each image keeps the one of highest objective.
    precision: "bf16" runs the model under autocast, for training attacks only.
    backend: "eager" runs the steps on the model's BN-folded twin (bn "eval"; otherwise on the model), "compiled" compiles a step,
    "graphed" replays the attack as one CUDA graph, "auto" is the fastest of them that is right here and needs no compilation,
    "reference" the plain loop on the model itself. `engine.notes` says what was in use and why.
    kernels: whether Triton kernels make the step and the gradient of ce, cw and kl with respect to the logits (backends eager and
    graphed). "auto": on a GPU, where they have agreed with plain torch | "on": that or an error (on a CPU: the same operators,
    in plain torch) | "off". The linf step is plain torch's to the bit, the gradients to rounding: where the model is all but
    certain, ce's is more exact.
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
        start_radius: float | None = None,
        project: bool = True,
        restarts: int = 1,
        precision: str = "fp32",
        backend: str = "auto",
        kernels: str = "auto",
        check_inputs: bool = True,
    ):
        if precision in ("fp16", "float16", "half"):
            raise UserError(f"precision = {precision!r}: {NO_FP16}")
        for name, value, allowed in (
            ("bn", bn, BN_MODES),
            ("norm", norm, NORMS),
            ("precision", precision, PRECISIONS),
            ("backend", backend, BACKENDS),
            ("kernels", kernels, operators.MODES),
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
        if not isinstance(project, bool):
            raise UserError(f"project = {project!r}: must be True or False")
        if start_radius is not None and (not _is_finite(start_radius) or start_radius < 0):
            raise UserError(f"start_radius = {start_radius!r}: must be None (eps) or a finite number >= 0")
        if start_radius is not None and (isinstance(start, Tensor) or start not in WITH_RADIUS):
            found = "a delta tensor" if isinstance(start, Tensor) else start
            raise UserError(f"start_radius = {start_radius:g}: is that of start = {' or '.join(WITH_RADIUS)}, not of {found}")
        if start == "bernoulli" and norm != "linf":
            raise UserError(f"start = bernoulli: fills the linf ball's corners and needs norm = linf, not {norm}")
        self.eps, self.step_size, self.steps, self.restarts = eps, step_size, steps, restarts
        self.objective = objectives.resolve(objective)
        self.objective_name = objective if isinstance(objective, str) else getattr(objective, "__name__", "custom")
        self.bn, self.start, self.norm, self.precision, self.backend = bn, start, norm, precision, backend
        self.start_radius, self.project = start_radius, project
        self.kernels, self.check_inputs = kernels, check_inputs
        self.engine = Engine()

    def __repr__(self) -> str:
        start = "tensor" if isinstance(self.start, Tensor) else self.start
        radius = "" if self.start_radius is None else f", start_radius={self.start_radius:.6g}"
        return (
            f"PGD(eps={self.eps:.6g}, step_size={self.step_size:.6g}, steps={self.steps}, objective={self.objective_name}, "
            f"bn={self.bn}, start={start}{radius}, norm={self.norm}{'' if self.project else ', project=False'}, "
            f"restarts={self.restarts}, precision={self.precision})"
        )

    @property
    def ball(self) -> float:
        """Radius of the ball that the steps are projected on."""
        return self.eps if self.project else NO_BALL

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        clean: Tensor | tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """images (N, C, H, W) in [0, 1], labels (N,) int64, on the model's device -> fp32, same shape and memory format.

        generator: source of the start noise, on the images' device (None: the default one). clean: what objectives marked by
        `with_clean` get in place of the model's outputs on the clean images, which are then not computed; a tensor or a tuple of
        tensors, that is taken as constant, floating ones in fp32. Other objectives do not see it. Raises UserError.
        """
        if torch.is_inference_mode_enabled():
            raise UserError(
                "the attack takes gradients, which torch.inference_mode forbids; call it outside, or under torch.no_grad"
            )
        _check_shapes(images, labels)
        if any(p.dtype == torch.float16 for p in model.parameters()):
            raise UserError(f"the model's parameters are fp16: {NO_FP16}")
        images = images.detach().float()
        given = () if clean is None or not objectives.uses_clean(self.objective) else (_constant(clean),)
        if self.check_inputs:
            _check_values(model, images, labels)
            self.check_inputs = False
        with attack_mode(model, self.bn):
            if self.backend == "reference":
                return self._search(model, images, labels, given, generator, self._plain_loop)
            return self._run(model, images, labels, given, generator)

    def start_delta(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Start noise for these images: fp32, their shape and memory format."""
        if isinstance(self.start, Tensor):
            if self.start.shape != images.shape:
                raise UserError(f"start delta has shape {tuple(self.start.shape)}, the images {tuple(images.shape)}")
            return self.start.to(images)
        noise = torch.empty_like(images)
        if self.start == "zero" or self.ball == 0:
            return noise.zero_()
        if self.start == "gaussian":
            return noise.normal_(generator=generator).mul_(0.001)
        radius = self.eps if self.start_radius is None else self.start_radius
        if self.start == "bernoulli":
            return noise.bernoulli_(generator=generator).mul_(2 * radius).sub_(radius)
        if self.norm == "linf":
            return noise.uniform_(-radius, radius, generator=generator)
        # Uniform in the l2 ball of d dimensions: a uniform direction, and a length radius * u^(1/d).
        noise.normal_(generator=generator)
        share = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator).pow_(1 / images[0].numel())
        return noise.mul_(radius * share / reference.l2_norms(noise))

    def _run(self, model: nn.Module, images: Tensor, labels: Tensor, given: tuple, generator) -> Tensor:
        """The attack by the engine: prepare the network on the host, then run or replay."""
        network = self.engine.network(model, images, self.bn, torch.bfloat16 if self.precision == "bf16" else None)
        head = objectives.head_of(self.objective)
        # Decided here, in Python: kernels are compiled and checked before anything is captured.
        fused = self.engine.fused(self.kernels, self.backend, head, self.norm, images.device)
        step = self.engine.step(self.backend, fused)

        def attack(images: Tensor, labels: Tensor, given: tuple, generator: torch.Generator | None) -> Tensor:
            if isinstance(network, FoldedTwin):
                network.refresh(kernel=self.kernels != "off")
                self.engine.notes["refresh"] = network.refresh_note
            loop = functools.partial(self._fast_loop, step, fused)
            return self._search(network, images, labels, given, generator, loop)

        x_adv = None
        if self._wants_graph(images):
            x_adv = self._replay(attack, fused, model, network, images, labels, given, generator)
        return attack(images, labels, given, generator) if x_adv is None else x_adv

    def _wants_graph(self, images: Tensor) -> bool:
        if self.backend == "graphed":
            return True
        # Inside a capture, that of a whole training iteration say, the attack becomes a part of it.
        named = self.objective in objectives.OBJECTIVES.values()
        return self.backend == "auto" and named and images.is_cuda and not torch.cuda.is_current_stream_capturing()

    def _replay(
        self, attack: Callable, fused: Fused, model, network, images: Tensor, labels: Tensor, given: tuple, generator
    ) -> Tensor | None:
        start = (
            (self.start.data_ptr(), self.start.dtype, self.start.shape, self.start.stride())
            if isinstance(self.start, Tensor)
            else self.start
        )
        settings = (
            self.eps, self.step_size, self.steps, self.restarts, id(self.objective), self.bn, start, self.start_radius, self.norm,
            self.project, self.precision, fused, len(given), given != () and isinstance(given[0], tuple),
        )  # fmt: skip

        # A graph takes tensors: what was given of the clean images is taken apart and put together again.
        def captured(images: Tensor, labels: Tensor, *parts: Tensor, generator: torch.Generator | None) -> Tensor:
            again = (parts,) if given and isinstance(given[0], tuple) else parts
            return attack(images, labels, again, generator)

        parts = given[0] if given and isinstance(given[0], tuple) else given
        x_adv, note = self.engine.graphs.run(settings, captured, model, network, (images, labels, *parts), generator)
        self.engine.notes["graphed"] = f"{'no' if x_adv is None else 'yes'}: {note}"
        if x_adv is None and self.backend == "graphed":
            raise UserError(f"attack.backend = graphed: {note}")
        return x_adv

    def _search(self, network: nn.Module, images: Tensor, labels: Tensor, given: tuple, generator, loop: Callable) -> Tensor:
        """The best of all restarts, by `loop(network, images, labels, clean, start)`."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._best_of_restarts(network, images, labels, given, generator, loop)

    def _best_of_restarts(self, network, images, labels, given, generator, loop) -> Tensor:
        clean = given or self._clean_outputs(network, images)
        x_adv = loop(network, images, labels, clean, self.start_delta(images, generator))
        if self.restarts == 1:
            return x_adv
        best = _value(network, x_adv, labels, self.objective, clean)
        for _ in range(self.restarts - 1):
            again = loop(network, images, labels, clean, self.start_delta(images, generator))
            value = _value(network, again, labels, self.objective, clean)
            x_adv = torch.where((value > best).view(-1, 1, 1, 1), again, x_adv)
            best = torch.maximum(best, value)
        return x_adv

    def _clean_outputs(self, network: nn.Module, images: Tensor) -> tuple:
        """What objectives that look at the clean images get besides, computed once a batch: (outputs,), or nothing."""
        if not objectives.uses_clean(self.objective):
            return ()
        with torch.no_grad():
            return (forward(network, images),)

    def _fast_loop(
        self, step: Callable, fused: Fused, network, images: Tensor, labels: Tensor, clean: tuple, start: Tensor
    ) -> Tensor:
        given = images
        if isinstance(network, FoldedTwin):
            images, start = (x.contiguous(memory_format=torch.channels_last) for x in (images, start))
        x_adv = reference.project(images + start, images, self.ball, self.norm)
        plain_linf = self.norm == "linf" and fused.norm is None
        bounds = operators.linf_bounds(images, self.ball) if plain_linf else None
        for _ in range(self.steps):
            x_adv = step(network, self.objective, clean, x_adv, labels, images, bounds, self.ball, self.step_size)
        return x_adv if x_adv.stride() == given.stride() else torch.empty_like(given).copy_(x_adv)

    def _plain_loop(self, network, images: Tensor, labels: Tensor, clean: tuple, start: Tensor) -> Tensor:
        return reference.pgd(
            lambda x: forward(network, x),
            images,
            labels,
            eps=self.ball,
            step_size=self.step_size,
            steps=self.steps,
            objective=lambda outputs, labels: evaluate(self.objective, outputs, labels, clean),
            start=start,
            norm=self.norm,
        )


def _value(network, images: Tensor, labels: Tensor, objective: Callable, clean: tuple) -> Tensor:
    """The objective of every image, (N,)."""
    with torch.no_grad():
        value = evaluate(objective, forward(network, images), labels, clean)
    if value.shape != labels.shape:
        raise UserError(f"restarts need an objective with one value an image; this one returns shape {tuple(value.shape)}")
    return value


def _constant(clean: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    parts = clean if isinstance(clean, tuple) else (clean,)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(f"clean is of type {type(clean).__name__}: must be a tensor or a tuple of tensors")
    parts = tuple(part.detach().float() if part.is_floating_point() else part.detach() for part in parts)
    return parts if isinstance(clean, tuple) else parts[0]


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
        try:
            classes = first(forward(model, images[:1])).shape[1]
        except RuntimeError as error:
            if (said := wrong_dtype(model, images.dtype)) is not None:
                raise said from error
            raise
    low, high = torch.aminmax(labels)
    if low < 0 or high >= classes:
        raise UserError(f"labels lie in [{low}, {high}]: must be in [0, {classes - 1}], the model has {classes} classes")
