"""Hard-positive SupCon as one operator, so that `torch.compile(fullgraph=True)` sees one node; and whether its kernels serve.

The CUDA implementation is `fastanchor.kernels`, the CPU implementation the reference. Autograd is a Function around the operator,
the cheapest of the ways to attach it; the operator itself has none.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastanchor import kernels
from fastanchor.kernels import config, limits
from fastanchor.ops.library import LIBRARY
from fastanchor.ops.supcon_check import Variant
from fastanchor.ops.verified import switch, verified
from fastanchor.reference.hard_supcon import hard_supcon as reference

TENSORS = ("anchors", "views", "positive_coef", "denominator_mask", "instances", "predictions", "ref_labels", "ref_views",
           "ref_instances", "ref_predictions")  # fmt: skip
SETTINGS = {
    "temperature": 0.1, "weight": "exp", "gamma": 1.0, "k": 8, "detach_weights": True, "normalizer": "sum", "denominator": "all",
    "hard_negative_beta": 0.0, "selection": "all", "detach_keys": False, "scale": 1.0, "reduction": "mean_valid",
    "precision": "fp16",
}  # fmt: skip

LIBRARY.define(
    "hard_supcon(Tensor embeddings, Tensor? ref_embeddings, Tensor labels, float beta, Tensor? beta_tensor, "
    + "".join(f"Tensor? {name}, " for name in TENSORS)
    + "".join(f"{type(value).__name__} {name}, " for name, value in SETTINGS.items())
    + "Tensor? upstream, bool need_grad, bool need_ref_grad) -> (Tensor loss, Tensor grad, Tensor ref_grad)"
)


def hard_supcon(
    embeddings: Tensor, labels: Tensor, *, beta: float | Tensor = 2.0, ref_embeddings: Tensor | None = None, **options
) -> Tensor:
    """The reference's `hard_supcon`, by the kernels on CUDA and by the reference itself on a CPU.

    embeddings (N, D), labels (N,), ref_embeddings (M, D) or None; options as in the reference, of which `anchors` only as an
    (N,) bool tensor, and `precision` ("fp16" | "tf32" | "ieee") of the unit rows that the kernels store. Not checked.
    A scalar reduction computes its gradient with the loss and keeps it: (N + M) D fp32 numbers. For "none", whose upstream
    gradient is a vector, the backward pass begins anew. Gradients go to embeddings and ref_embeddings, and only once: a second
    derivative raises RuntimeError.
    Returns fp32 (fp64 for fp64 rows): a 0-d tensor, or (N,) for "none".
    """
    if unknown := options.keys() - {*TENSORS, *SETTINGS}:
        raise TypeError(f"hard_supcon() got an unexpected keyword argument {min(unknown)!r}")
    number, tensor = (0.0, beta) if isinstance(beta, Tensor) else (float(beta), None)
    settings = {name: options.get(name, value) for name, value in SETTINGS.items()}
    for name in ("temperature", "gamma", "hard_negative_beta", "scale"):
        settings[name] = float(settings[name])
    # A gradient kept in fp16 before the upstream gradient (a loss scaler's, say) is known could underflow.
    dtype = _computed_in(embeddings, ref_embeddings)
    u, keys = embeddings.to(dtype), None if ref_embeddings is None else ref_embeddings.to(dtype)
    grad_mode = torch.is_grad_enabled()
    needs = (
        grad_mode and u.requires_grad,
        grad_mode and keys is not None and keys.requires_grad and not settings["detach_keys"],
    )
    function = _Rows if settings["reduction"] == "none" else _Scalar
    return function.apply(u, keys, needs, labels, number, tensor, *(options.get(name) for name in TENSORS), *settings.values())


def _computed_in(embeddings: Tensor, ref_embeddings: Tensor | None) -> torch.dtype:
    fp64 = torch.float64 in (embeddings.dtype, embeddings.dtype if ref_embeddings is None else ref_embeddings.dtype)
    return torch.float64 if fp64 else torch.float32


def _operator(*arguments):
    return torch.ops.fastanchor.hard_supcon(*arguments)


class _Scalar(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, keys, needs, *arguments):
        ctx.needs, ctx.others = needs, len(arguments)
        loss, grad, ref_grad = _operator(u, keys, *arguments, None, *needs)
        ctx.save_for_backward(u, keys, grad, ref_grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        u, keys, grad, ref_grad = ctx.saved_tensors
        with torch.no_grad():
            grads = grad * upstream, ref_grad * upstream
        return *_final(ctx.needs, grads, u, keys, upstream), *[None] * (1 + ctx.others)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, keys, needs, *arguments):
        tensors, settings = arguments[: 3 + len(TENSORS)], arguments[3 + len(TENSORS) :]
        labels, beta, *others = tensors
        ctx.needs, ctx.beta, ctx.settings, ctx.others = needs, beta, settings, len(arguments)
        ctx.save_for_backward(u, keys, labels, *others)
        return _operator(u, keys, *arguments, None, False, False)[0]

    @staticmethod
    def backward(ctx, upstream):
        u, keys, labels, *others = ctx.saved_tensors
        with torch.no_grad():
            grads = _operator(u, keys, labels, ctx.beta, *others, *ctx.settings, upstream.contiguous(), *ctx.needs)[1:]
        return *_final(ctx.needs, grads, u, keys, upstream), *[None] * (1 + ctx.others)


def _final(needs: tuple[bool, bool], grads: tuple[Tensor, Tensor], *causes: Tensor | None) -> list[Tensor | None]:
    """The gradients that were wanted; with create_graph they raise where they are to be differentiated.

    `once_differentiable` would do so only where the upstream gradient has a graph: a penalty on the gradient of a sum of losses
    would lose this loss's share without a word.
    """
    refuse = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return [(_Refuse.apply(g, *causes) if refuse else g) if wanted else None for g, wanted in zip(grads, needs, strict=True)]


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, *causes):
        return grad.clone()

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("the gradient of hard_supcon's operator cannot be differentiated again; backend='torch' can")


# ---------------------------------------------------------------- implementations


class _Arguments(NamedTuple):
    labels: Tensor
    beta: float | Tensor
    tensors: dict[str, Tensor | None]
    settings: dict
    upstream: Tensor | None
    need_grad: bool
    need_ref_grad: bool


def _named(labels, beta, beta_tensor, *rest) -> _Arguments:
    tensors = dict(zip(TENSORS, rest, strict=False))
    settings = dict(zip(SETTINGS, rest[len(TENSORS) :], strict=False))
    return _Arguments(labels, beta if beta_tensor is None else beta_tensor, tensors, settings, *rest[-3:])


@contextlib.contextmanager
def _autograd_inside():
    """Autograd in an operator's implementation, also where its caller (a dispatch mode, a compiled graph) is below autograd."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


@torch.library.impl(LIBRARY, "hard_supcon", "CPU")
def _on_cpu(embeddings, ref_embeddings, *rest):
    given = _named(*rest)
    settings = {name: value for name, value in given.settings.items() if name != "precision"}
    with _autograd_inside():
        x = embeddings.detach().requires_grad_(given.need_grad)
        keys = None if ref_embeddings is None else ref_embeddings.detach().requires_grad_(given.need_ref_grad)
        loss = reference(x, given.labels, beta=given.beta, ref_embeddings=keys, **given.tensors, **settings)
        wanted = [tensor for tensor, need in ((x, given.need_grad), (keys, given.need_ref_grad)) if need]
        grads = list(torch.autograd.grad(loss, wanted, given.upstream)) if wanted else []
    grad = grads.pop(0).contiguous() if given.need_grad else embeddings.new_empty(0)
    return loss.detach(), grad, grads.pop().contiguous() if given.need_ref_grad else embeddings.new_empty(0)


@torch.library.impl(LIBRARY, "hard_supcon", "CUDA")
def _on_cuda(embeddings, ref_embeddings, *rest):
    loss, grad, ref_grad = _launch(embeddings, ref_embeddings, _named(*rest))
    return loss, *(embeddings.new_empty(0) if value is None else value for value in (grad, ref_grad))


def _launch(u: Tensor, keys: Tensor | None, given: _Arguments) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from fastanchor.kernels import supcon_launch  # Triton need not be installed where there is no CUDA device

    options, pairs = supcon_launch.Options(**given.settings), {"ref_embeddings": keys, **given.tensors}
    if not (given.need_grad or given.need_ref_grad):
        return supcon_launch.forward(u, given.labels, options, given.beta, **pairs)[0], None, None
    loss, grad, ref_grad = supcon_launch.loss_and_grad(
        u, given.labels, options, given.beta, upstream=given.upstream, keys_gradient=given.need_ref_grad, **pairs
    )
    return loss, grad if given.need_grad else None, ref_grad


@torch.library.register_fake("fastanchor::hard_supcon", lib=LIBRARY)
def _fake(embeddings, ref_embeddings, *rest):
    given = _named(*rest)
    loss = embeddings.new_empty(embeddings.shape[0] if given.settings["reduction"] == "none" else ())
    grad = embeddings.new_empty(embeddings.shape if given.need_grad else 0)
    return loss, grad, embeddings.new_empty(ref_embeddings.shape if given.need_ref_grad else 0)


# ---------------------------------------------------------------- whether the kernels serve


def serves(
    embeddings: Tensor,
    *,
    beta: float | Tensor = 2.0,
    ref_embeddings: Tensor | None = None,
    **options,
) -> tuple[bool, str]:
    """Whether the kernels compute this loss on the device of `embeddings`, with the reason in words.

    options: those of `hard_supcon`. The kernels must cover them and agree with the reference on the device (`verified`): the
    first question about a variant takes the seconds that compiling it takes.
    """
    switch()  # a bad one is said wherever it is set, not only where kernels could run
    usable, reason = _usable(embeddings.device)
    if not usable:
        return False, reason
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(embeddings):
        return False, "the operator knows no torch.func"
    if reason := refuses_gradients(beta=beta, **options):
        return False, reason
    if isinstance(beta, Tensor) and beta.device != embeddings.device:
        return False, f"beta is on {beta.device}, the embeddings are on {embeddings.device}"
    given = {name: options.get(name) is not None for name in ("instances", "anchors")}
    given["views"] = options.get("positive_coef") is not None or options.get("denominator_mask") is not None
    settings = {name: options.get(name, value) for name, value in SETTINGS.items()}
    steep = not settings["detach_weights"] and settings["precision"] == "fp16"
    number = 0.0 if isinstance(beta, Tensor) else beta
    numbers = {name: settings[name] for name in ("temperature", "gamma", "hard_negative_beta")}
    if reason := limits.refused(weight=settings["weight"], beta=number, steep=steep, **numbers):
        return False, reason
    settings |= _typical(numbers["temperature"], numbers["hard_negative_beta"])
    keys_gradient = ref_embeddings is not None and ref_embeddings.requires_grad and not settings["detach_keys"]
    # Branches, not expressions: torch.compile may not know the shape as numbers.
    width, many_rows = 16, False
    while width < embeddings.shape[1]:
        width *= 2
    if embeddings.shape[0] > config.SMALL_N:
        many_rows = True
    return _serves(
        embeddings.device,
        _computed_in(embeddings, ref_embeddings),
        width,
        many_rows=many_rows,
        beta_tensor=isinstance(beta, Tensor),
        keys="own" if ref_embeddings is None else "with gradient" if keys_gradient else "given",
        **given,
        **settings,
    )


def _typical(temperature: float, hard_negative_beta: float) -> dict[str, float]:
    """Numbers that stand for all that run the same kernels: a schedule of theirs must not start a check every step.

    By branches: to torch.compile a number that has changed is a symbol.
    """
    found = {"temperature": 0.1, "gamma": 2.0, "hard_negative_beta": 1.0, "scale": 0.7}
    if temperature < limits.FIXED_MAXIMUM:
        found["temperature"] = 0.02
    if hard_negative_beta == 0:
        found["hard_negative_beta"] = 0.0
    return found


def refuses_gradients(*, beta=None, positive_coef=None, detach_weights: bool = True, **_) -> str:
    """What of the arguments wants a gradient that the operator does not give, in words, or nothing."""
    for name, value in (("beta", beta), ("positive_coef", positive_coef)):
        if not detach_weights and torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
            return f"{name} requires a gradient, and the kernels give none to it"
    return ""


def _usable(device: torch.device) -> tuple[bool, str]:
    return _asked_once(device)


@functools.cache
def _asked_once(device: torch.device) -> tuple[bool, str]:
    return kernels.usable(device)


def _serves(device, dtype, width, **case) -> tuple[bool, str]:
    variant, text = _covers(device, dtype, width, **case)
    return (False, text) if variant is None else verified(text, variant.check, device)


# As torch.compiler.assume_constant_result marks them, without importing the compiler: their answers are no part of a graph.
_usable._dynamo_marked_constant = _serves._dynamo_marked_constant = True


@functools.lru_cache(maxsize=256)
def _covers(device, dtype, width, *, many_rows, keys, beta_tensor, views, instances, anchors, **settings):
    """What to check before the kernels are trusted with these options, and its name; or None, and why they do not serve."""
    from fastanchor.kernels import supcon_launch  # Triton need not be installed where it is not usable

    if width > limits.MAX_FEATURES:
        return None, f"the kernels hold at most {limits.MAX_FEATURES} features"
    options = supcon_launch.Options(**settings)
    ok, reason = supcon_launch.supported(options, width, dtype, 0.0, views=views, device=device)
    if not ok:
        return None, reason
    settings["k"] = options.k if options.weight == "topk" else SETTINGS["k"]
    # A check of many own rows needs the view matrices itself.
    many = many_rows and not (views and keys == "own") and _more_tiles(options, width, views, device)
    variant = Variant(settings, width, many, keys, beta_tensor, views, instances, anchors)
    return variant, variant.name


def _more_tiles(options, width, views, device) -> bool:
    """Whether many rows are computed in other tiles than few."""
    few, many = (
        [config.tile(kernel, config.architecture(device), options.precision, width, rows, views or not options.plain)
         for kernel in ("row_stats", "gradient")]
        for rows in (1, config.SMALL_N + 1)
    )  # fmt: skip
    return few != many
