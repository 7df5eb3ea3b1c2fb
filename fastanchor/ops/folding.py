"""The folded twin's weights from the live parameters: by one kernel for all layers where it is trusted, else by plain torch.

Also whether the kernels around its convolutions may be used: the checks that `verified` asks for.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from fastanchor import kernels
from fastanchor.ops.verified import switch, verified


class Refresh:
    """Called, it writes every layer's folded weight and bias anew, from the convolution and BatchNorm that it was made of.

    layers: each has `sources` (conv, norm), conv with weight and bias, norm with mean, var, weight, bias and eps, or None; and
    its own `weight` and `bias`, allocated, of fp32 or bf16 for the kernel. A table of addresses is kept for the kernel; it is
    made anew where a tensor was replaced or moved, which is seen on the host. It never reads a value. note: whether the kernel
    served the last call, and why.
    """

    def __init__(self, layers: list):
        self.layers, self.table, self.note = layers, None, ""
        # What a parametrised layer calls its weight is made anew by every look at it.
        self._one_kernel = not any(is_parametrized(layer.sources[0]) for layer in layers)
        # A captured graph goes on reading the table it was captured with, while the tensors may move and come back.
        self._in_graphs: set = set()

    @torch.no_grad()
    def __call__(self, kernel: bool = True) -> None:
        device = self.layers[0].weight.device
        good, reason = trusted("bn_fold", device) if kernel else (False, "kernels = off")
        if good and not self._one_kernel:
            good, reason = False, "a weight is parametrised, or of a dtype or layout that the kernel does not know"
        table = self._current_table(device) if good else None
        self.note = f"{'yes' if good else 'no'}: {reason}"
        if table is None:
            fold_all(self.layers)
        else:
            from fastanchor.kernels.bn_fold import bn_fold

            bn_fold(table)

    def _current_table(self, device: torch.device):
        """The table of the tensors as they are now; None where the kernel cannot fold them, or a capture forbids making one."""
        capturing = _capturing(device)
        if self.table is None or not self._is_current():
            if capturing:
                return None
            from fastanchor.kernels.bn_fold import FoldTable

            try:
                self.table = FoldTable(_folds(self.layers))
            except ValueError:  # says which tensor has a dtype, device or layout that the kernel does not know
                self._one_kernel = False
                return None
        if capturing:
            self._in_graphs.add(self.table)
        return self.table

    def _is_current(self) -> bool:
        """Whether the layers have the table's tensors, and these lie where they did."""
        pairs = zip(self.table.layers, _folds(self.layers), strict=True)
        return all(a is b for old, new in pairs for a, b in zip(old[:-1], new[:-1], strict=True)) and self.table.current()


def fold_all(layers: list) -> None:
    """weight = conv.weight * s, bias = beta + (conv.bias - mean) * s, s = gamma / sqrt(var + eps), in plain torch.

    In the parameters' own precision, then cast. The truth that the kernel is checked against.
    """
    scales = iter(_scales([layer.sources[1] for layer in layers if layer.sources[1] is not None]))
    for layer in layers:
        conv, norm = layer.sources
        if norm is None:
            layer.weight.copy_(conv.weight)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
            continue
        scale = next(scales)
        # Multiplied in the parameters' precision and rounded once. Not by out=, which on a CPU casts six times as slowly.
        layer.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
        mean = norm.mean if conv.bias is None else norm.mean - conv.bias
        layer.bias.copy_(-mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1))


def trusted(kernel: str, device: torch.device) -> tuple[bool, str]:
    """Whether "bn_fold" or "conv_epilogue" may be used on the device, and the reason in words.

    The first call for a device checks the kernel there, which reads values: not for a captured step, where what is known counts.
    """
    switch()  # a bad one is said wherever it is set, not only where kernels could run
    usable, reason = kernels.usable(device)
    return verified(kernel, _CHECKS[kernel], device) if usable else (False, reason)


def _scales(norms: list) -> list[Tensor]:
    """gamma / sqrt(var + eps) of every norm, in a few launches for all of them."""
    if not norms:
        return []
    scales = torch._foreach_add([norm.var for norm in norms], [norm.eps for norm in norms])
    torch._foreach_rsqrt_(scales)
    affine = [(scale, norm.weight) for scale, norm in zip(scales, norms, strict=True) if norm.weight is not None]
    if affine:
        torch._foreach_mul_(*map(list, zip(*affine, strict=True)))
    return scales


def _folds(layers: list) -> list:
    """The kernel's view of the layers."""
    from fastanchor.kernels.bn_fold import Fold

    folds = []
    for layer in layers:
        conv, norm = layer.sources
        of_norm = (None, None, None, None, 0.0) if norm is None else (norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
        folds.append(Fold(conv.weight, layer.weight, conv.bias, layer.bias, *of_norm))
    return folds


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_fold(device: torch.device) -> None:
    """Raise where the kernel's weights or biases are not `fold_all`'s: of both formats, depthwise, with and without a norm."""
    from fastanchor.kernels.bn_fold import FoldTable, bn_fold

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) + 0.5

    # (out, in, side, conv bias, norm, affine, channels-last)
    kinds = ((64, 3, 3, False, True, True, False), (96, 64, 3, False, True, True, True), (40, 33, 1, True, True, True, False),
             (72, 1, 5, False, True, False, False), (16, 24, 3, True, False, False, False))  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        layers = []
        for channels, inner, side, has_bias, has_norm, affine, channels_last in kinds:
            conv = SimpleNamespace(weight=random(channels, inner, side, side) - 1, bias=random(channels) if has_bias else None)
            if channels_last:
                conv.weight = conv.weight.contiguous(memory_format=torch.channels_last)
            norm = SimpleNamespace(mean=random(channels) - 1, var=random(channels), weight=None, bias=None, eps=1e-5)
            if affine:
                norm.weight, norm.bias = random(channels) - 1, random(channels) - 1
            weight = torch.empty_like(conv.weight, dtype=dtype, memory_format=torch.channels_last)
            bias = weight.new_empty(channels) if has_bias or has_norm else None
            layers.append(SimpleNamespace(sources=(conv, norm if has_norm else None), weight=weight, bias=bias))
        bn_fold(FoldTable(_folds(layers)))
        found = [(layer.weight.clone(), layer.bias.clone()) for layer in layers]
        fold_all(layers)
        # bf16: a unit of its 8 bits, where two fp32 values that all but agree lie on either side of a rounding.
        rtol, atol = (2e-6, 2e-6) if dtype == torch.float32 else (2**-7, 2e-6)
        for pair, layer in zip(found, layers, strict=True):
            torch.testing.assert_close(pair, (layer.weight, layer.bias), rtol=rtol, atol=atol)


def _check_epilogue(device: torch.device) -> None:
    """Raise where the kernels differ from torch's bias, sum, ReLU and ReLU backward, in both formats and dtypes, NaN included."""
    from fastanchor.kernels.epilogue import epilogue_, relu_backward

    generator = torch.Generator(device).manual_seed(0)
    for dtype, rtol in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        for shape in ((3, 64, 9, 7), (2, 37, 5, 3)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                out, residual, gradient = (
                    torch.randn(shape, generator=generator, device=device).to(dtype).contiguous(memory_format=memory_format)
                    for _ in range(3)
                )
                out[0, 0, 0, 0] = float("nan")
                bias = torch.randn(shape[1], generator=generator, device=device).to(dtype)
                for b, r in ((bias, None), (bias, residual), (None, residual)):
                    expected = out.float() + (0 if b is None else b.float().view(-1, 1, 1)) + (0 if r is None else r.float())
                    found = epilogue_(out.clone(), b, r)
                    torch.testing.assert_close(found, F.relu(expected).to(dtype), rtol=rtol, atol=1e-6, equal_nan=True)
                    masked = torch.ops.aten.threshold_backward(gradient, found, 0)
                    torch.testing.assert_close(relu_backward(gradient, found), masked, rtol=0, atol=0)


_CHECKS = {"bn_fold": _check_fold, "conv_epilogue": _check_epilogue}
