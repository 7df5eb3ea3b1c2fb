"""What follows a convolution, in one kernel, run by Triton's interpreter: against autograd in fp64 and torch's own operations."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastanchor.kernels import epilogue
from interpreter import interpreted

FORMATS = (torch.contiguous_format, torch.channels_last)
PARTS = [(bias, residual, relu) for bias in (True, False) for residual in (True, False) for relu in (True, False)]


@pytest.fixture(autouse=True)
def on_the_interpreter():
    with interpreted(epilogue):
        yield


def tensors(*shape, seed=0, memory_format=torch.contiguous_format, dtype=torch.float32):
    """A convolution's output, a residual, a gradient of that layout, with zeros among their values; a bias."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)).to(dtype)

    out, residual, gradient = (random(*shape).contiguous(memory_format=memory_format) for _ in range(3))
    return out, residual, gradient, random(shape[1])


def truth_of(out, residual, gradient, bias, relu):
    """The result in fp64 and the gradient of its product with `gradient` to each of the three, by autograd."""
    given = [None if t is None else t.double().requires_grad_() for t in (out, residual, bias)]
    out, residual, bias = given
    value = out + (0 if bias is None else bias.view(1, -1, *[1] * (out.ndim - 2))) + (0 if residual is None else residual)
    value = value.relu() if relu else value
    (value * gradient.double()).sum().backward()
    return value.detach(), out.grad, None if residual is None else residual.grad


# Ragged at the block of 1024, and channels of any number.
shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=40)
@given(shape=shapes, memory_format=st.sampled_from(FORMATS), parts=st.sampled_from(PARTS), seed=st.integers(0, 99))
@example(shape=(1, 1024, 1, 1), memory_format=FORMATS[1], parts=PARTS[0], seed=0)
@example(shape=(2, 5, 41, 25), memory_format=FORMATS[0], parts=PARTS[0], seed=0)
@example(shape=(1, 3, 683, 1), memory_format=FORMATS[1], parts=PARTS[0], seed=0)
def test_result_and_gradients_are_autograds_in_fp64(shape, memory_format, parts, seed):
    has_bias, has_residual, relu = parts
    out, residual, gradient, bias = tensors(*shape, seed=seed, memory_format=memory_format)
    residual, bias = residual if has_residual else None, bias if has_bias else None
    value, to_out, to_residual = truth_of(out, residual, gradient, bias, relu)
    layout, memory = out.stride(), out.data_ptr()
    kept = [t.clone() for t in (residual, gradient, bias) if t is not None]
    found = epilogue.epilogue_(out, bias, residual, relu)
    assert found is out and (found.stride(), found.data_ptr()) == (layout, memory)
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)
    if relu:
        masked = epilogue.relu_backward(gradient, found)
        assert torch.equal(masked.double(), to_out) and masked.stride() == gradient.stride()
        assert to_residual is None or torch.equal(masked.double(), to_residual)
    assert all(map(torch.equal, [t for t in (residual, gradient, bias) if t is not None], kept))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("parts", PARTS)
def test_bf16_is_added_in_fp32_and_rounded_once(memory_format, parts):
    has_bias, has_residual, relu = parts
    out, residual, gradient, bias = tensors(2, 37, 5, 7, memory_format=memory_format, dtype=torch.bfloat16)
    residual, bias = residual if has_residual else None, bias if has_bias else None
    value, *_ = truth_of(out, residual, gradient, bias, relu)
    found = epilogue.epilogue_(out, bias, residual, relu)
    # The interpreter truncates where a GPU rounds: one unit of bf16's 8 bits; two roundings would be off by more.
    assert found.dtype == torch.bfloat16
    assert ((found.double() - value).abs() <= 2**-7 * value.abs()).all()
    masked = epilogue.relu_backward(gradient, found)
    assert torch.equal(masked, torch.ops.aten.threshold_backward(gradient, found, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_is_as_in_torch(dtype):
    nan, inf = float("nan"), float("inf")
    out = torch.tensor([nan, inf, -inf, -0.0, 0.0, 1.0, -1.0, inf], dtype=dtype).view(1, 2, 2, 2)
    residual = torch.tensor([1.0, 1.0, 1.0, 0.0, nan, nan, -1.0, -inf], dtype=dtype).view(1, 2, 2, 2)
    expected = torch.relu(out + residual)
    found = epilogue.epilogue_(out.clone(), None, residual)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 4
    gradient = torch.tensor([1.0, nan, nan, nan, 2.0, inf, 3.0, 4.0], dtype=dtype).view(1, 2, 2, 2)
    masked = epilogue.relu_backward(gradient, found)
    torch.testing.assert_close(masked, torch.ops.aten.threshold_backward(gradient, found, 0), rtol=0, atol=0, equal_nan=True)


def test_a_lost_bias_of_one_channel_is_lost_there_alone():
    out, _, _, bias = tensors(2, 5, 3, 3, memory_format=torch.channels_last)
    bias[2] = float("nan")
    found = epilogue.epilogue_(out, bias)
    assert found[:, 2].isnan().all() and not found[:, [0, 1, 3, 4]].isnan().any()


def test_without_anything_to_do_nothing_is_launched(monkeypatch):
    monkeypatch.setattr(epilogue, "_epilogue_kernel", None)
    out = torch.randn(2, 3, 4, 4)
    expected = out.clone()
    assert torch.equal(epilogue.epilogue_(out, relu=False), expected)
    assert epilogue.epilogue_(out[:0]).shape == (0, 3, 4, 4)


def test_rows_without_positions_have_channels_too():
    out, residual, _, bias = tensors(3, 5)
    expected = torch.relu(out + bias + residual)
    torch.testing.assert_close(epilogue.epilogue_(out, bias, residual), expected)


def test_what_is_refused():
    out, residual, gradient, bias = tensors(2, 6, 4, 4)
    last = residual.contiguous(memory_format=torch.channels_last)
    for call, message in (
        (lambda: epilogue.epilogue_(out.double()), "out is torch.float64"),
        (lambda: epilogue.epilogue_(out.half()), "out is torch.float16"),
        (lambda: epilogue.epilogue_(out, bias.bfloat16()), "bias is torch.bfloat16"),
        (lambda: epilogue.epilogue_(out, bias[:3]), r"bias has shape \(3,\): must be \(6,\)"),
        (lambda: epilogue.epilogue_(out, torch.zeros(12)[::2]), "bias has shape"),
        (lambda: epilogue.epilogue_(out, None, residual.bfloat16()), "residual is torch.bfloat16"),
        (lambda: epilogue.epilogue_(out, None, residual[:, :3]), "residual has shape"),
        (lambda: epilogue.epilogue_(out, None, last), "residual has strides"),
        (lambda: epilogue.epilogue_(out.transpose(2, 3)), "out has strides"),
        (lambda: epilogue.epilogue_(out[:, :3]), "out has strides"),
        (lambda: epilogue.epilogue_(out.flatten()), "must have channels"),
        (lambda: epilogue.epilogue_(out, bias.to("meta")), "bias is on meta, out on cpu"),
        (lambda: epilogue.relu_backward(gradient.bfloat16(), out), "gradient is torch.bfloat16"),
        (lambda: epilogue.relu_backward(gradient.expand(3, 2, 6, 4, 4), out), "gradient has shape"),
        (lambda: epilogue.relu_backward(last, out), "gradient has strides"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_off_cuda_it_says_so():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epilogue, "_epilogue_kernel", epilogue_kernel)
        with pytest.raises(ValueError, match="out is on cpu: Triton kernels need CUDA tensors"):
            epilogue.epilogue_(torch.zeros(1, 1, 1, 1))


epilogue_kernel = epilogue._epilogue_kernel
