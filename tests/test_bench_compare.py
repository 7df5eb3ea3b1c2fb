"""The regression gate: bench.compare finds a step that was really made slower, and nothing between a run and itself."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compare, gpu_steps, timing
from bench.gpu_common import Bench
from bench.results import Results

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench/records/2026-11-22_attack-engine-cpu"
ABOUT = {"device": "CPU: X, 1 thread", "commit": "aaa", "python": "3.12", "packages": {"torch": "2.11.0", "triton": "3.6.0"}}
# Work that the slowed step does over, and what the gate allows: far apart, so that a busy machine moves neither past the other.
TIMES_THE_WORK, ALLOWED = 10, 3.0


def gpu_file(folder, rows, about=ABOUT, **settings):
    """A gpu.json as bench.gpu writes it: rows of (part, name, fields)."""
    results = Results(folder, {"quick": False, "device": "cpu", **settings})
    results.add("environment", "device and ceilings", device=about["device"], about=about, bf16_matmul_tflops=2.0)
    for part, name, fields in rows:
        results.add(part, name, **fields)
    return folder / "gpu.json"


def suite_file(path, changed=None, failed=(), **settings):
    """The recorded file of `make bench` as it is written today: with peers' ranges, settings, the machine and its ceilings."""
    found = json.loads((RECORD / "bench.json").read_text())
    for entry in found["benchmarks"]:
        for peer in ("naive", "second_rung"):
            median = entry["extra_info"][f"{peer}_median_s"]
            entry["extra_info"][f"{peer}_range_s"] = [0.9 * median, 1.1 * median]
    settings = {"quick": False, "width": 32, "batch": 32, "pixels": 32, "steps": 10, "rounds": 7, **settings}
    environment = {"device": ABOUT["device"], "about": ABOUT, "fp32_matmul_tflops": 0.2, "copy_gb_per_s": 30.0}
    found["fastanchor"] = {
        "schema": 1, "kind": "make bench", "environment": environment, "settings": settings, "failed": list(failed),
    }  # fmt: skip
    (changed or (lambda found: None))(found)
    path.write_text(json.dumps(found))
    return path


def timed(ms, low, high, **fields):
    return {"ms": ms, "ms_range": [low, high], "rounds": 5, **fields}


def run(*arguments):
    return compare.main([str(argument) for argument in arguments])


def compared(tmp_path, *arguments):
    status = run(*arguments, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["exit"] == status
    return status, found


def test_a_step_that_was_made_slower_is_caught_and_the_same_step_again_is_not(tmp_path, capsys):
    """A real training step of bench.gpu's, once as it is, once again, and once with its work done ten times over.

    All three take turns in one process, so that whatever else the machine does falls on all alike.
    """
    bench = Bench(Results(tmp_path / "made", {}), CPU, [4], quick=True, compile=False, cudnn_benchmark=False, data="synthetic")
    data = gpu_steps.resident(bench)

    def make_step():
        name = "engine, fp32"
        step = gpu_steps.makers(bench, data, "PGD-AT", 4, {name: gpu_steps.plain_settings(bench)[name]})[name]()
        step()
        return step

    plain, again, slowed = (make_step() for _ in range(3))
    calls = {"plain": plain, "again": again, "slowed": lambda: [slowed() for _ in range(TIMES_THE_WORK)]}
    times = timing.interleaved(calls, CPU, rounds=7, fill=0.1)
    files = {
        name: gpu_file(tmp_path / name, [("steps", "engine, fp32", {"batch": 4, **timing.summary(found)})])
        for name, found in times.items()
    }
    assert run(files["plain"], files["slowed"], "--slowdown", ALLOWED) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert run(files["plain"], files["again"], "--slowdown", ALLOWED) == 0
    assert run(files["slowed"], files["plain"], "--slowdown", ALLOWED) == 0
    assert "SLOWER" not in capsys.readouterr().out
    assert run(files["plain"], files["plain"], "--slowdown", 1) == 0


# `make bench`'s own take_turns on a tiny network; the second test does ten times the work of the first.
SUITE = f"""
import functools

import pytest
from bench import cases, turns


@pytest.mark.parametrize("passes", [3, {3 * TIMES_THE_WORK}])
def test_whole_step(benchmark, passes):
    batch = cases.make_batch(4, 16, turns.CPU)
    step = cases.make_step(cases.make_config(0.0, 2), cases.make_model(4, turns.CPU), turns.CPU)
    naive = functools.partial(cases.make_naive_step(4, turns.CPU, 0.0, 2), *batch)
    turns.take_turns(benchmark, lambda: [step(*batch, progress=0.0) for _ in range(passes)], {{"naive": naive}}, rounds=5)
"""


def test_a_slower_step_in_make_bench_is_caught(tmp_path):
    """pytest-benchmark's JSON as the plugin writes it today; one file for each of the two tests, under one name."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "test_suite.py", "--benchmark-only", "--benchmark-json=both.json"]
    # A worker of xdist would pass on that it is one, and the plugin then measures nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "both.json").read_text())
    files = [tmp_path / "plain.json", tmp_path / "slowed.json"]
    for file, entry in zip(files, found["benchmarks"], strict=True):
        file.write_text(json.dumps({**found, "benchmarks": [{**entry, "name": "test_whole_step"}]}))
    status, compared_ = compared(tmp_path, *files, "--slowdown", ALLOWED)
    assert status == 1
    engine, naive = compared_["rows"]
    assert (engine["timing"], engine["verdict"], naive["timing"]) == ("engine", "slower", "naive")
    assert run(*files[::-1], "--slowdown", ALLOWED) == 0
    assert run(files[0], files[0]) == 0


@pytest.mark.parametrize(
    "ms, low, high, verdict",
    [
        (10.9, 10.8, 11.0, ""),  # apart, but not by more than is allowed
        (12.0, 10.6, 13.0, "slower"),
        (12.0, 10.4, 13.0, "overlap"),  # A's slowest round is 10.5
        (12.0, 10.5, 13.0, "overlap"),  # touching is no gap
        (8.0, 7.0, 9.4, "faster"),
        (8.0, 7.0, 9.6, "overlap"),
        (9.2, 9.1, 9.3, ""),
    ],
)
def test_only_ranges_that_are_apart_count(tmp_path, ms, low, high, verdict):
    a = gpu_file(tmp_path / "a", [("attack", "folded", timed(10.0, 9.5, 10.5, batch=8))])
    b = gpu_file(tmp_path / "b", [("attack", "folded", timed(ms, low, high, batch=8))])
    status, found = compared(tmp_path, a, b)
    (row,) = found["rows"]
    assert (row["verdict"], status) == (verdict, int(verdict == "slower"))
    assert row["ratio"] == pytest.approx(ms / 10) and row["ratio_range"] == pytest.approx([low / 10.5, high / 9.5])


def test_without_a_range_the_medians_decide(tmp_path):
    """A single round has none; the halves of the contrastive loss and a whole epoch come without."""
    fields = {"n": 64, "d": 16, **timed(10.0, 9.0, 11.0), "forward_ms": 4.0, "backward_ms": 6.0, "replay_forward_ms": 3.0}
    rows = [("supcon_speed", "ours", fields), ("steps", "timed epoch", {"seconds": 2.0})]
    a = gpu_file(tmp_path / "a", rows)
    for key, label in (("forward_ms", "forward"), ("backward_ms", "backward"), ("replay_forward_ms", "replay, forward")):
        status, found = compared(tmp_path, a, gpu_file(tmp_path / key, [(*rows[0][:2], {**fields, key: 7.0}), rows[1]]))
        assert status == 1
        assert [row["timing"] for row in found["rows"] if row["verdict"] == "slower"] == [label]
    status, found = compared(tmp_path, a, gpu_file(tmp_path / "epoch", [rows[0], ("steps", "timed epoch", {"seconds": 2.5})]))
    assert status == 1 and [row["name"] for row in found["rows"] if row["verdict"]] == ["timed epoch"]
    assert found["rows"][-1]["a_ms"] == 2000 and found["rows"][-1]["ratio_range"] is None
    one = [("attack", "folded", {**timed(ms, ms, ms), "rounds": 1}) for ms in (10.0, 12.0)]
    status, found = compared(tmp_path, *(gpu_file(tmp_path / f"one{i}", [row]) for i, row in enumerate(one)))
    assert status == 1 and found["rows"][0]["ratio_range"] is None


def test_what_was_right_and_is_no_longer_fails_the_gate(tmp_path, capsys):
    def rows(**changed):
        given = {"eager": True, "graphed": False, "folded": True, **changed}
        made = [("correctness", name, {"precision": "fp32", "ok": ok}) for name, ok in given.items() if ok is not None]
        return [*made, ("attack", "folded", timed(10, 9, 11, batch=8))]

    a = gpu_file(tmp_path / "a", rows())
    assert run(a, gpu_file(tmp_path / "same", rows())) == 0
    assert "ok in neither: correctness: graphed | fp32" in capsys.readouterr().out
    assert run(a, gpu_file(tmp_path / "better", rows(graphed=True))) == 0
    status, found = compared(tmp_path, a, gpu_file(tmp_path / "worse", rows(eager=False)))
    assert (status, found["turned_bad"]) == (1, ["correctness: eager | fp32: no longer ok"])
    # An entry that now fails has no figures, so that nothing but its error would show.
    failed = [*rows(eager=None), ("correctness", "eager", {"precision": "fp32", "error": "Traceback\nRuntimeError: x"})]
    status, found = compared(tmp_path, a, gpu_file(tmp_path / "failed", failed))
    assert (status, found["turned_bad"]) == (1, ["correctness: eager | fp32: failed"])
    assert run(tmp_path / "failed" / "gpu.json", tmp_path / "failed" / "gpu.json") == 0
    assert run(a, gpu_file(tmp_path / "gone", rows(eager=None))) == 0
    assert "only in A: correctness: eager | fp32" in capsys.readouterr().out
    assert run(a, tmp_path / "worse" / "gpu.json", "--only", "attack") == 0


def test_rows_are_matched_by_what_was_measured(tmp_path):
    """Batch, precision and the like tell rows apart, the second measurement of a thing is beside the second, left out is neither."""
    rows = [
        ("attack", "naive", timed(1.0, 0.9, 1.1, batch=8, precision="bf16")),
        ("attack", "naive", timed(2.0, 1.9, 2.1, batch=8, precision="fp32")),
        ("attack", "naive", timed(3.0, 2.9, 3.1, batch=16, precision="fp32")),
        ("attack", "naive", timed(4.0, 3.9, 4.1, batch=16, precision="fp32")),
        ("attack", "compiled", {"batch": 8, "left_out": "12 s were left"}),
        ("steps", "engine", timed(5.0, 4.9, 5.1, cudnn_benchmark=True)),
        ("steps", "engine", timed(6.0, 5.9, 6.1, cudnn_benchmark=False)),
        *(("training", "synthetic", {"epoch": epoch, "seconds": s}) for epoch, s in ((1, 90.0), (2, 7.0), (3, 8.0), (4, 9.0))),
    ]
    a = gpu_file(tmp_path / "a", rows)
    unlike = [
        ("attack", "naive", {"batch": 8, "precision": "bf16", "left_out": "3 s were left"}),
        ("attack", "new", timed(1, 0.9, 1.1)),
    ]
    b = gpu_file(tmp_path / "b", [*unlike, rows[6], rows[5], *rows[7:], rows[2], rows[3], rows[1], rows[0]])
    status, found = compared(tmp_path, a, b)
    assert status == 0 and [row["ratio"] for row in found["rows"]] == [1.0] * 7
    assert sorted(row["a_ms"] for row in found["rows"]) == [1, 2, 3, 4, 5, 6, 8000]
    assert found["rows"][-1]["a_range"] == [7000, 9000]  # the first epoch compiles
    assert (found["only_in_a"], found["only_in_b"]) == ([], ["attack: new"])


def test_the_environments_are_told(tmp_path, capsys):
    rows = [("attack", "folded", timed(10, 9, 11))]
    a = gpu_file(tmp_path / "a", rows)
    newer = {**ABOUT, "commit": "bbb", "packages": {"torch": "2.13.0", "triton": "3.6.0"}}
    _, found = compared(tmp_path, a, gpu_file(tmp_path / "b", rows, newer, budget=3))
    assert found["differs"] == {"torch": ["2.11.0", "2.13.0"], "commit": ["aaa", "bbb"]}
    assert found["settings"] == {"budget": [None, 3]} and found["ceilings"] == {"bf16_matmul_tflops": 1.0}
    out = capsys.readouterr().out
    assert out.index("torch: 2.11.0 -> 2.13.0; commit: aaa -> bbb") < out.index("B / A")
    other = gpu_file(tmp_path / "c", rows, {**ABOUT, "device": "NVIDIA H100"})
    assert run(a, other) == 2
    assert "CPU: X, 1 thread, B on NVIDIA H100" in capsys.readouterr().err
    assert run(a, other, "--any-device") == 0


def _slower(found, kind):
    """A recorded file with one engine timing of each part twice as slow."""
    changed = copy.deepcopy(found)
    if kind == "ladder":
        rows = [rows[-1] for rows in changed["ladders"].values()]
        for row in rows:
            row |= {"ms": 2 * row["ms"], "ms_range": [2 * x for x in row["ms_range"]]}
        return changed
    for entry in changed["benchmarks"][1::4]:
        entry["stats"] |= {key: 2 * entry["stats"][key] for key in ("min", "max", "median")}
    return changed


@pytest.mark.parametrize(
    "kind, parts, slower", [("ladder", ("attack", "step"), (1, 2)), ("bench", ("attack", "whole_step"), (1, 1))]
)
def test_what_the_ladder_and_make_bench_wrote(tmp_path, kind, parts, slower, capsys):
    path = RECORD / f"{kind}.json"
    status, found = compared(tmp_path, path, path)
    assert status == 0 and len(found["rows"]) == 18 and {row["ratio"] for row in found["rows"]} == {1.0}
    (tmp_path / "slow.json").write_text(json.dumps(_slower(json.loads(path.read_text()), kind)))
    for part, count in zip(parts, slower, strict=True):
        status, found = compared(tmp_path, path, tmp_path / "slow.json", "--only", part)
        assert status == 1 and sum(row["verdict"] == "slower" for row in found["rows"]) == count
        assert {row["part"] for row in found["rows"]} == {part}
    assert run(tmp_path / "slow.json", path) == 0


def test_a_slower_yardstick_is_shown_and_does_not_count(tmp_path):
    found = json.loads((RECORD / "bench.json").read_text())
    before = found["benchmarks"][0]["extra_info"]["naive_median_s"]
    found["benchmarks"][0]["extra_info"]["naive_median_s"] = 2 * before
    (tmp_path / "b.json").write_text(json.dumps(found))
    status, compared_ = compared(tmp_path, RECORD / "bench.json", tmp_path / "b.json")
    (row,) = (row for row in compared_["rows"] if row["verdict"])
    assert status == 0 and row["verdict"] == "yardstick" and row["b_ms"] == pytest.approx(2e3 * before)


@pytest.mark.parametrize("threads, said", [((1, 1), "1 thread"), ((2, 2), "2 threads"), ((1, 2), "1/2 threads")])
def test_the_processor_of_a_file_that_does_not_describe_it(threads, said):
    machine = {"cpu": {}, "machine": "x86_64"}
    found = {"machine_info": machine, "benchmarks": [{"extra_info": {"threads": n}} for n in threads]}
    assert compare.processor_of(found) == f"CPU: x86_64, {said}"


def test_make_bench_says_what_it_timed_and_on_what(tmp_path, capsys):
    a = suite_file(tmp_path / "a.json")
    old = RECORD / "bench.json"
    status, found = compared(tmp_path, a, suite_file(tmp_path / "b.json", rounds=9, epoch_rounds=2))
    assert (
        status == 0 and found["device"] == ABOUT["device"] and found["settings"] == {"epoch_rounds": [None, 2], "rounds": [7, 9]}
    )
    assert found["ceilings"] == {"fp32_matmul_tflops": 1.0, "copy_gb_per_s": 1.0}
    # A size that one of them does not know, of a suite that came later, is no reason to refuse the others.
    assert run(a, suite_file(tmp_path / "later.json", data_batch=128)) == 0
    for name in ("width", "batch", "pixels", "steps"):
        capsys.readouterr()
        assert run(a, suite_file(tmp_path / "other.json", **{name: 64})) == 2
        assert f"not time the same work: {name} " in capsys.readouterr().err
    assert run(a, suite_file(tmp_path / "quick.json", quick=True)) == 2
    # A file of before, that does not say.
    assert run(a, old) == 2 and "--any-device" in capsys.readouterr().err
    assert run(a, old, "--any-device") == 0 and run(old, a, "--any-device") == 0


def test_peers_of_make_bench_have_ranges_and_a_benchmark_that_fails_is_noticed(tmp_path):
    def slower(found):
        info = found["benchmarks"][0]["extra_info"]
        info |= {"naive_median_s": 2 * info["naive_median_s"], "naive_range_s": [2 * s for s in info["naive_range_s"]]}

    a = suite_file(tmp_path / "a.json")
    status, found = compared(tmp_path, a, suite_file(tmp_path / "b.json", slower))
    (row,) = (row for row in found["rows"] if row["verdict"])
    assert (status, row["timing"], row["verdict"]) == (0, "naive", "yardstick")
    assert row["ratio_range"] == pytest.approx([2 * 0.9 / 1.1, 2 * 1.1 / 0.9])

    # Beside PGD-AT stand the engine's other recipes: no yardsticks.
    def methods(found):
        found["benchmarks"][0]["name"] = "test_methods"

    pair = (
        suite_file(tmp_path / "c.json", methods),
        suite_file(tmp_path / "d.json", lambda found: (methods(found), slower(found))),
    )
    status, found = compared(tmp_path, *pair)
    assert (status, [row["verdict"] for row in found["rows"] if row["verdict"]]) == (1, ["slower"])

    def gone(found):
        found["benchmarks"] = [entry for entry in found["benchmarks"] if entry["name"] != "test_attack[bf16]"]

    node = "bench/test_attack.py::test_attack[bf16]"
    failed = suite_file(tmp_path / "failed.json", gone, failed=[node])
    status, found = compared(tmp_path, a, failed)
    assert (status, found["turned_bad"]) == (1, ["attack: test_attack[bf16]: failed"])
    assert run(a, suite_file(tmp_path / "gone.json", gone)) == 0 and run(failed, failed) == 0


def run_file(folder, kind, rows, **settings):
    results = Results(folder, settings, kind=kind)
    results.add("environment", "device and ceilings", device=ABOUT["device"], about=ABOUT)
    for part, name, fields in rows:
        results.add(part, name, **fields)
    return results.whole


def test_peers_files_are_read_too_and_the_peer_tells_rows_apart(tmp_path, capsys):
    rows = [("peers", "engine, fp32", timed(ms, ms - 0.1, ms + 0.1, peer=peer, batch=8)) for ms, peer in ((1.0, "X"), (2.0, "Y"))]
    a = run_file(tmp_path / "a", "bench.peers", rows, width=8, batch=8)
    slower = ("peers", "engine, fp32", timed(4.0, 3.9, 4.1, peer="Y", batch=8))
    status, found = compared(tmp_path, a, run_file(tmp_path / "b", "bench.peers", [slower, rows[0]], width=8, batch=8))
    assert status == 1 and found["kind"] == "bench.peers"
    assert {row["name"]: row["ratio"] for row in found["rows"]} == {
        "engine, fp32 | X, batch 8": 1, "engine, fp32 | Y, batch 8": 2,
    }  # fmt: skip
    capsys.readouterr()
    for other, says in (
        (run_file(tmp_path / "wide", "bench.peers", rows, width=16, batch=8), "not time the same work: width 8 and 16"),
        (gpu_file(tmp_path / "gpu", rows), "A is a file of bench.peers and B one of bench.gpu"),
        (run_file(tmp_path / "new", "bench.new", rows), "is no file of bench.gpu, bench.peers, bench.speedrun"),
    ):
        assert run(a, other) == 2 and says in capsys.readouterr().err
    # The first files of bench.gpu did not give their kind.
    named = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    del named["kind"]
    (tmp_path / "unnamed.json").write_text(json.dumps(named))
    assert run(tmp_path / "gpu" / "gpu.json", tmp_path / "unnamed.json") == 0


def twice_as_slow(rows):
    """Timed rows (part, name, fields) of another run."""
    return [
        (part, name, timed(20.0, 19.0, 21.0, **{k: v for k, v in row.items() if k in ("peer", "batch")}))
        for part, name, row in rows
    ]


@pytest.mark.parametrize("kind, part", [("bench.peers", "peers"), ("bench.gpu", "peers"), ("bench.gpu", "attack")])
def test_other_peoples_code_does_not_fail_the_gate(tmp_path, kind, part):
    """Each in turn is twice as slow: a yardstick, shown and not counted; ours beside it counts."""
    peer = {"peer": "Repo: train"} if part == "peers" else {}
    theirs = ["naive, fp32", "second rung (bf16 autocast, channels-last)", *peer.values()]
    rows = [(part, name, timed(10.0, 9.5, 10.5, batch=8, **peer)) for name in (*theirs, "engine, bf16")]
    a = run_file(tmp_path / "a", kind, rows)
    status, found = compared(tmp_path, a, run_file(tmp_path / "b", kind, [*twice_as_slow(rows[:-1]), rows[-1]]))
    assert status == 0 and [row["verdict"] for row in found["rows"]] == ["yardstick"] * len(theirs) + [""]
    status, found = compared(tmp_path, a, run_file(tmp_path / "c", kind, [*rows[:-1], *twice_as_slow(rows[-1:])]))
    assert status == 1 and [row["verdict"] for row in found["rows"]] == [""] * len(theirs) + ["slower"]


def test_the_naive_rungs_of_the_ladder_are_yardsticks(tmp_path):
    found = json.loads((RECORD / "ladder.json").read_text())
    naive = [row for rows in found["ladders"].values() for row in rows if row["name"].startswith("naive")]
    for row in naive:
        row |= {"ms": 2 * row["ms"], "ms_range": [2 * x for x in row["ms_range"]]}
    (tmp_path / "b.json").write_text(json.dumps(found))
    status, found = compared(tmp_path, RECORD / "ladder.json", tmp_path / "b.json")
    assert status == 0 and [row["verdict"] for row in found["rows"] if row["verdict"]] == ["yardstick"] * len(naive)
    assert len(naive) == 6


def test_the_seeds_of_a_speedrun_are_one_timing_with_a_range(tmp_path, capsys):
    def file(name, times, accuracy=50.0):
        rows = [("seeds", f"seed {i}", {"seed": i, "seconds": s, "robust": 50.1}) for i, s in enumerate(times)]
        return run_file(tmp_path / name, "bench.speedrun", rows, target={"attack": "pgd20", "accuracy": accuracy})

    a = file("a", [100.0, 110.0, 104.0])
    status, found = compared(tmp_path, a, file("b", [130.0, 125.0, 140.0, 131.0]))
    (row,) = found["rows"]
    assert status == 1 and row["a_ms"] == 104e3 and row["b_range"] == [125e3, 140e3]
    assert run(a, file("near", [130.0, 105.0, 140.0])) == 0
    assert run(a, file("easier", [10.0], accuracy=30.0)) == 2 and "same work: target" in capsys.readouterr().err


def test_bad_input_is_one_sentence_and_exit_2(tmp_path, capsys):
    good = gpu_file(tmp_path / "good", [("attack", "folded", timed(10, 9, 11))])
    texts = {"empty": "", "deep": 10**5 * "[", "list": "[]", "other": '{"rows": []}', "torn": '{"results": [{}], "settings": {}}'}
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    nan = gpu_file(tmp_path / "nan", [("attack", "folded", timed(float("nan"), 9, 11))])
    ladder = json.loads((RECORD / "ladder.json").read_text())
    ladder["settings"]["width"] = 64
    (tmp_path / "wide.json").write_text(json.dumps(ladder))
    capsys.readouterr()
    cases = [
        ((tmp_path / "missing.json", good), "No such file"),
        ((good, tmp_path), "cannot be read"),
        ((tmp_path / "empty.json", good), "is not JSON"),
        ((tmp_path / "deep.json", good), "is not JSON"),
        ((tmp_path / "list.json", good), "is no file of bench.gpu"),
        ((tmp_path / "other.json", good), "is no file of bench.gpu"),
        ((tmp_path / "torn.json", good), "is not as bench.gpu writes it"),
        ((good, nan), "is nan, which is no time"),
        ((good, RECORD / "bench.json"), "no timings in common"),
        ((good, gpu_file(tmp_path / "else", [("steps", "engine", timed(10, 9, 11))])), "no timing or verdict in common"),
        (
            (good, gpu_file(tmp_path / "quick", [("attack", "folded", timed(10, 9, 11))], quick=True)),
            "not time the same work: quick",
        ),
        ((RECORD / "ladder.json", tmp_path / "wide.json"), "not time the same work: width 32 and 64"),
        ((good, good, "--slowdown", "0.9"), "must be at least 1"),
        ((good, good, "--slowdown", "nan"), "must be at least 1"),
        ((good, good, "--slowdown", "inf"), "must be at least 1"),
        ((good, good, "--only", "stepz"), "must be of attack"),
        ((good, good, "--json", tmp_path / "list.json" / "out.json"), "list.json: cannot be a folder to write into"),
        ((good, good, "--json", tmp_path), "cannot be written (Is a directory)"),
    ]
    capsys.readouterr()
    for arguments, says in cases:
        assert run(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""
