"""The speedrun: what is on its clock, that it trains as `fastanchor train` does, that no seed knows of another, its statistics."""

import contextlib
import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from graph_emulator import Emulator
from scipy import stats

from bench import machine, schema, speedrun, speedrun_claim, speedrun_clock, speedrun_track
from bench.speedrun_clock import Rig, judge
from fastanchor import environment, graphs, settings
from fastanchor.data.sources import ImageSet, Split
from fastanchor.data.sources import load as load_source
from fastanchor.errors import UserError
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.pipeline import load_images
from fastanchor.train import checkpoint
from fastanchor.train.loop import train
from fastanchor.train.run import RunDir
from fastanchor.train.step import TrainStep

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
ABOUT = {"device": "CPU: X, 1 thread", "commit": "abc", "python": "3.12", "packages": {"torch": "2.13.0"}, "command": "c"}
# A tiny entry: 49 training and 50 test images, three steps of 16 an epoch.
TINY = {
    "name": "tiny",
    "task": "a test",
    "data": {"source": "digits", "limit": 50},
    "target": {"attack": "pgd2:eps=0.1", "accuracy": 99.5},
    "seeds": 2,
    "alpha": 0.01,
    "device": "cpu",
    "recipe": "pgd_at",
    "set": {
        "data": {"augment": "crop", "pad": 1},
        "model": {"width": 4},
        "attack": {"eps": 0.1, "step_size": 0.1, "steps": 1},
        "optim": {"lr": 0.05, "schedule": "cyclic"},
        "epochs": 2,
        "batch_size": 16,
    },
}


@pytest.fixture(autouse=True)
def same_machine(monkeypatch):
    """Nothing measured, and a commit that stays."""
    monkeypatch.setattr(environment, "describe", lambda device: dict(ABOUT))
    monkeypatch.setattr(machine, "describe", lambda device: {"device": ABOUT["device"], "about": dict(ABOUT)})


def official(monkeypatch, folder, *names):
    """Let `folder` be the repository's, and these its tracks."""
    monkeypatch.setattr(speedrun_track, "FOLDER", folder)
    monkeypatch.setattr(speedrun_track, "TRACKS", names)


def write_track(folder, **changes):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def main(*arguments):
    return speedrun.main([*map(str, arguments), "--device", "cpu"])


def run_tiny(tmp_path, *arguments, **changes):
    """The exit status and what was written."""
    status = main(write_track(tmp_path, **changes), "--out", tmp_path / "out", *arguments)
    path = tmp_path / "out" / "speedrun.json"
    return status, json.loads(path.read_text()) if path.exists() else None


def seed_rows(found):
    return [row for row in found["results"] if row["part"] == "seeds"]


def tiny_config(tmp_path, **overrides):
    return speedrun_track.resolve(speedrun_track.read(write_track(tmp_path)), overrides, device="cpu")


def make_rig(config, images):
    return Rig(config, images.num_classes, len(images.train), images.image_shape, CPU)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The training


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"optim.ema_decay": 0.9, "optim.name": "adamw", "optim.lr": 0.01, "precision": "bf16", "val.every": 1},
        {
            "method": "anchor",
            "loss.hsc": 0.5,
            "model.head": "linear",
            "model.head_dim": 8,
            "optim.schedule": "step",
            "optim.milestones": [1],
        },
        {"batch_size": 64, "data.augment": "crop_flip", "optim.name": "lamb", "optim.clip_grad_norm": 1.0},
    ],
    ids=["sgd", "adamw, average, bf16", "anchor", "lamb, one batch"],
)
def test_the_weights_are_those_of_the_training_loop_to_the_bit(tmp_path, overrides):
    """`train` validates after every epoch; its validation draws from generators of its own and changes nothing."""
    validation = {"val": {"attack": "pgd1", "every": overrides.pop("val.every", 2)}}
    config = dataclasses.replace(tiny_config(tmp_path, **overrides), seed=7)
    images = load_images(config)
    train(settings.from_dict(validation, "test", config), images, RunDir(tmp_path / "run"))
    expected = checkpoint.load(tmp_path / "run/checkpoints/last.pt")["weights"]
    model, _ = make_rig(config, images).timed(7, images.train)
    assert same(weights(model), expected)


@pytest.mark.parametrize("method", ["nuat", "advcl"])
def test_a_method_with_more_than_a_network_is_refused(tmp_path, method):
    with pytest.raises(UserError, match=f"method = {method}: the clock knows methods that train the network alone"):
        tiny_config(tmp_path, method=method)


@pytest.mark.parametrize("graphed", [False, True], ids=["plain", "as one (emulated) graph"])
def test_seeds_in_any_order_give_the_same_weights(tmp_path, graphed):
    """What a seed leaves behind, in memory or in a random generator, does not reach the next one."""
    config = tiny_config(tmp_path, **{"optim.ema_decay": 0.9, **({"engine.graph": "on"} if graphed else {})})
    images = load_images(config)
    with graphs.use_recorder(Emulator) if graphed else contextlib.nullcontext():
        rig = make_rig(config, images)
        assert rig.step.graphed == graphed
        first = {seed: weights(rig.timed(seed, images.train)[0]) for seed in (0, 1)}
        torch.rand(5)
        again = {seed: weights(rig.timed(seed, images.train)[0]) for seed in (1, 0)}
        fresh = weights(make_rig(config, images).timed(1, images.train)[0])
    assert not same(first[0], first[1])
    assert same(first[0], again[0]) and same(first[1], again[1]) and same(first[1], fresh)


def test_before_the_clock_every_value_is_spoilt(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, **{"optim.ema_decay": 0.9, "optim.name": "adamw"})
    images = load_images(config)
    rig = make_rig(config, images)
    rig.wipe()
    assert_spoilt(rig)
    rig.timed(0, images.train)
    monkeypatch.setattr(Rig, "_train", lambda rig, seed, images: assert_spoilt(rig))  # as the clock finds it
    rig.timed(0, images.train)


def assert_spoilt(rig):
    held = [*rig.model.state_dict().values(), *rig.average.model.state_dict().values()]
    held += [tensor for state in rig.optimizer.state.values() for tensor in state.values()]
    held += [group["lr"] for group in rig.optimizer.param_groups]
    assert len(held) > 100
    assert all(torch.isnan(tensor).all() if tensor.is_floating_point() else (tensor == 1).all() for tensor in held)
    assert (rig.data.images == 1).all() and (rig.data.labels == 1).all()


def test_the_preparation_never_sees_the_training_images(tmp_path):
    """It is handed their count and size alone; other images than it was made for are refused."""
    config = tiny_config(tmp_path)
    images = load_images(config)
    rig = make_rig(config, images)
    assert not torch.equal(rig.data.images, images.train.images)
    with pytest.raises(ValueError, match="rig was made for"):
        rig.timed(0, Split(images.train.images[:5], images.train.labels[:5]))


@pytest.mark.gpu
def test_on_a_gpu_the_step_is_captured_before_the_clock(tmp_path):
    """Bit by bit nothing can be asked for there: that each seed starts anew shows in weights that are finite after a wipe."""
    config = tiny_config(tmp_path, **{"optim.ema_decay": 0.9, "precision": "bf16"})
    images = load_images(config)
    rig = Rig(config, images.num_classes, len(images.train), images.image_shape, torch.device("cuda"))
    assert rig.step.graphed and len(rig.step._graphs) == 1
    found = []
    for seed in (0, 1):
        model, seconds = rig.timed(seed, images.train)
        assert seconds > 0 and all(tensor.isfinite().all() for tensor in model.state_dict().values())
        found.append(weights(model))
    assert not same(*found) and len(rig.step._graphs) == 1 and rig.peak_memory_mb > 0


# The clock


class FakeClock:
    def __init__(self, monkeypatch):
        self.seconds = 0.0
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(speedrun_clock, "now", lambda device: self.seconds)

    def takes(self, owner, name, seconds):
        """Let a function take so long, beside what it does."""
        function = getattr(owner, name)

        def slow(*args, **kwargs):
            self.seconds += seconds
            return function(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, slow)


def test_what_is_on_the_clock_and_what_is_not(tmp_path, monkeypatch):
    clock = FakeClock(monkeypatch)
    clock.takes(TrainStep, "__call__", 1)
    clock.takes(speedrun_clock, "model_from_config", 10)
    clock.takes(speedrun_clock, "channel_stats", 100)
    clock.takes(TrainStep, "__init__", 1e3)
    clock.takes(Rig, "wipe", 1e4)
    clock.takes(speedrun_clock, "measure", 1e5)
    clock.takes(speedrun, "load_images", 1e6)
    status, found = run_tiny(tmp_path)
    assert status == 1
    rows = seed_rows(found)
    # On it: weights drawn, channel statistics, two epochs of three steps. Before it: the same once, with two steps, and the capture.
    assert [row["seconds"] for row in rows] == [10 + 100 + 6] * 2
    assert [row["preparation_s"] for row in rows] == [1000 + 10 + 100 + 2] * 2
    assert [row["cold_s"] for row in rows] == [1112 + 116] * 2
    assert [row["judgement_s"] for row in rows] == [2e5] * 2
    summary = found["results"][-1]
    assert (summary["seconds_mean"], summary["seconds_std"], summary["cold_s_mean"]) == (116, 0, 1228)


def test_the_device_is_waited_for_on_both_ends(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda")
    assert speedrun_clock.now(device) <= speedrun_clock.now(device)
    assert waited == [device, device]
    speedrun_clock.now(CPU)
    assert len(waited) == 2


def test_the_test_images_are_not_looked_at_before_the_clock_has_stopped(tmp_path, monkeypatch):
    seen = []

    class Watched(ImageSet):
        def __getattribute__(self, name):
            if name in ("test", "val"):
                seen.append(name)
            return super().__getattribute__(name)

    def load(config):
        return Watched(**vars(load_images(config)))

    def timed(self, seed, images, original=Rig.timed):
        seen.append("starts")
        assert isinstance(images, Split)  # all that it gets to see
        found = original(self, seed, images)
        seen.append("stops")
        return found

    monkeypatch.setattr(speedrun, "load_images", load)
    monkeypatch.setattr(Rig, "timed", timed)
    run_tiny(tmp_path)
    first = seen[: len(seen) // 2]
    assert first[:3] == ["starts", "stops", "test"] and set(first[2:]) == {"test"} and seen == first * 2


# The whole program


def test_a_run_from_end_to_end(tmp_path, capsys):
    status, found = run_tiny(tmp_path, "--set", "optim.lr=0.1", "--data-root", tmp_path)
    assert status == 1
    assert (found["schema"], found["kind"], found["parts"]["seeds"]["status"]) == (1, "bench.speedrun", "done")
    assert [row["part"] for row in found["results"]] == ["environment", *["begun", "seeds"] * 2, "summary"]
    schema.validate({**found, "results": found["results"][1:]})  # the environment is a stand-in
    lines = [json.loads(line) for line in (tmp_path / "out/speedrun.jsonl").read_text().splitlines()]
    assert lines == found["results"]
    given = found["settings"]
    assert given["track"] == TINY and given["seeds"] == [0, 1] and given["overrides"] == {"optim.lr": 0.1}
    assert given["config"]["optim"]["lr"] == 0.1 and given["config"]["data"]["limit"] == 50
    assert given["config"]["data"]["root"] is None
    assert parse_attack(given["target"]["attack"], default_eps=1) == parse_attack("pgd2:eps=0.1", default_eps=1)
    assert found["results"][0]["about"]["commit"] == "abc"
    config = settings.from_dict(given["config"], "test")
    images = load_images(config)
    rig = make_rig(config, images)
    for row in seed_rows(found):
        model, _ = rig.timed(row["seed"], images.train)
        options = {"num_classes": 10, "batch_size": 500, "device": CPU}
        judged = judge(model, images.test, parse_attack("pgd2:eps=0.1", default_eps=1), **options)
        assert (judged["clean"], judged["robust"]) == (row["clean"], row["robust"]) and "failed" not in row
        assert row["seconds"] > 0 and row["cold_s"] == row["seconds"] + row["preparation_s"]
        assert row["epochs"] == 2 and row["images_seen"] == 2 * 3 * 16 and row["test_images"] == 50
        assert row["pflop"] == rig.flops / 1e15 > 0 and row["peak_memory_mb"] is None
    summary = found["results"][-1]
    robust = [row["robust"] for row in seed_rows(found)]
    assert summary["robust_all"] == robust and summary["n"] == 2 and not summary["holds"] and not summary["counts"]
    assert summary["restarted"] == 0
    said = capsys.readouterr().out
    assert "does not hold (p = " in said and "optim.lr set by hand" in said
    assert f"{robust[1]:.2f}" in said


def judged_as(monkeypatch, *robust):
    """Let the judge find these accuracies, one after the other, again and again."""
    values = itertools.cycle(robust)
    monkeypatch.setattr(speedrun, "judge", lambda *_, **__: {"clean": 90.0, "robust": next(values), "judgement_s": 1.0})


HOLDS = {"target": {"attack": "pgd2:eps=0.1", "accuracy": 50}, "seeds": 4}


def test_a_claim_that_holds_ends_with_0_and_counts(tmp_path, monkeypatch):
    judged_as(monkeypatch, 60.0, 61.0)
    official(monkeypatch, tmp_path, "tiny")
    status, found = run_tiny(tmp_path, **HOLDS)
    assert status == 0 and found["results"][-1]["counts"] and found["results"][-1]["against"] == []


def test_the_entry_of_a_file_of_ones_own_is_no_record(tmp_path, monkeypatch, capsys):
    judged_as(monkeypatch, 60.0, 61.0)
    status, found = run_tiny(tmp_path, **HOLDS)
    assert status == 0 and not found["results"][-1]["counts"]
    assert found["results"][-1]["against"] == [f"its track {tmp_path / 'tiny.yaml'} is none of the repository's"]
    assert "no record: its track" in capsys.readouterr().out


def test_seeds_that_are_all_the_same_show_nothing(tmp_path, monkeypatch, capsys):
    judged_as(monkeypatch, 60.0)
    status, found = run_tiny(tmp_path, **HOLDS)
    summary = found["results"][-1]
    assert status == 1 and summary["p"] is None and not summary["holds"]
    assert summary["verdict"] == "does not hold: all seeds have the same accuracy, of which no test can say anything"
    assert summary["verdict"] in " ".join(capsys.readouterr().out.split())
    schema.validate({**found, "results": found["results"][1:]})


def test_fewer_seeds_than_the_track_needs_give_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun, "judge", lambda *_, **__: {"clean": 99.9, "robust": 99.9, "judgement_s": 1.0})
    status, found = run_tiny(tmp_path, "--seeds", "1")
    assert status == 1 and found["results"][-1]["verdict"] == "too few seeds (1 of 2)" and found["results"][-1]["p"] is None


def test_a_killed_run_goes_on_and_drops_no_seed(tmp_path, monkeypatch, capsys):
    run_tiny(tmp_path, "--out", tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/speedrun.json").read_text())
    calls = []

    def stopped(*args, original=speedrun.judge, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(speedrun, "judge", stopped)
    status, first = run_tiny(tmp_path)
    assert status == 130 and len(seed_rows(first)) == 1
    assert [row["seed"] for row in first["results"] if row["part"] == "begun"] == [0, 1]
    capsys.readouterr()
    assert run_tiny(tmp_path)[0] == 2 and "--resume goes on" in capsys.readouterr().err
    assert run_tiny(tmp_path, "--resume", "--set", "epochs=3")[0] == 2 and "another overrides" in capsys.readouterr().err
    monkeypatch.setattr(environment, "describe", lambda device: {**ABOUT, "commit": "def"})
    assert run_tiny(tmp_path, "--resume")[0] == 2 and "another commit" in capsys.readouterr().err
    monkeypatch.setattr(environment, "describe", lambda device: dict(ABOUT))
    assert seed_rows(json.loads((tmp_path / "out/speedrun.json").read_text())) == seed_rows(first)
    status, found = run_tiny(tmp_path, "--resume")
    assert status == 1 and len(calls) == 3
    kept = ("seed", "clean", "robust", "images_seen", "pflop")
    assert [{key: row[key] for key in kept} for row in seed_rows(found)] == [
        {key: row[key] for key in kept} for row in seed_rows(whole)
    ]
    assert seed_rows(found)[0]["seconds"] == seed_rows(first)[0]["seconds"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["speedrun.json", "speedrun.jsonl"]
    assert [row["seed"] for row in found["results"] if row["part"] == "begun"] == [0, 1, 1]
    # Nothing is left to do: the same figures, and no training.
    monkeypatch.setattr(Rig, "timed", None)
    again = run_tiny(tmp_path, "--resume")[1]
    assert seed_rows(again) != [] and len(calls) == 3
    for summary in (found["results"][-1], again["results"][-1]):
        assert summary["restarted"] == 1 and any("1 of its seeds restarted" in said for said in summary["against"])


def test_a_seed_that_is_killed_on_its_clock_leaves_a_trace(tmp_path, monkeypatch):
    judged_as(monkeypatch, 60.0, 61.0)
    official(monkeypatch, tmp_path, "tiny")
    with monkeypatch.context() as patch:
        patch.setattr(Rig, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_tiny(tmp_path, **HOLDS)[0] == 130
    status, found = run_tiny(tmp_path, "--resume", **HOLDS)
    summary = found["results"][-1]
    assert status == 0 and summary["holds"] and summary["restarted"] == 1 and not summary["counts"]
    assert summary["against"] == ["1 of its seeds restarted, so their times were drawn anew: 0"]


def test_a_seed_that_diverges_counts_with_0_and_is_said(tmp_path, capsys):
    status, found = run_tiny(tmp_path, "--set", "optim.lr=1e30")
    assert status == 1
    for row in seed_rows(found):
        assert (row["clean"], row["robust"]) == (0, 0) and "diverged" in row["failed"] and row["images_seen"] == 96
    summary = found["results"][-1]
    assert (summary["n"], summary["failed"], summary["robust_mean"]) == (2, 2, 0)
    assert "of these 2 failed" in capsys.readouterr().out


def test_finite_weights_whose_logits_are_not_count_as_0(tiny_model):
    with torch.no_grad():
        tiny_model.classifier.weight.fill_(3e38)
        tiny_model.classifier.bias.fill_(3.4e38)
    test = load_source("digits", limit=20).test
    found = judge(tiny_model, test, parse_attack("pgd1:eps=0.1", default_eps=1), num_classes=10, batch_size=50, device=CPU)
    assert (found["clean"], found["robust"]) == (0, 0) and "not all finite" in found["failed"]


def test_autoattack_judges_says_how_far_it_is_and_is_asked_for_before_the_training(tmp_path, monkeypatch, capsys):
    target = {"attack": "autoattack:eps=0.5", "accuracy": 50}
    data = {"source": "digits", "limit": 20}
    status, found = run_tiny(tmp_path, "--seeds", "1", target=target, data=data)
    stages = seed_rows(found)[0]["stages"]
    said = capsys.readouterr().out
    assert all(f"AutoAttack after {stage}: {accuracy:.2f} %" in said for stage, accuracy in stages.items())
    assert status == 1 and list(stages) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert seed_rows(found)[0]["robust"] == stages["square"] <= stages["clean"] == seed_rows(found)[0]["clean"]
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setattr(Rig, "__init__", None)
    assert main(write_track(tmp_path, target=target, data=data), "--out", tmp_path / "other") == 2
    assert "pyautoattack" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"targets": 3}, [], "unknown key targets; did you mean 'target'?"),
        ({"recipe": None}, [], "recipe is missing"),
        ({"recipe": "pgd"}, [], "recipe 'pgd' is not known"),
        ({"seeds": 1}, [], "seeds = 1: must be a whole number >= 2"),
        ({"alpha": 0}, [], "alpha = 0: must be a number between 0 and 1"),
        ({"device": "tpu"}, [], "device = tpu: must be one of cpu, cuda"),
        ({"name": "a/b"}, [], "name = a/b"),
        ({"data": {"limit": 3}}, [], "data.source is missing"),
        ({"data": []}, [], "data = []: must be a mapping"),
        ({"data": 0}, [], "data = 0: must be a mapping"),
        ({"target": []}, [], "target = []: must be a mapping"),
        ({"target": ""}, [], "target = : must be a mapping"),
        ({"set": []}, [], "set = []: must be a mapping"),
        ({"set": False}, [], "set = False: must be a mapping"),
        ({"record": []}, [], "record = []: must be a text"),
        ({"device": []}, [], "device = []: must be one of"),
        ({"data": {"source": "digits", "pad": 3}}, [], "data.pad: is no part of the task"),
        ({"data": {"source": "digits", "limitt": 3}}, [], "unknown setting data.limitt = 3; did you mean 'data.limit'?"),
        (
            {"target": {"attack": "pgd20:eps=0.1", "accuracy": 100}},
            [],
            "target.accuracy = 100: must be a number between 0 and 100",
        ),
        ({"target": {"attack": "pgd20", "accuracy": 50}}, [], "must state its radius"),
        ({"target": {"attack": "pdg20:eps=0.1", "accuracy": 50}}, [], "'pdg20' is not known"),
        ({"set": {"optim": {"lrr": 1}}}, [], "unknown setting optim.lrr = 1"),
        ({"set": {"data": {"limit": 10}}}, [], "data.limit: cannot be set here: the images belong to the task"),
        ({"set": {"stage2": {"mode": "alf"}}}, [], "a speedrun has one stage"),
        ({}, ["--set", "seed=3"], "seed: cannot be set here: the seeds are those of --seeds"),
        ({}, ["--set", "data.source=cifar10"], "data.source: cannot be set here"),
        ({}, ["--set", "val.every=2"], "a speedrun validates nothing"),
        ({}, ["--set", "epochs"], "--set epochs: must be key=value"),
        ({}, ["--set", "epochs=[3"], "not one of YAML's"),
        ({}, ["--set", "epochs=0"], "epochs = 0: must be >= 1"),
        ({}, ["--seeds", "0"], "--seeds 0: must be how many"),
        ({}, ["--seeds", "0,x"], "--seeds 0,x: must be how many"),
        ({}, ["--seeds", "1,0,1"], "names a seed twice"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, changes, arguments, said):
    assert main(write_track(tmp_path, **changes), "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_bad_input(tmp_path, capsys):
    assert main("digit") == 2 and "did you mean 'digits'?" in capsys.readouterr().err
    assert main() == 2 and "which track?" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert main(tmp_path / "list.yaml") == 2 and "a track is a mapping" in capsys.readouterr().err
    assert main(tmp_path / "none.yaml") == 2 and "no such file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(write_track(tmp_path), "--out", tmp_path / "file/out") == 2 and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seeds"), [(None, [0, 1, 2]), ("2", [0, 1]), ("3,1", [3, 1]), ("5,", [5]), ("0", None), ("", None), ("-1,2", None)]
)
def test_seeds(text, seeds):
    if seeds is not None:
        assert speedrun.parse_seeds(text, 3) == seeds
        return
    with pytest.raises(UserError, match="must be how many"):
        speedrun.parse_seeds(text, 3)


def test_the_tracks_of_the_repository(capsys):
    """Each resolves to a configuration, and one that names a record has it; none that git knows is left out."""
    for name in speedrun_track.TRACKS:
        track = speedrun_track.load(name)
        assert track.name == name and track.alpha <= 0.01
        config = speedrun_track.resolve(track, {}, device="auto")
        assert config.data.source == track.data["source"]
        if track.record is not None:
            assert (ROOT / track.record).is_dir()
    assert main("--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in speedrun_track.TRACKS)
    git = ["git", "-C", str(ROOT), "ls-files", "bench/speedruns/*.yaml"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # a copy without its history
        known = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
        assert sorted(Path(line).stem for line in known) == list(speedrun_track.TRACKS)


def test_a_file_of_ones_own_is_given_by_its_path_wherever_it_lies(tmp_path, monkeypatch, capsys):
    """Also beside the repository's tracks: no commit says what it holds."""
    official(monkeypatch, tmp_path, "known")
    own = write_track(tmp_path)
    own.with_name("known.yaml").write_text(own.read_text())
    assert main("--list") == 0
    shown = capsys.readouterr().out
    assert "known" in shown and "tiny" not in shown
    assert main("tiny") == 2
    assert "track 'tiny' is not known; tracks: known, or the path of a .yaml file" in capsys.readouterr().err
    assert speedrun_track.outside(speedrun_track.load("known")) == []
    assert speedrun_track.outside(speedrun_track.load(str(own))) == [f"its track {own} is none of the repository's"]


def test_what_a_recipe_says_of_the_images_is_not_the_tasks(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {source: synthetic, limit: 30, split_seed: 5, pad: 2}\nloss: {hsc: 0}\n")
    track = speedrun_track.read(write_track(tmp_path, recipe=str(tmp_path / "own.yaml"), data={"source": "digits"}, set={}))
    data = speedrun_track.resolve(track, {}, device="cpu", root="/somewhere").data
    assert (data.source, data.limit, data.split_seed, data.pad, data.root) == ("digits", None, 0, 2, "/somewhere")


def test_what_speaks_against_a_record(tmp_path, monkeypatch):
    official(monkeypatch, tmp_path, "tiny")
    track = speedrun_track.read(write_track(tmp_path, device_name="X"))
    assert speedrun._against(track, ABOUT, CPU, [0, 1], {}, []) == []
    others = [
        (ABOUT, torch.device("cuda"), [0, 1], {}, "ran on cuda"),
        ({**ABOUT, "device": "CPU: Y"}, CPU, [0, 1], {}, "ran on CPU: Y"),
        (ABOUT, CPU, [1, 2], {}, "seeds"),
        (ABOUT, CPU, [0, 1], {"epochs": 3}, "epochs set by hand"),
        ({**ABOUT, "commit": "abc+"}, CPU, [0, 1], {}, "commit"),
        ({**ABOUT, "commit": None}, CPU, [0, 1], {}, "commit"),
    ]
    for about, device, seeds, overrides, said in others:
        found = speedrun._against(track, about, device, seeds, overrides, [])
        assert len(found) == 1 and said in found[0]
    assert speedrun._against(track, ABOUT, CPU, [0, 1], {}, [1]) == [
        "1 of its seeds restarted, so their times were drawn anew: 1"
    ]


def test_the_files_of_a_record_are_of_the_repository(tmp_path, monkeypatch):
    """Of any other file the commit says nothing; a link in the folder leads out of it."""
    for name in speedrun_track.TRACKS:
        assert speedrun_track.outside(speedrun_track.load(name)) == []
    write_track(tmp_path)
    folder = tmp_path / "speedruns"
    folder.mkdir()
    (folder / "linked.yaml").symlink_to(tmp_path / "tiny.yaml")
    official(monkeypatch, folder, "linked", "tiny")
    assert len(speedrun_track.outside(speedrun_track.load("linked"))) == 1
    (tmp_path / "own.yaml").write_text("epochs: 1\n")
    for recipe, outside in (("pgd_at", 0), (str(ROOT / "fastanchor/recipes" / "x.yaml"), 0), (str(tmp_path / "own.yaml"), 1)):
        found = speedrun_track.outside(speedrun_track.read(write_track(folder, recipe=recipe)))
        assert len(found) == outside and all("is none of fastanchor's" in said for said in found)


# Statistics


def rows_of(robust, seconds=None):
    seconds = seconds or [1.0] * len(robust)
    return [{"seconds": s, "cold_s": s + 1, "clean": 90.0, "robust": r} for r, s in zip(robust, seconds, strict=True)]


def test_the_claim_by_hand():
    """Mean 53, variance 2.5, standard error sqrt(0.5): t = 3 / sqrt(0.5) with 4 degrees of freedom."""
    found = speedrun_claim.summarise(rows_of([51, 52, 53, 54, 55], [2, 4, 6, 8, 10]), 50, 0.01, 5)
    assert found["robust_mean"] == 53 and found["robust_std"] == pytest.approx(math.sqrt(2.5))
    assert found["seconds_mean"] == 6 and found["seconds_std"] == pytest.approx(math.sqrt(10)) and found["cold_s_mean"] == 7
    assert found["p"] == pytest.approx(stats.t.sf(3 / math.sqrt(0.5), 4), rel=1e-9)
    assert found["p"] == pytest.approx(0.00662, abs=1e-5)  # from a table: t(4) = 4.2426
    assert found["holds"] and found["verdict"] == "holds (p = 0.0066)"
    assert not speedrun_claim.summarise(rows_of([51, 52, 53, 54, 55]), 50, 0.005, 5)["holds"]
    below = speedrun_claim.summarise(rows_of([45, 46, 47, 48, 49]), 50, 0.01, 5)
    assert below["p"] > 0.99 and below["verdict"].startswith("does not hold")
    few = speedrun_claim.summarise(rows_of([51, 52, 53, 54, 55]), 50, 0.01, 6)
    assert not few["holds"] and few["verdict"] == "too few seeds (5 of 6)"


@pytest.mark.parametrize("value", [10.0, 50.0, 90.0])
def test_seeds_without_a_spread(value):
    """Whichever side of the target: a collapsed network has the same accuracy with every seed."""
    found = speedrun_claim.summarise(rows_of([value] * 5), 50, 0.01, 5)
    assert found["p"] is None and found["holds"] is False and "same accuracy" in found["verdict"]
    assert speedrun_claim.summarise(rows_of([value]), 50, 0.01, 2)["verdict"] == "too few seeds (1 of 2)"


def test_the_paired_test_by_hand():
    """Logarithms of A / B: 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1: t = 0.2 / (0.1 / sqrt(3)) with 2 degrees of freedom."""
    b = [2.0, 30.0, 5.0]  # what the pairs share, however much, is no part of it
    a = [value * math.exp(gain) for value, gain in zip(b, (0.1, 0.2, 0.3), strict=True)]
    found = speedrun_claim.quicker(a, b)
    assert found["p"] == pytest.approx(stats.t.sf(2 * math.sqrt(3), 2), rel=1e-9)
    assert found["p"] == pytest.approx(0.0371, abs=1e-4)  # from a table: t(2) = 3.4641
    assert found["ratio"] == pytest.approx(math.exp(0.2)) and found["ratios"] == pytest.approx(
        list(map(math.exp, (0.1, 0.2, 0.3)))
    )
    other = speedrun_claim.quicker(b, a)
    assert other["p"] == pytest.approx(1 - found["p"]) and other["ratio"] == pytest.approx(math.exp(-0.2))
    assert speedrun_claim.quicker([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])["p"] is None


# Runs in turns

A, B = {**ABOUT, "commit": "aaa"}, {**ABOUT, "commit": "bbb"}


def run_file(folder, turn, seconds, *, about=ABOUT, robust=(60.0, 61.0, 62.0), begun=(0, 1, 2), prepared=(5.0,) * 3, **changes):
    """The file of a run that began in the minute `turn` and took 50 s; `seconds`: mean of its three seeds. changes: of its track."""
    track = {**TINY, "target": {"attack": "pgd2:eps=0.1", "accuracy": 50}, "seeds": 3, **changes}
    rows = [{"part": "environment", "name": "device and ceilings", "about": about}]
    rows += [{"part": "begun", "name": f"seed {seed}", "seed": seed} for seed in begun]
    for i, row in enumerate(rows_of(robust, [seconds - 0.001, seconds, seconds + 0.001])):
        rows.append({"part": "seeds", "name": f"seed {i}", "seed": i, **row, "preparation_s": prepared[i]})
    rows.append({"part": "summary", "name": "tiny"})
    given = {"track": track, "target": track["target"], "seeds": [0, 1, 2], "overrides": {}, "config": {}}
    found = {"schema": 1, "kind": "bench.speedrun", "started": f"2026-11-22T10:{turn:02}:00+0000", "settings": given, "parts": {}}
    path = folder / f"{len(list(folder.glob('*.json')))}.json"
    path.write_text(json.dumps({**found, "results": [{**row, "at_s": 50.0} for row in rows]}))
    return path


def in_turns(folder, a, b, **changes):
    """A1, B1, A2, ...: runs of these mean seconds, one after the other; changes: of B's last run."""
    paths = []
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        paths.append(run_file(folder, 2 * i, one, about=A))
        given = {"about": B, "recipe": "anchor", **(changes if i == len(b) - 1 else {})}
        paths.append(run_file(folder, given.pop("turn", 2 * i + 1), other, **given))
    return paths


def test_compare(tmp_path, capsys):
    """The machine gets slower from pair to pair, more than A and B differ; within the pairs B is quicker by a fifth."""
    quick = in_turns(tmp_path, [10.0, 15.0, 30.0], [8.0, 12.1, 23.9])
    assert main("--compare", *quick) == 0
    said = capsys.readouterr().out
    assert "A3: n = 3" in said and "1.250, 1.240, 1.255; geometric mean 1.248" in said and said.endswith("B is quicker\n")
    found = speedrun.compare(quick)
    assert found["ratio"] == pytest.approx((10 * 15 * 30 / (8 * 12.1 * 23.9)) ** (1 / 3)) and found["p"] < 0.01
    assert (found["verdict"], found["exit"], list(found["claims"])) == ("B is quicker", 0, ["A1", "B1", "A2", "B2", "A3", "B3"])
    assert main("--compare", *in_turns(tmp_path, [8.0, 12.1, 23.9], [10.0, 15.0, 30.0])) == 1
    assert "not shown to be quicker" in capsys.readouterr().out
    assert main("--compare", *in_turns(tmp_path, [10.0] * 3, [8.0] * 3)) == 1 and "p = none" in capsys.readouterr().out


def test_one_entry_against_itself_under_load_is_not_quicker(tmp_path):
    """The seeds of each run agree to a thousandth, and the machine's load moves whole runs: no thousand seeds would tell."""
    found = speedrun.compare(in_turns(tmp_path, [10.0, 10.0, 10.4], [9.0, 10.3, 10.0]))
    assert found["exit"] == 1 and found["p"] > 0.05


def test_every_run_of_a_comparison_must_hold_the_target(tmp_path, capsys):
    weak = in_turns(tmp_path, [10.0, 15.0, 30.0], [8.0, 12.1, 23.9], robust=[49.0, 50.0, 51.0])
    assert main("--compare", *weak) == 1
    assert "B is not shown to be quicker: the claim of B3 does not hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"source": "synthetic"}}, "A1 and B3 are runs of two tracks: their data differs"),
        ({"target": {"attack": "pgd2:eps=0.1", "accuracy": 51}}, "their target differs"),
        ({"name": "other"}, "their name differs"),
        ({"about": {**B, "device": "CPU: Y"}}, "two devices"),
        ({"about": A}, "B2 and B3 are runs of two entries: their commit differs"),
        ({"about": {**B, "packages": {"torch": "2.14.0"}}}, "their packages differs"),
        ({"recipe": "pgd_at"}, "two entries: their track differs"),
        ({"about": {**B, "commit": "bbb+"}}, "is not that of a commit"),
        ({"turn": 3}, "B3 began before A3 had ended"),
        ({"turn": 4}, "B3 began before A3 had ended"),
        ({"begun": [0, 1, 1, 2]}, "was killed and gone on with"),
        ({"prepared": [5.0, 5.0, 6.0]}, "was killed and gone on with"),
    ],
)
def test_compare_refuses_runs_that_differ_in_more_than_the_entry(tmp_path, capsys, changes, said):
    assert main("--compare", *in_turns(tmp_path, [3.0, 3.1, 3.2], [2.0, 2.1, 2.3], **changes)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_compare_refuses_runs_not_made_in_turns(tmp_path, capsys):
    a1, b1, a2, b2, a3, b3 = in_turns(tmp_path, [3.0, 3.1, 3.2], [2.0, 2.1, 2.3])
    late = run_file(tmp_path, 0, 3.0, about=A)
    late.write_text(late.read_text().replace('"at_s": 50.0', '"at_s": 62.5'))  # it ran on while B1 did
    short = [run_file(tmp_path, 0, 3.0, about=about) for about in (A, B) * 3]
    for path in short:  # of one second, in which no order shows
        path.write_text(path.read_text().replace('"at_s": 50.0', '"at_s": 0.3'))
    turns = [short, [a1, b1, a3, b2, a2, b3], [b1, a1, b2, a2, b3, a3], [a1, b1, a1, b1, a1, b1], [late, b1, a2, b2, a3, b3]]
    for paths in turns:
        assert main("--compare", *paths) == 2 and "made in turns" in capsys.readouterr().err
    for paths in ([a1, b1], [a1, b1, a2, b2], [a1, b1, a2, b2, a3], [a1, b1, a2, b2, a3, b3, a3]):
        assert main("--compare", *paths) == 2
        assert f"at least 3 pairs of runs, found {len(paths)} files" in capsys.readouterr().err


def test_compare_refuses_what_is_no_run(tmp_path, capsys):
    runs = in_turns(tmp_path, [3.0, 3.1, 3.2], [2.0, 2.1, 2.3])
    good = json.loads(runs[-1].read_text())
    files = {
        "is not JSON": "{",
        "is no file of bench.speedrun": {"schema": 1, "kind": "bench.gpu"},
        "has not ended": {**good, "results": good["results"][:-1]},
        "as bench.speedrun writes it (KeyError": {**good, "settings": {}},
        "as bench.speedrun writes it (ValueError": {**good, "started": "yesterday"},
        "as bench.speedrun writes it (Index": {**good, "results": good["results"][1:]},
        "as bench.speedrun writes it (Stat": {**good, "results": [row for row in good["results"] if row["part"] != "seeds"]},
    }
    for said, found in files.items():
        (tmp_path / "bad.txt").write_text(found if isinstance(found, str) else json.dumps(found))
        assert main("--compare", *runs[:-1], tmp_path / "bad.txt") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert main("--compare", *runs[:-1], tmp_path / "none.json") == 2 and "cannot be read" in capsys.readouterr().err
