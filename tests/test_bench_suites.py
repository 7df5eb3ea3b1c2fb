"""The suites of `make bench`, the parts that do not time: who computes the same as whom, what is said and written, what survives."""

import contextlib
import copy
import dataclasses
import gc
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from graph_emulator import Emulator
from PIL import Image
from rich.console import Console

from bench import cases, compare, data_cases, gpu_data, method_cases, naive, naive_loop, test_evaluation, turns
from bench import conftest as suites
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.results import Results
from fastanchor import pipes
from fastanchor.data import views
from fastanchor.data.sources import Split
from fastanchor.graphs import use_recorder
from fastanchor.reference.images import apply_crop_flip, to_float

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
NUMBERS = {"eps": 0.03, "step_size": 0.01, "steps": 2, "temperature": 0.1, "beta": 2.0}


# -- what is computed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hsc, channels_last", [(0.0, False), (0.5, True)])
def test_the_naive_loop_is_the_naive_step_over_the_same_batches(hsc, channels_last):
    """To the bit; the mean loss weighs a smaller last batch less."""
    batches = [
        (to_float(images).contiguous(), labels)
        for images, labels in (cases.make_batch(n, 16, CPU, seed) for seed, n in enumerate((6, 6, 3)))
    ]
    models = [cases.make_model(4, CPU, channels_last=channels_last) for _ in range(2)]
    before = copy.deepcopy(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4) for model in models]
    torch.manual_seed(0)
    mean, count = naive_loop.train_epoch(models[0], optimizers[0], batches, CPU, channels_last=channels_last, hsc=hsc, **NUMBERS)
    torch.manual_seed(0)
    total = 0.0
    for images, labels in batches:
        images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
        terms = naive.train_step(models[1], optimizers[1], images, labels, hsc=hsc, **NUMBERS)
        total += len(labels) * sum(terms.values()).item()
    assert (count, mean) == (15, pytest.approx(total / 15, rel=1e-6))
    for (name, found), expected in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    assert not torch.equal(before["backbone.conv1.weight"], models[0].state_dict()["backbone.conv1.weight"])


def outcomes(image_u8):
    """All that crop and flip can make of an image uint8 (H, W, 3), by the bytes of the fp32 (3, H, W) result."""
    given = image_u8.expand(81, *image_u8.shape)
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9)).T
    made = {}
    for mirrored in (False, True):
        images = to_float(apply_crop_flip(given, offsets, torch.full((81,), mirrored)))
        for (top, left), image in zip(offsets.T.tolist(), images, strict=True):
            made[image.contiguous().numpy().tobytes()] = (top, left, mirrored)
    assert len(made) == 162
    return made


def test_the_loaders_crop_and_flip_is_the_engines_for_every_draw():
    image_u8 = cases.make_batch(1, 12, CPU)[0][0]
    image = Image.fromarray(image_u8.numpy())
    for key, (top, left, mirrored) in outcomes(image_u8).items():
        made = data_cases.to_tensor(data_cases.crop_and_flip(image, top, left, mirrored))
        assert made.dtype == torch.float32 and made.is_contiguous() and made.numpy().tobytes() == key


@pytest.mark.parametrize("make", [data_cases.PillowTransform, lambda: data_cases.public_transform(12)[0]])
def test_the_loaders_draws_are_uniform(make):
    """All 81 x 2 outcomes with one probability: a chi-square far below what a missing or doubled draw gives."""
    transform = make()
    image_u8 = cases.make_batch(1, 12, CPU)[0][0]
    image, known, draws = Image.fromarray(image_u8.numpy()), outcomes(image_u8), 162 * 40
    torch.manual_seed(0)
    counts = Counter(known[transform(image).numpy().tobytes()] for _ in range(draws))
    expected = draws / 162
    # 161 degrees of freedom: mean 161, standard deviation 18.
    assert sum((counts[outcome] - expected) ** 2 / expected for outcome in known.values()) < 161 + 5 * 18


@pytest.mark.parametrize(
    "name", ["resident", "dali", "torch_0_workers", "torch_2_workers", "loader_0_workers", "loader_2_workers"]
)
def test_a_pipelines_pass_gives_every_image_once_and_its_own_label(name):
    if why := data_cases.left_out([name], CPU):
        pytest.skip(why[name])
    images, _ = cases.make_batch(12, 12, CPU)
    source = data_cases.Source(Split(images, torch.arange(12)), 4, CPU)
    assert source.images == 12
    known = [outcomes(image) for image in images]
    with data_cases.PIPELINES[name](source) as run:
        passes = [list(run()) for _ in range(2)]
    for made in passes:
        assert [tuple(x.shape) for x, _ in made] == [(4, 3, 12, 12)] * 3
        seen = [
            (int(label), x.contiguous().numpy().tobytes()) for xs, labels in made for x, label in zip(xs, labels, strict=True)
        ]
        assert sorted(label for label, _ in seen) == list(range(12))
        assert all(key in known[label] for label, key in seen)
    orders = [[int(label) for _, labels in made for label in labels] for made in passes]
    assert orders[0] != orders[1] and orders[0] != list(range(12))


def test_incomplete_batches_are_left_out_by_all_pipelines():
    source = data_cases.Source(Split(*cases.make_batch(11, 8, CPU)), 4, CPU)
    assert source.images == 8
    for name, make in data_cases.PIPELINES.items():
        if not name.endswith("_2_workers") and name not in data_cases.left_out([name], CPU):
            with make(source) as run:
                assert data_cases.drain(run) == 8, name


def test_workers_end_with_the_pipeline_also_after_a_failure():
    source = data_cases.Source(Split(*cases.make_batch(64, 8, CPU)), 4, CPU)
    before = set(multiprocessing.active_children())
    held = []
    with pytest.raises(RuntimeError), data_cases.loader(source, 2) as run:
        held.append(run())  # as a traceback would hold it
        next(held[0])
        assert len(set(multiprocessing.active_children()) - before) == 2
        raise RuntimeError
    assert set(multiprocessing.active_children()) == before


def test_accuracies_that_differ_by_more_than_a_point_fail_the_evaluation():
    test_evaluation.agree({"ours": 50.0, "naive": 50.4, "torchattacks": 49.4})
    with pytest.raises(AssertionError, match="'naive': 51.2"):
        test_evaluation.agree({"ours": 50.0, "naive": 51.2})


def test_the_plain_accuracy_counts_images_that_are_right_clean_and_attacked():
    """On logits that are the first two pixels: an attack that mends an image does not count."""
    images = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).view(4, 2, 1, 1)
    labels = torch.zeros(4, dtype=torch.int64)

    def attack(x, y):
        moved = x.clone()
        moved[0] = moved[0].flip(0)
        moved[1::2] = torch.tensor([1.0, 0]).view(2, 1, 1)
        return moved

    assert test_evaluation.plain_accuracy(lambda x: x.flatten(1), attack, images, labels, 4) == 25


# -- taking turns -----------------------------------------------------------------------------------------------------------------


class FakeBenchmark:
    """pytest-benchmark's fixture on a clock that the calls move."""

    disabled = False

    def __init__(self, clock):
        self.clock, self.extra_info, self.has_error, self.stats = clock, {}, False, None

    def pedantic(self, target, setup, rounds):
        data = []
        for _ in range(rounds):
            setup()
            before = self.clock.now
            target()
            data.append(self.clock.now - before)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0, order=[])
    monkeypatch.setattr(turns, "perf_counter", lambda: clock.now)

    def call(name, seconds):
        seconds = iter(seconds)

        def run():
            clock.order.append(name)
            clock.now += next(seconds)

        return run

    clock.call = call
    return clock


def test_peers_take_turns_and_every_figure_is_of_the_rounds(clock, monkeypatch):
    monkeypatch.setattr(turns, "matmul_rate", lambda device, dtype: {torch.float32: 1e3, torch.bfloat16: 1e4}[dtype])
    benchmark = FakeBenchmark(clock)
    peers = {"naive": clock.call("n", [9, 12, 2, 6]), "second_rung": clock.call("s", [9, 1, 3, 4])}
    checked = []
    turns.take_turns(
        benchmark, clock.call("e", [9, 1, 2, 2]), peers, rounds=3, images=8, flops=50, precision="bf16",
        left_out={"x": "is not installed"}, check=lambda: checked.append(True),
    )  # fmt: skip
    assert "".join(clock.order) == "ens" + "nse" * 3 and checked == [True] and not benchmark.has_error
    info = benchmark.extra_info
    assert (info["naive_median_s"], info["naive_range_s"]) == (6, [2, 12])
    # 12 / 1, 2 / 2, 6 / 2: of each round, not of the medians.
    assert (info["naive_ratio_median"], info["naive_ratio_range"]) == (3, [1, 12])
    assert (info["second_rung_ratio_median"], info["second_rung_ratio_range"]) == (1.5, [1, 2])
    assert (info["images_per_s"], info["naive_images_per_s"]) == (4, 8 / 6)
    # 4 images a second of 50 FLOPs each.
    assert info["share_of_bf16_matmul"] == pytest.approx(0.02) and info["model_tflops"] == pytest.approx(2e-10)
    assert info["left_out"] == {"x": "is not installed"} and info["precision"] == "bf16"
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("error", [AssertionError, KeyboardInterrupt])
def test_a_benchmark_that_fails_or_is_interrupted_is_marked(clock, error):
    benchmark = FakeBenchmark(clock)

    def check():
        raise error

    with pytest.raises(error):
        turns.take_turns(benchmark, clock.call("e", [1, 1]), {}, rounds=1, check=check)
    assert benchmark.has_error and gc.get_freeze_count() == 0


# -- the tables -------------------------------------------------------------------------------------------------------------------


def entry(name, group, ms, peers, **info):
    """As pytest-benchmark writes one; peers: name -> (ms, ratio). Ranges are 10 % wide."""
    found = {"precision": "fp32", "left_out": {}, **info}
    for peer, (theirs, ratio) in peers.items():
        found |= {
            f"{peer}_median_s": theirs / 1e3, f"{peer}_range_s": [0.9 * theirs / 1e3, 1.1 * theirs / 1e3],
            f"{peer}_ratio_median": ratio, f"{peer}_ratio_range": [0.9 * ratio, 1.1 * ratio],
        }  # fmt: skip
    stats = {"median": ms / 1e3, "min": 0.9 * ms / 1e3, "max": 1.1 * ms / 1e3, "rounds": 7}
    param = name.partition("[")[2].rstrip("]") or None
    return {"name": name, "fullname": f"bench/x.py::{name}", "group": group, "param": param, "extra_info": found, "stats": stats}


ENTRIES = [
    entry("test_attack[bf16]", "attack, PGD-10", 380, {"naive": (1640, 4.31), "second_rung": (745, 1.96), "torchattacks": (1200, 3.16)},
          precision="bf16", share_of_bf16_matmul=0.284, images_per_s=84.2),
    entry("test_whole_step[PGD-AT-fp32]", "whole step, PGD-AT, PGD-10", 942, {"naive": (1931, 2.05), "second_rung": (923, 0.98)},
          share_of_fp32_matmul=0.61),
    entry("test_epoch[PGD-AT-fp32]", "epoch of 256 images", 2000, {"naive": (5000, 2.5)}, images_per_s=128, naive_images_per_s=51.2,
          extrapolated_s_per_50000_images={"ours": 390.6, "naive": 976.6}),
    entry("test_robust_accuracy", "evaluation, PGD-20", 300, {"naive": (600, 2.0)}, clean_percent=90.4,
          robust_percent={"ours": 35.2, "naive": 35.6}, left_out={"torchattacks": "torchattacks is not installed"}),
    entry("test_attack_update", "attack update", 2, {"naive": (3, 1.5)}, runs_as="plain PyTorch, as ever"),
]  # fmt: skip
MACHINE = {
    "device": "CPU: X, 2 threads",
    "threads": 2,
    "fp32_matmul_tflops": 0.2,
    "bf16_matmul_tflops": 0.41,
    "copy_gb_per_s": 30,
}


def shown(entries, **settings):
    text = io.StringIO()
    suites.show(entries, {**dataclasses.asdict(turns.FULL), **settings}, MACHINE, Console(width=suites.WIDTH, file=text))
    return text.getvalue()


def row_of(text, *words):
    """The cells of the one line of a table that has these words."""
    (line,) = (line for line in text.splitlines() if all(word in line for word in words))
    return re.split(r"\s{2,}", line.strip())


def test_the_table_has_naive_second_rung_and_ours_with_their_ratios():
    text = shown(ENTRIES)
    assert (
        "CPU: X, 2 threads; torch" in text and "CPU figures" in text and "fp32 0.200, bf16 0.410 TFLOP/s, copy 30.0 GB/s" in text
    )
    assert "attack and whole step: ResNet-18 of width 32, batch 32, 32 x 32 pixels, 7 rounds" in text
    assert row_of(text, "attack, PGD-10", "4.31") == [
        "attack, PGD-10", "bf16", "1640", "745", "380", "4.31 (3.88 to 4.74)", "1.96 (1.76 to 2.16)", "28 %",
    ]  # fmt: skip
    assert row_of(text, "whole step", "2.05")[-3:] == ["2.05 (1.84 to 2.25)", "0.98 (0.88 to 1.08)", "61 %"]
    assert text.index("attack and whole step") < text.index("the other suites") < text.index("extrapolated")
    assert "passed" not in text
    passed = shown([{**ENTRIES[0], "extra_info": {**ENTRIES[0]["extra_info"], "share_of_bf16_matmul": 1.41}}])
    assert row_of(passed, "attack, PGD-10", "4.31")[-1] == "passed" and "\npassed: the ceiling was" in passed
    assert max(map(len, passed.splitlines())) <= suites.WIDTH


def test_the_other_suites_follow_with_all_that_took_part():
    text = shown(ENTRIES)
    others = text[text.index("the other suites") :]
    assert row_of(others, "torchattacks", "3.16") == ["torchattacks", "1200 (1080 to 1320)", "3.16 (2.84 to 3.48)"]
    assert row_of(others, "epoch of 256 images [PGD-AT-fp32]")[-3:] == ["2000 (1800 to 2200)", "128", "1"]
    assert row_of(others, "2.50")[:3] == ["naive", "5000 (4500 to 5500)", "51"]
    # Not taken for the attack: its peers are no rungs.
    assert row_of(others, "attack update")[-2:] == ["2 (1.8 to 2.2)", "1"]
    assert "whole step" not in others and "second rung" not in others
    assert "epoch of 256 images, fp32: extrapolated to 50,000 images: ours 391 s, naive 977 s" in text
    assert "robust %: ours 35.2, naive 35.6 (clean 90.4)" in text
    assert "left out: torchattacks: torchattacks is not installed" in text and "\nplain PyTorch, as ever\n" in text
    assert max(map(len, text.splitlines())) <= suites.WIDTH


def test_a_table_for_what_there_is_and_a_quick_run_says_so():
    alone = shown([ENTRIES[1]])
    assert "the other suites" not in alone and "mean nothing" not in alone
    kernels = shown([ENTRIES[4]], quick=True)
    assert "attack and whole step" not in kernels and "--bench-quick: the figures mean nothing" in kernels
    # Flat, as pytest-benchmark hands them to its hooks.
    flat = [{**{key: value for key, value in ENTRIES[1].items() if key != "stats"}, **ENTRIES[1]["stats"]}]
    assert shown(flat) == alone


# -- the command ------------------------------------------------------------------------------------------------------------------


def bench(folder, *arguments, plugin="", only="--benchmark-only"):
    """`make bench` at tiny sizes in a process of its own; plugin: Python that is run before, to break something."""
    folder.mkdir(exist_ok=True)
    (folder / "breaks_it.py").write_text(plugin)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "breaks_it", "bench", only, "--bench-quick",
        f"--benchmark-json={folder / 'runs/new/bench.json'}", "-p", "no:cacheprovider", *arguments,
    ]  # fmt: skip
    # A worker of xdist would pass on that it is one, and the plugin then measures nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    path = folder / "runs/new/bench.json"
    return ended, json.loads(path.read_text()) if path.exists() else None


def test_all_suites_run_in_order_and_write_one_file(tmp_path):
    ended, found = bench(tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    names = [entry["name"] for entry in found["benchmarks"]]
    steps = [f"test_whole_step[{method}-{dtype}]" for method in cases.METHODS for dtype in ("fp32", "bf16")]
    assert names[:2] == ["test_attack[fp32]", "test_attack[bf16]"] and set(names[2:6]) == set(steps)
    kinds = list(dict.fromkeys(name.partition("[")[0] for name in names))
    assert kinds == [
        "test_attack", "test_whole_step", "test_methods", "test_epoch", "test_robust_accuracy", "test_pipeline", "test_files",
        "test_loss", "test_attack_update", "test_augmentation",
    ]  # fmt: skip
    by_name = {entry["name"]: entry["extra_info"] for entry in found["benchmarks"]}
    for name in ("test_attack[fp32]", "test_attack[bf16]", *steps):
        info, precision = by_name[name], name[-5:-1]
        assert info["precision"] == precision and info[f"share_of_{precision}_matmul"] > 0 and info["threads"] == 1
        for peer in ("naive", "second_rung"):
            low, high = info[f"{peer}_ratio_range"]
            assert low <= info[f"{peer}_ratio_median"] <= high and info[f"{peer}_range_s"][0] <= info[f"{peer}_median_s"]
    costs = by_name["test_methods"]
    assert costs["left_out"] == method_cases.LEFT_OUT and costs["flops_ratio"].keys() == {*method_cases.RECIPES[1:]}
    assert all(f"{name}_ratio_median" in costs for name in costs["flops_ratio"])
    robust = by_name["test_robust_accuracy"]["robust_percent"]
    assert {"ours", "naive"} <= set(robust) and "autoattack" in by_name["test_robust_accuracy"]["left_out"]
    # What the hook adds.
    ours = found["fastanchor"]
    assert (ours["schema"], ours["kind"], ours["failed"]) == (1, "make bench", [])
    assert ours["settings"] == dataclasses.asdict(turns.QUICK)
    assert ours["environment"]["about"]["device"].startswith("CPU") and ours["environment"]["fp32_matmul_tflops"] > 0
    # One table, ours, the last thing said but for the count.
    assert "Name (time in" not in ended.stdout
    assert "attack and whole step: ResNet-18 of width 4, batch 4" in ended.stdout
    assert ended.stdout.index("the other suites") < ended.stdout.index("passed in")
    path = str(tmp_path / "runs/new/bench.json")
    with contextlib.redirect_stdout(io.StringIO()):
        assert compare.main([path, path]) == 0


def test_what_fails_or_is_interrupted_leaves_no_figures_and_the_others_stay(tmp_path):
    """An attack update that moves nothing, and ctrl-C in the round of the benchmark after it."""
    breaks = """
from fastanchor.data import views
from fastanchor.ops import images

images.pgd_step = lambda x, gradient, images, **_: images.clone()
calls, augment = [], views.augment

def interrupted(*given, **options):
    calls.append(1)
    if len(calls) == 2:
        raise KeyboardInterrupt
    return augment(*given, **options)

views.augment = interrupted
"""
    ended, found = bench(tmp_path, "-k", "256-128-uniform or update or augmentation", plugin=breaks)
    assert ended.returncode == 2
    assert [entry["name"] for entry in found["benchmarks"]] == ["test_loss[256-128-uniform]"]
    assert found["fastanchor"]["failed"] == ["bench/test_kernels.py::test_attack_update"]
    said = ended.stdout[ended.stdout.index("fastanchor, CPU") :]
    assert "contrastive loss" in said and "attack update (plain" not in said and "augmentation (plain" not in said


def test_the_hooks_are_silent_where_nothing_is_timed(tmp_path):
    """As under pytest-xdist, which turns pytest-benchmark off."""
    ended, found = bench(tmp_path, "-k", "update", only="--benchmark-disable")
    assert ended.returncode == 0 and "1 skipped" in ended.stdout
    assert found is None and "fastanchor, CPU" not in ended.stdout


# -- the GPU run's part -----------------------------------------------------------------------------------------------------------


def make_bench(tmp_path):
    settings = {"quick": True, "compile": False, "cudnn_benchmark": False, "data": "synthetic", "ceiling": 1e12}
    return Bench(Results(tmp_path, {}), CPU, [4], **settings)


def test_the_gpu_runs_data_part_feeds_the_step_by_every_pipeline(tmp_path):
    before = set(multiprocessing.active_children())
    bench = make_bench(tmp_path)
    gpu_data.run(bench)
    rows = bench.results.rows("data")
    assert not [row for row in rows if "error" in row] and set(multiprocessing.active_children()) == before
    assert [row["name"] for row in rows if row.get("left_out") == NEEDS_CUDA] == ["resident, kernel"]
    engines = ["dali"] * (not data_cases.left_out(["dali"], CPU)) + ["torch, 2 workers"]
    loaders = ["resident, plain torch", *engines, "DataLoader, 0 workers", "DataLoader, 2 workers"]
    alone = {row["name"]: row for row in rows if row.get("how") == "alone" and "ms" in row}
    fed = {row["name"]: row for row in rows if row.get("how") == gpu_data.HOW}
    assert list(alone) == [gpu_data.CEILING, *loaders] and list(fed) == [gpu_data.ALONE, *loaders, gpu_data.WITHIN]
    for row in (*alone.values(), *fed.values()):
        assert row["images_per_s"] == pytest.approx(4e3 / row["ms"]) and row["batch"] == 4
    assert fed[gpu_data.ALONE]["cost_percent"] == 0 and alone["DataLoader, 0 workers"]["ratio"] == 1
    for row in fed.values():
        # Of time over the step's, where ratio is the step's time over that.
        expected = [100 * (1 / ratio - 1) for ratio in reversed(row["ratio_range"])]
        assert row["cost_percent_range"] == pytest.approx(expected)
    # Two dozen images fit into memory.
    (chosen,) = [row for row in rows if "chosen" in row]
    assert chosen["name"] == gpu_data.WITHIN and "in memory already" in chosen["chosen"] and chosen["target_percent"] == 2
    assert chosen["within_target"] == (chosen["cost_percent"] < 2)
    files = {row["name"]: row for row in rows if row.get("how") == gpu_data.FILES}
    assert "GPU" in files["dali, mixed"]["left_out"] or "DALI" in files["dali, mixed"]["left_out"]
    measured = [name for name, row in files.items() if "ms" in row]
    assert measured == ["dali, cpu"] * ("dali" in engines) + ["torch, 0 workers", "torch, 2 workers"]
    assert {files[name]["pixels"] for name in measured} == {32}


def test_a_folder_of_jpeg_files_is_what_it_says():
    with data_cases.jpeg_folder(6, 40) as split:
        paths = [Path(split.name(i)) for i in range(6)]
        assert [path.is_file() for path in paths] == [True] * 6 and split.image_shape == (40, 40) and len(split) == 6
        images = split.images.double()
        with Image.open(paths[0]) as image:
            assert image.format == "JPEG" and image.size == (40, 40)
    assert not any(path.exists() for path in paths)
    # Pictures, not noise: neighbours are much closer than pixels far apart, and no two images are the same.
    near, far = (images[:, :, n:] - images[:, :, :-n] for n in (1, 20))
    assert near.abs().mean() < 0.5 * far.abs().mean() and len(images.flatten(1).unique(dim=0)) == 6


class Loader:
    """A DataLoader on a clock of its own: each of its workers makes a batch in `making` seconds, two of them in advance."""

    def __init__(self, making, workers=8):
        self.now, self.making, self.workers = 0.0, making, workers
        self.ready, self.taken = [making * (1 + i // workers) for i in range(2 * workers)], 0

    def take(self):
        self.now = max(self.now, self.ready[self.taken])
        free = self.ready[self.taken + self.workers]
        self.ready.append(max(free, self.now) + self.making)
        self.taken += 1
        return ()


@pytest.mark.parametrize("making, step", [(0.48, 0.04), (0.6, 0.04), (0.24, 0.02), (0.28, 0.04), (0.36, 0.04), (0.3199, 0.04)])
def test_a_loader_costs_what_it_costs_in_the_long_run(monkeypatch, making, step):
    loader = Loader(making)

    def use():
        loader.now += step

    def seconds(call, device, count=1):
        started = loader.now
        for _ in range(count):
            call()
        return (loader.now - started) / count

    monkeypatch.setattr(pipes, "seconds", seconds)
    bench = SimpleNamespace(device=CPU, quick=False, rounds=5)
    found = gpu_data._take_turns(bench, {"loader": (pipes.Pipe(loader.take, workers=8, ready=16), use)})["loader"]
    assert found == pytest.approx([max(making / 8, step)] * 5, rel=0.03)


def test_the_step_that_is_fed_with_views_is_the_engines(tmp_path):
    """The same weights, on images that the engine would only have scaled."""
    config = cases.make_config(0.0, 2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, augment="none"))
    images, labels = cases.make_batch(4, 16, CPU)
    models = [cases.make_model(4, CPU) for _ in range(2)]
    usual, given = (cases.make_step(config, model, CPU) for model in models)
    given.load = gpu_data.prepared
    usual(images, labels, progress=0.0)
    given(views.to_float(images), labels, progress=0.0)
    for found, expected in zip(models[1].state_dict().values(), models[0].state_dict().values(), strict=True):
        assert torch.equal(found, expected)


def test_the_data_part_with_its_steps_captured(tmp_path, monkeypatch):
    """On emulated graphs, which replay on the memory that they saw: each batch must be copied in."""
    monkeypatch.setattr(Bench, "cuda", True)
    monkeypatch.setattr(Bench, "tidy", lambda self: None)
    bench, recorders = make_bench(tmp_path), []
    with use_recorder(lambda *given: recorders.append(Emulator(*given)) or recorders[-1]):
        gpu_data.run(bench)
    rows = bench.results.rows("data")
    assert len(recorders) == 2 and not [row for row in rows if "error" in row]
    assert {row["precision"] for row in rows if row.get("how") == gpu_data.HOW} == {"bf16"}


def test_a_batch_size_that_does_not_fit_in_the_time_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "pixels", 8)
    bench = make_bench(tmp_path)
    bench.quick, bench.deadline = False, 0.0
    gpu_data.run(bench)
    row, files = bench.results.rows("data")
    assert row["batch"] == 4 and "s were left" in row["left_out"]
    assert files["how"] == gpu_data.FILES and "s were left" in files["left_out"]
