"""`fastanchor doctor`: its flags and its table."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def add_doctor(commands, name: str) -> None:
    """The command."""
    parser = commands.add_parser(name, help="versions, devices, backends and why", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.set_defaults(run=_doctor)


def _doctor(arguments, _settings) -> int:
    from fastanchor.doctor import diagnose

    found = diagnose()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    console = Console(highlight=False)
    console.print(f"fastanchor {found['fastanchor']} ({found['commit'] or 'installed copy'}), Python {found['python']}, "
                  f"torch {found['packages']['torch']}, CUDA {found['cuda'] or 'none'}", markup=False)  # fmt: skip
    for line in found["devices"]:
        console.print(f"  {line}", markup=False)
    table = Table("part", "backend", "why")
    for row in found["backends"]:
        table.add_row(row["part"], row["backend"], escape(row["why"]))
    console.print(table)
    for row in found["optional"]:
        state = "installed" if row["installed"] else f"missing: {row['get']}"
        console.print(f"  {row['package']} ({row['use']}): {state}", markup=False)
    return 0
