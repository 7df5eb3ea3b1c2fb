"""`fastanchor compare`: several runs on the same data, seeds and budget, in one table.

A plan is a YAML file:

    title: what is compared
    attacks: [fgsm, pgd20]        # what each model is judged by; autoattack too
    seeds: [0, 1, 2]              # mean and standard deviation over these
    set: {epochs: 8}              # settings of all runs: the budget
    runs:
      - {name: ANCHOR, recipe: anchor, set: {loss: {hsc: 0.5}}}
      - {name: undefended, recipe: standard}
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import statistics
import time
import traceback
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fastanchor import environment
from fastanchor.config import Config
from fastanchor.errors import UserError, did_you_mean
from fastanchor.evaluate.compare_page import duration, markdown, write_page
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.files import make_folder, slug, write_text
from fastanchor.methods import build_method, is_defended, title_of
from fastanchor.pipeline import train_and_judge
from fastanchor.settings import differing, from_dict, get, keys, load_recipe, parse_flags, prefixed, read_yaml
from fastanchor.train.loop import check_config
from fastanchor.train.progress import Reporter
from fastanchor.train.run import RunDir

PLAN_KEYS = ("title", "attacks", "seeds", "set", "runs")
RUN_KEYS = ("name", "recipe", "set")
# What decides which images a model is judged on and chosen by.
JUDGED = (
    "data.source", "data.root", "data.limit", "data.val_fraction", "data.split_seed", "data.image_size", "data.classes",
    "data.labels", "data.skip_broken", "eval.limit",
)  # fmt: skip
# What a reader must know of where it differs; FAIR_ATTACK where a method trains on an adversary.
FAIR = (
    "data.augment", "data.pad", "data.sampler", "data.extra", "model.name", "model.width", "model.view_bn", "epochs",
    "batch_size", "optim.name", "optim.lr", "optim.schedule", "optim.weight_decay", "optim.ema_decay", "optim.awp_gamma",
    "stage2.mode", "precision",
)  # fmt: skip
FAIR_ATTACK = (
    "attack.eps", "attack.norm", "attack.steps", "attack.step_size", "attack.objective", "attack.bn", "attack.start",
    "attack.start_radius", "attack.project",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan with every run's configuration resolved; seeds and the data source are still the recipe's."""

    title: str
    attacks: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: dict[str, Config]


@dataclasses.dataclass
class _Outcome:
    """One run of a plan that has ended: results and metrics, or `error`, the sentence that says why there are none."""

    seed: int
    run: RunDir
    results: list[dict] = dataclasses.field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0  # what the run takes as a whole, for the estimate of the time left


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
        title = entry["name"]
        if not isinstance(title, str):
            raise UserError(f"{where}: name = {title}: must be a text")
        if slug(title) in map(slug, runs):
            raise UserError(f"{where}: two runs are named {title!r}, or nearly so: their folders would be one")
        with prefixed(f"{where}: {title}"):
            recipe = load_recipe(entry["recipe"])
        own = entry.get("set", {})
        if isinstance(own, dict) and "seed" in own:
            raise UserError(f"{where}: {title}: seed = {own['seed']}: the plan states it for all runs; change 'seeds' there")
        runs[title] = from_dict(own, f"{where}: {title}", from_dict(values.get("set", {}), where, recipe))
    attacks, seeds = values.get("attacks", ["pgd20"]), values.get("seeds", [0])
    if not isinstance(attacks, list) or not attacks:
        raise UserError(f"{where}: attacks = {attacks}: must be a list of attacks")
    for attack in attacks:
        parse_attack(str(attack), default_eps=next(iter(runs.values())).attack.eps)
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{where}: seeds = {seeds}: must be a list of whole numbers >= 0")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds = {seeds}: one of them stands there twice")
    if not isinstance(values.get("title", name), str):
        raise UserError(f"{where}: title = {values['title']}: must be a text")
    return Plan(values.get("title", name), tuple(map(str, attacks)), tuple(seeds), runs)


def run_plan(plan: Plan, out: Path, reporter: Reporter, overrides: list[str]) -> dict[str, Any]:
    """Run what is missing of a plan under `out`; returns what out/compare.json holds.

    overrides: flags for every run, applied last. A run that was interrupted is resumed, a finished one is read. One that fails
    is in the table with its sentence, and the others go on. compare.json and compare.md are written after every run,
    compare.html and the figures at the end. Raises UserError where the runs would not be judged alike, and where the first of
    them cannot begin: that is the plan's fault.
    """
    for flag, key in (("--seed", "seeds"), ("--eval.attacks", "attacks")):
        if any(arg.partition("=")[0] == flag for arg in overrides):
            raise UserError(f"{flag}: the plan states it for all runs; change {key!r} there")
    configs = _judged_alike({name: parse_flags(overrides, base) for name, base in plan.runs.items()}, plan.attacks)
    pending = [(name, _checked(name, configs[name], seed, out)) for seed in plan.seeds for name in configs]
    make_folder(out)
    outcomes: dict[str, list[_Outcome]] = {name: [] for name in configs}
    for number, (name, (config, run)) in enumerate(pending):
        reporter.log = run.path / "train.log"
        left = _time_left(outcomes, [later for later, _ in pending[number:]])
        reporter.say(f"\n== run {number + 1} of {len(pending)}{left}: {name}, seed {config.seed} -> {run.path}")
        outcomes[name].append(_one(config, run, reporter, first=number == 0))
        summary = _summary(plan, configs, outcomes)
        write_text(out / "compare.json", json.dumps(summary, indent=2) + "\n")
        write_text(out / "compare.md", markdown(summary))
    reporter.log = None
    links = {str(run.path): f"{run.path.name}/report.html" for _, (_, run) in pending if (run.path / "report.html").is_file()}
    try:
        write_page(summary, out, links)
    except UserError as error:  # the table stands without it, matplotlib may be missing
        reporter.say(f"no page: {error}")
    return summary


def _checked(name: str, base: Config, seed: int, out: Path) -> tuple[Config, RunDir]:
    """A run of the plan, its folder seen to be free or its own. Raises UserError, before anything has run."""
    path = out / f"{slug(name)}-seed{seed}"
    config, run = dataclasses.replace(base, seed=seed), RunDir(path)
    with prefixed(name):
        check_config(config)
    if not (path / "config.yaml").exists() or run.is_blank():
        run.check_free()
        return config, run
    begun, wanted = run.open(), run.settled(config)
    # What a run is judged by may change: that is done anew, the training is not.
    other = [key for key in differing(begun, wanted) if not key.startswith("eval.")]
    if other:
        values = [_shown(get(of, other[0])) if other[0] in keys(type(of)) else "not there" for of in (begun, wanted)]
        raise UserError(
            f"{path}: holds a run of other settings, {other[0]} = {values[0]} and not {values[1]}; delete that folder "
            "to train it anew, or choose another --out"
        )
    return config, run


def _one(config: Config, run: RunDir, reporter: Reporter, first: bool) -> _Outcome:
    """Train and judge, or read, one run. Raises UserError where the first one cannot even begin."""
    outcome, started = _Outcome(config.seed, run), time.perf_counter()
    resume = (run.path / "config.yaml").exists() and not run.is_blank()
    _forget_peak_memory()
    try:
        outcome.results = train_and_judge(config, run, resume=resume, reporter=reporter)
    except UserError as error:
        if first and not (run.path / "config.yaml").exists():
            raise
        outcome.error = " ".join(str(error).split())
    except Exception as error:  # a fault of one method, or no memory for it: the others are not lost
        reporter.say(traceback.format_exc().rstrip())
        outcome.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if outcome.error is not None:
        reporter.say(f"failed: {outcome.error}")
        gc.collect()
        torch.cuda.empty_cache()  # nothing where CUDA is not in use
    logged = sum(row["seconds"] + row.get("val_seconds", 0.0) for row in run.history())
    logged += sum(result["seconds"] for result in outcome.results)
    outcome.seconds = max(time.perf_counter() - started, logged)
    return outcome


def _forget_peak_memory() -> None:
    """Where Linux lets a process do so: else on a CPU the peak of one run would be in the figure of all that follow."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _time_left(outcomes: dict[str, list[_Outcome]], pending: list[str]) -> str:
    """` (about 12 min left)` for the runs of these names, from those that have ended: of the same name where there are any."""
    done = {name: [o.seconds for o in ended if o.error is None] for name, ended in outcomes.items()}
    every = [seconds for ended in done.values() for seconds in ended]
    if not every:
        return ""
    left = sum(statistics.fmean(done[name] or every) for name in pending)
    return f" (about {duration(left)} left)"


def _judged_alike(configs: dict[str, Config], attacks: tuple[str, ...]) -> dict[str, Config]:
    """Every run judged by the same attacks, stated in full at the first run's eps, on the same images. Raises UserError."""
    first_name, first = next(iter(configs.items()))
    specs = [parse_attack(text, default_eps=first.attack.eps) for text in attacks]
    if len({spec.describe() for spec in specs}) < len(specs):
        raise UserError(f"attacks = {', '.join(attacks)}: two of them read alike in the table")
    stated = tuple(spec.text() for spec in specs)
    judged = {}
    for name, config in configs.items():
        for key in JUDGED:
            if get(config, key) != get(first, key):
                raise UserError(
                    f"{name}: {key} = {get(config, key)}, {first_name}'s is {get(first, key)}; the runs of a plan share their "
                    "images"
                )
        judged[name] = dataclasses.replace(config, eval=dataclasses.replace(config.eval, attacks=stated))
    return judged


def _differences(configs: dict[str, Config]) -> Iterator[str]:
    """A sentence for each setting that is not the same in all runs and bears on whether they can be compared."""
    attacked = {name: config for name, config in configs.items() if is_defended(config)}
    weak = {name: config for name, config in configs.items() if "weak" in build_method(config).drawn}
    for looked_at, runs in ((FAIR, configs), (("data.weak",), weak), (FAIR_ATTACK, attacked)):
        for key in looked_at:
            found: dict[Any, list[str]] = {}
            for name, config in runs.items():
                found.setdefault(get(config, key), []).append(name)
            if len(found) > 1:
                most = max(found, key=lambda value: len(found[value]))
                few = [f"{_shown(value)} in {', '.join(names)}" for value, names in found.items() if value != most]
                yield f"{key} differs: {_shown(most)}, but {'; '.join(few)}."
    if attacked and (clean := [name for name in configs if name not in attacked]):
        yield f"Trained without an adversary: {', '.join(clean)}."


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _summary(plan: Plan, configs: dict[str, Config], outcomes: dict[str, list[_Outcome]]) -> dict[str, Any]:
    """What compare.json holds. Percentages, seconds, and 10^6 bytes; a run that has not ended is not in it."""
    first = next(iter(configs.values()))
    device = environment.pick_device(first.device)
    rows = [_row(name, configs[name], ended) for name, ended in outcomes.items() if ended]
    described = environment.describe(device)
    return {
        "title": plan.title,
        "seeds": list(plan.seeds),
        "rows": rows,
        "attacks": [parse_attack(text, default_eps=first.attack.eps).describe() for text in first.eval.attacks],
        "data": first.data.source,
        "notes": list(_differences(configs)),
        "memory": " on the device" if device.type == "cuda" else ", as the process's resident memory",
        "runs": len(configs) * len(plan.seeds),
        "finished": sum(len(row["seeds"]) for row in rows),
        "device": described["device"],
        "environment": described,
    }


def _row(name: str, config: Config, ended: list[_Outcome]) -> dict[str, Any]:
    """One run over its seeds; figures are of those that finished, in the order of `seeds`, and null where none did."""
    good = [outcome for outcome in ended if outcome.error is None]
    histories = [outcome.run.history() for outcome in good]
    first = [[row for row in history if row["stage"] == 1] for history in histories]
    peaks = [max((row["peak_memory_mb"] for row in history if "peak_memory_mb" in row), default=None) for history in histories]
    results = [outcome.results for outcome in good]
    return {
        "name": name,
        "method": config.method,
        "title": title_of(config),
        "clean": _spread([found[0]["clean_accuracy"] for found in results]),
        "robust": {
            found[0]["description"]: _spread([result["robust_accuracy"] for result in found])
            for found in zip(*results, strict=True)
        },
        "count": results[0][0]["count"] if results else None,
        "epochs": config.epochs,
        "seconds_an_epoch": _spread([statistics.median(row["seconds"] for row in history) for history in first]),
        "training_seconds": _spread([sum(row["seconds"] for row in history) for history in histories]),
        "peak_memory_mb": None if None in peaks else _spread(peaks),
        "runs": [str(outcome.run.path) for outcome in good],
        "seeds": [outcome.seed for outcome in good],
        "failed": [{"seed": o.seed, "run": str(o.run.path), "error": o.error} for o in ended if o.error is not None],
    }


def _spread(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
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
