"""The feed of torch's DataLoader: the resident backend's bits, Pillow's pixels, workers that end, and files that are broken."""

import io
import multiprocessing
import os
import pickle
import signal
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from fastanchor.data import decode, loader
from fastanchor.data.encoded import Encoded
from fastanchor.data.extra import Mixed, read_extra
from fastanchor.data.loader import TorchFeed
from fastanchor.data.simclr import resized_crop
from fastanchor.data.sources import Split
from fastanchor.data.stream import FeedSpec
from fastanchor.data.views import augment, draw_crop_flip, draw_resized_crop_flip, to_float
from fastanchor.errors import UserError
from fastanchor.reference.images import apply_crop_flip

CPU = torch.device("cpu")
SIZE = 12
SIZES = [(12, 12), (20, 31), (31, 20), (7, 9), (64, 40), (12, 30), (1, 5), (33, 33)]  # heights and widths


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def arrays(count=23, height=9, width=11):
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=seeded())
    return Split(images, torch.arange(count) % 5)


@dataclass
class Memory:
    """A store of bytes."""

    files: list[bytes]
    hint = "what the store advises"

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return self.files[index]

    def name(self, index):
        return f"train/cat/{index}.jpg"


def as_file(image, kind="JPEG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def picture(height, width, seed=0):
    """Smooth, so that JPEG has something to work with, and the same nowhere."""
    small = np.random.RandomState(seed).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(files=None, sizes=SIZES, size=SIZE):
    if files is None:
        files = [as_file(picture(*at, seed), *(("PNG",) if seed % 2 else ("JPEG",))) for seed, at in enumerate(sizes)]
    count = len(files)
    return Encoded(
        Memory(files), np.arange(count), torch.arange(count) % 3, torch.tensor(sizes).T.contiguous(), np.zeros(count, bool), size
    )


def spec(*names, augment="crop_flip", **more):
    return FeedSpec(names or ("aug",), augment, CPU, **{"workers": 0, **more})


@pytest.fixture
def feed():
    """Makes feeds, and closes them: no test leaves a process behind."""
    made = []

    def make(*args):
        made.append(TorchFeed(*args))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not multiprocessing.active_children()


def all_of(feed, order, batch_size=5, seed=3, **more):
    return [tuple(part.clone() for part in batch) for batch in feed.epoch(order, batch_size, seed, **more)]


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Arrays


@pytest.mark.parametrize(("kind", "pad"), [("crop_flip", 4), ("crop", 2), ("crop_flip", 30), ("crop", 0), ("none", 4)])
@pytest.mark.parametrize("names", [("aug",), ("clean", "aug"), ("aug", "clean", "other")])
def test_views_of_arrays_have_the_reference_bits(feed, kind, pad, names):
    data, order = arrays(), torch.randperm(23, generator=seeded(1))
    one = feed(data, spec(*names, augment=kind, pad=pad))
    assert one.backend == "torch"
    generator, batches = seeded(3), all_of(one, order)
    assert [len(batch[0]) for batch in batches] == [5, 5, 5, 5, 3]
    for batch, indices in zip(batches, order.split(5), strict=True):
        prepared, labels = one.load(*batch)
        assert torch.equal(labels, data.labels[indices])
        for name in names:
            expected = data.images[indices]
            if name != "clean" and kind != "none":
                offsets, mirrored = draw_crop_flip(len(indices), generator, pad=pad, flip=kind == "crop_flip")
                expected = apply_crop_flip(expected, offsets, mirrored, pad=pad)
            found = prepared.view(name)
            assert torch.equal(found, to_float(expected)) and found.is_contiguous(memory_format=torch.channels_last)
            assert prepared.images[name].dtype == torch.uint8


@pytest.mark.parametrize(("height", "width"), [(9, 11), (32, 32), (1, 8)])
def test_resized_views_of_arrays_are_within_one_level_of_the_resident_ones(feed, height, width):
    data = arrays(40, height, width)
    one = feed(data, spec(augment="resized_crop_flip"))
    ((labels, images),) = all_of(one, torch.arange(40), 40)
    boxes, mirrored = draw_resized_crop_flip(40, height, width, seeded(3), scale=(0.08, 1))
    expected = resized_crop(data.images, boxes, mirrored)
    assert (255 * (one.load(labels, images)[0].view("aug") - expected)).abs().max() < 1.01


def test_simclr_views_of_arrays_are_the_resident_ones_but_for_rounding(feed):
    data = arrays(64, 16, 16)
    one = feed(data, spec("first", "second", augment="simclr"))
    (batch,) = all_of(one, torch.arange(64), 64)
    generator, prepared = seeded(3), one.load(*batch)[0]
    for name in ("first", "second"):
        difference = (prepared.view(name) - augment(data.images, "simclr", generator)).abs()
        # A hue turns a grey-ish pixel far for one level of difference, so the largest difference says nothing.
        assert difference.mean() < 2 / 255 and (difference < 8 / 255).double().mean() > 0.98


def test_mixed_data(feed, tmp_path):
    extra = torch.randint(0, 256, (30, 9, 11, 3), dtype=torch.uint8, generator=seeded(8))
    np.savez(tmp_path / "extra.npz", image=extra.numpy(), label=np.arange(30) % 5)
    mixed = Mixed(arrays(), read_extra(tmp_path / "extra.npz", 5, (9, 11)))
    order = torch.randperm(53, generator=seeded())
    for workers in (0, 1):
        found = all_of(feed(mixed, spec(augment="none", workers=workers)), order)
        assert torch.equal(torch.cat([images for _, images in found]), torch.cat([arrays().images, extra])[order])
        assert torch.equal(torch.cat([labels for labels, _ in found]), mixed.labels[order])


# Encoded images


def by_hand(image, box, offset, mirrored, pad, size=SIZE):
    """One view, by Pillow and numpy's most obvious ways."""
    if box is not None:
        top, left, height, width = box
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    if offset is not None:
        padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
        pixels = padded[offset[0] : offset[0] + size, offset[1] : offset[1] + size]
    return np.fliplr(pixels) if mirrored else pixels


def draws_of(kind, sizes, generator, pad):
    """Boxes, offsets and mirrored of one batch, from the functions that the resident backend draws with."""
    height, width = sizes
    if kind == "resized_crop_flip":
        boxes, mirrored = draw_resized_crop_flip(len(height), height, width, generator, scale=(0.08, 1))
        return boxes.T.tolist(), None, mirrored.tolist()
    side = torch.minimum(height, width)
    boxes = torch.stack([(height - side) // 2, (width - side) // 2, side, side]).T.tolist()
    if kind == "none":
        return boxes, None, None
    offsets, mirrored = draw_crop_flip(len(height), generator, pad=pad, flip=kind == "crop_flip")
    return boxes, offsets.T.tolist(), None if mirrored is None else mirrored.tolist()


@pytest.mark.parametrize("kind", ["resized_crop_flip", "crop_flip", "crop", "none"])
def test_views_of_files_are_pillows(feed, kind):
    data = encoded()
    order, generator = torch.tensor([6, 2, 7, 0, 5, 1, 3, 4, 2, 2]), seeded(3)
    one = feed(data, spec("aug", "other", augment=kind, pad=3))
    for (labels, *views), indices in zip(all_of(one, order, 4), order.split(4), strict=True):
        assert torch.equal(labels, data.labels[indices])
        for view in views:
            draws = draws_of(kind, data.sizes[:, indices], generator, 3)
            for row, index in enumerate(indices.tolist()):
                image = Image.open(io.BytesIO(data.read(index))).convert("RGB")
                place = [None if part is None else part[row] for part in draws]
                assert np.array_equal(view[row].numpy(), by_hand(image, *place, 3)), (index, place)


def test_files_of_the_sets_own_size_are_not_resampled(feed):
    data = encoded(sizes=[(SIZE, SIZE)] * 6)
    one = feed(data, spec("clean", "aug", augment="none"))
    ((_, clean, same_again),) = all_of(one, torch.arange(6), 6)
    assert torch.equal(clean, data.decode(range(6))) and torch.equal(clean, same_again)


def test_odd_images_are_converted_as_for_evaluation(feed):
    colour = picture(SIZE, SIZE, 3)
    levels = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    files = [
        as_file(colour.convert("CMYK")), as_file(colour.convert("L")), as_file(colour.convert("P"), "PNG"),
        as_file(colour.convert("LA"), "PNG"), as_file(colour.convert("RGBA"), "PNG"), as_file(Image.fromarray(levels), "PNG"),
        as_file(colour.convert("1"), "PNG"), as_file(colour.convert("P"), "PNG", transparency=0), as_file(colour, "JPEG", progressive=True),
    ]  # fmt: skip
    data = encoded(files, [(SIZE, SIZE)] * len(files))
    ((_, found),) = all_of(feed(data, spec(augment="none")), torch.arange(len(files)), len(files))
    assert torch.equal(found, torch.from_numpy(np.stack([decode.decode(file) for file in files])))


# Workers


@pytest.mark.parametrize("data", [arrays(), encoded()], ids=["arrays", "files"])
@pytest.mark.parametrize("kind", ["simclr", "crop_flip"])
def test_workers_change_nothing(feed, data, kind):
    order = torch.randint(len(data), (17,), generator=seeded(5))
    names = ("clean", "first", "second")
    alone, two = (feed(data, spec(*names, augment=kind, workers=workers)) for workers in (0, 2))
    expected = all_of(alone, order)
    assert not multiprocessing.active_children()
    same(all_of(two, order), expected)
    pids = sorted(process.pid for process in multiprocessing.active_children())
    assert len(pids) == 2
    # The workers stay over epochs, also over one that ends early, and an epoch begins at any batch with the same bits.
    for start in range(4):
        same(all_of(two, order, start=start), expected[start:])
    early = two.epoch(order, 2, 4)
    next(early)
    early.close()
    same(all_of(two, order), expected)
    assert sorted(process.pid for process in multiprocessing.active_children()) == pids
    two.close()
    assert not multiprocessing.active_children()
    same(all_of(two, order), expected)  # with new workers


def test_each_process_makes_its_share(feed):
    order = torch.randperm(23, generator=seeded())
    whole = all_of(feed(arrays(), spec("clean", "aug")), order, 7)
    shares = [all_of(feed(arrays(), spec("clean", "aug", rank=rank, world=3)), order, 7) for rank in range(3)]
    same([tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*shares, strict=True)], whole)
    assert {len(share[0][0]) for share in shares} == {2, 3}
    # The last batch has 2 images, so one process has none.
    assert sorted(len(share[-1][0]) for share in shares) == [0, 1, 1]


def test_the_number_of_workers(feed, monkeypatch):
    monkeypatch.setattr(loader, "threads", lambda: 1)
    every = feed(arrays(), spec(workers=None))
    next(every.epoch(torch.arange(23), 5, 0))
    assert len(multiprocessing.active_children()) == 1


def test_the_global_random_state_is_left_alone(feed):
    state = torch.get_rng_state()
    for workers in (0, 1):
        all_of(feed(arrays(), spec(workers=workers)), torch.arange(23))
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_warns(feed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        all_of(feed(arrays(), spec(workers=1)), torch.arange(23))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_left_for_another_says_so(feed, workers):
    one = feed(arrays(), spec(workers=workers))
    expected = all_of(one, torch.arange(23), 2)
    first = one.epoch(torch.arange(23), 2, 9)
    next(first)
    second = one.epoch(torch.arange(23), 2, 3)
    found = [next(second)]
    with pytest.raises(RuntimeError, match="^a feed gives one epoch at a time, and this one was left for another or closed$"):
        next(first)
    same([*found, *second], expected)
    third = one.epoch(torch.arange(23), 2, 3)
    next(third)
    one.close()
    with pytest.raises(RuntimeError, match="one epoch at a time"):
        next(third)


def test_an_exception_of_the_caller_leaves_a_feed_that_works(feed):
    one = feed(arrays(), spec(workers=1))
    expected = all_of(one, torch.arange(23))
    with pytest.raises(ZeroDivisionError):
        for _ in one.epoch(torch.arange(23), 5, 9):
            raise ZeroDivisionError
    same(all_of(one, torch.arange(23)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_once_and_ends_the_epoch(feed, workers):
    data = encoded()
    data.store.files[3] = data.store.files[3][:40]
    one = feed(data, spec(workers=workers))
    batches = one.epoch(torch.arange(8), 2, 0)
    assert len(next(batches)[0]) == 2, "the batches before it are given"
    with pytest.raises(UserError, match=r"^'train/cat/3.jpg' .*; what the store advises$") as caught:
        next(batches)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None
    assert not multiprocessing.active_children()
    with pytest.raises(StopIteration):
        next(batches)
    assert len(all_of(one, torch.tensor([0, 1, 2, 4]), 2)) == 2


def test_a_file_that_has_changed_its_size_is_named(feed):
    data = encoded()
    data.store.files[1] = as_file(picture(20, 30))
    with pytest.raises(UserError, match=r"^'train/cat/1.jpg' has 30x20 pixels and had 31x20 when the data set was read; "):
        all_of(feed(data, spec()), torch.arange(3))


class Deadly(Split):
    """Ends the process that touches image 13, as a system does that is short of memory."""

    def gather(self, indices):
        if 13 in indices.tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().gather(indices)


def test_a_worker_that_is_killed(feed):
    data = arrays()
    one = feed(Deadly(data.images, data.labels), spec(workers=1))
    with pytest.raises(
        UserError, match=r"^data.backend = torch: a worker process ended \(.*\); fewer data.workers need less memory"
    ):
        all_of(one, torch.tensor([13]))
    assert not multiprocessing.active_children()
    assert len(all_of(one, torch.arange(10))) == 2


def test_an_interrupt_ends_the_workers(feed):
    one = feed(arrays(), spec(workers=1))

    order = torch.arange(23)
    expected = all_of(one, order)
    planned = []
    real, one._make = one._make, lambda jobs: planned.extend(jobs) or iter(())
    list(one.epoch(order, 5, 3))
    one._make = real

    def breaking():
        yield from planned[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(one._make(breaking()))
    assert not multiprocessing.active_children()
    same(all_of(one, order), expected)
    # Ctrl-C reaches the workers too, who leave it to this process.
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    same(all_of(one, order), expected)
    assert multiprocessing.active_children() == [worker]
    # One that has ended between two epochs, whatever the reason, is replaced.
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    same(all_of(one, order), expected)
    assert multiprocessing.active_children() != [worker]


def test_what_a_worker_is_given_can_be_sent_to_it():
    """Where processes are not forked: the data set, and a job."""
    job = (np.array([1, 2]), [(None, np.array([[0, 8], [3, 4]]), np.array([True, False]))])
    data = encoded(sizes=[(SIZE, SIZE)] * 3)
    maker = loader._Maker(data, 4)
    expected = maker[job]
    found = pickle.loads(pickle.dumps(maker))[pickle.loads(pickle.dumps(job))]
    assert torch.equal(found[0], expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu_the_bits_are_those_of_the_cpu(feed, workers):
    order, names = torch.randperm(23, generator=seeded()), ("clean", "first", "second")
    device = torch.device("cuda")
    for data, kind in ((arrays(), "crop_flip"), (encoded(), "resized_crop_flip")):
        expected = all_of(feed(data, spec(*names, augment=kind)), order % len(data))
        one = feed(data, FeedSpec(names, kind, device, workers=workers))
        for _ in range(2):
            found = all_of(one, order % len(data))
            assert all(part.device.type == "cuda" for batch in found for part in batch)
            same([tuple(part.cpu() for part in batch) for batch in found], expected)
