"""The composed model: pixels in [0, 1] -> normalisation -> backbone -> logits, and on request a projection.

Also the registry of backbones by name, and the counts of parameters and multiply-adds.
"""

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastanchor.errors import UserError, did_you_mean
from fastanchor.models.resnet import Backbone, check_count, preactresnet18, resnet18, resnet50
from fastanchor.models.wideresnet import wide_resnet

MODELS = ("resnet18", "preactresnet18", "resnet50", "wrn28_10", "wrn34_10")
HEADS = ("mlp", "mlp_bn", "linear", "identity")

_RESNETS = {"resnet18": resnet18, "preactresnet18": preactresnet18, "resnet50": resnet50}
_RESNET_WIDTH = 64
_WRN_WIDTH = 16


class Normalize(nn.Module):
    """(images - mean) / std by channel; mean and std are buffers of shape (1, C, 1, 1) and travel in the state_dict.

    The result has the buffers' dtype, so a bf16 or fp64 model takes the fp32 images that attacks produce.
    Raises UserError where mean and std differ in length or are empty, a value is not finite, or a std is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = _numbers("mean", mean), _numbers("std", std)
        if len(mean) != len(std):
            raise UserError(f"mean has {len(mean)} values and std has {len(std)}; allowed: one of each for every image channel")
        if min(std) <= 0:
            raise UserError(f"std is {std}; allowed: values above 0")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # Cast last: subtracting in bf16 would lose the low bits that tell x_adv from x.
        return ((images - self.mean) / self.std).to(self.mean.dtype)


class RobustClassifier(nn.Module):
    """normalize -> backbone -> classifier (logits), with a projection from the same features beside it.

    `zero_bias` starts the classifier's bias from 0 (Wide ResNets); its weight starts from torch's default, as `projection` does.
    """

    def __init__(
        self, normalize: Normalize, backbone: Backbone, projection: nn.Module, num_classes: int, zero_bias: bool = False
    ):
        super().__init__()
        self.normalize = normalize
        self.backbone = backbone
        self.zero_bias = zero_bias
        self.classifier = self._new_classifier(num_classes)
        self.projection = projection

    def _new_classifier(self, num_classes: int) -> nn.Linear:
        layer = nn.Linear(self.backbone.num_features, check_count("num_classes", num_classes, minimum=2))
        if self.zero_bias:
            nn.init.zeros_(layer.bias)
        return layer

    def features(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> backbone features (N, F)."""
        return self.backbone(self.normalize(images))

    def forward(self, images: Tensor, embed: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images (N, C, H, W) in [0, 1], fp32 or any other floating dtype -> logits (N, K) in the parameters' dtype.

        With embed=True: (logits, embeddings (N, head_dim)); embeddings are not normalised, the contrastive loss does that.
        The branch is on a Python bool only, so torch.fx traces it with concrete_args={"embed": False}.
        """
        features = self.features(images)
        logits = self.classifier(features)
        if embed:
            return logits, self.projection(features)
        return logits

    def replace_classifier(self, num_classes: int) -> nn.Linear:
        """Puts a freshly initialised linear layer for `num_classes` in place of the classifier, and returns it.

        Device, dtype and train / eval flag are those of the old layer; its parameters are new objects that need
        gradients, so an optimiser must be made after this call. Drawn from the CPU generator, so the same on every device.
        Raises UserError for num_classes < 2.
        """
        old = self.classifier
        with torch.device("cpu"):
            layer = self._new_classifier(num_classes)
        self.classifier = layer.to(device=old.weight.device, dtype=old.weight.dtype).train(old.training)
        return self.classifier

    def reset_classifier(self) -> nn.Linear:
        """`replace_classifier` with the present number of classes."""
        return self.replace_classifier(self.classifier.out_features)


def build_model(
    name: str,
    *,
    num_classes: int,
    width: int | None = None,
    head: str = "mlp",
    head_hidden: int = 512,
    head_dim: int = 128,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> RobustClassifier:
    """The model called `name` (MODELS, or wrn<depth>_<widen> with depth 6n + 4), initialised from torch's global generator.

    width: channels of the first stage of a ResNet, or of a wide ResNet's stem; all else scales with it. None is the published
        net: 64, and 16 for the wide ones.
    head: "mlp" is Linear(F, head_hidden)-ReLU-Linear(head_hidden, head_dim), "mlp_bn" has a BatchNorm before its ReLU, "linear"
        is Linear(F, head_dim), "identity" gives the features themselves, (N, F); head_hidden and head_dim count only where a head
        has such a layer.
    mean, std: of the pixels in [0, 1], by channel; their length is the number of image channels.
    Raises UserError for an unknown name or head, a count out of range, or a bad mean or std.
    """
    normalize = Normalize(mean, std)
    backbone = _backbone(name, width, in_channels=normalize.mean.shape[1])
    projection = _projection(head, backbone.num_features, head_hidden, head_dim)
    return RobustClassifier(normalize, backbone, projection, num_classes, zero_bias=name not in _RESNETS)


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, frozen ones included, shared ones once; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def mac_count(module: nn.Module, image_size: int = 32, channels: int = 3) -> int:
    """Multiply-adds of one image's eval-mode forward in convolutions and matrix products (biases, BN and ReLU are not counted).

    Counted by torch.utils.flop_counter, halved, on a copy without storage: nothing is computed, and `module` stays as it is.
    All tensors of `module` must be parameters or buffers. Raises UserError for an image_size or channels < 1.
    """
    size, channels = check_count("image_size", image_size), check_count("channels", channels)
    # deepcopy takes what the memo holds for an id: every tensor is swapped for its meta twin, so no weight is copied.
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    memo.update({id(b): b.detach().to("meta") for b in module.buffers()})
    twin = copy.deepcopy(module, memo).eval()
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.get_default_dtype())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, channels, size, size, dtype=dtype, device="meta"))
    return counter.get_total_flops() // 2


def _backbone(name: str, width: int | None, in_channels: int) -> Backbone:
    if isinstance(name, str):
        if name in _RESNETS:
            return _RESNETS[name](_RESNET_WIDTH if width is None else width, in_channels)
        if wide := re.fullmatch(r"wrn([0-9]{1,4})_([0-9]{1,4})", name):
            return wide_resnet(int(wide[1]), int(wide[2]), _WRN_WIDTH if width is None else width, in_channels)
    raise _unknown("model", name, MODELS, " or wrn<depth>_<widen> with depth 6n + 4")


def _projection(head: str, num_features: int, hidden: int, dim: int) -> nn.Module:
    if head == "identity":
        return nn.Identity()
    if head == "linear":
        return nn.Linear(num_features, check_count("head_dim", dim))
    if head in ("mlp", "mlp_bn"):
        hidden, dim = check_count("head_hidden", hidden), check_count("head_dim", dim)
        norm = {"bn": nn.BatchNorm1d(hidden)} if head == "mlp_bn" else {}
        return nn.Sequential(OrderedDict(fc1=nn.Linear(num_features, hidden), **norm, relu=nn.ReLU(), fc2=nn.Linear(hidden, dim)))
    raise _unknown("head", head, HEADS)


def _unknown(key: str, value: object, allowed: Sequence[str], more: str = "") -> UserError:
    return UserError(
        f"{key} {value!r} is unknown{did_you_mean(str(value).lower(), allowed)}; allowed: {', '.join(allowed)}{more}"
    )


def _numbers(key: str, values: Sequence[float]) -> list[float]:
    try:
        numbers = [] if isinstance(values, str) else [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{key} is {values!r}; allowed: one finite number for every image channel")
    return numbers
