"""What the plots and the records know of a file of bench/: which program, device, versions, commit, ceilings, sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import schema
from bench.compare import processor_of
from bench.gpu_common import Bench

AHEAD_OF_TIME = "no device: compiled ahead of time"
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A valid file. kind: the program that wrote it; device: a GPU's name, "CPU: ...", or AHEAD_OF_TIME.

    commit ends in a + where the checkout had changes; versions: by name; ceilings: FLOP/s and B/s as fastanchor.ceilings names
    them, empty where the file has none; sizes: width, pixels, steps (PGD), batch, as far as the file or its program tells.
    """

    path: Path
    kind: str
    found: dict[str, Any]
    device: str | None
    commit: str | None = None
    command: str | None = None
    started: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    quick: bool = False
    cpu: bool = True

    @property
    def where(self) -> str:
        """The device in words that say whether it is a CPU or a GPU."""
        if self.device is None:
            return f"a {'CPU' if self.cpu else 'GPU'} that the file does not name"
        return self.device if self.cpu or self.device == AHEAD_OF_TIME else f"GPU: {self.device}"

    def caption(self, *more: str) -> str:
        """A figure's last line: device, versions, commit, and what else is said."""
        torch_version = self.versions.get("torch")
        said = [
            self.where,
            f"torch {torch_version}" if torch_version else "torch's version not in the file",
            f"commit {self.commit}" if self.commit else "commit not in the file",
            *(text for text in more if text),
        ]
        if self.quick:
            said.append("A CHECK OF THE PROGRAM (--quick): sizes too small for the figures to mean anything")
        return "; ".join(said)

    def rows(self, *parts: str) -> list[Row]:
        """Measured results of these parts (of all without any), in the file's order."""
        found = [row for row in self.found.get("results", ()) if "left_out" not in row and "error" not in row]
        return [row for row in found if not parts or row["part"] in parts]


def read(path: Path) -> Run:
    """Read and validate a file; UserError where it is none of bench/'s."""
    found = schema.load(path)
    readers = {
        "run": _run, "bench": _pytest, "ladder": _ladder, "aot": _aot, "compare": _compare,
        "agreement": functools.partial(_one_device, kind="bench.agreement"),
        "bench-data": functools.partial(_one_device, kind="fastanchor bench-data"),
    }  # fmt: skip
    return readers[schema.kind_of(found)](path, found)


def _described(about: dict[str, Any]) -> dict[str, Any]:
    """Of a row of environment.describe, or of machine.describe which holds one."""
    ceilings, about = about.get("ceilings", {}), about.get("about", about)
    names = {"python": about["python"], **{key: about["packages"].get(key) for key in ("torch", "triton", "numpy")}}
    names |= {key: about.get(key) for key in ("cuda", "cudnn")} if about.get("cudnn") else {}
    return {
        "device": about["device"], "commit": about["commit"], "command": about["command"], "ceilings": ceilings,
        "versions": {key: str(value) for key, value in names.items() if value}, "cpu": about["device"].startswith("CPU"),
    }  # fmt: skip


def _run(path: Path, found: dict[str, Any]) -> Run:
    settings, quick = found["settings"], bool(found["settings"].get("quick"))
    machines = [row for row in found["results"] if "about" in row]
    asked = str(settings.get("device", ""))
    about = _described(machines[0]) if machines else {"device": None, "cpu": not asked.startswith("cuda")}
    kind = found.get("kind", "bench.gpu")
    sizes = {}
    if kind == "bench.gpu":
        bench = Bench(None, torch.device("cpu"), [], quick=quick, compile=False, cudnn_benchmark=False, data="")
        sizes = {name: getattr(bench, name) for name in ("width", "pixels", "steps")}
    return Run(path, kind, found, started=found["started"], sizes=sizes, quick=quick, **about)


def _ladder(path: Path, found: dict[str, Any]) -> Run:
    settings = found["settings"]
    sizes = {name: settings[name] for name in ("width", "batch", "pixels", "steps", "train_steps", "rounds")}
    return Run(path, "bench.ladder", found, started=found.get("started"), sizes=sizes, **_described(found["environment"]))


def _pytest(path: Path, found: dict[str, Any]) -> Run:
    if "fastanchor" in found:
        added = found["fastanchor"]
        about, sizes = _described(added["environment"]), added["settings"]
        quick = bool(sizes.get("quick"))
    else:
        quick = False
        machine, commit = found["machine_info"], found.get("commit_info") or {}
        known = f"{commit['id'][:12]}{'+' if commit.get('dirty') else ''}" if commit.get("id") else None
        about = {"device": processor_of(found), "commit": known}
        about["versions"], sizes = {"python": machine["python_version"]} if "python_version" in machine else {}, {}
    return Run(path, "make bench", found, started=found["datetime"], sizes=sizes, quick=quick, **about)


def _one_device(path: Path, found: dict[str, Any], kind: str) -> Run:
    return Run(path, kind, found, **_described(found["environment"]))


def _aot(path: Path, found: dict[str, Any]) -> Run:
    versions = {name: found[name] for name in ("python", "torch", "triton")}
    return Run(
        path, "bench.aot", found, AHEAD_OF_TIME, commit=found.get("commit"), started=found.get("started"), versions=versions
    )


def _compare(path: Path, found: dict[str, Any]) -> Run:
    device = found["device"] if isinstance(found["device"], str) else " and ".join(map(str, found["device"] or ["unknown"]))
    return Run(path, "bench.compare", found, device, cpu=device.startswith("CPU"))
