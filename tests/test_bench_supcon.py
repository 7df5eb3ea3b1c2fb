"""The benchmarks of the kernels: that their truth is the reference, that they find a wrong kernel, and that tiles are written right."""

import json
import math
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastanchor.kernels import augment, bn_fold, config, heads, limits, noise, pgd, supcon, supcon_launch, supcon_pairs
from fastanchor.kernels.config import Row, Tile
from graph_emulator import Emulator
from interpreter import interpreted

from bench import gpu_common, gpu_small, gpu_supcon, gpu_supcon_speed, gpu_tables, supcon_cases, tune
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.peers import losses as peers
from bench.results import Results
from bench.supcon_truth import blockwise
from fastanchor.graphs import use_recorder
from fastanchor.reference.hard_supcon import hard_supcon

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path):
    settings = {"quick": True, "compile": False, "cudnn_benchmark": False, "data": "synthetic", "ceiling": 1e12}
    return Bench(Results(tmp_path, {}), CPU, [8], **settings)


# --- the truth -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", supcon_cases.REGIMES)
@pytest.mark.parametrize("case", supcon_cases.CASES)
def test_the_truth_in_blocks_is_autograd_of_the_reference(case, regime):
    u, y, arguments = supcon_cases.batch(case, regime, 130, 32, CPU)
    expected = supcon_cases.dense(u, y, arguments, torch.float64)
    found = blockwise(u, y, block=47, **arguments)
    assert len(expected) == 2 + supcon_cases.needs_keys_gradient(arguments)
    for ours, theirs in zip(found, expected, strict=False):
        assert supcon_cases.relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("reduction", ["mean_valid", "mean_all", "sum"])
@pytest.mark.parametrize("anchors", [None, torch.arange(66) % 3 == 0])
def test_the_truth_reduces_as_the_reference_does(reduction, anchors):
    u, y = supcon_cases.embeddings("random", 66, 16)
    y = torch.where(torch.arange(66) < 5, 100 + torch.arange(66), y)
    arguments = {"reduction": reduction, "anchors": anchors, "scale": 0.7}
    loss, gradient, keys_gradient = blockwise(u, y, block=20, **arguments)
    expected = supcon_cases.dense(u, y, arguments, torch.float64)
    assert keys_gradient is None
    assert max(supcon_cases.relative(a, b) for a, b in zip((loss, gradient), expected, strict=True)) < 1e-12


def test_cases_are_what_they_are_called():
    assert set(supcon_cases.CASES) >= {"default", "attached", "uniform", "pow", "count", "topk", "pairwise", "negatives", "views"}
    for regime, cosine in (("random", 0.0), ("mid", 0.5), ("trained", 0.98)):
        u, y = supcon_cases.embeddings(regime, 400, 128)
        z = torch.nn.functional.normalize(u)
        within = (z @ z.T)[(y[:, None] == y) & ~torch.eye(400, dtype=torch.bool)]
        assert within.mean() == pytest.approx(cosine, abs=0.01)
    u, y, _ = supcon_cases.batch("zero rows", "random", 66, 16, CPU)
    assert (u.norm(dim=1) == 0).sum() >= 7 and (y == y[-1]).sum() == 1
    _, _, arguments = supcon_cases.batch("selection hard", "random", 66, 16, CPU)
    assert set(supcon_cases.split(arguments)[1]) == {"predictions"}


# --- correctness on a device, here by the interpreter ----------------------------------------------------------------------------


def test_correctness_finds_the_kernels_right_and_a_broken_one_wrong(bench, monkeypatch):
    with interpreted(supcon, supcon_pairs):
        gpu_supcon._group(bench, "default", "trained", 66, 32, ("fp16", "ieee"))
        gpu_supcon._group(bench, "keys", "random", 66, 32, ("fp16",))
        gpu_supcon._repeats(bench, "default", 66, 32)
        gpu_supcon._memory(bench, 66, 32)
        found = supcon_launch.loss_and_grad
        monkeypatch.setattr(supcon_launch, "loss_and_grad", lambda *a, **k: (found(*a, **k)[0], 1.02 * found(*a, **k)[1]))
        gpu_supcon._group(bench, "default", "random", 66, 32, ("fp16",))
        monkeypatch.setattr(supcon_launch, "loss_and_grad", lambda *a, **k: (float("nan") * a[0].sum(), a[0]))
        gpu_supcon._group(bench, "default", "random", 66, 32, ("fp16",))
        gpu_supcon._repeats(bench, "default", 66, 32)
    rows = bench.results.rows("supcon")
    assert not any("error" in row for row in rows)
    assert [row["ok"] for row in rows if row["name"] == "kernels"] == [True, True, True, False, False]
    assert [row["ok"] for row in rows if row["name"] == "repeats"] == 3 * [True] + 3 * [False]
    assert 0 < rows[0]["gradient_relative"] < 0.01 and "keys_gradient_relative" in rows[2]
    assert [row["dense_matrix_mb"] for row in rows if row["name"] == "peak memory"] == [4 * 66**2 / 1e6]


def test_what_the_kernels_refuse_is_a_row_with_the_reason(bench, monkeypatch):
    monkeypatch.setitem(supcon_cases.CASES, "gamma 9", ({"weight": "pow", "gamma": 9.0}, None, None))
    gpu_supcon._group(bench, "gamma 9", "random", 66, 32, ("fp16",))
    (row,) = bench.results.rows("supcon")
    assert "gamma" in row["left_out"] and "error" not in row


def test_without_a_gpu_the_truth_alone_is_checked(bench):
    gpu_supcon.run(bench)
    gpu_supcon.run_sanitizer(bench)
    rows = bench.results.rows("supcon")
    assert [row["case"] for row in rows[:-1]] == list(supcon_cases.CASES) and all(row["ok"] for row in rows[:-1])
    assert rows[-1]["left_out"] == NEEDS_CUDA == bench.results.rows("sanitizer")[0]["left_out"]


@pytest.mark.parametrize(
    "code, said, ok",
    [
        (0, "ERROR SUMMARY: 0 errors", True),
        (9, "ERROR SUMMARY: 3 errors", False),
        (1, "ERROR SUMMARY: 0 errors", False),
        (1, "", False),
    ],
)
def test_the_memory_checker_is_believed_only_where_it_ran(bench, monkeypatch, code, said, ok):
    monkeypatch.setattr(Bench, "cuda", True)
    monkeypatch.setattr(gpu_supcon.shutil, "which", lambda *a, **k: "/bin/compute-sanitizer")
    asked = []

    def ended(command, **options):
        asked.append((command, options["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"]))
        return subprocess.CompletedProcess(command, code, said, "")

    monkeypatch.setattr(subprocess, "run", ended)
    gpu_supcon.run_sanitizer(bench)
    assert bench.results.rows("sanitizer")[0]["ok"] is ok
    assert asked[0][0][-2:] == ["-m", "bench.supcon_cases"] and asked[0][1] == "1"


# --- speed -----------------------------------------------------------------------------------------------------------------------


def test_the_floor_is_that_of_the_design():
    products, floor = gpu_supcon_speed.floor_seconds(8192, 128, 790e12, None)
    assert products == floor == pytest.approx(65.2e-6, rel=0.01)
    # At 1e12 exponentials a second these take longer: 2 passes, 1.1 for each of 8192^2 pairs.
    assert gpu_supcon_speed.floor_seconds(8192, 128, 790e12, 1e12)[1] == pytest.approx(2.2 * 8192**2 / 1e12)


def test_dense_supcontrast_is_the_references_special_case():
    u, y = supcon_cases.embeddings("mid", 40, 16)
    u = u.double().requires_grad_()
    found = peers.supcontrast(u, y)
    expected = hard_supcon(u, y, weight="uniform", reduction="mean_all", scale=0.1 / 0.07)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, u)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_everything_that_can_run_here_is_timed_and_the_rest_has_a_reason(bench):
    gpu_supcon_speed.run(bench)
    rows = {row["name"]: row for row in bench.results.rows("supcon_speed")}
    assert rows["ours"]["left_out"] == NEEDS_CUDA
    for name in ("eager", "eager, TF32", "SupContrast"):
        row = rows[name]
        assert row["ms"] > 0 and row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["n"] == 64
    for name, module in (("memeff", "memeff"), ("inf-cl", "inf_cl")):
        assert rows[name]["function"].startswith("other function")
        assert rows[name]["left_out"] in (f"{module} is not installed", NEEDS_CUDA)
    assert rows["compiled, TF32"]["left_out"] == rows["compiled, max-autotune, TF32"]["left_out"] == "compiling was switched off"


def test_one_that_fails_or_runs_out_of_memory_is_a_row_and_graphs_are_replayed(bench, monkeypatch):
    monkeypatch.setattr(Bench, "cuda", True)
    monkeypatch.setattr(gpu_supcon_speed, "_shares", lambda *a: {"share_of_floor": 0.5})

    def out_of_memory(u, y):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB.\nmore")

    plain = peers.PLAIN["eager"]
    others = {"eager": plain, "large": plain._replace(make=lambda: out_of_memory), "broken": plain._replace(make=lambda: 1 / 0)}
    with interpreted(supcon, supcon_pairs):
        gpu_supcon_speed._measure(bench, 40, 16, ("fp16",), {})
    with use_recorder(Emulator):
        gpu_supcon_speed._measure(bench, 40, 16, (), others)
    rows = {row["name"]: row for row in bench.results.rows("supcon_speed")}
    assert rows["large"]["left_out"] == "out of memory: CUDA out of memory. Tried to allocate 16 GiB."
    assert "ZeroDivisionError" in rows["broken"]["error"]
    assert rows["ours, fp16"]["ms"] == pytest.approx(
        rows["ours, fp16"]["forward_ms"] + rows["ours, fp16"]["backward_ms"], rel=0.5
    )
    eager = rows["eager"]
    assert eager["replay_ratio"] == eager["ratio"] == 1
    assert eager["replay_ms"] == pytest.approx(eager["replay_forward_ms"] + eager["replay_backward_ms"])
    cell = gpu_tables._supcon_cell({**eager, "peak_memory_mb": 12.0})
    assert cell == f"{eager['replay_ms']:.3g}* 1.00x 50 % 12MB"


# --- what is left out, and why -----------------------------------------------------------------------------------------------------


def test_reasons_for_what_is_left_out(bench, monkeypatch):
    assert bench.no_compile(1.0) == "compiling was switched off"
    bench.compile, bench.deadline = True, time.perf_counter() + 20.4
    assert bench.no_compile(1.0) is None and bench.no_compile(30.0) == "20 s were left"
    assert bench.no_kernels() == NEEDS_CUDA
    monkeypatch.setattr(Bench, "cuda", True)
    monkeypatch.setattr(gpu_common, "usable", lambda device: (False, "triton is not installed"))
    assert bench.no_kernels() == "triton is not installed"
    monkeypatch.setattr(gpu_common, "usable", lambda device: (True, "triton"))
    assert bench.no_kernels() is None


# --- the small kernels -----------------------------------------------------------------------------------------------------------


def test_small_kernels_are_checked_and_timed(bench, monkeypatch):
    monkeypatch.setattr(gpu_common, "usable", lambda device: (True, ""))
    monkeypatch.setattr(Bench, "pixels", 4)
    monkeypatch.setattr(gpu_small, "CONVOLUTIONS", [(4, 3, 3), (5, 4, 1)])
    with interpreted(pgd, noise, augment, heads, bn_fold):
        gpu_small.run(bench)
        monkeypatch.setattr(pgd, "pgd_step", lambda x, *a, **k: x + 0.01)
        gpu_small.check(bench, next(gpu_small._cases(bench)))
    rows = bench.results.rows("small")
    assert not any("error" in row for row in rows)
    checks = {row["what"]: row for row in rows if row["name"] == "against the truth"}
    assert len(checks) == 7 and not checks.pop("pgd_step linf 4")["ok"]
    # The interpreter cuts bf16 off where a GPU rounds.
    assert 0 < checks.pop("bn_fold ResNet-18")["largest_difference"] < 2**-7
    assert all(row["ok"] for row in checks.values())
    timed = [row for row in rows if "ms" in row]
    assert {row["name"] for row in timed} == {"eager", "kernel"} and len(timed) == 14
    for row in timed:
        assert row["gb_per_s"] == pytest.approx(gpu_small_bytes(bench, row["what"]) / row["ms"] / 1e6)


def gpu_small_bytes(bench, what):
    return next(case.moved for case in gpu_small._cases(bench) if case.what == what)


def test_forms_of_the_small_kernels_agree(bench):
    """What stands beside a kernel computes the same; noise is drawn anew."""
    for case in gpu_small._cases(bench):
        inputs = case.inputs(3)
        expected = case.truth(*inputs)
        for form in (case.plain, case.compiled or case.plain):
            found = form(*inputs)
            if case.what.startswith("start_noise"):
                assert (found - inputs[0]).abs().max() <= gpu_small.EPS + 1e-6
                continue
            pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True)
            assert max(gpu_small._distance(a, b) for a, b in pairs) <= max(case.tolerance, 1e-6), case.what


# --- tiles -----------------------------------------------------------------------------------------------------------------------

SOURCE = Path(config.__file__).read_text(encoding="utf-8")


def all_tiles(table, arch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "TABLE", table)
        return {
            (kernel, precision, d, n, views): config.tile(kernel, arch, precision, d, n, views)
            for kernel in tune.KERNELS for precision in supcon_launch.PRECISIONS for d in (16, 64, 128, 256, 512)
            for n in (1, config.SMALL_N, config.SMALL_N + 1) for views in (False, True)
        }  # fmt: skip


def rows_of(source):
    return tuple(row for row, _ in tune._parsed(source))


def test_the_table_is_read_as_it_stands():
    assert rows_of(SOURCE) == config.TABLE


@pytest.mark.parametrize("kernel", tune.KERNELS)
@pytest.mark.parametrize("arch", config.SHARED_LIMIT)
@pytest.mark.parametrize("d, small", [(64, True), (64, False), (128, False), (256, False), (256, True), (512, False)])
def test_a_winner_serves_its_bucket_and_nothing_else_changes(kernel, arch, d, small):
    row = Row(
        kernel, (arch,), "fp16", d, Tile(16, 16, 4, 1), 'measured: 1.23x the next, "quoted" (device, 2026-11-22)', small=small
    )
    source = tune.rewritten(SOURCE, [row])
    table = rows_of(source)
    assert row in table
    for other in set(config.SHARED_LIMIT) - {arch}:
        assert all_tiles(table, other) == all_tiles(config.TABLE, other)
    before, after = all_tiles(config.TABLE, arch), all_tiles(table, arch)
    changed = {case for case in before if before[case] != after[case]}
    assert (kernel, "fp16", d, config.SMALL_N if small else config.SMALL_N + 1, False) in changed
    for of_kernel, precision, width, n, views in changed:
        assert (of_kernel, precision, views) == (kernel, "fp16", False) and width <= d and (n <= config.SMALL_N) == small
    again = row.__class__(**{**vars(row), "tile": Tile(32, 16, 4, 1)})
    twice = tune.rewritten(source, [again])
    assert again in rows_of(twice) and len(rows_of(twice)) == len(table)
    # Everything but the rows that came, and the bucket's own row that went, is the text that was.
    spans = [span for known, span in tune._parsed(SOURCE) if tune._bucket(known) == tune._bucket(row)]
    gone = {number for first, last in spans for number in range(first, last + 1)}
    kept = iter(source.splitlines())
    assert all(line in kept for number, line in enumerate(SOURCE.splitlines(), 1) if number not in gone)
    assert max(map(len, source.splitlines())) <= 130


def test_winners_of_several_widths_each_keep_their_own():
    rows = [Row("gradient", (90,), "fp16", d, Tile(64, 16, 4, stages), "measured") for stages, d in ((1, 256), (2, 64), (3, 128))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "TABLE", rows_of(tune.rewritten(SOURCE, rows)))
        assert [config.tile("gradient", 90, "fp16", d, 8192, False).stages for d in (64, 128, 256)] == [2, 3, 1]


def test_without_a_gpu_tiles_are_compiled_and_nothing_is_written(capsys, monkeypatch, tmp_path):
    for name, values in (("ROWS", (64,)), ("COLUMNS", (32, 64)), ("WARPS", (4,)), ("STAGES", (2,))):
        monkeypatch.setattr(tune, name, values)
    faults = tune.aot.faults
    monkeypatch.setattr(tune, "SAID_EVERY", 1)
    monkeypatch.setattr(tune.aot, "faults", lambda row: ["8 bytes spilled"] if row["tile"] == "64x32" else faults(row))
    keep = tmp_path / "tiles.jsonl"
    assert tune.main(["--kernel", "gradient", "--d", "64", "--n", "1024", "--jobs", "1", "--json", str(keep)]) == 0
    out = capsys.readouterr().out
    said = iter(out.splitlines())
    headline = "gradient sm_90 fp16 D = 64 N = 1024 (ahead of time, no GPU: not timed): 2 candidates"
    assert all(line in said for line in (headline, "  1 of 2 compiled", "  2 of 2 compiled", "  1 of 2 usable"))
    assert "64x64 4w 2s" in out and "64x32" not in out and not re.search(r"[0-9] us\b", out)
    (row,) = map(json.loads, keep.read_text().splitlines())
    assert row["registers"] > 32 and row["spilled"] == 0 and row["shared"] > 0 and "ms" not in row
    assert Path(config.__file__).read_text(encoding="utf-8") == SOURCE


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--write"], "--write needs a CUDA device"),
        (["--d", "128,0"], "--d: '0' is no whole number of at least 1"),
        (["--d", "128,1024"], f"--d 1024: the kernels take at most {limits.MAX_FEATURES} features"),
        (["--n", "-1"], "--n: '-1' is no whole number of at least 1"),
        (["--n", ""], "--n: '' is no whole number of at least 1"),
        (["--jobs", "0"], "--jobs: '0' is no whole number of at least 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        tune.parse(arguments)
    assert said in capsys.readouterr().err


def test_only_the_table_of_this_repository_is_written(capsys, monkeypatch, tmp_path):
    assert tune.TABLE.exists() and tune.TABLE.parents[1] == Path(__file__).resolve().parents[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(config, "__file__", str(tune.TABLE))
    assert tune.parse(["--write"]).write
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    assert not tune.parse([]).write
    with pytest.raises(SystemExit, match="2"):
        tune.parse(["--write"])
    assert f"the table in use is {tmp_path / 'config.py'}" in capsys.readouterr().err


def test_a_tile_that_the_compiler_cannot_make_has_a_fault(monkeypatch):
    def fails(launch, arch):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(tune.aot, "compile_launch", fails)
    assert tune.compiled(tune.Search("gradient", 90, "fp16", 64, 1024), Tile(64, 64, 4, 2))["faults"][0].endswith(
        "out of resources"
    )


def test_the_forced_tile_is_the_one_that_is_compiled():
    search, tile = tune.Search("row_stats", 90, "fp16", 64, 1024), Tile(64, 16, 4, 1)
    with tune.forced(search, tile):
        assert config.tile("row_stats", 90, "fp16", 64, 1024, False) == tile
        assert config.tile("gradient", 90, "fp16", 64, 1024, False) != tile
    assert config.tile("row_stats", 90, "fp16", 64, 1024, False) != tile


def test_a_winner_says_by_how_much():
    found = {Tile(64, 64, 4, 3): {"ms": 1.0}, Tile(64, 32, 4, 3): {"ms": 1.23}, Tile(64, 16, 4, 3): {"ms": 2.0}}
    row = tune.winner(tune.Search("gradient", 90, "fp16", 128, 1024), found, "a GPU", "2026-11-22")
    assert row.reason == "measured: 1.23x the next at N = 1024 (a GPU, 2026-11-22)" and row.small and row.tile.columns == 64


class Quicker:
    """A problem whose tiles take as long as they have columns; one of them is wrong."""

    def __init__(self):
        self.asked = []

    def times(self, tiles, rounds):
        self.asked.append((len(tiles), rounds))
        if any(tile.columns == 128 for tile in tiles):
            raise ValueError("its gradient is off by 1.0e+00")
        return {tile: [tile.columns / 1e6] * rounds for tile in tiles}


def test_tiles_are_timed_alone_and_the_quickest_in_turns():
    problem, tiles = Quicker(), [Tile(64, columns, 4, stages) for columns in (128, 64, 32, 16) for stages in (1, 2, 3)]
    found, failed = tune.timed(problem, tiles, math.inf)
    assert [tile.columns for tile in found] == 3 * [16] + 3 * [32] and len(failed) == 3
    assert "off by" in failed[tiles[0]] and problem.asked[-1] == (tune.FINALISTS, tune.ROUNDS)
    assert tune.timed(problem, tiles, -math.inf)[1][tiles[1]] == "no time was left"
