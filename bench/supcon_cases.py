"""What the SupCon kernels are judged and timed on: embeddings in three regimes, a case for each option, eager in their precision.

`python -m bench.supcon_cases` runs one small case on the GPU, for a memory checker to look at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.supcon_truth import blockwise
from fastanchor.ops.supcon_check import _rounded
from fastanchor.reference.hard_supcon import hard_supcon

# Length of the class centre beside unit noise: cosine within a class 0, 0.5, 0.98. Rounding shows in the last one alone: there
# the gradient is the small difference of large terms.
REGIMES = {"random": 0.0, "mid": 1.0, "trained": 7.0}
CLASSES = 10
PRECISIONS = ("fp16", "tf32", "ieee")
# Arguments that are tensors by row or by view; all others are fields of the kernels' Options, but for beta.
PAIRS = ("anchors", "views", "positive_coef", "denominator_mask", "instances", "predictions", "ref_embeddings", "ref_labels",
         "ref_views", "ref_instances", "ref_predictions")  # fmt: skip
# Matrices of N x M that dense eager code holds at most, about: with fewer bytes free it is not tried.
DENSE_MATRICES = 12


@functools.lru_cache(maxsize=16)
def embeddings(regime: str, n: int, d: int, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """fp32 rows of norms 0.5 to 1.5 and their labels, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    centre = F.normalize(torch.randn(classes, d, generator=g, dtype=torch.float64))
    y = torch.randint(classes, (n,), generator=g)
    u = REGIMES[regime] * centre[y] + F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64))
    return (u / u.norm(dim=1, keepdim=True) * (0.5 + torch.rand(n, 1, generator=g))).float(), y


def _zero_rows(u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    u, y = u.clone(), y.clone()
    u[:: max(2, len(u) // 7)], y[-1] = 0, CLASSES  # and a row without positives
    return u, y


def _views(u: Tensor, y: Tensor, regime: str) -> dict:
    coef = torch.tensor([[1.0, 0.5, 2.0], [0.0, 1.0, 1.5], [2.0, 1.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    return {"views": torch.arange(len(u)) % 3, "positive_coef": coef, "denominator_mask": mask}


def _keys(u: Tensor, y: Tensor, regime: str) -> dict:
    keys, labels = embeddings(regime, len(u) // 2 + 3, u.shape[1], seed=1)
    return {"ref_embeddings": keys, "ref_labels": labels}


def _predictions(u: Tensor, y: Tensor, regime: str) -> dict:
    right = torch.arange(len(y)) % 5 < 3
    return {"predictions": torch.where(right, y, torch.randint(CLASSES, y.shape, generator=torch.Generator().manual_seed(2)))}


Batch = tuple[Tensor, Tensor]
# Name: options, what else is given, how the batch is changed. In order of worth.
CASES: dict[str, tuple[dict, Callable[[Tensor, Tensor, str], dict] | None, Callable[[Tensor, Tensor], Batch] | None]] = {
    "default": ({}, None, None),
    "attached": ({"detach_weights": False}, None, None),
    "uniform": ({"weight": "uniform"}, None, None),
    "topk": ({"weight": "topk", "k": 8}, None, None),
    "pairwise": ({"denominator": "pairwise"}, None, None),
    "hard negatives": ({"hard_negative_beta": 1.0}, None, None),
    "views": ({}, _views, None),
    "keys": ({}, _keys, None),
    "pow": ({"weight": "pow", "gamma": 2.0}, None, None),
    "count": ({"normalizer": "count"}, None, None),
    "negatives": ({"denominator": "negatives"}, None, None),
    "tau 0.01": ({"temperature": 0.01}, None, None),
    "selection hard": ({"selection": "hard"}, _predictions, None),
    "selection leaking": ({"selection": "leaking"}, _predictions, None),
    "detached keys": ({"detach_keys": True}, None, None),
    "instances": ({}, lambda u, y, regime: {"instances": torch.arange(len(u)) // 3}, None),
    "one class": ({}, None, lambda u, y: (u, torch.zeros_like(y))),
    "zero rows": ({}, None, _zero_rows),
    "pairwise, attached": ({"denominator": "pairwise", "detach_weights": False}, None, None),
    "pow, attached, count": ({"weight": "pow", "gamma": 2.0, "detach_weights": False, "normalizer": "count"}, None, None),
}


def batch(case: str, regime: str, n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, dict]:
    """Embeddings, labels and the arguments of `hard_supcon` for them."""
    options, more, change = CASES[case]
    u, y = embeddings(regime, n, d)
    if case == "instances":
        y = torch.arange(n) // 3 % CLASSES
    if change is not None:
        u, y = change(u, y)
    given = options | (more(u, y, regime) if more is not None else {})
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    return u.to(device), y.to(device), given


def split(arguments: dict) -> tuple[dict, dict]:
    """Fields of the kernels' Options, and the tensors given beside them."""
    pairs = {name: value for name, value in arguments.items() if name in PAIRS}
    return {name: value for name, value in arguments.items() if name not in PAIRS}, pairs


def kernels(
    u: Tensor, y: Tensor, arguments: dict, precision: str, beta: float | Tensor = 2.0, upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(loss, gradient) by the kernels, and the keys' gradient where the case has keys that need one."""
    from fastanchor.kernels import supcon_launch

    fields, pairs = split(arguments)
    options = supcon_launch.Options(precision=precision, **fields)
    keys = needs_keys_gradient(arguments)
    found = supcon_launch.loss_and_grad(u, y, options, beta, upstream=upstream, keys_gradient=keys, **pairs)
    return found if keys else found[:2]


def needs_keys_gradient(arguments: dict) -> bool:
    """Whether there are keys other than the anchors, with a gradient."""
    return "ref_embeddings" in arguments and not arguments.get("detach_keys", False)


def unsupported(u: Tensor, arguments: dict, precision: str) -> str | None:
    """Why the kernels refuse the case; None where they do not."""
    from fastanchor.kernels import supcon_launch

    fields, pairs = split(arguments)
    views = "positive_coef" in pairs or "denominator_mask" in pairs
    options = supcon_launch.Options(precision=precision, **fields)
    ok, reason = supcon_launch.supported(options, u.shape[1], u.dtype, views=views, device=u.device)
    return None if ok else reason


def dense(
    u: Tensor, y: Tensor, arguments: dict, dtype: torch.dtype, stored: torch.dtype | None = None, upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(loss, gradient[, keys' gradient]) by autograd of the reference in `dtype`; stored: what unit rows are rounded to first.

    upstream: the gradient of the loss, for a reduction that leaves a vector.
    """
    inputs = [u.to(dtype).requires_grad_()]
    if needs_keys_gradient(arguments):
        inputs.append(arguments["ref_embeddings"].to(dtype).requires_grad_())
    seen = [_rounded(x, stored) for x in inputs]
    if "ref_embeddings" in arguments:
        keys = seen[1] if len(seen) > 1 else _rounded(arguments["ref_embeddings"].to(dtype), stored)
        arguments = arguments | {"ref_embeddings": keys}
    loss = hard_supcon(seen[0], y, **arguments)
    return loss.detach(), *torch.autograd.grad(loss, inputs, upstream)


def truth(u: Tensor, y: Tensor, arguments: dict) -> tuple[Tensor, ...]:
    """(loss, gradient[, keys' gradient]) in fp64, in blocks of rows."""
    found = blockwise(u, y, **arguments)
    return found if needs_keys_gradient(arguments) else found[:2]


def eager(u: Tensor, y: Tensor, arguments: dict, precision: str) -> tuple[Tensor, ...]:
    """What eager PyTorch makes of the case. fp16: unit rows rounded to fp16, fp32 otherwise; tf32: TF32 products; ieee: fp32.

    Where there is no TF32 the rows are rounded to its 11 bits, as in fp16. Torch's matmul precision is as before afterwards.
    """
    round_rows = precision == "fp16" or (precision == "tf32" and not u.is_cuda)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return dense(u, y, arguments, torch.float32, torch.float16 if round_rows else None)
    finally:
        torch.set_float32_matmul_precision(before)


def dense_fits(n: int, m: int, device: torch.device) -> str | None:
    """None where DENSE_MATRICES fp32 matrices of n x m fit in the free memory, else the reason for a result left out."""
    if device.type != "cuda":
        return None
    needed, free = DENSE_MATRICES * 4 * n * m, free_memory(device)
    if needed < free:
        return None
    return f"{DENSE_MATRICES} fp32 matrices of {n} x {m} are {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors can take: free on the device, or held by torch's allocator and not in use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def relative(found: Tensor, expected: Tensor) -> float:
    """Distance in the Frobenius norm; what must be 0 counts as it is."""
    norm = expected.double().norm()
    return ((found.double() - expected.double()).norm() / torch.where(norm > 0, norm, 1.0)).item()


def main() -> None:
    """Ragged rows, detached and attached weights, view matrices: every kernel once."""
    for case in ("default", "attached", "views"):
        u, y, arguments = batch(case, "random", 130, 128, torch.device("cuda"))
        found, expected = kernels(u, y, arguments, "fp16"), truth(u, y, arguments)
        print(case, *(f"{relative(a, b):.2e}" for a, b in zip(found, expected, strict=True)), flush=True)


if __name__ == "__main__":
    main()
