"""Wide ResNets for small images: WRN-28-10, WRN-34-10 and any other depth 6n + 4.

Source: Zagoruyko and Komodakis 2016 (arXiv 1605.07146). The blocks are those of the pre-activation net in resnet.py;
only the widths, the depth and the initialisation differ.
"""

from torch import nn

from fastanchor.errors import UserError
from fastanchor.models.resnet import Backbone, check_count, preact_net


def wide_resnet(depth: int, widen_factor: int, width: int = 16, in_channels: int = 3) -> Backbone:
    """WRN-`depth`-`widen_factor` without dropout: stem of `width` channels (published: 16), three stages of
    (depth - 4) / 6 blocks with width, 2 and 4 times width, each times widen_factor; num_features = 4 width widen_factor.

    Convolutions start from He normal, fan_out (variance 2 / (k k out_channels)); BN weights from 1 and biases from 0.
    Raises UserError where depth is not 6n + 4 with n >= 1, or widen_factor, width or in_channels is < 1.
    """
    depth, widen_factor = check_count("depth", depth), check_count("widen_factor", widen_factor)
    width, in_channels = check_count("width", width), check_count("in_channels", in_channels)
    blocks, remainder = divmod(depth - 4, 6)
    if remainder or blocks < 1:
        raise UserError(f"depth is {depth}; a wide ResNet's depth is 6n + 4 with n >= 1: 10, 16, 22, 28, 34, ...")
    base = width * widen_factor
    net = preact_net(width, [base, 2 * base, 4 * base], blocks, in_channels)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
