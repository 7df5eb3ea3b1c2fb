"""From a configuration to judged results: load the data, train, evaluate on the test set, write the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from fastanchor import environment
from fastanchor.config import Config
from fastanchor.data import feeds, sources
from fastanchor.data.encoded import Encoded
from fastanchor.data.extra import read_extra
from fastanchor.data.judged import judged_split
from fastanchor.data.sources import ImageSet
from fastanchor.errors import UserError
from fastanchor.evaluate.autoattack import require_autoattack
from fastanchor.evaluate.protocol import AttackSpec, parse_attack
from fastanchor.evaluate.report import build_report
from fastanchor.evaluate.results import evaluate, load_result
from fastanchor.train.checks import check_config
from fastanchor.train.loop import train
from fastanchor.train.progress import Reporter
from fastanchor.train.run import RunDir, Trained, load_trained


def load_images(config: Config, device: torch.device | None = None) -> ImageSet:
    """The data set of a configuration, for use on `device` (None: the configuration's)."""
    data = config.data
    images = sources.load(
        data.source, root=data.root, limit=data.limit, val_fraction=data.val_fraction, split_seed=data.split_seed,
        skip_broken=data.skip_broken, image_size=data.image_size, download=data.download, classes=data.classes,
        labels=data.labels, backend=data.backend, budget=feeds.budget(device or environment.pick_device(config.device)),
        augment=data.augment,
    )  # fmt: skip
    if data.extra is None:
        return images
    if isinstance(images.train, Encoded):
        raise UserError(
            "data.extra: extra images are mixed into images decoded in memory only, and these stay files; "
            "add --data.backend resident"
        )
    return dataclasses.replace(images, extra=read_extra(Path(data.extra), images.num_classes, images.image_shape))


def train_and_judge(config: Config, run: RunDir, *, resume: bool, reporter: Reporter) -> list[dict]:
    """The whole of `fastanchor train`; returns the evaluation results. What a resumed run has already, it keeps."""
    check_config(config)
    device = environment.pick_device(config.device)
    if resume:
        config = run.settled(config)
    else:
        run.check_free()
    specs = [parse_attack(text, default_eps=config.attack.eps) for text in config.eval.attacks]
    images = load_images(config, device)
    if any(spec.name == "autoattack" for spec in specs):
        require_autoattack(images.num_classes)  # better said now than after hours of training
    for note in images.notes:
        reporter.say(f"note: {note}")
    counts = f"{len(images.train)} train / {len(images.val)} validation / {len(images.test)} test images"
    height, width = images.image_shape
    size = f"{images.num_classes} classes, {width}x{height}"
    reporter.say(f"{images.name}: {counts}, {size}; on {environment.device_name(device)}")
    train(config, images, run, resume=resume, reporter=reporter)
    trained = load_trained(run.path, device)
    results = judge(trained, images, specs, run.path / "eval", device, reporter, reuse=True)
    try:
        path = build_report(trained, run, images, out=run.path / "report.html", limit=config.eval.report_images, device=device)
        reporter.say(f"report: {path}")
    except UserError as error:  # the results stand without it, matplotlib may be missing
        reporter.say(f"no report: {error}")
    return results


def judge(
    trained: Trained, images: ImageSet, specs: list[AttackSpec], out: Path, device: torch.device, reporter: Reporter, *,
    reuse: bool = False, limit: int | None = None, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """Evaluate a model on the test images; results land in `out`. reuse: keep those that `out` has of the same checkpoint."""
    check_classes(trained, images)
    if images.class_names != trained.class_names:
        reporter.say(f"note: {_first_difference(trained, images)}; they are taken to be the same classes by number")
    limit = limit or trained.config.eval.limit
    test = judged_split(images.test if limit is None else images.test.subset(limit), device)
    about = {
        "checkpoint": str(trained.path), "stage": trained.state["stage"], "epoch": trained.state["epoch"],
        "data": images.name,
    }  # fmt: skip
    kept, wanted = {}, []
    for spec in specs:
        path = out / f"{spec.key()}.json"
        stored = load_result(path) if reuse and path.exists() else {}
        here = (len(test), about["stage"], about["epoch"])
        if tuple(stored.get(name) for name in ("count", "stage", "epoch")) == here:
            kept[spec.key()] = stored
        else:
            wanted.append(spec)
    fresh = evaluate(
        trained.model, test, wanted, num_classes=images.num_classes, batch_size=trained.config.eval.batch_size, seed=seed,
        about=about, out=out, say=reporter.say,
    ) if wanted else []  # fmt: skip
    made = kept | {spec.key(): result for spec, result in zip(wanted, fresh, strict=True)}
    return [made[spec.key()] for spec in specs]


def check_classes(trained: Trained, images: ImageSet) -> None:
    """UserError where the images cannot be judged by the model's class numbers: other classes, or its own in another order."""
    if images.num_classes != len(trained.class_names):
        raise UserError(
            f"{trained.path}: the model has {len(trained.class_names)} classes, {images.name} has {images.num_classes}"
        )
    if images.class_names == trained.class_names:
        return
    if set(images.class_names) & set(trained.class_names):
        raise UserError(
            f"{trained.path}: {_first_difference(trained, images)}: the same classes in another order, or some of them others; "
            "data.classes says which classes in which order"
        )
    # Not one name in common: other words for the classes, such as numbers.


def _first_difference(trained: Trained, images: ImageSet) -> str:
    pairs = zip(trained.class_names, images.class_names, strict=True)
    number, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"class {number} of the model is {ours!r}, of {images.name} {theirs!r}"
