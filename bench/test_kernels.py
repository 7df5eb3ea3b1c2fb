"""What a GPU has kernels for, on a CPU, where all is plain PyTorch: the contrastive loss, the attack's update, the augmentation.

`make bench`, CPU figures; the kernels themselves are bench.gpu's parts supcon, supcon_speed and small.
"""

from __future__ import annotations

import functools

import pytest
import torch
from PIL import Image

from bench import cases, data_cases, naive
from bench.peers import losses
from bench.turns import CPU, not_installed, take_turns
from fastanchor.data import views
from fastanchor.losses import HardSupConLoss, SupConLoss
from fastanchor.ops import images as operators

PLAIN = "contrastive loss, attack update and augmentation run as plain PyTorch: the Triton kernels need a GPU"
BATCH = 128
# SupContrast scales by temperature / base temperature.
SCALE = losses.TEMPERATURE / 0.07


def _embeddings(rows: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, features, generator=generator), torch.randint(cases.CLASSES, (rows,), generator=generator)


@pytest.mark.parametrize("kind", ["hard", "uniform"])
@pytest.mark.parametrize("n, d", [(256, 128), (1024, 128)])
def test_loss(benchmark, sizes, n, d, kind):
    """hard: the peers compute another function, SupCon with uniform weights. uniform: the same one."""
    benchmark.group = f"contrastive loss, forward and backward, N {n}, D {d}"
    benchmark.extra_info["runs_as"] = PLAIN
    embeddings, labels = _embeddings(n, d)
    ours = {"hard": HardSupConLoss, "uniform": SupConLoss}[kind](temperature=losses.TEMPERATURE)
    functions = {"dense_supcon": losses.supcontrast}
    left_out = not_installed(pytorch_metric_learning="pytorch_metric_learning")
    if not left_out:
        from pytorch_metric_learning.losses import SupConLoss as TheirLoss

        functions["pytorch_metric_learning"] = TheirLoss(temperature=losses.TEMPERATURE)
    found = {}

    def run(name, loss):
        leaf = embeddings.clone().requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        found[name] = value.item()

    def check():
        if kind == "uniform":
            expected = [SCALE * found["ours"], *([found["ours"]] if "pytorch_metric_learning" in found else [])]
            assert [found[name] for name in functions] == pytest.approx(expected, rel=1e-4)

    benchmark.extra_info["function"] = {"hard": "hard SupCon; the peers' SupCon", "uniform": "SupCon"}[kind]
    peers = {name: functools.partial(run, name, loss) for name, loss in functions.items()}
    engine = functools.partial(run, "ours", ours)
    take_turns(benchmark, engine, peers, rounds=sizes.short_rounds, left_out=left_out, check=check)


def test_attack_update(benchmark, sizes):
    """The signed step and its projection: one kernel on a GPU."""
    benchmark.group = "attack update"
    benchmark.extra_info["runs_as"] = PLAIN
    images = views.to_float(cases.make_batch(BATCH, sizes.pixels, CPU)[0])
    noise = cases.make_noise(images)
    gradient = torch.empty_like(images).copy_(torch.randn(images.shape, generator=torch.Generator().manual_seed(2)))
    x_adv = (images + noise).clamp(0, 1)
    delta = x_adv - images

    def plain():
        moved = torch.clamp(delta + cases.STEP_SIZE * torch.sign(gradient), -cases.EPS, cases.EPS)
        return naive.clamp(moved, 0 - images, 1 - images)

    def ours():
        return operators.pgd_step(x_adv, gradient, images, eps=cases.EPS, step_size=cases.STEP_SIZE)

    def check():
        torch.testing.assert_close(ours() - images, plain(), rtol=0, atol=1e-6)

    take_turns(benchmark, ours, {"naive": plain}, rounds=sizes.short_rounds, images=BATCH, check=check)


def test_augmentation(benchmark, sizes):
    """Crop and flip of a batch at once, beside public code's: image by image, then stacked."""
    benchmark.group = "augmentation"
    benchmark.extra_info["runs_as"] = PLAIN
    images_u8, _ = cases.make_batch(BATCH, sizes.pixels, CPU)
    generator = torch.Generator().manual_seed(0)
    transform, benchmark.extra_info["naive_transforms"] = data_cases.public_transform(sizes.pixels)

    def naively():
        return torch.stack([transform(Image.fromarray(image)) for image in images_u8.numpy()])

    def ours():
        return views.augment(images_u8, "crop_flip", generator, pad=data_cases.PAD)

    def check():
        assert ours().shape == naively().shape

    take_turns(benchmark, ours, {"naive": naively}, rounds=sizes.short_rounds, images=BATCH, check=check)
