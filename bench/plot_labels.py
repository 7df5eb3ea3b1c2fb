"""Labels of a log-log plane that keep apart: each beside its point, none over another, a line to it where it is further away."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastanchor.evaluate.figures import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT, LARGER = 7.0, 7.5
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels
# Points: half a marker with its rim; how near points are that get their labels in one column; from where on a label needs a line.
MARKER, NEAR, FAR = 4.0, (13.0, 10.0), 9.0


def write(
    figure: Figure, ax: Axes, points: Sequence[Any], colors: dict[str, str], roofs: Sequence[tuple[str, float]],
    slant: tuple[str, float],
) -> None:  # fmt: skip
    """Write the ceilings' labels on their lines, then each point's `label`, in the colour of its `series`, where there is room.

    roofs: (label, y) of the flat lines, which end at the right edge; slant: (label, y / x) of the one that they begin at. Nothing
    of the figure may change afterwards.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # from here on nothing moves
    renderer = canvas.get_renderer()
    page = _Page(ax, renderer, figure.dpi / 72, roofs, slant)
    for cluster in _clusters(points, page):
        texts = [
            ax.annotate(point.label, (point.x, point.y), xytext=(0, 0), textcoords="offset points", ha="center", va="center",
                        fontsize=FONT, color=colors[point.series], zorder=5)
            for point in cluster
        ]  # fmt: skip
        sizes = [(box.width / 2, box.height / 2) for box in (text.get_window_extent(renderer) for text in texts)]
        places = (_single if len(cluster) == 1 else _columns)([page.at[id(point)] for point in cluster], sizes, page.scale)
        best = min(places, key=lambda place: page.cost(cluster, *place))[1]
        for point, text, box in zip(cluster, texts, best, strict=True):
            page.put(point, text, box)


class _Page:
    """What is taken already. at: a point's pixels by its id; scale: pixels a point of text."""

    def __init__(
        self, ax: Axes, renderer: Any, scale: float, roofs: Sequence[tuple[str, float]], slant: tuple[str, float]
    ):  # fmt: skip
        self.ax, self.scale = ax, scale
        self.at: dict[int, tuple[float, float]] = {}
        self.inside: Box = tuple(ax.get_window_extent(renderer).extents)
        self.taken: list[Box] = []
        left, right = ax.get_xlim()
        (name, bandwidth), highest = slant, max(rate for _, rate in roofs)
        self.lines = [self._pixels((left, bandwidth * left), (highest / bandwidth, highest))]
        self.lines += [self._pixels((rate / bandwidth, rate), (right, rate)) for _, rate in roofs]
        # The highest above its line, others below theirs: two ceilings may be close.
        texts = [
            ax.annotate(label, (right, rate), xytext=(-2, 2 if rate == highest else -3), textcoords="offset points", ha="right",
                        va="bottom" if rate == highest else "top", fontsize=LARGER, color=INK)
            for label, rate in roofs
        ]  # fmt: skip
        x0, y0, x1, y1 = self.lines[0]
        texts.append(
            ax.annotate(name, (left, bandwidth * left), xytext=(12, 16), textcoords="offset points", rotation_mode="anchor",
                        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), fontsize=LARGER, color=INK)
        )  # fmt: skip
        self.taken += [tuple(text.get_window_extent(renderer).extents) for text in texts]

    def _pixels(self, a: tuple[float, float], b: tuple[float, float]) -> Box:
        (x0, y0), (x1, y1) = self.ax.transData.transform([a, b])
        return x0, y0, x1, y1

    def add(self, point: Any) -> None:
        """A marker: no label may cover it."""
        x, y = self.at[id(point)] = tuple(self.ax.transData.transform((point.x, point.y)))
        half = MARKER * self.scale
        self.taken.append((x - half, y - half, x + half, y + half))

    def cost(self, cluster: Sequence[Any], distance: float, boxes: Sequence[Box]) -> float:
        """Of labels at `distance`. Over something: never where there is another place. On a ceiling's line: better than far away,
        worse than beside it. As near to a point of others as to its own: whose label it is would be a guess."""
        own = {id(point) for point in cluster}
        cost = distance
        for point, box in zip(cluster, boxes, strict=True):
            cost += 1000 * sum(_overlap(box, other) for other in self.taken) + 1000 * (not _within(box, self.inside))
            cost += 25 * sum(_crosses(box, line) for line in self.lines)
            nearest = _gap(box, self.at[id(point)]) + 5 * self.scale
            cost += 12 * sum(_gap(box, at) < nearest for key, at in self.at.items() if key not in own)
        return cost

    def put(self, point: Any, text: Any, box: Box) -> None:
        """Move a label to its place, with a line to its point where it is not beside it."""
        self.taken.append(box)
        x, y = self.at[id(point)]
        text.set_position((((box[0] + box[2]) / 2 - x) / self.scale, ((box[1] + box[3]) / 2 - y) / self.scale))
        if _gap(box, (x, y)) > FAR * self.scale:
            edge = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            end = edge if box[0] <= x <= box[2] else (edge[0], (box[1] + box[3]) / 2)
            offset = [(there - here) / self.scale for there, here in zip(end, (x, y), strict=True)]
            self.ax.annotate("", (point.x, point.y), xytext=offset, textcoords="offset points", zorder=2,
                             arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 4})  # fmt: skip


def _clusters(points: Sequence[Any], page: _Page) -> list[list[Any]]:
    """Points that nearly touch, together, from the top down; those alone, which have more room, last."""
    for point in points:
        page.add(point)
    left, found = list(points), []
    while left:
        cluster, grown = [left.pop()], True
        while grown:
            grown = [p for p in left if any(_near(page.at[id(p)], page.at[id(q)], page.scale) for q in cluster)]
            cluster += grown
            left = [p for p in left if p not in grown]
        found.append(sorted(cluster, key=lambda p: -p.y))
    return sorted(found, key=lambda cluster: (-len(cluster), -cluster[0].y))


def _near(a: Sequence[float], b: Sequence[float], scale: float) -> bool:
    return abs(a[0] - b[0]) < NEAR[0] * scale and abs(a[1] - b[1]) < NEAR[1] * scale


Place = tuple[float, list[Box]]


def _single(at: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], scale: float) -> Iterator[Place]:
    """Around the point, nearer before further."""
    ((x, y),), ((width, height),) = at, sizes
    for distance, turn in itertools.product((9, 14, 22, 32, 44, 58, 74, 92), range(16)):
        along, up = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
        # A label above its point stands in its middle, one to the right begins there.
        middle = x + along * distance * scale + width * _sign(along), y + 0.8 * up * distance * scale + height * _sign(up)
        yield distance, [_box(middle, (width, height))]


def _columns(at: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], scale: float) -> Iterator[Place]:
    """One column right or left of all the points, in their order from the top, at their heights where these are apart enough."""
    step = 2 * max(height for _, height in sizes) + 3
    for distance, side, lift in itertools.product((14, 24, 36, 50, 66, 84), (1, -1), (0, 1, -1, 2, -2, 3, -3)):
        edge = (max if side > 0 else min)(x for x, _ in at) + side * distance * scale
        top = sum(y for _, y in at) / len(at) + step * (len(at) - 1) / 2 + lift * step
        boxes = [
            _box((edge + side * width, top - i * step), (width, height)) for i, (width, height) in enumerate(sizes)
        ]  # fmt: skip
        yield distance + 4 * abs(lift) + (side < 0), boxes


def _box(middle: tuple[float, float], half: tuple[float, float]) -> Box:
    (x, y), (width, height) = middle, half
    return x - width - 1, y - height - 1, x + width + 1, y + height + 1


def _sign(value: float) -> float:
    """-1 or 1, and in between near 0."""
    return max(-1.0, min(1.0, 2.5 * value))


def _gap(box: Box, at: Sequence[float]) -> float:
    """Pixels between a point and a box."""
    return math.hypot(max(box[0] - at[0], 0, at[0] - box[2]), max(box[1] - at[1], 0, at[1] - box[3]))


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _within(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _crosses(box: Box, line: Box, steps: int = 60) -> bool:
    """A few pixels of the box's rim may touch the line: it is sampled."""
    xs = ((line[0] + (line[2] - line[0]) * i / steps, line[1] + (line[3] - line[1]) * i / steps) for i in range(steps + 1))
    return any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in xs)
