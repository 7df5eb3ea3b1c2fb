"""The plan of an epoch's views: the numbers that the resident backend draws, at any batch to begin with, for any rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastanchor.data import geometry, simclr
from fastanchor.data.views import AUGMENTATIONS, Colours, Prepared, augment, draw_crop_flip, to_float
from fastanchor.reference.images import apply_crop_flip


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def plan(names=("aug",), kind="crop_flip", *, count=23, batch=5, seed=3, resized=False, pad=4, sizes=None, **options):
    order = torch.randperm(count, generator=seeded(9))
    sizes = torch.tensor([[32], [40]]).expand(2, count) if sizes is None else sizes
    return order, list(geometry.jobs(sizes, order, batch, names, kind, seed, pad=pad, resized=resized, **options))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a is b if a is None else len(a) == len(b) and all(map(same, a, b))


def test_the_batches_are_the_order_s_pieces():
    order, jobs = plan()
    assert [len(job.indices) for job in jobs] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([job.indices for job in jobs]), order)


def test_crops_are_drawn_as_the_step_draws_them():
    _, jobs = plan(("clean", "aug"))
    generator = seeded(3)
    for job in jobs:
        clean, aug = job.views
        assert clean == (geometry.Place(None, None, None), None)
        offsets, mirrored = draw_crop_flip(len(job.indices), generator, pad=4, flip=True)
        assert torch.equal(aug.place.offsets, offsets) and torch.equal(aug.place.mirrored, mirrored)
        assert aug.place.boxes is None and aug.colours is None


def test_a_planned_view_is_the_view_that_augment_makes():
    """For every augmentation, from the same generator: the place applied by the reference's own operations, then the colours."""
    images = torch.randint(0, 256, (5, 24, 24, 3), dtype=torch.uint8, generator=seeded(1))
    sizes = torch.tensor([[24], [24]]).expand(2, 5)
    for kind in AUGMENTATIONS:
        (job,) = geometry.jobs(sizes, torch.arange(5), 5, ("aug",), kind, 7, pad=2, resized=False)
        ((boxes, offsets, mirrored), colours) = job.views[0]
        made = to_float(images)
        if boxes is not None:
            made = simclr.resized_crop(images, boxes, mirrored)
        elif offsets is not None:
            made = to_float(apply_crop_flip(images, offsets, mirrored, pad=2))
        found = Prepared({"aug": made}, {} if colours is None else {"aug": colours}).view("aug")
        assert torch.equal(found, augment(images, kind, seeded(7), pad=2)), kind
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_an_epoch_goes_on_at_any_batch(kind):
    _, whole = plan(("aug", "clean", "aug2"), kind)
    for start in (1, 4, 5):
        _, rest = plan(("aug", "clean", "aug2"), kind, start=start)
        assert same(whole[start:], rest)


def test_two_views_are_drawn_apart():
    _, jobs = plan(("aug", "aug2"), "simclr")
    first, second = jobs[0].views
    assert not torch.equal(first.place.boxes, second.place.boxes)
    assert isinstance(first.colours, Colours)


@settings(max_examples=20, deadline=None)
@given(world=st.integers(1, 6), kind=st.sampled_from(AUGMENTATIONS), batch=st.integers(1, 9))
def test_ranks_share_every_batch(world, kind, batch):
    _, whole = plan(kind=kind, batch=batch)
    shares = [plan(kind=kind, batch=batch, rank=rank, world=world)[1] for rank in range(world)]
    for number, job in enumerate(whole):
        parts = [share[number] for share in shares]
        assert torch.equal(torch.cat([part.indices for part in parts]), job.indices)
        assert max(len(part.indices) for part in parts) - min(len(part.indices) for part in parts) <= 1
        for place, view in enumerate(job.views):
            for field, value in enumerate(view.place):
                if value is not None:
                    assert torch.equal(torch.cat([part.views[place].place[field] for part in parts], -1), value)


def test_stored_images_of_other_sizes_are_seen_through_their_centre():
    sizes = torch.tensor([[30, 7, 50], [41, 90, 50]])
    (job,) = geometry.jobs(sizes, torch.arange(3), 3, ("clean", "aug"), "crop_flip", 0, pad=4, resized=True)
    for view in job.views:
        assert view.place.boxes.T.tolist() == [[0, 5, 30, 30], [0, 41, 7, 7], [0, 0, 50, 50]]


def test_boxes_lie_within_images_of_every_size():
    sizes = torch.randint(1, 400, (2, 500), generator=seeded(0))
    for kind in ("simclr", "resized_crop_flip"):
        (job,) = geometry.jobs(sizes, torch.arange(500), 500, ("aug",), kind, 0, pad=4, resized=True)
        top, left, height, width = job.views[0].place.boxes
        assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
        assert (top + height <= sizes[0]).all() and (left + width <= sizes[1]).all()
