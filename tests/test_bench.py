"""The benchmarks themselves: that the naive step is the reference's mathematics, that results survive, and that each part runs."""

import contextlib
import copy
import json
import subprocess
import time

import pytest
import torch
from graph_emulator import Emulator

from bench import cases, gpu, gpu_attack, gpu_correctness, gpu_tables, ladder, naive, program, schema, timing
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.results import OutOfTime, Results, time_box
from fastanchor.attacks import engine
from fastanchor.data import views
from fastanchor.graphs import use_recorder
from fastanchor.models import folded
from fastanchor.reference import attacks as reference
from fastanchor.reference.objectives import cross_entropy
from fastanchor.reference.step import anchor_step

CPU = torch.device("cpu")
NUMBERS = {"eps": 0.1, "step_size": 0.04, "steps": 3}


def make_bench(tmp_path, **changed):
    settings = {"quick": True, "compile": False, "cudnn_benchmark": False, "data": "synthetic", "ceiling": 1e12, **changed}
    return Bench(Results(tmp_path, {}), CPU, [8], **settings)


@pytest.fixture
def batch():
    """A model and a batch of 6 in fp64, and start noise."""
    images, labels = cases.make_batch(6, 16, CPU)
    images = views.to_float(images).double().contiguous()
    return cases.make_model(4, CPU, channels_last=False).double(), images, labels, cases.make_noise(images, 0.1)


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_the_naive_attack_is_the_reference_attack_with_or_without_weight_gradients_thrown_away(batch, weight_gradients):
    model, images, labels, start = batch
    expected = reference.pgd(model, images, labels, objective=cross_entropy, start=start, **NUMBERS)
    found = naive.attack(model, images, labels, start, **NUMBERS, weight_gradients=weight_gradients)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert all((p.grad is not None) == weight_gradients for p in model.backbone.parameters())


@pytest.mark.parametrize("hsc", [0.0, 0.5])
def test_the_naive_step_is_the_reference_step(batch, hsc):
    model, images, labels, start = batch
    theirs = copy.deepcopy(model)
    options = {"start": start, **NUMBERS, "hsc": hsc, "temperature": 0.1, "beta": 2.0}
    terms = []
    for step, network in ((naive.train_step, model), (anchor_step, theirs)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        terms.append([step(network, optimizer, images, labels, **options) for _ in range(2)])
    torch.testing.assert_close(*terms, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-9)


def test_calls_take_turns_and_ratios_are_formed_by_round(monkeypatch):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.interleaved(calls, CPU, rounds=3)
    assert "".join(order) == "aabb" + "ab" * 3 and {len(times) for times in found.values()} == {3}
    # Rounds of a machine that slows down tenfold: the ratio is 2 in each of them.
    row = timing.summary([0.1, 1.0, 0.5], [0.2, 2.0, 1.5])
    assert row["ratio"] == pytest.approx(2) and row["ratio_range"] == pytest.approx([2, 3]) and row["ms"] == pytest.approx(500)
    monkeypatch.setattr(timing, "seconds", lambda call, device, repeats=1: order.append(repeats) or 0.01)
    order.clear()
    timing.interleaved({"a": lambda: None}, CPU, rounds=2, fill=0.05)
    assert order == [1, 5, 5]


def test_results_are_on_disk_as_they_come_and_failures_are_results(tmp_path):
    results = Results(tmp_path, {"batch": 8})
    results.add("attack", "eager", ms=1.5)
    with results.entry("attack", "graphed", batch=8):
        raise RuntimeError("no such kernel")
    whole = json.loads((tmp_path / "gpu.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert whole["results"] == lines and whole["settings"] == {"batch": 8}
    assert lines[0]["ms"] == 1.5 and lines[1]["batch"] == 8 and "RuntimeError: no such kernel" in lines[1]["error"]
    with pytest.raises(OutOfTime), results.entry("attack", "slow"):
        raise OutOfTime


def test_a_time_box_ends_what_is_inside_it_even_if_that_catches_exceptions():
    started = time.perf_counter()
    with pytest.raises(OutOfTime), time_box(0.1):
        while time.perf_counter() - started < 10:
            with contextlib.suppress(Exception):
                time.sleep(0.01)
    assert time.perf_counter() - started < 5
    time.sleep(0.05)  # nothing is left ticking


def test_every_part_gets_its_turn_whatever_happens_to_the_others(tmp_path, monkeypatch):
    lefts = {}

    def note(name, then=lambda: None):
        def run(bench):
            lefts[name] = bench.left()
            then()
            bench.results.add(name, "fine")

        return run

    parts = {
        "quick": (note("quick"), 3),
        "broken": (note("broken", lambda: 1 / 0), 1),
        "slow": (note("slow", lambda: time.sleep(10)), 1),
        "last": (note("last"), 5),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(Bench, "tidy", lambda self: None)
    bench = make_bench(tmp_path)
    gpu.run_parts(bench, list(parts), budget=1.0)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        "quick": "done", "broken": "failed", "slow": "out of time", "last": "done",
    }  # fmt: skip
    assert "ZeroDivisionError" in bench.results.rows("broken")[0]["error"]
    # What the first two left over is the third's, but not what the last one needs.
    assert 0.2 < lefts["slow"] <= 0.5 and 0.3 < lefts["last"] <= 0.5


def test_a_quick_run_covers_every_part(tmp_path, capsys):
    before = torch.backends.cudnn.benchmark
    assert (
        gpu.main(["--quick", "--out", str(tmp_path), "--only", "environment,attack,steps,benchmark,convs,kernels,training"]) == 0
    )
    assert torch.backends.cudnn.benchmark == before
    found = schema.load(tmp_path / "gpu.json")
    assert {part["status"] for part in found["parts"].values()} == {"done"} and len(found["parts"]) == 7
    rows = found["results"]
    left_out = {(row["part"], row["name"]) for row in rows if row.get("left_out") == NEEDS_CUDA}
    assert {("attack", "graphed, aten"), ("attack", "folded, cudnn"), ("convs", "all"), ("benchmark", "all")} <= left_out
    for name in ("naive, fp32", "reference", "eager, not folded", "folded, aten"):
        timed = [row for row in rows if row["part"] == "attack" and row["name"] == name and "ms" in row]
        assert {row["precision"] for row in timed} == {"fp32", "bf16"}
        for row in timed:
            assert row["images_per_s"] == pytest.approx(8e3 / row["ms"])
    epochs = {row["method"]: row for row in rows if row["name"] == "timed epoch"}
    assert set(epochs) == {"PGD-AT", "ANCHOR"} and all(row["images"] == 16 for row in epochs.values())
    assert any(row["part"] == "training" and row["epoch"] == 1 for row in rows)
    text = capsys.readouterr().out
    assert "attack alone: ms, x naive" in text and "0 failed results" in text
    assert "timed epochs" in (tmp_path / "tables.txt").read_text()


def test_correctness_finds_the_engine_right_and_a_broken_one_wrong(tmp_path, monkeypatch):
    bench = make_bench(tmp_path)
    model = cases.make_model(4, CPU)
    images, labels = cases.make_batch(32, 16, CPU)
    kinds = [{"bn": bn, "objective": "ce", "precision": "fp32"} for bn in ("eval", "train", "train_frozen")]
    for kind in kinds:
        gpu_correctness._attack(bench, model, images, labels, 8 / 255, kind)
    rows = [row for row in bench.results.rows("correctness") if row["name"] == "eager"]
    assert [row["bn"] for row in rows] == ["eval", "train", "train_frozen"]
    assert all(row["ok"] and row["differing_percent"] < 0.5 and row["buffers_relative"] < 1e-5 for row in rows)
    right = engine.ascend_once
    monkeypatch.setattr(engine, "ascend_once", lambda *a, **k: right(*a[:-1], 0.5 * a[-1], **k))
    gpu_correctness._attack(bench, model, images, labels, 8 / 255, kinds[0])
    assert bench.results.rows("correctness")[-2]["differing_percent"] > 10


def test_graphs_and_fused_convolutions_are_measured_where_there_are_some(tmp_path, monkeypatch):
    """The rows that need a GPU, on an emulated graph and with cuDNN's convolution written out."""
    monkeypatch.setattr(Bench, "cuda", True)
    used = []

    def convolution(x, residual, layer):
        used.append(layer.backend)
        stride, padding, dilation, groups = layer.geometry
        out = torch.conv2d(x, layer.weight, layer.bias, stride, padding, dilation, groups)
        out = out if residual is None else out + residual
        return out.relu() if layer.relu else out

    monkeypatch.setattr(folded, "_run_cudnn", convolution)
    bench = make_bench(tmp_path)
    recorders = []
    with use_recorder(lambda *given: recorders.append(Emulator(*given)) or recorders[-1]):
        case = gpu_attack.Case(bench, 8, "fp32")
        rows = case.plain_rows()
        # Its convolutions are a kernel's, which the tests of that kernel run.
        rows.pop("graphed, triton, kernels")
        made = {name: make() for name, make in rows.items()}
        adversarial = {}
        for name, call in made.items():
            used.clear()
            recorders.clear()
            case.generator.manual_seed(0)
            adversarial[name] = call()
            assert bool(used) == name.endswith("cudnn") and bool(recorders) == name.startswith("graphed"), name
        recorders.clear()
        gpu_correctness._iteration(bench, "ANCHOR", 0.5, "fp32")
        assert len(recorders) == 1
    assert {"graphed, aten", "graphed, cudnn", "folded, cudnn"} <= set(adversarial)
    for name in set(adversarial) - {"naive, fp32"}:  # its noise fills another layout
        differing = ((adversarial[name] - adversarial["reference"]).abs() > 1e-5).float().mean()
        assert differing < 0.005, name
    (row,) = [row for row in bench.results.rows("correctness") if row["name"] == "captured iteration"]
    assert row["weights_largest_difference"] == row["average_largest_difference"] == row["buffers_largest_difference"] == 0
    assert row["moved"] > 1e-3


def test_the_run_under_cudnn_benchmark_is_merged_even_when_cut_short(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "cuda", True)
    bench = make_bench(tmp_path)
    bench.deadline = time.perf_counter() + 60

    def child(command, timeout):
        assert "--cudnn-benchmark" in command and timeout <= 60
        gpu.parse(command[command.index("bench.gpu") + 1 :])
        lines = tmp_path / "cudnn_benchmark" / "gpu.jsonl"
        lines.parent.mkdir()
        lines.write_text('{"part": "attack", "name": "graphed, aten", "at_s": 1, "cudnn_benchmark": true}\n{"part": "att')
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(program, "child", child)
    gpu.run_benchmark(bench)
    assert "timed out" in bench.results.rows("benchmark")[0]["error"]
    (row,) = bench.results.rows("attack")
    assert row["name"] == "graphed, aten" and row["cudnn_benchmark"] is True


def test_a_device_that_no_longer_answers_leaves_the_rest_to_another_process(tmp_path, monkeypatch):
    bench = make_bench(tmp_path)
    ran, apart = [], []
    monkeypatch.setattr(gpu, "PARTS", {name: (lambda bench, name=name: ran.append(name), 60) for name in ("a", "b", "c")})
    monkeypatch.setattr(gpu, "_device_works", lambda bench: len(ran) < 2)
    monkeypatch.setattr(gpu, "run_apart", lambda bench, part, names, folder, options: apart.append((names, bench.left())))
    gpu.run_parts(bench, ["a", "b", "c"], budget=180)
    assert ran == ["a", "b"] and apart[0][0] == ["c"] and apart[0][1] > 170


def test_a_table_shows_the_first_result_of_a_cell():
    rows = [{"name": "naive", "batch": 8, "ms": ms, "precision": "bf16"} for ms in (1.0, 2.0)]
    table = gpu_tables._pivot("t", rows, lambda row: row["name"], lambda row: "8", lambda row: f"{row['ms']}")
    assert list(table.columns[1].cells) == ["1.0"]


def test_wrong_arguments_are_named(capsys):
    for arguments, says in ((["--only", "steps,nothing"], "--only nothing"), (["--batches", "8,x"], "--batches 8,x"),
                            (["--batches", "1"], "--batches 1")):  # fmt: skip
        with pytest.raises(SystemExit):
            gpu.parse(arguments)
        assert says in capsys.readouterr().err


def test_the_ladder_compares_rungs_from_one_start(tmp_path, capsys):
    arguments = "--width 4 --batch 6 --pixels 16 --steps 2 --train-steps 2 --rounds 2 --json".split()
    ladder.main([*arguments, str(tmp_path / "ladder.json")])
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert list(found["ladders"]) == [
        "attack alone, PGD-2",
        "whole training step, PGD-AT, PGD-2",
        "whole training step, ANCHOR, PGD-2",
    ]
    for rows in found["ladders"].values():
        assert rows[0]["ratio"] == 1 and rows[0]["differing_percent"] == 0 and rows[0]["raised_loss"] > 0
        for row in rows:
            # bf16 flips the sign of small gradients, fp32 of next to none; either way the attack is as strong.
            assert row["differing_percent"] < (40 if "bf16" in row["name"] else 0.5), row["name"]
            assert row["raised_loss"] == pytest.approx(rows[0]["raised_loss"], rel=0.1), row["name"]
    assert "+ BatchNorm folded" in capsys.readouterr().out


def test_a_rung_that_does_less_shows():
    images_u8, labels = cases.make_batch(6, 16, CPU)
    rungs = ladder.attack_rungs(4, images_u8, labels, 2, with_compiled=False)
    lazy = ladder.attack_rungs(4, images_u8, labels, 1, with_compiled=False)[-1]
    images = views.to_float(images_u8)
    rows = ladder.climb([rungs[0], lazy], ladder.make_judge(4, images, labels), CPU, rounds=1)
    assert rows[1]["differing_percent"] > 50 and rows[1]["raised_loss"] < 0.8 * rows[0]["raised_loss"]
