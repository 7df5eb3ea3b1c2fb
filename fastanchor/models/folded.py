"""The folded twin: a network in eval mode as attacks run it, every BatchNorm that follows a convolution folded into its weights.

Bias, residual and ReLU are taken in as well. It reads the live parameters at each `refresh`; its input alone takes a gradient.
"""

from __future__ import annotations

import inspect
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parallel import DataParallel
from torch.nn.utils.parametrize import is_parametrized

from fastanchor.errors import UserError
from fastanchor.models.fingerprint import fingerprint, has_hooks, parts, unwrapped
from fastanchor.models.tracing import CannotFold, attributes_kept, is_plain, trace, writes
from fastanchor.ops import folding
from fastanchor.precision import full_precision, wrong_dtype
from fastanchor.reference.checks import check_name

# aten: convolution, then residual and ReLU in place (torch.compile fuses them). cudnn: its fused convolution-bias-ReLU.
# triton: convolution, then bias, residual and ReLU in one kernel, and another for the ReLU's backward.
CONV_BACKENDS = ("aten", "cudnn", "triton")

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_ADDS = (operator.add, torch.add, "add", "add_")  # torch.fx makes x += y an operator.add
# How far a twin's outputs and input gradients may be from its model's: rounding through a deep net (in a gradient also ReLUs
# that it switches), far below what a wrongly rewritten graph shows.
_TOLERANCES = {torch.float64: (1e-6, 1e-3), torch.float32: (1e-3, 0.2), torch.bfloat16: (5e-2, 0.5)}


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
        if self.backend != "aten" and (residual is None or residual.shape == self._output_shape(x)):
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
        out = _run_cudnn(x, residual, layer) if layer.backend == "cudnn" else _run_triton(x, residual, layer)
        ctx.layer = layer
        ctx.save_for_backward(x, out if layer.relu else None)
        return out

    @staticmethod
    def backward(ctx, gradient):
        layer, (x, out) = ctx.layer, ctx.saved_tensors
        gradient = _before_relu(gradient, out, layer.backend) if layer.relu else gradient
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


def _run_triton(x: Tensor, residual: Tensor | None, layer: FoldedConv) -> Tensor:
    from fastanchor.kernels.epilogue import epilogue_

    out = torch.ops.aten.convolution(x, layer.weight, None, *layer.geometry[:3], False, (0, 0), layer.geometry[3])
    if residual is not None and residual.stride() != out.stride():
        residual = torch.empty_like(out).copy_(residual)
    return epilogue_(out, layer.bias, residual, layer.relu)


def _before_relu(gradient: Tensor, out: Tensor, backend: str) -> Tensor:
    # A gradient of another layout, as that of a mean over positions, would have to be copied for the kernel.
    if backend != "triton" or gradient.stride() != out.stride():
        return torch.ops.aten.threshold_backward(gradient, out, 0)
    from fastanchor.kernels.epilogue import relu_backward

    return relu_backward(gradient, out)


class FoldedTwin(nn.Module):
    """`FoldedTwin(model)(images)` equals `model(images)` in eval mode to rounding; made by `fold`.

    layers: the FoldedConv of every convolution. folded, kept: counts of BatchNorms folded away and left as they are.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parts, self.identity = list(parts(model)), fingerprint(model)
        graph, modules = trace(model)
        self.layers = _rewrite(graph, modules)
        self.folded = sum(layer.sources[1] is not None for layer in self.layers)
        self.kept = sum(_norm_of(node, modules) is not None for node in graph.nodes)
        self.graph_module = fx.GraphModule(modules, graph)
        self._refresh = folding.Refresh(self.layers)

    def allocate(self, dtype: torch.dtype | None, backend: str) -> None:
        """Set dtype (None: each convolution's own) and backend of all convolutions, and refresh. Raises UserError."""
        check_name("backend", backend, CONV_BACKENDS)
        if backend == "triton":
            dtypes = {layer.sources[0].weight.dtype if dtype is None else dtype for layer in self.layers}
            trusted, reason = folding.trusted("conv_epilogue", self.layers[0].sources[0].weight.device)
            if not trusted or dtypes - {torch.float32, torch.bfloat16}:
                raise UserError(f"backend = 'triton': {reason if not trusted else 'the convolutions must be fp32 or bf16'}")
        for layer in self.layers:
            layer.allocate(dtype, backend)
        self.refresh()

    def is_of(self, model: nn.Module) -> bool:
        """Whether modules, parameters, buffers and settings of `model` are still those that the twin was made of."""
        return not has_hooks(model) and self.identity == fingerprint(model)

    def refresh(self, kernel: bool = True) -> None:
        """Fold the parameters and running statistics as they are now, in their own precision, then cast.

        kernel: by one launch where `ops.folding` trusts its kernel, which agrees with plain torch to 1e-6 of a sum's largest
        term. The first call on a device checks that; later ones never wait for the device.
        """
        self._refresh(kernel)

    @property
    def refresh_note(self) -> str:
        """Whether the last refresh was one launch, and why."""
        return self._refresh.note

    def forward(self, images: Tensor):
        return self.graph_module(images)


def fold(model: nn.Module, example: Tensor, dtype: torch.dtype | None = None, backend: str = "aten") -> FoldedTwin:
    """The refreshed twin of `model`, whose eval-mode outputs and input gradients it reproduces on `example` (N, C, H, W).

    dtype: of the convolutions' weights and activations (None: the parameters'; another one is for calls under autocast).
    backend: one of CONV_BACKENDS. The model must be in eval mode, as `attacks.modes.attack_mode` puts it, and stays as it is.
    Of a wrapper for parallel training, the module that it wraps is folded: this process attacks its own images alone.
    Raises CannotFold where torch.fx cannot trace it, or traced another function (checking that reads back: not for a step), and
    UserError for a bad backend, or where without autocast (dtype None) a model of another dtype does not take the images.
    """
    if has_hooks(model):
        raise CannotFold("it has hooks, which must see every call")
    if any(module.training for module in model.modules()):
        raise CannotFold("it or a part of it is in train mode")
    model = unwrapped(model)
    if isinstance(model, DataParallel):
        raise CannotFold(f"DataParallel spreads it over {len(model.device_ids)} devices")
    with torch.random.fork_rng([example.device] if example.is_cuda else []), full_precision():
        drawn = _random_state(example.device)
        with attributes_kept(model):
            twin = FoldedTwin(model)
        if not twin.layers:
            raise CannotFold("it has no convolution that could be folded")
        if unknown := {layer.sources[0].weight.dtype for layer in twin.layers} - _TOLERANCES.keys():
            raise CannotFold(f"its convolutions are {unknown.pop()}")
        # The rewriting is checked in the parameters' own precision, where a wrong graph cannot hide behind rounding.
        twin.allocate(None, "aten")
        _verify(model, twin, example, dtype is not None)
        if not all(map(torch.equal, _random_state(example.device), drawn)):
            raise CannotFold("its forward draws random numbers")
    if dtype is not None or backend != "aten":
        twin.allocate(dtype, backend)
    return twin


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _rewrite(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[FoldedConv]:
    """Put a FoldedConv in the place of every convolution and take in what follows it; returns them."""
    layers = []
    for node in list(graph.nodes):
        conv = modules.get(node.target) if node.op == "call_module" else None
        if not is_plain(conv, nn.Conv2d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str) or len(node.args) != 1:
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
    while user is not None and node is not user and (node in chain or not writes(node, modules)):
        node = node.next
    return user if node is user else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    called = node.op in ("call_function", "call_method") and node.target in _RELUS
    return called or (node.op == "call_module" and is_plain(modules[node.target], nn.ReLU))


def _is_add(node: fx.Node, value: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A sum of `value` and another value of the graph, without a factor; in place it must write into `value`, not the other."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDS or node.kwargs or len(node.args) != 2:
        return False
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return False
    return first is value or not writes(node, modules)


def _norm_of(node: fx.Node, modules: dict[str, nn.Module]) -> Norm | None:
    """The BatchNorm that this node is: a module's, or a call of F.batch_norm on the model's own tensors."""
    if node.op == "call_module":
        norm = modules[node.target]
        # The tensors of a parametrised one are made anew by every look at them.
        if not is_plain(norm, nn.BatchNorm2d) or norm.running_mean is None or is_parametrized(norm):
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


def _verify(model: nn.Module, twin: FoldedTwin, example: Tensor, autocast: bool = False) -> None:
    """Raise CannotFold where the twin's outputs or input gradients differ from the model's by more than rounding.

    autocast: whether it will be called under autocast, where a model of another dtype than the images' may take them.
    """
    of_outputs, of_gradient = max(_TOLERANCES[layer.weight.dtype] for layer in twin.layers)
    try:
        theirs, their_gradient = _outputs_and_gradient(model, example)
        ours, our_gradient = _outputs_and_gradient(twin, example.contiguous(memory_format=torch.channels_last))
    except Exception as error:  # whatever the model itself raises, it will raise again where it is attacked
        others = {parameter.dtype for parameter in model.parameters()} - {example.dtype}
        if not autocast and any(_takes(model, example.to(dtype)) for dtype in others):
            raise wrong_dtype(model, example.dtype) from error
        raise CannotFold(f"it or its traced graph fails: {str(error).strip().partition(chr(10))[0] or repr(error)}") from error
    pairs = [*((a, b, of_outputs) for a, b in zip(theirs, ours, strict=True)), (their_gradient, our_gradient, of_gradient)]
    if not all(a.isfinite().all() for a, _, _ in pairs):
        raise CannotFold("its outputs or input gradients are not finite")
    if any(a.shape != b.shape or a.dtype != b.dtype or not (a - b).norm() <= tolerance * a.norm() for a, b, tolerance in pairs):
        raise CannotFold("what torch.fx traced is another function: something in it depends on more than its input")


def _takes(model: nn.Module, images: Tensor) -> bool:
    try:
        _outputs_and_gradient(model, images)
    except Exception:  # the model's own code, given images that it may never have seen
        return False
    return True


def _outputs_and_gradient(model: nn.Module, example: Tensor) -> tuple[list[Tensor], Tensor]:
    x = example.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = model(x)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        # Different weights for all outputs: a plain sum would not see two of them exchanged.
        total = sum((out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum() for out in outputs)
    return [out.detach() for out in outputs], torch.autograd.grad(total, x)[0]
