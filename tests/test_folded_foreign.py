"""Attacks on networks of torchvision and timm, and on a plain nn.Sequential: the folded twin's, or its reason; equal to the reference."""

import pytest
import torch
from attack_helpers import assert_same_images
from foreign_models import import_or_skip
from torch import nn

from fastanchor.attacks import PGD
from fastanchor.models import Normalize
from fastanchor.models.folded import fold

EPS, STEP = 8 / 255, 2 / 255


def torchvision(name, **options):
    return lambda: getattr(import_or_skip("torchvision").models, name)(num_classes=10, **options)


def torchvision_vgg():
    vgg = import_or_skip("torchvision").models.vgg
    features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def timm(name):
    return lambda: import_or_skip("timm").create_model(name, num_classes=10)


def timm_vgg():
    import_or_skip("timm")
    from timm.models.vgg import VGG

    return VGG([8, "M", 16, "M"], num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=0.05)


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


# name -> model, side of the images, the beginning of the note
MODELS = {
    "torchvision resnet50": (torchvision("resnet50"), 32, "yes: 53 BatchNorms in 53 convolutions"),
    "torchvision densenet121": (torchvision("densenet121"), 32, "yes: 59 BatchNorms in 120 convolutions, 62 kept"),
    "torchvision googlenet": (
        torchvision("googlenet", init_weights=False, aux_logits=False, transform_input=True), 32, "yes: 57 BatchNorms in 57 convolutions"
    ),
    "torchvision mobilenet_v3_small": (torchvision("mobilenet_v3_small"), 32, "yes: 34 BatchNorms in 52 convolutions"),
    "torchvision vgg11_bn": (torchvision_vgg, 32, "yes: 8 BatchNorms in 8 convolutions"),
    "timm resnet18": (timm("resnet18"), 32, "yes: 20 BatchNorms in 20 convolutions"),
    "timm resnetv2_50": (timm("resnetv2_50"), 32, "yes: 32 BatchNorms in 54 convolutions, 17 kept"),
    "timm efficientnet_b0": (timm("efficientnet_b0"), 32, "yes: 49 BatchNorms in 81 convolutions"),
    "timm convnext_atto": (timm("convnext_atto"), 32, "yes: 0 BatchNorms in 40 convolutions"),
    "timm vgg": (timm_vgg, 32, "no: torch.fx cannot trace it: symbolically traced variables cannot be used"),
    "nn.Sequential": (sequential, 16, "yes: 2 BatchNorms in 2 convolutions"),
}  # fmt: skip


def settle(net, side):
    """Statistics of some images and scales away from 1, as training leaves them; in train mode, as a training loop attacks."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(torch.rand(8, 3, side, side, generator=generator))
    return net


def state_of(net):
    """What an attack must leave: memory, versions and values of all tensors, gradients, flags and attributes."""
    tensors = [(name, t.data_ptr(), t._version, t.double().sum().item()) for name, t in net.state_dict().items()]
    attributes = [{name: id(value) for name, value in vars(module).items()} for module in net.modules()]
    return tensors, attributes, [(p.grad is None, p.requires_grad) for p in net.parameters()]


def logits_and_gradient(net, x):
    x = x.detach().clone().requires_grad_()
    logits = net(x)
    (gradient,) = torch.autograd.grad((logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum(), x)
    return logits.detach(), gradient


# Not normalised, the first layer is folded as any other: a convolution without a bias, with one, after arithmetic of the model's own.
PLAIN = ("torchvision resnet50", "torchvision vgg11_bn", "torchvision googlenet", "timm vgg", "nn.Sequential")


@pytest.mark.parametrize(
    "name, inside",
    [*(pytest.param(name, True, id=f"{name}-normalised inside") for name in MODELS),
     *(pytest.param(name, False, id=f"{name}-not normalised") for name in PLAIN)],
)  # fmt: skip
def test_attack_on_a_foreign_model(name, inside):
    make, side, note = MODELS[name]
    torch.manual_seed(0)
    net = nn.Sequential(Normalize((0.5, 0.45, 0.4), (0.25, 0.2, 0.3)), make()) if inside else make()
    settle(net, side)
    x, y = torch.rand(3, 3, side, side), torch.tensor([1, 3, 5])
    before, start = state_of(net), torch.empty_like(x).uniform_(-EPS, EPS)
    attacks = [PGD(EPS, STEP, 2, start=start, backend=backend) for backend in ("eager", "reference")]
    ours, theirs = (attack(net, x, y) for attack in attacks)
    # Where rounding switches one ReLU of a deep random net, a few percent of that image's pixels step apart; fp64 is exact below.
    assert_same_images(ours, theirs, STEP, share=0.1)
    assert (ours - (x + start).clamp(0, 1)).abs().mean() > STEP / 2
    assert attacks[0].engine.notes["folded"].startswith(note)
    assert state_of(net) == before
    if note.startswith("yes"):
        net.eval().double()
        with torch.no_grad():
            twin = fold(net, x[:2].double())
        for found, expected in zip(logits_and_gradient(twin, x.double()), logits_and_gradient(net, x.double()), strict=True):
            assert (found - expected).norm() <= 1e-11 * expected.norm()
