"""Batches from the device and their augmentation: order, semantics and distribution of what is drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastanchor.data.resident import ResidentSplit
from fastanchor.data.simclr import draw_resized_crop_flip, resized_crop
from fastanchor.data.sources import Split
from fastanchor.data.views import AUGMENTATIONS, apply_crop_flip, augment, crop_flip, draw_crop_flip, to_float
from fastanchor.errors import UserError

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]),
]


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def random_images(count, height=7, width=9, channels=3, seed=0):
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=seeded(seed))


def split(count=23):
    return Split(random_images(count), torch.arange(count) % 5)


# ResidentSplit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_shows_every_image_once_with_its_label(device, drop_last):
    data = split()
    resident = ResidentSplit(data, device)
    batches = list(resident.epoch(5, generator=seeded(0), drop_last=drop_last))
    assert len(batches) == resident.number_of_batches(5, drop_last) == (4 if drop_last else 5)
    assert [len(indices) for indices, _, _ in batches] == [5, 5, 5, 5] + [] * drop_last + [3] * (not drop_last)
    for indices, images, labels in batches:
        assert {indices.device.type, images.device.type, labels.device.type} == {device}
        assert (indices.dtype, images.dtype, labels.dtype) == (torch.int64, torch.uint8, torch.int64)
        assert torch.equal(images.cpu(), data.images[indices.cpu()])
        assert torch.equal(labels.cpu(), data.labels[indices.cpu()])
    seen = torch.cat([indices for indices, _, _ in batches]).tolist()
    assert len(set(seen)) == len(seen) == (20 if drop_last else 23)
    assert len(resident) == 23


@pytest.mark.parametrize("device", DEVICES)
def test_the_order_comes_from_the_cpu_generator_alone(device):
    resident = ResidentSplit(split(), device)

    def order(generator):
        return torch.cat([indices for indices, _, _ in resident.epoch(4, generator=generator, drop_last=False)]).tolist()

    expected = torch.randperm(23, generator=seeded(3)).tolist()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    generator = seeded(3)
    assert order(generator) == expected
    assert order(generator) != expected and order(seeded(3)) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_is_drawn_when_the_epoch_is_asked_for():
    resident, generator = ResidentSplit(split(), "cpu"), seeded(0)
    before = generator.get_state()
    epoch = resident.epoch(4, generator=generator, drop_last=False)
    drawn = generator.get_state()
    assert not torch.equal(before, drawn)
    list(epoch)
    assert torch.equal(generator.get_state(), drawn)


@pytest.mark.parametrize("device", DEVICES)
def test_no_generator_keeps_the_original_order(device):
    data = split()
    batches = list(ResidentSplit(data, device).epoch(10, generator=None, drop_last=False))
    assert torch.equal(torch.cat([indices for indices, _, _ in batches]).cpu(), torch.arange(23))
    assert torch.equal(torch.cat([images for _, images, _ in batches]).cpu(), data.images)
    assert torch.equal(torch.cat([labels for _, _, labels in batches]).cpu(), data.labels)


def test_batch_sizes_that_cannot_be():
    resident = ResidentSplit(split(), "cpu")
    with pytest.raises(UserError, match=r"^batch size is 0 and must be at least 1$"):
        resident.epoch(0, generator=None, drop_last=False)
    with pytest.raises(UserError, match=r"^batch size is 24 and must be at most 23, the number of images"):
        resident.epoch(24, generator=None, drop_last=True)
    assert resident.number_of_batches(24, drop_last=False) == 1


def test_a_generator_of_another_device_is_refused():
    generator = SimpleNamespace(device=torch.device("cuda"))  # there is none to be had without a GPU
    with pytest.raises(ValueError, match="drawn from a CPU generator, not from one on"):
        ResidentSplit(split(), "cpu").epoch(4, generator=generator, drop_last=True)


# Views


def crop_flip_one_by_one(images, offsets, mirrored, pad):
    """The same as a loop over images: pad, cut, mirror."""
    out = []
    for i, image in enumerate(images.numpy()):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        y, x = offsets[:, i].tolist()
        cut = padded[y : y + image.shape[0], x : x + image.shape[1]]
        out.append(cut[:, ::-1] if mirrored is not None and mirrored[i] else cut)
    return torch.from_numpy(np.stack(out))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 4),
    pad=st.integers(0, 5),
    flip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_crop_flip_equals_a_loop_over_images(count, height, width, channels, pad, flip, seed):
    images = random_images(count, height, width, channels, seed)
    offsets, mirrored = draw_crop_flip(count, seeded(seed), pad=pad, flip=flip)
    assert (mirrored is not None) == flip
    expected = crop_flip_one_by_one(images, offsets, mirrored, pad)
    found = apply_crop_flip(images, offsets, mirrored, pad=pad)
    assert torch.equal(found, expected) and found.is_contiguous() and found.dtype == torch.uint8
    assert torch.equal(crop_flip(images, seeded(seed), pad=pad, flip=flip), expected)


def test_every_corner_and_no_shift():
    images = random_images(5, 8, 8)
    offsets = torch.tensor([[4, 0, 0, 8, 8], [4, 0, 8, 0, 8]])
    found = apply_crop_flip(images, offsets, torch.zeros(5, dtype=torch.bool))
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1, 4:, 4:], images[1, :4, :4]) and not found[1, :4].any() and not found[1, :, :4].any()
    assert torch.equal(found[4, :4, :4], images[4, 4:, 4:]) and not found[4, 4:].any()
    mirrored = apply_crop_flip(images, offsets, torch.ones(5, dtype=torch.bool))
    assert torch.equal(mirrored, found.flip(2))


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_are_uniform_and_half_of_the_images_mirrored(device):
    count, pad = 90_000, 4
    offsets, mirrored = draw_crop_flip(count, seeded(0, device), pad=pad)
    assert offsets.device.type == mirrored.device.type == device and offsets.shape == (2, count)
    pairs = (offsets[0] * (2 * pad + 1) + offsets[1]).bincount(minlength=81).double().cpu()
    assert len(pairs) == 81
    # Chi-squared with 80 degrees of freedom: 128 is passed by chance once in 2,000 times; the seed is fixed.
    assert ((pairs - count / 81) ** 2 / (count / 81)).sum() < 128
    assert abs(mirrored.double().mean().item() - 0.5) < 4 * 0.5 / count**0.5
    # Mirroring tells nothing about the offset.
    assert abs(offsets[:, mirrored].double().mean().item() - pad) < 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_same_seed_same_views_and_the_global_state_untouched(device):
    images = random_images(64, 32, 32).to(device)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first = augment(images, "crop_flip", seeded(5, device))
    generator = seeded(5, device)
    assert torch.equal(augment(images, "crop_flip", generator), first)
    assert not torch.equal(augment(images, "crop_flip", generator), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cpu_generator_gives_the_same_views_on_every_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = random_images(64, 32, 32)
    assert torch.equal(crop_flip(images.cuda(), seeded(2)).cpu(), crop_flip(images, seeded(2)))


@pytest.mark.parametrize("device", DEVICES)
def test_every_byte_is_divided_exactly_on_every_device(device):
    """A GPU multiplies by 1 / 255 where a Python number divides, which rounds half of the values otherwise."""
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    expected = (torch.arange(256, dtype=torch.float64) / 255).float().view(1, 1, 16, 16)
    assert torch.equal(to_float(bytes_.to(device)).cpu(), expected)


def test_to_float_is_exact_and_keeps_the_order_of_bytes():
    images = random_images(6, 4, 5)
    images[0, 0, 0] = torch.tensor([0, 255, 51])
    found = to_float(images)
    assert found.dtype == torch.float32 and found.shape == (6, 3, 4, 5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, images.permute(0, 3, 1, 2).float() / 255)
    assert found[0, :, 0, 0].tolist() == [0.0, 1.0, torch.tensor(0.2).item()]
    assert torch.equal((found * 255).round().to(torch.uint8), images.permute(0, 3, 1, 2))


def test_augment_kinds():
    images = random_images(300, 8, 8)
    kept = images.clone()
    generator = seeded(0)
    state = generator.get_state()
    assert AUGMENTATIONS == ("crop_flip", "crop", "resized_crop_flip", "simclr", "none")
    assert torch.equal(augment(images, "none", generator), to_float(images))
    assert torch.equal(generator.get_state(), state)
    for kind, flip in (("crop_flip", True), ("crop", False)):
        found = augment(images, kind, seeded(1), pad=2)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, to_float(crop_flip(images, seeded(1), pad=2, flip=flip)))
    boxes, mirrored = draw_resized_crop_flip(300, 8, 8, seeded(1), scale=(0.08, 1))
    found = augment(images, "resized_crop_flip", seeded(1))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, resized_crop(images, boxes, mirrored))
    assert torch.equal(images, kept)
    # Without padding "crop" leaves every image as it is and "crop_flip" mirrors some.
    assert torch.equal(augment(images, "crop", generator, pad=0), to_float(images))
    mirrored = (augment(images, "crop_flip", generator, pad=0) != to_float(images)).flatten(1).any(1)
    assert 100 < mirrored.sum() < 200
    with pytest.raises(
        UserError, match=r"^augmentation is 'mixup' and must be one of crop_flip, crop, resized_crop_flip, simclr, none$"
    ):
        augment(images, "mixup", generator)
