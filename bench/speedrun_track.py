"""A track of the speedrun: a task and one entry to it; the repository's by name (TRACKS), one's own by the path of its file.

The task is what every entry shares: data, target, number of seeds, level of the test, device. The entry is a recipe of fastanchor
with settings on top.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastanchor import settings
from fastanchor.config import Config, DataConfig
from fastanchor.errors import UserError, did_you_mean
from fastanchor.evaluate.protocol import AttackSpec, parse_attack
from fastanchor.methods import Method, method_class
from fastanchor.train.checks import check_config

FOLDER = Path(__file__).parent / "speedruns"
# The repository's, FOLDER/NAME.yaml. By name, not by what lies there: the code's commit says nothing of a file that git does not
# know, so such a one would be listed, and make a record, wherever it happens to lie.
TRACKS = ("cifar10-aa50", "cifar10-pgd20", "digits")
REQUIRED = ("name", "task", "data", "target", "seeds", "alpha", "device", "recipe")
KEYS = (*REQUIRED, "device_name", "set", "record")
DEVICES = ("cpu", "cuda")
# Settings of the images that are an entry's own: how they are augmented, how many of the training images it leaves aside.
ENTRY_DATA = ("augment", "pad", "val_fraction", "download")
# Settings that an entry has no say in, by the beginning of their key, and why.
FIXED = {
    "seed": "the seeds are those of --seeds",
    "device": "it is given by --device",
    "data.root": "it is given by --data-root",
    "data.": "the images belong to the task",
    "val.": "a speedrun validates nothing",
    "eval.": "what is judged belongs to the task",
    "tensorboard": "a speedrun writes no events",
}


@dataclass(frozen=True)
class Track:
    """The fields of the file `path`; `attack` and `accuracy` (percent) are its target, `given` is all of it as it was read."""

    path: Path
    name: str
    task: str
    data: dict[str, Any]
    attack: AttackSpec
    accuracy: float
    seeds: int
    alpha: float
    device: str
    device_name: str | None
    recipe: str
    set: dict[str, Any]
    record: str | None
    given: dict[str, Any]


def load(name: str) -> Track:
    """A track of the repository by its name, any other by the path of its file. Raises UserError."""
    if name in TRACKS:
        return read(FOLDER / f"{name}.yaml")
    if name.endswith((".yaml", ".yml")):
        return read(Path(name))
    raise UserError(
        f"track {name!r} is not known{did_you_mean(name, TRACKS)}; tracks: {', '.join(TRACKS)}, or the path of a .yaml file"
    )


def read(path: Path) -> Track:
    """The track of a file, every field checked but the entry's settings. Raises UserError."""
    found = settings.read_yaml(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: a track is a mapping of {', '.join(REQUIRED)}, found {type(found).__name__}")
    for key in found:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key}{did_you_mean(str(key), KEYS)}; a track has {', '.join(KEYS)}")
    if missing := [key for key in REQUIRED if found.get(key) is None]:
        raise UserError(f"{path}: {missing[0]} is missing; a track needs {', '.join(REQUIRED)}")
    for key in ("name", "task", "recipe", "device_name", "record"):
        if not isinstance(found.get(key, ""), str) and found[key] is not None:
            raise UserError(f"{path}: {key} = {found[key]}: must be a text")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", found["name"]):
        raise UserError(f"{path}: name = {found['name']}: must be of letters, digits and -_. for it names a folder")
    for key in ("data", "target", "set"):
        if found.get(key) is not None and not isinstance(found[key], dict):
            raise UserError(f"{path}: {key} = {found[key]}: must be a mapping of settings")
    if not isinstance(found["data"].get("source"), str):
        raise UserError(f"{path}: data.source is missing: it names the images, as in data: {{source: digits}}")
    for key in found["data"]:
        if key in (*ENTRY_DATA, "root"):
            raise UserError(f"{path}: data.{key}: is no part of the task" + ("; write it under set" if key != "root" else ""))
    if found["device"] not in DEVICES:
        raise UserError(f"{path}: device = {found['device']}: must be one of {', '.join(DEVICES)}")
    seeds = found["seeds"]
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 2:
        raise UserError(f"{path}: seeds = {seeds}: must be a whole number >= 2, or there is no test of the claim")
    attack, accuracy = _target(found["target"], path)
    return Track(
        path=path, name=found["name"], task=found["task"], data=found["data"], attack=attack, accuracy=accuracy, seeds=seeds,
        alpha=_number(found, "alpha", path, 0, 1), device=found["device"], device_name=found.get("device_name"),
        recipe=found["recipe"], set=found.get("set") or {}, record=found.get("record"), given=found,
    )  # fmt: skip


def outside(track: Track) -> list[str]:
    """Which of an entry's files are no part of the repository, so that its commit does not say what they hold."""
    found = []
    file = track.path.resolve()
    if file not in [FOLDER.resolve() / f"{name}.yaml" for name in TRACKS]:
        found.append(f"its track {track.path} is none of the repository's")
    known = settings.recipe_names()
    named = track.recipe in known or f"{track.recipe}_resnet18_cifar10" in known
    if not named and not Path(track.recipe).resolve().is_relative_to(Path(settings.__file__).parent.resolve()):
        found.append(f"its recipe {track.recipe} is none of fastanchor's")
    return found


def _target(target: dict[str, Any], path: Path) -> tuple[AttackSpec, float]:
    for key in target:
        if key not in ("attack", "accuracy"):
            raise UserError(f"{path}: unknown key target.{key}; a target has attack and accuracy")
    text = target.get("attack")
    if not isinstance(text, str):
        raise UserError(f"{path}: target.attack = {text}: must be a text such as pgd20:eps=8/255")
    try:
        spec = parse_attack(text, default_eps=-1.0)  # which nobody can write: a target's radius is not the entry's choice
    except UserError as error:
        raise UserError(f"{path}: target.attack: {error}") from None
    if spec.eps < 0:
        raise UserError(f"{path}: target.attack = {text}: must state its radius, as in {text}:eps=8/255")
    return spec, _number(target, "accuracy", path, 0, 100, "target.")


def _number(found: dict[str, Any], key: str, path: Path, low: float, high: float, prefix: str = "") -> float:
    """A number strictly between two bounds."""
    value = found.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low < value < high:
        raise UserError(f"{path}: {prefix}{key} = {value}: must be a number between {low} and {high}, both excluded")
    return float(value)


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`--set key=value` as dotted settings; the values are read as YAML's. Raises UserError."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: must be key=value, as in --set epochs=3")
        try:
            found[key.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {pair}: its value is not one of YAML's") from None
    return found


def resolve(track: Track, overrides: dict[str, Any], *, device: str, root: str | None = None) -> Config:
    """The entry's whole configuration: recipe, the track's `set`, `overrides`, and what the task decides. Raises UserError."""
    config = settings.load_recipe(track.recipe)
    for values, where in ((track.set, f"track {track.name}: set"), (overrides, "--set")):
        for key in _dotted(values):
            _refuse_fixed(key, where)
        config = settings.from_dict(values, where, config)
    own = {key: getattr(config.data, key) for key in ENTRY_DATA}
    config = dataclasses.replace(config, data=DataConfig(**own))  # what else a recipe says of the images is not the task's
    task = {**{f"data.{key}": value for key, value in track.data.items()}, "device": device}
    task |= {} if root is None else {"data.root": root}
    config = settings.from_dict(task, f"track {track.name}: data", config)
    if config.stage2.mode != "none":
        raise UserError(f"track {track.name}: stage2.mode = {config.stage2.mode}: a speedrun has one stage; set it to none")
    method = method_class(config.method)
    if method.bn_sets or (method.build, method.prepare, method.start_epoch) != (Method.build, Method.prepare, Method.start_epoch):
        raise UserError(f"track {track.name}: method = {config.method}: the clock knows methods that train the network alone")
    check_config(config)
    return config


def _dotted(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key of nested settings in its dotted form."""
    found = []
    for key, value in values.items():
        found += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def _refuse_fixed(key: str, where: str) -> None:
    if key in (*(f"data.{name}" for name in ENTRY_DATA), "eval.batch_size"):
        return
    for start, why in FIXED.items():
        if key == start or (start.endswith(".") and key.startswith(start)):
            raise UserError(f"{where}: {key}: cannot be set here: {why}")
