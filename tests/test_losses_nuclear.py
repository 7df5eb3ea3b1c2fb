"""The nuclear norm by matrix products against a singular value decomposition in fp64: value, gradient, and where it has none."""

import pytest
import torch
from graph_emulator import Emulator
from hypothesis import given
from hypothesis import strategies as st

from fastanchor import graphs
from fastanchor.errors import UserError
from fastanchor.losses.nuclear import nuclear_norm, polar


def matrix_of(rows, columns, singular, seed=0):
    """A matrix of these singular values, with both its bases, fp64."""
    source = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=source, dtype=torch.float64))[0] for n in (rows, columns))
    size = len(singular)
    return (left[:, :size] * singular) @ right[:, :size].T, left[:, :size], right[:, :size]


def value_and_gradient(matrix):
    leaf = matrix.detach().requires_grad_()
    value = nuclear_norm(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


SHAPES = [(64, 10), (10, 64), (7, 7), (128, 100), (1, 10), (10, 1), (1, 1), (3, 200)]


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("condition", [0, 1, 3, 6])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_value_and_gradient_over_condition_numbers(rows, columns, condition, scale):
    """What the docstring promises: 1e-12 of the value, 1e-8 of the gradient (an orthogonal factor, of entries below 1)."""
    singular = scale * torch.logspace(0, -condition, min(rows, columns), dtype=torch.float64)
    matrix, left, right = matrix_of(rows, columns, singular)
    value, gradient = value_and_gradient(matrix)
    assert value.item() == pytest.approx(torch.linalg.svdvals(matrix).sum().item(), rel=1e-12)
    torch.testing.assert_close(gradient, left @ right.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_gradient_agrees_with_central_differences_of_svd(rows, columns):
    source = torch.Generator().manual_seed(2)
    matrix, direction = (torch.randn(rows, columns, generator=source, dtype=torch.float64) for _ in range(2))
    step = 1e-6
    rise = sum(sign * torch.linalg.svdvals(matrix + sign * step * direction).sum() for sign in (1, -1)) / (2 * step)
    assert (value_and_gradient(matrix)[1] * direction).sum().item() == pytest.approx(rise.item(), rel=1e-7, abs=1e-7)


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 20), rank=st.integers(0, 20), condition=st.floats(0, 5),
    scale=st.floats(-20, 20), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_any_matrix(rows, columns, rank, condition, scale, seed):
    """Whatever the rank: the value, a gradient that is the polar factor of the range alone, nothing that is not finite."""
    rank = min(rank, rows, columns)
    singular = 10**scale * torch.logspace(0, -condition, rank, dtype=torch.float64)
    matrix, left, right = matrix_of(rows, columns, singular, seed)
    value, gradient = value_and_gradient(matrix)
    assert value.item() == pytest.approx(singular.sum().item(), rel=1e-11, abs=0)
    torch.testing.assert_close(gradient, left @ right.T, rtol=0, atol=1e-6)
    assert torch.linalg.matrix_norm(gradient, 2) <= 1 + 1e-12
    assert polar(matrix).dtype == torch.float64


@given(rows=st.integers(1, 40), columns=st.integers(1, 12), condition=st.floats(0, 3), seed=st.integers(0, 10_000))
def test_fp32_is_fp64_to_the_rounding_of_its_input(rows, columns, condition, seed):
    singular = torch.logspace(0, -condition, min(rows, columns), dtype=torch.float64)
    matrix = matrix_of(rows, columns, singular, seed)[0].float()
    value, gradient = value_and_gradient(matrix)
    left, exact, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert value.dtype == gradient.dtype == torch.float32
    assert value.item() == pytest.approx(exact.sum().item(), rel=2e-7)
    torch.testing.assert_close(gradient.double(), left @ right, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_a_zero_matrix_has_norm_and_gradient_zero(dtype, rows, columns):
    value, gradient = value_and_gradient(torch.zeros(rows, columns, dtype=dtype))
    assert value == 0 and torch.equal(gradient, torch.zeros(rows, columns, dtype=dtype))


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 3e38])
def test_numbers_at_the_ends_of_fp32_keep_their_norm(tiny):
    matrix = torch.zeros(5, 3)
    matrix[2, 1], matrix[4, 0] = tiny, -tiny
    value, gradient = value_and_gradient(matrix.double())
    assert value.item() == pytest.approx(2 * matrix[2, 1].item(), rel=1e-12)
    assert gradient[2, 1].item() == pytest.approx(1) and gradient[4, 0].item() == pytest.approx(-1)
    assert nuclear_norm(matrix[:3]).item() == pytest.approx(matrix[2, 1].item(), rel=1e-6)


def test_the_smallest_numbers_of_fp64_give_no_nan():
    value, gradient = value_and_gradient(torch.full((3, 2), 5e-324, dtype=torch.float64))
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    matrix = torch.ones(4, 3)
    matrix[1, 1] = bad
    assert not nuclear_norm(matrix).isfinite()


def test_rows_that_are_the_same_and_columns_of_zeros():
    matrix = torch.ones(6, 4)
    matrix[:, 2] = 0
    value, gradient = value_and_gradient(matrix)
    assert value.item() == pytest.approx((6 * 3) ** 0.5, rel=1e-6)
    torch.testing.assert_close(gradient, matrix / (6 * 3) ** 0.5)


def test_below_the_smallest_share_a_direction_fades_and_nothing_blows_up():
    singular = torch.tensor([1.0, 1e-11, 1e-14], dtype=torch.float64)
    matrix, left, right = matrix_of(8, 3, singular)
    value, gradient = value_and_gradient(matrix)
    assert value.item() == pytest.approx(1, abs=1e-9)
    along = (left.T @ gradient @ right).diagonal()
    assert along[0].item() == pytest.approx(1, abs=1e-9) and 0 <= along[2] < along[1] < 0.1


def test_autocast_and_a_graph_change_nothing():
    """It is part of a captured step: no value is read, no shape depends on one."""
    matrix = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    expected = value_and_gradient(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(matrix)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with graphs.use_recorder(Emulator):
        captured = graphs.Captured(value_and_gradient, (torch.ones(12, 5),))
        assert all(torch.equal(a, b) for a, b in zip(captured(matrix), expected, strict=True))


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu_inside_a_graph():
    matrix = torch.randn(128, 10, generator=torch.Generator().manual_seed(1))
    expected = value_and_gradient(matrix)
    captured = graphs.Captured(value_and_gradient, (torch.ones(128, 10, device="cuda"),))
    for found, right in zip(captured(matrix.cuda()), expected, strict=True):
        torch.testing.assert_close(found.cpu(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "matrix, shown",
    [
        (torch.ones(3), r"\(3,\) and dtype torch.float32"),
        (torch.ones(2, 3, 4), r"\(2, 3, 4\) and dtype torch.float32"),
        (torch.ones(0, 4), r"\(0, 4\) and dtype torch.float32"),
        (torch.ones(2, 3, dtype=torch.int64), r"\(2, 3\) and dtype torch.int64"),
    ],
)
def test_what_is_no_matrix_is_refused(matrix, shown):
    with pytest.raises(UserError, match=f"^matrix has shape {shown}: must be \\(B, K\\), floating, none of them 0$"):
        nuclear_norm(matrix)
