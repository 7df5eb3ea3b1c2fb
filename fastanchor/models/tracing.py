"""The graph of a model's forward by torch.fx, with the model left as it was; or why there is none."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn


class CannotFold(Exception):
    """The network has no folded twin; the message says why. Attacks then run on the network itself."""


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Raise CannotFold where tracing changes a module's attributes or lists, and put them back: a proxy left there breaks it."""

    def members(container) -> list[int]:
        return sorted(map(id, (*container, *(container.values() if isinstance(container, dict) else ()))))

    held = [(v, copy.copy(v)) for m in model.modules() for v in (vars(m), *vars(m).values()) if isinstance(v, (list, dict, set))]
    try:
        yield
    finally:
        changed = [(now, old) for now, old in held if members(now) != members(old)]
        for now, old in changed:
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(old)
    if changed:
        raise CannotFold("its forward changes attributes of its own")


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, nn.Module | Tensor]]:
    """The model's graph with its first argument alone as input, and what the graph refers to by name."""
    whole = nn.Sequential(model)  # so further arguments keep their defaults
    tracer = _Tracer()
    tracer.device = next(model.parameters(), torch.empty(0)).device.type
    try:
        with torch.enable_grad(), torch.autocast(tracer.device, torch.bfloat16):
            graph = tracer.trace(whole)
    except Exception as error:  # whatever the model's own Python code raises when it is given a proxy
        raise CannotFold(f"torch.fx cannot trace it: {str(error).strip().partition(chr(10))[0] or repr(error)}") from error
    names = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
    modules = {name: operator.attrgetter(name)(whole) for name in names}
    _simplify(graph, modules)
    return graph, modules


class _Tracer(fx.Tracer):
    """Buffers are part of the graph as parameters are: what a forward computes from them is computed anew, not frozen."""

    proxy_buffer_attributes = True
    device = "cpu"

    def create_node(self, *args, **kwargs):
        # The graph would not hold under which of these an operation ran.
        if not (torch.is_grad_enabled() and torch.is_autocast_enabled(self.device)):
            raise RuntimeError("its forward switches gradients or autocast")
        return super().create_node(*args, **kwargs)


def _simplify(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Take out identities and assertions about shapes, which stand between a convolution and what follows it."""
    questions = (getattr, operator.eq, operator.ne, operator.getitem)
    for node in reversed(list(graph.nodes)):
        called = node.target if node.op == "call_function" else None
        if called is torch._assert or (called in questions and not node.users):
            graph.erase_node(node)
        elif node.op == "call_module" and is_plain(modules[node.target], nn.Identity):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif node.op == "call_method" and node.target == "view":
            # Activations are channels-last here, of which `view` cannot make all shapes.
            sharing = (*node.users, *node.args[0].users)
            node.target = "view" if any(writes(user, modules) for user in sharing) else "reshape"


def writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the operation may work in place: x.add_(1), F.relu(x, inplace=True), nn.ReLU(inplace=True)."""
    if node.op == "call_module":
        return getattr(modules[node.target], "inplace", False)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    flagged = any(value is True for value in (*node.args[1:], node.kwargs.get("inplace"))) or "out" in node.kwargs
    return name.endswith("_") or flagged


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Of this kind, nothing of its forward overridden; parametrised weights are fine, they are read live."""
    own = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
    return own and isinstance(module, kind) and "forward" not in vars(module)
