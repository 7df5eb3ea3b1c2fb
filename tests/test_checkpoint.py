"""Checkpoints survive kills, full disks and hostile files."""

import os
import pickle
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from fastanchor.errors import UserError
from fastanchor.train import checkpoint

STATE = {
    "config": {}, "class_names": ["a"], "mean": [0.0], "std": [1.0], "stage": 1, "epoch": 3,
    "weights": {"w": torch.arange(5000.0)}, "optimizer": {"lr": 0.1, "momentum": [torch.ones(3)]}, "best": {"robust": 1.0},
}  # fmt: skip


def test_round_trip_with_weights_only(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    state = checkpoint.load(path)
    assert torch.equal(state["weights"]["w"], STATE["weights"]["w"])
    assert {k: v for k, v in state.items() if k not in ("weights", "optimizer", "best")} == {"format": 1, **{k: STATE[k] for k in
            ("config", "class_names", "mean", "std", "stage", "epoch")}}  # fmt: skip
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_generation_before_is_kept(tmp_path):
    path = tmp_path / "last.pt"
    for epoch in (1, 2, 3):
        checkpoint.save(path, {**STATE, "epoch": epoch}, keep_previous=True)
    assert checkpoint.load(path)["epoch"] == 3
    assert checkpoint.load(tmp_path / "previous.pt")["epoch"] == 2
    assert checkpoint.load_latest(tmp_path)[0]["epoch"] == 3


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
def test_a_half_written_checkpoint_is_told_and_the_one_before_is_used(tmp_path, keep):
    path = tmp_path / "last.pt"
    for epoch in (1, 2):
        checkpoint.save(path, {**STATE, "epoch": epoch}, keep_previous=True)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"last\.pt: not a whole checkpoint \(\d+ bytes: .*\); half written"):
        checkpoint.load(path)
    state, note = checkpoint.load_latest(tmp_path)
    assert state["epoch"] == 1
    assert "last.pt: not a whole checkpoint" in note and note.endswith(f"falling back to {tmp_path / 'previous.pt'}")


def test_killed_between_the_two_renames(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    path.rename(tmp_path / "previous.pt")
    assert checkpoint.load_latest(tmp_path)[0]["epoch"] == 3


def test_no_epoch_finished_yet(tmp_path):
    assert checkpoint.load_latest(tmp_path) == (None, None)


def test_every_single_altered_byte_of_the_tensors_is_found(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    at = whole.index(STATE["weights"]["w"].numpy().tobytes())
    for offset in (0, 777, 19_999):
        altered = bytearray(whole)
        altered[at + offset] ^= 1
        path.write_bytes(altered)
        with pytest.raises(UserError, match="damaged: the checksum of .* does not match"):
            checkpoint.load(path)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_latest(tmp_path)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_hostile_pickle_is_never_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({**STATE, "format": 1, "extra": Hostile(trap)}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt: cannot be read as tensors and plain values"):
        checkpoint.load(tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Hostile(trap)))
    with pytest.raises(UserError, match="not a checkpoint at all"):
        checkpoint.load(tmp_path / "raw.pt")
    assert not trap.exists()


@pytest.mark.parametrize(
    "content, says",
    [
        ([1, 2], "not a checkpoint of fastanchor: it lacks class_names, config"),
        ({"state_dict": {}}, "not a checkpoint of fastanchor: it lacks"),
        ({**STATE, "format": 99}, "checkpoint format 99, this version reads 1"),
    ],
)
def test_foreign_files(tmp_path, content, says):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=says):
        checkpoint.load(tmp_path / "x.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "y.pt")


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path):
    """A limit on the size of files stands for a full disk: write(2) fails in the middle."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    code = """
        import resource, signal, sys, torch
        from pathlib import Path
        from fastanchor.train import checkpoint
        path = Path(sys.argv[1])
        state = checkpoint.load(path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            checkpoint.save(path, {**state, "epoch": 9}, keep_previous=True)
        except checkpoint.UserError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), path], capture_output=True, text=True, check=True)
    assert "last.pt: could not be written" in run.stdout and "the checkpoint before is intact" in run.stdout
    assert checkpoint.load(path)["epoch"] == 3
    assert os.listdir(tmp_path) == ["last.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10_000


def test_weights_of_another_network_are_refused(tmp_path):
    with pytest.raises(UserError, match="its weights belong to another network than its configuration describes"):
        checkpoint.restore_weights(
            torch.nn.Linear(2, 2), {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, tmp_path / "c.pt"
        )


def test_a_model_in_the_place_of_the_training_state_falls_back(tmp_path):
    checkpoint.save(tmp_path / "last.pt", STATE)
    checkpoint.save(tmp_path / "last.pt", {k: v for k, v in STATE.items() if k != "optimizer"}, keep_previous=True)
    state, note = checkpoint.load_latest(tmp_path)
    assert "optimizer" in state and "last.pt: a model, but no state of a training; falling back to" in note
