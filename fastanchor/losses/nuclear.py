"""The nuclear norm of a matrix, the sum of its singular values, from matrix products alone.

    ||A||_* = <P, A>,   d||A||_* / dA = P = A (A^T A)^(-1/2) = U V^T   (A = U S V^T; the polar factor)

A singular value decomposition would tell the same, but on a GPU it waits for the host and no graph can hold it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastanchor.errors import UserError

# Singular values below this share of the Frobenius norm count less than 1 in P: less than the rounding of fp32 logits makes.
SMALLEST = 1e-8


def _steps(lowest: float) -> list[float]:
    """The scale of each step of `polar`, which brings singular values in [lowest, 1] to 1 within fp64's rounding.

    rho^2 = 3 / (1 + l + l^2) makes the image of [l, 1] under x -> rho x (3 - rho^2 x^2) / 2 as narrow as a cubic can
    (Chen & Chow 2014), [l', 1]; unscaled, a small value would grow by 1.5 a step, here by 2.6.
    """
    scales = []
    while 1 - lowest > 1e-15:
        rho = math.sqrt(3 / (1 + lowest + lowest**2))
        lowest = min(1.0, rho * lowest * (3 - (rho * lowest) ** 2) / 2)
        scales.append(rho)
    return scales


_SCALES = _steps(SMALLEST)


def polar(matrix: Tensor) -> Tensor:
    """U V^T of A = U S V^T: (B, K) floating -> fp64, same shape, by a scaled Newton-Schulz iteration in fp64.

    A fixed number of steps X <- rho X (3 I - rho^2 X^T X) / 2 from A over its Frobenius norm, of which none divides: directions
    without a singular value stay out (0 for a zero matrix), and no value grows beyond 1, whatever the condition number.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    x = matrix.T.double() if wide else matrix.double()
    # First by the largest entry: its square may be out of range. The norm is then at least 1, or the matrix is 0.
    x = x / x.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    x = x / x.norm().clamp_min(1)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for rho in _SCALES:
        x = x @ torch.addmm(eye, x.T, x, beta=1.5 * rho, alpha=-0.5 * rho**3)
    return x.T if wide else x


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of the singular values of a (B, K) floating matrix -> 0-d, in the matrix's dtype; computed in fp64.

    Its gradient is the polar factor, of a matrix without full rank the subgradient of least length: 0 for a zero matrix. It has
    no second derivative: P is a constant. Against a singular value decomposition in fp64, for condition numbers up to 1e6:
    value to 1e-12, gradient to 1e-8 of its size. Raises UserError for another shape or dtype.
    """
    if matrix.ndim != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        raise UserError(
            f"matrix has shape {tuple(matrix.shape)} and dtype {matrix.dtype}: must be (B, K), floating, none of them 0"
        )
    with torch.no_grad():
        factor = polar(matrix)
    return (factor * matrix.double()).sum().to(matrix.dtype)
