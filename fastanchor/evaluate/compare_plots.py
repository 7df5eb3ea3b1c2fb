"""The figures of a comparison: robust against clean accuracy, and both against training time; as SVG for a page and as PNG.

A seed is a small dot and the mean over seeds a large one. Each method is named once, beside its points and over no other.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastanchor.evaluate.figures import HALO, INK, LIGHT, MUTED, SETTINGS, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (5.4, 3.9)  # inches of 72 units
PNG_DPI = 200
MARKERS = "os^DvP"
# Points: diameter of a mean's and a seed's marker, size of the labels, from where on a label needs a line.
LARGE, SMALL, FONT, FAR = 6.5, 3.2, 8.5, 12
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


@dataclass(frozen=True)
class Entry:
    """A method: its label, and a value a seed of clean and robust accuracy (percent) and of training time (seconds)."""

    label: str
    clean: Sequence[float]
    robust: Sequence[float]
    seconds: Sequence[float]


@dataclass(frozen=True)
class Drawing:
    """A figure as an inline <svg> element that follows the page's theme, and as the bytes of a PNG on the light page."""

    svg: str
    png: bytes


def robust_against_clean(entries: Sequence[Entry], attack: str) -> Drawing:
    """One point a method: clean accuracy to the right, robust accuracy under `attack` upwards."""

    def draw(ax: Axes) -> list[_Group]:
        groups = []
        for entry, color, marker in _styled(entries):
            mean = _mean(entry.clean), _mean(entry.robust)
            seeds = list(zip(entry.clean, entry.robust, strict=True)) if len(entry.clean) > 1 else []
            _points(ax, [mean], seeds, color, marker)
            groups.append(_Group(entry.label, color, [mean], seeds))
        ax.set(xlabel="clean accuracy (%)", ylabel=f"robust accuracy (%), {attack}")
        ax.grid(True, axis="x")
        ax.autoscale_view()
        for limits, put in ((ax.get_xlim(), ax.set_xlim), (ax.get_ylim(), ax.set_ylim)):
            put(max(0.0, limits[0]), min(100.0, limits[1]))
        return groups

    return _drawn(draw, "Robust against clean accuracy")


def accuracy_against_time(entries: Sequence[Entry], attack: str) -> Drawing:
    """Two points a method at its training time: clean accuracy, a ring, and robust accuracy under `attack`, a filled marker."""
    scale, unit = time_unit(max(second for entry in entries for second in entry.seconds))

    def draw(ax: Axes) -> list[_Group]:
        groups = []
        for entry, color, marker in _styled(entries):
            times = [second / scale for second in entry.seconds]
            ends, seeds = [], []
            for values, filled in ((entry.robust, True), (entry.clean, False)):
                mean = _mean(times), _mean(values)
                each = list(zip(times, values, strict=True)) if len(values) > 1 else []
                _points(ax, [mean], each, color, marker, filled)
                ends.append(mean)
                seeds += each
            ax.plot(*zip(*ends, strict=True), color=color, lw=0.8, alpha=0.55, zorder=1)
            groups.append(_Group(entry.label, color, ends, seeds))
        ax.set(xlabel=f"training time in all ({unit})", ylabel="accuracy (%)")
        ax.set_xlim(left=0)
        ax.set_ylim(0, 100)
        ax.grid(True, axis="x")
        _legend(ax, attack)
        return groups

    return _drawn(draw, "Accuracy against training time")


def time_unit(longest: float) -> tuple[float, str]:
    """Seconds in a unit that suits times up to `longest` seconds, and its name."""
    return (1.0, "s") if longest < 180 else (60.0, "min") if longest < 3 * 3600 else (3600.0, "h")


@dataclass(frozen=True)
class _Group:
    """What carries one label: the label may stand at any of `points`; `seeds` are only to be kept free."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    seeds: Sequence[tuple[float, float]]


def _styled(entries: Sequence[Entry]) -> list[tuple[Entry, str, str]]:
    return [(entry, LIGHT[f"class{i % 10}"], MARKERS[i % len(MARKERS)]) for i, entry in enumerate(entries)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _points(ax: Axes, means, seeds, color: str, marker: str, filled: bool = True) -> None:
    style = {"ls": "none", "marker": marker, "mec": color, "mfc": color if filled else LIGHT["page"], "clip_on": False}
    ax.plot(*zip(*means, strict=True), ms=LARGE, mew=1.2, zorder=4, **style)
    if seeds:
        ax.plot(*zip(*seeds, strict=True), ms=SMALL, mew=0.7, zorder=3, alpha=0.7, **style)


def _legend(ax: Axes, attack: str) -> None:
    """Above the axes: what is filled and what is hollow."""
    for x, text, filled in ((0.012, f"robust: {attack}", True), (0.5, "clean", False)):
        ax.plot(x, 1.045, "o", ms=LARGE - 1, mec=INK, mfc=INK if filled else LIGHT["page"], mew=1.2, transform=ax.transAxes,
                clip_on=False)  # fmt: skip
        ax.annotate(text, (x, 1.045), xycoords="axes fraction", xytext=(7, 0), textcoords="offset points", va="center",
                    color=MUTED, fontsize=8, annotation_clip=False)  # fmt: skip


def _drawn(draw: Callable[[Axes], list[_Group]], name: str) -> Drawing:
    page = {"figure.facecolor": LIGHT["page"], "savefig.facecolor": LIGHT["page"], "figure.dpi": 72}
    buffers = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({**SETTINGS, "grid.linewidth": 0.5}):
        figure = Figure(figsize=SIZE, dpi=72, layout="constrained")
        ax = figure.add_subplot()
        ax.margins(0.12)
        _label(figure, ax, draw(ax))
        figure.savefig(buffers[0], format="svg", metadata={"Date": None})
    with matplotlib.rc_context({**SETTINGS, **page}):
        figure.savefig(buffers[1], format="png", dpi=PNG_DPI, facecolor=LIGHT["page"], metadata={"Software": None})
    return Drawing(inline(buffers[0].getvalue(), name), buffers[1].getvalue())


def _label(figure: Figure, ax: Axes, groups: Sequence[_Group]) -> None:
    """Write every group's label where there is most room, with a line to its point where that is far off."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # from here on nothing moves
    renderer, scale = canvas.get_renderer(), figure.dpi / 72
    texts = [
        ax.annotate(group.label, group.points[0], xytext=(0, 0), textcoords="offset points", ha="center", va="center",
                    fontsize=FONT, color=group.color, zorder=6, gid=HALO, annotation_clip=False)
        for group in groups
    ]  # fmt: skip
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = [(extent.width / 2 + 1.5, extent.height / 2) for extent in extents]
    pixels, seeds = (
        [[tuple(ax.transData.transform(point)) for point in found] for found in ways]
        for ways in ([group.points for group in groups], [group.seeds for group in groups])
    )
    frame = tuple(ax.get_window_extent(renderer).extents)
    for group, text, (distance, box, at), found in zip(groups, texts, _arranged(pixels, seeds, sizes, frame, scale), pixels,
                                                       strict=True):  # fmt: skip
        text.xy = group.points[found.index(at)]
        text.set_position((((box[0] + box[2]) / 2 - at[0]) / scale, ((box[1] + box[3]) / 2 - at[1]) / scale))
        if distance > FAR:
            offset = [(there - here) / scale for there, here in zip(_edge(box, at), at, strict=True)]
            ax.annotate("", text.xy, xytext=offset, textcoords="offset points", zorder=2, annotation_clip=False,
                        arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 4})  # fmt: skip


Place = tuple[float, Box, tuple[float, float]]  # distance in points, the label's box, the point that it belongs to


def _arranged(pixels: list, seeds: list, sizes: list, frame: Box, scale: float, rounds: int = 4) -> list[Place]:
    """A place for every label. Each is put where it costs least beside all others, and again a few times: greedy alone, those
    that come last have no room. No randomness: the same comparison gives the same figure."""
    markers = [_around(at, LARGE / 2 + 1) for found in pixels for at in found]
    markers += [_around(at, SMALL / 2 + 0.5) for found in seeds for at in found]
    lines = [(*found[0], *found[-1]) for found in pixels if len(found) > 1]
    strangers = [[at for j, found in enumerate(pixels) if j != i for at in found] for i in range(len(pixels))]

    def crowd(i: int) -> float:
        return sum(1 / (20 + min(math.dist(at, other) for at in pixels[i])) for other in strangers[i])

    order = sorted(range(len(pixels)), key=crowd, reverse=True)
    places: dict[int, Place] = {}
    for i in order * rounds:
        others = [places[j] for j in places if j != i]
        candidates = ((distance, box, at) for at in pixels[i] for distance, box in _around_point(at, sizes[i], scale))
        places[i] = min(candidates, key=lambda place: _cost(place, markers, others, strangers[i], lines, frame))
    return [places[i] for i in range(len(pixels))]


def _around_point(at: tuple[float, float], half: tuple[float, float], scale: float) -> Iterator[tuple[float, Box]]:
    """(distance in points, box) around a point, nearer before further."""
    for distance, turn in itertools.product((7, 11, 17, 25, 36, 50, 68, 90), range(16)):
        along, up = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
        # A label above its point stands in its middle, one to the right begins there.
        lean = [max(-1.0, min(1.0, 2.5 * value)) for value in (along, up)]
        x = at[0] + along * distance * scale + half[0] * lean[0]
        y = at[1] + up * distance * scale + half[1] * lean[1]
        yield distance, (x - half[0], y - half[1], x + half[0], y + half[1])


def _cost(place: Place, markers: Sequence[Box], others: Sequence[Place], strangers: Sequence[tuple[float, float]],
          lines: Sequence[Box], frame: Box) -> float:  # fmt: skip
    """Over something, outside of the axes, or with its line through another label: only where there is no other place. Nearer to
    another's point than to its own: whose is it? lines: upright, from a group's first point to its last; better crossed than
    far away, worse than beside."""
    distance, box, at = place
    cost = distance + 1000.0 * sum(_overlap(box, other) for other in markers)
    cost += 1000.0 * sum(_overlap(box, other) for _, other, _ in others)
    cost += 1000.0 * (box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3])
    if distance > FAR:
        cost += 300.0 * sum(_crosses(_edge(box, at), at, other) for _, other, _ in others)
    cost += 300.0 * sum(_crosses(_edge(other, to), to, box) for far, other, to in others if far > FAR)
    cost += 20 * sum(box[0] < x < box[2] and box[1] < max(a, b) and box[3] > min(a, b) for x, a, _, b in lines)
    own = _gap(box, at)
    return cost + 30 * sum(_gap(box, other) < own + 4 for other in strangers)


def _edge(box: Box, at: tuple[float, float]) -> tuple[float, float]:
    """The place of a box that is nearest to a point."""
    return min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])


def _crosses(a: tuple[float, float], b: tuple[float, float], box: Box, steps: int = 24) -> bool:
    """Whether the line from a to b meets the box: sampled, boxes are some pixels high."""
    points = ((a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps) for i in range(steps + 1))
    return any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in points)


def _around(at: tuple[float, float], half: float) -> Box:
    return at[0] - half, at[1] - half, at[0] + half, at[1] + half


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _gap(box: Box, at: tuple[float, float]) -> float:
    """Pixels between a box and a point."""
    return math.hypot(max(box[0] - at[0], 0, at[0] - box[2]), max(box[1] - at[1], 0, at[1] - box[3]))
