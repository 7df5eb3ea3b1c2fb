"""What the tests of the SupCon kernels share: the truth in fp64, the kernels' results, the comparison."""

import torch
from supcon_helpers import relative

from bench import supcon_cases
from bench.supcon_cases import embeddings as data  # noqa: F401  batches in three regimes: random, mid, trained


def truth(u, y, dtype=torch.float64, unit=None, upstream=None, **options):
    """Loss and gradients by autograd of the reference in `dtype`; `unit` rounds the unit rows that it sees, as storing them does.

    The gradients: of the rows and, where there are other keys that are not detached, of these.
    """
    return supcon_cases.dense(u, y, options, dtype, unit, upstream)


def ours(u, y, precision="ieee", upstream=None, beta=2.0, **options):
    """The same by the kernels; `splits` among the options is theirs alone."""
    return supcon_cases.kernels(u, y, options, precision, beta, upstream)


def check(u, y, precision="ieee", floor=1e-6, **options):
    """Loss and gradients within `floor` of fp64 in the relative Frobenius norm, or twice the error of the reference in fp32 on rows
    rounded as these are; 0 to the rounding of s / tau where they are 0.

    Beyond random embeddings the gradient amplifies the rounding of the similarities, whoever computes them, past 1e-6; and at
    temperatures below 0.03 exp does, 1 / tau times.
    """
    temperature = options.get("temperature", 0.1)
    floor = floor if temperature >= 0.03 else max(floor, 1e-7 / temperature)
    results = ours(u, y, precision=precision, **options)
    options.pop("splits", None)
    assert all(grad.dtype == u.dtype and torch.isfinite(grad).all() for grad in results[1:])
    exact = truth(u, y, **options)
    eager = truth(u, y, dtype=torch.float32, unit=None if precision == "ieee" else torch.float16, **options)
    assert len(results) == len(exact)
    for got, want, usual in zip(results, exact, eager, strict=True):
        if want.norm() == 0:
            assert got.abs().max() <= 2e-7 / temperature
        else:
            assert relative(got.double(), want) <= max(floor, 2 * relative(usual.double(), want))
