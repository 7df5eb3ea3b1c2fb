"""What a comparison leaves for people: the cells of its table, compare.md to paste, and compare.html with the figures and notes.

Everything is made from the content of compare.json, so that what is shown is what is stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastanchor.errors import UserError
from fastanchor.evaluate import figures
from fastanchor.evaluate.page import clean_text, figure, finding, page, safe, section
from fastanchor.files import write_text

Row = dict[str, Any]
PLOTS = ("robust-against-clean", "accuracy-against-time")


def headings(summary: dict[str, Any], short: bool = False) -> list[str]:
    """Names of the table's columns after the run's; short: attacks by their first words, where these tell them apart."""
    names = summary["attacks"]
    if short and len({name.partition(" (")[0] for name in names}) == len(names):
        names = [name.partition(" (")[0] for name in names]
    return ["method", "clean %", *(_percent(name) for name in names), "s/epoch", "training", "peak memory"]


def cells(summary: dict[str, Any], row: Row) -> list[str]:
    """The row's cells below `headings`: mean and, over several seeds, the standard deviation."""
    if not row["seeds"]:
        return [row["title"], "failed", *("" for _ in summary["attacks"]), "", "", ""]
    robust = [_accuracy(row["robust"][name]) for name in summary["attacks"]]
    memory = row["peak_memory_mb"]
    return [
        row["title"], _accuracy(row["clean"]), *robust, _accuracy(row["seconds_an_epoch"]),
        duration(row["training_seconds"]["mean"]), "" if memory is None else f"{max(memory['values']):,.0f} MB",
    ]  # fmt: skip


def name_of(summary: dict[str, Any], row: Row) -> str:
    """The run's name, with how many of its seeds have a result where that is not all."""
    done, of = len(row["seeds"]), len(summary["seeds"])
    return row["name"] if done in (0, of) else f"{row['name']} ({done} of {of} seeds)"


def remarks(summary: dict[str, Any]) -> list[str]:
    """The sentences that belong below the table: what was judged, what has failed, what the runs do not have in common."""
    seeds = summary["seeds"]
    spread = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"one seed, {seeds[0]}"
    count = next((row["count"] for row in summary["rows"] if row["seeds"]), None)
    judged = [f"{count:,} test images of {summary['data']}; {spread}; on {summary['device']}."] if count else []
    if summary["finished"] < summary["runs"] and not failures(summary):
        judged.append(f"Not complete: {summary['finished']} of {summary['runs']} runs are done.")
    return [*judged, *failures(summary), *summary["notes"]]


def failures(summary: dict[str, Any]) -> list[str]:
    """A sentence a run that failed."""
    return [f"Failed: {row['name']}, seed {lost['seed']}: {lost['error']}" for row in summary["rows"] for lost in row["failed"]]


def markdown(summary: dict[str, Any]) -> str:
    """compare.md: the table, then the remarks as a list."""
    lines = [_line(["run", *headings(summary)]), _line(["---"] * (1 + len(headings(summary))))]
    lines += [_line([name_of(summary, row), *cells(summary, row)]) for row in summary["rows"]]
    return "\n".join([f"**{clean_text(summary['title'])}**", "", *lines, "", *(f"* {text}" for text in remarks(summary)), ""])


def _line(words: list[str]) -> str:
    return "| " + " | ".join(clean_text(word).replace("|", "\\|") for word in words) + " |"


def duration(seconds: float) -> str:
    """`8.4 s`, `12 min`, `3 h 5 min`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def write_page(summary: dict[str, Any], out: Path, links: dict[str, str]) -> None:
    """Write OUT/compare.html, self-contained, and the figures as OUT/compare-*.png. Raises UserError where matplotlib is missing.

    links: path of a run's report, relative to OUT, by the run's path.
    """
    figures.require_matplotlib()
    finished = [row for row in summary["rows"] if row["seeds"]]
    sections = [_head(summary), _table(summary)]
    if finished:
        sections.append(_plots(summary, finished, out))
    sections += [_notes(summary), _runs(summary, links)]
    path = out / "compare.html"
    try:
        write_text(path, page(summary["title"], sections))
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written ({error.strerror})") from None


def _head(summary: dict[str, Any]) -> str:
    facts = {
        "data": summary["data"],
        "attacks": "; ".join(summary["attacks"]),
        "seeds": ", ".join(map(str, summary["seeds"])),
        "runs": f"{summary['finished']} of {summary['runs']} finished",
        "device": summary["device"],
    }
    listed = "".join(f"<div><dt>{safe(key)}</dt><dd>{safe(value)}</dd></div>" for key, value in facts.items())
    return (f'<header><p class="kicker">fastanchor comparison</p><h1>{safe(summary["title"])}</h1>'
            f'<dl class="facts">{listed}</dl></header>')  # fmt: skip


def _table(summary: dict[str, Any]) -> str:
    # The method stands below the run's name: the column of a table would take the room of the figures.
    head = "".join(f"<th scope=col>{safe(name)}</th>" for name in ["run", *headings(summary, short=True)[1:]])
    body = ""
    for row in summary["rows"]:
        method = "" if row["title"] == row["name"] else f"<br><small>{safe(row['title'])}</small>"
        values = "".join(f'<td style="white-space:nowrap">{safe(cell)}</td>' for cell in cells(summary, row)[1:])
        body += f'<tr><th scope=row><div style="min-width:9em">{safe(name_of(summary, row))}{method}</div></th>{values}</tr>'
    seeds = len(summary["seeds"])
    caption = (
        ("Mean ± sample standard deviation over the seeds. " if seeds > 1 else "One seed: how far seeds lie apart is not known. ")
        + f"Attacks: {'; '.join(summary['attacks'])}. s/epoch: the median epoch of stage 1, without its validation. Training: "
        f"all epochs of both stages, without validation and evaluation. Peak memory: the most that a run took{summary['memory']}."
    )
    lost = "".join(finding(text, alarm=True) for text in failures(summary))
    return section(
        "Results",
        lost + figure(f'<div style="overflow-x:auto"><table style="font-size:.8rem">{head}{body}</table></div>', caption),
    )


def _plots(summary: dict[str, Any], finished: list[Row], out: Path) -> str:
    from fastanchor.evaluate.compare_plots import Entry, accuracy_against_time, robust_against_clean

    attack = plotted_attack(summary["attacks"])
    short = attack.partition(" (")[0]
    entries = [
        Entry(clean_text(row["name"]), row["clean"]["values"], row["robust"][attack]["values"], row["training_seconds"]["values"])
        for row in finished
    ]
    drawn = robust_against_clean(entries, short), accuracy_against_time(entries, short)
    for name, drawing in zip(PLOTS, drawn, strict=True):
        (out / f"compare-{name}.png").write_bytes(drawing.png)
    best = max(finished, key=lambda row: row["robust"][attack]["mean"])
    words = (
        f"Most robust under {short}: {best['name']}, {_accuracy(best['robust'][attack])} % at {_accuracy(best['clean'])} % clean."
    )
    dots = "a small marker is a seed, the large one their mean" if len(summary["seeds"]) > 1 else "one seed"
    captions = (
        f"Robust accuracy under {attack} against clean accuracy; {dots}. How to read it: up and to the right is better on both; "
        "methods on a line that falls trade one for the other.",
        f"Clean accuracy (hollow) and robust accuracy under {attack} (filled) at the time that the training took in all; "
        f"{dots}. How to read it: of two methods at one height the left one is the cheaper; a line is as long as what the attack "
        "costs.",
    )
    bodies = "".join(figure(drawing.svg, caption) for drawing, caption in zip(drawn, captions, strict=True))
    return section("Accuracy, robustness, time", finding(words) + bodies)


def plotted_attack(attacks: list[str]) -> str:
    """The attack that the figures show: AutoAttack where it is among them, else that of the most steps, the first of such."""

    def rank(name: str) -> int:
        steps = name.partition(" (")[0].rpartition("-")[2]
        return 1_000_000 if name.startswith("AutoAttack") else int(steps) if steps.isdigit() else 1

    return max(attacks, key=rank)


def _notes(summary: dict[str, Any]) -> str:
    if not summary["notes"]:
        return section("What differs", "<p>Beside the methods themselves, nothing that is checked: data, augmentation, network, "
                       "attack, schedule and batch size are the same in all runs.</p>")  # fmt: skip
    listed = "".join(f"<li>{safe(note)}</li>" for note in summary["notes"])
    return section("What differs", f"<p>Beside the methods themselves, these are not the same in all runs:</p><ul>{listed}</ul>")


def _runs(summary: dict[str, Any], links: dict[str, str]) -> str:
    items = []
    for row in summary["rows"]:
        paths = [*zip(row["seeds"], row["runs"], strict=True), *((lost["seed"], lost["run"]) for lost in row["failed"])]
        for seed, path in sorted(paths):
            report = f': <a href="{safe(quote(links[path]))}">report</a>' if path in links else ""
            items.append(f"<li>{safe(row['name'])}, seed {seed}: <code>{safe(path)}</code>{report}</li>")
    again = safe(summary["environment"]["command"])
    return section(
        "Runs", f"<p>Each has its own folder with configuration, metrics, checkpoints and report.</p><ul>{''.join(items)}</ul>"
        f"<p>The comparison was made by</p><pre>{again}</pre>",
    )  # fmt: skip


def _accuracy(value: Row) -> str:
    spread = f" ± {value['std']:.2f}" if value["std"] is not None else ""
    return f"{value['mean']:.2f}{spread}"


def _percent(name: str) -> str:
    kind, bracket, rest = name.partition(" (")
    return f"{kind} %{bracket}{rest}"
