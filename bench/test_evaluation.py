"""Robust accuracy by PGD-20, fp32: a plain loop and torchattacks beside the engine's. `make bench`, CPU figures.

All start from the clean images, so that all compute the same attack; their accuracies must agree within a point. A second rung
in bf16 is none here: results are judged in fp32. AutoAttack's stages run on the model as it stands, by pyautoattack's own code,
in the engine too: there is nothing to compare yet.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from bench import cases, naive
from bench.turns import CPU, not_installed, take_turns
from fastanchor.data import sources, views
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split
from fastanchor.evaluate.accuracy import measure
from fastanchor.evaluate.protocol import AttackSpec

# Percentage points by which accuracies may differ: rounding decides about an image on the boundary.
POINTS = 1.0
TRAIN_BATCH, WARM = 64, 8


@functools.cache
def trained(width: int, steps: int) -> dict[str, torch.Tensor]:
    """Weights of a ResNet-18 after some steps of plain training on the digits: right about most of them, robust to a part."""
    split = sources.load("digits").train
    model = cases.make_model(width, CPU).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(split), (TRAIN_BATCH,), generator=generator)
        loss = F.cross_entropy(model(views.to_float(split.images[chosen])), split.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def make_model(sizes, *, channels_last: bool):
    """A new copy of that network, in eval mode."""
    model = cases.make_model(sizes.evaluation_width, CPU, channels_last=channels_last)
    model.load_state_dict(trained(sizes.evaluation_width, sizes.evaluation_train_steps))
    return model


def plain_accuracy(model, attack, images, labels, batch: int) -> float:
    """Percent of images classified correctly both clean and under `attack`(images, labels)."""
    correct = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        x_adv = attack(x, y)
        with torch.no_grad():
            correct += ((model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)).sum().item()
    return 100 * correct / len(labels)


def agree(percents: dict[str, float], points: float = POINTS) -> None:
    """AssertionError where two accuracies are further apart: someone then computes something else."""
    assert max(percents.values()) - min(percents.values()) <= points + 1e-9, f"robust accuracies differ: {percents}"


def test_robust_accuracy(benchmark, sizes):
    count, batch, steps = sizes.evaluation_images, sizes.evaluation_batch, sizes.evaluation_steps
    benchmark.group = f"evaluation, PGD-{steps}, {count} images, ResNet-18 of width {sizes.evaluation_width}"
    test = sources.load("digits").test
    data = ResidentSplit(Split(test.images[:count], test.labels[:count]), CPU)
    images, labels = views.to_float(data.images).contiguous(), data.labels
    network, plain_network = (make_model(sizes, channels_last=last) for last in (True, False))
    spec = AttackSpec(f"pgd{steps}", cases.EPS, cases.STEP_SIZE, steps, start="zero")
    found, clean = {}, measure(network, data, batch_size=batch, num_classes=cases.CLASSES).accuracy

    def naively(x, y):
        start = torch.zeros_like(x)
        return naive.attack(plain_network, x, y, start, eps=cases.EPS, step_size=cases.STEP_SIZE, steps=steps)

    def plain(name, attack, only=count):
        found[name] = plain_accuracy(plain_network, attack, images[:only], labels[:only], batch)

    def engine(split=data):
        found["ours"] = measure(network, split, spec, batch_size=batch, num_classes=cases.CLASSES).accuracy

    peers = {"naive": functools.partial(plain, "naive", naively)}
    left_out = not_installed(torchattacks="torchattacks") | {
        "autoattack": "the engine runs pyautoattack's code on the model as it stands: nothing to compare yet"
    }
    if "torchattacks" not in left_out:
        import torchattacks

        attack = torchattacks.PGD(plain_network, cases.EPS, cases.STEP_SIZE, steps, random_start=False)
        peers["torchattacks"] = functools.partial(plain, "torchattacks", attack)

    def check():
        benchmark.extra_info |= {"clean_percent": clean, "robust_percent": dict(found)}
        agree(found)
        # Where an attack fools none, or all, any other attack might agree with it.
        assert sizes.quick or 0 < found["ours"] < clean

    # All of it once more, only to warm up, would take as long as a round.
    engine(ResidentSplit(Split(test.images[:WARM], test.labels[:WARM]), CPU))
    for call in peers.values():
        call(only=WARM)
    take_turns(benchmark, engine, peers, rounds=sizes.evaluation_rounds, warm=False, images=count, left_out=left_out, check=check)
