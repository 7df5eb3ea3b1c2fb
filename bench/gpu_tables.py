"""The results of a GPU run as tables for people, what matters most last: a terminal, or a log that is cut, keeps the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from bench.peers import tables as peer_tables
from bench.results import Results, shown
from fastanchor.ceilings import PASSED, WHY_PASSED, share_text

Row = dict

TRAINING = ("epoch", "loss", "val_clean", "val_robust", "seconds", "images_per_s", "share_of_bf16_matmul", "peak_memory_mb")
CORRECTNESS = (
    "method", "bn", "objective", "precision", "robust_percent", "points", "ok", "differing_percent",
    "differing_percent_from_eager", "weights_largest_difference", "moved", "logits_relative", "gradient_relative",
)  # fmt: skip
EPOCHS = (
    "method", "batch", "precision", "graph", "compile", "images", "seconds", "images_per_s", "model_tflops",
    "share_of_bf16_matmul",
)  # fmt: skip
SUPCON = (
    "case", "regime", "n", "d", "precision", "loss_relative", "gradient_relative", "eager_gradient_relative",
    "keys_gradient_relative", "same", "same_in_poisoned_memory", "poisoned", "peak_memory_mb", "dense_matrix_mb", "ok",
)  # fmt: skip
METHODS = (
    "batch", "graph", "ms", "cost", "flops_ratio", "extrapolated_s_per_epoch", "share_of_bf16_matmul",
    "peak_memory_mb", "first_step_s",
)  # fmt: skip
REFRESH = ("how", "dtype", "ms", "ratio", "gb_per_s")
SMALL = ("what", "ms", "ratio", "gb_per_s", "share_of_copy", "largest_difference", "ok")
DATA = ("how", "batch", "ms", "images_per_s", "ratio", "cost_percent")
CEILINGS = ("device", "bf16_matmul_tflops", "fp32_matmul_tflops", "copy_gb_per_s", "cudnn_benchmark")


def show(results: Results, console: Console) -> None:
    """All tables for which there is a result, and the errors."""
    peer_tables.show([row for row in results.rows("peers") if "error" not in row], console)
    for made in _tables(results):
        if made is not None:
            console.print(made)
    if any(shown(key, value) == PASSED for row in results.found["results"] for key, value in row.items()):
        console.print(WHY_PASSED, highlight=False)
    parts = ", ".join(f"{name}: {end['status']} ({end['seconds']:.0f} s)" for name, end in results.found["parts"].items())
    failed = [row for row in results.found["results"] if "error" in row]
    console.print(f"{parts}; {len(failed)} failed results", highlight=False)
    for row in failed:
        last = row["error"].strip().splitlines()[-1][:300]
        console.print(f"failed: {row['part']}: {row['name']}: {last}", highlight=False, markup=False)


def _tables(results: Results) -> Iterator[Table | None]:
    share = "share of the bf16 matmul ceiling"
    yield _pivot(f"convolutions: us, {share}", results.rows("convs"), _layer, _name, _conv_cell)
    yield _list("input pipelines: alone, and the PGD-AT step that they feed", results.rows("data"), DATA)
    yield _list("step of every method: cost over PGD-AT's, and what that would be by FLOPs", results.rows("methods"), METHODS)
    yield _list("refresh of the folded weights", results.rows("refresh"), REFRESH)
    yield _list("training", results.rows("training"), TRAINING)
    yield _list("small kernels: device time, x eager, share of the copy ceiling", results.rows("small"), SMALL)
    yield _list("SupCon kernels: distance from fp64, eager's beside it", _worst(results.rows("supcon")), SUPCON)
    yield _list("compute-sanitizer", results.rows("sanitizer"), ("ok", "exit_code"))
    yield _pivot(
        "SupCon, loss and gradient: ms, x eager, share of the floor, peak MB; * device time alone",
        results.rows("supcon_speed"), _size, _name, _supcon_cell,
    )  # fmt: skip
    yield _list("kernels", results.rows("kernels"), ("what", "batch", "kernels", "launches"))
    yield _list("correctness", results.rows("correctness"), CORRECTNESS)
    for benchmark in (False, True):
        note = ", cudnn.benchmark on" if benchmark else ""
        rows = [row for row in results.found["results"] if row.get("cudnn_benchmark") == benchmark]
        attack = [row for row in rows if row["part"] == "attack"]
        epochs = [row for row in rows if row["name"] == "timed epoch"]
        steps = [row for row in rows if row["part"] == "steps" and row["name"] != "timed epoch"]
        yield _pivot(f"attack alone{note}: ms, x naive, {share}", attack, _name, _case, _cell)
        yield _pivot(
            f"whole step{note}: s/epoch extrapolated to 50,000 images, x naive, {share}", steps, _name, _case, _step_cell
        )
        yield _list(f"timed epochs{note}", epochs, EPOCHS)
    yield _list("ceilings", results.rows("environment"), CEILINGS)


def _worst(rows: list[Row]) -> list[Row]:
    """Of the truth's own checks those that failed; of the kernels' all."""
    return [row for row in rows if row["name"] != "truth in blocks" or not row.get("ok")]


def _size(row: Row) -> str:
    return f"{row['n']} x {row['d']}"


def _supcon_cell(row: Row) -> str:
    replayed = "replay_ms" in row
    ms, ratio = (row["replay_ms"], row.get("replay_ratio")) if replayed else (row["ms"], row.get("ratio"))
    share = f" {share_text(row['share_of_floor'])}" if "share_of_floor" in row else ""
    memory = f" {row['peak_memory_mb']:.0f}MB" if row.get("peak_memory_mb") is not None else ""
    return f"{ms:.3g}{'*' * replayed}{'' if ratio is None else f' {ratio:.2f}x'}{share}{memory}"


def _name(row: Row) -> str:
    return row["name"]


def _layer(row: Row) -> str:
    return f"{row['channels']}->{row['out_channels']}@{row['pixels']} {row['dtype']} {row['batch']}"


def _case(row: Row) -> str:
    return f"{row.get('method', row.get('precision'))} {row['batch']}"


def _conv_cell(row: Row) -> str:
    return f"{1e3 * row['ms']:.1f} {share_text(row['share_of_bf16_matmul'])}"


def _cell(row: Row) -> str:
    ratio = f" {row['ratio']:.2f}x" if "ratio" in row else ""
    return f"{row['ms']:.2f}{ratio} {share_text(row['share_of_bf16_matmul'])}"


def _step_cell(row: Row) -> str:
    ratio = f" {row['ratio']:.2f}x" if "ratio" in row else ""
    return f"{row['extrapolated_s_per_epoch']:.2f}{ratio} {share_text(row['share_of_bf16_matmul'])}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _pivot(
    title: str, rows: list[Row], index: Callable[[Row], str], column: Callable[[Row], str], cell: Callable[[Row], str]
) -> Table | None:
    """A table of cells; None where there is nothing. Of several results for one cell, as of naive, the first is shown."""
    rows = [row for row in rows if "ms" in row]
    if not rows:
        return None
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        cells.setdefault((index(row), column(row)), cell(row))
    columns = list(dict.fromkeys(column(row) for row in rows))
    table = _table(title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name in dict.fromkeys(index(row) for row in rows):
        table.add_row(name, *(cells.get((name, other), "") for other in columns))
    return table


def _list(title: str, rows: list[Row], keys: tuple[str, ...]) -> Table | None:
    rows = [row for row in rows if any(key in row for key in keys) and "left_out" not in row and "error" not in row]
    keys = tuple(key for key in keys if any(key in row for row in rows))
    if not rows:
        return None
    table = _table(title)
    for key in ("name", *keys):
        table.add_column(key.replace("_", " "))
    for row in rows:
        table.add_row(*(shown(key, row.get(key, "")) for key in ("name", *keys)))
    return table
