"""The report's figures, drawn by matplotlib as inline SVG; colours are CSS variables and follow the page's theme.

Each function returns a complete `<svg>` element. matplotlib's global state stays as it is: no pyplot, settings in a context.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastanchor.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colour-blind safe palette, as (light theme, dark theme). The light ones all differ, since a colour in a figure is
# recognised by its value: the classes' blue is one off the blue of clean accuracy.
PALETTE = {
    "ink": ("#22252a", "#e6e6e3"),
    "muted": ("#6a6f76", "#a0a4a9"),
    "grid": ("#e3e3df", "#33373d"),
    "page": ("#fffffe", "#16181b"),
    "clean": ("#0072b2", "#56b4e9"),
    "robust": ("#d55e00", "#f0953f"),
    "accent": ("#009e73", "#2fc79c"),
    "class0": ("#0072b3", "#4aa3dc"),
    "class1": ("#e69f00", "#e69f00"),
    "class2": ("#009e74", "#1fbf92"),
    "class3": ("#d55e01", "#e8702a"),
    "class4": ("#cc79a7", "#dc94bd"),
    "class5": ("#56b4e9", "#8fd0f5"),
    "class6": ("#a89b00", "#f0e442"),
    "class7": ("#22252b", "#e6e6e4"),
    "class8": ("#8c8c8c", "#9a9a9a"),
    "class9": ("#7a4b2a", "#b98a66"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
INK, MUTED, GRID, CLEAN, ROBUST, ACCENT = (LIGHT[name] for name in ("ink", "muted", "grid", "clean", "robust", "accent"))
HALO = "halo"  # the id of texts that the page draws with an outline of its own colour

SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "fastanchor", "font.family": ["DejaVu Sans"], "font.size": 8.5,
    "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 3,
    "ytick.major.size": 0, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.titlecolor": INK, "lines.linewidth": 1.7, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "lines.solid_capstyle": "round", "text.parse_math": False,
}  # fmt: skip


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError('figures need matplotlib: pip install "fastanchor[plots]"') from None


@dataclass(frozen=True)
class Line:
    """A curve: x, y, its direct label, its colour, and whether it is dashed (training) or solid (validation)."""

    x: Sequence[float]
    y: Sequence[float]
    label: str
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a label at its top."""

    x: float
    label: str


def curves(lines: Sequence[Line], *, title: str, xlabel: str, ylabel: str, name: str, percent: bool = True, log: bool = False,
           marks: Sequence[Mark] = (), xlim: tuple[float, float] | None = None, shade: tuple[float, str] | None = None,
           rings: Sequence[tuple[float, float]] = (), dots: bool = False,
           size: tuple[float, float] = (3.75, 2.6)) -> str:  # fmt: skip
    """Curves with direct labels at their right ends. percent: the y axis runs from 0 to 100. log: logarithmic y axis.

    shade: the region right of an x is shaded and named. rings: points to mark. dots: every point is drawn; else x is whole
    epochs. size: in inches of 72 units.
    """
    with _figure(size, name) as (ax, done):
        for line in lines:
            marker = "o" if dots or len(line.x) < 3 else None
            dash = (0, (4, 2)) if line.dashed else "-"
            ax.plot(line.x, line.y, color=line.color, ls=dash, marker=marker, ms=3.5, clip_on=False)
        if percent:
            ax.set_ylim(0, 100)
        elif log:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            ax.set_ylim(bottom=min(0.0, *(np.nanmin(line.y) for line in lines)))
        low, high = xlim or (min(min(line.x) for line in lines), max(max(line.x) for line in lines))
        ax.set_xlim(*((low, high) if low < high else (low - 1, high + 1)))
        if not dots:
            ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        if shade is not None:
            ax.axvspan(shade[0], ax.get_xlim()[1], color=GRID, alpha=0.55, lw=0, zorder=0)
            ax.annotate(shade[1], (shade[0], 0), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
                        color=MUTED, fontsize=7.5)  # fmt: skip
        for mark in marks:
            ax.axvline(mark.x, color=MUTED, lw=0.8, ls=(0, (1, 1.5)), zorder=1)
        for ring in rings:
            ax.plot(*ring, "o", ms=7, mfc="none", mec=INK, mew=1.2, clip_on=False, zorder=5)
        ax.set_title(title, pad=18 if marks else 8)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        _label_marks(ax, marks)
        _label_ends(ax, lines)
        return done()


def class_bars(
    names: Sequence[str], clean: Sequence[float | None], robust: Sequence[float], *, gap_after: int | None, name: str
) -> str:
    """Horizontal bars of clean and robust accuracy (percent) a class, top to bottom. gap_after: a gap below so many rows."""
    rows = len(names)
    with _figure((4.2, 0.75 + 0.27 * (rows + (gap_after is not None))), name) as (ax, done):
        y = np.array([i + (gap_after is not None and i >= gap_after) for i in range(rows)], dtype=float)
        ax.barh(y - 0.19, [value or 0 for value in clean], 0.34, color=CLEAN)
        ax.barh(y + 0.19, robust, 0.34, color=ROBUST)
        for where, value in zip(y, robust, strict=True):
            ax.text(value + 1, where + 0.2, f"{value:.0f}", va="center", fontsize=7.5, color=ROBUST, gid=HALO)
        if gap_after is not None:
            ax.text(0, gap_after, "  ⋮", va="center", color=MUTED)
        ax.set_yticks(y, [_short(text) for text in names], color=INK)
        ax.grid(axis="y", visible=False)
        ax.set_ylim(y[-1] + 0.6, -0.6)
        ax.set_xlim(0, 100)
        ax.set_xlabel("accuracy (%)")
        return done()


VIEW_MARKERS = {"clean": "o", "augmented": "^", "adversarial": "x"}


def scatter_map(points: np.ndarray, labels: np.ndarray, views: Sequence[str], class_names: dict[int, str], *, name: str) -> str:
    """points (V * N, 2) of labels (N,) in V views: colour is the class (those in class_names, at most 10), marker the view."""
    low, high = points.min(axis=0), points.max(axis=0)
    middle, reach = (low + high) / 2, 0.54 * np.maximum(high - low, 1e-6)
    with _figure((4.8, 4.8 * float(np.clip(reach[1] / reach[0], 0.6, 1.1))), name) as (ax, done):
        colours = {label: LIGHT[f"class{i}"] for i, label in enumerate(class_names)}
        parts = points.reshape(len(views), len(labels), 2)
        for view, part in zip(views, parts, strict=True):
            for label, color in colours.items():
                here = part[labels == label]
                style = {"c": color}
                if view != "adversarial":
                    style = {"facecolors": color if view == "clean" else "none", "edgecolors": color}
                ax.scatter(here[:, 0], here[:, 1], s=13, marker=VIEW_MARKERS[view], linewidths=0.8, alpha=0.85, **style)
        for label, text in class_names.items():
            place = np.median(parts[0][labels == label], axis=0)
            ax.text(*place, _short(text), color=INK, ha="center", va="center", weight="bold", fontsize=9.5, gid=HALO, zorder=9)
        limits = np.stack([middle - reach, middle + reach])
        ax.set(xticks=[], yticks=[], xlim=limits[:, 0], ylim=limits[:, 1])
        ax.set_aspect("equal")
        ax.spines[:].set_visible(False)
        return done()


@contextmanager
def _figure(size: tuple[float, float], name: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes of a new figure, and the function that turns it into an <svg> element called `name`."""
    import matplotlib
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context(SETTINGS):
        # Names of classes may need glyphs that matplotlib's own font lacks; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size, dpi=72, layout="constrained")

        def done() -> str:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            return inline(buffer.getvalue(), name)

        yield figure.add_subplot(), done


def _label_marks(ax: Axes, marks: Sequence[Mark]) -> None:
    low, high = ax.get_xlim()
    for mark in marks:
        share = (mark.x - low) / (high - low)
        align = "left" if share < 0.25 else "right" if share > 0.75 else "center"
        ax.annotate(mark.label, (mark.x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                    ha=align, va="bottom", color=MUTED, fontsize=7.5)  # fmt: skip


def _label_ends(ax: Axes, lines: Sequence[Line]) -> None:
    """Labels right of the curves' last points, pushed apart where they would overlap."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return
    ends = ax.transAxes.inverted().transform(ax.transData.transform([(line.x[-1], line.y[-1]) for line in lines]))[:, 1]
    gap = 0.075
    order = np.argsort(ends)
    places = ends[order].clip(0, 1)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places -= max(0.0, places[-1] - 1)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    for place, index in zip(places, order, strict=True):
        ax.annotate(lines[index].label, (1, place), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points",
                    va="center", color=lines[index].color, fontsize=8, annotation_clip=False)  # fmt: skip


def _short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def inline(svg: bytes, name: str) -> str:
    """A matplotlib SVG made fit for a page: no namespaces, metadata or style sheet; ids of its own; colours as CSS variables."""
    root = ElementTree.fromstring(svg)
    variables = {colour: f"var(--{key})" for key, colour in LIGHT.items()}
    referenced = set(re.findall(rb'(?:href="#|url\(#)([^")]+)', svg))
    prefix = re.sub(r"\W+", "-", name)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {}
        for key, value in element.attrib.items():
            key = key.rpartition("}")[2]
            if key == "id":
                if value == HALO:
                    key = "class"
                elif value.encode() in referenced:
                    value = f"{prefix}-{value}"
                else:
                    continue
            elif key == "href" and value.startswith("#"):
                value = f"#{prefix}-{value[1:]}"
            elif key in ("style", "clip-path"):
                value = value.replace("url(#", f"url(#{prefix}-").replace("'DejaVu Sans'", "system-ui, sans-serif")
                value = re.sub(r"#[0-9a-f]{6}", lambda match: variables.get(match[0], match[0]), value)
            attributes[key] = value
        element.attrib.clear()
        element.attrib.update(attributes)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    # Texts are set in 8 to 9.5 units: enlarged by half at most, they stay in proportion to the page's.
    root.set("style", f"max-width:{1.45 * float(root.attrib['viewBox'].split()[2]):.0f}px")
    root.attrib |= {"role": "img", "aria-label": name}
    return ElementTree.tostring(root, encoding="unicode")
