"""Attacks captured once and replayed as CUDA graphs: no Python, no launches one by one, the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastanchor import graphs
from fastanchor.precision import fp32_meaning


class GraphedAttacks:
    """The captured graphs of one attack, one for every model, shape and setting that it met.

    A key holds all that a graph has frozen: shapes, strides, addresses of parameters and buffers, the attack's numbers, what fp32
    means. What is not in the cache is captured anew, so a changed batch size or eps never meets another one's graph.
    """

    def __init__(self) -> None:
        self._graphs = graphs.Cache()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._failed: dict[tuple, str] = {}

    def run(
        self, settings: tuple, function: Callable[[Tensor, Tensor, torch.Generator | None], Tensor], model: nn.Module,
        network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None,
    ) -> tuple[Tensor | None, str]:  # fmt: skip
        """`function(images, labels, generator)`, captured on first sight, and a note; None and the reason where it cannot be.

        settings: everything hashable that `function` depends on. generator: where its random numbers come from. Buffers
        that the attack moves (bn="train") are as after one run, although capturing runs the function several times.
        """
        tensors = [*model.parameters(), *model.buffers()]
        key = (
            settings, id(network), generator is None, tuple(images.shape), images.stride(), images.device,
            graphs.pointers(tensors), tuple(module.training for module in model.modules()), fp32_meaning(),
        )  # fmt: skip
        if key in self._failed:
            return None, self._failed[key]

        # A graph draws from one generator for ever, callers often bring a new one: the graph's own takes on its state.
        own = None if generator is None else self._generators.setdefault(images.device, torch.Generator(images.device))

        def build() -> graphs.Captured:
            return graphs.Captured(
                lambda images, labels: function(images, labels, own), (images, labels), state=list(model.buffers()),
                generators=() if own is None else (own,), pool=graphs.shared_pool(images.device),
            )  # fmt: skip

        try:
            captured = self._graphs.get(key, build)
        except graphs.CaptureFailed as error:
            self._failed[key] = str(error)
            return None, str(error)
        if own is not None:
            own.set_state(generator.get_state())
        # The graph's own output is overwritten by the next replay.
        x_adv = captured(images, labels).clone()
        if own is not None:
            generator.set_state(own.get_state())
        return x_adv, "yes: the whole attack is one CUDA graph"
