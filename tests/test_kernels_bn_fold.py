"""The fold of all layers in one launch, run by Triton's interpreter, against the twin's own refresh and the formula in fp64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")

from fastanchor.kernels import bn_fold as kernels
from interpreter import interpreted

from fastanchor.models.folded import fold

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def on_the_interpreter():
    with interpreted(kernels):
        yield


def a_layer(channels, inner, side, *, norm=True, affine=True, bias=False, formats=FORMATS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def vector(wanted, low=-1.0):
        return low + (1 - low) * torch.rand(channels, generator=generator) if wanted else None

    weight = torch.randn(channels, inner, side, side, generator=generator).contiguous(memory_format=formats[0])
    out_bias = torch.full((channels,), 9.0, dtype=dtype) if norm or bias else None
    return kernels.Fold(
        weight, torch.full_like(weight, 9.0, dtype=dtype).contiguous(memory_format=formats[1]), vector(bias), out_bias,
        vector(norm), vector(norm, 1e-6), vector(norm and affine), vector(norm and affine), 1e-5,
    )  # fmt: skip


def truth_of(layer):
    """The formula in fp64; a bias of None is zeros."""
    weight = layer.weight.double()
    zeros = weight.new_zeros(len(weight))
    bias = zeros if layer.bias is None else layer.bias.double()
    if layer.mean is None:
        return weight, bias
    scale = (layer.var.double() + layer.eps).rsqrt() * (1 if layer.gamma is None else layer.gamma.double())
    shifted = (bias - layer.mean.double()) * scale
    return weight * scale.view(-1, 1, 1, 1), shifted + (zeros if layer.beta is None else layer.beta.double())


def assert_folded(layer, rtol=1e-6):
    weight, bias = truth_of(layer)
    torch.testing.assert_close(layer.out_weight.double(), weight, rtol=rtol, atol=0)
    if layer.out_bias is not None:
        torch.testing.assert_close(layer.out_bias.double(), bias, rtol=rtol, atol=rtol * bias.abs().max().item())


layers = st.builds(
    a_layer, st.integers(1, 9), st.integers(1, 70), st.integers(1, 3), norm=st.booleans(), affine=st.booleans(), bias=st.booleans(),
    formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)), seed=st.integers(0, 9),
)  # fmt: skip


@settings(max_examples=25)
@given(layers=st.lists(layers, min_size=1, max_size=4))
@example(layers=[a_layer(3, 1, 1)])  # filters of one element
def test_any_layers_are_folded_by_the_formula(layers):
    kernels.bn_fold(kernels.FoldTable(layers))
    for layer in layers:
        assert_folded(layer)


@pytest.mark.parametrize("formats", [(a, b) for a in FORMATS for b in FORMATS])
def test_bf16_in_every_pair_of_formats(formats):
    layer = a_layer(5, 33, 3, bias=True, formats=formats, dtype=torch.bfloat16)
    kernels.bn_fold(kernels.FoldTable([layer]))
    # The interpreter truncates where a GPU rounds: one unit of bf16's 8 bits.
    assert_folded(layer, rtol=2**-7)


def live_layers(twin):
    folds = []
    for layer in twin.layers:
        conv, norm = layer.sources
        of_norm = (None, None, None, None, 1e-5) if norm is None else (norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
        folds.append(kernels.Fold(conv.weight, layer.weight, conv.bias, layer.bias, *of_norm))
    return folds


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_whole_network_as_its_twin_refreshes_it_from_live_parameters(tiny_model, memory_format):
    model = tiny_model.to(memory_format=memory_format)
    twin = fold(model, torch.rand(2, 3, 32, 32))
    table = kernels.FoldTable(live_layers(twin))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.2)
                module.running_var.mul_(1.5)
    assert table.current()
    kernels.bn_fold(table)
    found = [(layer.weight.clone(), layer.bias.clone()) for layer in twin.layers]
    twin.refresh()
    for (weight, bias), layer in zip(found, twin.layers, strict=True):
        torch.testing.assert_close(weight, layer.weight, rtol=1e-6, atol=0)
        torch.testing.assert_close(bias, layer.bias, rtol=1e-6, atol=1e-6)


def test_a_table_knows_when_its_addresses_are_old():
    layer = a_layer(4, 3, 3, formats=(torch.contiguous_format, torch.contiguous_format))
    table = kernels.FoldTable([layer])
    layer.weight.mul_(2)
    assert table.current()
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    assert not table.current()
    kernels.bn_fold(kernels.FoldTable([layer]))
    assert_folded(layer)


def test_what_is_refused():
    good = a_layer(4, 3, 3, bias=True)
    for changed, message in (
        ({"weight": good.weight.double()}, "weight is torch.float64"),
        ({"out_weight": good.out_weight.half(), "out_bias": good.out_bias.half()}, "out_weight is torch.float16"),
        ({"out_weight": good.out_weight[:2]}, "out_weight has shape"),
        ({"weight": good.weight.transpose(2, 3)}, "weight has strides"),
        ({"gamma": good.gamma[:2]}, "gamma has shape"),
        ({"var": None}, "mean and var"),
        ({"mean": None, "var": None}, "gamma and beta need"),
        ({"out_bias": None}, "out_bias: needed"),
        ({"out_bias": good.out_bias.bfloat16()}, "out_bias is torch.bfloat16"),
        ({"beta": good.beta.to("meta")}, "beta is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.FoldTable([good._replace(**changed)])
    with pytest.raises(ValueError, match="no layer"):
        kernels.FoldTable([])
    with pytest.raises(ValueError, match="of one dtype"):
        kernels.FoldTable([good, a_layer(4, 3, 3, dtype=torch.bfloat16)])
