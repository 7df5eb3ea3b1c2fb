"""How the steps of an attack are run: on the folded twin where BatchNorm allows it, compiled, or replayed as one graph.

`backend="reference"` never comes here: it is the plain loop of `fastanchor.reference` that all of this is tested against.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastanchor.attacks.graphed import GraphedAttacks
from fastanchor.errors import UserError
from fastanchor.models.folded import CannotFold, FoldedTwin, fingerprint, fold
from fastanchor.reference import attacks as reference

BACKENDS = ("auto", "reference", "eager", "compiled", "graphed")


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

    def step(self, backend: str) -> Callable:
        """`ascend_once`, compiled where asked for."""
        return self._compiled_step if backend == "compiled" else ascend_once

    def _compiled_step(self, network: nn.Module, objective: Callable, clean: tuple, x_adv: Tensor, *arguments) -> Tensor:
        """`ascend_once` compiled, anew for every network and shape: of one function dynamo tolerates few recompilations."""
        key = (id(network), x_adv.shape, x_adv.stride())
        if key not in self._compiled:
            self._compiled[key] = torch.compile(own_code(ascend_once), fullgraph=True, dynamic=False)
        # autograd.grad inside a compiled function is off by default (pytorch #133230).
        with compiling("attack.backend = compiled", "attack"), torch._dynamo.config.patch(trace_autograd_ops=True):
            return self._compiled[key](network, objective, clean, x_adv, *arguments)


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
    eps: float, step_size: float,
) -> Tensor:  # fmt: skip
    """One gradient step and projection; bounds: linf's (lower, upper) by pixel, ball and box in one, or None for l2."""
    x_adv = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        value = evaluate(objective, forward(network, x_adv), labels, clean).sum()
    (gradient,) = torch.autograd.grad(value, (x_adv,))
    x_adv = x_adv.detach()
    if bounds is not None:
        return torch.clamp(x_adv.add(gradient.sign(), alpha=step_size), *bounds)
    return reference.project(reference.ascend(x_adv, gradient, step_size, "l2"), images, eps, "l2")


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
