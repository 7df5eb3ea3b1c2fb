"""SimCLR's views of whole batches: every operation against a transcription in fp64 and against torchvision, image by image;
what is drawn against the transcription's own draws and torchvision's."""

import colorsys
import contextlib
import importlib
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foreign_models import import_or_skip
from graph_emulator import Emulator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp
from test_step_graphed import assert_same, make_step, run

from fastanchor import graphs
from fastanchor.data import simclr
from fastanchor.data.simclr import Draw, Jitter, apply_simclr, draw_boxes, draw_jitter, draw_simclr
from fastanchor.data.views import augment, to_float
from fastanchor.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ORDERS = list(itertools.permutations(range(4)))  # torchvision's numbers: brightness, contrast, saturation, hue


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def random_images(count, height=7, width=9, channels=3, seed=0):
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=seeded(seed))


def telling_images(count):
    """fp32 (count, 3, 6, 8): random colours, and on every image all 27 whose hue or saturation is a special case."""
    levels = torch.tensor([0.0, 0.25, 1.0])
    images = torch.rand(count, 48, 3, generator=seeded(count))
    images[:, :27] = torch.cartesian_prod(levels, levels, levels)
    return images.view(count, 6, 8, 3).permute(0, 3, 1, 2).contiguous()


def make_jitter(factors, shift, orders):
    """factors (B, 3), shift (B,), orders (B, 4) in torchvision's numbers."""
    blends = [[kind for kind in order if kind != 3] for order in orders]
    before = torch.tensor([list(order).index(3) for order in orders])
    return Jitter(torch.as_tensor(factors).T.contiguous(), torch.as_tensor(shift), torch.tensor(blends).T.contiguous(), before)


def read_jitter(jitter, image):
    """[(torchvision's number of the operation, its factor)] of one image, in order."""
    steps = [(kind, jitter.factors[kind, image].item()) for kind in jitter.order[:, image].tolist()]
    steps.insert(int(jitter.before[image]), (3, jitter.shift[image].item()))
    return steps


@pytest.fixture(scope="module")
def tv():
    """torchvision's transforms; the test is skipped where it is missing."""
    import_or_skip("torchvision")
    functional = importlib.import_module("torchvision.transforms.v2.functional")
    return SimpleNamespace(transforms=importlib.import_module("torchvision.transforms"), functional=functional)


# The transcription: one image at a time, fp64, (H, W, 3).


def crop_one(image_u8, box, mirrored):
    """Samples at the centres of the result's pixels, laid evenly over the box; np.interp holds the edge's value outside."""
    top, left, height, width = (int(value) for value in box)
    cut = np.asarray(image_u8)[top : top + height, left : left + width] / 255
    for axis, (size, count) in enumerate(zip((height, width), image_u8.shape[:2], strict=True)):
        centres = (np.arange(count) + 0.5) * size / count - 0.5
        cut = np.apply_along_axis(lambda line: np.interp(centres, np.arange(len(line)), line), axis, cut)  # noqa: B023
    return cut[:, ::-1] if mirrored else cut


def grey_one(image):
    return image @ np.array([0.2989, 0.587, 0.114])


def turn_one(pixel, shift):
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)


def jitter_one(image, steps):
    for kind, factor in steps:
        if kind == 3:
            image = np.apply_along_axis(turn_one, 2, image, factor)
        else:
            other = (0, grey_one(image).mean(), grey_one(image)[..., None])[kind]
            image = np.clip(factor * image + (1 - factor) * other, 0, 1)
    return image


def box_one(rng, height, width):
    for _ in range(10):
        area = height * width * rng.uniform(0.2, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


def as_batch(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def numpy_image(image):
    return image.permute(1, 2, 0).double().numpy()


# Crop


@settings(max_examples=60)
@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**31))
@example(height=1, width=1, seed=0)
def test_resized_crops_equal_the_transcription(height, width, seed):
    images, rng = random_images(5, height, width, seed=seed), random.Random(seed)
    boxes = []
    for _ in range(5):
        h, w = rng.randint(1, height), rng.randint(1, width)
        boxes.append([rng.randint(0, height - h), rng.randint(0, width - w), h, w])
    mirrored = torch.rand(5, generator=seeded(seed)) < 0.5
    expected = as_batch([crop_one(*one) for one in zip(images, boxes, mirrored, strict=True)])
    found = simclr.resized_crop(images, torch.tensor(boxes).T, mirrored)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_the_whole_image_stays_as_it_is_to_the_bit():
    images = random_images(4)
    whole = torch.tensor([[0], [0], [7], [9]]).expand(4, 4)
    no, yes = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert torch.equal(simclr.resized_crop(images, whole, no), to_float(images))
    assert torch.equal(simclr.resized_crop(images, whole, yes), to_float(images).flip(3))


def test_a_crop_sees_nothing_of_what_lies_outside():
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    images[:, 2:5, 3:6] = 255
    box, mirrored = torch.tensor([[2], [3], [3], [3]]), torch.zeros(1, dtype=torch.bool)
    assert (simclr.resized_crop(images, box, mirrored) == 1).all()


def test_resized_crops_equal_torchvision(tv):
    images = random_images(40, 24, 32)
    drawn = draw_simclr(40, 24, 32, seeded(1))
    found = simclr.resized_crop(images, drawn.boxes, drawn.mirrored)
    for antialias in (True, False):
        for image, box, mirrored, ours in zip(to_float(images), drawn.boxes.T.tolist(), drawn.mirrored, found, strict=True):
            theirs = tv.functional.resized_crop(image, *box, size=[24, 32], antialias=antialias)
            theirs = tv.functional.horizontal_flip(theirs) if mirrored else theirs
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


# Colours


def test_jitters_equal_the_transcription_in_every_order():
    images = telling_images(24)
    factors = torch.empty(24, 3).uniform_(0.2, 1.8, generator=seeded(0))  # beyond what is drawn: more is clamped
    jitter = make_jitter(factors, torch.empty(24).uniform_(-0.5, 0.5, generator=seeded(1)), ORDERS)
    found = simclr.jitter_colours(images, jitter)
    expected = as_batch([jitter_one(numpy_image(image), read_jitter(jitter, n)) for n, image in enumerate(images)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)
    # The order matters, or this would show nothing.
    swapped = [jitter_one(numpy_image(image), read_jitter(jitter, n)[::-1]) for n, image in enumerate(images)]
    assert ((as_batch(swapped) - expected).abs().flatten(1).amax(1) > 1e-3).all()


@pytest.mark.parametrize("kind", range(4))
def test_each_operation_equals_torchvision(tv, kind):
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    images = telling_images(9)
    strengths = torch.linspace(-0.5, 0.5, 9) if kind == 3 else torch.linspace(0, 2, 9)
    factors = torch.ones(9, 3)
    if kind != 3:
        factors[:, kind] = strengths
    jitter = make_jitter(factors, strengths if kind == 3 else torch.zeros(9), [(0, 1, 2, 3)] * 9)
    theirs = [getattr(tv.functional, names[kind])(image, s.item()) for image, s in zip(images, strengths, strict=True)]
    torch.testing.assert_close(simclr.jitter_colours(images, jitter), torch.stack(theirs), rtol=0, atol=2e-6)
    torch.testing.assert_close(simclr.greyscale(images), tv.functional.rgb_to_grayscale(images), rtol=0, atol=1e-6)


def test_no_jitter_changes_no_bit():
    images = telling_images(5)
    jitter = Jitter(torch.ones(3, 5), torch.zeros(5), *draw_jitter(5, seeded(0))[2:])
    assert torch.equal(simclr.jitter_colours(images, jitter), images)
    jitter.factors[:, 2], jitter.shift[2] = 0.7, 0.1
    changed = (simclr.jitter_colours(images, jitter) != images).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False, False]


def test_hue_of_known_colours():
    red, white, grey = (torch.tensor(c).view(1, 3, 1, 1) for c in ([1.0, 0, 0], [1.0, 1, 1], [0.3, 0.3, 0.3]))
    for turns, expected in ((1 / 3, [0, 1, 0]), (-1 / 3, [0, 0, 1]), (0.5, [0, 1, 1]), (1 / 6, [1, 1, 0])):
        found = simclr.shift_hue(red, torch.tensor([turns])).flatten()
        torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=0, atol=1e-6)
    for same in (white, grey, torch.zeros_like(grey)):
        assert torch.equal(simclr.shift_hue(same, torch.tensor([0.2])), same)
    for pixel in ([0.3, 0.30000004, 0.3000001], [0.3, 0.3003, 0.3001]):  # nearly grey
        found = simclr.shift_hue(torch.tensor(pixel).view(1, 3, 1, 1), torch.tensor([0.2])).flatten()
        torch.testing.assert_close(found.tolist(), list(turn_one(pixel, 0.2)), rtol=0, atol=1e-7)


def test_grey_values():
    images = telling_images(3)
    expected = torch.from_numpy(np.stack([grey_one(numpy_image(image)) for image in images]))[:, None]
    torch.testing.assert_close(simclr.greyscale(images).double(), expected, rtol=0, atol=1e-7)


# What is drawn


def assert_same_boxes(ours, theirs, height, width):
    """Kolmogorov-Smirnov on everything about a box; 1e-3 is passed by chance once in 1,000 times, and the seeds are fixed."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    for boxes in (ours, theirs):
        top, left, h, w = boxes.T
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all() and (top + h <= height).all() and (left + w <= width).all()
    for name, measure in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "bottom": lambda b: height - b[:, 0] - b[:, 2],
        "right": lambda b: width - b[:, 1] - b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
    }.items():
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3, name


# In 16 x 40 some 3 % of the images find no crop in ten attempts; in 1 x 1 and 3 x 3 many attempts are too large or too small.
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (16, 40), (40, 16), (3, 3), (1, 1)])
def test_boxes_are_distributed_as_the_transcription_s(size):
    rng = random.Random(0)
    assert_same_boxes(draw_boxes(20_000, *size, seeded(3)).T, [box_one(rng, *size) for _ in range(20_000)], *size)


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_boxes_are_distributed_as_torchvision_s(tv, size):
    crop, image = tv.transforms.RandomResizedCrop(32, scale=(0.2, 1.0)), torch.zeros(3, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [crop.get_params(image, crop.scale, crop.ratio) for _ in range(5_000)]
    assert_same_boxes(draw_boxes(20_000, *size, seeded(3)).T, theirs, *size)


CENTRAL = {(8, 128): (0, 58, 8, 11), (128, 8): (58, 0, 11, 8), (1, 9): (0, 4, 1, 1), (30, 40): (0, 0, 30, 40)}


@pytest.mark.parametrize("size", CENTRAL)
def test_where_nothing_fits_the_crop_is_central(size):
    for sizes in (size, [torch.full((50,), side) for side in size]):
        boxes = draw_boxes(50, *sizes, seeded(0), scale=(100, 101))
        assert boxes.dtype == torch.int64 and boxes.shape == (4, 50)
        assert (boxes.T == torch.tensor(CENTRAL[size])).all()


def test_boxes_of_many_sizes_are_those_of_each_size():
    sizes = torch.tensor([[32, 32, 40, 7], [32, 48, 30, 90]])
    together = draw_boxes(4, *sizes, seeded(3))
    for place, (height, width) in enumerate(sizes.T.tolist()):
        assert torch.equal(draw_boxes(4, height, width, seeded(3))[:, place], together[:, place])


def test_central_crops_equal_torchvision_s(tv):
    for size, box in CENTRAL.items():
        assert tv.transforms.RandomResizedCrop.get_params(torch.zeros(3, *size), (100, 101), (3 / 4, 4 / 3)) == box


def test_jitters_are_distributed_as_told():
    count = 60_000
    jitter = draw_jitter(count, seeded(0))
    applied = jitter.shift != 0
    assert torch.equal(applied, (jitter.factors != 1).any(0))
    assert abs(applied.double().mean() - 0.8) < 4 * (0.8 * 0.2 / count) ** 0.5
    even = torch.arange(20_000) / 20_000
    for values, low, high in [*((f, 0.6, 1.4) for f in jitter.factors), (jitter.shift, -0.1, 0.1)]:
        assert ks_2samp(values[applied], low + (high - low) * even).pvalue > 1e-3
    orders = [tuple(kind for kind, _ in read_jitter(jitter, n)) for n in range(12_000)]
    assert chisquare([orders.count(order) for order in ORDERS]).pvalue > 1e-3
    assert len(orders) == sum(orders.count(order) for order in ORDERS)


def test_jitters_are_distributed_as_torchvision_s(tv):
    ours, jitter = draw_jitter(20_000, seeded(0)), tv.transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    applied = ours.shift != 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)[1:] for _ in range(4_000)]
    for ours_, theirs_ in zip([*ours.factors, ours.shift], zip(*theirs, strict=True), strict=True):
        assert ks_2samp(ours_[applied], theirs_).pvalue > 1e-3


def test_mirror_jitter_and_grey_are_independent():
    drawn = draw_simclr(40_000, 8, 8, seeded(0))
    cells = drawn.mirrored * 4 + (drawn.jitter.shift != 0) * 2 + drawn.greyed
    shares = [m * j * g for m in (0.5, 0.5) for j in (0.2, 0.8) for g in (0.8, 0.2)]
    assert chisquare(cells.bincount(minlength=8), 40_000 * np.array(shares)).pvalue > 1e-3


# The whole


def apply_one(image_u8, drawn, n):
    image = crop_one(image_u8, drawn.boxes[:, n], drawn.mirrored[n])
    image = jitter_one(image, read_jitter(drawn.jitter, n))
    return np.repeat(grey_one(image)[..., None], 3, 2) if drawn.greyed[n] else image


@pytest.mark.parametrize("device", DEVICES)
def test_views_equal_the_transcription(device):
    images = random_images(40, 16, 12)
    drawn = draw_simclr(40, 16, 12, seeded(4))
    found = apply_simclr(images.to(device), drawn)
    assert found.device.type == device
    expected = as_batch([apply_one(image, drawn, n) for n, image in enumerate(images)])
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=3e-6)
    assert drawn.greyed.any() and not drawn.greyed.all()


def test_every_image_is_by_itself():
    images, order = random_images(12, 8, 8), torch.tensor([7, 2, 11, 0])
    boxes, mirrored, jitter, greyed = drawn = draw_simclr(12, 8, 8, seeded(4))
    some = Draw(boxes[:, order], mirrored[order], Jitter(*(part[..., order] for part in jitter)), greyed[order])
    assert torch.equal(apply_simclr(images[order], some), apply_simclr(images, drawn)[order])


def test_views_are_distributed_as_those_of_the_source(tv):
    """SupContrast's own list of transforms, on an 8-bit PIL image, against ours: what can be told of a view without its draw."""
    t, count = tv.transforms, 3_000
    pipeline = t.Compose([
        t.ToPILImage(), t.RandomResizedCrop(size=32, scale=(0.2, 1.0)), t.RandomHorizontalFlip(),
        t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), t.RandomGrayscale(p=0.2), t.ToTensor(),
    ])  # fmt: skip
    across, down = torch.meshgrid(torch.linspace(20, 210, 32), torch.linspace(30, 190, 32), indexing="xy")
    image = torch.stack([across, down, 240 - (across + down) / 2]).byte()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.stack([pipeline(image) for _ in range(count)])
    ours = augment(image.permute(1, 2, 0).expand(count, 32, 32, 3), "simclr", seeded(0))
    for measure in (
        lambda x: x[:, 0].mean((1, 2)),
        lambda x: x[:, 2].mean((1, 2)),
        lambda x: x.mean(1).std((1, 2)),
        lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),
        lambda x: (x[..., :16] - x[..., 16:]).mean((1, 2, 3)),
        lambda x: (x[:, :, :16] - x[:, :, 16:]).mean((1, 2, 3)),
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_same_seed_same_views_and_nothing_else_touched(device):
    images = random_images(64, 32, 32).to(device)
    kept = images.clone()
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first = augment(images, "simclr", seeded(5, device), pad=4)
    assert (first.dtype, first.shape) == (torch.float32, (64, 3, 32, 32)) and first.min() >= 0 and first.max() <= 1
    assert first.is_contiguous(memory_format=torch.channels_last)
    generator = seeded(5, device)
    assert torch.equal(augment(images, "simclr", generator, pad=0), first)  # there is no padding
    assert (augment(images, "simclr", generator) != first).flatten(1).any(1).all()
    assert torch.equal(images, kept) and torch.equal(torch.get_rng_state(), state)


def test_images_without_three_channels_are_refused():
    with pytest.raises(UserError, match=r"^augmentation is 'simclr', which needs images of 3 channels \(RGB\): these have 1$"):
        augment(random_images(2, channels=1), "simclr", seeded(0))


@pytest.mark.parametrize("device", DEVICES)
def test_captured_views_are_the_plain_ones_to_the_bit(device):
    generator, plain = seeded(5, device), seeded(5, device)
    batches = [random_images(16, 32, 32, seed=seed).to(device) for seed in range(3)]
    with graphs.use_recorder(Emulator) if device == "cpu" else contextlib.nullcontext():
        captured = graphs.Captured(lambda images: augment(images, "simclr", generator), batches[:1], generators=[generator])
    for images in batches:
        assert torch.equal(captured(images), augment(images, "simclr", plain))


def test_a_training_step_on_these_views_is_captured_too():
    flags = ("--data.augment", "simclr", "--engine.graph")
    graphed, plain = make_step(*flags, "on"), make_step(*flags, "off")
    with graphs.use_recorder(Emulator):
        assert run(graphed) == run(plain)
    assert_same(graphed, plain)
    assert graphed.graphed
