"""Networks that this project did not write, for tests of the folded twin: those of torchvision and timm, and small ones for every
way in which a forward may put convolution, BatchNorm, sum and ReLU together, or do what no traced graph can repeat.
"""

import importlib
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

CHANNELS = 6
_registered = []


def import_or_skip(name):
    """torchvision or timm. The test is skipped where they are missing."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        # torchvision's C extension does not load beside a torch of another build (there is no CPU wheel on PyPI), and without it
        # the import stops at two operators that no classifier uses. Declared, not implemented, they let the rest be imported.
        if "torchvision::nms" not in str(error):
            raise
    for module in [module for module in sys.modules if module.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _registered.append(library)  # the declarations live as long as the library object
    return importlib.import_module(name)


def scramble(net, seed=0):
    """BatchNorm's statistics, scales (of both signs) and shifts away from 0 and 1; in eval mode."""
    g = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.3, generator=g)
                module.running_var.uniform_(0.3, 3, generator=g)
            for values in module.parameters():
                values.data.normal_(0, 1, generator=g)
    return net.eval()


def conv(kernel=3, **options):
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, **{"padding": 1, "bias": False, **options})


def norm(**options):
    return nn.BatchNorm2d(CHANNELS, **options)


class Plain(nn.Module):
    """stem -> sine -> `rule(net, x)` with its own `layers()` -> mean over positions -> logits (of each part of a tuple); fp64."""

    def __init__(self, rule, layers):
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.stem, self.head = rule, nn.Conv2d(3, CHANNELS, 1), nn.Linear(CHANNELS, 5)
        for name, layer in layers().items():
            setattr(self, name, layer)
        scramble(self.double()).requires_grad_(False)

    def forward(self, images):
        out = self.rule(self, torch.sin(self.stem(images)))
        return tuple(self.head(part.mean((2, 3))) for part in out) if isinstance(out, tuple) else self.head(out.mean((2, 3)))


# -- what is folded: rules, with the layers c and d (convolutions), b and e (BatchNorms), other (whatever) ---------------------------


def functional_norm(net, x):
    return F.relu(F.batch_norm(net.c(x), net.b.running_mean, net.b.running_var, net.b.weight, net.b.bias, False, 0.1, net.b.eps))


def norm_on_the_batch(net, x):
    return F.batch_norm(net.c(x), net.b.running_mean, net.b.running_var, training=True)


def input_written(net, x):
    out = net.c(x)
    x.mul_(2)
    return net.b(out) + x


def input_written_by_a_function(net, x):
    out = net.c(x)
    F.hardtanh(x, 0.2, 0.5, inplace=True)
    return F.relu(net.b(out))


def input_written_by_a_module(net, x):
    out = net.c(x)
    net.other(x)
    return F.relu(net.b(out))


def residual_written(net, x):
    side = 1 * x
    out = net.b(net.c(x)) + side
    side.sub_(3)
    return F.relu(out) * side


def added_into_the_residual(net, x):
    side = 1 * x
    side.add_(net.b(net.c(x)))
    return F.relu(side) * side


def unnamed(net, x):
    out = net.b(net.c(x))
    out.add_(x)
    out.relu_()
    return out


def assigned(net, x):
    out = net.b(net.c(x))
    out += x
    return F.relu(out, inplace=True)


def two_users(net, x):
    out = net.c(x)
    return F.relu(net.b(out)) + out


def norm_with_two_users(net, x):
    out = net.b(net.c(x))
    return F.relu(out) + out


def sum_with_two_users(net, x):
    out = net.b(net.c(x)) + x
    return F.relu(out) * out


def viewed(net, x):
    out = net.b(net.c(x))
    return out.view(out.size(0), CHANNELS, -1, 2)


def usual(net, x):
    return F.relu(net.b(net.c(x)))


def branches(net, x):
    return F.relu(net.b(net.c(x)) + net.e(net.d(x)))


def one(**options):
    return lambda: {"c": conv(**options), "b": norm()}


def with_norm(make):
    return lambda: {"c": conv(bias=True), "b": make()}


def with_other(make):
    return lambda: {"c": conv(), "b": norm(), "other": make()}


def two():
    return {"c": conv(), "b": norm(), "d": conv(bias=True), "e": norm()}


# name -> rule, layers, then what the twin takes in: convolutions besides the stem's, BatchNorms folded and kept, ReLUs, sums
PATTERNS = {
    "conv, norm, relu": (usual, one(), 1, 1, 0, 1, 0),
    "bias": (usual, one(bias=True), 1, 1, 0, 1, 0),
    "groups": (usual, one(groups=2), 1, 1, 0, 1, 0),
    "depthwise": (usual, one(groups=CHANNELS, bias=True), 1, 1, 0, 1, 0),
    "dilation": (usual, one(dilation=2, padding=2), 1, 1, 0, 1, 0),
    "stride": (usual, one(stride=(2, 1)), 1, 1, 0, 1, 0),
    "asymmetric": (usual, one(kernel=(3, 1), padding=(2, 0), stride=(1, 2), dilation=(2, 1)), 1, 1, 0, 1, 0),
    "even kernel": (usual, one(kernel=4), 1, 1, 0, 1, 0),
    "same": (usual, one(padding="same"), 0, 0, 1, 0, 0),
    "reflect": (usual, one(padding_mode="reflect"), 0, 0, 1, 0, 0),
    "keyword": (lambda net, x: F.relu(input=net.b(input=net.c(input=x))), one(), 0, 0, 1, 0, 0),
    "keyword of the norm": (lambda net, x: F.relu(input=net.b(input=net.c(x))), one(), 1, 1, 0, 1, 0),
    "no norm": (lambda net, x: F.relu(net.c(x)), one(), 1, 0, 0, 1, 0),
    "no norm, residual": (lambda net, x: F.relu(net.c(x) + x), one(), 1, 0, 0, 1, 1),
    "no norm, bias, residual": (lambda net, x: F.relu(net.c(x) + x), one(bias=True), 1, 0, 0, 1, 1),
    "no affine": (usual, with_norm(lambda: norm(affine=False)), 1, 1, 0, 1, 0),
    "no statistics": (usual, with_norm(lambda: norm(track_running_stats=False)), 1, 0, 0, 0, 0),
    "functional norm": (functional_norm, one(bias=True), 1, 1, 0, 1, 0),
    "norm on the batch": (norm_on_the_batch, one(), 1, 0, 0, 0, 0),
    "norm first": (lambda net, x: net.c(F.relu(net.b(x))), one(), 1, 0, 1, 0, 0),
    "two norms": (lambda net, x: net.b(net.b(net.c(x))), one(), 1, 1, 1, 0, 0),
    "shared": (lambda net, x: net.b(net.c(F.relu(net.b(net.c(x))))), one(), 2, 2, 0, 1, 0),
    "shared, other norm": (lambda net, x: net.e(net.c(F.relu(net.b(net.c(x))))), two, 2, 2, 0, 1, 0),
    "two users": (two_users, one(), 1, 0, 1, 0, 0),
    "norm with two users": (norm_with_two_users, one(), 1, 1, 0, 0, 0),
    "sum with two users": (sum_with_two_users, one(), 1, 1, 0, 0, 1),
    "residual": (lambda net, x: F.relu(net.b(net.c(x)) + x), one(), 1, 1, 0, 1, 1),
    "residual first": (lambda net, x: torch.relu(x + net.b(net.c(x))), one(), 1, 1, 0, 1, 1),
    "residual by method": (lambda net, x: net.b(net.c(x)).add(x).relu(), one(), 1, 1, 0, 1, 1),
    "residual by function": (lambda net, x: torch.add(x, net.b(net.c(x))).relu_(), one(), 1, 1, 0, 1, 1),
    "residual in place": (lambda net, x: torch.relu_(net.b(net.c(x)).add_(x)), one(), 1, 1, 0, 1, 1),
    "assigned": (assigned, one(), 1, 1, 0, 1, 1),
    "unnamed": (unnamed, one(), 1, 1, 0, 0, 0),
    "two branches": (branches, two, 2, 2, 0, 1, 1),
    "two plain branches": (lambda net, x: F.relu(net.c(x) + net.d(x)), two, 2, 0, 0, 1, 1),
    "itself": (lambda net, x: F.relu((out := net.b(net.c(x))) + out), one(), 1, 1, 0, 0, 0),
    "alpha": (lambda net, x: torch.add(net.b(net.c(x)), x, alpha=-2).relu(), one(), 1, 1, 0, 0, 0),
    "constant": (lambda net, x: F.relu(net.b(net.c(x)) + 0.5), one(), 1, 1, 0, 0, 0),
    "parameter": (lambda net, x: F.relu(net.b(net.c(x)) + net.stem.bias.view(-1, 1, 1)), one(), 1, 1, 0, 1, 1),
    "wider residual": (lambda net, x: F.relu(net.b(net.c(x.mean((2, 3), keepdim=True))) + x), one(), 1, 1, 0, 1, 1),
    "narrower residual": (lambda net, x: F.relu(net.b(net.c(x)) + x.mean((2, 3), keepdim=True)), one(), 1, 1, 0, 1, 1),
    "relu module": (lambda net, x: net.other(net.b(net.c(x))), with_other(nn.ReLU), 1, 1, 0, 1, 0),
    "relu module in place": (lambda net, x: net.other(net.b(net.c(x)) + x), with_other(lambda: nn.ReLU(True)), 1, 1, 0, 1, 1),
    "relu6": (lambda net, x: net.other(net.b(net.c(x))), with_other(nn.ReLU6), 1, 1, 0, 0, 0),
    "gelu": (lambda net, x: F.gelu(net.b(net.c(x))), one(), 1, 1, 0, 0, 0),
    "identity": (lambda net, x: net.other(net.b(net.other(input=net.c(x)))), with_other(nn.Identity), 1, 1, 0, 0, 0),
    "dropout": (lambda net, x: net.b(net.other(net.c(x))), with_other(nn.Dropout), 1, 0, 1, 0, 0),
    "tuple": (lambda net, x: (F.relu(net.b(net.c(x))), net.e(net.d(x))), two, 2, 2, 0, 1, 0),
    "view": (viewed, one(), 1, 1, 0, 0, 0),
    "input written": (input_written, one(), 1, 0, 1, 0, 0),
    "input written by a function": (input_written_by_a_function, one(), 1, 0, 1, 0, 0),
    "input written by a module": (input_written_by_a_module, with_other(lambda: nn.Hardtanh(0.2, 0.5, True)), 1, 0, 1, 0, 0),
    "residual written": (residual_written, one(), 1, 1, 0, 0, 1),
    "added into the residual": (added_into_the_residual, one(), 1, 1, 0, 0, 0),
    "weight norm": (usual, lambda: {"c": parametrizations.weight_norm(conv()), "b": norm()}, 1, 1, 0, 1, 0),
    "spectral norm": (usual, lambda: {"c": parametrizations.spectral_norm(conv()), "b": norm()}, 1, 1, 0, 1, 0),
    "norm with weight norm": (usual, with_norm(lambda: parametrizations.weight_norm(norm(), dim=None)), 1, 0, 0, 0, 0),
}


def pattern(name):
    return Plain(*PATTERNS[name][:2])


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 3 * super()._conv_forward(x, weight, bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


# torch.fx does not look into modules of torch.nn and torch.ao.nn, some of which are convolutions of another kind.
Scaled.__module__ = Standardised.__module__ = "torch.nn.qat"


def patched(module):
    """With a forward of its own, as libraries that wrap single modules give them."""
    forward = module.forward
    module.forward = lambda x: forward(2 * x)
    return module


# name -> layers of `usual`, convolutions besides the stem's
OTHER_KINDS = {
    "overridden inside": (lambda: {"c": Scaled(CHANNELS, CHANNELS, 3), "b": norm()}, 0),
    "own forward": (lambda: {"c": Standardised(CHANNELS, CHANNELS, 3), "b": norm()}, 0),
    "patched": (lambda: {"c": patched(conv()), "b": norm()}, 0),
    "patched norm": (lambda: {"c": conv(), "b": patched(norm())}, 1),
}


# -- what is refused: something before a small net that a traced graph would get wrong ----------------------------------------------


class Around(nn.Module):
    """`before(self, images)`, then the pattern "conv, norm, relu"."""

    def __init__(self, before, **attributes):
        super().__init__()
        self.net, self.before = pattern("conv, norm, relu"), before
        for name, value in attributes.items():
            setattr(self, name, value)
        self.eval()

    def forward(self, images):
        return self.net(self.before(self, images))


class Answering(Around):
    def forward(self, images):
        return {"logits": super().forward(images)}


def unchanged(net, images):
    return images


def counting(net, images):
    net.calls += 1
    return images


def counting_in_private(net, images):
    net._calls += 1
    return images


def listing(net, images):
    net.seen.append(images)
    return images


def caching(net, images):
    if net.cache is None:
        net.cache = images.mean((0, 2, 3), keepdim=True).detach() * 0
    return images + net.cache


def remembering(net, images):
    net.last = images
    return images


def without_gradient(net, images):
    with torch.no_grad():
        little = images.mean((2, 3), keepdim=True)
    return images + 1e-4 * little


def without_autocast(net, images):
    with torch.autocast("cpu", enabled=False):
        return images * 2


def write_a_row(net, images):
    images = images * 1
    images[:, 0] = 0
    return images


def write_into_a_view(net, x):
    out = net.b(net.c(x))
    out.view(out.size(0), -1).mul_(2)
    return out


def add_into_a_shared_name(net, images):
    images = images * 1
    saved = images
    images += 1
    return images * saved


def random_of_its_own(net, images):
    return images + torch.rand(1, generator=net.generator, dtype=images.dtype)


def hooked(register):
    net = Around(unchanged)
    getattr(net.net.c, register)(lambda *_: None)
    return net


def hooked_weight_norm():
    net = Around(unchanged)
    torch.nn.utils.weight_norm(net.net.c)
    return net


def broken():
    net = Around(unchanged)
    net.net.c.weight[0, 0] = float("nan")
    return net


def partly_training():
    net = Around(unchanged)
    net.net.b.train()
    return net


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double().eval()


def reflecting():
    layers = nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers).double().eval()


# name -> model, pattern of the reason
REFUSED = {
    "branch on values": (
        lambda: Around(lambda net, x: x if x.sum() > 0 else -x),
        "torch.fx cannot trace it: symbolically traced",
    ),
    "branch on the size": (lambda: Around(lambda net, x: x if x.shape[-1] > 4 else -x), "torch.fx cannot trace it: symbolically"),
    "row": (lambda: Around(write_a_row), "torch.fx cannot trace it: .*item assignment"),
    "no gradient": (lambda: Around(without_gradient), "torch.fx cannot trace it: its forward switches gradients or autocast"),
    "no autocast": (lambda: Around(without_autocast), "torch.fx cannot trace it: its forward switches gradients or autocast"),
    "counts": (lambda: Around(counting, calls=0), "its forward changes attributes of its own"),
    "counts in private": (lambda: Around(counting_in_private, _calls=0), "its forward changes attributes of its own"),
    "list": (lambda: Around(listing, seen=[]), "its forward changes attributes of its own"),
    "cache": (lambda: Around(caching, cache=None), "its forward changes attributes of its own"),
    "remembers": (lambda: Around(remembering), "its forward changes attributes of its own"),
    "random": (lambda: Around(lambda net, x: x + 1e-6 * torch.rand(1)), "its forward draws random numbers"),
    "random of its shape": (lambda: Around(lambda net, x: x + 1e-6 * torch.rand_like(x)), "its forward draws random numbers"),
    "dropout": (lambda: Around(lambda net, x: F.dropout(x, 1e-9)), "its forward draws random numbers"),
    "own generator": (lambda: Around(random_of_its_own, generator=torch.Generator()), "what torch.fx traced is another function"),
    "shared name": (lambda: Around(add_into_a_shared_name), "what torch.fx traced is another function"),
    "forward hook": (lambda: hooked("register_forward_hook"), "it has hooks"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), "it has hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "it has hooks"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "it has hooks"),
    "old weight norm": (hooked_weight_norm, "it has hooks"),
    "perceptron": (perceptron, "it has no convolution that could be folded"),
    "reflecting": (reflecting, "it has no convolution that could be folded"),
    "fp16": (lambda: Around(lambda net, x: x.half()).half(), "its convolutions are torch.float16"),
    "NaN": (broken, "its outputs or input gradients are not finite"),
    "training": (lambda: Around(unchanged).train(), "in train mode"),
    "partly training": (partly_training, "in train mode"),
    "fails": (lambda: Around(lambda net, x: x[:, :2]), "fails: .*to have 3 channels"),
    "dictionary": (lambda: Answering(unchanged), "fails: 'dict' object"),
    "view of another": (
        lambda: Around(lambda net, x: x + x.view_as(x.flatten(1)).mean()),
        "its traced graph fails: view size is not compatible",
    ),
    "written view": (lambda: Plain(write_into_a_view, one()), "its traced graph fails: view size is not compatible"),
    "a size as summand": (lambda: Plain(lambda net, x: net.b(net.c(x)) + x.size(1), one()), "fails: "),
}
