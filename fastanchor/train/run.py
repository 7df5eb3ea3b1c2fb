"""The run directory: what a training leaves behind, and how a model is read back from it.

RUN/config.yaml       resolved configuration             RUN/checkpoints/best.pt   the model to judge
RUN/env.json          versions, device, commit, command  RUN/checkpoints/last.pt   training state after the last epoch
RUN/metrics.jsonl     one object an epoch                RUN/checkpoints/previous.pt  the state before that
RUN/summary.csv       the same as a table                RUN/eval/*.json           evaluations
RUN/method.py         a method's file as it was, where the method is one's own
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastanchor import environment, settings
from fastanchor.config import Config
from fastanchor.errors import UserError
from fastanchor.files import write_text
from fastanchor.methods import is_file
from fastanchor.models import RobustClassifier, build_model
from fastanchor.models.bnsets import add_bn_sets
from fastanchor.train import checkpoint

# What a run writes before its first epoch has ended.
BEGUN = ("config.yaml", "env.json", "method.py", "metrics.jsonl", "summary.csv")


class RunDir:
    """A run's folder. Files are replaced whole or appended by lines, so that a kill leaves them readable."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        # What a method in a file was when the run began: to be read by people, never run.
        self.method_file = self.path / "method.py"

    def check_free(self) -> None:
        """Raise UserError where something is in the way of a new run."""
        if self.is_blank():
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            more = f"; to go on with it: fastanchor train --resume {self.path}" if (self.path / "config.yaml").exists() else ""
            raise UserError(f"{self.path}: exists and is not empty, and a run never overwrites one{more}")

    def is_blank(self) -> bool:
        """Whether it is a run that ended before its first epoch did, and nobody is at work on: there is nothing to lose in it."""
        if not (self.path / "config.yaml").is_file() or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
            return False
        if not {entry.name for entry in self.path.iterdir()} <= {*BEGUN, "train.log", ".lock", "checkpoints"}:
            return False
        try:
            with self.locked():
                return True
        except UserError:
            return False

    def create(self, config: Config, device: torch.device) -> None:
        """Make the folder and write config.yaml and env.json. Raises UserError where something is in the way."""
        self.check_free()
        try:
            if self.is_blank():
                for left in BEGUN:
                    (self.path / left).unlink(missing_ok=True)
            # The configuration comes first: from there on the run can be resumed.
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", settings.dump(config))
            if is_file(config.method):
                shutil.copyfile(config.method, self.method_file)
            self.describe(device)
        except OSError as error:
            raise UserError(f"{self.path}: the run's folder cannot be written ({error.strerror})") from None

    def describe(self, device: torch.device) -> None:
        """Write env.json, unless it is there: it tells where the run began."""
        path = self.path / "env.json"
        if not path.exists():
            write_text(path, json.dumps(environment.describe(device), indent=2) + "\n")

    def open(self, *, judged: bool = False) -> Config:
        """The configuration of an existing run; judged: as in `settings.with_method`. Raises UserError."""
        if not (self.path / "config.yaml").is_file():
            raise UserError(f"{self.path}: not a run: it has no config.yaml")
        return settings.load_file(self.path / "config.yaml", judged=judged)

    def check_method(self, config: Config) -> None:
        """The file of a method is what it was when this run began. Raises UserError."""
        if not is_file(config.method) or not self.method_file.exists():
            return
        if self.method_file.read_bytes() != Path(config.method).read_bytes():
            raise UserError(f"{self.path}: {config.method} is not what the run began with, which is {self.method_file}")

    def settled(self, config: Config) -> Config:
        """`config` with what `data.backend` auto came to when this run began; as it is where that is not known."""
        stored = self.open().data.backend
        if config.data.backend != "auto" or stored == "auto":
            return config
        return dataclasses.replace(config, data=dataclasses.replace(config.data, backend=stored))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run: a second process that trains here would mix its epochs with ours. Raises UserError where one does."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is training here") from None
            yield

    def history(self) -> list[dict[str, Any]]:
        """The epochs' metrics in order; a last line cut short by a kill is left out."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or not row.keys() >= {"stage", "epoch"}:
                raise UserError(f"{self.metrics}: line {len(rows) + 1} is not an epoch of a run")
            rows.append(row)
        return rows

    def rewind(self, stage: int, epoch: int) -> None:
        """Forget epochs after the given one: those that a killed run had logged but not saved."""
        rows = [row for row in self.history() if (row["stage"], row["epoch"]) <= (stage, epoch)]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        self._write_summary(rows)

    def log(self, row: dict[str, Any]) -> None:
        """Append an epoch to metrics.jsonl and bring summary.csv up to date."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._write_summary(self.history())
        except OSError as error:
            raise UserError(f"{self.metrics}: could not be written ({error.strerror}); the checkpoint before is intact") from None

    def _write_summary(self, rows: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "summary.csv", text.getvalue())


def model_from_config(config: Config, num_classes: int, mean, std, bn_sets: Sequence[str] = ()) -> RobustClassifier:
    """The untrained network of a configuration; bn_sets: those of its method."""
    model = config.model
    network = build_model(
        model.name, num_classes=num_classes, width=model.width, head=model.head, head_hidden=model.head_hidden,
        head_dim=model.head_dim, mean=mean, std=std,
    )  # fmt: skip
    return add_bn_sets(network, bn_sets) if bn_sets else network


@dataclass(frozen=True)
class Trained:
    """A model to judge, with where it came from."""

    model: RobustClassifier
    config: Config
    class_names: tuple[str, ...]
    path: Path
    state: dict[str, Any]


def load_trained(path: str | Path, device: torch.device) -> Trained:
    """The model of a run (its best checkpoint) or of one checkpoint file, in eval mode on the device. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        RunDir(path).open(judged=True)
        path = path / "checkpoints" / "best.pt"
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    state = checkpoint.load(path)
    config = settings.from_dict(state["config"], str(path), judged=True)
    model = model_from_config(config, len(state["class_names"]), state["mean"], state["std"], state.get("bn_sets", ()))
    checkpoint.restore_weights(model, state["weights"], path)
    model.to(device).eval()
    return Trained(model, config, tuple(state["class_names"]), path, state)
