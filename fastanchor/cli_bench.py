"""`fastanchor bench-data`: its flags, its table and its JSON file."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fastanchor.errors import UserError

# The command's flags that are short for a setting. What else is no flag of its own is a setting too, as in fastanchor train.
SETTINGS = {
    "--data": "--data.source", "--limit": "--data.limit", "--skip-broken": "--data.skip-broken", "--classes": "--data.classes",
    "--augment": "--data.augment", "--image-size": "--data.image-size", "--workers": "--data.workers",
}  # fmt: skip
# Flags of its own, with how many values each has.
OWN_FLAGS = {"--recipe": 1, "--views": 1, "--rounds": 1, "--out": 1, "--json": 0, "--help": 0, "-h": 0}
# Columns of a terminal from which on the table stands in single lines.
WIDE = 115


def add_bench_data(commands, name: str) -> None:
    """The command. Its `run` gets, beside its own flags, settings as those of fastanchor train, short forms or written out."""
    parser = commands.add_parser(
        name, add_help=False, allow_abbrev=False, help="how fast each data backend feeds this machine",
        usage="fastanchor bench-data --data SOURCE [--recipe RECIPE] [--batch-size N] [--augment A] [--image-size N]\n"
              "                             [--views 1|2] [--workers N] [--limit N] [--rounds N] [--out FILE.json] [--json]\n"
              "                             [--device D] [--model.width N ...]",
        epilog="Settings are those of fastanchor train RECIPE --help. On a CPU the step is made small unless you say its sizes.",
    )  # fmt: skip
    parser.add_argument("--recipe", default="pgd_at", metavar="RECIPE", help="whose training step is fed (default pgd_at)")
    parser.add_argument("--views", metavar="1|2", help="views drawn of every image (default: as many as the recipe's step takes)")
    parser.add_argument("--rounds", metavar="N", help="turns of each backend (default: 5, fewer where a step is slow)")
    parser.add_argument("--out", metavar="FILE.json", help="write all figures there, with settings and environment")
    parser.add_argument("--json", action="store_true", help="print them instead of the table")
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    parser.set_defaults(run=_bench_data, parser=parser)


def _bench_data(arguments, settings: list[str]) -> int:
    from fastanchor.settings import load_recipe, parse_flags

    if arguments.help:
        arguments.parser.print_help()
        return 0
    settings = [_written_out(flag) for flag in settings]
    given = {flag[2:].partition("=")[0].replace("-", "_") for flag in settings if flag.startswith("--")}
    if "data.source" not in given:
        raise UserError("bench-data needs --data SOURCE, such as --data cifar10 or --data folder:PATH")
    config = parse_flags(settings, load_recipe(arguments.recipe))
    views = None if arguments.views is None else _whole(arguments.views, "--views", {"1", "2"}, "1 or 2")
    rounds = None if arguments.rounds is None else _whole(arguments.rounds, "--rounds", None, "a whole number >= 1")
    out = None if arguments.out is None else Path(arguments.out)
    from fastanchor.bench_data import measure
    from fastanchor.files import make_place, write_text

    if out is not None:
        if out.is_dir():
            raise UserError(f"--out = {out}: is a folder, and must be a file")
        make_place(out)  # said now, not after a minute
    console = _console(sys.stderr if arguments.json else sys.stdout)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    found = measure(config, given=given, views_wanted=views, rounds=rounds, say=say)
    text = json.dumps({**found, "recipe": arguments.recipe}, indent=1) + "\n"
    if out is not None:
        write_text(out, text)
    if arguments.json:
        print(text, end="", flush=True)
    else:
        show(found, console)
        if out is not None:
            say(f"figures: {out}")
    return 0


def _written_out(flag: str) -> str:
    """A short flag as the setting that it stands for."""
    name, equals, value = flag.partition("=")
    return SETTINGS.get(name, name) + equals + value


def _whole(text: str, name: str, allowed: set[str] | None, what: str) -> int:
    if not (text in allowed if allowed else text.isascii() and text.isdigit() and int(text) >= 1):
        raise UserError(f"{name} = {text}: must be {what}")
    return int(text)


def _console(file) -> Console:
    """A pipe has no width of its own: there a table is never folded."""
    from fastanchor.train.progress import PipeConsole

    console = PipeConsole(file=file)
    return console if console.is_terminal else PipeConsole(file=file, width=200)


def show(found: dict, console: Console) -> None:
    """The table of what `measure` found, and which backend to use."""
    from fastanchor import pipes

    settings = found["settings"]
    height, width = settings["image_size"]
    views = f"{len(settings['views'])} view{'s' if len(settings['views']) > 1 else ''}"
    about = f"{settings['source']}, batches of {settings['batch_size']} at {width}x{height}, {settings['augment']}, {views}"
    # On a narrow terminal a range stands below its median, and there are no lines between the columns.
    wide = console.width >= WIDE
    between = " " if wide else "\n"
    style = {} if wide else {"box": box.SIMPLE_HEAD, "padding": 0, "pad_edge": False, "show_edge": False}
    table = Table(title=about, title_justify="left", **style)
    table.add_column("backend", min_width=16)
    for name in ("images/s\nalone", "ms a step\nit feeds", "costs the\nstep %", "memory\nMB"):
        table.add_column(name.replace("\n", between), justify="right", no_wrap=True)
    ranged = functools.partial(_ranged, between=between)
    for row in found["rows"]:
        if "left_out" in row:
            continue
        alone, feeding = row["alone"], row["feeding"]
        told = ["", ranged(feeding["ms"], feeding["ms_range"]), ""]
        if row["backend"] != "none":
            told[0] = ranged(alone["images_per_s"], alone["images_per_s_range"])
            told[2] = ranged(feeding["cost_percent"], feeding["cost_percent_range"], form="+.1f")
        memory = [(row.get("host_mb"), "host"), (row.get("device_mb"), "GPU")]
        parts = [f"{value:,.0f} {where}" for value, where in memory if value is not None]
        table.add_row(row["name"], *told, (", " if wide else between).join(parts))
    console.print(table, highlight=False)
    rounds = found["rows"][0]["feeding"]["rounds"]
    device = found["environment"]["device"]
    lines = [
        f"{device}{' (CPU figures)' if device.startswith('CPU') else ''}; medians of {pipes.told(rounds)}, "
        "least to greatest; the cost is formed within each round, against the ceiling's time",
        *(f"left out: {row['name']}: {row['left_out']}" for row in found["rows"] if "left_out" in row),
        found["recommended"]["says"],
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _ranged(value: float, span: list[float], *, between: str, form: str | None = None) -> str:
    def number(x: float) -> str:
        return format(x, form) if form else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"

    return f"{number(value)}{between}({number(span[0])} to {number(span[1])})"
