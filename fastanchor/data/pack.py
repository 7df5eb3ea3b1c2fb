"""`fastanchor data pack`: an image folder becomes a few large files that read at disk speed, see `packed` for the reading.

What goes where is planned from the listing alone (`packplan`) and written shard by shard (`packshard`), so a killed command,
given again, keeps the shards that are whole and ends with the same bytes. Every file is decoded once, which finds the broken
ones, and hashed, which finds the same picture under two classes or in train and test. DIR/partial/ holds the state of the work;
the manifest is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastanchor import __version__
from fastanchor.data import packed
from fastanchor.data.files import present, reason, shown
from fastanchor.data.packplan import Options, Plan, counted, make_plan
from fastanchor.data.packshard import Report, kept_record, whole_file, write_shard, writing
from fastanchor.errors import UserError
from fastanchor.files import make_folder, write_text

SHOWN = 3  # of files that a sentence names


def pack(source: Path, out: Path, options: Options, report: Report) -> dict[str, Any]:
    """Pack the image folder `source` into `out`; returns the manifest. Given again it goes on, or checks what is packed.

    Raises UserError: for an unusable source or folder, and after all files were looked at for broken and mislabelled ones,
    unless options.skip_broken.
    """
    _check_place(source, out)
    report.say(f"listing {shown(source)}")
    plan = make_plan(source, options)
    with _claimed(out, plan) as finished:
        if finished:
            manifest = packed.read_manifest(out)
            packed.check_files(out, manifest)
            report.say(f"{shown(out)} is packed already, and each of its files has the checksum it was packed with")
        else:
            manifest = _pack(plan, out, options, report)
        for path in (out / "partial").glob("*"):
            path.unlink()
    with contextlib.suppress(FileNotFoundError):
        (out / "partial").rmdir()
    return manifest


def _pack(plan: Plan, out: Path, options: Options, report: Report) -> dict[str, Any]:
    report.say(
        f"packing {sum(len(part.paths) for part in plan.parts.values()):,} files of {len(plan.class_names)} classes as "
        + (f"uint8 pixels of {plan.size[0]}x{plan.size[1]}" if plan.pixels else "their bytes, unchanged,")
        + f" into {counted(len(plan.shards), 'shard')}"
    )
    report.begin(sum(len(shard.rows) for shard in plan.shards))
    try:
        records = []
        for shard in plan.shards:
            record = kept_record(plan, shard, out)
            if record:
                report.advance(len(shard.rows), int(plan.parts[shard.split].sizes[shard.rows].clip(0).sum()), kept=True)
            records.append(record or write_shard(plan, shard, out, set(), report))
    finally:
        report.end()
    same = _same_pictures(plan, records)
    notes = _judge(plan, records, same, out, options.skip_broken)
    doubtful = [{row for _, row in same.doubtful(shard.split)}.intersection(shard.rows.tolist()) for shard in plan.shards]
    again = [i for i, record in enumerate(records) if record["doubtful"] != sorted(doubtful[i])]
    if again:
        report.say(f"packing {counted(len(again), 'shard')} again without the mislabelled files")
    for i in again:
        records[i] = write_shard(plan, plan.shards[i], out, doubtful[i], None)
    return _finish(plan, records, same, notes, out)


def _check_place(source: Path, out: Path) -> None:
    """UserError where `out` can be told to be unusable without the listing of `source`, which may take minutes."""
    target = Path(os.path.realpath(out))
    if any(target.is_relative_to(os.path.realpath(path)) for path in (source, *(source / s for s in ("train", "test", "val")))):
        raise UserError(f"--out {shown(out)} lies in {shown(source)}, whose images are to be packed, and must lie outside")
    there = next((path for path in (out, *out.parents) if present(path)), None)
    if there and not there.is_dir():
        raise UserError(f"--out {shown(out)} cannot be a folder: {shown(there)} is a file")
    begun = present(out / packed.MANIFEST) or present(out / "partial" / "plan.json")
    others = sorted(path.name for path in out.iterdir() if path.name != "partial") if out.is_dir() and not begun else []
    if others:
        raise UserError(f"--out {shown(out)} is there and holds other things ({shown(others[0])}): it must be new or empty")


@contextlib.contextmanager
def _claimed(out: Path, plan: Plan) -> Iterator[bool]:
    """Hold the folder for this plan: new, empty, or begun or finished with the same one. Gives whether it is finished."""
    partial = out / "partial"
    if present(out / packed.MANIFEST) and not present(partial):
        _check_same(out / packed.MANIFEST, plan, out)
        yield True
        return
    earlier = next((path for path in (out / packed.MANIFEST, partial / "plan.json") if present(path)), None)
    if earlier is not None:
        _check_same(earlier, plan, out)
    make_folder(out)  # first, so that a refusal names the folder that was asked for
    make_folder(partial)
    with open(partial / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{shown(out)}: another command is packing into it") from None
        if earlier is None:
            with writing(partial / "plan.json"):
                write_text(partial / "plan.json", json.dumps(plan.described, indent=2) + "\n")
        yield present(out / packed.MANIFEST)


def _check_same(path: Path, plan: Plan, out: Path) -> None:
    """UserError with what differs where `path`, a plan or a manifest, was made with another plan."""
    try:
        made = json.loads(path.read_bytes())
        made = made["plan"] if path.name == packed.MANIFEST else made
        differing = [_difference(key, made[key], plan) for key in plan.described if made[key] != plan.described[key]]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{shown(path)} is none of a packed folder's ({reason(error)}), and --out must be new or empty") from None
    if differing:
        raise UserError(f"{shown(out)} was made from something else ({differing[0]}): choose another --out, or remove it")


def _difference(key: str, was: Any, plan: Plan) -> str:
    """What is not as it was, in words of the command line."""
    now = plan.described[key]
    if key == "size":
        how = f"--image-size {now[0]} makes" if plan.resized else "without --image-size they are"
        return "its images are {}x{}, and {} {}x{}".format(*was, how, *now)
    if key == "resized":
        return f"it was begun {'with' if was else 'without'} --image-size"
    if key == "shard_size":
        return f"--shard-size was {was:,} bytes and is {now:,}"
    if key in ("files", "listing"):
        return f"the files of {shown(plan.source)} have other names, sizes or classes now"
    return f"{key} was {was} and is {now}"


class Same(NamedTuple):
    """Pictures that occur more than once, byte for byte; a group is a list of (split, row) in the listing's order.

    mislabelled: groups under several classes; leaked: in train and in test, under one class; repeated: how many other copies.
    """

    mislabelled: list[list[tuple[str, int]]]
    leaked: list[list[tuple[str, int]]]
    repeated: int

    def doubtful(self, *splits: str) -> list[tuple[str, int]]:
        """The images of those splits whose label is in doubt, all copies: which of them is right cannot be told."""
        return [place for group in self.mislabelled for place in group if place[0] in splits]


def _same_pictures(plan: Plan, records: list[dict[str, Any]]) -> Same:
    places: list[tuple[str, int]] = []
    digests = []
    for shard, record in zip(plan.shards, records, strict=True):
        for row, digest in zip(shard.rows.tolist(), record["digests"], strict=True):
            if digest:
                places.append((shard.split, row))
                digests.append(digest)
    halves = np.frombuffer(bytes.fromhex("".join(digests)), np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    starts = np.flatnonzero(np.r_[True, (halves[order][1:] != halves[order][:-1]).any(1)]) if len(order) else []
    mislabelled, leaked, repeated = [], [], 0
    for group in np.split(order, starts[1:]):
        if len(group) < 2:
            continue
        copies = sorted((places[i] for i in group), key=lambda place: (packed.SPLITS.index(place[0]), place[1]))
        splits = {split for split, _ in copies}
        if len({_label(plan, place) for place in copies}) > 1:
            mislabelled.append(copies)
            continue
        repeated += len(copies) - len(splits)
        if len(splits) > 1:
            leaked.append(copies)
    by_place = [
        sorted(groups, key=lambda group: (packed.SPLITS.index(group[0][0]), group[0][1])) for groups in (mislabelled, leaked)
    ]
    return Same(*by_place, repeated)


def _left_out(plan: Plan, records: list[dict[str, Any]], same: Same) -> list[tuple[str, str]]:
    """Name of every file that is left out, and why: the broken ones, then the mislabelled, each in the listing's order."""
    found = []
    for split in packed.SPLITS:
        mine = (record for shard, record in zip(plan.shards, records, strict=True) if shard.split == split)
        broken = sorted((row, why) for record in mine for row, why in record["broken"])
        found += [(plan.name(split, row), why) for row, why in broken]
    for group in same.mislabelled:
        for place in group:
            other = next(other for other in group if _label(plan, other) != _label(plan, place))
            found.append((plan.name(*place), f"is the same picture as {shown(plan.name(*other))}, which has another class"))
    return found


def _label(plan: Plan, place: tuple[str, int]) -> int:
    split, row = place
    return int(plan.parts[split].labels[row])


def _pairs(plan: Plan, groups: list[list[tuple[str, int]]]) -> str:
    """The first few groups by name."""
    some = [" = ".join(shown(plan.name(*place)) for place in group[:SHOWN]) for group in groups[:SHOWN]]
    return "; ".join(some) + ("; ..." if len(groups) > SHOWN else "")


def _judge(plan: Plan, records: list[dict[str, Any]], same: Same, out: Path, skip_broken: bool) -> list[str]:
    """List what cannot be used in broken.txt; UserError that sums it up, or with skip_broken the sentences to note."""
    left_out = _left_out(plan, records, same)
    (out / "broken.txt").unlink(missing_ok=True)  # of an earlier command, since when files may have been repaired
    notes = []
    if left_out:
        with whole_file(out, "broken.txt", {}) as file:
            file.write(b"".join(_line(name) + f"\t{why}\n".encode() for name, why in left_out))
        doubtful = len(same.doubtful(*packed.SPLITS))
        broken = left_out[: len(left_out) - doubtful]
        parts = []
        if broken:
            some = "; ".join(f"{shown(name)} {why}" for name, why in broken[:SHOWN])
            parts.append(f"{counted(len(broken), 'broken file')} ({some}{'; ...' if len(broken) > SHOWN else ''})")
        if doubtful:
            parts.append(f"{counted(doubtful, 'mislabelled file')}, the same picture under several classes "
                         f"({_pairs(plan, same.mislabelled)})")  # fmt: skip
        text = " and ".join(parts)
        if not skip_broken:
            raise UserError(
                f"{shown(plan.source)} has {text}; {shown(out / 'broken.txt')} lists them, and the same command "
                "with --skip-broken leaves them out: what is packed stays"
            )
        notes.append(f"Left out when packed: {text}.")
    if same.leaked:
        notes.append(f"Warning: {counted(len(same.leaked), 'picture')} of test "
                     f"{'is' if len(same.leaked) == 1 else 'are'} in train as well: {_pairs(plan, same.leaked)}.")  # fmt: skip
    if same.repeated:
        notes.append(
            f"{counted(same.repeated, 'file')} repeat{'s' if same.repeated == 1 else ''} a picture of the same split and class."
        )
    return notes


def _line(name: str) -> bytes:
    """A name as one line of a text file."""
    return os.fsencode(name).replace(b"\n", b"\\n")


def _finish(plan: Plan, records: list[dict[str, Any]], same: Same, notes: list[str], out: Path) -> dict[str, Any]:
    """Labels or index, and names, then the manifest, which is returned as it is read."""
    kind = plan.described["kind"]
    splits = {split: _describe_split(plan, records, split, out) for split in packed.SPLITS}
    manifest = {
        "schema": packed.SCHEMA, "made_by": f"fastanchor {__version__}", "kind": kind, "class_names": plan.class_names,
        "source": f"folder:{plan.source}", "notes": [*plan.notes, *notes], "splits": splits,
        "left_out": [{"file": name, "why": why} for name, why in _left_out(plan, records, same)],
        "duplicates": {
            key: [[plan.name(*place) for place in group] for group in getattr(same, key)] for key in ("mislabelled", "leaked")
        } | {"repeated": same.repeated},
        "plan": plan.described,
    }  # fmt: skip
    if plan.pixels:
        manifest["shape"] = plan.size
        manifest["mean"], manifest["std"] = _channel_stats(plan, records)
    else:
        manifest["image_size"] = plan.size[0]
    with writing(out / packed.MANIFEST):
        folder = os.open(out, os.O_RDONLY)
        os.fsync(folder)  # the manifest must not outlive, in a power cut, the names of what it names
        os.close(folder)
        write_text(out / packed.MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return packed.read_manifest(out)


def _describe_split(plan: Plan, records: list[dict[str, Any]], split: str, out: Path) -> dict[str, Any]:
    """A split's entry in the manifest; writes the files in it that are not shards."""
    mine = [record for shard, record in zip(plan.shards, records, strict=True) if shard.split == split]
    rows = np.array([row for record in mine for row in record["rows"]], np.int64)
    labels = plan.parts[split].labels[np.sort(rows)]
    counts = np.bincount(labels, minlength=len(plan.class_names)).tolist()
    if 0 in counts:
        name = plan.class_names[counts.index(0)]
        raise UserError(
            f"class {name!r} has no image in {split} that can be used: list the other classes in a file, --classes FILE"
        )
    for record in mine:
        if not record["rows"]:
            (out / record["file"]).unlink()
    mine = [record for record in mine if record["rows"]]
    shards = [{key: record[key] for key in ("file", "bytes", "sha256")} | {"images": len(record["rows"])} for record in mine]
    entry: dict[str, Any] = {"images": len(rows), "counts": counts, "shards": shards, "names": {}}
    with whole_file(out, f"{split}-names.txt", entry["names"]) as file:
        file.write(b"".join(_line(plan.name(split, row)) + b"\n" for row in np.sort(rows).tolist()))
    if plan.pixels:
        kind, column = "labels", labels.astype("<i8")
    else:
        kind, column = "index", np.zeros(len(rows), packed.INDEX)
        values = np.array([line for record in mine for line in record["index"]], np.int64)
        for key, value in zip(packed.INDEX.names[1:], values.T, strict=True):
            column[key] = value
        column["shard"] = np.repeat(np.arange(len(mine)), [len(record["rows"]) for record in mine])
        column = column[np.argsort(rows)]
    entry[kind] = {}
    with whole_file(out, f"{split}-{kind}.npy", entry[kind]) as file:
        np.lib.format.write_array(file, column, version=(1, 0), allow_pickle=False)
    return entry


def _channel_stats(plan: Plan, records: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel of the training images, in [0, 1] units, from exact sums."""
    mine = [record for shard, record in zip(plan.shards, records, strict=True) if shard.split == "train"]
    totals, squares = (np.sum([record["sums"][power] for record in mine], axis=0).tolist() for power in (0, 1))
    count = sum(len(record["rows"]) for record in mine) * math.prod(plan.size)
    std = [math.sqrt(count * square - total**2) / (255 * count) for total, square in zip(totals, squares, strict=True)]
    return [total / (255 * count) for total in totals], std
