"""The figures of bench/'s files: speed-up by stage, seconds an epoch, what each method costs, rooflines; SVG and PNG.

    python -m bench.plots FILE... [--out DIR]

Reads what bench.gpu, bench.peers, bench.ladder and `make bench` write. Each figure says its device, versions, commit and sizes.
What a file does not hold is a sentence, not an empty figure. Exit status 0, or 2 where nothing at all could be drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import method_cases, plot_draw, plot_read, program
from bench.compare import METHODS
from bench.gpu_common import CIFAR_IMAGES
from bench.plot_draw import Dot, Line, Panel
from bench.plot_read import Row, Run
from fastanchor.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHISKERS = "dots: medians of {rounds} rounds; lines: least and greatest"
NAIVE = Line(1.0, "the naive code itself")


@dataclass(frozen=True)
class Drawn:
    """A figure, its name as part of a file's name, and its title."""

    name: str
    title: str
    figure: Figure


def draw(run: Run) -> tuple[list[Drawn], list[str]]:
    """All figures that a file has the data for, and a sentence for each that it has not; within `plot_draw.style()`."""
    from bench import plot_roofline

    found, missing = [], []
    for made in (ladders(run), epochs(run), costs(run), plot_roofline.draw(run)):
        for item in made:
            if isinstance(item, str):
                missing.append(item)
            else:
                found.append(Drawn(*item))
    return found, missing


def write(run: Run, folder: Path) -> tuple[list[tuple[Drawn, list[Path]]], list[str]]:
    """Draw a file's figures into `folder` as STEM-NAME.svg and .png; with them the sentences of `draw`."""
    with plot_draw.style():
        figures, missing = draw(run)
        return [(made, plot_draw.save(made.figure, folder / f"{run.path.stem}-{made.name}")) for made in figures], missing


Found = Iterator[tuple[str, str, "Figure"] | str]


# --- speed-up by stage ---------------------------------------------------------------------------------------------------------


def ladders(run: Run) -> Found:
    """How many times as fast as the naive code each stage is."""
    if run.kind == "bench.ladder":
        panels = [Panel(title, {row["name"]: [_ratio(row)] for row in rows}) for title, rows in run.found["ladders"].items()]
        yield _ladder(run, "ladder", "What each stage of the engine adds", panels, _size(run), run.sizes["rounds"])
    elif run.kind == "make bench":
        entries = naive_entries(run)
        if entries:
            rounds = _rounds(entry["stats"] for entry in entries)
            note = "hollow dots: ratios of medians, no range in the file"
            panels = _bench_panels(entries)
            hollow = any(dot.hollow for panel in panels for row in panel.rows.values() for dot in row)
            yield _ladder(run, "ladder", "Naive code and the engine", panels, _size(run), rounds, note if hollow else "")
        else:
            yield f"{run.path}: no speed-up by stage: no benchmark in it has naive code beside it"
    elif run.kind == "bench.gpu":
        for part, title in (("attack", "The attack alone, by stage"), ("steps", "The whole training step, by stage")):
            rows = [row for row in run.rows(part) if "ratio" in row]
            if rows:
                panels = _gpu_panels(rows, _ratio)
                batches = f"batch {_listed(row['batch'] for row in rows)}"
                yield _ladder(run, f"ladder-{part}", title, panels, f"{_size(run)}, {batches}", _rounds(rows))
            else:
                yield f"{run.path}: no speed-up by stage for {part}: it has no measured row of that part beside the naive code"


def _ladder(
    run: Run, name: str, title: str, panels: list[Panel], size: str, rounds: Any, note: str = ""
) -> tuple[str, str, Figure]:
    caption = run.caption(size, WHISKERS.format(rounds=rounds), note)
    return name, title, plot_draw.dots(panels, title=title, xlabel="times as fast as the naive code", caption=caption, line=NAIVE)


def _ratio(row: Row) -> Dot:
    return Dot(row["ratio"], *row["ratio_range"], series=_batch(row))


def _batch(row: Row) -> str:
    return f"batch {row['batch']}" if "batch" in row else ""


def _gpu_panels(rows: list[Row], dot: Any) -> list[Panel]:
    """A panel for each precision of the attack, or method of the step, cudnn.benchmark apart; of rows measured twice, one."""
    panels: dict[str, dict[str, dict[str, Dot]]] = {}
    for row in sorted(rows, key=lambda row: row.get("batch", 0)):
        title = row.get("method") or f"PGD in {row['precision']} (the naive code always in fp32)"
        title += ", cudnn.benchmark on" if row.get("cudnn_benchmark") else ""
        panels.setdefault(title, {}).setdefault(row["name"], {}).setdefault(_batch(row), dot(row))
    return [Panel(title, {name: list(by_batch.values()) for name, by_batch in found.items()}) for title, found in panels.items()]


def naive_entries(run: Run) -> list[Row]:
    """The benchmarks of a `make bench` file that train or attack, with the naive code beside them: attack, whole step, epoch."""
    names = ("test_attack[", "test_whole_step[", "test_epoch[")
    entries = run.found["benchmarks"]
    return [entry for entry in entries if entry["name"].startswith(names) and "naive_ratio_median" in entry["extra_info"]]


def precision_of(entry: Row) -> str:
    """fp32 or bf16: what the engine ran in."""
    return (entry.get("params") or {}).get("precision") or entry["extra_info"].get("precision", "fp32")


def _bench_panels(entries: list[Row]) -> list[Panel]:
    """A panel for each question. The engine's ratios are of each round; others' follow from medians, the bf16 entry's first."""
    panels: dict[str, dict[str, list[Dot]]] = {}
    for entry in sorted(entries, key=lambda entry: precision_of(entry) != "bf16"):
        info, rows = entry["extra_info"], panels.setdefault(entry["group"] or entry["name"], {})
        rows.setdefault("naive, fp32", [Dot(1.0)])
        for key, seconds in info.items():
            if key.endswith("_median_s") and key != "naive_median_s":
                rows.setdefault(peer_name(key.removesuffix("_median_s")), [Dot(info["naive_median_s"] / seconds, hollow=True)])
        rows[f"engine, {precision_of(entry)}"] = [Dot(info["naive_ratio_median"], *info["naive_ratio_range"])]
    order = {entry["group"] or entry["name"]: None for entry in entries}
    # fp32 before bf16, the engine last.
    return [
        Panel(title, dict(sorted(panels[title].items(), key=lambda x: (x[0].startswith("engine"), "bf16" in x[0]))))
        for title in order
    ]


def peer_name(key: str) -> str:
    """What stands in a figure for a peer's key in extra_info."""
    return "second rung, bf16 autocast + channels-last" if key == "second_rung" else key.replace("_", " ")


# --- seconds an epoch ----------------------------------------------------------------------------------------------------------


def epochs(run: Run) -> Found:
    """Seconds of an epoch of 50,000 images by method: extrapolated from a step, timed, and predicted."""
    if run.kind in ("bench.gpu", "bench.peers"):
        yield from _peer_epochs(run)
    if run.kind == "bench.gpu":
        rows = [row for row in run.rows("steps") if "extrapolated_s_per_epoch" in row or row["name"] == "timed epoch"]
        panels = _gpu_panels([{**row, "name": _epoch_name(row)} for row in rows], _epoch_dot)
        size = f"{_size(run)}, batch {_listed(row['batch'] for row in rows)}"
        rounds = _rounds(row for row in rows if "rounds" in row)
    elif run.kind == "make bench":
        panels, size = list(_bench_epochs(run)), _size(run).rpartition(", ")[0]  # the steps are in the titles
        rounds = _rounds(entry["stats"] for entry in naive_entries(run))
        if not panels:
            unknown = "the file does not say how many images a step had"
            why = unknown if naive_entries(run) else "no benchmark in it has naive code beside it"
            yield f"{run.path}: no seconds an epoch: {why}"
            return
    else:
        return
    if not panels:
        yield f"{run.path}: no seconds an epoch: it has no measured row of the part steps"
        return
    title = f"Seconds an epoch of {CIFAR_IMAGES:,} images"
    every = [name for panel in panels for name in panel.rows]
    notes = ["extrapolated from the time of a step" + (", or a short epoch" if run.kind == "make bench" else "")]
    notes += ["timed epochs are scaled to that many images"] if any(name.startswith("timed epoch") for name in every) else []
    if any(name.startswith("predicted") for name in every):
        notes += ["hollow: PREDICTED by bench.cost from this run's ceilings, not measured; dotted: its two bounds"]
    caption = run.caption(size, WHISKERS.format(rounds=rounds), *notes)
    yield "epochs", title, plot_draw.dots(panels, title=title, xlabel="seconds an epoch", caption=caption)


def _peer_epochs(run: Run) -> Found:
    """A panel for each training step of a peer: its own code and, where the engine does the same, ours."""
    rows = [row for row in run.rows("peers") if "extrapolated_s_per_epoch" in row]
    if not rows:
        yield f"{run.path}: no seconds an epoch beside peers: it has no measured training step of one"
        return
    panels: dict[str, dict[str, list[Dot]]] = {}
    for row in rows:
        own = row["name"] == row["peer"]
        title = f"{row['peer']}, batch {row['batch']}" + (f", PGD-{row['steps']}" if row.get("steps") else "")
        dot = dataclasses.replace(_epoch_dot(row), series="", hollow=own)
        panels.setdefault(title, {})["its own code" if own else row["name"]] = [dot]
    title = f"Seconds an epoch of {CIFAR_IMAGES:,} images, beside public code"
    size = f"ResNet-18 of width {_listed(row['width'] for row in rows if 'width' in row)}"
    notes = (
        "extrapolated from the time of a batch",
        "hollow: public code, on prepared batches where no loader is named; ours augments its own",
        "what stands in one panel took turns in one process",
    )
    caption = run.caption(size, WHISKERS.format(rounds=_rounds(rows)), *notes)
    made = [Panel(title, rows) for title, rows in panels.items()]
    yield "epochs-peers", title, plot_draw.dots(made, title=title, xlabel="seconds an epoch", caption=caption)


def _epoch_name(row: Row) -> str:
    if row["name"] != "timed epoch":
        return row["name"]
    kept = [row.get("precision"), *(f"{key} {row[key]}" for key in ("graph", "backend", "kernels") if key in row)]
    return f"timed epoch ({', '.join(filter(None, [*kept, 'compiled' if row.get('compile') else None]))})"


def _epoch_dot(row: Row) -> Dot:
    if row["name"].startswith("timed epoch"):
        return Dot(row["seconds"] * CIFAR_IMAGES / row["images"], series=_batch(row))
    seconds = row["extrapolated_s_per_epoch"]
    if row["name"].startswith("predicted"):
        bounds = row.get("full_overlap_s_per_epoch"), row.get("no_overlap_s_per_epoch")
        return Dot(seconds, *bounds, series=_batch(row), hollow=True)
    low, high = (seconds * ms / row["ms"] for ms in row["ms_range"]) if "ms_range" in row else (None, None)
    return Dot(seconds, low, high, series=_batch(row))


def _bench_epochs(run: Run) -> Iterator[Panel]:
    """A panel for each entry: only what took turns with each other stands side by side."""
    for entry in naive_entries(run):
        info, stats = entry["extra_info"], entry["stats"]
        images = info.get("images", run.sizes.get("batch"))
        if entry["name"].startswith("test_attack") or images is None:
            continue
        scale, rows = CIFAR_IMAGES / images, {}
        for key, seconds in info.items():
            if key.endswith("_median_s"):
                peer = key.removesuffix("_median_s")
                span = [scale * s for s in info.get(f"{peer}_range_s", ())]
                rows["naive, fp32" if peer == "naive" else peer_name(peer)] = [Dot(scale * seconds, *span)]
        ordered = dict(sorted(rows.items(), key=lambda row: "bf16" in row[0]))
        engine = {f"engine, {precision_of(entry)}": [Dot(*(scale * stats[key] for key in ("median", "min", "max")))]}
        yield Panel(f"{entry['group'] or entry['name']}: in turns with the engine in {precision_of(entry)}", ordered | engine)


# --- what each method costs ----------------------------------------------------------------------------------------------------


def costs(run: Run) -> Found:
    """The step of every recipe over PGD-AT's, and what that would be by FLOPs alone."""
    if run.kind == "make bench":
        entry = next((entry for entry in run.found["benchmarks"] if entry["name"] == METHODS), None)
        found = {} if entry is None else _bench_costs(entry["extra_info"])
        title, rounds = entry and f"{entry['group']}, {precision_of(entry)}", _rounds([entry["stats"]] if entry else [])
    elif run.kind == "bench.gpu":
        rows = [row for row in run.rows("methods") if row["name"] != method_cases.BASE]
        found = {row["name"]: (row["cost"], *row["cost_range"], row["flops_ratio"]) for row in rows}
        title, rounds = rows and f"batch {rows[0]['batch']}, {rows[0]['precision']}, graph {rows[0]['graph']}", _rounds(rows)
    else:
        return
    if not found:
        yield f"{run.path}: no figure of what each method costs: it has no measured step of other methods"
        return
    by_cost = sorted(found.items(), key=lambda item: item[1][0])
    panel = Panel(
        title,
        {name: [Dot(*cost, series="measured"), Dot(flops, series="by FLOPs", hollow=True)] for name, (*cost, flops) in by_cost},
    )
    caption = run.caption(WHISKERS.format(rounds=rounds), "hollow: what it would be if products alone took time")
    base = Line(1.0, f"the step of {method_cases.BASE}")
    made = plot_draw.dots(
        [panel], title="What each method costs", xlabel="a step's time over PGD-AT's", caption=caption, line=base
    )
    yield "methods", "What each method costs", made


def _bench_costs(info: Row) -> dict[str, tuple[float, float, float, float]]:
    return {
        name: (info[f"{name}_ratio_median"], *info[f"{name}_ratio_range"], flops) for name, flops in info["flops_ratio"].items()
    }


# --- in words ------------------------------------------------------------------------------------------------------------------


def _size(run: Run) -> str:
    known = run.sizes
    if "width" not in known:
        return "the network's size is not in the file"
    batch = f", batch {known['batch']}" if "batch" in known else ""
    pgd = f"PGD-{known['steps']}" + (f" (attack alone), PGD-{known['train_steps']} (step)" if "train_steps" in known else "")
    return f"ResNet-18 of width {known['width']}, {known['pixels']} x {known['pixels']} pixels{batch}, {pgd}"


def _rounds(rows: Any) -> str:
    return _listed(row["rounds"] for row in rows) or "the"


def _listed(values: Any) -> str:
    return "/".join(str(value) for value in sorted(set(values)))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSON of bench.gpu, bench.peers, bench.ladder, make bench"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/plots"), metavar="DIR", help="default: runs/plots")
    args = parser.parse_args(arguments)
    drawn = 0
    try:
        runs = [plot_read.read(path) for path in args.files]
        if len({path.stem for path in args.files}) < len(runs):
            raise UserError("two files have the same name, and their figures would too")
        for run in runs:
            figures, missing = write(run, args.out)
            drawn += len(figures)
            for made, paths in figures:
                print(f"{made.title}: {', '.join(map(str, paths))}")
            for line in missing or ([] if figures else [f"{run.path}: {run.kind} has no figures"]):
                print(line, file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"bench.plots: {error}", file=sys.stderr)
        return 2
    return 0 if drawn else 2


if __name__ == "__main__":
    sys.exit(program.run("bench.plots", main))
