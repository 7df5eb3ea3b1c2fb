"""A record's README.md, written from its files alone: device, commit, versions, commands, tables of results, figures.

Absolute paths and host names are the measuring machine's affair and are left out (`public`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench import method_cases
from bench.compare import IDENTITY, METHODS
from bench.plot_read import AHEAD_OF_TIME, Row, Run
from fastanchor.ceilings import PASSED, WHY_PASSED, share_text

# A path from the root of two parts or more: only its last part says something elsewhere. Behind a letter it is part of a relative
# path, but a person's folder is one behind anything, as in -I/home/jo/x. Addresses stay whole.
ABSOLUTE = re.compile(r"https?://[^\s'\",;)\]]+|(?P<path>(?:(?<![\w./])|(?=/(?:home|Users)/))(?:/[^\s/'\":,;)\]]+){2,}/?)")
HOME = re.compile(r"/(?:home|Users)/[^/]+/?")  # its last part is a person
# Titles of the parts, as far as they are known.
PARTS = {
    "attack": "The attack alone", "steps": "The whole training step", "data": "Input pipelines", "evaluation": "Evaluation",
    "supcon_speed": "The contrastive loss with its gradient", "small": "Small kernels", "convs": "Convolutions",
    "refresh": "Refresh of the folded weights", "kernels": "Kernels and launches", "peers": "Public code beside ours",
    "methods": "What each method costs: its step over PGD-AT's",
    "correctness": "Correctness of the fast paths", "supcon": "Correctness of the contrastive kernels", "training": "Training",
    "sanitizer": "compute-sanitizer", "seeds": "Seeds", "summary": "What the seeds show",
}  # fmt: skip
# Rows of these are many: the table has those that are wrong, a sentence counts the rest.
JUDGED = ("correctness", "supcon")


def public(value: Any, hosts: Sequence[str] = ()) -> Any:
    """A text, or every text of a JSON value but its keys: absolute paths cut to their last part, names of hosts replaced."""
    if isinstance(value, list):
        return [public(item, hosts) for item in value]
    if isinstance(value, dict):
        return {key: public(item, hosts) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    text = ABSOLUTE.sub(_shortened, value)
    for host in hosts:
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "HOST", text)
    return text


def _shortened(found: re.Match[str]) -> str:
    if found["path"] is None:
        return found[0]
    return "~" if HOME.fullmatch(found["path"]) else found["path"].rstrip("/").rpartition("/")[2]


def readme(
    title: str, runs: Sequence[Run], figures: dict[str, list[tuple[str, str]]], missing: Sequence[str], logs: Sequence[str],
    note: str, changed: Sequence[str],
) -> str:  # fmt: skip
    """The whole text; runs and note are `public` already.

    figures: (title, file) by the name of the file they are of; missing: what could not be drawn, in sentences; changed: what was
    altered in the copies, in sentences.
    """
    lines = [f"# {title}", "", _device(runs), ""]
    if note:
        lines += [note, ""]
    lines += ["| file | of | commit | versions | command |", "|---|---|---|---|---|"]
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        command = f"`{run.command}`" if run.command else ""
        lines.append(f"| `{run.path.name}` | {run.kind} | {run.commit or 'not in the file'} | {versions} | {command} |")
    lines += ["", *(f"Log: `{name}`." for name in logs), *([""] if logs else [])]
    dirty = sorted({run.commit for run in runs if run.commit and run.commit.endswith("+")})
    if dirty:
        lines += [f"**The source had changes that are in no commit ({', '.join(dirty)}): nobody can run this code again.**", ""]
    for run in runs:
        if run.quick:
            lines += [f"**`{run.path.name}` is a check of the program (--quick): its figures mean nothing.**", ""]
    if runs[0].device != AHEAD_OF_TIME:
        lines += [
            "ms: median over the rounds, and the least and greatest. x: times as fast as the base, formed within each round.",
            "",
        ]
    for run in runs:
        lines += [f"## `{run.path.name}`", "", *_ceilings(run), *_tables(run)]
        for name, file in figures.get(run.path.name, []):
            lines += [f"![{name}]({file})", ""]
    if missing:
        lines += ["Not drawn:", "", *(f"* {line}" for line in missing), ""]
    if changed:
        lines += [*changed, ""]
    return "\n".join(lines)


def _device(runs: Sequence[Run]) -> str:
    where = runs[0].where
    if where == AHEAD_OF_TIME:
        return "Ahead-of-time compilation, no GPU: nothing here was run or timed."
    return f"{where}. {'These are figures of a CPU.' if runs[0].cpu else 'These are figures of this GPU.'}"


def _ceilings(run: Run) -> list[str]:
    if not run.ceilings:
        return []
    bf16, fp32, copy = (run.ceilings[key] for key in ("bf16_matmul", "fp32_matmul", "copy_bandwidth"))
    return [
        f"Ceilings measured in the same run: matmul bf16 {bf16 / 1e12:.4g} and fp32 {fp32 / 1e12:.4g} TFLOP/s, "
        f"copy {copy / 1e9:.4g} GB/s.", "",
    ]  # fmt: skip


def _tables(run: Run) -> Iterator[str]:
    yield from {
        "make bench": _bench, "bench.ladder": _ladder, "bench.aot": _aot, "bench.compare": _comparison,
        "bench.agreement": _agreement, "fastanchor bench-data": _bench_data,
    }.get(run.kind, _results)(run)  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, columns that are empty throughout left out, and an empty line."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    if kept:
        yield f"| {' | '.join(header[i] for i in kept)} |"
        yield f"|{'---|' * len(kept)}"
        for row in rows:
            yield f"| {' | '.join(row[i].replace('|', '/') for i in kept)} |"
        yield ""


def number(value: Any) -> str:
    """Four digits, or all before the point; yes or no; "" for None."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value}"


def _with_range(value: float, span: Sequence[float] | None, form: Callable[[float], str] = number) -> str:
    return f"{form(value)} ({form(span[0])} to {form(span[1])})" if span else form(value)


def _ratio(value: float, span: Sequence[float] | None) -> str:
    return _with_range(value, span, lambda x: f"{x:.2f}")


# --- bench.gpu, bench.peers, bench.speedrun ------------------------------------------------------------------------------------

# What stands in its own column or in none, so that _rest does not show it.
SHOWN = {"part", "name", "at_s", "about", "rounds", "notes", "said", "ms_range", "ratio_range"}
SHOWN |= {"computes", "differs", "reason", "counterpart", "url", "commit", "written_for", "warning"}  # of peers: in sentences
SHOWN |= {"replay_ms_range", "replay_ratio_range", "cost_percent_range", "left_out", "error", *IDENTITY}
TIMED = {
    "ms": "ms", "ratio": "x", "replay_ms": "device ms", "replay_ratio": "x, device",
    "extrapolated_s_per_epoch": "s/epoch, extrapolated", "cost_percent": "cost %",
}  # fmt: skip
RANGED = {"ms", "ratio", "replay_ms", "replay_ratio", "cost_percent"}


def _results(run: Run) -> Iterator[str]:
    every = run.found["results"]
    for part in dict.fromkeys(row["part"] for row in every):
        if part == "environment":
            continue
        yield from [f"### {PARTS.get(part, part)}", ""]
        rows = [row for row in run.rows(part) if row["part"] == part]
        if part in JUDGED:
            judged = [row for row in rows if "ok" in row]
            wrong = [row for row in judged if not row["ok"]]
            yield from [
                f"{len(judged) - len(wrong)} of {len(judged)} judged right; {len(rows) - len(judged)} without a verdict.",
                "",
            ]
            rows = wrong
        if part == "peers":
            yield from _about_peers(rows)
            rows = [row for row in rows if "ms" in row]
        yield from _rows(rows)
        if any(row["name"].startswith("predicted") for row in rows):
            yield from ["`predicted`: bench.cost's prediction from the ceilings above, not measured.", ""]
        if any(_field(row, key) == PASSED for row in rows for key in row):
            yield from [f"{WHY_PASSED}.", ""]
        for row in rows:
            if row.get("against"):
                yield from [f"{row['name']} counts as no record: {'; '.join(row['against'])}.", ""]
        if part == "steps" and any(row["name"] == "timed epoch" for row in rows):
            yield from ["`timed epoch`: seconds of a whole epoch of so many images.", ""]
        yield from _not_measured([row for row in every if row["part"] == part])


def _rows(rows: Sequence[Row]) -> Iterator[str]:
    """A table of these rows: what they are, times with ranges, and every other number or word that they hold."""
    who = [key for key in IDENTITY if any(key in row for row in rows)]
    times = [key for key in TIMED if any(key in row for row in rows)]
    rest = dict.fromkeys(key for row in rows for key in row if key not in SHOWN and key not in who and key not in times)
    rest = [key for key in rest if not any(isinstance(row.get(key), (dict, list)) for row in rows)]
    lines = []
    for row in rows:
        cells = [_with_ratio(row, key) for key in times]
        lines.append([row["name"], *(number(row.get(key)) for key in who), *cells, *(_field(row, key) for key in rest)])
    yield from table(
        ["", *(key.replace("_", " ") for key in who), *(TIMED[key] for key in times), *(key.replace("_", " ") for key in rest)],
        lines,
    )


def _field(row: Row, key: str) -> str:
    value = row.get(key)
    return share_text(value) if key.startswith("share_of_") and value is not None else number(value)


def _about_peers(rows: Sequence[Row]) -> Iterator[str]:
    """Which clones, and what a peer's code does otherwise than ours."""
    for row in rows:
        differs = row.get("differs") or ()
        said = [differs] if isinstance(differs, str) else list(differs)
        said += [f"engine: {row['reason']}"] if row.get("reason") else []
        if "url" in row:
            said = [f"{row['url']} at {row['commit'] or 'an unknown commit'}", *([row["warning"]] if "warning" in row else [])]
        if said:
            yield f"* {row['name']}: {'; '.join(said)}"
    yield ""


def _with_ratio(row: Row, key: str) -> str:
    if key not in row:
        return ""
    span = row.get(f"{key}_range") if key in RANGED else None
    return _ratio(row[key], span) if "ratio" in key else _with_range(row[key], span)


def _not_measured(rows: Sequence[Row]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "left_out" in row:
            reasons.setdefault(row["left_out"], []).append(row["name"])
    for reason, names in reasons.items():
        yield from [f"Left out: {', '.join(dict.fromkeys(names))}: {reason}.", ""]
    for row in rows:
        if "error" in row:
            yield from [f"FAILED: {row['name']}: {row['error'].strip().splitlines()[-1][:300]}", ""]


# --- the others ----------------------------------------------------------------------------------------------------------------


def _bench(run: Run) -> Iterator[str]:
    """A row for each benchmark and each of those that took turns with it."""
    settings = run.found.get("fastanchor", {}).get("settings")
    if settings:
        yield from [f"Sizes: {', '.join(f'{key} {value}' for key, value in settings.items())}.", ""]
    lines = []
    for entry in (entry for entry in run.found["benchmarks"] if entry["name"] != METHODS):
        info, stats = entry["extra_info"], entry["stats"]
        what = f"{entry['group'] or entry['name']} [{entry['name'].partition('[')[2]}" if "[" in entry["name"] else entry["group"]
        span = [1e3 * stats["min"], 1e3 * stats["max"]]
        lines.append([what or entry["name"], "engine", _with_range(1e3 * stats["median"], span), str(stats["rounds"]), ""])
        for key, seconds in info.items():
            if key.endswith("_median_s"):
                peer = key.removesuffix("_median_s")
                span = [1e3 * s for s in info[f"{peer}_range_s"]] if f"{peer}_range_s" in info else None
                ratio = (
                    _ratio(info[f"{peer}_ratio_median"], info.get(f"{peer}_ratio_range"))
                    if f"{peer}_ratio_median" in info
                    else ""
                )
                lines.append(["", peer.replace("_", " "), _with_range(1e3 * seconds, span), "", ratio])
    if lines:
        yield from table(["what", "who", "ms", "rounds", "its time over the engine's"], lines)
    for entry in (entry for entry in run.found["benchmarks"] if entry["name"] == METHODS):
        yield from _methods(entry)
    left_out = {
        f"{name}: {why}" for entry in run.found["benchmarks"] for name, why in (entry["extra_info"].get("left_out") or {}).items()
    }
    yield from (line for text in sorted(left_out) for line in (f"Left out: {text}.", ""))
    failed = run.found.get("fastanchor", {}).get("failed") or []
    yield from (line for name in failed for line in (f"FAILED: {name}", ""))


def _methods(entry: Row) -> Iterator[str]:
    """What the step of each recipe costs beside PGD-AT's: all of them the engine's."""
    info, stats = entry["extra_info"], entry["stats"]
    lines = [[method_cases.BASE, _with_range(1e3 * stats["median"], [1e3 * stats["min"], 1e3 * stats["max"]]), "", ""]]
    for name, flops in info["flops_ratio"].items():
        span = [1e3 * s for s in info[f"{name}_range_s"]]
        ratio = _ratio(info[f"{name}_ratio_median"], info[f"{name}_ratio_range"])
        lines.append([name, _with_range(1e3 * info[f"{name}_median_s"], span), ratio, f"{flops:.2f}"])
    yield from [f"{entry['group']}, {info['precision']}, {stats['rounds']} rounds:", ""]
    yield from table(["recipe", "ms", f"its time over {method_cases.BASE}'s", "what that would be by FLOPs"], lines)


def _ladder(run: Run) -> Iterator[str]:
    yield from [f"Sizes: {', '.join(f'{key} {value}' for key, value in run.sizes.items())}.", ""]
    for title, rungs in run.found["ladders"].items():
        yield from [f"### {title}", ""]
        header = ["stage", "ms", "x naive", "x the stage before", "differing pixels %", "loss raised by"]
        yield from table(
            header,
            [
                [row["name"], _with_range(row["ms"], row["ms_range"]), _ratio(row["ratio"], row["ratio_range"]),
                 f"{row['gain']:.2f}", number(row["differing_percent"]), number(row["raised_loss"])]
                for row in rungs
            ],
        )  # fmt: skip


def _aot(run: Run) -> Iterator[str]:
    """By architecture: how many, their faults, the most that one takes."""
    yield from ["Compiled ahead of time; nothing was run.", ""]
    rows = run.found["rows"]
    lines = []
    for arch in sorted({row["arch"] for row in rows}):
        mine = [row for row in rows if row["arch"] == arch]
        most = (str(max(row[key] for row in mine)) for key in ("registers", "spilled", "shared"))
        lines.append([f"sm_{arch}", str(len(mine)), str(sum(bool(row["faults"]) for row in mine)), *most])
    yield from table(["", "kernels", "with faults", "registers at most", "spilled bytes at most", "shared bytes at most"], lines)


def _comparison(run: Run) -> Iterator[str]:
    found = run.found
    files = [found.get(side, "?") for side in "ab"]
    yield from [f"`{files[1]}` (B) beside `{files[0]}` (A), files of {found['kind']}. Exit status {found['exit']}.", ""]
    if found["differs"]:
        yield from [f"Between the environments: {json.dumps(found['differs'])}.", ""]
    rows = [row for row in found["rows"] if row["verdict"]]
    yield from [f"{len(found['rows'])} timings; {len(rows)} past {found['slowdown']:g}:", ""]
    lines = [
        [row["part"], row["name"], row["timing"], number(row["a_ms"]), number(row["b_ms"]),
         _ratio(row["ratio"], row["ratio_range"]), row["verdict"]]
        for row in rows
    ]  # fmt: skip
    yield from table(["part", "what", "time of", "A ms", "B ms", "B / A", ""], lines)
    yield from (line for text in found["turned_bad"] for line in (f"BAD: {text}", ""))


def _agreement(run: Run) -> Iterator[str]:
    """Every check, and the reasons of the differences that are known."""
    rows = run.found["rows"]
    said = ("method", "what", "size", "precision", "loss", "gradient", "pixels", "tolerance", "agrees")
    yield from [f"{sum(row['agrees'] for row in rows)} of {len(rows)} checks agree.", ""]
    yield from table(said, [[number(row.get(key)) for key in said] for row in rows])
    yield from (line for text in dict.fromkeys(row.get("known") for row in rows) if text for line in (f"Known: {text}", ""))
    yield from _not_measured([{**row, "name": f"{row['method']}, {row['what']}"} for row in rows if "error" in row])


def _bench_data(run: Run) -> Iterator[str]:
    """What each backend gives alone, and what it costs the step that it feeds."""
    settings, rows = run.found["settings"], run.found["rows"]
    height, width = settings["image_size"]
    yield from [
        f"{settings['source']}: {settings['images']} training images, {width} x {height} pixels, {settings['kept']}; batches of "
        f"{settings['batch_size']}, {settings['augment']}, {', '.join(settings['views'])}; fed to {settings['step']}, "
        f"{settings['precision']}.", "",
    ]  # fmt: skip
    lines = []
    for row in rows:
        if "left_out" not in row:
            found = [(row["alone"], "images_per_s"), (row["feeding"], "ms"), (row["feeding"], "cost_percent")]
            cells = [_with_range(of[key], of[f"{key}_range"]) for of, key in found]
            if row["backend"] == "none":  # the ceiling: makes nothing, and is what the costs are measured from
                cells = ["", cells[1], ""]
            lines.append([row["name"], *cells, number(row.get("host_mb")), number(row.get("device_mb"))])
    yield from table(["backend", "images/s alone", "ms a step it feeds", "costs the step %", "host MB", "GPU MB"], lines)
    yield from _not_measured(rows)
    yield from [f"{run.found['recommended']['says']}.", ""]
