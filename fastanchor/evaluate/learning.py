"""The report's training curves: accuracy by epoch, what robust overfitting cost, the loss terms and the learning rate.

And the training's speed, as a table.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastanchor.ceilings import PASSED, WHY_PASSED, share_text
from fastanchor.config import Config
from fastanchor.data.sources import ImageSet
from fastanchor.evaluate import figures
from fastanchor.evaluate.figures import ACCENT, CLEAN, INK, MUTED, ROBUST, Line, Mark
from fastanchor.evaluate.page import figure, finding, section, swatch, table
from fastanchor.evaluate.protocol import fraction, parse_attack
from fastanchor.methods import is_defended

if TYPE_CHECKING:
    from fastanchor.train.run import Trained

Row = dict[str, Any]
Series = tuple[list[float], list[float]]
LOSS_COLORS = {"ce_adv": ROBUST, "bce": ROBUST, "ce": CLEAN, "ce_clean": CLEAN, "hsc": ACCENT}
OTHER_COLORS = (ACCENT, MUTED, INK)
# Metrics of `train.throughput`, which runs of the first versions lack.
SPEED_KEYS = ("images_per_s", "tflops", "share_of_bf16_matmul", "peak_memory_mb", "first_step_s")


def learning_section(trained: Trained, rows: list[Row], images: ImageSet) -> str:
    """Clean and robust accuracy by epoch with the chosen epoch, the gap of best and last in words, and the loss's panels."""
    if not rows:
        return section("Training curves", "<p>No epochs are logged.</p>")
    two, offset = any(row["stage"] == 2 for row in rows), _offset(rows)
    last = max(_epoch(row, offset) for row in rows)
    axis: Row = {"xlabel": "epoch", "xlim": (1, last), "shade": (offset, "stage 2") if two else None}
    panels, legend = _accuracy_panels(trained, rows, axis)
    count = validation_count(trained.config, images)
    # An undefended network has no robustness to overfit, and is not chosen by it.
    defended = is_defended(trained.config)
    words = [sentence for stage in (1, 2) if defended and (sentence := gap_sentence(rows, stage, count))]
    caption = _accuracy_caption(trained.config, rows, images, count)
    small = _small_panels(rows, axis)
    small_caption = (
        "Means over each epoch of the weighted loss terms as they are added up, and the learning rate of the epoch's last step."
    )
    if _series(rows, "train_robust"):
        spec = parse_attack(trained.config.watch.attack, default_eps=trained.config.attack.eps).describe()
        small_caption += (
            f" Watched images: robust accuracy of {trained.config.watch.images} training images under {spec} after each epoch; a "
            "fall from one epoch to the next that accuracy under the training attack does not follow is catastrophic overfitting."
        )
    if _series(rows, "effective_positives"):
        small_caption += (
            " Effective positives: 1 / Σ w² of the contrastive weights of an anchor, the median over anchors; below "
            "about 4, a few outlying positives rule the loss."
        )
    body = "".join(finding(word) for word in words)
    body += figure(f'<div class="row">{panels}</div><p class="legend">{legend}</p>', caption) if panels else ""
    return section("Training curves", body + figure(f'<div class="row small">{small}</div>', small_caption))


def speed_section(rows: list[Row], device: str) -> str:
    """A table of the rates, the memory and the wait for the first step, as far as they are logged; "" where nothing is."""
    if not any(_values(rows, key) for key in SPEED_KEYS):
        return ""
    stages = {f"stage {stage}": own for stage in (1, 2) if (own := [row for row in rows if row["stage"] == stage])}
    shares = [_median(own, "share_of_bf16_matmul") for own in stages.values()]
    lines = {
        "time an epoch": _cells(stages, "seconds", _median, " s"),
        "images a second": _cells(stages, "images_per_s", _median),
        "model TFLOP/s": _cells(stages, "tflops", _median),
        "share of bf16 matmul": ["" if share is None else share_text(share) for share in shares],
        "peak memory": _cells(stages, "peak_memory_mb", lambda own, key: max(_values(own, key), default=None), " MB"),
        "time to first step": _cells(stages, "first_step_s", lambda own, key: next(iter(_values(own, key)), None), " s"),
    }
    caption = (
        f"Device: {device}. Rates are of the training alone, validation apart: medians over a stage's epochs without those in "
        "which the program warms up (the first, and the first after resuming; they count where there are no others). Model FLOPs "
        "are those that the algorithm needs, two a multiply-add of convolutions and matrix products: wasted work lowers the "
        "rate. Their share is of the rate of large bf16 matrix products, measured on this device before the training. Peak "
        "memory, since the run began: of all tensors on a GPU, of the whole process on a CPU. Time to first step: from the run's "
        "beginning, measuring and compiling included."
    ) + (f" {WHY_PASSED.capitalize()}." if PASSED in lines["share of bf16 matmul"] else "")
    shown = {name: cells for name, cells in lines.items() if any(cells)}
    return section("Speed", figure(table(shown, list(stages)), caption))


def seconds_an_epoch(rows: list[Row]) -> str:
    """The median over a stage's epochs, warm-up apart, in words; for each stage where there are two."""
    medians = {stage: _median([row for row in rows if row["stage"] == stage], "seconds") for stage in (1, 2)}
    texts = [(f" in stage {stage}", f"{three_digits(value)} s an epoch") for stage, value in medians.items() if value is not None]
    return ", ".join(text + (stage if len(texts) > 1 else "") for stage, text in texts)


def three_digits(value: float) -> str:
    """A positive number to three significant digits, in decimals: 0.0123, 1.23, 1,234."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _cells(stages: dict[str, list[Row]], key: str, pick: Callable[[list[Row], str], float | None], unit: str = "") -> list[str]:
    """What `pick` makes of a metric in each stage, in words; nothing where the stage has none."""
    values = [pick(rows, key) for rows in stages.values()]
    return ["" if value is None else three_digits(value) + unit for value in values]


def _median(rows: list[Row], key: str) -> float | None:
    """Median over a stage's epochs; the first one, and the first after resuming, count only where there are no others."""
    first = min((row["epoch"] for row in rows), default=0)
    warm = [row for row in rows if row["epoch"] != first and "first_step_s" not in row]
    values = _values(warm, key) or _values(rows, key)
    return statistics.median(values) if values else None


def _values(rows: list[Row], key: str) -> list[float]:
    """The finite values of a metric, in order."""
    return [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]


def gap_sentence(rows: list[Row], stage: int, count: int) -> str | None:
    """What a stage's last epoch lost against its best in robust accuracy on `count` validation images; None: never validated."""
    judged = _judged(rows, stage)
    if not judged:
        return None
    best, last = _best(judged), judged[-1]
    start = f"Stage {stage}: validation robust accuracy was highest after epoch {best['epoch']}, {best['val_robust']:.1f} %"
    if best is last:
        return f"{start}, the last one validated: no robust overfitting shows."
    gap = best["val_robust"] - last["val_robust"]
    # The two figures are of the same images, which makes the error of their difference smaller than that of independent ones.
    noise = 100 * math.sqrt(sum(p * (1 - p) for p in (best["val_robust"] / 100, last["val_robust"] / 100)) / max(count, 1))
    few = f"within the noise of {count} images (standard error of the gap at most {noise:.1f} points)"
    verdict = "robust overfitting" if gap > 2 * noise else few
    return f"{start}, and {last['val_robust']:.1f} % after the last, epoch {last['epoch']}: a gap of {gap:.1f} points, {verdict}."


def validation_count(config: Config, images: ImageSet) -> int:
    """Number of images that an epoch is validated on."""
    return len(images.val) if config.val.limit is None else min(config.val.limit, len(images.val))


def _judged(rows: list[Row], stage: int) -> list[Row]:
    return [row for row in rows if row["stage"] == stage and math.isfinite(row.get("val_robust", math.nan))]


def _best(judged: list[Row]) -> Row:
    """The epoch of the highest robust accuracy, ties by clean accuracy."""
    return max(judged, key=lambda row: (row["val_robust"], row["val_clean"]))


def _kept(judged: list[Row]) -> Row:
    """The epoch that the training loop kept: the last one that was the best so far by what the method selects by."""
    return next((row for row in reversed(judged) if row.get("best")), _best(judged))


def _accuracy_panels(trained: Trained, rows: list[Row], axis: Row) -> tuple[str, str]:
    offset, state = _offset(rows), trained.state
    chosen = f"stage {state['stage']}, epoch {state['epoch']}" if axis["shade"] else f"epoch {state['epoch']}"
    marks = [Mark(_epoch(state, offset), f"chosen: {chosen}")]
    best = [_kept(judged) for stage in (1, 2) if (judged := _judged(rows, stage))]
    panels = legend = ""
    for kind, color, train in (("robust", ROBUST, "accuracy_adv"), ("clean", CLEAN, _clean_key(rows))):
        curves = [("train", _series(rows, train, 100)), ("validation", _series(rows, f"val_{kind}"))]
        lines = [Line(*series, label, color, dashed=label == "train") for label, series in curves if series]
        if not lines:
            continue
        rings = [(_epoch(row, offset), row[f"val_{kind}"]) for row in best]
        title = f"{kind.capitalize()} accuracy"
        panels += figures.curves(lines, title=title, ylabel="accuracy (%)", name=title, marks=marks, rings=rings, **axis)
        legend += "".join(swatch(kind, f"{kind}, {line.label}", line.dashed) for line in lines)
    return panels, legend


def _accuracy_caption(config: Config, rows: list[Row], images: ImageSet, count: int) -> str:
    attack = config.attack
    bn = f"BatchNorm in {attack.bn} mode while attacking" + ("" if attack.norm == "linf" else f", {attack.norm}")
    radius = "" if attack.start_radius is None else f" of radius {fraction(attack.start_radius)}"
    start = f"{attack.start} start{radius}{'' if attack.project else ', no projection'}"
    adversary = f"PGD-{attack.steps} (eps {fraction(attack.eps)}, step {fraction(attack.step_size)}, {start}, {bn})"
    train = [f"robust under the training attack, {adversary}"] if _series(rows, "accuracy_adv") else []
    if _series(rows, _clean_key(rows)):
        train.append("clean on images as they are" if _clean_key(rows) == "accuracy_clean" else "clean on augmented images")
    text = "Accuracy by epoch."
    if train:
        text += f" Train: {'; '.join(train)}; n = {len(images.train)}, added up while the weights move."
    if any("val_robust" in row for row in rows):
        judge = parse_attack(config.val.attack, default_eps=attack.eps)
        text += f" Validation, after the epoch: robust under {judge.describe()}, n = {count} images."
    if _series(rows, "accuracy_adv"):
        text += (
            " How to read it: where robust train accuracy (dashed) goes on rising while robust validation accuracy (solid) "
            "falls, the model overfits to its adversary."
        )
    text += " A ring is a stage's best epoch on the validation split, the dotted line the checkpoint judged here."
    if any(row["stage"] == 2 for row in rows):
        # Where no epoch of stage 1 was validated, its last one was kept.
        kept = "best" if any("val_robust" in row for row in rows if row["stage"] == 1) else "last"
        what = "all weights" if config.stage2.mode == "aff" else "a new linear classifier on the frozen backbone"
        text += f" Shaded: stage 2, {what} of stage 1's {kept} epoch."
    return text


def _small_panels(rows: list[Row], axis: Row) -> str:
    terms = dict.fromkeys(key for row in rows for key in row if key.startswith("loss_"))
    names = [key.removeprefix("loss_") for key in terms if _series(rows, key)]
    others = itertools.cycle(OTHER_COLORS)
    losses = [Line(*_series(rows, f"loss_{name}"), name, LOSS_COLORS.get(name) or next(others)) for name in names]
    rate, watched, positives = (_series(rows, key) for key in ("lr", "train_robust", "effective_positives"))
    drawn = [("Loss terms", "loss (nats)", losses, False)] if losses else []
    if rate:
        finite = [value for value in rate[1] if not math.isnan(value)]
        log = 0 < 20 * min(finite) < max(finite)
        drawn.append(("Learning rate", "learning rate", [Line(*rate, "", MUTED)], log))
    if watched:
        drawn.append(("Watched images", "robust accuracy (%)", [Line(*watched, "", ROBUST)], False))
    if positives:
        drawn.append(("Effective positives", "positives an anchor", [Line(*positives, "", ACCENT)], False))
    return "".join(
        figures.curves(lines, title=title, ylabel=label, name=title, percent=False, log=log, size=(2.5, 1.9), **axis)
        for title, label, lines, log in drawn
    )


def _clean_key(rows: list[Row]) -> str:
    return next((key for key in ("accuracy_aug", "accuracy_weak") if _series(rows, key)), "accuracy_clean")


def _offset(rows: list[Row]) -> int:
    """Epochs of stage 1, after which those of stage 2 are counted on."""
    return max((row["epoch"] for row in rows if row["stage"] == 1), default=0)


def _epoch(row: Row, offset: int) -> int:
    return row["epoch"] + (offset if row["stage"] == 2 else 0)


def _series(rows: list[Row], key: str, scale: float = 1) -> Series | None:
    """Epochs, counted through both stages, and the finite values of `key`; a NaN parts the stages. None: no row has any."""
    x: list[float] = []
    y: list[float] = []
    before, offset = None, _offset(rows)
    for row in rows:
        value = row.get(key)
        if value is None or not math.isfinite(value):
            continue
        if before not in (None, row["stage"]):
            x.append(offset + 0.5)
            y.append(math.nan)
        x.append(_epoch(row, offset))
        y.append(scale * value)
        before = row["stage"]
    return (x, y) if x else None
