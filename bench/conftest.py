"""`make bench`: which sizes, in which order, and what is said at its end: tables for people, settings and ceilings in the JSON.

    python -m pytest bench --benchmark-only [--benchmark-json=FILE] [--bench-quick]

Nothing here acts where no benchmark has run.
"""

from __future__ import annotations

import io
import signal
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import machine, method_cases, turns
from bench.compare import METHODS
from bench.gpu_common import CIFAR_IMAGES
from fastanchor.ceilings import PASSED, WHY_PASSED, share_text

SCHEMA, KIND, WIDTH = 1, "make bench", 120
ORDER = ("test_attack", "test_steps", METHODS, "test_end_to_end", "test_evaluation", "test_data", "test_kernels")
FOLDER = Path(__file__).parent
# Of the first table: their peers are the naive code and its second rung.
MAIN, RUNGS = ("test_attack", "test_whole_step"), ("naive", "second_rung")
Entry = dict[str, Any]
ENTRIES, ENVIRONMENT, FAILED = pytest.StashKey[list[Entry]](), pytest.StashKey[Entry](), pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    parser.addoption("--bench-quick", action="store_true", help="tiny sizes: a check of the benchmarks; figures mean nothing")


def pytest_configure(config):
    config.stash[ENTRIES], config.stash[FAILED] = [], []
    # A job's limit says SIGTERM: what was measured until then is kept, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # pytest-benchmark opens the file after all benchmarks have run: too late to learn that there is no such folder.
    if path := config.getoption("benchmark_json", None):
        path.parent.mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope="session")
def sizes(pytestconfig) -> turns.Sizes:
    """What to time: FULL, or QUICK by --bench-quick."""
    return _sizes(pytestconfig)


def _sizes(config) -> turns.Sizes:
    return turns.QUICK if config.getoption("--bench-quick") else turns.FULL


def pytest_collection_modifyitems(items):
    """The suites in order of worth; within one as written."""
    rank = {FOLDER / f"{name}.py": i for i, name in enumerate(ORDER)}
    items.sort(key=lambda item: rank.get(item.path, len(ORDER)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Which have failed: pytest-benchmark drops them from its file without a word."""
    report = yield
    if report.failed:
        item.config.stash[FAILED].append(item.nodeid)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats(config, benchmarks):
    """Keep what was measured for the tables below. Without a comparison asked for, pytest-benchmark's own would add nothing."""
    failed = config.stash[FAILED]
    config.stash[ENTRIES] = [entry for entry in benchmarks if entry["fullname"] not in failed and entry["path"] is None]
    return None if config.getoption("benchmark_compare") else []


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, output_json):
    output_json["fastanchor"] = {
        "schema": SCHEMA,
        "kind": KIND,
        "environment": _environment(config),
        "settings": asdict(_sizes(config)),
        "failed": config.stash[FAILED],
    }


def _environment(config) -> Entry:
    """The machine with its ceilings, measured once a session: after the benchmarks, in whose rounds it has no place."""
    if ENVIRONMENT not in config.stash:
        config.stash[ENVIRONMENT] = machine.describe(turns.CPU)
    return config.stash[ENVIRONMENT]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ENTRIES]:
        terminalreporter.section("fastanchor, CPU")
        text = io.StringIO()
        console = Console(width=WIDTH, file=text, highlight=False, markup=False)
        show(config.stash[ENTRIES], asdict(_sizes(config)), _environment(config), console)
        terminalreporter.write(text.getvalue())


def show(entries: list[Entry], settings: Entry, environment: Entry, console: Console) -> None:
    """The tables. entries: as in the file's `benchmarks`, or flat, as pytest-benchmark hands them to its hooks."""
    entries = [{**entry, **entry.get("stats", {})} for entry in entries]
    size = "ResNet-18 of width {width}, batch {batch}, {pixels} x {pixels} pixels".format(**settings)
    if settings["quick"]:
        console.print("--bench-quick: the figures mean nothing")
    console.print(f"{environment['device']}; torch {torch.__version__}. CPU figures.")
    console.print(
        "this machine's ceilings, in this run: matmul fp32 {fp32_matmul_tflops:.3f}, bf16 {bf16_matmul_tflops:.3f} TFLOP/s, "
        "copy {copy_gb_per_s:.1f} GB/s".format(**environment)
    )
    main = [entry for entry in entries if entry["name"].partition("[")[0] in MAIN]
    if main:
        console.print(_main_table(main, size))
        console.print(
            "ms: medians of the rounds; ratios: of each round, in which all took a turn, median (least to greatest). of matmul: "
            "ours, in FLOPs that the algorithm needs, as a share of this machine's matmul ceiling in that precision."
            + (f"\n{WHY_PASSED}.\n" if any(_share_of_matmul(entry) == PASSED for entry in main) else "\n")
        )
    for entry in (entry for entry in entries if entry["name"] == METHODS):
        console.print(_method_table(entry))
        console.print(
            f"x {method_cases.BASE}: a step beside this one of the same round, median (least to greatest). by FLOPs: what that "
            "ratio would be if products alone took time.\n"
        )
    listed = [entry for entry in entries if entry["name"] != METHODS]
    others = [(entry, names) for entry in listed if (names := _peers(entry, beside_rungs=entry in main)) or entry not in main]
    if others:
        console.print(_other_table(others))
    for line in dict.fromkeys(_notes(entries)):
        console.print(line)


def _main_table(entries: list[Entry], size: str) -> Table:
    rounds = "/".join(map(str, sorted({entry["rounds"] for entry in entries})))
    numbers = ("naive ms", "second rung ms", "ours ms", "naive / ours", "second rung / ours", "of matmul")
    table = _table(f"attack and whole step: {size}, {rounds} rounds", ("what", "precision"), numbers)
    for entry in entries:
        info = entry["extra_info"]
        table.add_row(
            entry["group"], info["precision"], *(_number(info[f"{peer}_median_s"]) for peer in RUNGS), _number(entry["median"]),
            *(_ratio_of(info, peer) for peer in RUNGS), _share_of_matmul(entry),
        )  # fmt: skip
    return table


def _method_table(entry: Entry) -> Table:
    info, rounds = entry["extra_info"], entry["rounds"]
    columns = ("ms", f"x {method_cases.BASE}", "by FLOPs", "s / 50,000 images")
    table = _table(f"{entry['group']}, {info['precision']}, {rounds} rounds", ("recipe",), columns)
    table.add_row(method_cases.BASE, _our_ms(entry), "1", "1", _epoch_seconds(entry["median"], info))
    for name in sorted(info["flops_ratio"], key=lambda name: info[f"{name}_median_s"]):
        expected, seconds = f"{info['flops_ratio'][name]:.2f}", _epoch_seconds(info[f"{name}_median_s"], info)
        table.add_row(name, _ms_of(info, name), _ratio_of(info, name), expected, seconds)
    return table


def _epoch_seconds(seconds: float, info: Entry) -> str:
    return f"{seconds * CIFAR_IMAGES / info['images']:,.0f}"


def _share_of_matmul(entry: Entry) -> str:
    share = entry["extra_info"].get(f"share_of_{entry['extra_info']['precision']}_matmul")
    return "" if share is None else share_text(share)


def _other_table(entries: list[tuple[Entry, list[str]]]) -> Table:
    table = _table("the other suites", ("what", "who"), ("ms", "images/s", "ms / ours"))
    for entry, names in entries:
        info = entry["extra_info"]
        # The name tells apart what has one group: precisions, losses.
        what = f"{entry['group']} [{entry['param']}]" if entry["param"] else entry["group"]
        table.add_row(what, "ours", _our_ms(entry), _per_second(info, "images_per_s"), "1")
        for name in names:
            rate = _per_second(info, f"{name}_images_per_s")
            table.add_row("", name.replace("_", " "), _ms_of(info, name), rate, _ratio_of(info, name))
        table.add_section()
    return table


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for column in words:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _peers(entry: Entry, beside_rungs: bool) -> list[str]:
    """Who took turns with the engine; without those of the first table."""
    found = [key.removesuffix("_median_s") for key in entry["extra_info"] if key.endswith("_median_s")]
    return [name for name in found if not (beside_rungs and name in RUNGS)]


def _notes(entries: Iterable[Entry]) -> Iterator[str]:
    for entry in entries:
        info = entry["extra_info"]
        if "extrapolated_s_per_50000_images" in info:
            told = ", ".join(f"{name} {s:.0f} s" for name, s in info["extrapolated_s_per_50000_images"].items())
            yield f"{entry['group']}, {info['precision']}: extrapolated to 50,000 images: {told}"
        if "robust_percent" in info:
            told = ", ".join(f"{name} {percent:.1f}" for name, percent in info["robust_percent"].items())
            yield f"{entry['group']}: robust %: {told} (clean {info['clean_percent']:.1f})"
        if "runs_as" in info:
            yield info["runs_as"]
        for key in ("loader_transforms", "naive_transforms", "loader"):
            if key in info:
                yield f"{entry['group']}: {key.replace('_', ' ')}: {info[key]}"
        for name, reason in info["left_out"].items():
            yield f"{entry['group']}: left out: {name}: {reason}"


def _number(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _ms(median: float, low: float, high: float) -> str:
    return f"{_number(median)} ({_number(low)} to {_number(high)})"


def _our_ms(entry: Entry) -> str:
    return _ms(entry["median"], entry["min"], entry["max"])


def _ms_of(info: Entry, peer: str) -> str:
    return _ms(info[f"{peer}_median_s"], *info[f"{peer}_range_s"]) if f"{peer}_median_s" in info else ""


def _ratio_of(info: Entry, peer: str) -> str:
    key = f"{peer}_ratio_median"
    return (
        f"{info[key]:.2f} ({info[f'{peer}_ratio_range'][0]:.2f} to {info[f'{peer}_ratio_range'][1]:.2f})" if key in info else ""
    )


def _per_second(info: Entry, key: str) -> str:
    return f"{info[key]:,.0f}" if key in info else ""
