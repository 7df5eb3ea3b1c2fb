"""`fastanchor compare`: several runs on the same data, seeds and budget, in one table.

A plan is a YAML file:

    title: what is compared
    attacks: [pgd20]              # what each model is judged by
    seeds: [0, 1, 2]              # mean and standard deviation over these
    set: {epochs: 8}              # settings of all runs
    runs:
      - {name: ANCHOR, recipe: anchor, set: {loss: {hsc: 0.5}}}
      - {name: undefended, recipe: standard}
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from importlib import resources
from pathlib import Path

from fastanchor.config import Config
from fastanchor.errors import UserError, did_you_mean
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.files import slug, write_text
from fastanchor.pipeline import train_and_judge
from fastanchor.settings import from_dict, load_recipe, parse_flags, read_yaml
from fastanchor.train.progress import Reporter
from fastanchor.train.run import RunDir

PLAN_KEYS = ("title", "attacks", "seeds", "set", "runs")
RUN_KEYS = ("name", "recipe", "set")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan with every run's configuration resolved; seeds and the data source are still the recipe's."""

    title: str
    attacks: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: dict[str, Config]


def plan_names() -> list[str]:
    """Names of the plans that come with the package."""
    folder = resources.files("fastanchor") / "recipes" / "plans"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())


def load_plan(name: str) -> Plan:
    """A packaged plan by name, or a YAML file by path. Raises UserError."""
    if name in plan_names():
        with resources.as_file(resources.files("fastanchor") / "recipes" / "plans" / f"{name}.yaml") as path:
            values, where = read_yaml(path), name
    elif Path(name).is_file():
        values, where = read_yaml(name), name
    else:
        hint = did_you_mean(name, plan_names())
        raise UserError(f"plan {name!r} is not known{hint}; plans: {', '.join(plan_names())}, or a .yaml file")
    _check_keys(values, PLAN_KEYS, ("runs",), where)
    if not isinstance(values["runs"], list):
        raise UserError(f"{where}: runs = {values['runs']}: must be a list of runs")
    runs: dict[str, Config] = {}
    for entry in values["runs"]:
        _check_keys(entry, RUN_KEYS, RUN_KEYS[:2], f"{where}: runs")
        title = str(entry["name"])
        if slug(title) in map(slug, runs):
            raise UserError(f"{where}: two runs are named {title!r}, or nearly so: their folders would be one")
        base = from_dict(values.get("set", {}), where, load_recipe(entry["recipe"]))
        runs[title] = from_dict(entry.get("set", {}), f"{where}: {title}", base)
    attacks, seeds = values.get("attacks", ["pgd20"]), values.get("seeds", [0])
    if not isinstance(attacks, list) or not attacks:
        raise UserError(f"{where}: attacks = {attacks}: must be a list of attacks")
    for attack in attacks:
        parse_attack(str(attack), default_eps=next(iter(runs.values())).attack.eps)
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{where}: seeds = {seeds}: must be a list of whole numbers >= 0")
    return Plan(str(values.get("title", name)), tuple(map(str, attacks)), tuple(seeds), runs)


def run_plan(plan: Plan, out: Path, reporter: Reporter, overrides: list[str]) -> list[dict]:
    """Run what is missing of a plan under `out`, then write out/compare.json; returns its rows.

    overrides: flags for every run, applied last. A run that was interrupted is resumed, a finished one is read. Raises UserError
    where the runs would not be judged alike.
    """
    for flag, key in (("--seed", "seeds"), ("--eval.attacks", "attacks")):
        if any(arg.partition("=")[0] == flag for arg in overrides):
            raise UserError(f"{flag}: the plan states it for all runs; change {key!r} there")
    configs = _judged_alike({name: parse_flags(overrides, base) for name, base in plan.runs.items()}, plan.attacks)
    results: dict[str, list[tuple[list[dict], RunDir]]] = {name: [] for name in configs}
    for seed in plan.seeds:
        for name, base in configs.items():
            config = dataclasses.replace(base, seed=seed)
            run = RunDir(out / f"{slug(name)}-seed{seed}")
            resume = (run.path / "config.yaml").exists()
            if resume and run.open() != run.settled(config):
                raise UserError(f"{run.path}: holds a run of other settings; choose another --out")
            reporter.log = run.path / "train.log"
            reporter.say(f"\n== {name}, seed {seed} -> {run.path}")
            results[name].append((train_and_judge(config, run, resume=resume, reporter=reporter), run))
    rows = [_row(name, configs[name], outcome) for name, outcome in results.items()]
    write_text(out / "compare.json", json.dumps({"title": plan.title, "seeds": list(plan.seeds), "rows": rows}, indent=2) + "\n")
    return rows


def _judged_alike(configs: dict[str, Config], attacks: tuple[str, ...]) -> dict[str, Config]:
    """Every run judged by the same attacks, stated in full at the first run's eps, on the same images. Raises UserError."""
    first_name, first = next(iter(configs.items()))
    specs = [parse_attack(text, default_eps=first.attack.eps) for text in attacks]
    if len({spec.describe() for spec in specs}) < len(specs):
        raise UserError(f"attacks = {', '.join(attacks)}: two of them read alike in the table")
    stated = tuple(spec.text() for spec in specs)
    judged = {}
    for name, config in configs.items():
        if (config.data, config.eval.limit) != (first.data, first.eval.limit):
            raise UserError(f"{name}: its data or eval.limit differ from {first_name}'s; the runs of a plan share one test set")
        judged[name] = dataclasses.replace(config, eval=dataclasses.replace(config.eval, attacks=stated))
    return judged


def _row(name: str, config: Config, outcome: list[tuple[list[dict], RunDir]]) -> dict:
    histories = [[r for r in run.history() if r["stage"] == 1] for _, run in outcome]
    return {
        "name": name,
        "clean": _spread([results[0]["clean_accuracy"] for results, _ in outcome]),
        "robust": {
            results[0]["description"]: _spread([r["robust_accuracy"] for r in results])
            for results in zip(*(results for results, _ in outcome), strict=True)
        },
        "count": outcome[0][0][0]["count"],
        "epochs": config.epochs,
        "seconds_an_epoch": _spread([statistics.median(r["seconds"] for r in history) for history in histories]),
        "runs": [str(run.path) for _, run in outcome],
    }


def _spread(values: list[float]) -> dict:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None, "values": values}


def _check_keys(values, allowed: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a mapping with the keys {', '.join(allowed)}")
    for key in values:
        if key not in allowed:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, allowed)}; allowed: {', '.join(allowed)}")
    for key in needed:
        if not values.get(key):
            raise UserError(f"{where}: lacks {key!r}")
