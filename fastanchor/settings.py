"""Reading and writing configurations: recipes (YAML), dotted flags, and the one parser behind both.

A key is spelt, typed and checked the same in a recipe and on the command line, and every error is one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import types
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from fastanchor.config import RANGES, Allowed, Config, LossConfig
from fastanchor.errors import UserError, did_you_mean
from fastanchor.methods import is_file, method_class
from fastanchor.methods.base import NoSettings
from fastanchor.precision import NO_FP16


def keys(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the configuration with its type, in order of declaration."""
    found = {}
    hints = get_type_hints(cls, include_extras=True)
    for name, hint in ((entry.name, hints[entry.name]) for entry in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(hint):
            found |= keys(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


@functools.cache
def config_class(settings: type) -> type[Config]:
    """The configuration of a method whose `loss` are these settings."""
    if settings is LossConfig:
        return Config
    loss = ("loss", settings, dataclasses.field(default_factory=settings))
    return dataclasses.make_dataclass(f"Config_{settings.__name__}", [loss], bases=(Config,), frozen=True)


def with_method(config: Config, name: str, *, judged: bool = False) -> Config:
    """The configuration with another method, whose own settings have their defaults. Raises UserError.

    judged: a trained model is to be judged only: a method in a file is not loaded, and its settings are left out.
    """
    settings = NoSettings if judged and is_file(name) else method_class(name).Settings
    cls = config_class(settings)
    values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    return cls(**values | {"method": name, "loss": settings()})


def ranges(config: Config) -> dict[str, Allowed]:
    """Allowed values by dotted key, those of the method's own settings too."""
    return RANGES | {f"loss.{name}": allowed for name, allowed in getattr(config.loss, "RANGES", {}).items()}


def get(config: Config, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def differing(one: Config, other: Config) -> Iterator[str]:
    """The dotted keys in which two configurations differ, those that only one of them has included."""
    sides = [{key: get(config, key) for key in keys(type(config))} for config in (one, other)]
    yield from (
        key for key in dict.fromkeys((*sides[0], *sides[1])) if key not in sides[0] or sides[0].get(key) != sides[1].get(key)
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain Python values (lists for tuples), as YAML and checkpoints hold them."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load_file` reads it back to an equal Config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def from_dict(values: dict[str, Any], where: str, base: Config | None = None, *, judged: bool = False) -> Config:
    """A Config from nested plain values; `where` (a file's name, say) opens every error message. judged: as in `with_method`."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: a recipe is a mapping of settings, found {type(values).__name__}")
    base = base or Config()
    if isinstance(values.get("method"), str):
        name = values["method"]
        with prefixed(where):
            base = base if name == base.method else with_method(base, name, judged=judged)
        left_out = ("method", "loss") if judged and is_file(name) else ("method",)
        values = {key: value for key, value in values.items() if key not in left_out}
    return parse_flags(_flatten(values, where, keys(type(base))), base, where=where)


@contextlib.contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Begin the sentences of bad input with where it stands."""
    try:
        yield
    except UserError as error:
        raise (UserError(f"{where}: {error}") if where else error) from error


def read_yaml(path: str | Path) -> Any:
    """The plain values of a YAML file. Raises UserError with one sentence."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML{line}: {problem}") from None
    except ValueError as error:  # a value that looks like a date, say, and is none
        raise UserError(f"{path}: not valid YAML: {error}") from None


def load_file(path: str | Path, *, judged: bool = False) -> Config:
    """Read a recipe or a run's config.yaml; judged: as in `with_method`. Raises UserError."""
    return from_dict(read_yaml(path), str(path), judged=judged)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("fastanchor") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str) -> Config:
    """A packaged recipe by name, by its first part alone (`anchor`: the CIFAR-10 recipe), or a YAML file by path."""
    name, names = str(name), recipe_names()
    full = f"{name}_resnet18_cifar10"
    if name in names or full in names:
        with resources.as_file(resources.files("fastanchor") / "recipes" / f"{name if name in names else full}.yaml") as path:
            return load_file(path)
    if name.endswith((".yaml", ".yml")) or Path(name).exists():
        return load_file(name)
    short = [n.removesuffix("_resnet18_cifar10") for n in names]
    hint = did_you_mean(name, names + short)
    raise UserError(f"recipe {name!r} is not known{hint}; recipes: {', '.join(names)}, or the path of a .yaml file")


def parse_flags(args: list[str], base: Config, *, where: str = "") -> Config:
    """`base` with dotted flags (`--attack.eps 8/255`) on top. Raises UserError; SystemExit(0) after printing help."""
    prefix = f"{where}: " if where else ""
    given: dict[str, list[str]] = {}
    for arg in args:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            given.pop(key, None)  # a repeated flag: the last one counts, and what follows belongs to it
            given[key] = [value] if equals else []
        elif given:
            given[next(reversed(given))].append(arg)
        else:
            raise UserError(f"{prefix}{arg!r} is not a flag; settings are written --key value")
    if len(given.get("method", [])) == 1 and given["method"][0] != base.method:
        with prefixed(where):
            base = with_method(base, given["method"][0])
    known = keys(type(base))
    for key, values in given.items():
        negated = _without_no(key)
        hint = known.get(key, bool if known.get(negated) is bool else None)
        # Help is asked for by flag alone: in a recipe it would end the program as if all were well.
        if hint is None and (key != "help" or where):
            own = [name for name in known if name.startswith("loss.")] if key.startswith("loss.") else []
            hint = f"; the method {base.method} has {', '.join(own)}" if own else did_you_mean(key, known)
            raise UserError(f"{prefix}unknown setting {' = '.join([key, *values[:1]])}{hint}")
        if hint is bool and values:
            raise UserError(
                f"{prefix}{key} = {' '.join(values)}: takes no value; write --{key.replace('_', '-')} or its no- form"
            )
        if len(values) > 1 and get_origin(hint) is not tuple:
            raise UserError(f"{prefix}{key} = {' '.join(values)}: takes one value")
    errors, output = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            config = tyro.cli(type(base), args=args, default=base, prog="fastanchor train RECIPE")
    except SystemExit as stop:
        if not stop.code:
            print(output.getvalue(), end="")
            raise
        raise UserError(prefix + _explain(errors.getvalue(), given, known)) from None
    _check_ranges(config, prefix)
    return config


def _check_ranges(config: Config, prefix: str) -> None:
    allowed = ranges(config)
    for key in keys(type(config)):
        value = get(config, key)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{prefix}{key} = {number}: must be a finite number")
        if value is not None and key in allowed and not allowed[key][0](value):
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UserError(f"{prefix}{key} = {shown}: must be {allowed[key][1]}")


def _explain(text: str, given: dict[str, list[str]], known: dict[str, Any]) -> str:
    """One sentence for a value that the parser refused: the parser's own text is a box of many lines."""
    blamed = [key for key in given if f"--{key.replace('_', '-')}" in text]
    if not blamed:
        return " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in text.splitlines()).split())
    key = max(blamed, key=len)
    found = f"{key} = {' '.join(given[key])}" if given[key] else key
    why = f"; {NO_FP16}" if key == "precision" and given[key] == ["fp16"] else ""
    return f"{found}: must be {_describe(known[key])}{why}"


def _describe(hint: Any) -> str:
    """What a type admits, in words."""
    origin = get_origin(hint)
    if origin is Annotated:
        return "a number, such as 0.1 or 8/255"
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin in (Union, types.UnionType):
        return " or ".join("None" if a is type(None) else _describe(a) for a in get_args(hint))
    if origin is tuple:
        return f"a list, each {_describe(get_args(hint)[0])}"
    return {int: "a whole number", bool: "true or false", str: "a text"}[hint]


def _without_no(key: str) -> str:
    head, _, tail = key.rpartition(".")
    return ".".join(filter(None, (head, tail.removeprefix("no_"))))


def _flatten(values: dict[str, Any], where: str, known: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as the flags that would set them."""
    flags: list[str] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, dict):
            if key in known or not any(k.startswith(f"{key}.") for k in known):
                raise UserError(
                    f"{where}: {key} is not a group of settings{did_you_mean(key, {k.split('.')[0] for k in known if '.' in k})}"
                )
            flags += _flatten(value, where, known, f"{key}.")
        elif known.get(key) is bool:
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} = {value}: must be true or false")
            head, _, tail = flag[2:].rpartition(".")
            flags.append(flag if value else "--" + (f"{head}." if head else "") + f"no-{tail}")
        elif isinstance(value, bool) and "on" in get_args(known.get(key)):
            flags.append(f"{flag}={'on' if value else 'off'}")  # what YAML makes of on and off
        elif isinstance(value, (list, tuple)):
            flags += [flag, *map(str, value)]
        else:
            flags.append(f"{flag}={value}")  # as one word, so that a value may begin with a dash
    return flags
