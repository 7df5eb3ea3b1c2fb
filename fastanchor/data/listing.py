"""Which files of an image folder belong to which class, before any of them is opened.

Three layouts: train/CLASS and test/CLASS; ImageNet's train/CLASS and val/CLASS; Tiny-ImageNet's train/CLASS/images and val/images
with val_annotations.txt. A file may list the classes to use, another the class of every image, to check the folder against.
"""

import csv
import errno
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastanchor.data.arrays import listed
from fastanchor.data.files import open_regular, present, reason, shown
from fastanchor.errors import UserError, did_you_mean

SUFFIXES = (".jpg", ".jpeg", ".png")
ANNOTATIONS, WNIDS, WORDS = "val_annotations.txt", "wnids.txt", "words.txt"
SHOWN = 3
BOXES = "_boxes.txt"
LAYOUT = "an image folder has train/CLASS/*.jpg, jpeg or png, and the same in test or val"
SKIP = "--data.skip-broken leaves such {} out"


class _Unused:
    """What class folders have besides images: how many files by ending, how many folders, and where."""

    def __init__(self, root: Path):
        self.root, self.kinds, self.folders = root, Counter(), 0
        self.places: list[str] = []

    def add(self, entry: os.DirEntry) -> None:
        # Hidden entries are the system's. Boxes are Tiny-ImageNet's, beside the images.
        if entry.name.startswith(".") or entry.name.endswith(BOXES):
            return
        # A link in a circle would make is_dir raise.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            self.folders += 1
        else:
            self.kinds[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
        place = os.path.dirname(entry.path)
        if place not in self.places[-1:]:
            self.places.append(place)

    def notes(self) -> list[str]:
        """One sentence, or none."""
        count, parts = self.kinds.total(), []
        if count:
            kinds = listed(sorted(self.kinds, key=lambda kind: (-self.kinds[kind], kind)), SHOWN)
            kind = "another kind" if count == 1 else "other kinds"
            parts.append(f"{count:,} file{'s' if count > 1 else ''} of {kind} ({kinds})")
        if self.folders:
            parts.append(f"{self.folders:,} sub-folder{'s' if self.folders > 1 else ''}")
        if not parts:
            return []
        first = shown(os.path.relpath(self.places[0], self.root))
        place = first if len(self.places) == 1 else f"{len(self.places):,} class folders, the first {first},"
        return [f"{' and '.join(parts)} in {place} {'is' if count + self.folders == 1 else 'are'} not used."]


@dataclass
class Listing:
    """The files of an image folder. names: the class folders in the order of labels; parts: paths by part and class, sorted.

    held_out: the part that is the test set, "test" or "val". empty: classes left out for having no files. notes: a sentence on
    each other thing that was left out or decided.
    """

    root: Path
    held_out: str
    names: list[str]
    parts: dict[str, dict[str, list[str]]]
    empty: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)

    def files(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Paths, str objects (N,), and labels, int64 (N,), of a part's files, in the order of classes and then of file names."""
        classes = self.parts[part]
        paths = [path for name in self.names for path in classes[name]]
        labels = np.repeat(np.arange(len(self.names)), [len(classes[name]) for name in self.names])
        return np.array(paths, object), labels

    def title(self, name: str) -> str:
        """A class folder as people call it. Bytes that are not UTF-8 become escapes, so that it can be printed and saved."""
        return self.words.get(name, name).encode("utf-8", "backslashreplace").decode()

    def check_number(self, count: int, when: str = "") -> None:
        """UserError where fewer than two classes are left."""
        if count < 2:
            both, classes = f"train and {self.held_out}{when}", "class" if count == 1 else "classes"
            raise UserError(f"{shown(self.root)} has {count} {classes} with images in {both}, and at least 2 are needed")


def find(root: Path, *, classes: Path | None = None, labels: Path | None = None, skip_broken: bool = False) -> Listing:
    """List an image folder; classes are the sorted folders in train, or those that the file `classes` lists, in its order.

    labels: a CSV of file,class against which the folder is checked. skip_broken: leave out, and put into the notes, classes
    without files and files on whose class folder and list do not agree. Raises UserError naming the file, class or line.
    """
    known = _class_folders(root / "train")
    held_out, annotated, notes = _layout(root, known)
    names = known if classes is None else _class_list(classes, known, root / "train")
    inner = annotated or present(root / WNIDS)
    unused = _Unused(root)
    parts = {"train": _in_class_folders(root / "train", names, inner, unused)}
    if annotated:
        parts[held_out] = _annotated(root / "val", known, names, skip_broken, notes, unused)
    else:
        # Where Tiny-ImageNet's val was sorted into folders, its own may be left.
        other = [name for name in _class_folders(root / held_out) if not (inner and name == "images")]
        _check_same(root, known, other, held_out, None if classes is None else names)
        parts[held_out] = _in_class_folders(root / held_out, names, inner, unused)
    listing = Listing(root, held_out, names, parts, notes=notes + unused.notes())
    if inner:
        _read_words(listing)
    when = ""
    if labels is not None and _check_labels(listing, labels, known, skip_broken):
        when = f" once what does not match {shown(labels)} is left out"
    listing.empty = [name for name in names if not all(part[name] for part in parts.values())]
    if listing.empty and not skip_broken:
        name = listing.empty[0]
        part = held_out if parts["train"][name] else "train"
        place = root / "val" / ANNOTATIONS if annotated and part == "val" else root / part / name
        raise UserError(f"class {name!r} is empty: no jpg, jpeg or png file in {shown(place)}; {SKIP.format('classes')}")
    listing.names = [name for name in names if name not in set(listing.empty)]
    listing.check_number(len(listing.names), when)
    return listing


def _layout(root: Path, known: list[str]) -> tuple[str, bool, list[str]]:
    """The folder that is the test part, whether val_annotations.txt says its classes, and what there is to note about it."""
    test, val = (any(os.path.lexists(root / part / name) for name in known) for part in ("test", "val"))
    if test:
        return "test", False, ["val is not used: validation images are taken out of train."] if val else []
    if val:
        lacks = "test has no folder of a class" if present(root / "test") else "There is no test folder"
        return "val", False, [f"{lacks}, so val is the test part; validation images are taken out of train."]
    annotations = root / "val" / ANNOTATIONS
    if present(annotations):
        note = f"Tiny-ImageNet: the test part is val, with the classes of {ANNOTATIONS}; test has none, and is not used."
        return "val", True, [note]
    if present(root / WNIDS):
        raise UserError(f"{shown(annotations)} is not there, and Tiny-ImageNet has the classes of the images in val in it")
    return "val" if present(root / "val") and not present(root / "test") else "test", False, []


def _class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in `folder`; hidden entries and files beside them do not count.

    A link that leads nowhere, or in a circle, counts: it was meant to be a class.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and (_dangling(e) or e.is_dir()))
    except FileNotFoundError as error:
        raise UserError(f"{shown(folder)} is not there: {LAYOUT}") from error
    except OSError as error:
        raise UserError(f"{shown(error.filename or folder)} cannot be listed: {reason(error)}") from error
    if not names:
        raise UserError(f"{shown(folder)} has no class folders, and it needs one for each class")
    return names


def _dangling(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _images(folder: str, unused: _Unused) -> list[str]:
    """Sorted names of what has an image's suffix; only one level is entered, so links in a circle cannot hang it."""
    try:
        with os.scandir(folder) as entries:
            names = []
            for entry in entries:
                if not entry.name.lower().endswith(SUFFIXES):
                    unused.add(entry)
                elif not entry.name.startswith("."):
                    names.append(entry.name)
            return sorted(names)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return []
        raise UserError(f"{shown(folder)} cannot be listed: {reason(error)}") from error


def _in_class_folders(folder: Path, names: list[str], inner: bool, unused: _Unused) -> dict[str, list[str]]:
    """Paths by class. inner: they lie in CLASS/images where there is such a folder."""
    found = {}
    for name in names:
        place = os.path.join(folder, name)
        if inner and os.path.isdir(os.path.join(place, "images")):
            place = os.path.join(place, "images")
        found[name] = [os.path.join(place, file) for file in _images(place, unused)]
    return found


def _check_same(root: Path, train: list[str], other: list[str], held_out: str, names: list[str] | None) -> None:
    """UserError where the two parts differ in a class; with a list of classes, `names`, in one of those."""
    differing = set(train) ^ set(other)
    if names is not None:
        differing &= set(names)
    if differing:
        name = min(differing)
        has, lacks = ("train", held_out) if name in train else (held_out, "train")
        raise UserError(f"{shown(root)}: class {name!r} is in {has} but not in {lacks}, and both need the same classes")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank. Undecodable bytes are kept as `os` keeps them in file names."""
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {reason(error)}") from error
    if b"\0" in data:  # UTF-16, or no text: no name of a file has it
        raise UserError(f"{shown(path)} is not UTF-8 text, and must be")
    text = data.decode("utf-8", "surrogateescape")
    # Not splitlines, for which a few characters that a name may hold end a line as well.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def _hint(name: str, known: list[str]) -> str:
    """What may be meant by a class that has no folder."""
    undecoded = any("\udc80" <= letter <= "\udcff" for letter in name)
    return "; the line is not UTF-8 text" if undecoded else did_you_mean(name, known)


def _class_list(path: Path, known: list[str], folder: Path) -> list[str]:
    """The classes that a file lists, one folder name a line; what follows a # at the beginning or after a space is a comment."""
    lines, folders = {}, set(known)
    for number, line in _lines(path):
        name = line.strip()
        if name not in folders:
            name = "" if name.startswith("#") else name.split(" #")[0].split("\t#")[0].rstrip().rstrip("/")
        if not name:
            continue
        if name not in folders:
            raise UserError(f"{shown(path)} line {number}: class {name!r} has no folder in {shown(folder)}{_hint(name, known)}")
        if name in lines:
            raise UserError(f"{shown(path)} line {number}: class {name!r} is listed already, in line {lines[name]}")
        lines[name] = number
    if len(lines) < 2:
        classes = "class" if len(lines) == 1 else "classes"
        raise UserError(f"{shown(path)} lists {len(lines)} {classes}, and at least 2 are needed")
    return list(lines)


def _annotated(
    val: Path, known: list[str], names: list[str], skip_broken: bool, notes: list[str], unused: _Unused
) -> dict[str, list[str]]:  # fmt: skip
    """Paths by class of Tiny-ImageNet's val/images, by val_annotations.txt: tab-separated file, class and box."""
    path, folder = val / ANNOTATIONS, os.path.join(val, "images")
    here, folders = set(_images(folder, unused)), set(known)
    found: dict[str, list[str]] = {name: [] for name in names}
    seen: dict[str, int] = {}
    absent, unknown = [], []
    for number, line in _lines(path):
        file, _, rest = line.partition("\t")
        name = rest.partition("\t")[0].strip()
        where = f"{shown(path)} line {number}"
        if not file or not name:
            raise UserError(f"{where} is {line[:80]!r}, and must be a file and its class with a tab between them")
        if file in seen:
            raise UserError(f"{where} names {file!r} again, after line {seen[file]}")
        seen[file] = number
        if name not in folders:
            unknown.append(f"line {number} ({name})")
            if not skip_broken:
                hint = did_you_mean(name, known, cutoff=0.8)
                raise UserError(
                    f"{where}: {file!r} is of class {name!r}, which has no folder in train{hint}; {SKIP.format('files')}"
                )
        elif file not in here:
            absent.append(f"line {number} ({file})")
            if not skip_broken:
                raise UserError(f"{where} names {file!r}, which is not in {shown(folder)}; {SKIP.format('lines')}")
        elif name in found:
            found[name].append(os.path.join(folder, file))
    lacking = sorted(here - seen.keys())
    if lacking and not skip_broken:
        raise UserError(f"{shown(path)} lacks {_some(lacking)} of {shown(folder)}; {SKIP.format('files')}")
    for what, left_out in (("a class that train lacks", unknown), ("a file that is not there", absent)):
        if left_out:
            notes.append(f"Ignored {_counted(left_out, 'line')} of {ANNOTATIONS} with {what}: {listed(left_out)}.")
    if lacking:
        notes.append(f"Left out {_counted(lacking, 'file')} of val that {ANNOTATIONS} lacks: {listed(lacking)}.")
    return {name: sorted(paths) for name, paths in found.items()}


def _read_words(listing: Listing) -> None:
    """Readable names from words.txt, the first of each line; a name that two of the classes have is followed by the folder's."""
    path = listing.root / WORDS
    if not present(path):
        return
    words, used = {}, set(listing.names)
    for _, line in _lines(path):
        name, _, text = line.partition("\t")
        if name in used and text.strip():
            words[name] = text.split(",")[0].strip()
    times = Counter(words.get(name, name) for name in listing.names)
    listing.words = {name: text if times[text] == 1 else f"{text} ({name})" for name, text in words.items()}
    if words:
        listing.notes.append(
            f"Classes are called by {WORDS}: {', '.join(listing.title(name) for name in listing.names[:SHOWN])}, ..."
        )


def _label_rows(path: Path, known: list[str]) -> dict[str, tuple[int, str]]:
    """Line number and class by relative path, of a CSV of file,class with or without a header."""
    rows: dict[str, tuple[int, str]] = {}
    lines, folders = list(_lines(path)), set(known)
    for place, (number, line) in enumerate(lines):
        where = f"{shown(path)} line {number}"
        try:
            row = [text.strip() for text in next(csv.reader([line], strict=True))]
        except csv.Error as error:
            raise UserError(f"{where} cannot be read as CSV: {reason(error)}") from error
        if len(row) != 2:
            raise UserError(
                f"{where} has {len(row)} field{'s' if len(row) > 1 else ''}, and must be file,class, separated by a comma"
            )
        file, name = row
        if place == 0 and not file.lower().endswith(SUFFIXES):
            continue
        if name not in folders:
            raise UserError(f"{where}: class {name!r} has no folder in train{_hint(name, known)}")
        file = posixpath.normpath(file)
        if file in rows:
            raise UserError(f"{where} names {file!r} again, after line {rows[file][0]}")
        rows[file] = number, name
    return rows


def _check_labels(listing: Listing, path: Path, known: list[str], skip_broken: bool) -> bool:
    """Compare class folders with a list. What does not agree: UserError, or with skip_broken left out and noted; whether it was.

    A part of which the list names no file at all is not checked, and that is noted.
    """
    root, rows = listing.root, _label_rows(path, known)
    checked = [part for part in listing.parts if any(file.startswith(f"{part}/") for file in rows)]
    if not checked:
        example = f", not {next(iter(rows))!r}" if rows else ""
        raise UserError(
            f"{shown(path)} names no file of train or {listing.held_out}, and must name them from {shown(root)} on, "
            f"as in train/{listing.names[0]}/1.jpg,{listing.names[0]}{example}"
        )
    start = len(str(root / "train")) - len("train")
    here = {file[start:]: name for part in checked for name, files in listing.parts[part].items() for file in files}
    wrong = {file: name for file, name in here.items() if file in rows and rows[file][1] != name}
    unlisted = [file for file in here if file not in rows]
    used = set(listing.names)
    # Files of classes that are not used are in a list of the whole folder by right.
    absent = [file for file, (_, name) in rows.items() if file not in here and name in used]
    told = [f"{file!r} lies in {name!r} and line {rows[file][0]} says {rows[file][1]!r}" for file, name in wrong.items()]
    faults = []
    if wrong:
        more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        faults.append(f"{_counted(told, 'file')} mislabelled ({'; '.join(told[:SHOWN])}{more})")
    if absent:
        lines = [f"{file} of line {rows[file][0]}" for file in absent]
        faults.append(f"{_counted(absent, 'file')} listed but not among the images ({listed(lines, SHOWN)})")
    if unlisted:
        faults.append(f"{_counted(unlisted, 'image')} not listed ({listed(unlisted, SHOWN)})")
    if faults and not skip_broken:
        raise UserError(f"{shown(path)} does not match {shown(root)}: {', '.join(faults)}; {SKIP.format('files')}")
    if faults:
        listing.notes.append(f"Left out what does not match {path.name!r}: {', '.join(faults)}.")
        gone = {*wrong, *unlisted}
        for part in checked:
            for name, files in listing.parts[part].items():
                listing.parts[part][name] = [file for file in files if file[start:] not in gone]
    listing.notes += [
        f"{path.name!r} names no file of {part}, which was not checked." for part in listing.parts if part not in checked
    ]
    return bool(faults)


def _counted(items: list[str], noun: str) -> str:
    return f"{len(items):,} {noun}{'s' if len(items) != 1 else ''}"


def _some(names: list[str]) -> str:
    return f"{_counted(names, 'file')} ({listed(names, SHOWN)})"
