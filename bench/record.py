"""Keep what was measured: files of bench/ with their logs, figures and a README become bench/records/<date>_<NAME>/.

    python -m bench.record NAME FILE... [--log FILE...] [--note TEXT] [--into DIR] [--allow-dirty] [--date YYYY-MM-DD]

The files are validated, must be of one device, and of committed source. Built beside its place and then renamed: a record is
there whole, or not at all, and none is ever overwritten. Exit status 0, or 2 with a sentence.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from bench import plot_read, plots, program, record_text, schema
from bench.plot_read import Run
from fastanchor.errors import UserError
from fastanchor.files import make_folder

RECORDS = Path(__file__).parent / "records"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
README = "README.md"


def make(
    name: str, files: Sequence[Path], *, logs: Sequence[Path] = (), note: str = "", into: Path = RECORDS,
    allow_dirty: bool = False, day: str | None = None,
) -> Path:  # fmt: skip
    """Write the record and return its folder; UserError, and nothing written, where it cannot be one.

    day: YYYY-MM-DD, for files none of which says when it was made; else the date is the newest that one says.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r}: the name of a record has letters, digits, '.', '_' and '-' and begins with a letter or digit")
    runs = [plot_read.read(path) for path in files]
    _check_names([*files, *logs])
    _check_device(runs)
    _check_commit(runs, allow_dirty)
    target = into / f"{_date(runs, day)}_{name}"
    if os.path.lexists(target):
        raise UserError(f"{target}: there is such a record already, and none is overwritten")
    make_folder(into)
    building = None
    try:
        building = Path(tempfile.mkdtemp(prefix=".record-", dir=into))
        _write(building, name, runs, logs, note)
        building.chmod(0o755)  # mkdtemp's is for its owner alone
        building.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
    return target


def _check_names(paths: Sequence[Path]) -> None:
    """All lie in one folder afterwards, figures begin with a file's stem, and one file is the README."""
    seen: dict[str, Path] = {}
    for path in paths:
        if not NAME.fullmatch(path.name) or path.name.lower() == README.lower():
            raise UserError(f"{path}: {path.name!r} is no name for a file of a record")
        for taken in (path.name, path.stem) if path.suffix == ".json" else (path.name,):
            if taken in seen:
                raise UserError(f"{path} and {seen[taken]}: have the same name, and one record cannot hold both")
            seen[taken] = path


def _check_device(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs:
        if run.device is None:
            raise UserError(f"{run.path}: does not name its device: keep the part `environment` of the run")
        if run.device != first.device:
            raise UserError(f"{first.path} is of {first.device}, {run.path} of {run.device}: a record is of one device")


def _check_commit(runs: Sequence[Run], allow_dirty: bool) -> None:
    for run in runs:
        if run.commit and run.commit.endswith("+") and not allow_dirty:
            raise UserError(
                f"{run.path}: its source had changes beyond commit {run.commit[:-1]}; commit them and measure again, or "
                "--allow-dirty says so in the record"
            )


def _date(runs: Sequence[Run], day: str | None) -> str:
    """YYYY-MM-DD: the newest day that a file says, as it says it; `day` where none does."""
    said = [run.started[:10] for run in runs if run.started]
    if day is not None and said:
        raise UserError(f"--date {day}: the files say themselves when they were made: {max(said)}")
    chosen = max(said) if said else day
    if chosen is None:
        raise UserError("none of the files says when it was made: --date YYYY-MM-DD")
    try:
        return date.fromisoformat(chosen).isoformat()
    except ValueError:
        raise UserError(f"{chosen!r} is no date: must be YYYY-MM-DD") from None


def _hosts(runs: Sequence[Run]) -> list[str]:
    """Names of hosts that are taken out: this machine's, and those that the files give in `machine_info.node`.

    A name of letters alone, such as "vm", is kept: it tells nothing, and may be a word of a log.
    """
    nodes = {platform.node(), *(run.found.get("machine_info", {}).get("node") for run in runs)}
    return sorted((node for node in nodes if node and not node.isalpha()), key=len, reverse=True)


def _write(folder: Path, name: str, given: Sequence[Run], logs: Sequence[Path], note: str) -> None:
    """Copies, figures and README.md into an empty folder: all of them from what is public of the runs."""
    hosts = _hosts(given)
    changed: list[str] = []
    runs = []
    for run in given:
        info = run.found.get("machine_info")
        found = {**run.found, "machine_info": {k: v for k, v in info.items() if k != "node"}} if info else run.found
        if info and "node" in info:
            changed.append(f"`{run.path.name}`: the host's name (`machine_info.node`) is taken out.")
        kept = record_text.public(found, hosts)
        schema.validate(kept)
        changed += _told(run.path.name, found, hosts)
        said = {key: record_text.public(value, hosts) for key, value in vars(run).items() if key not in ("path", "found")}
        runs.append(dataclasses.replace(run, found=kept, **said))
        (folder / run.path.name).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for log in logs:
        try:
            text = log.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{log}: cannot be read ({error.strerror})") from None
        changed += _told(log.name, text, hosts)
        (folder / log.name).write_text(record_text.public(text, hosts), encoding="utf-8")
    figures: dict[str, list[tuple[str, str]]] = {}
    missing: list[str] = []
    for run in runs:
        drawn, lacking = plots.write(run, folder)
        for made, paths in drawn:
            for path in paths:
                if path.suffix != ".svg":
                    path.unlink()
            figures.setdefault(run.path.name, []).append((made.title, paths[0].name))
        missing += [line.replace(str(run.path), f"`{run.path.name}`") for line in lacking]
    note = record_text.public(note, hosts)
    text = record_text.readme(name.replace("-", " "), runs, figures, missing, [log.name for log in logs], note, changed)
    (folder / README).write_text(text, encoding="utf-8")


def _told(name: str, value: Any, hosts: Sequence[str]) -> list[str]:
    """What `public` alters in a file, as a sentence; none where that is nothing."""
    without_paths = record_text.public(value)
    said = ["absolute paths are cut to their last part"] if without_paths != value else []
    said += ["the host's name is replaced"] if record_text.public(value, hosts) != without_paths else []
    return [f"`{name}`: {', '.join(said)}."] if said else []


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.record", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", metavar="NAME", help="of the record, after the date: h100-attack")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON that bench/ wrote")
    parser.add_argument(
        "--log", nargs="+", action="extend", type=Path, default=[], metavar="FILE", help="raw logs, kept beside them"
    )
    parser.add_argument("--note", default="", metavar="TEXT", help="what a reader should know; stands at the top of the README")
    parser.add_argument("--into", type=Path, default=RECORDS, metavar="DIR", help="default: bench/records")
    parser.add_argument(
        "--allow-dirty", action="store_true", help="keep files of source with uncommitted changes; the README says so"
    )
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="for files that do not say when they were made")
    args = parser.parse_args(arguments)
    try:
        made = make(
            args.name, args.files, logs=args.log, note=args.note, into=args.into, allow_dirty=args.allow_dirty, day=args.date
        )  # fmt: skip
    except UserError as error:
        print(f"bench.record: {error}", file=sys.stderr)
        return 2
    print(f"{made}: {', '.join(sorted(path.name for path in made.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(program.run("bench.record", main))
