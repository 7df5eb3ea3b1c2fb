"""Attacks captured once and replayed as CUDA graphs: no Python, no launches one by one, the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastanchor import graphs


class GraphedAttacks:
    """The captured graphs of one attack, one for every model, shape and setting that it met.

    A key holds all that a graph has frozen: shapes, strides, addresses of parameters and buffers, the attack's numbers. What is
    not in the cache is captured anew, so a changed batch size or eps never meets another one's graph.
    """

    def __init__(self) -> None:
        self._graphs = graphs.Cache()
        self._failed: dict[tuple, str] = {}

    def run(self, settings: tuple, function: Callable[[Tensor, Tensor], Tensor], model: nn.Module, network: nn.Module,
            images: Tensor, labels: Tensor, generator: torch.Generator | None) -> tuple[Tensor | None, str]:  # fmt: skip
        """`function(images, labels)`, captured on first sight, and a note; None and the reason where it cannot be captured.

        settings: everything hashable that `function` depends on. generator: where its random numbers come from. Buffers
        that the attack moves (bn="train") are as after one run, although capturing runs the function several times.
        """
        tensors = [*model.parameters(), *model.buffers()]
        key = (
            settings, id(network), id(generator), tuple(images.shape), images.stride(), images.device, graphs.pointers(tensors),
            tuple(module.training for module in model.modules()),
        )  # fmt: skip
        if key in self._failed:
            return None, self._failed[key]

        def build() -> graphs.Captured:
            return graphs.Captured(
                function, (images, labels), state=list(model.buffers()), generators=() if generator is None else (generator,),
                pool=graphs.shared_pool(images.device),
            )  # fmt: skip

        try:
            captured = self._graphs.get(key, build)
        except graphs.CaptureFailed as error:
            self._failed[key] = str(error)
            return None, str(error)
        # The graph's own output is overwritten by the next replay.
        return captured(images, labels).clone(), "yes: the whole attack is one CUDA graph"
