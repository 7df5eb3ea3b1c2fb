"""ResNet-18 and PreActResNet-18 for small images (3x3 stride-1 stem, no max-pool), and ResNet-50 for photographs of 224 pixels.

Layer names are those of the public CIFAR nets (conv1, bn1, layer1.0.conv1, ..., shortcut.0): foreign weights map by prefix.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastanchor.errors import UserError


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Returns `value` if it is an int of at least `minimum`; raises UserError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{name} is {value!r}; allowed: a whole number of at least {minimum}")
    return value


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias (a batch norm or a pre-activated block follows)."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class Backbone(nn.Sequential):
    """Images (N, C, H, W), already normalised -> features (N, `num_features`); any H, W from 16 up, any memory format."""

    def __init__(self, layers: "OrderedDict[str, nn.Module]", num_features: int):
        super().__init__(layers)
        self.num_features = num_features


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity, or where the shape changes a 1x1 convolution and a BN (He et al. 2016a, option B)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """He et al. 2016a (arXiv 1512.03385): relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Every convolution is followed by its own BN.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """He et al. 2016b (arXiv 1603.05027): conv2(relu(bn2(conv1(a)))) + shortcut, with a = relu(bn1(x)).

    The shortcut is x, or a 1x1 convolution (no BN) of the pre-activated a where the shape changes.
    Wide ResNets use the same block.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.projects = stride != 1 or in_channels != out_channels
        if self.projects:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = self.shortcut(active) if self.projects else x
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + shortcut


class Bottleneck(nn.Module):
    """He et al. 2016a's block of three convolutions, 1x1, 3x3 and 1x1, the middle ones a quarter as wide as the result.

    relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)), the stride in the 3x3 convolution: the "v1.5" that
    torchvision and timm publish weights of. The shortcut as in `BasicBlock`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        narrow = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = conv3x3(narrow, narrow, stride)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def stages(
    block: type[nn.Module], in_channels: int, channels: Sequence[int], blocks: int | Sequence[int]
) -> "OrderedDict[str, nn.Module]":
    """layer1, layer2, ...: `blocks` blocks each (or as listed), the first of every stage but layer1 halving height and width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    counts = [blocks] * len(channels) if isinstance(blocks, int) else blocks
    for index, (out_channels, count) in enumerate(zip(channels, counts, strict=True), start=1):
        first = block(in_channels, out_channels, stride=1 if index == 1 else 2)
        rest = [block(out_channels, out_channels, stride=1) for _ in range(count - 1)]
        layers[f"layer{index}"] = nn.Sequential(first, *rest)
        in_channels = out_channels
    return layers


def global_mean() -> "OrderedDict[str, nn.Module]":
    """(N, F, H, W) -> (N, F), the mean over all positions."""
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1))


def preact_net(stem_channels: int, channels: Sequence[int], blocks: int, in_channels: int) -> Backbone:
    """A pre-activation net: 3x3 stem, stages of PreActBlock, a last BN and ReLU, global mean."""
    return Backbone(
        OrderedDict(
            conv1=conv3x3(in_channels, stem_channels),
            **stages(PreActBlock, stem_channels, channels, blocks),
            bn=nn.BatchNorm2d(channels[-1]),
            relu=nn.ReLU(),
            **global_mean(),
        ),
        num_features=channels[-1],
    )


def resnet18(width: int = 64, in_channels: int = 3) -> Backbone:
    """ResNet-18 with the CIFAR stem; stages have width, 2, 4 and 8 times width channels (published: 64); num_features = 8 width.

    Initialised by torch's defaults, as the public adversarial-training codes do. Raises UserError for a width or in_channels < 1.
    """
    width, in_channels = check_count("width", width), check_count("in_channels", in_channels)
    channels = [width, 2 * width, 4 * width, 8 * width]
    return Backbone(
        OrderedDict(
            conv1=conv3x3(in_channels, width),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            **stages(BasicBlock, width, channels, blocks=2),
            **global_mean(),
        ),
        num_features=channels[-1],
    )


def preactresnet18(width: int = 64, in_channels: int = 3) -> Backbone:
    """PreActResNet-18 of the robust-overfitting literature (Rice et al. 2020, arXiv 2002.11569): a BN and ReLU before the mean.

    Stages, initialisation and errors as in `resnet18`.
    """
    width, in_channels = check_count("width", width), check_count("in_channels", in_channels)
    return preact_net(width, [width, 2 * width, 4 * width, 8 * width], blocks=2, in_channels=in_channels)


def resnet50(width: int = 64, in_channels: int = 3) -> Backbone:
    """ResNet-50 with the ImageNet stem: 7x7 convolution of stride 2 and 3x3 max-pool, so 224 x 224 pixels become 7 x 7 positions.

    Stages of 3, 4, 6 and 3 `Bottleneck`s with 4, 8, 16 and 32 times width channels (published: 64); num_features = 32 width.
    Initialised by torch's defaults. Raises UserError for a width or in_channels < 1.
    """
    width, in_channels = check_count("width", width), check_count("in_channels", in_channels)
    channels = [4 * width, 8 * width, 16 * width, 32 * width]
    return Backbone(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(3, stride=2, padding=1),
            **stages(Bottleneck, width, channels, blocks=(3, 4, 6, 3)),
            **global_mean(),
        ),
        num_features=channels[-1],
    )
