"""Rooflines: FLOP/s over FLOP per byte beneath the two ceilings that the same run has measured; and bytes/s beside a copy.

FLOPs and bytes of attack and step are bench.cost's count of the engine's operators, also for the naive code, which does more: a
point's height is what the algorithm needs over the time that was taken. Of a kernel they are what it must compute and move.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from bench import cases, cost, cost_count, plot_draw, plots
from bench.plot_draw import Dot, Line, Panel, Point
from bench.plot_read import Row, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTED = "FLOPs and bytes: counted by bench.cost for the engine's operators, also where other code ran, which does more"
KERNELS = "FLOPs and bytes: those that cannot be avoided"
SAME_FUNCTION = "hard SupCon"
Found = Iterator[tuple[str, str, "Figure"] | str]


def draw(run: Run) -> Found:
    """(name, title, figure) of every roofline that the file has the data for, and a sentence where it lacks some."""
    if run.kind not in ("bench.gpu", "bench.ladder", "make bench"):
        return
    if not run.ceilings:
        yield f"{run.path}: no roofline: the file holds no ceilings of its device"
        return
    if run.kind == "bench.ladder":
        for number, (title, rows) in enumerate(run.found["ladders"].items(), 1):
            points = list(_ladder_points(run, title, rows))
            yield _roofline(run, f"roofline-{number}", f"Roofline: {title}", points, _size(run, run.sizes["batch"]), COUNTED)
    elif run.kind == "make bench":
        points = list(_bench_points(run))
        if points:
            yield _roofline(run, "roofline", "Roofline: attack and whole step", points, _size(run, run.sizes["batch"]), COUNTED)
        else:
            yield f"{run.path}: no roofline: no attack or whole step was measured"
    else:
        yield from _gpu(run)


def _gpu(run: Run) -> Found:
    points, batch = _step_points(run)
    if points:
        title = "Roofline: attack and whole step"
        yield _roofline(run, "roofline-steps", title, points, _size(run, batch), COUNTED, _tf32(run))
    else:
        yield f"{run.path}: no roofline of attack and step: it has no measured row of the parts attack and steps"
    points, d = _supcon_points(run.rows("supcon_speed"))
    if points:
        title, said = "Roofline: the contrastive loss with its gradient", f"D {d}; 6 N N D FLOPs"
        yield _roofline(run, "roofline-supcon", title, points, said, "device time where it was replayed", KERNELS)
    else:
        yield f"{run.path}: no roofline of the contrastive loss: it has no measured row of the part supcon_speed"
    points, batch = _conv_points(run.rows("convs"))
    if points:
        title, said = "Roofline: convolutions of the folded network", f"3 x 3, batch {batch}, bf16"
        yield _roofline(run, "roofline-convs", title, points, said, "of each layer the quickest way", KERNELS)
    else:
        yield f"{run.path}: no roofline of convolutions: it has no measured row of the part convs"
    rows = [row for row in run.rows("small") if "gb_per_s" in row]
    if rows:
        yield _bandwidth(run, rows)
    else:
        yield f"{run.path}: no bandwidth of the small kernels: it has no measured row of the part small"


def _roofline(run: Run, name: str, title: str, points: list[Point], *said: str) -> tuple[str, str, Figure]:
    bf16, fp32, copy = (run.ceilings[key] for key in ("bf16_matmul", "fp32_matmul", "copy_bandwidth"))
    roofs = [("bf16 matmul", bf16), ("fp32 matmul", fp32)]
    caption = run.caption(*said, "ceilings: measured in the same run")
    return name, title, plot_draw.plane(points, roofs, copy, title=title, caption=caption)


def _size(run: Run, batch: int) -> str:
    return f"ResNet-18 of width {run.sizes['width']}, {run.sizes['pixels']} x {run.sizes['pixels']} pixels, batch {batch}"


def _tf32(run: Run) -> str:
    machine = next(row for row in run.found["results"] if "about" in row)
    allowed = not run.cpu and "tf32" in (machine.get("fp32_of_convolutions"), machine.get("fp32_of_matmul"))
    return "fp32 code may use TF32, which the fp32 ceiling does not" if allowed else ""


# --- attack and whole step -----------------------------------------------------------------------------------------------------


def count(method: str | None, precision: str, steps: int, width: int, pixels: int, batch: int, gpu: bool) -> tuple[int, int]:
    """FLOPs and bytes of one training step of a method, or of the attack alone (None), as bench.cost counts them."""
    counted = _counted(method or "PGD-AT", precision, steps, width, pixels, batch, gpu)
    kept = [found for part, found in counted.items() if method or part.startswith(("attack", "folding"))]
    return sum(flops for flops, _ in kept), sum(moved for _, moved in kept)


@functools.cache
def _counted(
    method: str, precision: str, steps: int, width: int, pixels: int, batch: int, gpu: bool
) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) of every part of the step."""
    config = cases.make_config(cases.METHODS[method], steps, precision=precision)
    counted = cost_count.count_step(config, width=width, pixels=pixels, batch=batch, gpu=gpu)
    parts = {name: [found for found in counted if found[0] == name] for name in cost.PARTS}
    return {name: (sum(flops for _, flops, _ in found), sum(moved for _, _, moved in found)) for name, found in parts.items()}


def _point(
    run: Run, method: str | None, precision: str, batch: int, ms: float, label: str, *, hollow: bool, **other: int
) -> Point:
    steps = other.get("steps", run.sizes["steps"])
    flops, moved = count(method, precision, steps, run.sizes["width"], run.sizes["pixels"], batch, not run.cpu)
    return Point(flops / moved, 1e3 * flops / ms, label, precision, hollow)


def _ladder_points(run: Run, title: str, rows: list[Row]) -> Iterator[Point]:
    method = next((name for name in cases.METHODS if f", {name}," in title), None)
    steps = run.sizes["steps" if method is None else "train_steps"]
    precision = "fp32"
    for row in rows:
        naive = row["name"].startswith("naive")
        if row["name"].startswith("+ bf16"):
            precision = "bf16"  # and from here on
        used = ("bf16" if "bf16" in row["name"] else "fp32") if naive else precision
        yield _point(run, method, used, run.sizes["batch"], row["ms"], _stage(row["name"]), hollow=naive, steps=steps)


def _stage(name: str) -> str:
    return "second rung" if name.startswith("naive, bf16") else name.split(":")[0].split(" (")[0]


def _bench_points(run: Run) -> Iterator[Point]:
    seen = set()
    entries = [entry for entry in plots.naive_entries(run) if not entry["name"].startswith("test_epoch")]
    for entry in sorted(entries, key=lambda entry: plots.precision_of(entry) != "bf16"):
        info, precision, name = entry["extra_info"], plots.precision_of(entry), entry["name"]
        method = None if name.startswith("test_attack") else next(m for m in cases.METHODS if m in name)
        what = method or "attack"
        yield _point(run, method, precision, run.sizes["batch"], 1e3 * entry["stats"]["median"], what, hollow=False)
        for peer, used in (("naive", "fp32"), ("second_rung", "bf16")):
            if f"{peer}_median_s" in info and (what, peer) not in seen:
                seen.add((what, peer))
                label, ms = f"{what}, {peer.replace('_', ' ')}", 1e3 * info[f"{peer}_median_s"]
                yield _point(run, method, used, run.sizes["batch"], ms, label, hollow=True)


def _step_points(run: Run) -> tuple[list[Point], int]:
    """Naive code, second rung and the quickest of the engine's in each precision, at the batch where the engine is quickest."""
    rows = [row for row in run.rows("attack", "steps") if "ms_range" in row]
    ours = [row for row in rows if not row["name"].startswith(("naive", "second rung"))]
    if not ours:
        return [], 0
    batch = max(ours, key=lambda row: row["images_per_s"])["batch"]
    best: dict[tuple, Row] = {}
    for row in rows:
        if row["batch"] != batch:
            continue
        who = next((name for name in ("naive", "second rung") if row["name"].startswith(name)), "")
        precision = {"naive": "fp32", "second rung": "bf16"}.get(who) or row.get("precision") or _named_precision(row["name"])
        key = row.get("method"), who, precision
        if key not in best or row["ms"] < best[key]["ms"]:
            best[key] = row
    return [
        _point(run, method, precision, batch, row["ms"], f"{method or 'attack'}{who and f', {who}'}", hollow=bool(who))
        for (method, who, precision), row in best.items()
    ], batch


def _named_precision(name: str) -> str:
    return "fp32" if "fp32" in name else "bf16"


# --- kernels -------------------------------------------------------------------------------------------------------------------


def _supcon_points(rows: Iterable[Row]) -> tuple[list[Point], int]:
    """Ours in every precision, and the quickest of the others that compute the same, by N, at the D that has most rows."""
    rows = [row for row in rows if row["function"] == SAME_FUNCTION]
    if not rows:
        return [], 0
    widths = [row["d"] for row in rows]
    d = max(dict.fromkeys(widths), key=widths.count)
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row["d"] == d:
            key = (row["name"] if row["name"].startswith("ours") else "", row["n"])
            if key not in best or _device_ms(row) < _device_ms(best[key]):
                best[key] = row
    points = []
    for (ours, n), row in sorted(best.items(), key=lambda found: found[0][1]):
        flops, moved = cost.loss_work(n, d)
        said = f"{row['name'].removeprefix('ours, ')}, N {n}"
        series = "our kernels" if ours else "the quickest plain or compiled PyTorch"
        points.append(Point(flops / moved, 1e3 * flops / _device_ms(row), said, series, hollow=not ours))
    return points, d


def _device_ms(row: Row) -> float:
    return row.get("replay_ms", row["ms"])


def _conv_points(rows: Iterable[Row]) -> tuple[list[Point], int]:
    """Of every layer the quickest forward and the quickest to the input, at the first batch size."""
    rows = [row for row in rows if row["dtype"] == "bf16" and not row["name"].startswith("forward + residual")]
    if not rows:
        return [], 0
    batch, best = rows[0]["batch"], {}
    for row in rows:
        key = (
            "forward" if row["name"].startswith("forward") else "to the input",
            row["channels"],
            row["out_channels"],
            row["pixels"],
        )
        if row["batch"] == batch and (key not in best or row["ms"] < best[key]["ms"]):
            best[key] = row
    points = []
    for (way, channels, out, pixels), row in best.items():
        flops, moved = conv_work(batch, channels, out, pixels)
        said = f"{channels}, {pixels} px" if channels == out else f"{channels} to {out}, {pixels} px"
        points.append(Point(flops / moved, 1e3 * flops / row["ms"], said, f"{way} (channels, pixels a side)"))
    return points, batch


def conv_work(batch: int, channels: int, out_channels: int, pixels: int, itemsize: int = 2) -> tuple[int, int]:
    """FLOPs (2 a multiply-add) of a 3 x 3 convolution of stride 1, forward or to the input; bytes of input, weight, output."""
    flops = 18 * batch * channels * out_channels * pixels**2
    return flops, itemsize * (batch * pixels**2 * (channels + out_channels) + 9 * channels * out_channels)


def _bandwidth(run: Run, rows: list[Row]) -> tuple[str, str, Figure]:
    found: dict[str, dict[str, Dot]] = {}
    for row in rows:
        low, high = (row["gb_per_s"] * row["ms"] / ms for ms in reversed(row["ms_range"]))
        dot = Dot(row["gb_per_s"], low, high, series=row["name"], hollow=row["name"] != "kernel")
        found.setdefault(row["what"], {}).setdefault(row["name"], dot)
    title = "Small kernels: bandwidth beside a copy"
    copy = run.ceilings["copy_bandwidth"] / 1e9
    panel = Panel("device time from a cold cache", {what: list(dots.values()) for what, dots in found.items()})
    caption = run.caption("GB/s of the bytes that must be moved", "copy: measured in the same run", "hollow: no kernel of ours")
    line = Line(copy, f"a copy, {plot_draw.number(copy)} GB/s")
    return "bandwidth", title, plot_draw.dots([panel], title=title, xlabel="GB/s", caption=caption, line=line)
