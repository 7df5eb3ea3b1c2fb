"""The order of an epoch: what each batch consists of, how often everything is shown, and what cannot be."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fastanchor.data.order import SAMPLERS, _distinct, epoch_order
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.errors import UserError

CLASS_SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(sizes, seed=0):
    """Labels of so many images each class, in random order; a class of 0 images leaves a gap in the numbers."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=seeded(seed))]


def draw(labels, batch_size=4, seed=0, drop_last=False, **more):
    return epoch_order(labels, batch_size=batch_size, generator=seeded(seed), drop_last=drop_last, **more)


def no_early_repeats(items, among):
    """Whether each run of `among` items, from the first on, shows each one once: permutations, one after another."""
    pieces = [items[i : i + among] for i in range(0, len(items), among)]
    return all(len(set(piece)) == len(piece) for piece in pieces)


@given(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 2**31))
def test_shuffle_is_the_order_that_the_resident_split_draws(count, batch_size, drop_last, seed):
    assume(not drop_last or batch_size <= count)
    found = draw(torch.zeros(count, dtype=torch.int64), batch_size, seed, drop_last)
    whole = torch.randperm(count, generator=seeded(seed))
    assert torch.equal(found, whole[: count // batch_size * batch_size] if drop_last else whole)
    resident = ResidentSplit(Split(torch.zeros(count, 1, 1, 3, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)), "cpu")
    pieces = list(resident.shuffled(batch_size, generator=seeded(seed), drop_last=drop_last))
    assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in found.split(batch_size)]


@given(CLASS_SIZES, st.integers(0, 2**31))
def test_class_balanced_shows_every_class_equally_often(sizes, seed):
    labels = labels_of(sizes)
    found = draw(labels, 3, seed, sampler="class_balanced")
    assert len(found) == len(labels) and found.dtype == torch.int64
    shown = Counter(labels[found].tolist())
    assert set(shown) <= {c for c, size in enumerate(sizes) if size}
    counts = [shown[c] for c, size in enumerate(sizes) if size]
    assert max(counts) - min(counts) <= 1
    for c, size in enumerate(sizes):
        images = [i for i in found.tolist() if labels[i] == c]
        assert no_early_repeats(images, max(size, 1))


def test_class_balanced_mixes_the_classes_and_draws_who_gets_one_more():
    labels = labels_of([500, 300, 201])
    orders = [draw(labels, seed=seed, sampler="class_balanced") for seed in range(40)]
    larger = Counter(c for order in orders for c, n in Counter(labels[order].tolist()).items() if n == 334)
    assert set(larger) == {0, 1, 2} and sum(larger.values()) == 80
    turns = labels[orders[0]]
    # In a random order two neighbours are of one class a third of the time; sorted ones nearly always, cycled ones never.
    assert 0.25 < (turns[1:] == turns[:-1]).double().mean() < 0.42
    # The second permutation of a class is another one than the first.
    small = [i for i in draw(labels_of([900, 30]), sampler="class_balanced").tolist() if labels_of([900, 30])[i] == 1]
    assert small[:30] != small[30:60] and set(small[:30]) == set(small[30:60])


@given(CLASS_SIZES, st.integers(1, 5), st.integers(2, 6), st.booleans(), st.integers(0, 2**31))
def test_m_per_class_batches(sizes, per_class, together, drop_last, seed):
    present = [c for c, size in enumerate(sizes) if size]
    assume(together <= len(present))
    batch_size, labels = per_class * together, labels_of(sizes)
    assume(not drop_last or batch_size <= len(labels))
    found = draw(labels, batch_size, seed, drop_last, sampler="m_per_class", per_class=per_class)
    whole = len(labels) // batch_size if drop_last else -(-len(labels) // batch_size)
    assert len(found) == whole * batch_size
    for batch in found.split(batch_size):
        turns = labels[batch].view(together, per_class)
        assert (turns == turns[:, :1]).all() and len(set(turns[:, 0].tolist())) == together
        for row in batch.view(together, per_class).tolist():
            # An image is in a batch twice only where its class is too small for all to differ.
            assert len(set(row)) == min(per_class, sizes[labels[row[0]]]) or sizes[labels[row[0]]] < per_class
    turns = labels[found].view(-1, per_class)[:, 0].tolist()
    assert no_early_repeats(turns, len(present))
    for c in present:
        assert no_early_repeats([i for i in found.tolist() if labels[i] == c], sizes[c])


def test_m_per_class_meets_other_classes_and_images_from_pass_to_pass():
    labels = labels_of([40] * 6)
    found = draw(labels, 12, sampler="m_per_class", per_class=4)
    met = {tuple(sorted(set(labels[batch].tolist()))) for batch in found.split(12)}
    assert len(met) > 2, "a cycle through one permutation would give two sets of three classes"
    assert not torch.equal(found, draw(labels, 12, 1, sampler="m_per_class", per_class=4))


def test_each_seam_of_permutations_is_a_fair_draw():
    """With 3 items in pieces of 2, the second piece is one item that is left and one of the two others, each half the time."""
    seen = Counter()
    for seed in range(600):
        found = draw(torch.tensor([0, 0, 0, 1, 1, 1]), 4, seed, sampler="m_per_class", per_class=2)
        found = found[found < 3]  # of one class
        assert len(set(found[2:].tolist())) == 2 and len(found) == 4
        seen[tuple(found[1:].tolist())] += 1
    # 6 permutations of the first three, and 2 choices for the last of which one is excluded by nothing but the left one.
    assert len(seen) == 12 and max(seen.values()) < 2 * min(seen.values())


# Extra images


@given(
    CLASS_SIZES, st.integers(1, 60), st.integers(2, 9), st.floats(0.05, 0.95), st.booleans(),
    st.sampled_from(SAMPLERS), st.integers(0, 2**31),
)  # fmt: skip
def test_every_batch_has_its_share_of_extra_images(sizes, extra, batch_size, share, drop_last, sampler, seed):
    labels = labels_of(sizes)
    n, theirs = len(labels), round(share * batch_size)
    ours = batch_size - theirs
    assume(0 < theirs < batch_size and (not drop_last or batch_size <= n))
    each = max(1, ours // 2)
    assume(sampler != "m_per_class" or (ours % 2 == 0 and sum(size > 0 for size in sizes) > 1))
    more = {"sampler": sampler, "per_class": each}  # of two classes
    found = draw(labels, batch_size, seed, drop_last, extra=extra, extra_share=share, **more)
    assert 0 <= found.min() and found.max() < n + extra
    batches = list(found.split(batch_size))
    assert len(batches) == (n // batch_size if drop_last else -(-n // batch_size))
    # The real images are what the sampler gives of so many, not a longer order cut off.
    real = found[found < n]
    if sampler == "shuffle":
        assert torch.equal(real, torch.randperm(n, generator=seeded(seed))[: len(batches) * ours])
    shown = labels[real].bincount(minlength=len(sizes))[torch.tensor(sizes) > 0]
    if sampler == "class_balanced":
        assert len(real) == min(len(batches) * ours, n) and shown.max() - shown.min() <= 1
    if sampler == "m_per_class":
        assert len(real) == len(batches) * ours and shown.max() - shown.min() <= each
        assert all(len(set(turn.tolist())) == 1 for turn in labels[real].split(each))
    if sampler != "shuffle":
        assert all(no_early_repeats([i for i in real.tolist() if labels[i] == c], max(sizes[c], 1)) for c in range(len(sizes)))
    whole = len(real) // ours
    for batch in batches[:whole]:
        assert len(batch) == batch_size and (batch >= n).sum() == theirs
        # Any part of a batch has its share of the extra ones, within one image.
        for stop in range(batch_size + 1):
            assert abs((batch[:stop] >= n).sum() - stop * theirs / batch_size) < 1
        mine = batch[batch >= n].tolist()
        assert len(set(mine)) == len(mine) or extra < theirs
    if len(batches) > whole:
        rest = len(real) % ours
        assert (batches[-1] < n).sum() == rest and len(batches[-1]) == rest + round(rest * theirs / ours)
    assert no_early_repeats([i for i in found.tolist() if i >= n], extra)


def test_an_epoch_has_as_many_batches_as_without_extra_images():
    found = draw(torch.arange(1000) % 10, 64, drop_last=True, extra=5000, extra_share=0.7)
    assert len(found) == 64 * (1000 // 64) and (found >= 1000).sum() == 45 * (1000 // 64)
    assert len(set(found.tolist())) == len(found)
    assert set(draw(torch.arange(1000) % 10, 64, 1, drop_last=True, extra=5000)[:64].tolist()) != set(found[:64].tolist())


@pytest.mark.parametrize("sampler", ["class_balanced", "m_per_class"])
def test_classes_stay_balanced_beside_extra_images(sampler):
    """10 batches of 30 real images from 10 classes: 30 of each class, no image twice, and other ones in another epoch."""
    labels = labels_of([100] * 10)
    more = {"drop_last": True, "sampler": sampler, "per_class": 3, "extra": 5000, "extra_share": 0.7}
    epochs = [found[found < 1000] for found in (draw(labels, 100, seed, **more) for seed in range(2))]
    for real in epochs:
        assert labels[real].bincount().tolist() == [30] * 10 and len(set(real.tolist())) == 300
    assert set(epochs[0].tolist()) != set(epochs[1].tolist())


@given(st.integers(0, 60), st.integers(1, 600), st.integers(0, 2**31))
def test_distinct_numbers(count, among, seed):
    count = min(count, among)
    found = _distinct(count, among, seeded(seed)).tolist()
    assert len(found) == count == len(set(found)) and all(0 <= i < among for i in found)


@pytest.mark.parametrize(("count", "among"), [(2, 5), (2, 9)])
def test_distinct_numbers_are_uniform(count, among):
    """Both ways of drawing: every ordered pair equally often."""
    generator, rounds = seeded(), 9000
    seen = Counter(tuple(_distinct(count, among, generator).tolist()) for _ in range(rounds))
    pairs = among * (among - 1)
    assert len(seen) == pairs
    # Chi-squared with pairs - 1 degrees of freedom: within 4 standard deviations of its mean, and the seed is fixed.
    chi = sum((n - rounds / pairs) ** 2 / (rounds / pairs) for n in seen.values())
    assert abs(chi - (pairs - 1)) < 4 * (2 * (pairs - 1)) ** 0.5


def test_few_of_millions_are_drawn_without_a_permutation_of_them(monkeypatch):
    asked = []
    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **more: asked.append(n) or real(n, **more))
    found = draw(torch.arange(1000) % 10, 64, extra=10**12)
    assert max(asked) == 1000 and found.max() > 10**11


# Both


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("extra", [0, 7, 5000])
def test_only_the_given_generator_decides(sampler, extra):
    labels = labels_of([40, 17, 64, 9])
    state = torch.get_rng_state()
    first = draw(labels, 8, sampler=sampler, per_class=2, extra=extra, extra_share=0.5)
    torch.manual_seed(1)
    again = torch.get_rng_state()
    assert torch.equal(first, draw(labels, 8, sampler=sampler, per_class=2, extra=extra, extra_share=0.5))
    assert torch.equal(torch.get_rng_state(), again)
    torch.set_rng_state(state)
    generator = seeded()
    two = [
        epoch_order(
            labels, batch_size=8, generator=generator, drop_last=False, sampler=sampler, per_class=2, extra=extra, extra_share=0.5
        )
        for _ in range(2)
    ]
    assert torch.equal(two[0], first) and not torch.equal(two[1], first)


def test_orders_are_what_they_were():
    """Written down, so that a run that is resumed on another machine or version goes on in the same order."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    orders = {sampler: draw(labels, 4, 3, sampler=sampler, per_class=2).tolist() for sampler in SAMPLERS}
    assert orders == {
        "shuffle": [6, 0, 3, 7, 8, 5, 1, 9, 2, 4],
        "class_balanced": [4, 5, 5, 2, 7, 9, 4, 1, 8, 0],
        "m_per_class": [4, 5, 0, 2, 7, 9, 5, 4, 8, 6, 3, 1],
    }
    dropped = {sampler: draw(labels, 4, 3, True, sampler=sampler, per_class=2).tolist() for sampler in SAMPLERS}
    assert dropped == {
        "shuffle": [6, 0, 3, 7, 8, 5, 1, 9],
        "class_balanced": [4, 5, 5, 2, 7, 9, 4, 1],
        "m_per_class": [4, 5, 0, 2, 7, 9, 5, 4],
    }
    assert draw(labels, 4, 3, extra=100, extra_share=0.5).tolist() == [6, 49, 0, 24, 3, 101, 7, 35, 8, 99, 5, 96]


def test_what_cannot_be():
    labels = labels_of([20, 20, 20])
    with pytest.raises(UserError, match=r"^batch size is 0 and must be at least 1$"):
        draw(labels, 0)
    with pytest.raises(
        UserError,
        match=r"^batch size is 61 and must be at most 60, the number of images, since an incomplete last batch is dropped$",
    ):
        draw(labels, 61, drop_last=True)
    with pytest.raises(UserError, match=r"^batch size is 300 and must be at most 60, "):
        draw(labels, 300, drop_last=True, extra=9)
    with pytest.raises(
        UserError,
        match=r"^data.per_class is 5, and it must divide the 12 images of a batch and leave at least 2 and at most 3 classes in it, "
        r"as 4 does$",
    ):
        draw(labels, 12, sampler="m_per_class", per_class=5)
    with pytest.raises(
        UserError,
        match=r"^data.per_class is 2, and it must divide the 12 images of a batch and leave at least 2 and at most 3 .*, as 4 does$",
    ):
        draw(labels, 12, sampler="m_per_class", per_class=2)
    with pytest.raises(UserError, match=r"^data.per_class is 12, .*leave at least 2 and at most 3 classes in it, as 6 does$"):
        draw(labels, 12, sampler="m_per_class", per_class=12)
    with pytest.raises(UserError, match=r"^data.per_class is 7, .*, which no number does$"):
        draw(labels, 7, sampler="m_per_class", per_class=7)
    with pytest.raises(UserError, match=r"^data.per_class is 0, "):
        draw(labels, 12, sampler="m_per_class", per_class=0)
    with pytest.raises(
        UserError,
        match=r"^data.per_class is 4, and it must divide the 6 images of a batch that are not from data.extra and .*, as 3 does$",
    ):
        draw(labels, 12, sampler="m_per_class", per_class=4, extra=5, extra_share=0.5)
    for share in (0.01, 0.99, 0, 1, -1, 2):
        with pytest.raises(
            UserError, match=rf"^data.extra_share is {share}, and of a batch of 12 it must leave at least one image"
        ):
            draw(labels, 12, extra=5, extra_share=share)
    with pytest.raises(ValueError, match=r"^sampler is 'weighted' and must be one of"):
        draw(labels, 12, sampler="weighted")
    with pytest.raises(ValueError, match="drawn from a CPU generator, not from one on cuda"):
        epoch_order(labels, batch_size=4, generator=SimpleNamespace(device=torch.device("cuda")), drop_last=True)
