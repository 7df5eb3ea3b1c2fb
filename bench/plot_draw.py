"""How the figures of bench/ look: rows of dots with whiskers, log-log planes with labels that keep apart, captions, SVG and PNG.

Palette and settings are the report's (fastanchor.evaluate.figures), on a white page, for a paper or a README.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import plot_labels
from fastanchor.evaluate import figures
from fastanchor.evaluate.figures import GRID, INK, LIGHT, MUTED
from fastanchor.files import make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2  # inches; at 700 pixels the smallest text is some 9 pixels high
PNG_DPI = 200
SMALL, TINY = 7.5, 7.0
# Colour and marker of a series: either is enough to tell them apart.
STYLES = [
    (LIGHT["clean"], "o"), (LIGHT["robust"], "s"), (LIGHT["accent"], "^"), (LIGHT["class4"], "D"), (LIGHT["class7"], "v"),
    (LIGHT["class9"], "P"),
]  # fmt: skip
# Values that reach further than this, greatest over least, stand on a logarithmic axis; others on one that starts at 0.
LOG_FROM = 10.0


@dataclass(frozen=True)
class Dot:
    """value with its least and greatest (None: no range known). hollow: not measured, or not ours; the caption says which."""

    value: float
    low: float | None = None
    high: float | None = None
    series: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """Rows of dots under one title: {name of the row: its dots}."""

    title: str
    rows: dict[str, list[Dot]]


@dataclass(frozen=True)
class Line:
    """A vertical line that values are read against; the axis says what it is."""

    x: float
    label: str


@dataclass(frozen=True)
class Point:
    """A point of a log-log plane. series decides colour and marker; hollow as of a Dot."""

    x: float
    y: float
    label: str
    series: str
    hollow: bool = False


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings while a figure is made and saved. UserError where matplotlib is missing."""
    figures.require_matplotlib()
    import matplotlib

    page = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), LIGHT["page"])
    with matplotlib.rc_context({**figures.SETTINGS, **page}):
        yield


def dots(panels: Sequence[Panel], *, title: str, xlabel: str, caption: str, line: Line | None = None) -> Figure:
    """Panels one below the other on one axis, a row a name, values beside the dots; within `style()`.

    The axis starts at 0, or is logarithmic where the values (of line too) reach over more than LOG_FROM.
    """
    series = list(dict.fromkeys(dot.series for panel in panels for row in panel.rows.values() for dot in row))
    heights = [0.16 + 0.14 * len(_title(panel)) + sum(_row_height(*row) for row in panel.rows.items()) for panel in panels]
    figure, top, bottom = _page(sum(heights) + 0.35, title, caption, legend=len(series) > 1)
    figure.get_layout_engine().set(rect=(0, bottom, 1, top - bottom), hspace=0.02)
    drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    values = [x for p in panels for row in p.rows.values() for d in row for x in (d.value, d.low, d.high) if x is not None]
    values += [line.x] if line else []
    log = max(values) > LOG_FROM * min(values)
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(series)}
    for ax, panel in zip(drawn, panels, strict=True):
        _draw_rows(ax, panel, styles)
        ax.set_title("\n".join(_title(panel)), pad=5)
        ax.tick_params(labelbottom=True)
        if line:
            ax.axvline(line.x, color=INK, lw=0.9, ls=(0, (3, 2)), zorder=1)
    if log:
        drawn[0].set_xscale("log")
        # Room for the value beside the greatest.
        reach = max(values) / min(values)
        drawn[0].set_xlim(min(values) / reach**0.04, max(values) * reach**0.16)
        _plain_log(drawn[0].xaxis)
    else:
        drawn[0].set_xlim(0, 1.14 * max(values))
    said = [xlabel, *(["logarithmic axis"] if log else []), *([f"dashed: {line.label}"] if line else [])]
    drawn[-1].set_xlabel(", ".join(said))
    if len(series) > 1:
        _legend(figure, [(name, *styles[name], False) for name in series], top)
    return figure


def _title(panel: Panel) -> list[str]:
    return textwrap.wrap(panel.title, 66)


def _name(name: str) -> list[str]:
    return textwrap.wrap(name, 40, break_on_hyphens=False)


def _row_height(name: str, row: list[Dot]) -> float:
    """Inches."""
    return 0.09 + 0.145 * max(len(row), 1.3, len(_name(name)))


def _draw_rows(ax: Axes, panel: Panel, styles: dict[str, tuple[str, str]]) -> None:
    """y runs in inches downwards, so that rows of many dots get more room."""
    y, ticks = 0.0, []
    for name, row in panel.rows.items():
        height = _row_height(name, row)
        ticks.append(y + height / 2)
        for i, dot in enumerate(row):
            place = y + height / 2 + 0.145 * (i - (len(row) - 1) / 2)
            color, marker = styles[dot.series]
            if dot.low is not None and dot.high is not None:
                ax.plot([dot.low, dot.high], [place, place], color=color, lw=1.3, ls=":" if dot.hollow else "-", zorder=2)
            face = LIGHT["page"] if dot.hollow else color
            ax.plot([dot.value], [place], ls="", marker=marker, ms=4.6, color=color, mfc=face, mew=1.1, zorder=3)
            # On a patch of the page's colour: grid and line behind it stay out of the number.
            ax.annotate(number(dot.value), (dot.high or dot.value, place), xytext=(6, 0), textcoords="offset points", va="center",
                        fontsize=SMALL, color=INK, bbox={"fc": LIGHT["page"], "ec": "none", "pad": 0.8}, zorder=1.5)  # fmt: skip
        y += height
    ax.set_yticks(ticks, ["\n".join(_name(name)) for name in panel.rows], color=INK, fontsize=SMALL)
    ax.set_ylim(y, 0)
    ax.grid(axis="y", visible=False)


def plane(points: Sequence[Point], roofs: Sequence[tuple[str, float]], bandwidth: float, *, title: str, caption: str) -> Figure:
    """A roofline: FLOP/s over FLOP per byte, both logarithmic, within `style()`.

    roofs: (label, FLOP/s) of the flat ceilings; bandwidth: B/s of the slanted one. Every point is labelled beside it, with a
    line where the label had to go further away; labels overlap neither each other nor points.
    """
    figure, top, bottom = _page(4.4, title, caption, legend=True)
    figure.get_layout_engine().set(rect=(0, bottom, 1, top - bottom))
    ax = figure.add_subplot()
    highest = max(rate for _, rate in roofs)
    left = min(min(p.x for p in points), 0.5 * min(rate for _, rate in roofs) / bandwidth) / 2
    right = 4 * max(max(p.x for p in points), highest / bandwidth)
    lowest = min(min(p.y for p in points), bandwidth * left)
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest / 2, 3 * max(highest, *(p.y for p in points))))
    ax.plot([left, highest / bandwidth], [bandwidth * left, highest], color=INK, lw=1.2, zorder=1)
    for _, rate in roofs:
        ax.plot([rate / bandwidth, right], [rate, rate], color=INK, lw=1.2, zorder=1)
    series = sorted({point.series for point in points})  # bf16 and fp32 look the same in every figure
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(series)}
    for point in points:
        color, marker = styles[point.series]
        ax.plot([point.x], [point.y], ls="", marker=marker, ms=5.2, color=color, mew=1.2, zorder=3,
                mfc=LIGHT["page"] if point.hollow else color)  # fmt: skip
    ax.set(xlabel="FLOP per byte that has to be moved", ylabel="FLOP/s")
    ax.grid(which="major", color=GRID)
    for axis, unit in ((ax.xaxis, ""), (ax.yaxis, "FLOP/s")):
        _plain_log(axis, unit)
    pairs = list(dict.fromkeys((point.series, point.hollow) for point in points))
    both = {name for name, hollow in pairs if hollow and (name, False) in pairs}
    named = [
        (f"{name}: not the engine's" if hollow and name in both else name, *styles[name], hollow)
        for name, hollow in sorted(pairs, key=lambda pair: pair[1])
    ]
    _legend(figure, named, top)
    colors = {name: color for name, (color, _) in styles.items()}
    plot_labels.write(
        figure,
        ax,
        points,
        colors,
        [(f"{label} {si(rate)}FLOP/s", rate) for label, rate in roofs],
        (f"copy {si(bandwidth)}B/s", bandwidth),
    )
    return figure


def _page(height: float, title: str, caption: str, *, legend: bool) -> tuple[Figure, float, float]:
    """An empty figure with title and caption, and the shares of its height between which there is room."""
    from matplotlib.figure import Figure

    lines = textwrap.wrap(caption, 128)
    above, below = 0.32 + 0.2 * legend, 0.12 + 0.135 * len(lines)
    whole = height + above + below
    figure = Figure(figsize=(WIDTH, whole), dpi=100, layout="constrained")
    figure.text(0.012, 1 - 0.08 / whole, title, va="top", fontsize=11, weight="bold", color=INK)
    figure.text(0.012, 0.05 / whole, "\n".join(lines), va="bottom", fontsize=TINY, color=MUTED, linespacing=1.35, gid="caption")
    return figure, 1 - above / whole, below / whole


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str, bool]], top: float) -> None:
    """(name, colour, marker, hollow) in one row under the title."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", marker=marker, ms=5, color=color, mew=1.2, mfc=LIGHT["page"] if hollow else color, label=name)
        for name, color, marker, hollow in entries
    ]
    legend = figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, top), ncols=len(handles), frameon=False,
                           fontsize=SMALL, handletextpad=0.1, columnspacing=1.2, borderaxespad=0.1)  # fmt: skip
    legend.set_in_layout(False)


def _plain_log(axis: Any, unit: str = "") -> None:
    """Ticks of a logarithmic axis as people read them: 0.5, 20, or 2 T with a unit; labels at 1, 2 and 5 where there is room."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=40))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(lambda value, _: si(value) if unit else f"{value:g}")


def si(value: float) -> str:
    """A number before its unit: 395 G, 3.35 T."""
    for size, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size * (1 - 1e-9):
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g} "


def number(value: float) -> str:
    """Three digits or two decimals, no exponent: 0.0135, 0.78, 4.31, 12.3, 325."""
    if not value:
        return "0"
    digits = math.floor(math.log10(abs(value)))
    return f"{value:.{2 if -1 <= digits < 1 else max(0, 2 - digits)}f}"


# --- files ---------------------------------------------------------------------------------------------------------------------


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.svg and STEM.png, within `style()`; the same bytes for the same figure."""
    make_folder(stem.parent)
    svg, png = (stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png"))
    figure.savefig(svg, format="svg", metadata={"Date": None})
    # Where the font is missing a browser would take one with serifs.
    text = svg.read_text(encoding="utf-8").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    svg.write_text(text, encoding="utf-8")
    figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return [svg, png]
