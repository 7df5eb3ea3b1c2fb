"""What a person sees of a training: a live bar on a terminal, one plain line an epoch everywhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastanchor.ceilings import PASSED, WHY_PASSED, share_text


class PipeConsole(Console):
    """A console that lets the program know when its reader has gone; rich would end the program."""

    def on_broken_pipe(self) -> None:
        """Called by rich inside the handler of the error."""
        raise


class Reporter:
    """Prints to `console`, and to the file `log` once its folder exists; a bar while an epoch runs where there is a terminal."""

    def __init__(self, console: Console | None = None, log: Path | None = None):
        self.console = console or PipeConsole(highlight=False)
        self.log = log
        self._unlogged: list[str] = []
        self._bar: Progress | None = None
        self._task = None

    def say(self, text: str) -> None:
        """One line."""
        try:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        except BrokenPipeError:  # the reader (head, less) has gone: train on, the log has it all
            self.console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
        self._unlogged.append(text)
        if self.log is None or not self.log.parent.is_dir():
            return
        try:
            with open(self.log, "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self._unlogged)
            self._unlogged.clear()
        except OSError as error:  # a training is worth more than its log
            log, self.log = self.log, None
            self.say(f"warning: {log} cannot be written ({error.strerror}); going on without it")

    def start_stage(self, title: str, epochs: int, done: int, steps: int) -> None:
        """A stage of `epochs` epochs of `steps` steps begins, `done` epochs of it already behind."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(title, total=epochs * steps, completed=done * steps)

    def step(self) -> None:
        """A training step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def end_epoch(self, row: dict[str, Any], epochs: int) -> None:
        """One line for the epoch."""
        self.say(epoch_line(row, epochs))

    def end_stage(self) -> None:
        """Remove the bar; also called when the training stops early."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """`stage 1  epoch  3/110  lr 0.1  loss 1.234  ...  12.3 s`."""
    parts = [
        f"stage {row['stage']}  epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  lr {row['lr']:.3g}  loss {row['loss']:.4f}"
    ]
    if "effective_positives" in row:
        parts.append(f"positives {row['effective_positives']:.1f}")
    train = [f"{key.removeprefix('accuracy_')} {100 * row[key]:.1f}" for key in row if key.startswith("accuracy_")]
    if train:
        parts.append("train " + " / ".join(train) + " %")
    if "train_robust" in row:
        parts.append(f"watched {row['train_robust']:.1f} %")
    if "val_clean" in row:
        best = "  *" if row["best"] else ""
        parts.append(f"val clean {row['val_clean']:.1f} / robust {row['val_robust']:.1f} %{best}")
    parts.append(f"{row['seconds']:.1f} s")
    return "  ".join(parts)


def speed_line(row: dict[str, Any]) -> str:
    """What the last epoch of a stage says of its speed."""
    share = share_text(row["share_of_bf16_matmul"])
    told = f"bf16 matmul rate {WHY_PASSED}" if share == PASSED else f"{share} of this device's measured bf16 matmul rate"
    return (
        f"speed: {row['seconds']:.3g} s an epoch, {row['images_per_s']:,.0f} images/s, {row['tflops']:.3g} model TFLOP/s, "
        f"{told}; peak memory "
        f"{row['peak_memory_mb']:,.0f} MB"
    )
