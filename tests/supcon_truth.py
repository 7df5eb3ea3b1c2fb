"""What the tests of the SupCon kernels share: batches in three data regimes, the truth in fp64, the comparison."""

import functools

import torch
import torch.nn.functional as F
from fastanchor.kernels.supcon_launch import Options, loss_and_grad
from supcon_helpers import relative

from fastanchor.reference.hard_supcon import hard_supcon

SPREAD = {
    "random": 0.0,
    "mid": 1.0,
    "trained": 7.0,
}  # length of the class centre beside unit noise: cosine in a class 0, 0.5, 0.98


@functools.cache
def data(regime, n, d, classes=10, seed=0):
    """fp32 rows of norms 0.5 to 1.5, and labels."""
    g = torch.Generator().manual_seed(seed)
    centre = F.normalize(torch.randn(classes, d, generator=g, dtype=torch.float64))
    y = torch.randint(classes, (n,), generator=g)
    u = SPREAD[regime] * centre[y] + F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64))
    return (u / u.norm(dim=1, keepdim=True) * (0.5 + torch.rand(n, 1, generator=g))).float(), y


def truth(u, y, dtype=torch.float64, unit=None, upstream=None, **options):
    """Loss and gradients by autograd of the reference in `dtype`; `unit` rounds the unit rows that it sees, as storing them does.

    The gradients: of the rows and, where there are other keys that are not detached, of these.
    """
    leaves = [u.to(dtype).requires_grad_()]
    keys = options.pop("ref_embeddings", None)
    if keys is not None:
        leaves.append(keys.to(dtype).requires_grad_())
    seen = [x if unit is None else _stored(x, unit) for x in leaves]
    loss = hard_supcon(seen[0], y, ref_embeddings=None if keys is None else seen[1], **options)
    if options.get("detach_keys"):
        del leaves[1:]
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def _stored(x, unit):
    z = F.normalize(x)
    return z + (z.to(unit).to(x.dtype) - z).detach()


def ours(u, y, precision="ieee", upstream=None, beta=2.0, **options):
    """The same by the kernels."""
    pair_names = (
        "anchors", "views", "positive_coef", "denominator_mask", "instances", "predictions",
        "ref_embeddings", "ref_labels", "ref_views", "ref_instances", "ref_predictions",
    )  # fmt: skip
    pairs = {name: options.pop(name) for name in pair_names if name in options}
    found = loss_and_grad(u, y, Options(precision=precision, **options), beta, upstream=upstream, keys_gradient=True, **pairs)
    return found[:2] if found[2] is None else found


def check(u, y, precision="ieee", floor=1e-6, **options):
    """Loss and gradients within `floor` of fp64 in the relative Frobenius norm, or twice the error of the reference in fp32 on rows
    rounded as these are; 0 to the rounding of s / tau where they are 0.

    Beyond random embeddings the gradient amplifies the rounding of the similarities, whoever computes them, past 1e-6; and at
    temperatures below 0.03 exp does, 1 / tau times.
    """
    temperature = options.get("temperature", 0.1)
    floor = floor if temperature >= 0.03 else max(floor, 1e-7 / temperature)
    results = ours(u, y, precision=precision, **options)
    assert all(grad.dtype == u.dtype and torch.isfinite(grad).all() for grad in results[1:])
    exact = truth(u, y, **options)
    eager = truth(u, y, dtype=torch.float32, unit=None if precision == "ieee" else torch.float16, **options)
    assert len(results) == len(exact)
    for got, want, usual in zip(results, exact, eager, strict=True):
        if want.norm() == 0:
            assert got.abs().max() <= 2e-7 / temperature
        else:
            assert relative(got.double(), want) <= max(floor, 2 * relative(usual.double(), want))
