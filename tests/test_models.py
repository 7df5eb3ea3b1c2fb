"""Models: published sizes and costs, the arithmetic against a functional restatement, and the composed model's promises."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign_models import import_or_skip
from torch import nn

from fastanchor.errors import UserError
from fastanchor.models import HEADS, MODELS, build_model, mac_count, parameter_count, wide_resnet

SMALL = [("resnet18", 8), ("preactresnet18", 8), ("resnet50", 4), ("wrn10_2", 4)]
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def small(name="resnet18", width=8, **options):
    torch.manual_seed(0)
    return build_model(name, **{"num_classes": 10, "width": width, "head_hidden": 24, "head_dim": 12} | options)


def settled(model):
    """Eval-mode fp64 model whose BN statistics, weights and biases are all away from 0 and 1."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.double().eval()


def images(n=2, size=32, channels=3, **options):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(2), **options)


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same_state(module, before):
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


# Published sizes: ResNet-18 and PreActResNet-18 of the public CIFAR nets; WRN-28-10 36.5 M (paper, table 4), WRN-34-10 46.16 M.
@pytest.mark.parametrize(
    "name, expected",
    [("resnet18", 11_173_962), ("preactresnet18", 11_172_170), ("wrn28_10", 36_479_194), ("wrn34_10", 46_160_474)],
)
def test_parameter_count_is_the_published_one(name, expected):
    with torch.device("meta"):
        model = build_model(name, num_classes=10, head="identity")
    assert parameter_count(model) == expected


def test_resnet50_is_the_published_one():
    """25.56 M parameters and 4.09 G multiply-adds at 224 pixels; the function is timm's, weight by weight."""
    with torch.device("meta"):
        published = build_model("resnet50", num_classes=1000, head="identity")
    assert parameter_count(published) == 25_557_032
    assert abs(mac_count(published, image_size=224) - 4.09e9) < 0.005e9
    theirs = settled(import_or_skip("timm").create_model("resnet50", num_classes=10))
    model = build_model("resnet50", num_classes=10, head="identity").double().eval()
    names = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    model.backbone.load_state_dict({key.replace("downsample", "shortcut"): value for key, value in names.items()})
    model.classifier.load_state_dict(theirs.fc.state_dict())
    x = images(2, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-9, atol=1e-10)


def test_parameter_count_counts_heads_frozen_and_shared_parameters():
    assert parameter_count(build_model("resnet18", num_classes=10).projection) == 512 * 512 + 512 + 512 * 128 + 128
    shared = nn.Linear(3, 2)
    assert parameter_count(nn.Sequential(shared, shared).requires_grad_(False)) == 8


def conv_macs(size, kernel, inputs, outputs):
    return size * size * kernel * kernel * inputs * outputs


def net_macs(stem, channels, blocks, num_classes, size=32):
    """Layer by layer: stem, then for every block two 3x3 convs and, where the shape changes, a 1x1 one; then the classifier."""
    total, inputs = conv_macs(size, 3, 3, stem), stem
    for stage, outputs in enumerate(channels):
        for block in range(blocks):
            halves = stage > 0 and block == 0
            size = size // 2 if halves else size
            total += conv_macs(size, 3, inputs, outputs) + conv_macs(size, 3, outputs, outputs)
            if halves or inputs != outputs:
                total += conv_macs(size, 1, inputs, outputs)
            inputs = outputs
    return total + inputs * num_classes


# Published: 0.56 G multiply-adds (public CIFAR ResNet-18), 5.2 G (WRN-28-10), 6.66 G (WRN-34-10); tolerance is their rounding.
@pytest.mark.parametrize(
    "name, stem, channels, blocks, published, tolerance",
    [
        ("resnet18", 64, (64, 128, 256, 512), 2, 0.56e9, 0.005e9),
        ("preactresnet18", 64, (64, 128, 256, 512), 2, 0.56e9, 0.005e9),
        ("wrn28_10", 16, (160, 320, 640), 4, 5.2e9, 0.05e9),
        ("wrn34_10", 16, (160, 320, 640), 5, 6.66e9, 0.005e9),
    ],
)
def test_mac_count_is_the_layers_sum_and_the_published_figure(name, stem, channels, blocks, published, tolerance):
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    count = mac_count(model)
    assert count == net_macs(stem, channels, blocks, num_classes=10)
    assert abs(count - published) <= tolerance


@pytest.mark.parametrize("size", [8, 48])  # at 8 the last stage is 1x1, where a BN in train mode would refuse one image
def test_mac_count_at_other_sizes_and_channels(size):
    model = build_model("resnet18", num_classes=100, width=16, mean=(0.5,), std=(0.25,))
    expected = net_macs(16, (16, 32, 64, 128), 2, num_classes=100, size=size) - conv_macs(size, 3, 2, 16)
    assert mac_count(model, image_size=size, channels=1) == expected


@pytest.mark.parametrize("training", [True, False])
def test_mac_count_leaves_the_module_alone(training):
    model = small().train(training)
    model.backbone.layer1.eval()
    next(model.parameters()).requires_grad_(False)
    before, flags = snapshot(model), [module.training for module in model.modules()]
    held, needs = [id(p) for p in model.parameters()], [p.requires_grad for p in model.parameters()]
    mac_count(model)
    assert same_state(model, before)
    assert [module.training for module in model.modules()] == flags
    assert [id(p) for p in model.parameters()] == held
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18"])
def test_resnet_width_scales_every_stage(name):
    model = build_model(name, num_classes=10, width=12)
    widths = [getattr(model.backbone, f"layer{i}")[-1].conv2.out_channels for i in (1, 2, 3, 4)]
    assert [model.backbone.conv1.out_channels, *widths, model.backbone.num_features] == [12, 12, 24, 48, 96, 96]


def test_wide_resnet_width_depth_and_widening():
    model = build_model("wrn22_3", num_classes=7, width=4)
    layers = [model.backbone.layer1, model.backbone.layer2, model.backbone.layer3]
    assert [len(layer) for layer in layers] == [3, 3, 3]
    assert [layer[-1].conv2.out_channels for layer in layers] == [12, 24, 48]
    assert model.backbone.conv1.out_channels == 4 and model.backbone.num_features == 48
    assert not hasattr(wide_resnet(10, 1).layer1[0], "shortcut")  # 16 -> 16 at stride 1 needs no projection


def functional_bn(state, key, x):
    return F.batch_norm(x, *(state[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))


def functional_features(state, x, kind, blocks, stage_count):
    """The eval-mode backbone restated from its state_dict alone; `kind` is "basic" or "preact"."""
    out = F.conv2d(x, state["conv1.weight"], padding=1)
    if kind == "basic":
        out = functional_bn(state, "bn1", out).relu()
    for stage in range(1, stage_count + 1):
        for block in range(blocks):
            key, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            active = out if kind == "basic" else functional_bn(state, f"{key}.bn1", out).relu()
            side = out
            if f"{key}.shortcut.0.weight" in state:
                side = F.conv2d(active, state[f"{key}.shortcut.0.weight"], stride=stride)
                side = functional_bn(state, f"{key}.shortcut.1", side) if kind == "basic" else side
            inner = F.conv2d(active, state[f"{key}.conv1.weight"], stride=stride, padding=1)
            inner = functional_bn(state, f"{key}.bn1" if kind == "basic" else f"{key}.bn2", inner).relu()
            inner = F.conv2d(inner, state[f"{key}.conv2.weight"], padding=1)
            out = (functional_bn(state, f"{key}.bn2", inner) + side).relu() if kind == "basic" else inner + side
    if kind == "preact":
        out = functional_bn(state, "bn", out).relu()
    return out.mean((2, 3))


@pytest.mark.parametrize(
    "name, width, kind, blocks, stage_count",
    [("resnet18", 4, "basic", 2, 4), ("preactresnet18", 4, "preact", 2, 4), ("wrn16_2", 4, "preact", 2, 3)],
)
def test_backbone_equals_its_functional_restatement(name, width, kind, blocks, stage_count):
    backbone = settled(small(name, width)).backbone
    x = images(dtype=torch.float64)
    expected = functional_features(backbone.state_dict(), x, kind, blocks, stage_count)
    assert expected.std() > 1e-3
    torch.testing.assert_close(backbone(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, width", SMALL)
@pytest.mark.parametrize("n, size", [(3, 32), (2, 48), (5, 16), (2, 27)])
def test_shapes(name, width, n, size):
    model = small(name, width, num_classes=7)
    x = images(n, size)
    logits, embeddings = model(x, embed=True)
    assert model(x).shape == logits.shape == (n, 7)
    assert embeddings.shape == (n, 12)
    assert model.features(x).shape == (n, model.backbone.num_features)


@pytest.mark.parametrize("head", HEADS)
def test_heads(head):
    model = small(head=head).eval()
    x = images()
    features = model.features(x)
    logits, embeddings = model(x, embed=True)
    state = model.projection.state_dict()
    if head in ("mlp", "mlp_bn"):
        expected = F.linear(features, state["fc1.weight"], state["fc1.bias"])
        if head == "mlp_bn":
            norm = [state[f"bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
            expected = F.batch_norm(expected, *norm)
        expected = expected.relu()
        expected = F.linear(expected, state["fc2.weight"], state["fc2.bias"])
        assert state["fc1.weight"].shape == (24, 64) and state["fc2.weight"].shape == (12, 24)
    elif head == "linear":
        expected = F.linear(features, state["weight"], state["bias"])
        assert state["weight"].shape == (12, 64)
    else:
        expected = features
        assert not state
    torch.testing.assert_close(embeddings, expected)
    torch.testing.assert_close(logits, F.linear(features, model.classifier.weight, model.classifier.bias))
    assert torch.equal(logits, model(x))
    assert (embeddings.norm(dim=1) - 1).abs().max() > 1e-2  # left for the loss to normalise


@pytest.mark.parametrize("name, width", SMALL)
def test_gradient_reaches_every_parameter(name, width):
    model = small(name, width)
    x = images(4).requires_grad_()
    logits, embeddings = model(x, embed=True)
    (logits.square().sum() + embeddings.square().sum()).backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == [] and x.grad.any()
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None}
    assert without == {f"projection.{key}" for key, _ in model.projection.named_parameters()}


def test_normalisation_is_inside():
    plain = settled(small())
    model = settled(small(mean=CIFAR_MEAN, std=CIFAR_STD))
    x = images(dtype=torch.float64)
    by_hand = torch.stack([(x[:, c] - CIFAR_MEAN[c]) / CIFAR_STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model(x), plain(by_hand), rtol=1e-6, atol=1e-6)  # mean and std were rounded to fp32
    assert (model(x) - plain(x)).abs().max() > 1e-3
    assert model.normalize.mean.shape == model.normalize.std.shape == (1, 3, 1, 1)
    assert {"normalize.mean", "normalize.std"} <= model.state_dict().keys()
    assert not list(model.normalize.parameters())


def test_length_of_mean_is_the_number_of_image_channels():
    model = small(mean=(0.13,), std=(0.31,))
    assert model(images(2, 28, channels=1)).shape == (2, 10)


@pytest.mark.parametrize("name, width", SMALL)
def test_fp64_model(name, width):
    model = small(name, width, mean=CIFAR_MEAN, std=CIFAR_STD).eval()
    single, count = model(images()), mac_count(model)
    model.double()
    assert mac_count(model) == count
    assert all(t.dtype == torch.float64 for t in model.state_dict().values() if t.is_floating_point())
    logits, embeddings = model(images(), embed=True)  # fp32 images, as attacks return them
    assert logits.dtype == embeddings.dtype == torch.float64
    torch.testing.assert_close(logits, single.double(), rtol=1e-4, atol=1e-5)


def test_bf16_model_takes_fp32_images_and_gives_their_gradient():
    model = small(mean=CIFAR_MEAN, std=CIFAR_STD).eval()
    half = copy.deepcopy(model).bfloat16().to(memory_format=torch.channels_last)
    x = images(4).to(memory_format=torch.channels_last).requires_grad_()
    logits = half(x)
    assert logits.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), [x])
    assert gradient.dtype == torch.float32 and gradient.any()
    torch.testing.assert_close(logits.float(), model(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name, width", SMALL)
def test_channels_last_equals_nchw(name, width):
    model = settled(small(name, width))
    x = images(3, dtype=torch.float64)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, width", SMALL)
def test_state_dict_round_trip(name, width, tmp_path):
    model = settled(small(name, width, mean=CIFAR_MEAN, std=CIFAR_STD))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(5)
    other = build_model(name, num_classes=10, width=width, head_hidden=24, head_dim=12).double().eval()
    x = images(dtype=torch.float64)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    assert torch.equal(other(x), model(x))
    assert not any("model." in key or "module." in key for key in model.state_dict())  # loaders cut these out of keys


@pytest.mark.parametrize("name, width", SMALL)
def test_fx_trace(name, width):
    model = settled(small(name, width, mean=CIFAR_MEAN, std=CIFAR_STD))
    traced = torch.fx.symbolic_trace(model, concrete_args={"embed": False})
    x = images(3, dtype=torch.float64)
    assert torch.equal(traced(x), model(x))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    called = [traced.get_submodule(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert sum(isinstance(module, nn.Conv2d) for module in called) == convolutions > 0


def test_every_resnet18_convolution_is_followed_by_its_batch_norm():
    traced = torch.fx.symbolic_trace(small(), concrete_args={"embed": False})
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    convolutions = [node for node in nodes if isinstance(traced.get_submodule(node.target), nn.Conv2d)]
    for node in convolutions:
        (user,) = node.users
        assert isinstance(traced.get_submodule(user.target), nn.BatchNorm2d)
    assert len(convolutions) == 20


@pytest.mark.parametrize("name, width", SMALL)
def test_reset_classifier_changes_only_the_classifier(name, width):
    model = small(name, width).double().eval()
    before, old = snapshot(model), model.classifier
    old.requires_grad_(False)
    new = model.reset_classifier()
    assert new is model.classifier and new is not old and not new.training
    assert all(p.requires_grad and p.dtype == torch.float64 for p in new.parameters())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    expected = {"classifier.weight"} if name.startswith("wrn") else {"classifier.weight", "classifier.bias"}
    assert changed == expected  # a wide net's bias starts from 0 again
    assert model.state_dict().keys() == before.keys()


def test_replace_classifier_changes_the_classes_and_keeps_the_device():
    model = small()
    model.replace_classifier(4)
    assert model(images()).shape == (2, 4) and model.classifier.training
    with torch.device("meta"):
        model = small()
    assert model.replace_classifier(4).weight.device.type == "meta"
    with pytest.raises(UserError, match="num_classes is 1;"):
        model.replace_classifier(1)


@pytest.mark.parametrize("name, width", SMALL)
def test_initialisation_follows_the_seed(name, width):
    first, again = snapshot(small(name, width)), small(name, width)
    assert same_state(again, first)
    torch.manual_seed(1)
    other = build_model(name, num_classes=10, width=width, head_hidden=24, head_dim=12)
    assert not torch.equal(other.backbone.conv1.weight, again.backbone.conv1.weight)


def test_wide_resnet_initialisation():
    torch.manual_seed(0)
    model = build_model("wrn10_4", num_classes=10)
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels
            deviation = (2 / fan_out) ** 0.5
            n = module.weight.numel()
            assert abs(module.weight.std() / deviation - 1) < 5 / (2 * n) ** 0.5  # five standard errors
            assert abs(module.weight.mean()) < 5 * deviation / n**0.5
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (model.classifier.bias == 0).all()


def test_resnet_initialisation_is_torchs_default():
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, width=16)
    weight = model.backbone.layer2[0].conv2.weight
    bound = 1 / (weight.shape[1] * 9) ** 0.5  # kaiming_uniform_(a=sqrt(5)): uniform within 1 / sqrt(fan_in)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert model.classifier.bias.abs().max() > 0


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnt18", {}, "model 'resnt18' is unknown; did you mean 'resnet18'?; allowed: " + ", ".join(MODELS)),
        ("WRN-28-10", {}, "did you mean 'wrn28_10'?"),
        ("qqq", {}, "model 'qqq' is unknown; allowed: "),
        (["resnet18"], {}, "model ['resnet18'] is unknown"),
        ("wrn27_10", {}, "depth is 27;"),
        ("wrn4_1", {}, "depth is 4;"),
        ("wrn28_0", {}, "widen_factor is 0;"),
        ("resnet18", {"width": 0}, "width is 0; allowed: a whole number of at least 1"),
        ("wrn28_10", {"width": -4}, "width is -4;"),
        ("resnet18", {"width": 8.0}, "width is 8.0;"),
        ("resnet18", {"width": True}, "width is True;"),
        ("resnet18", {"num_classes": 1}, "num_classes is 1; allowed: a whole number of at least 2"),
        ("resnet18", {"head": "mpl"}, "head 'mpl' is unknown; did you mean 'mlp'?; allowed: mlp, mlp_bn, linear, identity"),
        ("resnet18", {"head_dim": 0}, "head_dim is 0;"),
        ("resnet18", {"head_hidden": 0}, "head_hidden is 0;"),
        ("resnet18", {"head": "linear", "head_dim": -1}, "head_dim is -1;"),
        ("resnet18", {"mean": (0.5,)}, "mean has 1 values and std has 3;"),
        ("resnet18", {"mean": ()}, "mean is ();"),
        ("resnet18", {"mean": "123"}, "mean is '123';"),
        ("resnet18", {"mean": (0.5, float("nan"), 0.5)}, "mean is (0.5, nan, 0.5);"),
        ("resnet18", {"std": (1.0, 0.0, 1.0)}, "std is [1.0, 0.0, 1.0]; allowed: values above 0"),
    ],
)
def test_bad_input_is_named_in_one_line(name, options, message):
    with pytest.raises(UserError) as caught:
        small(name, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["image_size", "channels"])
def test_mac_count_rejects_a_bad_size(key):
    with pytest.raises(UserError, match=f"^{key} is 0;"):
        mac_count(small(), **{key: 0})
