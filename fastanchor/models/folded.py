"""The folded twin: a network in eval mode as attacks run it, every BatchNorm that follows a convolution folded into its weights.

Bias, residual and ReLU are taken in as well. It reads the live parameters at each `refresh`; its input alone takes a gradient.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from fastanchor.precision import full_precision

# aten: convolution, then residual and ReLU in place (torch.compile fuses them). cudnn: its fused convolution-bias-ReLU.
CONV_BACKENDS = ("aten", "cudnn")

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_ADDS = (operator.add, torch.add, "add", "add_")  # torch.fx makes x += y an operator.add
# How far a twin's outputs and input gradients may be from its model's: rounding through a deep net (in a gradient also ReLUs
# that it switches), far below what a wrongly rewritten graph shows.
_TOLERANCES = {torch.float64: (1e-6, 1e-3), torch.float32: (1e-3, 0.2), torch.bfloat16: (5e-2, 0.5)}


class CannotFold(Exception):
    """The network has no folded twin; the message says why. Attacks then run on the network itself."""


class Norm(NamedTuple):
    """A BatchNorm in eval mode, as tensors (C,) of the model itself; weight and bias None where it has none."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class FoldedConv(nn.Module):
    """act(conv(x, w * s) + b [+ residual]), s = gamma / sqrt(var + eps), b = beta + (conv bias - mean) * s: eval-mode BatchNorm.

    weight and bias are this layer's own memory, written in place by `refresh` from the convolution and BatchNorm it was made of.
    """

    def __init__(self, conv: nn.Conv2d, norm: Norm | None):
        super().__init__()
        # In a tuple: they stay the model's modules and do not become this one's.
        self.sources = (conv, norm)
        self.relu = False
        self.geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.backend = "aten"

    def allocate(self, dtype: torch.dtype | None, backend: str) -> None:
        """Memory for the folded weights; `dtype` (None: the parameters') is also that of the layer's input and output."""
        conv, norm = self.sources
        self.backend = backend
        self.weight = torch.empty_like(conv.weight, dtype=dtype, memory_format=torch.channels_last, requires_grad=False)
        has_bias = conv.bias is not None or norm is not None
        self.bias = self.weight.new_empty(conv.out_channels) if has_bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        residual = None if residual is None else residual.to(self.weight.dtype)
        if self.backend == "cudnn" and (residual is None or residual.shape == self._output_shape(x)):
            return _FusedConv.apply(x, residual, self)
        out = F.conv2d(x, self.weight, self.bias, *self.geometry)
        # In place: nobody else has the convolution's output, and no backward to the input needs it.
        if residual is not None:
            out = out.add_(residual) if out.shape == residual.shape else out + residual
        return F.relu_(out) if self.relu else out

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        sides = zip(x.shape[2:], self.weight.shape[2:], *self.geometry[:3], strict=True)
        return (len(x), len(self.weight), *((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides))


class _FusedConv(torch.autograd.Function):
    """Convolution, bias, residual and ReLU in one pass; backward to the input and the residual alone."""

    @staticmethod
    def forward(ctx, x, residual, layer):
        out = _run_cudnn(x, residual, layer)
        ctx.layer = layer
        ctx.save_for_backward(x, out if layer.relu else None)
        return out

    @staticmethod
    def backward(ctx, gradient):
        layer, (x, out) = ctx.layer, ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0) if layer.relu else gradient
        to_input, _, _ = torch.ops.aten.convolution_backward(
            gradient, x, layer.weight, None, *layer.geometry[:3], False, (0, 0), layer.geometry[3], (True, False, False)
        )
        return to_input, gradient if ctx.needs_input_grad[1] else None, None


def _run_cudnn(x: Tensor, residual: Tensor | None, layer: FoldedConv) -> Tensor:
    weight, bias, geometry = layer.weight, layer.bias, layer.geometry
    if not layer.relu or bias is None:
        out = torch.ops.aten.convolution(x, weight, bias, *geometry[:3], False, (0, 0), geometry[3])
        out = out if residual is None else out.add_(residual)
        return out.relu_() if layer.relu else out
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


class FoldedTwin(nn.Module):
    """`FoldedTwin(model)(images)` equals `model(images)` in eval mode to rounding; made by `fold`.

    layers: the FoldedConv of every convolution. folded, kept: counts of BatchNorms folded away and left as they are.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parts, self.identity = list(_parts(model)), fingerprint(model)
        graph, modules = _trace(model)
        _simplify(graph, modules)
        self.layers = _rewrite(graph, modules)
        self.folded = sum(layer.sources[1] is not None for layer in self.layers)
        self.kept = sum(_norm_of(node, modules) is not None for node in graph.nodes)
        self.graph_module = fx.GraphModule(modules, graph)

    def allocate(self, dtype: torch.dtype | None, backend: str) -> None:
        """Set dtype (None: each convolution's own) and backend of all convolutions, and refresh."""
        for layer in self.layers:
            layer.allocate(dtype, backend)
        self.refresh()

    def is_of(self, model: nn.Module) -> bool:
        """Whether modules, parameters, buffers and settings of `model` are still those that the twin was made of."""
        return not has_hooks(model) and self.identity == fingerprint(model)

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold the parameters and running statistics as they are now, in their own precision, then cast."""
        scales = iter(_scales([layer.sources[1] for layer in self.layers if layer.sources[1] is not None]))
        for layer in self.layers:
            conv, norm = layer.sources
            if norm is None:
                layer.weight.copy_(conv.weight)
                if conv.bias is not None:
                    layer.bias.copy_(conv.bias)
                continue
            scale = next(scales)
            # Multiplied in the parameters' precision and rounded once. Not by out=, which on a CPU casts six times as slowly.
            layer.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
            mean = norm.mean if conv.bias is None else norm.mean - conv.bias
            layer.bias.copy_(-mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1))

    def forward(self, images: Tensor):
        return self.graph_module(images)


def fold(model: nn.Module, example: Tensor, dtype: torch.dtype | None = None, backend: str = "aten") -> FoldedTwin:
    """The refreshed twin of `model`, whose eval-mode outputs and input gradients it reproduces on `example` (N, C, H, W).

    dtype: of the convolutions' weights and activations (None: the parameters'; another one is for calls under autocast).
    backend: one of CONV_BACKENDS. The model must be in eval mode, as `attacks.modes.attack_mode` puts it, and stays as it is.
    Raises CannotFold where torch.fx cannot trace it, or traced another function (checking that reads back: not for a step).
    """
    if has_hooks(model):
        raise CannotFold("it has hooks, which must see every call")
    if any(module.training for module in model.modules()):
        raise CannotFold("it or a part of it is in train mode")
    with torch.random.fork_rng([example.device] if example.is_cuda else []), full_precision():
        drawn = _random_state(example.device)
        with _attributes_kept(model):
            twin = FoldedTwin(model)
        if not twin.layers:
            raise CannotFold("it has no convolution that could be folded")
        if unknown := {layer.sources[0].weight.dtype for layer in twin.layers} - _TOLERANCES.keys():
            raise CannotFold(f"its convolutions are {unknown.pop()}")
        # The rewriting is checked in the parameters' own precision, where a wrong graph cannot hide behind rounding.
        twin.allocate(None, "aten")
        _verify(model, twin, example)
        if not all(map(torch.equal, _random_state(example.device), drawn)):
            raise CannotFold("its forward draws random numbers")
    if dtype is not None or backend != "aten":
        twin.allocate(dtype, backend)
    return twin


def has_hooks(model: nn.Module) -> bool:
    """Whether a forward of the model calls more than its modules."""
    return any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
               for module in model.modules())  # fmt: skip


def _parts(model: nn.Module) -> Iterator[object]:
    """What a fingerprint knows by its id, to be kept so that no id is used again; without the model itself, which stays free."""
    for module in model.modules():
        if module is not model:
            yield module
        yield from (v for v in vars(module).values() if not isinstance(v, nn.Module) and not hasattr(v, "__self__"))
    yield from model.parameters()
    yield from model.buffers()


def fingerprint(model: nn.Module) -> tuple:
    """All that a forward of the model may depend on besides the values in its tensors: modules, tensors, settings, hooks."""
    return tuple((type(module), _content(vars(module))) for module in model.modules())


def _content(value: object, depth: int = 4) -> object:
    """Settings by value, through containers; tensors by identity and by where `model.to(...)` put them; others by identity."""
    if isinstance(value, Tensor):
        return id(value), value.device, value.dtype
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if depth and isinstance(value, dict):
        return tuple((id(key) if isinstance(key, Tensor) else key, _content(item, depth - 1)) for key, item in value.items())
    if depth and isinstance(value, (list, tuple)):
        return tuple(_content(item, depth - 1) for item in value)
    return (id(value), len(value)) if isinstance(value, (dict, list, tuple, set)) else id(value)


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
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


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class _Tracer(fx.Tracer):
    """Buffers are part of the graph as parameters are: what a forward computes from them is computed anew, not frozen."""

    proxy_buffer_attributes = True
    device = "cpu"

    def create_node(self, *args, **kwargs):
        # The graph would not hold under which of these an operation ran.
        if not (torch.is_grad_enabled() and torch.is_autocast_enabled(self.device)):
            raise RuntimeError("its forward switches gradients or autocast")
        return super().create_node(*args, **kwargs)


def _trace(model: nn.Module) -> tuple[fx.Graph, dict[str, nn.Module | Tensor]]:
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
    return graph, {name: operator.attrgetter(name)(whole) for name in names}


def _rewrite(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[FoldedConv]:
    """Put a FoldedConv in the place of every convolution and take in what follows it; returns them."""
    layers = []
    for node in list(graph.nodes):
        conv = modules.get(node.target) if node.op == "call_module" else None
        if not _is_plain(conv, nn.Conv2d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str) or len(node.args) != 1:
            continue
        chain, residual = [node], None
        following = _following(chain, modules)
        norm = None if following is None else _norm_of(following, modules)
        layer = FoldedConv(conv, norm)
        if norm is not None:
            chain.append(following)
            following = _following(chain, modules)
        if following is not None and _is_add(following, chain[-1], modules):
            residual = next(arg for arg in following.args if arg is not chain[-1])
            chain.append(following)
            following = _following(chain, modules)
        if following is not None and _is_relu(following, modules):
            layer.relu = True
            chain.append(following)
        modules[f"folded_{len(layers)}"] = layer
        # At the place of the last operation taken in: there the residual is known.
        with graph.inserting_after(chain[-1]):
            fused = graph.call_module(f"folded_{len(layers)}", (*node.args, *([] if residual is None else [residual])))
        layers.append(layer)
        chain[-1].replace_all_uses_with(fused)
        # Only what was taken in: a general removal of dead code could drop an operation in place whose result nobody names.
        for taken in reversed(chain):
            graph.erase_node(taken)
    graph.lint()
    return layers


def _following(chain: list[fx.Node], modules: dict[str, nn.Module]) -> fx.Node | None:
    """The only user of the chain's last value, if the chain may run as late as that: nothing before it writes into a tensor."""
    user = next(iter(chain[-1].users)) if len(chain[-1].users) == 1 else None
    node = chain[0].next
    while user is not None and node is not user and (node in chain or not _writes(node, modules)):
        node = node.next
    return user if node is user else None


def _writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the operation may work in place: x.add_(1), F.relu(x, inplace=True), nn.ReLU(inplace=True)."""
    if node.op == "call_module":
        return getattr(modules[node.target], "inplace", False)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    flagged = any(value is True for value in (*node.args[1:], node.kwargs.get("inplace"))) or "out" in node.kwargs
    return name.endswith("_") or flagged


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Of this kind, nothing of its forward overridden; parametrised weights are fine, they are read live."""
    own = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
    return own and isinstance(module, kind) and "forward" not in vars(module)


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    called = node.op in ("call_function", "call_method") and node.target in _RELUS
    return called or (node.op == "call_module" and _is_plain(modules[node.target], nn.ReLU))


def _is_add(node: fx.Node, value: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A sum of `value` and another value of the graph, without a factor; in place it must write into `value`, not the other."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDS or node.kwargs or len(node.args) != 2:
        return False
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return False
    return first is value or not _writes(node, modules)


def _norm_of(node: fx.Node, modules: dict[str, nn.Module]) -> Norm | None:
    """The BatchNorm that this node is: a module's, or a call of F.batch_norm on the model's own tensors."""
    if node.op == "call_module":
        norm = modules[node.target]
        # The tensors of a parametrised one are made anew by every look at them.
        if not _is_plain(norm, nn.BatchNorm2d) or norm.running_mean is None or is_parametrized(norm):
            return None
        return Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    if node.target is not F.batch_norm:
        return None
    call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    nodes = [call.arguments[name] for name in ("running_mean", "running_var", "weight", "bias")]
    known = all(given is None or (isinstance(given, fx.Node) and given.op == "get_attr") for given in nodes)
    if not known or nodes[0] is None or call.arguments["training"] is not False:
        return None
    return Norm(*(None if given is None else modules[given.target] for given in nodes), call.arguments["eps"])


def _simplify(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Take out identities and assertions about shapes, which stand between a convolution and what follows it."""
    questions = (getattr, operator.eq, operator.ne, operator.getitem)
    for node in reversed(list(graph.nodes)):
        called = node.target if node.op == "call_function" else None
        if called is torch._assert or (called in questions and not node.users):
            graph.erase_node(node)
        elif node.op == "call_module" and _is_plain(modules[node.target], nn.Identity):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif node.op == "call_method" and node.target == "view":
            # Activations are channels-last here, of which `view` cannot make all shapes.
            sharing = (*node.users, *node.args[0].users)
            node.target = "view" if any(_writes(user, modules) for user in sharing) else "reshape"


def _scales(norms: list[Norm]) -> list[Tensor]:
    """gamma / sqrt(var + eps) of every norm, in a few launches for all of them."""
    if not norms:
        return []
    scales = torch._foreach_add([norm.var for norm in norms], [norm.eps for norm in norms])
    torch._foreach_rsqrt_(scales)
    affine = [(scale, norm.weight) for scale, norm in zip(scales, norms, strict=True) if norm.weight is not None]
    if affine:
        torch._foreach_mul_(*map(list, zip(*affine, strict=True)))
    return scales


def _verify(model: nn.Module, twin: FoldedTwin, example: Tensor) -> None:
    """Raise CannotFold where the twin's outputs or input gradients differ from the model's by more than rounding."""
    of_outputs, of_gradient = max(_TOLERANCES[layer.weight.dtype] for layer in twin.layers)
    try:
        theirs, their_gradient = _outputs_and_gradient(model, example)
        ours, our_gradient = _outputs_and_gradient(twin, example.contiguous(memory_format=torch.channels_last))
    except Exception as error:  # whatever the model itself raises, it will raise again where it is attacked
        raise CannotFold(f"it or its traced graph fails: {str(error).strip().partition(chr(10))[0] or repr(error)}") from error
    pairs = [*((a, b, of_outputs) for a, b in zip(theirs, ours, strict=True)), (their_gradient, our_gradient, of_gradient)]
    if not all(a.isfinite().all() for a, _, _ in pairs):
        raise CannotFold("its outputs or input gradients are not finite")
    if any(a.shape != b.shape or a.dtype != b.dtype or not (a - b).norm() <= tolerance * a.norm() for a, b, tolerance in pairs):
        raise CannotFold("what torch.fx traced is another function: something in it depends on more than its input")


def _outputs_and_gradient(model: nn.Module, example: Tensor) -> tuple[list[Tensor], Tensor]:
    x = example.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = model(x)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        # Different weights for all outputs: a plain sum would not see two of them exchanged.
        total = sum((out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum() for out in outputs)
    return [out.detach() for out in outputs], torch.autograd.grad(total, x)[0]
