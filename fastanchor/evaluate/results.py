"""A list of attacks run on a test set: one JSON file an attack, and the rows of the table for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from fastanchor import environment
from fastanchor.data.resident import ResidentSplit
from fastanchor.errors import UserError
from fastanchor.evaluate.accuracy import measure
from fastanchor.evaluate.autoattack import autoattack
from fastanchor.evaluate.protocol import AttackSpec
from fastanchor.files import write_text


def evaluate(
    model: nn.Module,
    data: ResidentSplit,
    attacks: Sequence[AttackSpec],
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    about: dict,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Judge `model` clean and under each attack; write OUT/<attack>.json as each ends; return their contents.

    about: what the figures belong to (checkpoint, data source), stored with them. AutoAttack keeps its state in OUT too, and an
    interrupted evaluation goes on from it. Accuracies are percentages of all `count` images.
    """
    out.mkdir(parents=True, exist_ok=True)
    clean = measure(model, data, batch_size=batch_size, num_classes=num_classes)
    results = []
    for attack in attacks:
        say(f"{attack.describe()} on {len(data)} images")
        path = out / f"{attack.key()}.json"
        if attack.name == "autoattack":
            state = path.with_suffix(".state.json")
            robust, more = autoattack(
                model, data, attack, num_classes=num_classes, batch_size=batch_size, seed=seed, state_path=state, progress=say
            )
        else:
            robust, more = measure(model, data, attack, batch_size=batch_size, seed=seed, num_classes=num_classes), {}
        result = {
            "attack": dataclasses.asdict(attack),
            "description": attack.describe(),
            "clean_accuracy": clean.accuracy,
            "robust_accuracy": robust.accuracy,
            "clean_per_class": clean.per_class,
            "robust_per_class": robust.per_class,
            "count": robust.count,
            "seed": seed,
            "batch_size": batch_size,
            "seconds": robust.seconds,
            **more,
            **about,
            "environment": environment.describe(data.device),
        }
        write_text(path, json.dumps(result, indent=2) + "\n")
        results.append(result)
    return results


def load_results(folder: Path) -> list[dict]:
    """The results under a run's eval folder, by file name; AutoAttack's state files are not results. Raises UserError."""
    paths = sorted(path for path in folder.glob("*.json") if not path.name.endswith(".state.json"))
    return [load_result(path) for path in paths]


def load_result(path: Path) -> dict:
    """One result. Raises UserError for a damaged file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        result = None
    if isinstance(result, dict):
        return result
    raise UserError(f"{path}: not the JSON of an evaluation; remove it and evaluate again")
