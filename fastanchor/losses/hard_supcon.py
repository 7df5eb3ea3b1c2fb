"""Supervised contrastive losses as modules with pytorch-metric-learning's argument order: `loss(embeddings, labels)`.

The definition, with every option, is the docstring of `fastanchor.reference.hard_supcon`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastanchor import ops
from fastanchor.errors import UserError
from fastanchor.ops.supcon import refuses_gradients, serves
from fastanchor.reference.checks import check_name, check_options
from fastanchor.reference.hard_supcon import hard_supcon
from fastanchor.reference.pairs import anchor_mask, check_pairs

PAIRS = (
    "views", "positive_coef", "denominator_mask", "instances", "selection", "predictions", "ref_embeddings", "ref_labels",
    "ref_views", "ref_instances", "ref_predictions",
)  # fmt: skip


def choose_backend(backend: str, embeddings: Tensor, **options) -> tuple[str, str]:
    """The name of the implementation that computes the loss of `embeddings` with these options of the reference, and why.

    `auto` is resolved here and nowhere else: the kernels where they run, cover the options and have agreed with the reference on
    this device, else the dense reference.
    """
    if backend != "auto":
        return backend, "as asked for"
    served, reason = serves(embeddings, **options)
    return "triton" if served else "torch", reason


def _torch(embeddings: Tensor, labels: Tensor, *, precision: str, **options) -> Tensor:
    return hard_supcon(embeddings, labels, **options)


def _triton(embeddings: Tensor, labels: Tensor, **options) -> Tensor:
    """The kernels on CUDA, or the reason why not; elsewhere the operator's other implementation, which is the reference."""
    reason = refuses_gradients(**options)
    if embeddings.is_cuda:
        served, reason = serves(embeddings, **options)
        reason = "" if served else reason
    if reason:
        raise UserError(f"backend is 'triton', but {reason}")
    anchors = anchor_mask(options.pop("anchors"), options["views"], embeddings)
    return ops.hard_supcon(embeddings, labels, anchors=anchors, **options)


IMPLEMENTATIONS = {"torch": _torch, "triton": _triton}
BACKENDS = ("auto", *IMPLEMENTATIONS)
_CPU = torch.device("cpu")


def _matrix(name: str, value: Tensor | Sequence[Sequence[float]]) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} is {value!r}, but must be a square matrix of numbers") from error


class HardSupConLoss(nn.Module):
    """Hardness-weighted supervised contrastive loss: SupCon that weighs the far positives of each anchor more.

    With z = u / ||u||, s_ia = z_i . z_a, P(i) the other rows of i's class, and w_ip = exp(-beta s_ip) by default:

        L_i = log sum_{a != i} exp(s_ia / tau) - (1 / tau) sum_{p in P(i)} w_bar_ip s_ip,     w_bar_ip = w_ip / sum_p w_ip
        L   = mean of L_i over the rows that have a positive

    Its gradient, weights being constants, with q_ia = exp(s_ia / tau) / sum_{a' != i} exp(s_ia' / tau) and g = 1 / valid rows:

        G_ia = (g / tau) (q_ia - w_bar_ia),   dL/dZ = (G + G^T) Z,   dL/du_i = (dZ_i - (z_i . dZ_i) z_i) / ||u_i||

    temperature (tau), beta, weight ("exp" | "uniform" | "pow" | "topk"), gamma (of pow), k (of topk), detach_weights, normalizer
    ("sum" | "count"), denominator ("all" | "pairwise" | "negatives"), hard_negative_beta, selection ("all" | ASCL's "hard",
    "soft", "merge", "leaking"), anchors (view ids of the rows that act as anchors), detach_keys, scale and reduction
    ("mean_valid" | "mean_all" | "sum" | "none") are those of the reference.
    beta may be a 0-d tensor: it becomes a buffer, to be changed in place (`loss.beta.fill_(1.0)`) between replays of a graph.
    positive_coef, denominator_mask: (V, V) tensors or nested sequences, [anchor's view][key's view].
    backend: "torch" is the dense reference in plain PyTorch; "triton" the kernels, without an N x N tensor, where they cover the
    options and have agreed with the reference on the CUDA device, or an error (on a CPU: the reference); "auto" the first of
    "triton" and "torch" that serves. The kernels take |beta| <= 40, which of a tensor nobody reads, and give no second
    derivatives. `used` says what computed the last loss, and why.
    precision: of the unit rows that the kernels keep, "fp16", "tf32" or "ieee" (fp32, no tensor cores); sums are fp32. In a class
    of cosine 0.98 the first two give gradients that are a few 1e-3 off. "torch" computes in fp32, or fp64, whatever it says.
    Raises UserError (a ValueError) for a bad argument.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        beta: float | Tensor = 2.0,
        weight: str = "exp",
        *,
        gamma: float = 1.0,
        k: int = 8,
        detach_weights: bool = True,
        normalizer: str = "sum",
        denominator: str = "all",
        hard_negative_beta: float = 0.0,
        selection: str = "all",
        positive_coef: Tensor | Sequence[Sequence[float]] | None = None,
        denominator_mask: Tensor | Sequence[Sequence[float]] | None = None,
        anchors: int | Sequence[int] | None = None,
        detach_keys: bool = False,
        scale: float = 1.0,
        reduction: str = "mean_valid",
        backend: str = "auto",
        precision: str = "fp16",
    ):
        super().__init__()
        self.used = ""
        checked = {
            "temperature": temperature,
            "weight": weight,
            "gamma": gamma,
            "k": k,
            "normalizer": normalizer,
            "denominator": denominator,
            "hard_negative_beta": hard_negative_beta,
            "selection": selection,
            "scale": scale,
            "reduction": reduction,
            "precision": precision,
        }
        check_options(beta=beta, detach_weights=detach_weights, detach_keys=detach_keys, **checked)
        check_name("backend", backend, BACKENDS)
        self.options = {**checked, "detach_weights": detach_weights, "anchors": anchors, "detach_keys": detach_keys}
        self.backend = backend
        if isinstance(beta, Tensor):
            # Not in the state dict: a schedule sets it, and checkpoints must load whether beta is a number or a tensor.
            self.register_buffer("beta", beta, persistent=False)
        else:
            self.beta = beta
        for name, value in (("positive_coef", positive_coef), ("denominator_mask", denominator_mask)):
            matrix = None if value is None else _matrix(name, value)
            self.register_buffer(name, matrix, persistent=False)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        views: Tensor | None = None,
        ref_views: Tensor | None = None,
        instances: Tensor | None = None,
        ref_instances: Tensor | None = None,
        predictions: Tensor | None = None,
        ref_predictions: Tensor | None = None,
    ) -> Tensor:
        """embeddings (N, D) floating, of any norm; labels (N,) integer. ref_emb (M, D), ref_labels (M,): keys instead of the rows
        themselves; no pair is then a self pair. views, ref_views: view id of each row, for positive_coef, denominator_mask and
        anchors. instances, ref_instances: only rows of one instance are positives. predictions, ref_predictions: predicted class
        of each row, for `selection`.

        Returns fp32 (fp64 for fp64 embeddings), also inside an autocast region: a 0-d tensor, or (N,) for reduction="none".
        Raises UserError (a ValueError) for shapes and dtypes that do not fit.
        """
        options = {
            "beta": self.beta,
            "positive_coef": self.positive_coef,
            "denominator_mask": self.denominator_mask,
            "views": views,
            "ref_views": ref_views,
            "instances": instances,
            "ref_instances": ref_instances,
            "predictions": predictions,
            "ref_predictions": ref_predictions,
            "ref_embeddings": ref_emb,
            "ref_labels": ref_labels,
            **self.options,
        }
        check_pairs(embeddings, labels, **{name: options[name] for name in PAIRS})
        if isinstance(self.beta, Tensor) and self.beta.device not in (embeddings.device, _CPU):
            raise UserError(f"beta is on {self.beta.device}, embeddings on {embeddings.device}: must be on one device")
        backend, why = choose_backend(self.backend, embeddings, **options)
        if not torch.compiler.is_compiling():
            self.used = f"{backend}: {why}"
        return IMPLEMENTATIONS[backend](embeddings, labels, **options)

    def extra_repr(self) -> str:
        """The options that bear on the loss: each weight's own parameters, and whatever differs from the defaults."""
        options = {**self.options, "beta": "<tensor>" if isinstance(self.beta, Tensor) else self.beta}
        always = ("temperature", "weight", {"exp": "beta", "pow": "gamma", "topk": "k"}.get(options["weight"]))
        defaults = HardSupConLoss.__init__.__kwdefaults__
        others = defaults.keys() - {"gamma", "k"}
        shown = {name: options[name] for name in always if name in options}
        shown |= {name: value for name, value in options.items() if name in others and value != defaults[name]}
        shown |= {name: "<tensor>" for name in ("positive_coef", "denominator_mask") if getattr(self, name) is not None}
        return ", ".join(f"{name}={value}" for name, value in {**shown, "backend": self.backend}.items())


class SupConLoss(HardSupConLoss):
    """Supervised contrastive loss, L_out of Khosla et al. 2020: HardSupConLoss with uniform weights.

        L_i = log sum_{a != i} exp(s_ia / tau) - (1 / (tau |P(i)|)) sum_{p in P(i)} s_ip

    The gradient is that of HardSupConLoss with w_bar_ip = 1 / |P(i)|. reduction="mean_valid" is pytorch-metric-learning's mean
    (over rows of non-zero loss); SupContrast's code is reduction="mean_all" with scale=temperature / 0.07.
    Keyword options as in HardSupConLoss.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        denominator: str = "all",
        hard_negative_beta: float = 0.0,
        selection: str = "all",
        positive_coef: Tensor | Sequence[Sequence[float]] | None = None,
        denominator_mask: Tensor | Sequence[Sequence[float]] | None = None,
        anchors: int | Sequence[int] | None = None,
        detach_keys: bool = False,
        scale: float = 1.0,
        reduction: str = "mean_valid",
        backend: str = "auto",
        precision: str = "fp16",
    ):
        super().__init__(
            temperature,
            weight="uniform",
            denominator=denominator,
            hard_negative_beta=hard_negative_beta,
            selection=selection,
            positive_coef=positive_coef,
            denominator_mask=denominator_mask,
            anchors=anchors,
            detach_keys=detach_keys,
            scale=scale,
            reduction=reduction,
            backend=backend,
            precision=precision,
        )
