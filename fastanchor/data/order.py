"""Which images an epoch shows in which order: drawn once an epoch on the host, the same for every backend and platform.

Samplers: every image once; every class equally often; so many images of each of a few classes, for contrastive losses. Extra
images are mixed into every batch at a stated share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastanchor.errors import UserError

SAMPLERS = ("shuffle", "class_balanced", "m_per_class")


def epoch_order(
    labels: Tensor, *, batch_size: int, generator: torch.Generator, drop_last: bool, sampler: str = "shuffle", per_class: int = 4,
    extra: int = 0, extra_share: float = 0.7,
) -> Tensor:  # fmt: skip
    """The indices of an epoch, int64 (M,) on the CPU, whose consecutive pieces of batch_size are its batches.

    labels: int64 (n,) on the CPU, of the real images alone. generator: a CPU generator; nothing else is random.
    drop_last: leave an incomplete last batch out.
    sampler: "shuffle": every image once, in the order of `torch.randperm`. "class_balanced": n indices, every class equally often
    (as far as n divides; drop_last then takes the last, incomplete batch away) and none of its images a second time before all of
    them were shown. "m_per_class": batches of batch_size / per_class classes with per_class images each, one class after the
    other; also the last batch is complete.
    Within an epoch no class has a second turn before every class had one, and no image of a class before all of its images;
    in a batch a class or image comes twice only where a class has fewer than per_class images: one of them is then several
    times in it, each time as a view of its own. To refuse that would rule out every set with one rare class. A batch has at
    least two classes, without which a contrastive loss has no negatives.
    extra: number of extra images, indices n to n + extra - 1. Every batch has round(extra_share * batch_size) of them, without
    repeats in an epoch until all were shown, spread evenly between the real ones, so that every process's part of a batch
    has its share of both. An epoch has as many batches as without extra images, and so shows 1 - extra_share of the real ones,
    drawn anew each time, as in the code of Rebuffi et al. 2021 (deepmind-research, adversarial_robustness/jax/experiment.py)
    and Wang et al. 2023 (DM-Improves-AT, core/data/semisup.py): their numbers of epochs can be taken over. Those that it shows
    are the beginning of the shuffled order, or as the sampler says of so many: equally many of every class.
    Raises UserError for sizes that do not go together, ValueError for a generator of another device.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size} and must be at least 1")
    if generator.device.type != "cpu":
        raise ValueError(f"the order of an epoch is drawn from a CPU generator, not from one on {generator.device}")
    added = _added(batch_size, extra_share) if extra else 0
    real = batch_size - added
    whose = " that are not from data.extra" if extra else ""
    if drop_last and batch_size > len(labels):
        raise UserError(
            f"batch size is {batch_size} and must be at most {len(labels)}, the number of images, since an incomplete last "
            "batch is dropped"
        )
    batches = len(labels) // batch_size if drop_last else -(-len(labels) // batch_size)
    if sampler == "shuffle":
        order = torch.randperm(len(labels), generator=generator)
    elif sampler == "class_balanced":
        # To cut a longer order would leave the classes as unequal as its beginning. Without extra images all n are drawn, also
        # where drop_last cuts a few of them: so it was when the first runs were made, and a resumed run keeps its order.
        order = _class_balanced(labels, min(batches * real, len(labels)) if extra else len(labels), generator)
    elif sampler == "m_per_class":
        order = _m_per_class(labels, batches, real, per_class, generator, whose)
    else:
        raise ValueError(f"sampler is {sampler!r} and must be one of {SAMPLERS}")
    order = order[: batches * real]
    return _mixed(order, real, added, len(labels), extra, generator) if extra else order


def _added(batch_size: int, share: float) -> int:
    """Extra images in a batch. UserError where it has no place for both kinds."""
    added = round(share * batch_size) if 0 < share < 1 else 0
    if not 0 < added < batch_size:
        raise UserError(
            f"data.extra_share is {share}, and of a batch of {batch_size} it must leave at least one image for each side, "
            "the extra images and the others"
        )
    return added


def _by_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images sorted by class, (n,), and how many each class that occurs has, (C,)."""
    _, sizes = labels.unique(return_counts=True)
    return labels.argsort(stable=True), sizes


def _class_balanced(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    images, sizes = _by_class(labels)
    classes = len(sizes)
    wanted = torch.full((classes,), count // classes)
    wanted[torch.randperm(classes, generator=generator)[: count % classes]] += 1
    shown = images[_walk(sizes, wanted, 1, generator)]
    # Whose turn it is, at random; each class's images then come in the order in which they were drawn.
    turns = torch.arange(classes).repeat_interleave(wanted)[torch.randperm(count, generator=generator)]
    order = torch.empty(count, dtype=torch.int64)
    order[turns.argsort(stable=True)] = shown
    return order


def _m_per_class(labels: Tensor, batches: int, batch_size: int, per_class: int, generator: torch.Generator, whose: str) -> Tensor:
    images, sizes = _by_class(labels)
    classes, together = len(sizes), batch_size // max(per_class, 1)
    if per_class < 1 or batch_size % per_class or not 2 <= together <= classes:
        allowed = [m for m in range(1, batch_size + 1) if batch_size % m == 0 and 2 <= batch_size // m <= classes]
        advice = f"as {min(allowed, key=lambda m: abs(m - per_class))} does" if allowed else "which no number does"
        raise UserError(
            f"data.per_class is {per_class}, and it must divide the {batch_size} images of a batch{whose} and leave at least 2 "
            f"and at most {classes} classes in it, {advice}"
        )
    count = batches * together
    turns = _walk(torch.tensor([classes]), torch.tensor([count]), together, generator)
    shown = images[_walk(sizes, turns.bincount(minlength=classes) * per_class, per_class, generator)]
    order = torch.empty(count, per_class, dtype=torch.int64)
    order[turns.argsort(stable=True)] = shown.view(count, per_class)
    return order.flatten()


def _mixed(order: Tensor, real: int, added: int, first: int, extra: int, generator: torch.Generator) -> Tensor:
    """`real` of the order and `added` extra ones in turns; an incomplete last batch keeps the ratio."""
    whole, rest = divmod(len(order), real)
    parts = [(whole, real, added), (1, rest, round(rest * added / real))]
    wanted = sum(batches * n for batches, _, n in parts)
    if wanted < extra:
        drawn = _distinct(wanted, extra, generator)
    else:
        drawn = _walk(torch.tensor([extra]), torch.tensor([wanted]), added, generator)
    drawn, mixed = drawn + first, []
    for batches, ours, theirs in parts:
        places = torch.arange(ours + theirs + 1) * theirs // max(ours + theirs, 1)
        is_extra = places.diff().bool().repeat(batches)
        batch = torch.empty(len(is_extra), dtype=torch.int64)
        batch[~is_extra], order = order[: batches * ours], order[batches * ours :]
        batch[is_extra], drawn = drawn[: batches * theirs], drawn[batches * theirs :]
        mixed.append(batch)
    return torch.cat(mixed)


def _distinct(count: int, among: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers of [0, among), in random order: int64 (count,)."""
    if among < 4 * count:
        return torch.randperm(among, generator=generator)[:count]
    # A permutation of millions to take a few of it costs memory and time. Independent draws without those that have come
    # before have the same distribution.
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        drawn = torch.cat([found, torch.randint(among, (2 * (count - len(found)),), generator=generator)])
        values, place = drawn.sort(stable=True)
        new = torch.ones(len(drawn), dtype=torch.bool)
        new[1:] = values[1:] != values[:-1]
        found = drawn[place[new].sort().values]
    return found[:count]


def _walk(sizes: Tensor, wanted: Tensor, piece: int, generator: torch.Generator) -> Tensor:
    """For every group as many of its items as wanted, one random permutation of them after another.

    sizes, wanted: int64 (G,), sizes at least 1. piece: from the beginning of a group, `piece` consecutive items are all
    different, also where a permutation ends within them, if the group has that many. Returns items, int64 (sum of wanted,),
    group after group, numbered through all groups: those of group g begin at sum(sizes[:g]).
    """
    first = sizes.cumsum(0) - sizes
    last_seen = torch.zeros(int(sizes.sum()), dtype=torch.bool)  # in the piece that the permutation before has left incomplete
    items, owners = [], []
    done = 0  # permutations of every group that goes on
    while len(active := (wanted > done * sizes).nonzero().flatten()):
        size = sizes[active]
        group = torch.arange(len(active)).repeat_interleave(size)
        begin = (size.cumsum(0) - size)[group]
        rank = torch.arange(len(group)) - begin
        item = rank + first[active][group]
        shuffled = torch.randperm(len(group), generator=generator)
        item = item[shuffled[group[shuffled].argsort(stable=True)]]
        missing = -done * size % piece
        if missing.any():
            # The piece is completed with items that it has not yet, the first ones of the new permutation.
            fresh = ~last_seen[item]
            before = fresh.cumsum(0) - fresh.long()
            forward = fresh & (before - before[begin] < missing[group])
            item = item[(2 * group + ~forward).argsort(stable=True)]
        kept = rank < (wanted[active] - done * size)[group]
        items.append(item[kept])
        owners.append(active[group[kept]])
        done += 1
        last_seen[item] = rank >= (size - done * size % piece)[group]
    return torch.cat(items)[torch.cat(owners).argsort(stable=True)] if items else torch.empty(0, dtype=torch.int64)
