"""The training loop: what a run leaves behind, resume to the same bits, stages, selection, and what stops it."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from fastanchor.config import Config
from fastanchor.data import sources
from fastanchor.errors import UserError
from fastanchor.evaluate.learning import SPEED_KEYS
from fastanchor.settings import load_file, parse_flags
from fastanchor.train import checkpoint
from fastanchor.train.loop import derive_seed, train
from fastanchor.train.run import RunDir, load_trained

SMALL = (
    "--data.source synthetic --data.limit 200 --data.val-fraction 0.2 --model.width 4 --model.head-hidden 16 --model.head-dim 8 "
    "--attack.steps 2 --attack.eps 0.06 --attack.step-size 0.03 --batch-size 32 --epochs 3 --optim.lr 0.05 --optim.milestones 2 "
    "--val.attack pgd2 --stage2.batch-size 64 --stage2.epochs 2 --stage2.milestones 1"
).split()


def config_of(*flags):
    return parse_flags([*SMALL, *flags], Config())


@pytest.fixture(scope="module")
def images():
    return sources.load("synthetic", limit=200, val_fraction=0.2)


def weights(run):
    return checkpoint.load(run.checkpoints / "last.pt")["weights"]


def assert_equal_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


VARIANTS = {
    "as it is": (),
    "one epoch": ("--epochs", "1"),
    "anchor, both stages": ("--stage2.mode", "alf"),
    "average and joint attack": ("--optim.ema-decay", "0.9", "--attack.objective", "ce+hsc", "--loss.beta-warmup-epochs", "2"),
    "undefended": ("--method", "standard"),
}


@pytest.fixture(scope="module")
def whole_runs(images, tmp_path_factory):
    """Whole runs by variant, made once, and what a kill after each epoch's last.pt had left of them; to be read only."""
    made = {}

    def run(variant):
        if variant not in made:
            folder, real = tmp_path_factory.mktemp("whole"), checkpoint.save
            whole = RunDir(folder / "run")

            def save_and_copy(path, state, **options):
                real(path, state, **options)
                if path.name == "last.pt":
                    shutil.copytree(whole.path, folder / f"killed {len(list(folder.iterdir()))}")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(checkpoint, "save", save_and_copy)
                train(config_of(*VARIANTS[variant]), images, whole)
            made[variant] = whole
        return made[variant]

    return run


def copied(run, path):
    """The run in a folder of its own, to be changed."""
    shutil.copytree(run.path, path)
    return RunDir(path)


def test_a_run_leaves_what_its_contract_says_and_the_loss_falls(images, tmp_path):
    config = config_of(
        "--epochs", "5", "--attack.eps", "0.01", "--attack.step-size", "0.005", "--batch-size", "16", "--data.augment", "none"
    )
    run = RunDir(tmp_path / "run")
    train(config, images, run)
    assert load_file(run.path / "config.yaml") == parse_flags(["--data.backend", "resident"], config)
    environment = json.loads((run.path / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and environment["device"].startswith("CPU")
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, e) for e in range(1, 6)]
    needed = {"lr", "loss", "loss_ce_adv", "loss_hsc", "effective_positives", "grad_norm", "accuracy_aug", "accuracy_adv",
              "val_clean", "val_robust", "best", "seconds"}  # fmt: skip
    assert all(needed <= row.keys() for row in rows)
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss_ce_adv"] + rows[0]["loss_hsc"], rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert [round(row["lr"], 6) for row in rows] == [0.05, 0.05, 0.005, 0.005, 0.005]
    with open(run.path / "summary.csv") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    best = checkpoint.load(run.checkpoints / "best.pt")
    robust = [row["val_robust"] for row in rows]
    assert best["best"]["robust"] == max(robust) and rows[best["epoch"] - 1]["val_robust"] == max(robust)
    assert sorted(os.listdir(run.checkpoints)) == ["best.pt", "last.pt", "previous.pt"]


def test_loaded_model_is_the_one_that_was_saved(images, whole_runs):
    run = whole_runs("one epoch")
    for path in (run.path, run.checkpoints / "best.pt"):
        trained = load_trained(path, torch.device("cpu"))
        assert not trained.model.training and trained.class_names == images.class_names
        assert_equal_bits(trained.model.state_dict(), checkpoint.load(run.checkpoints / "best.pt")["weights"])
    mean = images.train.images.double().div(255).mean((0, 1, 2))
    torch.testing.assert_close(trained.model.normalize.mean.flatten().double(), mean, rtol=1e-6, atol=0)


def test_seed_decides_everything(images, whole_runs, tmp_path):
    runs = {"a": whole_runs("one epoch")}
    for name, seed in (("b", 0), ("c", 1)):
        runs[name] = RunDir(tmp_path / name)
        train(config_of("--epochs", "1", "--seed", str(seed)), images, runs[name])
        torch.rand(3)  # the global generator's state does not matter
    assert_equal_bits(weights(runs["a"]), weights(runs["b"]))
    assert not torch.equal(weights(runs["a"])["classifier.weight"], weights(runs["c"])["classifier.weight"])
    assert (
        len(
            {
                derive_seed(s, *p)
                for s in range(20)
                for p in ((1, 1, "order"), (1, 1, "attack"), (1, 11, "order"), (2, 1, "order"))
            }
        )
        == 80
    )


@pytest.mark.parametrize(
    "stop_at, variant",
    [(1, "anchor, both stages"), (2, "anchor, both stages"), (4, "anchor, both stages"), (2, "average and joint attack"),
     (1, "undefended")],
)  # fmt: skip
def test_resume_after_any_epoch_gives_the_same_bits(images, whole_runs, tmp_path, variant, stop_at):
    whole = whole_runs(variant)
    cut = copied(RunDir(whole.path.parent / f"killed {stop_at}"), tmp_path / "cut")
    assert len(cut.history()) == stop_at < len(whole.history())
    train(config_of(*VARIANTS[variant]), images, cut, resume=True)
    for name in ("last.pt", "best.pt"):
        a, b = (checkpoint.load(run.checkpoints / name) for run in (whole, cut))
        assert_equal_bits(a["weights"], b["weights"])
        assert (a["stage"], a["epoch"], a["best"]) == (b["stage"], b["epoch"], b["best"])
    whole_rows, cut_rows = (
        [{k: v for k, v in row.items() if "seconds" not in k and k not in SPEED_KEYS} for row in run.history()]
        for run in (whole, cut)
    )
    assert cut_rows == whole_rows


def test_kill_in_the_middle_of_an_epoch_then_resume_gives_the_same_bits(images, whole_runs, tmp_path):
    """A real SIGKILL to a real process, at a step inside the second epoch."""
    config = config_of()
    whole, cut = whole_runs("as it is"), RunDir(tmp_path / "cut")
    program = """
import sys, time
from fastanchor.data import sources
from fastanchor.settings import load_file
from fastanchor.train import step
from fastanchor.train.loop import train
from fastanchor.train.run import RunDir
import torch
torch.set_num_threads(int(sys.argv[3]))
real, count = step.TrainStep.__call__, 0
def slow(self, *args, **kwargs):
    global count
    count += 1
    if count == 8:  # five steps an epoch
        print("inside epoch 2", flush=True)
        time.sleep(60)
    return real(self, *args, **kwargs)
step.TrainStep.__call__ = slow
train(load_file(sys.argv[2]), sources.load("synthetic", limit=200, val_fraction=0.2), RunDir(sys.argv[1]))
"""
    command = [sys.executable, "-c", program, str(cut.path), str(whole.path / "config.yaml"), str(torch.get_num_threads())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert any("inside epoch 2" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert [row["epoch"] for row in cut.history()] == [1]
    train(config, images, cut, resume=True)
    assert_equal_bits(weights(whole), weights(cut))
    assert [row["loss"] for row in cut.history()] == [row["loss"] for row in whole.history()]


def test_resume_with_a_half_written_checkpoint_falls_back_and_says_so(images, whole_runs, tmp_path, capsys):
    config = config_of()
    run = copied(whole_runs("as it is"), tmp_path / "run")
    expected = weights(run)
    last = run.checkpoints / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    capsys.readouterr()
    train(config, images, run, resume=True)
    said = capsys.readouterr().out
    assert "warning:" in said and "last.pt: not a whole checkpoint" in said and "falling back to" in said
    assert "resuming after stage 1, epoch 2" in said
    assert_equal_bits(weights(run), expected)
    assert [row["epoch"] for row in run.history()] == [1, 2, 3]


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(images, whole_runs, tmp_path):
    config = config_of("--epochs", "1")
    whole, cut = whole_runs("one epoch"), RunDir(tmp_path / "cut")
    cut.create(config, torch.device("cpu"))
    cut.metrics.write_text('{"stage": 1, "epo')  # cut short by the kill
    train(config, images, cut, resume=True)
    assert_equal_bits(weights(whole), weights(cut))
    assert [row["epoch"] for row in cut.history()] == [1]


def test_resume_of_a_finished_run_changes_nothing(images, whole_runs, tmp_path, capsys):
    run = copied(whole_runs("one epoch"), tmp_path / "run")
    before = (run.checkpoints / "last.pt").read_bytes()
    train(config_of("--epochs", "1"), images, run, resume=True)
    assert "finished already" in capsys.readouterr().out
    assert (run.checkpoints / "last.pt").read_bytes() == before


def test_a_checkpoint_of_another_recipe_is_refused(images, whole_runs, tmp_path):
    run, other = copied(whole_runs("one epoch"), tmp_path / "run"), RunDir(tmp_path / "other")
    train(config_of("--epochs", "1", "--seed", "5"), images, other)
    os.replace(other.checkpoints / "last.pt", run.checkpoints / "last.pt")
    with pytest.raises(UserError, match="its checkpoint was written by another configuration than its config.yaml"):
        train(config_of("--epochs", "1"), images, run, resume=True)


def test_a_data_set_that_changed_since_is_refused(images, whole_runs, tmp_path):
    run = copied(whole_runs("one epoch"), tmp_path / "run")
    changed = images.train.images.clone()
    changed[3, 0, 0, 0] ^= 1
    other = dataclasses.replace(images, train=dataclasses.replace(images.train, images=changed))
    with pytest.raises(UserError, match="the images of synthetic are not those that the run began with"):
        train(config_of("--epochs", "1"), other, run, resume=True)


def test_images_without_any_contrast_are_refused(images, tmp_path):
    grey = dataclasses.replace(images, train=dataclasses.replace(images.train, images=torch.full_like(images.train.images, 7)))
    with pytest.raises(UserError, match="synthetic: a colour channel has the same value in all training images"):
        train(config_of(), grey, RunDir(tmp_path / "run"))


def test_a_run_never_overwrites(images, tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / "precious").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty, and a run never overwrites one$"):
        train(config_of(), images, run)
    (run.path / "config.yaml").write_text("method: anchor")
    with pytest.raises(UserError, match="to go on with it: fastanchor train --resume .*run$"):
        train(config_of(), images, run)
    assert (run.path / "precious").read_text() == "x"


def test_a_run_without_a_finished_epoch_is_begun_anew(images, tmp_path):
    """Nothing is lost with it, and the corrected command must not be in its way; one that somebody trains stays."""
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match="diverged"):
        train(config_of("--optim.lr", "1e30"), images, run)
    assert run.is_blank() and not any(run.checkpoints.iterdir())
    with run.locked():
        assert not run.is_blank()
        with pytest.raises(UserError, match="exists and is not empty"):
            train(config_of("--epochs", "1"), images, run)
    train(config_of("--epochs", "1"), images, run)
    assert run.open().optim.lr < 1 and [row["epoch"] for row in run.history()] == [1] and not run.is_blank()


def test_stage_2_starts_from_the_best_backbone_and_leaves_it_alone(images, tmp_path):
    run = RunDir(tmp_path / "run")
    train(config_of("--stage2.mode", "alf"), images, run)
    first, final = (checkpoint.load(run.checkpoints / name) for name in ("stage1_best.pt", "best.pt"))
    assert (first["stage"], final["stage"]) == (1, 2)
    for name, value in final["weights"].items():
        same = torch.equal(value, first["weights"][name])
        assert same != name.startswith("classifier."), name
    assert [(row["stage"], row["epoch"]) for row in run.history()] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]


def test_a_stage_2_that_falls_behind_is_told(images, tmp_path, capsys, monkeypatch):
    from fastanchor.train import loop

    run = RunDir(tmp_path / "run")
    real = loop.measure

    def worse_in_stage_2(model, data, attack=None, **options):
        score = real(model, data, attack, **options)
        kept = (run.checkpoints / "stage1_best.pt").exists()
        return dataclasses.replace(score, accuracy=20.0 if kept else 60.0)

    monkeypatch.setattr(loop, "measure", worse_in_stage_2)
    train(config_of("--stage2.mode", "slf", "--epochs", "1"), images, run)
    printed = capsys.readouterr().out
    assert "note: stage 2's robust accuracy is 20.0 % on the validation split, stage 1's 60.0 %" in printed
    assert printed.strip().endswith(f"or judge {run.checkpoints / 'stage1_best.pt'}")


def test_stage_2_begins_with_a_new_classifier(images, tmp_path):
    run = RunDir(tmp_path / "run")
    train(config_of("--stage2.mode", "slf", "--stage2.lr", "1e-12", "--epochs", "1", "--stage2.epochs", "1"), images, run)
    first, second = (checkpoint.load(run.checkpoints / name)["weights"] for name in ("stage1_best.pt", "best.pt"))
    assert (first["classifier.weight"] - second["classifier.weight"]).abs().mean() > 0.05


@pytest.mark.parametrize("method, kept", [("standard", 2), ("anchor", 1)])
def test_the_method_decides_which_accuracy_selects(images, tmp_path, monkeypatch, method, kept):
    """Clean accuracy is best after the second epoch, robust accuracy after the first."""
    from fastanchor.train import loop

    run, real, clean, robust = RunDir(tmp_path / "run"), loop.measure, iter((50.0, 80.0, 70.0)), iter((30.0, 20.0, 10.0))

    def scripted(model, data, attack=None, **options):
        return dataclasses.replace(real(model, data, attack, **options), accuracy=next(clean if attack is None else robust))

    monkeypatch.setattr(loop, "measure", scripted)
    train(config_of("--method", method), images, run)
    assert checkpoint.load(run.checkpoints / "best.pt")["epoch"] == kept
    assert ("loss_hsc" in run.history()[0]) == (method == "anchor")


def test_validation_is_on_the_validation_split_and_the_test_set_is_not_touched(images, tmp_path, monkeypatch):
    from fastanchor.train import loop

    seen, real = [], loop.measure

    def watch(model, data, attack=None, **options):
        seen.append(data.labels.tolist())
        return real(model, data, attack, **options)

    monkeypatch.setattr(loop, "measure", watch)
    train(config_of("--epochs", "2"), dataclasses.replace(images, test=None), RunDir(tmp_path / "run"))
    assert seen == [images.val.labels.tolist()] * 4


def test_every_epoch_draws_its_own_order_and_noise(images, tmp_path, monkeypatch):
    from fastanchor.train.step import TrainStep

    seen = []
    real = TrainStep.make_views

    def watch(self, images_u8, labels):
        made, early = real(self, images_u8, labels)
        seen.append((labels.tolist(), (made["adv"] - made["aug"]).sum().item()))
        return made, early

    monkeypatch.setattr(TrainStep, "make_views", watch)
    train(config_of("--epochs", "3"), images, RunDir(tmp_path / "run"))
    assert len({tuple(labels) for labels, _ in seen}) == len({noise for _, noise in seen}) == 15


def test_average_is_what_is_judged(images, tmp_path):
    run = RunDir(tmp_path / "run")
    train(config_of("--epochs", "2", "--optim.ema-decay", "0.9"), images, run)
    state = checkpoint.load(run.checkpoints / "last.pt")
    assert not torch.equal(state["weights"]["classifier.weight"], state["training_weights"]["classifier.weight"])
    assert state["average_steps"] == 10


def test_validation_every_other_epoch_and_always_at_the_end(images, tmp_path):
    run = RunDir(tmp_path / "run")
    train(config_of("--val.every", "2", "--val.limit", "20"), images, run)
    assert ["val_robust" in row for row in run.history()] == [False, True, True]
    assert all(row.get("val_robust", 0) % 5 == 0 for row in run.history())  # of 20 images


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(images, tmp_path, monkeypatch):
    from fastanchor.methods.anchor import Anchor

    run = RunDir(tmp_path / "run")
    real = Anchor.loss

    def broken(self, out, labels, progress):
        terms = real(self, out, labels, progress)
        return terms | {"hsc": terms["hsc"] * float("inf")} if progress >= 1.5 else terms

    monkeypatch.setattr(Anchor, "loss", broken)
    with pytest.raises(UserError, match=r"the training diverged at step 8: ce_adv = [\d.]+, hsc = inf, grad_norm = (nan|inf)"):
        train(config_of(), images, run)
    state = checkpoint.load(run.checkpoints / "last.pt")
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["weights"].values())


def test_out_of_memory_says_what_fits_and_keeps_the_checkpoint(images, tmp_path, monkeypatch):
    from fastanchor.train.step import TrainStep

    run = RunDir(tmp_path / "run")
    real = TrainStep.__call__

    def limited(self, indices, *, progress):
        if (progress > 1 or progress == 0) and len(indices) > 10:  # progress 0: the trials of smaller batches
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        real(self, indices, progress=progress)

    monkeypatch.setattr(TrainStep, "__call__", limited)
    with pytest.raises(UserError) as caught:
        train(config_of(), images, run)
    text = str(caught.value)
    assert "batch_size = 32 with 2 views (aug, adv) does not fit" in text and "batch_size = 8 fits (tried)" in text
    assert text.endswith("The original error: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert checkpoint.load(run.checkpoints / "last.pt")["epoch"] == 1


def test_tensorboard_events_are_written(images, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path / "run")
    train(config_of("--epochs", "2", "--tensorboard"), images, run)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("stage1/loss")] == pytest.approx([row["loss"] for row in run.history()])


def test_a_batch_larger_than_the_training_set_is_the_training_set(images, tmp_path):
    run = RunDir(tmp_path / "run")
    train(config_of("--batch-size", "5000", "--epochs", "1"), images, run)
    assert len(run.history()) == 1


def test_bf16_training_keeps_fp32_weights(images, tmp_path):
    run = RunDir(tmp_path / "run")
    train(config_of("--precision", "bf16", "--epochs", "2"), images, run)
    assert {v.dtype for v in weights(run).values()} == {torch.float32, torch.int64}
    assert run.history()[-1]["loss"] < run.history()[0]["loss"]


def test_interrupting_loses_nothing(tmp_path):
    """Ctrl-C on the real command: one sentence with the way on, status 130, and the way on works."""
    flags = [flag for flag in SMALL if flag not in ("--data.source", "synthetic")]
    command = [sys.executable, "-m", "fastanchor.cli", "train", "anchor", "--data", "synthetic", "--out", str(tmp_path / "run"), *flags,
               "--epochs", "200", "--stage2.mode", "none"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("stage 1  epoch   2/200"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == f"fastanchor: interrupted; nothing is lost: fastanchor train --resume {tmp_path / 'run'}"
    state, note = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert state["epoch"] >= 2 and note is None


@pytest.mark.parametrize("flags", [["--engine.graph", "on"], ["--attack.backend", "graphed"], ["--optim.backend", "apex"]])
def test_what_the_device_cannot_do_is_said_before_the_folder_exists(images, tmp_path, flags):
    with pytest.raises(UserError, match=f"^{flags[0][2:]} = {flags[1]}: needs a CUDA device, this is cpu$"):
        train(config_of(*flags, "--device", "cpu"), images, RunDir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
