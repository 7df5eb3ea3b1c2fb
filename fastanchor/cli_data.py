"""`fastanchor data`: what prepares data sets for training. So far `data pack`, see `data.pack`."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

from fastanchor.data.files import shown
from fastanchor.errors import UserError, did_you_mean

ACTIONS = ("pack",)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SMALLEST_SHARD, LARGEST_SHARD = 1_000, 100_000_000_000  # bytes
SECONDS_A_LINE = 5  # between two lines of progress where there is no terminal


def add_data(commands, name: str) -> None:
    """Add `data` with its sub-commands to what argparse's add_subparsers gave."""
    parser = commands.add_parser(name, help="prepare data sets: pack a folder", allow_abbrev=False)

    class Strict(type(parser)):  # the parent's parser has errors of one line
        """Refuses what it does not know itself, so that its own help is named; the outermost parser would name its own."""

        def parse_known_args(self, args=None, namespace=None):
            found, unknown = super().parse_known_args(args, namespace)
            if unknown:
                self.error(f"unrecognized arguments: {' '.join(unknown)}")
            return found, unknown

    actions = parser.add_subparsers(dest="action", metavar=" | ".join(ACTIONS), required=True, parser_class=Strict)
    _add_pack(actions)


def _add_pack(actions) -> None:
    parser = actions.add_parser(
        "pack", allow_abbrev=False, help="an image folder becomes a few large files",
        usage="fastanchor data pack SOURCE --out DIR [--image-size N] [--as auto|uint8|jpeg] [--shard-size 256MB]\n"
              "       [--classes FILE] [--labels FILE] [--skip-broken]",
        description="Packs an image folder into a few large files with checksums, which read at disk speed as --data packed:DIR. "
                    "Every file is decoded once: broken files, and the same picture under two classes, are named. "
                    "Killed or interrupted, the same command goes on where it stopped.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="folder:PATH, or the path alone")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to pack into, new or empty, or begun by this command")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="side in pixels: pixels are stored so; of files, training makes it"
    )
    parser.add_argument("--as", dest="kind", choices=("auto", "uint8", "jpeg"), default="auto",
                        help="uint8: pixels, .npy; jpeg: the files' bytes, unchanged, in tar files that WebDataset and DALI read "
                             "too; auto (default): uint8 up to 64x64")  # fmt: skip
    parser.add_argument("--shard-size", default="256MB", metavar="SIZE", help="bytes a file, such as 64MB or 1GB (default 256MB)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="pack these class folders only, one a line, in this order")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="CSV of file,class to check the folder against")
    parser.add_argument("--skip-broken", action="store_true", help="leave out broken and mislabelled files, and say which")
    parser.set_defaults(run=_pack)


def _pack(arguments, _settings) -> int:
    from fastanchor.data.pack import pack
    from fastanchor.data.packplan import Options

    options = Options(
        arguments.kind, arguments.image_size, parse_size(arguments.shard_size), arguments.classes, arguments.labels,
        arguments.skip_broken,
    )  # fmt: skip
    progress = Progress()
    out = Path(arguments.out)
    try:
        manifest = pack(parse_source(arguments.source), out, options, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing is lost: the same command goes on") from None
    _print_packed(manifest, out, progress)
    return 0


def parse_source(text: str) -> Path:
    """The folder of `folder:PATH`, or of a path alone. UserError for any other data source."""
    from fastanchor.data.sources import SOURCES

    kinds = [known.partition(":")[0] for known in SOURCES]
    kind, colon, path = text.strip().partition(":")
    if colon and kind == "folder":
        if not path:
            raise UserError(f"SOURCE is {text!r} and names no path, and must be folder:PATH")
        return Path(path).expanduser()
    place = Path(text).expanduser()
    if not place.is_dir() and kind in kinds:
        raise UserError(f"SOURCE is {text!r}, and only an image folder can be packed: folder:PATH")
    if not place.is_dir() and colon and (hint := did_you_mean(kind, ["folder"], cutoff=0.7)):
        raise UserError(f"SOURCE is {text!r}, and must be folder:PATH or the path of an image folder{hint}")
    return place


def parse_size(text: str) -> int:
    """Bytes of a size such as `256MB`. UserError."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([A-Za-z]*)", text.strip())
    size = int(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0
    if not SMALLEST_SHARD <= size <= LARGEST_SHARD:
        raise UserError(f"--shard-size is {text!r}, and must be a size from 1KB to 100GB, such as 256MB")
    return size


class Progress:
    """The `pack.Report` of the command line: a live bar on a terminal, now and then a line everywhere else."""

    def __init__(self, console=None):
        from fastanchor.train.progress import Reporter

        self.reporter = Reporter(console)
        self._bar = None

    def say(self, text: str) -> None:
        """One line."""
        self.reporter.say(text)

    def begin(self, files: int) -> None:
        """So many files are to come."""
        from rich import progress

        self._files, self._done, self._new, self._bytes = files, 0, 0, 0
        self._start = self._said = time.monotonic()
        if self.reporter.console.is_terminal:
            columns = (progress.TextColumn("packing"), progress.BarColumn(), progress.MofNCompleteColumn(),
                       progress.TextColumn("{task.fields[speed]}"), progress.TimeRemainingColumn())  # fmt: skip
            self._bar = progress.Progress(*columns, console=self.reporter.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("packing", total=files, speed="")

    def advance(self, files: int, size: int, kept: bool = False) -> None:
        """So many are done, of `size` bytes together; `kept`: by an earlier command, which says nothing of the speed."""
        self._done += files
        if not kept:
            self._new += files
            self._bytes += size
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, speed=self._speed(now))
        elif now - self._said >= SECONDS_A_LINE and self._done < self._files:
            self._said = now
            rest = (self._files - self._done) * (now - self._start) / max(1, self._new)
            self.say(f"{self._done:,} of {self._files:,} files  {self._speed(now)}  about {rest:,.0f} s to go")

    def end(self) -> None:
        """Take the bar away; a line on the whole where it came to its end."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._done == self._files:
            now = time.monotonic()
            if kept := self._done - self._new:
                self.say(f"{kept:,} files were packed before, into shards that are whole")
            if self._new:
                self.say(f"{self._new:,} files  {self._speed(now)}  {now - self._start:,.1f} s")

    def _speed(self, now: float) -> str:
        return f"{self._bytes / 1e6:,.1f} MB  {self._new / max(now - self._start, 1e-3):,.0f} images/s"


def _print_packed(manifest: dict[str, Any], out: Path, progress: Progress) -> None:
    """What is in the packed folder, what is not, and how to use it."""
    from rich.table import Table

    for note in manifest["notes"]:
        progress.say(f"note: {note}")
    what = "uint8 pixels of {}x{}".format(*manifest["shape"]) if manifest["kind"] == "uint8" else "files' bytes, unchanged"
    progress.say(f"{shown(out)}: {len(manifest['class_names'])} classes, {what}")
    table = Table("split", "images", "shards", "MB")
    for split, part in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in part["shards"])
        table.add_row(split, f"{part['images']:,}", f"{len(part['shards']):,}", f"{size / 1e6:,.1f}")
    progress.reporter.console.print(table, highlight=False)
    place = shlex.quote(f"packed:{out}").encode("utf-8", "backslashreplace").decode()
    progress.say(f"use it: fastanchor train anchor --data {place}")
