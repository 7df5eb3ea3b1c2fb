"""The training loop: stages, epochs, validation, checkpoints, resume.

Every epoch's randomness is derived from (seed, stage, epoch), so a run that was killed continues from its last checkpoint to the
same weights, bit for bit on the same CPU build, as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastanchor import environment
from fastanchor.config import Config
from fastanchor.data import feeds
from fastanchor.data.encoded import Encoded
from fastanchor.data.judged import judged_split
from fastanchor.data.sources import ImageSet, image_stats
from fastanchor.errors import UserError
from fastanchor.evaluate.accuracy import measure
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.methods import Method, method_class, title_of
from fastanchor.settings import differing, from_dict, to_dict
from fastanchor.train import checkpoint
from fastanchor.train.checks import check_config, check_device
from fastanchor.train.memory import check_narrow_convolutions, explain_out_of_memory, within_memory
from fastanchor.train.optim import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    load_optimizer,
    set_learning_rate,
)
from fastanchor.train.progress import Reporter, speed_line
from fastanchor.train.run import RunDir, model_from_config
from fastanchor.train.stages import check_methods, check_order, epoch_indices, stage_config, stage_method, stages, train_set
from fastanchor.train.step import TrainStep
from fastanchor.train.throughput import StepCost, Throughput, step_cost
from fastanchor.train.watch import Watch

# On a GPU a look at the verdict costs a wait, so divergence is noticed at most this many steps late; the step named is exact.
FINITE_CHECK_EVERY = {"cpu": 1, "cuda": 50}


def train(config: Config, images: ImageSet, run: RunDir, *, resume: bool = False, reporter: Reporter | None = None) -> None:
    """Train `config` on `images` into `run`, which ends with checkpoints/best.pt, the model to judge.

    resume: go on from the run's newest good checkpoint. Raises UserError (bad input, divergence, a full disk).
    """
    started = time.perf_counter()
    check_config(config)
    reporter = reporter or Reporter()
    device = environment.pick_device(config.device)
    check_device(config, device)
    if resume:
        config = run.settled(config)
    backend, why = feeds.choose(config.data.backend, train_set(images), device)
    reporter.say(f"data: {images.why + '; ' if images.why else ''}fed by {backend}: {why}")
    check_order(config, images)
    check_methods(config, images, device)
    if config.channels_last:
        network = model_from_config(config, images.num_classes, (0.5,) * 3, (0.25,) * 3)
        check_narrow_convolutions(network, images.image_shape, device)
    if resume:
        run.check_method(config)
        run.describe(device)
    else:
        # Memory is not what it is now when the run is resumed, and its bits are the backend's.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, backend=backend))
        run.create(config, device)
    with run.locked(), cudnn_benchmark():
        _run_stages(config, images, run, device, resume, reporter, started)


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN try its algorithms for every shape: a training has a handful of them, and thousands of steps."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _run_stages(
    config: Config, images: ImageSet, run: RunDir, device: torch.device, resume: bool, reporter: Reporter, started: float
) -> None:
    """Both stages, or what is left of them."""
    state, note = checkpoint.load_latest(run.checkpoints) if resume else (None, None)
    if note:
        reporter.say(f"warning: {note}")
    # Read anew: a checkpoint of an earlier version lacks the settings that came since, which then have their defaults.
    # The method first, as it is: to read settings of a file's method runs the file, and only config.yaml may name one.
    if state is not None:
        where = str(run.checkpoints)
        other = _method_of(state) != config.method
        if other or any(True for key in differing(from_dict(state["config"], where), config) if not key.startswith("eval.")):
            raise UserError(f"{run.path}: its checkpoint was written by another configuration than its config.yaml")
    trainer = _Trainer(config, images, run, device, reporter, started)
    if state is not None and state.get("data") != trainer.data:
        raise UserError(
            f"{run.path}: the images of {images.name} are not those that the run began with, or an earlier version resized them "
            "otherwise"
        )
    numbers = stages(config)
    if state is not None:
        ended = state["epoch"] == trainer.epochs(state["stage"]) or state.get("stopped", False)
        done = ended and state["stage"] == numbers[-1]
        reporter.say(
            f"{run.path}: " + ("finished already" if done else f"resuming after stage {state['stage']}, epoch {state['epoch']}")
        )
        run.rewind(state["stage"], state["epoch"])
    else:
        run.rewind(0, 0)
    for stage in numbers:
        if state is None or stage >= state["stage"]:
            trainer.run_stage(stage, state if state is not None and state["stage"] == stage else None)


def _method_of(state: dict[str, Any]) -> Any:
    saved = state["config"]
    return saved.get("method") if isinstance(saved, dict) else None


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose; distinct purposes and seeds give unrelated ones."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *purpose))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _fingerprint(images: ImageSet) -> str:
    """A digest of the images and labels that a training sees, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for split in (images.train, images.val):
        if isinstance(split, Encoded):
            digest.update(split.digest())
        else:
            digest.update(split.images.contiguous().numpy())
            digest.update(split.labels.numpy())
    if images.extra is not None:
        digest.update(images.extra.digest())
    return digest.hexdigest()


@dataclass
class _Best:
    """The best epoch so far of a stage, by the accuracy on the validation split that the method selects by, ties by the other."""

    robust: float = -1.0
    clean: float = -1.0
    epoch: int = 0

    def update(self, robust: float, clean: float, epoch: int, selects: str) -> bool:
        if selects == "robust":
            better = (robust, clean) > (self.robust, self.clean)
        else:
            better = (clean, robust) > (self.clean, self.robust)
        if better:
            self.robust, self.clean, self.epoch = robust, clean, epoch
        return better


@dataclass
class _Stage:
    """What a stage's epochs share."""

    number: int
    step: TrainStep
    cost: StepCost
    average: WeightAverage | None
    feed: feeds.Feed
    watch: Watch | None = None
    best: _Best = field(default_factory=_Best)


class _Trainer:
    def __init__(self, config: Config, images: ImageSet, run: RunDir, device: torch.device, reporter: Reporter, started: float):
        # Before model and data: its matrices then never add to the peak of memory.
        self.throughput = Throughput(device, started)
        self.config, self.run, self.device, self.reporter = config, run, device, reporter
        self.images, self.class_names = images, images.class_names
        self.mean, self.std = image_stats(images.train)
        if min(self.std) == 0:
            raise UserError(f"{images.name}: a colour channel has the same value in all training images")
        self.data = _fingerprint(images)
        self.train_set = train_set(images)
        self.backend, _ = feeds.choose(config.data.backend, self.train_set, device)
        self.resident: feeds.Feed | None = None
        validation = images.val if config.val.limit is None else images.val.subset(config.val.limit)
        self.val_set = judged_split(validation, device)
        self.val_attack = parse_attack(config.val.attack, default_eps=config.attack.eps)
        self.val_perturb = self.val_attack.build()
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.bn_sets = method_class(config.method).bn_sets
        self.model = model_from_config(config, images.num_classes, self.mean, self.std, self.bn_sets).to(device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.tensorboard = _tensorboard(run) if config.tensorboard else None

    def epochs(self, stage: int) -> int:
        return self.config.epochs if stage == 1 else self.config.stage2.epochs

    def run_stage(self, number: int, state: dict[str, Any] | None) -> None:
        """Train one stage from its start, or from the checkpoint `state`."""
        config = stage_config(self.config, number)
        if number == 2 and state is None:
            self._start_stage2()
        torch.manual_seed(derive_seed(config.seed, number, "heads"))
        method = stage_method(config, number, self.images, self.model, self.device)
        optimizer = build_optimizer(method.trainable(self.model), config.optim)
        average = WeightAverage(self.model, config.optim.ema_decay) if config.optim.ema_decay > 0 else None
        with contextlib.closing(self._feed(method)) as feed:
            step = TrainStep(config, method, self.model, optimizer, average, self.device, feed.load)
            cost = step_cost(method, self.model, self.train_set.image_shape)
            self._run_epochs(_Stage(number, step, cost, average, feed, self._watch(config, number)), config, state)
            # Its graphs hold the step, and that the feed: memory that the next stage needs.
            step.without_graph("the stage is over")

    def _watch(self, config: Config, number: int) -> Watch | None:
        if number == 2 or config.watch.images == 0:
            return None
        seed = derive_seed(config.seed, "watch")
        return Watch(config, self.images.train, len(self.class_names), self.device, seed)

    def _feed(self, method: Method) -> feeds.Feed:
        """Where a stage's batches come from; images that lie on the device serve all stages."""
        spec = feeds.feed_spec(self.config.data, method.drawn, method.indexed, self.device)
        if self.resident is not None:
            self.resident.spec = spec
            return self.resident
        feed = feeds.open_feed(self.backend, self.train_set, spec)
        if self.backend == "resident":
            self.resident = feed
        return feed

    def _run_epochs(self, stage: _Stage, config: Config, state: dict[str, Any] | None) -> None:
        number, step = stage.number, stage.step
        first = 1
        if state is not None:
            self._restore(stage, state)
            first = 1 + (self.epochs(number) if state.get("stopped") else state["epoch"])
        steps = -(-len(epoch_indices(config, self.images, seed=0)) // config.batch_size)
        epochs = self.epochs(number)
        title = title_of(config) if number == 1 else step.method.title or config.stage2.mode
        self.reporter.start_stage(f"stage {number}: {title}", epochs, first - 1, steps)
        try:
            for epoch in range(first, epochs + 1):
                row = self._epoch(stage, config, epoch, epochs, steps)
                if epoch == first:
                    self.reporter.say(step.describe())
                stopped = self._collapsed(stage, row)
                last = stopped or epoch == epochs
                self._validate_and_save(stage, row, last=last, stopped=stopped)
                self.reporter.end_epoch(row, epochs)
                if last:
                    self.reporter.say(speed_line(row))
                    break
        finally:
            self.reporter.end_stage()
        if number == 2:
            self._compare_stages(stage.best)

    def _epoch(self, stage: _Stage, config: Config, epoch: int, epochs: int, steps: int) -> dict:
        started = time.perf_counter()
        step = stage.step
        step.method.start_epoch(epoch, self.model)
        seeds = {name: derive_seed(config.seed, stage.number, epoch, name) for name in ("order", "augment", "attack", "other")}
        step.reset(seeds)
        torch.manual_seed(seeds["other"])
        batches = stage.feed.epoch(epoch_indices(config, self.images, seeds["order"]), config.batch_size, seeds["augment"])
        first_step = (epoch - 1) * steps + 1
        lr, trained = 0.0, 0
        for i, batch in enumerate(within_memory(batches, config.batch_size, self.device)):
            progress = epoch - 1 + (i + 0.5) / steps
            lr = learning_rate(config.optim, progress, epochs)
            set_learning_rate(step.optimizer, lr)
            try:
                step(*batch, progress=progress)
            except torch.OutOfMemoryError as error:
                raise explain_out_of_memory(error, step, *batch) from error
            self.throughput.step_done()
            trained += len(batch[0])
            if (i + 1) % FINITE_CHECK_EVERY[self.device.type] == 0 or i + 1 == steps:
                step.check_finite(first_step)
            self.reporter.step()
        row = {"stage": stage.number, "epoch": epoch, "lr": lr, **step.read()}
        row["seconds"] = time.perf_counter() - started
        cost = stage.cost.perturbed() if step.perturbs_weights else stage.cost
        return row | self.throughput.epoch(trained, row["seconds"], cost)

    def _collapsed(self, stage: _Stage, row: dict) -> bool:
        """Attack the watched images, if any; whether the stage is to end here."""
        if stage.watch is None:
            return False
        entries, warning, stop = stage.watch(self.model, row)
        row |= entries
        if warning is not None:
            self.reporter.say(warning)
        return stop

    def _validate_and_save(self, stage: _Stage, row: dict, last: bool, stopped: bool) -> None:
        judged = stage.average.model if stage.average is not None else self.model
        every, selects = self.config.val.every, stage.step.method.selects
        if selects == "last":
            if last:
                stage.best.epoch, row["best"] = row["epoch"], True
        elif last or row["epoch"] % every == 0:
            started = time.perf_counter()
            options = {"batch_size": self.config.eval.batch_size, "num_classes": len(self.class_names)}
            seed = derive_seed(self.config.seed, "validation")
            try:
                clean = measure(judged, self.val_set, **options)
                robust = measure(judged, self.val_set, self.val_attack, seed=seed, built=self.val_perturb, **options)
            except torch.OutOfMemoryError as error:
                batch = f"eval.batch_size = {options['batch_size']}"
                raise UserError(f"{batch}: the validation does not fit in the memory of {self.device}; lower it") from error
            row |= {"val_clean": clean.accuracy, "val_robust": robust.accuracy}
            row["best"] = stage.best.update(robust.accuracy, clean.accuracy, row["epoch"], selects)
            row["val_seconds"] = time.perf_counter() - started
        state = self._state(stage, row["epoch"], judged)
        if row.get("best"):
            checkpoint.save(self.run.checkpoints / "best.pt", state)
        # Logged before it is saved: a kill in between leaves a row too many, which resuming takes back, never one too few.
        self.run.log(row)
        if stage.average is not None:
            state |= {"training_weights": self.model.state_dict(), "average_steps": stage.average.steps}
        if stage.step.method.heads is not None:
            state["heads"] = stage.step.method.heads.state_dict()
        if stage.watch is not None:
            state |= {"watch": stage.watch.state_dict(), "stopped": stopped}
        checkpoint.save(
            self.run.checkpoints / "last.pt", state | {"optimizer": stage.step.optimizer.state_dict()}, keep_previous=True
        )
        if self.tensorboard is not None:
            for name, value in row.items():
                self.tensorboard.add_scalar(f"stage{stage.number}/{name}", value, row["epoch"])
            self.tensorboard.flush()

    def _state(self, stage: _Stage, epoch: int, judged: torch.nn.Module) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "data": self.data,
            "class_names": list(self.class_names),
            "title": title_of(self.config),
            "bn_sets": list(self.bn_sets),
            "mean": list(self.mean),
            "std": list(self.std),
            "stage": stage.number,
            "epoch": epoch,
            "weights": judged.state_dict(),
            "best": vars(stage.best).copy(),
        }

    def _restore(self, stage: _Stage, state: dict[str, Any]) -> None:
        path = self.run.checkpoints / "last.pt"
        checkpoint.restore_weights(self.model, state.get("training_weights", state["weights"]), path)
        if stage.average is not None:
            checkpoint.restore_weights(stage.average.model, state["weights"], path)
            stage.average.steps = state["average_steps"]
        if stage.watch is not None:
            stage.watch.load(state["watch"])
        if stage.step.method.heads is not None:
            checkpoint.restore_weights(stage.step.method.heads, state["heads"], path)
        load_optimizer(stage.step.optimizer, state["optimizer"])
        stage.best = _Best(**state["best"])

    def _compare_stages(self, second: _Best) -> None:
        """Say it where the new classifier is worse than the one that stage 1 had: best.pt is stage 2's all the same."""
        path = self.run.checkpoints / "stage1_best.pt"
        first = _Best(**checkpoint.load(path)["best"])
        if second.robust < first.robust:
            figures = f"{second.robust:.1f} % on the validation split, stage 1's {first.robust:.1f} %"
            self.reporter.say(f"note: stage 2's robust accuracy is {figures}; train stage 2 longer, or judge {path}")

    def _start_stage2(self) -> None:
        """Begin from stage 1's best epoch, which is kept as stage1_best.pt, with a new classifier."""
        kept, best = self.run.checkpoints / "stage1_best.pt", self.run.checkpoints / "best.pt"
        if not kept.exists():
            checkpoint.save(kept, checkpoint.load(best))
        checkpoint.restore_weights(self.model, checkpoint.load(kept, self.device)["weights"], kept)
        torch.manual_seed(derive_seed(self.config.seed, "stage 2 weights"))
        self.model.reset_classifier()


def _tensorboard(run: RunDir):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('tensorboard: needs the package; pip install "fastanchor[tensorboard]"') from None
    return SummaryWriter(str(run.path / "tensorboard"))
