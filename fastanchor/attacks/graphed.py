"""Attacks captured once and replayed as CUDA graphs: no Python, no launches one by one, the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastanchor import graphs
from fastanchor.models.fingerprint import fingerprint, has_hooks
from fastanchor.precision import fp32_meaning


class GraphedAttacks:
    """The captured graphs of one attack, one for every model, shape and setting that it met.

    A key holds what a graph has frozen: shapes, strides, addresses of parameters and buffers, the model's settings, the attack's
    numbers, what fp32 means. What is not in the cache is captured anew: a changed batch size or eps never meets another's graph.
    What a callable objective holds besides is its caller's business: `auto` captures none, "graphed" takes it as constant.
    """

    def __init__(self) -> None:
        self._graphs = graphs.Cache()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._failed: dict[tuple, str] = {}

    def run(
        self, settings: tuple, function: Callable[..., Tensor], model: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...],
        generator: torch.Generator | None,
    ) -> tuple[Tensor | None, str]:  # fmt: skip
        """`function(*inputs, generator=)`, captured on first sight, and a note; None and the reason where it cannot be.

        inputs: the images, their labels, and whatever else changes from call to call. settings: everything hashable that
        `function` depends on besides. generator: where its random numbers come from. Buffers that the attack moves (bn="train")
        are as after one run, although capturing runs the function several times.
        """
        device = inputs[0].device
        if has_hooks(model):
            return None, "the model has hooks, which must see every call"
        if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
            return None, "inside torch.autocast, whose cast weights a graph would keep"
        tensors = [*model.parameters(), *model.buffers()]
        key = (
            settings, id(network), generator is None, tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in inputs),
            graphs.pointers(tensors), fingerprint(model), fp32_meaning(),
        )  # fmt: skip
        if key in self._failed:
            return None, self._failed[key]

        # A graph draws from one generator for ever, callers often bring a new one: the graph's own takes on its state.
        if generator is not None and device not in self._generators:
            self._generators[device] = torch.Generator(device)
        own = None if generator is None else self._generators[device]

        def build() -> graphs.Captured:
            return graphs.Captured(
                lambda *inputs: function(*inputs, generator=own), inputs, state=list(model.buffers()),
                generators=() if own is None else (own,), pool=graphs.shared_pool(device),
            )  # fmt: skip

        try:
            captured = self._graphs.get(key, build)
        except graphs.CaptureFailed as error:
            if "OutOfMemory" not in str(error):  # which may pass
                self._failed[key] = str(error)
            return None, str(error)
        if own is not None:
            own.set_state(generator.get_state())
        # The graph's own output is overwritten by the next replay.
        x_adv = captured(*inputs).clone()
        if own is not None:
            generator.set_state(own.get_state())
        return x_adv, "the whole attack is one CUDA graph"
