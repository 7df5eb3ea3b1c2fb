"""report.html of a training run: one self-contained file that opens from disk, without scripts and without the network.

Built from what the run has logged and evaluated, and from a few hundred test images attacked anew (`inspection`).
Everything that comes from outside (class names, paths, commands) is escaped.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastanchor import settings
from fastanchor.config import Config
from fastanchor.data.sources import ImageSet
from fastanchor.errors import UserError
from fastanchor.evaluate import figures, inspection
from fastanchor.evaluate.figures import ROBUST, Line, Mark
from fastanchor.evaluate.inspection import Attacked
from fastanchor.evaluate.learning import learning_section, seconds_an_epoch, speed_section, validation_count
from fastanchor.evaluate.page import (
    card,
    clean_text,
    command,
    figure,
    finding,
    image,
    page,
    safe,
    section,
    swatch,
    table,
)
from fastanchor.evaluate.protocol import AttackSpec, fraction, parse_attack
from fastanchor.evaluate.results import load_results
from fastanchor.files import write_text
from fastanchor.methods import build_method, is_defended, is_file, title_of

if TYPE_CHECKING:
    from fastanchor.train.run import RunDir, Trained

EXAMPLES = 8


@dataclass(frozen=True)
class _Context:
    """What all sections read."""

    trained: Trained
    run: RunDir
    images: ImageSet
    names: tuple[str, ...]
    rows: list[dict[str, Any]]
    results: list[dict[str, Any]]
    environment: dict[str, Any]
    attacked: Attacked

    @property
    def pgd(self) -> dict[str, Any] | None:
        """The PGD result that the figures follow."""
        return _main_pgd(self.trained.config, self.results)


def build_report(trained: Trained, run: RunDir, images: ImageSet, *, out: Path, limit: int = 256, device: torch.device) -> Path:
    """Write the report of `run`, whose judged model is `trained`, to the file `out`, and return that path.

    limit: at most so many test images are attacked for the figures; the headline's figures are those of the stored evaluations.
    Raises UserError where matplotlib is missing, the data has other classes than the model, or `out` cannot be written.
    """
    figures.require_matplotlib()
    if limit < 1:
        raise UserError(f"limit = {limit}: must be >= 1")
    classes = len(trained.class_names)
    if images.num_classes != classes:
        raise UserError(f"{trained.path}: the model has {classes} classes, {images.name} has {images.num_classes}")
    results = sorted(_matching_results(trained, run), key=lambda result: -result["robust_accuracy"])
    attack = inspection.report_attack(_evaluation_attack(trained.config, results))
    attacked = inspection.attack_images(trained.model, images.test, attack, limit=limit, device=device)
    names = tuple(clean_text(name) for name in trained.class_names)
    context = _Context(trained, run, images, names, run.history(), results, _environment(run), attacked)
    sections = [
        head(context),
        learning_section(trained, context.rows, images),
        examples_section(context),
        eps_section(context),
        class_section(context),
        embedding_section(context),
        speed_section(context.rows, device_name(context)),
        configuration_section(context),
    ]
    try:
        write_text(Path(out), page(run.path.resolve().name, sections))
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written ({error.strerror})") from None
    return Path(out)


def _main_pgd(config: Config, results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the PGD results the one at the recipe's own eps, or nearest to it; of several the one that fools most."""
    found = [result for result in results if result["attack"]["name"].startswith("pgd")]
    return min(found, key=lambda r: (abs(r["attack"]["eps"] - config.attack.eps), r["robust_accuracy"]), default=None)


def _matching_results(trained: Trained, run: RunDir) -> list[dict[str, Any]]:
    """The run's evaluations that are of this checkpoint: the others would be another model's figures."""
    here = (trained.state["stage"], trained.state["epoch"])
    return [result for result in load_results(run.path / "eval") if (result.get("stage"), result.get("epoch")) == here]


def _evaluation_attack(config: Config, results: list[dict[str, Any]]) -> AttackSpec:
    """The attack that the report's own figures follow: that of `_main_pgd`, else the first PGD of the recipe's evaluation."""
    pgd = _main_pgd(config, results)
    if pgd is not None and pgd["attack"]["eps"] > 0:
        return AttackSpec(**pgd["attack"])
    default = config.attack.eps or 8 / 255
    specs = [parse_attack(text, default_eps=default) for text in config.eval.attacks]
    usable = (spec for spec in specs if spec.name.startswith("pgd") and spec.eps > 0)
    return next(usable, parse_attack("pgd10", default_eps=default))


def _environment(run: RunDir) -> dict[str, Any]:
    path = run.path / "env.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def head(context: _Context) -> str:
    """Name of the run, the row of headline figures, and the facts that they depend on."""
    trained, rows, results = context.trained, context.rows, context.results
    cards = []
    if results:
        cards.append(card(results[0]["clean_accuracy"], "clean", f"no attack, n = {results[0]['count']} test images", "clean"))
        for result in results:
            kind, _, details = result["description"].partition(" (")
            cards.append(card(result["robust_accuracy"], kind, f"{details.rstrip(')')}, n = {result['count']}", "robust"))
        note = ""
    else:
        note = (
            '<p class="note">No evaluation of this checkpoint is stored yet: '
            f"<code>{command('fastanchor', 'eval', context.run.path)}</code> makes one."
        )
        row = next((r for r in rows if (r["stage"], r["epoch"]) == (trained.state["stage"], trained.state["epoch"])), {})
        if "val_robust" in row:
            attack = parse_attack(trained.config.val.attack, default_eps=trained.config.attack.eps).describe()
            note += " Until then, the validation split's figures stand here."
            count = f"n = {validation_count(trained.config, context.images)} validation images"
            cards.append(card(row["val_clean"], "clean, validation", f"no attack, {count}", "clean"))
            cards.append(card(row["val_robust"], "robust, validation", f"{attack}, {count}", "robust"))
        note += "</p>"
    config = trained.config
    data, state = context.images, trained.state
    title = state.get("title") or title_of(config)
    facts = {
        "method": f"{title}, {config.model.name}" + (f", width {config.model.width}" if config.model.width else ""),
        "checkpoint": f"{trained.path.name}: stage {state['stage']}, epoch {state['epoch']}",
        "data": f"{data.name}: {len(data.train)} train, {len(data.val)} validation, {len(data.test)} test images",
        "device": device_name(context),
        "training time": _training_time(rows),
    }
    listed = "".join(f"<div><dt>{safe(key)}</dt><dd>{safe(value)}</dd></div>" for key, value in facts.items())
    name = safe(context.run.path.resolve().name)
    return (f'<header><p class="kicker">fastanchor training report</p><h1>{name}</h1>'
            f'<div class="cards">{"".join(cards)}</div>{note}<dl class="facts">{listed}</dl></header>')  # fmt: skip


def device_name(context: _Context) -> str:
    """The device that the run began on."""
    return context.environment.get("device", "not recorded")


def _training_time(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no epochs logged"
    training, validation = (sum(row.get(key, 0.0) for row in rows) for key in ("seconds", "val_seconds"))
    each = f"median {seconds_an_epoch(rows)}"
    return f"{_duration(training)} for {len(rows)} epochs, {each}; validation {_duration(validation)} more"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def examples_section(context: _Context) -> str:
    """Clean image, adversarial image and magnified difference of a few test images, with predictions and confidence."""
    attacked = context.attacked
    chosen = inspection.pick_examples(attacked, EXAMPLES)
    clean, adversarial = attacked.clean[chosen], attacked.adversarial[chosen]
    factor = inspection.difference_factor(attacked.attack, adversarial - clean)
    differences = inspection.difference_image(clean, adversarial, factor)
    cells = []
    for i, index in enumerate(chosen):
        label = int(attacked.labels[index])
        name = context.names[label]
        cells.append(
            f'<div class="example"><div class="true" title="{safe(name)}">{safe(name)}</div>'
            + image(clean[i], f"clean image of {name}")
            + _prediction(context, attacked.clean_probabilities[index], label)
            + image(adversarial[i], f"adversarial image of {name}")
            + _prediction(context, attacked.adversarial_probabilities[index], label)
            + image(differences[i], f"difference, times {factor:g}")
            + f'<div class="what">diff. &times; {factor:g}</div></div>'
        )  # fmt: skip
    robust, correct = attacked.robust[chosen], attacked.clean_correct[chosen]
    height, width = clean.shape[2:]
    every = -(-max(height, width) // 128)
    caption = (
        f"{len(chosen)} of {len(attacked)} test images ({width} by {height} "
        f"pixels{f', every {every}. pixel shown' if every > 1 else ''}): {int((correct & ~robust).sum())} correctly "
        f"classified ones on which the attack succeeds, {int(robust.sum())} on which it fails, the classes in turn, "
        "not picked by eye. From top to bottom: clean image, adversarial image, each with the prediction and its "
        f"softmax confidence (✗: wrong), and their difference times {factor:g}, where mid-grey is no change. Attack: "
        f"{attacked.attack.describe()}. How to read it: perturbations that trace the object's shape are what a "
        "robust model asks for; a difference like noise with a confident wrong answer is the mark of an undefended "
        "one."
    )
    return section("Clean and adversarial images", figure(f'<div class="examples">{"".join(cells)}</div>', caption))


def _prediction(context: _Context, probabilities: torch.Tensor, label: int) -> str:
    confidence, predicted = probabilities.max(0)
    name, wrong = context.names[int(predicted)], int(predicted) != label
    words, percent = f"{'✗ ' if wrong else ''}{name}", f" · {100 * float(confidence):.0f} %"
    kind = "answer wrong" if wrong else "answer"
    return f'<div class="{kind}" title="{safe(words + percent)}"><span>{safe(words)}</span><i>{safe(percent)}</i></div>'


def eps_section(context: _Context) -> str:
    """Robust accuracy against the attack's radius, and whether it falls as it must."""
    curve = inspection.accuracy_against_eps(context.trained.model, context.attacked)
    config, attack = context.trained.config, curve.attack
    linf = attack.norm == "linf"
    unit = 255 if linf else 1
    marks = [Mark(unit * attack.eps, f"evaluated: eps {fraction(attack.eps)}")]
    trained_eps = config.attack.eps if is_defended(config) and config.attack.norm == attack.norm else 0
    if math.isclose(trained_eps, attack.eps):
        marks = [Mark(unit * attack.eps, f"training and evaluation: eps {fraction(attack.eps)}")]
    elif 0 < trained_eps <= curve.eps[-1]:
        marks.insert(0, Mark(unit * trained_eps, f"training: eps {fraction(trained_eps)}"))
    x = [unit * eps for eps in curve.eps]
    xlabel = "eps (grey levels, 1/255)" if linf else "eps (l2, pixels in [0, 1])"
    plot = figures.curves([Line(x, curve.accuracy, "", ROBUST)], title="", xlabel=xlabel, ylabel="robust accuracy (%)",
                          name="Accuracy against eps", marks=marks, dots=True)  # fmt: skip
    passed, verdict = inspection.masking_check(curve)
    caption = (
        f"Robust accuracy on {curve.count} class-balanced test images at 0 to 4 times eps = {fraction(attack.eps)}; "
        f"eps 0 is clean accuracy. Attack: {attack.describe()}, at other eps with the step in proportion. An image "
        "fooled at one eps counts as fooled at every larger one, and one that holds at the marked eps as holding at "
        "every smaller one. How to read it: the curve must fall towards 0 as eps grows; a plateau above 0 means "
        "that the attack fails where it cannot, which is a sign of gradient masking, not of robustness."
    )
    return section("Accuracy against eps", finding(verdict, alarm=not passed) + figure(plot, caption))


def class_section(context: _Context) -> str:
    """Clean and robust accuracy of each class, or of the worst and best ten."""
    result = context.pgd
    if result is None:
        return section("Accuracy by class", "<p>No PGD evaluation of this checkpoint is stored.</p>")
    classes = [i for i, value in enumerate(result["robust_per_class"]) if value is not None]
    classes.sort(key=lambda i: (-result["robust_per_class"][i], i))
    gap, selection = None, f"All {len(classes)} classes"
    if len(classes) > 20:
        classes, gap, selection = classes[:10] + classes[-10:], 10, f"The ten best and the ten worst of {len(classes)} classes"
    robust, clean = ([result[f"{kind}_per_class"][i] for i in classes] for kind in ("robust", "clean"))
    plot = figures.class_bars([context.names[i] for i in classes], clean, robust, gap_after=gap, name="Accuracy by class")
    caption = (
        f"{selection} by robust accuracy, on n = {result['count']} test images. Attack: {result['description']}. How "
        "to read it: robustness is seldom spread evenly; the distance between the first and the last row is what "
        "the average hides, and pairs of classes that look alike fall first."
    )
    words = (f"Best class: {context.names[classes[0]]} at {robust[0]:.1f} % robust accuracy; worst: {context.names[classes[-1]]} "
             f"at {robust[-1]:.1f} %, {robust[0] - robust[-1]:.1f} points apart.")  # fmt: skip
    legend = f'<p class="legend">{swatch("clean", "clean")}{swatch("robust", "robust")}</p>'
    return section("Accuracy by class", finding(words) + figure(plot + legend, caption))


def embedding_section(context: _Context) -> str:
    """A 2-D map of the embeddings of clean, augmented and adversarial images."""
    config, attacked = context.trained.config, context.attacked
    projected = not is_file(config.method) and build_method(config).embeds and config.model.head != "identity"
    mapped = inspection.map_embeddings(
        context.trained.model, attacked, projected=projected, augmentation=config.data.augment, pad=config.data.pad
    )
    what = "projection head's output, as the contrastive loss sees it" if projected else "backbone's features"
    to_whom = {name: f"its {name} view" for name in mapped.views} | {"other classes": "images of other classes"}
    cosines = ", ".join(f"{value:.2f} to {to_whom[name]}" for name, value in mapped.similarity.items())
    words = finding(f"Mean cosine similarity of a clean image's embedding: {cosines}.")
    if mapped.points is None:
        return section("Embedding map", words + "<p>All embeddings coincide (or are too few): there is nothing to map.</p>")
    counts = torch.bincount(torch.from_numpy(mapped.labels), minlength=len(context.names))
    shown = sorted(counts.argsort(descending=True, stable=True)[:10].tolist())
    shown = [i for i in shown if counts[i] > 0]
    names = {i: context.names[i] for i in shown}
    plot = figures.scatter_map(mapped.points, mapped.labels, mapped.views, names, name="Embedding map")
    legend = '<p class="legend"><span>● clean</span><span>△ augmented</span><span>&times; adversarial</span></p>'
    present = int((counts > 0).sum())
    some = "" if len(shown) == present else f"; only the {len(shown)} most frequent of {present} classes are drawn"
    caption = (
        f"L2-normalised embeddings ({what}) of {len(mapped.labels)} test images in three views: clean, augmented "
        f"({config.data.augment}), and adversarial ({attacked.attack.describe()}), reduced by PCA to at most 50 "
        "dimensions and by t-SNE to two (fixed seed). Colour is the true class, named at its clean images' "
        f"median{some}. How to read it: crosses that stay with the circles of their colour are embeddings that the "
        "attack could not move out of their class. t-SNE keeps neighbourhoods; distances between groups, their "
        "sizes and the axes mean nothing."
    )
    return section("Embedding map", words + figure(plot + legend, caption))


def configuration_section(context: _Context) -> str:
    """The resolved configuration, the environment, and the commands that repeat the run."""
    path = context.run.path
    recipe = path / "config.yaml"
    resolved = recipe.read_text(encoding="utf-8") if recipe.is_file() else settings.dump(context.trained.config)
    shown = {**context.environment, **context.environment.get("packages", {})}
    environment = {key: value for key, value in shown.items() if key not in ("packages", "command") and value is not None}
    repeat = command("fastanchor", "train", recipe, "--out", f"{path}-again")
    original = context.environment.get("command")
    made_by = f"<p>This run was started by</p><pre>{safe(original)}</pre>" if original else ""
    lines = "\n".join(safe(line) for line in resolved.splitlines())
    return section(
        "Configuration",
        f"<p>To repeat it from its resolved configuration:</p><pre>{repeat}</pre>{made_by}"
        f"<details><summary>Resolved configuration (config.yaml)</summary><pre>{lines}</pre></details>"
        f"<details><summary>Environment (env.json)</summary>{table(environment)}</details>",
    )
