"""DALI's feed against plain PyTorch and Pillow: pixels, order, sizes, broken files. With the real library, on its CPU pipelines."""

import contextlib
import gc
import io
import itertools
import re
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastanchor.data import dali as module
from fastanchor.data import geometry, simclr
from fastanchor.data.dali import DaliFeed, _import_dali, _Line, find_dali
from fastanchor.data.decode import BrokenImage, decode, header, plain_png
from fastanchor.data.encoded import Encoded
from fastanchor.data.sources import Split
from fastanchor.data.stream import FeedSpec
from fastanchor.data.views import Colours, Prepared, augment
from fastanchor.errors import UserError
from fastanchor.reference.images import apply_crop_flip, to_float

CPU = torch.device("cpu")
installed = pytest.mark.skipif(not find_dali()[0], reason="needs NVIDIA DALI")


class Bytes:
    """A store of images in memory."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def read(self, index):
        if self.files[index] is None:
            raise BrokenImage("cannot be read (gone)")
        return self.files[index]

    def name(self, index):
        return f"store/{index}.jpg"

    def digest(self):
        return b"x"


def picture(height, width, seed=0, noise=8):
    """A smooth image with some noise, uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = [
        128 + 90 * np.sin(x / 9 + y / 13 + seed),
        128 + 80 * np.cos(x / 7 - y / 11),
        60 + 130 * x / width + 30 * np.sin(y / 5),
    ]
    noise = np.random.default_rng(seed).normal(0, noise, (height, width, 3))
    return np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def written(image, kind="JPEG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def encoded(files, image_size, sizes=None):
    heads = [header(data) if data is not None else None for data in files] if sizes is None else None
    if sizes is None:
        sizes = torch.tensor([[h.height, h.width] for h in heads]).T.contiguous()
        odd = np.array([h.odd for h in heads])
    else:
        odd = np.zeros(len(files), bool)
    return Encoded(Bytes(files), np.arange(len(files)), torch.arange(len(files)) % 3, sizes, odd, image_size)


def arrays(count=11, height=7, width=10, seed=0):
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Split(images, torch.arange(count) % 4)


def spec(names=("aug",), augment="crop_flip", pad=4, device=CPU, **others):
    return FeedSpec(names, augment, device, pad=pad, workers=1, **others)


def batches(split, spec, *, batch_size=4, seed=5, order=None, start=0):
    """Each batch as (labels, Prepared), brought to the CPU."""
    feed = DaliFeed(split, spec)
    order = shuffled(split) if order is None else order
    made = [on_cpu(*feed.load(*batch)) for batch in feed.epoch(order, batch_size, seed, start)]
    feed.close()
    return made


def shuffled(split):
    return torch.randperm(len(split), generator=torch.Generator().manual_seed(9))


def on_cpu(prepared, labels):
    colours = {name: Colours(*(part.cpu() for part in draws)) for name, draws in prepared.colours.items()}
    return labels.cpu(), Prepared({name: image.cpu() for name, image in prepared.images.items()}, colours)


def views_of(made):
    """All finished views of all batches, in one list."""
    return [prepared.view(name) for _, prepared in made for name in prepared.images]


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, views_of(found), views_of(expected)))


def planned(split, spec, *, batch_size=4, seed=5, start=0):
    """The jobs of the same epoch as `batches` makes."""
    is_encoded = isinstance(split, Encoded)
    sizes = split.sizes if is_encoded else torch.tensor(split.image_shape)[:, None].expand(2, len(split))
    resized = is_encoded and bool((sizes != split.image_size).any())
    how = {"pad": spec.pad, "resized": resized, "start": start, "rank": spec.rank, "world": spec.world}
    return list(geometry.jobs(sizes, shuffled(split), batch_size, spec.names, spec.augment, seed, **how))


def cut_from_arrays(split, job, view, pad):
    """What the resident backend makes of these draws, with nothing but the reference's functions."""
    images, (boxes, offsets, mirrored) = split.images[job.indices], view.place
    if boxes is not None:
        return simclr.resized_crop(images, boxes, mirrored)
    return to_float(images if offsets is None else apply_crop_flip(images, offsets, mirrored, pad=pad))


def cut_with_pillow(split, job, view, pad):
    """uint8 (B, S, S, 3): box, resize, pad, crop, mirror, one image at a time."""
    boxes, offsets, mirrored = view.place
    size, made = split.image_size, []
    for i, index in enumerate(job.indices.tolist()):
        image = Image.fromarray(decode(split.read(index)))
        if boxes is not None:
            top, left, height, width = boxes[:, i].tolist()
            image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        if offsets is not None:
            row, column = offsets[:, i].tolist()
            pixels = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))[row : row + size, column : column + size]
        made.append(pixels[:, ::-1] if mirrored is not None and mirrored[i] else pixels)
    return np.stack(made)


def check_arrays_to_the_bit(device):
    for augmentation, pad in itertools.product(("crop_flip", "crop", "none"), (0, 4)):
        split, wanted = arrays(), spec(("aug", "clean"), augmentation, pad, device)
        found, jobs = batches(split, wanted), planned(split, wanted)
        assert len(found) == len(jobs) == 3
        for (labels, prepared), job in zip(found, jobs, strict=True):
            assert torch.equal(labels, split.labels[job.indices])
            for name, view in zip(wanted.names, job.views, strict=True):
                assert torch.equal(prepared.view(name), cut_from_arrays(split, job, view, pad)), (augmentation, pad, name)


def levels_off(split, wanted, **how):
    """Differences from Pillow in levels, (all pixels, pixels that are not on the border of the resized image)."""
    everywhere, inside = [], []
    for (_, prepared), job in zip(batches(split, wanted, **how), planned(split, wanted, **how), strict=True):
        for name, view in zip(wanted.names, job.views, strict=True):
            expected = cut_with_pillow(split, job, view, wanted.pad)
            off = np.abs(prepared.images[name].permute(0, 2, 3, 1).numpy() * 255 - expected)
            everywhere.append(off.reshape(len(off), -1))
            inside.append(off[:, 2:-2, 2:-2].reshape(len(off), -1))
    return np.concatenate(everywhere), np.concatenate(inside)


def photographs():
    """JPEG and PNG files of many sizes and kinds; five of them only Pillow reads as evaluation does."""
    grey = picture(70, 61, 3)[..., 0]
    alpha = np.dstack([picture(50, 64, 4), np.full((50, 64), 90, np.uint8)])
    palette = Image.fromarray(picture(44, 58, 5)).quantize(16)
    deep = Image.fromarray(picture(52, 47, 6)[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x112] = 3  # upside down, says the tag
    return [
        written(picture(80, 120, 0), quality=90),
        written(picture(121, 75, 1), quality=80, subsampling=2),
        written(picture(64, 64, 2), quality=95, subsampling=0),
        written(picture(90, 33, 8), progressive=True),
        written(picture(31, 40, 9), quality=85, exif=exif),
        written(grey, quality=90),
        written(Image.fromarray(picture(66, 50, 7)).convert("CMYK"), quality=90),
        written(picture(39, 41, 10), "PNG"),
        written(grey, "PNG"),
        written(alpha, "PNG"),
        written(palette, "PNG"),
        written(deep, "PNG"),
        written(picture(24, 20, 11), "PNG"),
    ]


@installed
def test_arrays_are_cropped_and_mirrored_to_the_bit():
    check_arrays_to_the_bit(CPU)


@installed
@settings(max_examples=6)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), pad=st.integers(0, 6), batch=st.integers(1, 6), count=st.integers(1, 7)
)
def test_any_shape_of_array(height, width, pad, batch, count):
    split, wanted = arrays(count, height, width, seed=height), spec(pad=pad)
    for (_, made), job in zip(batches(split, wanted, batch_size=batch), planned(split, wanted, batch_size=batch), strict=True):
        assert torch.equal(made.view("aug"), cut_from_arrays(split, job, job.views[0], pad))


@installed
def test_one_batch_is_what_the_resident_backend_augments():
    """The same draws from the same seed, whatever the backend."""
    split = arrays(8, 12, 12)
    ((_, made),) = batches(split, spec(pad=2), batch_size=8, seed=3, order=torch.arange(8))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(made.view("aug"), augment(split.images, "crop_flip", generator, pad=2))


@installed
@pytest.mark.parametrize("kind", ["simclr", "resized_crop_flip"])
def test_resized_crops_of_arrays(kind):
    """Both enlarge bilinearly, without rounding, in fp32: the largest difference seen is 2e-4 levels of 255."""
    split = Split(torch.from_numpy(np.stack([picture(32, 40, i) for i in range(12)])), torch.zeros(12, dtype=torch.int64))
    wanted = spec(("aug", "second", "clean"), kind)
    for (_, prepared), job in zip(batches(split, wanted, batch_size=5), planned(split, wanted, batch_size=5), strict=True):
        assert set(prepared.colours) == ({"aug", "second"} if kind == "simclr" else set())
        for name, view in zip(wanted.names, job.views, strict=True):
            expected = cut_from_arrays(split, job, view, 4)
            torch.testing.assert_close(prepared.images[name], expected, rtol=0, atol=2e-6)
            if view.colours is not None:
                *jitter, greyed = view.colours
                expected = simclr.colour(expected, simclr.Jitter(*jitter), greyed)
                torch.testing.assert_close(prepared.view(name), expected, rtol=0, atol=1e-4)


@installed
@pytest.mark.parametrize(
    "kind, names", [("resized_crop_flip", ("aug",)), ("simclr", ("one", "two", "clean")), ("crop_flip", ("aug",))]
)
def test_files_against_pillow(kind, names, monkeypatch):
    """Decoded pixels are Pillow's. What is resized is a level off here and there; on the border of what is made smaller it is more,
    since DALI repeats the outermost pixels there and Pillow weighs those that exist. One view takes the decoder of boxes."""
    monkeypatch.delattr(_Line, "_again")  # Pillow would come to the rescue
    everywhere, inside = levels_off(encoded(photographs(), 32), spec(names, kind), batch_size=5)
    assert everywhere.mean(1).max() < 0.25  # seen: 0.22
    assert inside.max() <= 2.01  # seen: 2, of images shifted so that their border lies inside
    assert everywhere.max() <= 4.01  # seen: 3


@installed
def test_sharp_borders_are_what_differs_from_pillow():
    """Noise as strong as the image: the bounds of the worst case."""
    files = [written(picture(h, w, h, noise=60), "PNG") for h, w in ((130, 90), (33, 150), (64, 64), (20, 25))]
    everywhere, inside = levels_off(encoded(files, 32), spec(("clean",)), batch_size=4)
    assert inside.max() <= 4.01 and inside.mean() < 0.3
    assert everywhere.max() < 60


@installed
@pytest.mark.parametrize("names", [("aug",), ("aug", "clean"), ("one", "clean", "two")])
def test_files_of_the_right_size_to_the_bit(names):
    """Nothing is resized: pixels are Pillow's, whatever the kind of the file."""
    kinds = [{"quality": 80}, {"progressive": True}, {"quality": 95, "subsampling": 0}, {"subsampling": 1}]
    files = [written(picture(32, 32, i), **options) for i, options in enumerate(kinds)]
    files += [written(picture(32, 32, 7)[..., 1]), written(picture(32, 32, 8), "PNG"), written(picture(32, 32, 9)[..., 0], "PNG")]
    deep = (
        picture(32, 32, 10)[..., 0].astype(np.uint16) * 251 + picture(32, 32, 11)[..., 0]
    )  # not a multiple of 257: it is rounded
    files += [written(Image.fromarray(deep), "PNG"), written(Image.fromarray(picture(32, 32, 12)).convert("CMYK"))]
    files += [written(np.dstack([picture(32, 32, 13), picture(32, 32, 14)[..., 0]]), "PNG")]
    files += [written(Image.fromarray(picture(32, 32, 15)).quantize(9), "PNG", transparency=3)]
    split, wanted = encoded(files, 32), spec(names, pad=3)
    everywhere, _ = levels_off(split, wanted)
    assert everywhere.max() < 1e-3
    for _, prepared in batches(split, wanted):
        for name in names:
            view = prepared.view(name)
            assert view.dtype == torch.float32 and view.shape[1:] == (3, 32, 32) and 0 <= view.min() and view.max() <= 1
            assert view.is_contiguous(memory_format=torch.channels_last) and prepared.images[name].data_ptr() == view.data_ptr()


@installed
@pytest.mark.parametrize(
    "split", [arrays(23), encoded([written(picture(20 + i, 30, i)) for i in range(23)], 16)], ids=["arrays", "files"]
)
def test_an_epoch_goes_on_at_any_batch(split):
    wanted = spec(("aug", "clean"), "resized_crop_flip")
    whole = batches(split, wanted)
    assert len(whole) == 6 and len(whole[-1][0]) == 3
    for start in (1, 4, 5, 6):
        assert same(batches(split, wanted, start=start), whole[start:])
    assert not same(batches(split, wanted, seed=6), whole)


@installed
def test_closed_early_and_used_again(monkeypatch):
    split, wanted = arrays(40), spec(("aug", "clean"))
    whole = batches(split, wanted)
    before = threading.active_count()
    feed = DaliFeed(split, wanted)

    def epoch():
        return feed.epoch(shuffled(split), 4, 5)

    def taken(count):
        return [on_cpu(*feed.load(*batch)) for batch in itertools.islice(epoch(), count)]

    assert same(taken(10), whole)
    pipeline = feed._spare.pipe
    for count in (1, 2, 9, 10):
        assert same(taken(count), whole[:count])
        gc.collect()  # ends a generator that is kept in a cycle
        assert feed._spare.pipe is pipeline
    del pipeline
    interrupted = epoch()
    next(interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted.throw(KeyboardInterrupt)
    assert same(taken(10), whole)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as held:  # while it waits for DALI
        patched.setattr(_import_dali().Pipeline, "share_outputs", lambda pipe, **how: signal.raise_signal(signal.SIGINT))
        taken(10)
    assert not dali_threads()  # though the traceback has frames of DALI
    del held
    assert same(taken(10), whole)
    gc.collect()
    assert threading.active_count() == before
    feed.close()
    assert not dali_threads()
    assert same(taken(3), whole[:3])  # also after close
    feed.close()


def dali_threads():
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text())
    return [name for name in names if "DALI" in name]


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastanchor-read")]


@installed
def test_close_ends_epochs_under_way():
    """With two under way and their generators held, as a traceback holds them."""
    split = arrays(40)
    feed = DaliFeed(split, spec())
    epochs = [feed.epoch(shuffled(split), 4, 5) for _ in range(2)]
    first = [on_cpu(*feed.load(*next(epoch))) for epoch in epochs]
    assert dali_threads() and reading_threads()
    feed.close()
    assert not dali_threads() and not reading_threads()
    with pytest.raises(RuntimeError, match="closed") as error:
        next(epochs[0])
    assert not isinstance(error.value, UserError)
    epochs[1].close()
    assert feed._spare is None and not feed._running and not dali_threads()
    again = list(feed.epoch(shuffled(split), 4, 5))  # the feed itself is as good as new
    assert len(again) == 10 and same([on_cpu(*feed.load(*again[0]))] * 2, first)
    feed.close()
    assert not dali_threads() and not reading_threads()


@installed
def test_a_failed_step_leaves_no_threads():
    split = arrays(40)

    def train(feed):
        with contextlib.closing(feed):
            for _ in feed.epoch(shuffled(split), 4, 5):
                raise ValueError("a step fails")

    feed = DaliFeed(split, spec())
    with pytest.raises(ValueError, match="a step fails") as held:
        train(feed)
    assert not dali_threads() and not reading_threads()
    del held
    gc.collect()
    assert feed._spare is None and not dali_threads()  # nor when the epoch is let go of


@installed
def test_closed_after_the_last_batch_an_epoch_is_not_taken_for_whole():
    split = arrays(8)
    feed = DaliFeed(split, spec())
    epoch = feed.epoch(shuffled(split), 4, 5)
    assert len(list(itertools.islice(epoch, 2))) == 2
    feed.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(epoch)
    assert feed._spare is None


@installed
@pytest.mark.parametrize("workers, expected", [(None, 3), (0, 1), (1, 1), (2, 2)])
def test_workers_are_threads_of_dali(workers, expected, monkeypatch):
    monkeypatch.setattr(module, "threads", lambda: 3)
    feed = DaliFeed(arrays(), FeedSpec(("aug",), "crop_flip", CPU, workers=workers))
    list(feed.epoch(torch.arange(8), 4, 5))
    assert feed._spare.pipe.num_threads == expected
    feed.close()


@installed
def test_two_epochs_at_a_time_and_a_larger_batch():
    split = arrays(20)
    feed = DaliFeed(split, spec())
    first, second = (feed.epoch(shuffled(split), size, 5) for size in (3, 8))
    mixed = [next(first), next(second), next(first), next(second), next(first)]
    small, large = batches(split, spec(), batch_size=3), batches(split, spec(), batch_size=8)
    expected = [small[0], large[0], small[1], large[1], small[2]]
    assert same([on_cpu(*feed.load(*batch)) for batch in mixed], expected)
    first.close()
    second.close()
    feed.close()
    for size in (2, 8):  # a pipeline for fewer images is built anew for more
        found = [on_cpu(*feed.load(*batch)) for batch in feed.epoch(shuffled(split), size, 5)]
        assert same(found, batches(split, spec(), batch_size=size))
    feed.close()


@installed
def test_two_batches_are_made_ahead():
    split, pulled = arrays(40), []
    feed = DaliFeed(split, spec())
    made = feed._make(pulled.append(job) or job for job in planned(split, spec()))
    next(made)
    assert len(pulled) == 2  # nothing but the reading of the next: a step may be captured now
    next(made)
    assert len(pulled) == 5  # the one in use, two in DALI, one read
    made.close()
    feed.close()


@installed
def test_shares_of_the_ranks_make_up_the_batch():
    split = arrays(9)  # the last batch has one image, and two of three ranks none
    whole = batches(split, spec(("aug", "clean"), "simclr"))
    ranks = [batches(split, spec(("aug", "clean"), "simclr", rank=rank, world=3)) for rank in range(3)]
    assert [[len(labels) for labels, _ in made] for made in ranks] == [[1, 1, 0], [1, 1, 0], [2, 2, 1]]
    for number, (labels, prepared) in enumerate(whole):
        assert torch.equal(labels, torch.cat([made[number][0] for made in ranks]))
        for name, image in prepared.images.items():
            assert torch.equal(image, torch.cat([made[number][1].images[name] for made in ranks]))


@installed
def test_crops_and_mirrors_are_uniform():
    """2,000 views of one image with pad 2: each of 5 x 5 offsets, mirrored or not, equally often."""
    split, wanted = arrays(1, 5, 6), spec(pad=2)
    made = views_of(batches(split, wanted, batch_size=500, order=torch.zeros(2000, dtype=torch.int64)))
    known = {}
    for row, column, mirrored in itertools.product(range(5), range(5), (False, True)):
        cut = apply_crop_flip(split.images, torch.tensor([[row], [column]]), torch.tensor([mirrored]), pad=2)
        known[to_float(cut)[0].contiguous().numpy().tobytes()] = row, column, mirrored
    assert len(known) == 50
    counts = Counter(known[view.contiguous().numpy().tobytes()] for view in torch.cat(made))
    assert sum(counts.values()) == 2000 and len(counts) == 50
    assert sum((count - 40) ** 2 / 40 for count in counts.values()) < 49 + 4 * (2 * 49) ** 0.5  # chi squared
    assert abs(sum(count for (*_, mirrored), count in counts.items() if mirrored) - 1000) < 4 * 500**0.5


def broken_files():
    whole = written(picture(60, 50, 1), quality=90)
    png = written(picture(60, 50, 2), "PNG")
    return {
        "half": (whole[: len(whole) // 2], "truncated"),
        "no end": (whole[:-2], "truncated"),
        "half a PNG": (png[: len(png) // 2], "truncated"),
        "text": (b"no image at all", "is not a JPEG or PNG"),
        "empty": (b"", "JPEG or PNG"),
        "gone": (None, "gone"),
    }


@installed
@pytest.mark.parametrize("kind", list(broken_files()))
@pytest.mark.parametrize("checked", [True, False], ids=["when read", "by DALI"])
def test_a_broken_file_is_named(kind, checked, monkeypatch, capfd):
    if not checked:  # as a file whose end is well but which DALI refuses
        monkeypatch.setattr(module, "_complete", lambda data: True)
    data, word = broken_files()[kind]
    files = [written(picture(60, 50, i)) for i in range(12)]
    files[6] = data
    split = encoded(files, 32, torch.tensor([60, 50])[:, None].expand(2, 12).contiguous())
    feed = DaliFeed(split, spec())
    with pytest.raises(UserError, match="store/6.jpg") as error:
        list(feed.epoch(torch.arange(12), 4, 0))
    assert word in str(error.value) and "\n" not in str(error.value) and "; pack the folder again" in str(error.value)
    assert capfd.readouterr().err == "" or not checked
    assert len(list(feed.epoch(torch.arange(4), 4, 0))) == 1  # the feed is as good as before
    feed.close()


@installed
def test_all_broken_files_of_a_batch_are_counted(monkeypatch):
    monkeypatch.setattr(module, "_complete", lambda data: True)
    files = [written(picture(60, 50, i)) for i in range(4)]
    files[1], files[3] = files[1][:-400], files[3][:-400]
    split = encoded(files, 32, torch.tensor([60, 50])[:, None].expand(2, 4).contiguous())
    with pytest.raises(UserError, match=r"store/1.jpg.*and 1 more of its batch") as held:
        batches(split, spec(), order=torch.arange(4))
    assert not dali_threads()  # though frames of DALI are in the traceback of what caused it
    del held


@installed
def test_what_only_pillow_reads_is_used(monkeypatch):
    """A PNG without its last chunk: its pixels are all there for Pillow, DALI refuses it. Batches behind it are in flight then."""
    files = [written(picture(32, 32, i), "PNG") for i in range(20)]
    order = torch.arange(20)
    expected = batches(encoded(files, 32), spec(), order=order)
    files[5] = files[5][:-12]
    split = encoded(files, 32)
    assert same(batches(split, spec(), order=order), expected)
    monkeypatch.setattr(module, "_complete", lambda data: True)
    assert same(batches(split, spec(), order=order), expected)


# As DALI words it: which operator failed, where it was defined, why.
FAILED = """Critical error in pipeline:
Critical error in pipeline:
Error in {} operator `nvidia.dali.fn.slice`,
which was used in the pipeline definition with the following traceback:

  File "/home/me/out of memory/dali.py", line 8, in _views
    image = fn.slice(image)

encountered:

{}
C++ context: [/opt/dali/dali/operators/slice.h:106]
Current pipeline object is no longer valid.
Current pipeline object is no longer valid."""
NO_MEMORY = [
    "std::bad_alloc",
    "CUDA allocation failed",
    "Can't allocate 129499136 bytes on device 0.",
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
    "nvJPEG error (5): The user-provided allocator functions failed: NVJPEG_STATUS_ALLOCATOR_FAILURE",
]


def failing(monkeypatch, split, error):
    """What an epoch says when each batch fails so, how often DALI was asked, and how many files Pillow had to decode."""
    asked, decoded = [], []

    def take(line):
        asked.append(line)
        raise error

    monkeypatch.setattr(_Line, "_take", take)
    monkeypatch.setattr(module, "plain_png", lambda data: decoded.append(data) or plain_png(data))
    with pytest.raises(UserError) as found:
        batches(split, spec())
    assert "\n" not in str(found.value) and str(found.value).startswith("data.backend = dali: ")
    assert not dali_threads()
    return str(found.value), len(asked), len(decoded)


def whole_files(count=8):
    return encoded([written(picture(32, 32, i)) for i in range(count)], 32)


@installed
@pytest.mark.parametrize("split", [arrays(8), whole_files()], ids=["arrays", "files"])
@pytest.mark.parametrize("words", [*NO_MEMORY, None])
def test_without_memory_it_is_said_at_once(split, words, monkeypatch):
    error = MemoryError("std::bad_alloc") if words is None else RuntimeError(FAILED.format("GPU", words))
    said, asked, decoded = failing(monkeypatch, split, error)
    words = "std::bad_alloc" if words is None else " ".join(words.split())
    assert f"does not get the memory for a batch of 4 images ({words});" in said
    assert "a smaller batch_size" in said and "data.decoder = cpu" in said and "resident and torch" in said
    assert (asked, decoded) == (1, 0)


@installed
@pytest.mark.parametrize("split, tries", [(arrays(8), 1), (whole_files(), 2)], ids=["arrays", "files"])
def test_other_failures_of_dali_are_told_in_a_line(split, tries, monkeypatch):
    words = "CUDA runtime API error cudaErrorUnknown (999):\nunknown error"
    said, asked, decoded = failing(monkeypatch, split, RuntimeError(FAILED.format("CPU", words)))
    assert "fails at a batch of 4 images (CUDA runtime API error cudaErrorUnknown (999): unknown error);" in said
    assert "memory" not in said and "resident and torch" in said
    assert (asked, decoded) == (tries, 4 * (tries - 1))


@installed
def test_images_that_fit_in_no_memory():
    """DALI's own error, not a made-up one: views of 192 TB each."""
    split = encoded([written(picture(32, 32, i)) for i in range(2)], 8_000_000)
    with pytest.raises(UserError, match=r"does not get the memory for a batch of 2 images \(std::bad_alloc\)"):
        batches(split, spec(("clean",)))


@installed
@pytest.mark.parametrize("method", ["feed_input", "schedule_run", "build"])
def test_no_memory_to_start_a_batch(method, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("Critical error in pipeline:\nCUDA allocation failed\nCurrent pipeline object is no longer valid.")

    monkeypatch.setattr(_import_dali().Pipeline, method, fail)
    with pytest.raises(UserError, match=r"does not get the memory for a batch of 4 images \(CUDA allocation failed\)"):
        batches(arrays(), spec())


@installed
def test_odd_images_come_from_pillow(monkeypatch):
    made = []
    monkeypatch.setattr(module, "plain_png", lambda data: made.append(data) or plain_png(data))
    split = encoded(photographs(), 32)
    batches(split, spec(("aug", "clean")))
    assert sorted(made) == sorted(photographs()[i] for i in np.flatnonzero(split.odd)) and len(made) == 5


@installed
def test_padding_after_the_end_is_no_damage():
    files = [written(picture(32, 32, i)) for i in range(4)]
    padded = [data + b"\0" * (20 * i) for i, data in enumerate(files)]
    assert same(batches(encoded(padded, 32), spec()), batches(encoded(files, 32), spec()))


@installed
def test_an_image_of_another_size_than_listed():
    """The file was replaced after the folder was read: a box lies outside of it."""
    files = [written(picture(60, 50, i)) for i in range(4)]
    files[2] = written(picture(20, 30))
    split = encoded(files, 32, torch.tensor([60, 50])[:, None].expand(2, 4).contiguous())
    with pytest.raises(UserError, match=r"store/2.jpg.*has 30x20 pixels, but had 50x60"):
        batches(split, spec(("clean",)))


@installed
def test_says_nothing_on_a_machine_without_a_gpu(capfd):
    batches(arrays(), spec())
    assert capfd.readouterr() == ("", "")


@installed
def test_mixed_decoding_needs_a_gpu():
    with pytest.raises(UserError, match=r"data.decoder = mixed.*CUDA device"):
        DaliFeed(arrays(), spec(decoder="mixed"))


@installed
def test_find_dali_imports_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    found, what = find_dali()
    assert found and re.fullmatch(r"NVIDIA DALI \d[\d.]+ \(nvidia-dali-cuda\d+\)", what) and "nvidia.dali" not in sys.modules


def test_without_dali_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert find_dali()[0] is False
    with pytest.raises(UserError, match="NVIDIA DALI is not installed") as error:
        DaliFeed(arrays(), spec())
    for part in (
        "data.backend",
        "fastanchor[dali]",
        "nvidia-dali-cuda120",
        "fastanchor[dali-cuda13]",
        "nvidia-dali-cuda130",
        "resident",
    ):
        assert part in str(error.value)


@installed
def test_a_dali_that_does_not_load(monkeypatch):
    monkeypatch.setattr(module, "find_dali", lambda: (True, "NVIDIA DALI 9.9"))
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    monkeypatch.delattr("nvidia.dali.fn", raising=False)
    with pytest.raises(UserError, match="9.9 is installed but cannot be loaded"):
        DaliFeed(arrays(), spec())


@installed
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_pipeline_that_cannot_start():
    with pytest.raises(UserError, match="NVIDIA DALI .* cannot start on cuda:0"):
        _Line(_import_dali(), arrays(), spec(device=torch.device("cuda:0"))).put(
            planned(arrays(), spec())[0], arrays().images.numpy()[:4]
        )


@installed
@pytest.mark.gpu
def test_on_a_gpu_arrays_are_the_same_to_the_bit():
    check_arrays_to_the_bit(torch.device("cuda"))


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
@pytest.mark.parametrize("names", [("aug",), ("one", "two", "clean")])
def test_on_a_gpu_files_against_pillow(decoder, names):
    wanted = spec(names, "resized_crop_flip", device=torch.device("cuda"), decoder=decoder)
    everywhere, inside = levels_off(encoded(photographs(), 32), wanted, batch_size=5)
    # A GPU's JPEG decoder rounds otherwise than libjpeg.
    assert everywhere.mean(1).max() < (0.4 if decoder == "cpu" else 2) and inside.max() <= (3 if decoder == "cpu" else 20)


@installed
@pytest.mark.gpu
def test_on_a_gpu_a_batch_lasts_until_the_work_on_it_is_done():
    """The device is far behind the host: copies of a batch run long after the next batches were asked for."""
    split, wanted = arrays(256, 32, 32), spec(("aug", "clean"), device=torch.device("cuda"))
    feed, copies = DaliFeed(split, wanted), []
    for batch in feed.epoch(shuffled(split), 8, 5):
        prepared, _ = feed.load(*batch)
        torch.cuda._sleep(10_000_000)
        copies += [prepared.images[name].clone() for name in wanted.names]
        del batch, prepared
    feed.close()
    expected = [cut_from_arrays(split, job, view, 4) for job in planned(split, wanted, batch_size=8) for view in job.views]
    assert all(torch.equal(found.cpu(), image) for found, image in zip(copies, expected, strict=True))
