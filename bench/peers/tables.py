"""The results of the peers as a table for people: each comparison by itself, the peer first; then what was left out or failed."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict
COLUMNS = ("", "ms a batch", "images/s", "x the peer")


def show(rows: list[Row], console: Console) -> None:
    """rows: of part "peers", of peers.json or gpu.json."""
    table = Table(
        *COLUMNS, title="peers: ms of one batch, median (range); ratio within each round", box=box.SIMPLE, title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        if "ms" in row:
            first = row["name"] == row["peer"]
            if first:
                table.add_section()
            low, high = row["ms_range"]
            ratio = "" if first else f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})"
            name = f"{row['name']} [{row['what']}, batch {row['batch']}]" if first else f"  {row['name']}"
            table.add_row(name, f"{row['ms']:.4g} ({low:.4g} to {high:.4g})", f"{row['images_per_s']:.4g}", ratio)
    if table.rows:
        console.print(table, markup=False)
    for row in rows:
        if "ms" in row and row.get("reason"):
            _line(console, row, f"no ratio: {row['reason']}")
        for kind in ("warning", "left_out"):
            if kind in row:
                _line(console, row, f"{kind.replace('_', ' ')}: {row[kind]}")
        if "error" in row:
            _line(console, row, f"failed: {row['error'].strip().splitlines()[-1][:300]}")


def _line(console: Console, row: Row, text: str) -> None:
    console.print(f"{row['name']}: {text}", highlight=False, markup=False)
