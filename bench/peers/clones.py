"""A repository that the user has cloned, its code run as it is and kept apart from ours: recognition, import, pieces of scripts.

The clone's own functions are imported; of a script that trains when it is imported, classes and functions are taken out of its
syntax tree and executed in a namespace that holds what the script's top level would have made. Nothing is written into the clone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers import REPOSITORIES
from fastanchor.errors import UserError, did_you_mean

# Never hidden, whatever a clone calls its files.
OURS = {"bench", "fastanchor", "numpy", "torch", "torchvision", "triton", *sys.stdlib_module_names}
TAIL = 2000  # characters of what a peer printed that its failure shows


class PeerFailed(RuntimeError):
    """The peer's own code failed; its text ends with the error and holds what the code had printed. The cause is the error."""


class Clone(NamedTuple):
    """A recognised clone. commit: of its checkout, None where it is none."""

    name: str
    folder: Path
    commit: str | None


def recognise(text: str) -> Clone:
    """The clone that a `--peer-path` names: DIR, recognised from its files, or NAME=DIR. UserError where that is not clear."""
    name, equals, rest = text.partition("=")
    if not equals or os.sep in name or Path(text).is_dir():
        name, rest = "", text
    folder = Path(rest).expanduser()
    if name and name not in REPOSITORIES:
        raise UserError(f"--peer-path {text}: {name} is none of {', '.join(REPOSITORIES)}{did_you_mean(name, REPOSITORIES)}")
    if not folder.is_dir():
        raise UserError(f"--peer-path {text}: {folder} is no folder")
    if name:
        missing = [file for file in REPOSITORIES[name].files if not (folder / file).is_file()]
        if missing:
            raise UserError(f"--peer-path {text}: {folder} has no {missing[0]}, which {name} has")
    else:
        fitting = [key for key, known in REPOSITORIES.items() if all((folder / file).is_file() for file in known.files)]
        if not fitting:
            wanted = "; ".join(f"{key}: {', '.join(known.files)}" for key, known in REPOSITORIES.items())
            raise UserError(f"--peer-path {text}: not one of the known repositories, which have these files: {wanted}")
        if len(fitting) > 1:
            raise UserError(f"--peer-path {text}: may be {' or '.join(fitting)}; say which, as in {fitting[0]}={rest}")
        name = fitting[0]
    return Clone(name, folder.resolve(), commit_of(folder))


def recognise_all(texts: list[str]) -> dict[str, Clone]:
    """Clones by name, in the order given. UserError also where one repository is given twice."""
    found: dict[str, Clone] = {}
    for text in texts:
        clone = recognise(text)
        if clone.name in found:
            raise UserError(f"--peer-path {text}: {clone.name} is given twice, first as {found[clone.name].folder}")
        found[clone.name] = clone
    return found


def commit_of(folder: Path) -> str | None:
    # A folder without .git may lie in somebody else's checkout, of which the commit says nothing.
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def other_commit(clone: Clone) -> str | None:
    """A warning where the clone is not at the commit that its adapter was written for; None where it is."""
    expected = REPOSITORIES[clone.name].commit
    if clone.commit is None:
        return f"no git checkout: whether it is at {expected}, for which the adapter was written, is not known"
    if not clone.commit.startswith(expected):
        return f"at {clone.commit[:7]}; the adapter was written for {expected}"
    return None


@contextlib.contextmanager
def cuda_stays_here() -> Iterator[None]:
    """Where there is no GPU, `.cuda()` of a tensor or module returns it as it is; where there is one, nothing is touched."""
    if torch.cuda.is_available():
        yield
        return
    before = {kind: kind.cuda for kind in (Tensor, nn.Module)}

    def cuda(self, *_: object, **__: object):
        return self

    try:
        for kind in before:
            kind.cuda = cuda
        yield
    finally:
        for kind, method in before.items():
            kind.cuda = method


def _set_cudnn(flags: tuple[bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags


def _set_path(path: list[str]) -> None:
    sys.path[:] = path


# What a script sets for its whole process: the clone has its own of each, as it left them, and so have we.
State = tuple[Callable[[], Any], Callable[[Any], None]]
STATE: tuple[State, ...] = (
    (lambda: (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic), _set_cudnn),
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (os.getcwd, os.chdir),
    (lambda: list(sys.path), _set_path),
    (lambda: sys.argv, lambda argv: setattr(sys, "argv", argv)),
    (lambda: sys.dont_write_bytecode, lambda on: setattr(sys, "dont_write_bytecode", on)),
)
ON_CUDA: tuple[State, ...] = ((torch.cuda.get_rng_state, torch.cuda.set_rng_state),)


class Session:
    """One clone's code at work. All that is the clone's happens within `inside()`, or a function that `bound` returned.

    A context manager: at its end the temporary working folder goes, and so do the clone's log files in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = _top_level(folder) - OURS
        self.modules: dict[str, Any] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="peer-")
        self.workdir = Path(self._temporary.name).resolve()
        self._entered = False
        self._states = STATE + (ON_CUDA if torch.cuda.is_available() else ())
        self._own: list[Any] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for logger in list(logging.root.manager.loggerDict.values()):
            for handler in list(getattr(logger, "handlers", ())):
                if self.workdir in Path(getattr(handler, "baseFilename", "/")).parents:
                    logger.removeHandler(handler)
                    handler.close()
        self.modules.clear()
        self._temporary.cleanup()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The clone first on sys.path, its modules in sys.modules, in the temporary folder; all is as before afterwards.

        What is printed is kept for a failure: PeerFailed, from whatever exception (or sys.exit) it was.
        """
        if self._entered:
            yield
            return
        printed = io.StringIO()
        self._entered = True
        try:
            with (
                self._swapped(),
                self._installed(),
                cuda_stays_here(),
                warnings.catch_warnings(),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                warnings.simplefilter("ignore")
                yield
        except (Exception, SystemExit) as error:
            said = printed.getvalue()[-TAIL:].strip()
            said = f"it had printed:\n{said}\n" if said else ""
            raise PeerFailed(f"{said}{type(error).__name__}: {error}") from error
        finally:
            self._entered = False

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called inside."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.inside():
                return function(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        before = [get() for get, _ in self._states]
        try:
            if self._own is None:
                os.chdir(self.workdir)
                sys.path.insert(0, str(self.folder))
                sys.argv, sys.dont_write_bytecode = ["train.py"], True
            else:
                _put(self._states, self._own)
            yield
        finally:
            self._own = [get() for get, _ in self._states]
            _put(self._states, before)

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in self.names}
        known = set(sys.modules)
        sys.modules.update(self.modules)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            new = {name: module for name, module in list(sys.modules.items()) if name not in known}
            self.modules = {name: module for name, module in new.items() if self._is_own(name, module)}
            for name in self.modules:
                del sys.modules[name]
            sys.modules.update(hidden)

    def _is_own(self, name: str, module: Any) -> bool:
        file = getattr(module, "__file__", None)
        return name.partition(".")[0] in self.names or (file is not None and self.folder in Path(file).parents)

    def module(self, name: str) -> Any:
        """The clone's module of this name, imported inside."""
        with self.inside():
            return importlib.import_module(name)

    def definitions(self, file: str, names: tuple[str, ...] | None, namespace: dict[str, Any]) -> dict[str, Any]:
        """`namespace` with these classes and functions of a file's top level (None: all), and nothing else of it executed.

        They see the namespace as their globals, so it may be filled further afterwards.
        """
        found = [node for node in self._parsed(file).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        chosen = [node for node in found if names is None or node.name in names]
        if missing := sorted(set(names or ()) - {node.name for node in chosen}):
            raise PeerFailed(f"{file} of this clone defines no {missing[0]}")
        namespace |= {"__name__": Path(file).stem, "__file__": str(self.folder / file)}
        code = compile(ast.Module(chosen, type_ignores=[]), str(self.folder / file), "exec")
        with self.inside():
            exec(code, namespace)
        return namespace

    def literals(self, file: str, *names: str) -> list[Any]:
        """Values of these names where a file's top level sets them to literals."""
        values: dict[str, Any] = {}
        for node in self._parsed(file).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
                values[node.targets[0].id] = ast.literal_eval(node.value)
        if missing := [name for name in names if name not in values]:
            raise PeerFailed(f"{file} of this clone sets no {missing[0]}")
        return [values[name] for name in names]

    def defaults(self, file: str) -> argparse.Namespace:
        """The defaults of a script's `add_argument` calls, by the names that argparse would give them."""
        found = {}
        for node in ast.walk(self._parsed(file)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"):
                continue
            flags = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            given = {key.arg: key.value for key in node.keywords}
            long = next((flag for flag in flags if flag.startswith("--")), flags[0])
            switch = isinstance(given.get("action"), ast.Constant) and given["action"].value == "store_true"
            found[long.lstrip("-").replace("-", "_")] = (
                ast.literal_eval(given["default"]) if "default" in given else False if switch else None
            )
        return argparse.Namespace(**found)

    def _parsed(self, file: str) -> ast.Module:
        try:
            return ast.parse((self.folder / file).read_text(encoding="utf-8"), filename=file)
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise PeerFailed(f"{file} of this clone cannot be read: {error}") from error


def _put(states: tuple[State, ...], values: list[Any]) -> None:
    for (_, put), value in zip(states, values, strict=True):
        put(value)


def _top_level(folder: Path) -> set[str]:
    """Names that `import` would find in the folder."""
    return {
        path.stem if path.is_file() else path.name for path in folder.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))
    }
