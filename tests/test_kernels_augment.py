"""The fused crop, flip and scale, run by Triton's interpreter: the views' own to the bit, and its draws by a plain Philox."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

pytest.importorskip("triton")

from fastanchor.kernels import augment as kernels
from interpreter import interpreted
from test_kernels_pgd import philox

from fastanchor.data import views


@pytest.fixture(autouse=True)
def on_the_interpreter():
    with interpreted(kernels):
        yield


def store(count, height, width, channels, seed=0):
    return torch.randint(
        0, 256, (count, height, width, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def of_views(images, offsets, mirrored, pad):
    return views.to_float(views.apply_crop_flip(images, offsets, mirrored, pad=pad))


def drawn(batch, seed, pad):
    """Offsets and mirrors by the docstring of `augment_random`."""
    counter = np.stack([np.zeros(batch), np.arange(batch), np.zeros(batch), np.full(batch, 2)], 1).astype(np.int64)
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).astype(np.uint64)
    offsets = (words[:, :2] * np.uint64(2 * pad + 1)) >> np.uint64(32)
    return torch.from_numpy(offsets.astype(np.int64).T.copy()), torch.from_numpy(words[:, 2] >= 2**31)


@settings(max_examples=25)
@given(
    height=st.integers(1, 21), width=st.integers(1, 21), channels=st.integers(1, 4), batch=st.integers(1, 5),
    pad=st.integers(0, 5), flip=st.booleans(), gather=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_views_to_the_bit(height, width, channels, batch, pad, flip, gather, seed):
    images = store(batch + 2 if gather else batch, height, width, channels, seed)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(images), (batch,), generator=generator) if gather else None
    offsets, mirrored = views.draw_crop_flip(batch, generator, pad=pad, flip=flip)
    expected = of_views(images if index is None else images[index], offsets, mirrored, pad)
    out = kernels.augment(images, offsets, mirrored, pad=pad, index=index)
    assert torch.equal(out, expected) and out.is_contiguous(memory_format=torch.channels_last)


def test_every_byte_is_divided_by_255_and_rounded_to_nearest():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    out = kernels.augment(images, torch.zeros(2, 1, dtype=torch.int64), None, pad=0)
    assert torch.equal(out.flatten(), torch.arange(256, dtype=torch.float32) / 255)


def test_an_image_of_several_blocks_into_given_memory_and_bf16():
    images, (offsets, mirrored) = store(3, 33, 35, 3), views.draw_crop_flip(3, torch.Generator().manual_seed(0))
    out = torch.full((3, 3, 33, 35), 9.0).contiguous(memory_format=torch.channels_last)
    low = torch.full_like(out, 9, dtype=torch.bfloat16)
    assert kernels.augment(images, offsets, mirrored, out=out, low=low) is out
    assert torch.equal(out, of_views(images, offsets, mirrored, 4))
    # The interpreter truncates where a GPU rounds: one unit of bf16's 8 bits.
    torch.testing.assert_close(low.float(), out, rtol=2**-7, atol=0)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("seed", [0, -3, 2**40 + 5])
def test_random_draws_are_philox(flip, seed):
    images = store(11, 9, 8, 3)
    index = torch.arange(10, -1, -1)
    offsets, mirrored = drawn(11, seed, 2)
    out = kernels.augment_random(images, torch.tensor([seed]), pad=2, flip=flip, index=index)
    assert torch.equal(out, of_views(images[index], offsets, mirrored if flip else None, 2))


def test_distribution_of_the_draws():
    """Of the plain draws, which the kernel's are."""
    pad, count = 4, 100_000
    offsets, mirrored = drawn(count, 17, pad)
    for offset in offsets:
        counts = torch.bincount(offset, minlength=2 * pad + 1)
        assert len(counts) == 2 * pad + 1 and stats.chisquare(counts.numpy()).pvalue > 0.01
    assert stats.binomtest(int(mirrored.sum()), count).pvalue > 0.01
    together = torch.stack([*offsets, mirrored]).double().corrcoef().fill_diagonal_(0)
    assert together.abs().max() < 4 / count**0.5


def test_what_is_refused():
    images, offsets, mirrored = store(2, 4, 4, 3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    planar = torch.empty(2, 3, 4, 4)
    for arguments, options, message in (
        ((images.float(), offsets, mirrored), {}, "images_u8 is torch.float32"),
        ((images.permute(0, 3, 1, 2), offsets, mirrored), {}, "images_u8 have shape .* contiguous"),
        ((images, offsets[:, :1], mirrored), {}, "offsets have shape"),
        ((images, offsets.int(), mirrored), {}, "offsets is torch.int32"),
        ((images, offsets, mirrored[:1]), {}, "mirrored has shape"),
        ((images, offsets, mirrored), {"index": torch.zeros(3, dtype=torch.int64)}, "offsets have shape"),
        ((images, offsets, mirrored), {"out": planar}, "out has shape .* channels_last"),
        ((images, offsets, mirrored), {"low": planar}, "low is torch.float32"),
        ((images, offsets, mirrored), {"pad": -1}, "pad = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.augment(*arguments, **options)
