"""How the steps of an attack are run: on the folded twin where BatchNorm allows it, compiled, or replayed as one graph.

`backend="reference"` never comes here: it is the plain loop of `fastanchor.reference` that all of this is tested against.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastanchor.attacks.graphed import GraphedAttacks
from fastanchor.errors import UserError
from fastanchor.models.fingerprint import fingerprint
from fastanchor.models.folded import CannotFold, FoldedTwin, fold
from fastanchor.ops import images as operators
from fastanchor.reference import attacks as reference

BACKENDS = ("auto", "reference", "eager", "compiled", "graphed")


class Fused(NamedTuple):
    """What of a step is done by operators of `ops.images`. It is hashable, to be a part of a graph's key.

    head: (logits, labels, clean outputs) -> the objective's gradient with respect to the logits; None: autograd's. norm: of the
    update that is one operator; None: plain torch.
    """

    head: Callable | None = None
    norm: str | None = None


PLAIN = Fused()


class Engine:
    """What an attack keeps from batch to batch: twins of the models it has seen, its compiled step, its captured graphs.

    notes: which of these are in use and why, or why not, for people.
    """

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.graphs = GraphedAttacks()
        self._twins: weakref.WeakKeyDictionary[nn.Module, FoldedTwin | CannotFold] = weakref.WeakKeyDictionary()
        self._compiled: dict[tuple, Callable] = {}

    def __reduce__(self):
        # A copied or pickled attack starts with an empty one: none of it is part of what the attack is.
        return Engine, ()

    def network(self, model: nn.Module, images: Tensor, bn: str, dtype: torch.dtype | None) -> nn.Module:
        """The module that the steps run on: the twin of `model`, made on first sight, or `model` itself. Not refreshed."""
        if bn != "eval":
            self.notes["folded"] = f"no: with bn={bn} BatchNorm takes the batch's statistics, which cannot be folded"
            return model
        twin = self._twins.get(model)
        known = twin is not None and (twin.is_of(model) if isinstance(twin, FoldedTwin) else twin.args[1] == fingerprint(model))
        if not known:
            try:
                twin = fold(model, images[:2], dtype)
            except CannotFold as reason:
                twin = CannotFold(str(reason), fingerprint(model))
            self._twins[model] = twin
        if isinstance(twin, CannotFold):
            self.notes["folded"] = f"no: {twin.args[0]}"
            return model
        kept = f", {twin.kept} kept" if twin.kept else ""
        self.notes["folded"] = f"yes: {twin.folded} BatchNorms in {len(twin.layers)} convolutions{kept}"
        return twin

    def fused(self, mode: str, backend: str, head: tuple[str, Callable] | None, norm: str, device: torch.device) -> Fused:
        """What of a step operators do on this device. mode: `kernels` of the attack; head: name and function of the objective's.

        The first answer for a device compiles and checks kernels: not while a graph is captured. Raises UserError for mode "on".
        """
        if backend == "compiled":
            self.notes["kernels"] = "no: the compiler fuses the step"
            return PLAIN
        of_classes = f"logit gradient of {operators.MIN_CLASSES} to {operators.MAX_CLASSES} classes"
        parts = {"step": f"pgd_step_{norm}", **({of_classes: head[0]} if head else {})}
        found = {part: operators.decide(name, mode, device) for part, name in parts.items()}
        used = [part for part, (good, _) in found.items() if good]
        unused = [f"no {part}: {reason}" for part, (good, reason) in found.items() if not good]
        if used:
            self.notes["kernels"] = "; ".join([f"yes: {' and '.join(used)}, {found[used[0]][1]}", *unused])
        else:
            self.notes["kernels"] = f"no: {'; '.join(dict.fromkeys(reason for _, reason in found.values()))}"
        return Fused(head[1] if of_classes in used else None, norm if "step" in used else None)

    def step(self, backend: str, fused: Fused = PLAIN) -> Callable:
        """`ascend_once`, compiled where asked for."""
        if backend == "compiled":
            return self._compiled_step
        return functools.partial(ascend_once, fused=fused)

    def _compiled_step(self, network: nn.Module, objective: Callable, clean: tuple, x_adv: Tensor, *arguments) -> Tensor:
        """`ascend_once` compiled, anew for every network and shape: of one function dynamo tolerates few recompilations."""
        key = (id(network), x_adv.shape, x_adv.stride())
        if key not in self._compiled:
            self._compiled[key] = torch.compile(own_code(ascend_once), fullgraph=True, dynamic=False)
        # autograd.grad inside a compiled function is off by default (pytorch #133230).
        with compiling("attack.backend = compiled", "attack"), torch._dynamo.config.patch(trace_autograd_ops=True):
            # Made a leaf out here: inside a compiled function torch 2.11 refuses to.
            return self._compiled[key](network, objective, clean, x_adv.detach().requires_grad_(), *arguments)


@contextlib.contextmanager
def compiling(setting: str, what: str) -> Iterator[None]:
    """Say in one sentence where torch.compile fails: on the model's own code, or for want of a compiler."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = str(error).strip().splitlines()[0]
        raise UserError(f"{setting}: torch.compile cannot compile this {what}: {cause}; use eager") from error


def own_code(function: Callable) -> Callable:
    """The function with a code object of its own, to be compiled.

    Dynamo counts recompilations by code object and gives up after eight: one attack's or training's must not use up another's.
    """
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def ascend_once(
    network: nn.Module, objective: Callable, clean: tuple, x_adv: Tensor, labels: Tensor, images: Tensor, bounds: tuple | None,
    eps: float, step_size: float, fused: Fused = PLAIN,
) -> Tensor:  # fmt: skip
    """One gradient step and projection; bounds: `ops.images.linf_bounds`, which the plain linf update needs, or None."""
    gradient = _input_gradient(network, objective, clean, x_adv, labels, fused.head)
    x_adv = x_adv.detach()
    if fused.norm is not None:
        return operators.pgd_step(x_adv, gradient, images, eps=eps, step_size=step_size, norm=fused.norm)
    if bounds is not None:
        return operators.linf_step(x_adv, gradient, bounds, step_size)
    return reference.project(reference.ascend(x_adv, gradient, step_size, "l2"), images, eps, "l2")


def _input_gradient(network, objective, clean: tuple, x_adv: Tensor, labels: Tensor, head: Callable | None) -> Tensor:
    """Of the objective's sum over the batch."""
    if not x_adv.requires_grad:
        x_adv = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        outputs = forward(network, x_adv)
        logits = first(outputs)
        by_head = head is not None and operators.heads_take(logits)
        value = None if by_head else evaluate(objective, outputs, labels, clean).sum()
    # Autocast would reach the backward pass too, and make fp32 products of the objective bf16 ones.
    with torch.autocast(x_adv.device.type, enabled=False):
        if by_head:
            return torch.autograd.grad(logits, x_adv, head(logits.detach(), labels, clean))[0]
        return torch.autograd.grad(value, x_adv)[0]


def forward(network: nn.Module, images: Tensor):
    """The network's outputs in fp32; a tensor, or a tuple of tensors whose first one is the logits."""
    outputs = network(images)
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(
            f"the model returns {type(outputs).__name__}: must be a tensor of logits, or a tuple of tensors that starts with it"
        )
    outputs = tuple(part.float() for part in parts) if isinstance(outputs, tuple) else outputs.float()
    logits = first(outputs)
    if logits.ndim != 2 or len(logits) != len(images):
        raise UserError(
            f"the model's output has shape {tuple(logits.shape)} for {len(images)} images: must be ({len(images)}, classes)"
        )
    return outputs


def first(outputs) -> Tensor:
    """The logits among a model's outputs."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def evaluate(objective: Callable, outputs, labels: Tensor, clean: tuple) -> Tensor:
    """The objective outside autocast: softmax and margins are never taken in low precision. clean: () or (clean outputs,)."""
    with torch.autocast(first(outputs).device.type, enabled=False):
        return objective(outputs, labels, *clean)
