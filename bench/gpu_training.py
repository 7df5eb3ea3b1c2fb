"""GPU run, a short real training: PGD-AT through the training loop itself, and what it logs of every epoch."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from bench import cases
from bench.gpu_common import Bench
from fastanchor.data import sources
from fastanchor.train.loop import train
from fastanchor.train.progress import Reporter
from fastanchor.train.run import RunDir

PART = "training"
KEPT = ("epoch", "loss", "accuracy_adv", "val_clean", "val_robust", "seconds", "images_per_s", "tflops",
        "share_of_bf16_matmul", "peak_memory_mb", "first_step_s")  # fmt: skip


def run(bench: Bench) -> None:
    """Each epoch's row is kept as it ends, so that a time box that ends first loses nothing."""
    config = cases.make_config(0.0, bench.steps, precision="bf16", graph="auto")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=bench.data),
        model=dataclasses.replace(config.model, width=bench.width, head="identity"),
        optim=dataclasses.replace(config.optim, lr=0.1, schedule="cyclic"),
        val=dataclasses.replace(config.val, attack=f"pgd{bench.steps}", limit=32 if bench.quick else 1000),
        epochs=1 if bench.quick else 8,
        batch_size=16 if bench.quick else 128,
        device=str(bench.device),
    )
    images = sources.load(bench.data, limit=40 if bench.quick else None)
    with tempfile.TemporaryDirectory() as folder:
        train(config, images, RunDir(Path(folder) / "run"), reporter=_Recorder(bench, config.epochs))


class _Recorder(Reporter):
    """Every epoch's row becomes a result."""

    def __init__(self, bench: Bench, epochs: int):
        super().__init__()
        self.bench, self.epochs = bench, epochs

    def end_epoch(self, row: dict, epochs: int) -> None:
        super().end_epoch(row, epochs)
        kept = {key: row[key] for key in KEPT if key in row}
        self.bench.results.add(PART, f"{self.bench.data}, PGD-AT, bf16", epochs=epochs, **kept)
