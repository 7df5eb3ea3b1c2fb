"""What the tests of attacks share: a small network, a batch, and a model that watches its calls."""

import torch
import torch.fx
from torch import nn

ULP = 2**-23  # of fp32 numbers in [1, 2): no pixel of [0, 1] is rounded by more
CLASSES, SIZE = 5, 8


def small_net(seed=0):
    """Convolutions and BatchNorm whose statistics, scales and shifts are away from 0 and 1."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Flatten(), nn.Linear(8 * SIZE * SIZE // 4, CLASSES),
    )  # fmt: skip
    for norm in (net[1], net[4]):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
    return net.eval()


def batch(n=8, seed=1, size=SIZE, classes=CLASSES):
    """Images with some pixels at 0 and 1 exactly, where the box is active."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(n, 3, size, size, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    return images, torch.randint(classes, (n,), generator=generator)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logit_norm(logits, labels):
    """An objective of another kind: labels do not count."""
    return logits.square().sum(1)


def assert_same_images(ours, theirs, step, share=1e-3):
    """Equal to 1e-6, but for at most `share` of the pixels, off by at most two steps.

    The sign of a gradient that is 0 up to rounding is chance: two correct programs may step such a pixel apart.
    """
    difference = (ours - theirs).abs()
    assert difference.max() <= 2 * step + 1e-6
    assert (difference > 1e-6).double().mean() <= share


class Counted(nn.Module):
    """A model that counts its calls and keeps what `observe` returns; raises at the `fail_at`-th call."""

    def __init__(self, inner, observe=None, fail_at=None):
        super().__init__()
        self.inner, self.observe, self.fail_at, self.calls, self.seen = inner, observe, fail_at, 0, []

    def forward(self, images):
        if isinstance(images, torch.fx.Proxy):
            raise TypeError("a model that watches its calls must be called, not traced")
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the forward broke")
        if self.observe is not None:
            self.seen.append(self.observe(self))
        return self.inner(images)
