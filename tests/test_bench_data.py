"""`fastanchor bench-data`: the arithmetic of turns, costs and advice on a clock of its own; one tiny run; bad input."""

import dataclasses
import io
import json
import multiprocessing

import numpy as np
import pytest
import torch
from graph_emulator import Emulator
from PIL import Image
from rich.console import Console

from bench import schema
from fastanchor import bench_data, bench_sizes, cli, cli_bench, pipes
from fastanchor.data import feeds
from fastanchor.data.dali import find_dali
from fastanchor.data.geometry import CLEAN
from fastanchor.errors import UserError
from fastanchor.graphs import use_recorder
from fastanchor.methods import build_method
from fastanchor.ops.images import decide
from fastanchor.pipes import Candidate, Pipe
from fastanchor.settings import load_recipe, parse_flags
from fastanchor.train.run import model_from_config
from fastanchor.train.step import TrainStep
from fastanchor.train.throughput import step_cost

CPU = torch.device("cpu")
TINY = (
    "--data.source synthetic --data.limit 60 --model.width 4 --attack.steps 1 --batch-size 8 --data.workers 1 --device cpu"
).split()
DALI, _ = find_dali()


class Clock:
    """Seconds that pass only where somebody says so, in place of the clock that turns are timed by."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(pipes.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(pipes.time, "sleep", self.spend)

    def spend(self, seconds, *result):
        self.now += seconds
        return result


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


# -- turns ------------------------------------------------------------------------------------------------------------------------


def test_what_was_made_in_advance_is_not_timed(monkeypatch):
    events = []
    monkeypatch.setattr(pipes, "seconds", lambda call, device, count: events.append(f"timed {count}") or call() or 0.5)
    pipe = Pipe(lambda: events.append("take") or (), workers=3, ready=6)
    assert pipes.turn(pipe, lambda: events.append("use"), CPU, 7) == 0.5
    assert events == ["take"] * 6 + ["take", "use"] * 3 + ["timed 7", "take", "use"]


def test_a_turn_is_whole_cycles_of_the_workers_and_fills_its_time():
    take = tuple
    assert pipes.batches_a_turn(Pipe(take), once=0.05, fill=0.2) == 4  # 0.2 s
    assert pipes.batches_a_turn(Pipe(take), once=3.0, fill=0.2) == 1
    assert pipes.batches_a_turn(Pipe(take), once=1e-9, fill=0.2) == pipes.MOST
    assert pipes.batches_a_turn(Pipe(take, ready=3), once=3.0, fill=0.2) == 2
    for workers in (2, 3, 7, 16):
        for once in (1e-9, 0.001, 0.05, 3.0):
            count = pipes.batches_a_turn(Pipe(take, workers, 2 * workers), once, 0.2)
            assert count % workers == 0 and 2 * workers <= count <= pipes.MOST


def test_times_are_those_of_taking_and_using_a_batch(clock):
    pairs = {
        "quick": (Pipe(lambda: clock.spend(0.25)), lambda: clock.spend(1.0)),
        "slow": (Pipe(lambda: clock.spend(2.0), ready=2), lambda: clock.spend(1.0)),
    }
    once = pipes.estimate(pairs, CPU)
    assert once == {"quick": 1.25, "slow": 3.0}
    counts, rests = {"quick": 3, "slow": 2}, {"slow": 0.5}
    before = clock.now
    assert pipes.take_turns(pairs, counts, CPU, 4, rests) == {"quick": [1.25] * 4, "slow": [3.0] * 4}
    # One untimed batch each, and two of the slow one's are taken and used by nobody.
    assert clock.now - before == 4 * (4 * 1.25 + 2 * 2.0 + 3 * 3.0 + 0.5)
    taken = {"quick": 0.25, "slow": 2.0}
    assert pipes.round_seconds(pairs, taken, once, counts, rests) == (clock.now - before) / 4


def test_a_rests_time_is_nobodys(clock):
    pairs = {name: (Pipe(lambda: clock.spend(1.0), ready=1), lambda: None) for name in "ab"}
    assert pipes.take_turns(pairs, {"a": 1, "b": 1}, CPU, 2, {"a": 100.0}) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert clock.now == 2 * (2 * 3 + 100)


# -- what is made of the times ----------------------------------------------------------------------------------------------------


def test_costs_are_formed_within_each_round():
    # The machine is twice as slow in the second round: over all rounds the medians alone would say 100 %.
    found = pipes.costs([1.1, 2.4, 1.0], [1.0, 2.0, 1.0])
    assert found["cost_percent"] == pytest.approx(10) and found["cost_percent_range"] == pytest.approx([0, 20])
    assert pipes.costs([0.9], [1.0])["cost_percent"] == pytest.approx(-10)


def test_rates_are_the_batch_over_the_median_and_the_extremes():
    found = pipes.rates([0.5, 0.25, 1.0, 0.4, 0.8], 100)
    assert found["images_per_s"] == 200 and found["images_per_s_range"] == [100, 400]
    assert found["ms"] == 500 and found["ms_range"] == [250, 1000] and found["rounds"] == 5


def fed(**times):
    return {name: Candidate(name.partition("_")[0], f"--data.backend {name}", found) for name, found in times.items()}


def test_auto_is_right_where_nothing_is_quicker_in_every_round():
    found = pipes.judge("resident", "it fits", fed(resident=[1.0, 1.0, 1.0], dali=[1.1, 1.2, 1.1]))
    assert found["agrees"] and found["use"] == "" and found["says"] == "use resident, as auto does: it fits"
    # Quicker, but not in every round; in every round, but by 2 %; in every round, but in two alone.
    for times in ([0.5, 0.5, 1.01], [0.9805, 0.9805, 0.9805]):
        assert pipes.judge("resident", "it fits", fed(resident=[1.0, 1.0, 1.0], dali=times))["agrees"]
    assert pipes.judge("resident", "it fits", fed(resident=[1.0, 1.0], dali=[0.5, 0.5]))["agrees"]


def test_the_measurement_may_disagree_and_says_what_to_add():
    found = pipes.judge("resident", "it fits", fed(resident=[1.5, 3.0, 1.4], dali=[1.3, 2.0, 1.2], torch_2=[1.0, 2.0, 1.0]))
    assert not found["agrees"] and found["use"] == "--data.backend torch_2" and found["auto"] == "resident"
    assert found["says"] == (
        "auto takes resident (it fits), but the measurement disagrees: with it a step takes 50.0 % longer than with torch_2; "
        "add --data.backend torch_2"
    )


def test_rows_of_the_chosen_backend_do_not_contradict_it():
    """Its workers or decoder are another setting; the better of its rows speaks for it."""
    found = pipes.judge("torch", "files", fed(torch_0=[2.0] * 3, torch_2=[1.0] * 3, dali=[1.5] * 3))
    assert found["agrees"]
    assert "was not measured" in pipes.judge("dali", "files", fed(torch_0=[2.0] * 3))["says"]


# -- what is measured -------------------------------------------------------------------------------------------------------------


def configured(*flags, recipe="pgd_at"):
    return parse_flags([*TINY, *flags], load_recipe(recipe))


def test_a_cpus_step_is_cut_down_unless_the_user_has_said_its_sizes():
    def cost_at(*image_size):
        def flops(config):
            return step_cost(build_method(config), model_from_config(config, 2, (0.5,) * 3, (0.25,) * 3), image_size).total

        return flops

    config = load_recipe("pgd_at")
    made, flags = bench_sizes.cpu_sized(config, (), cost_at(32, 32))
    assert (made.model.width, made.batch_size) == (16, 8) and flags == ["--model.width 16", "--batch-size 8"]
    large, _ = bench_sizes.cpu_sized(config, (), cost_at(96, 96))
    assert large.batch_size == bench_sizes.CPU_LEAST_BATCH
    for given, expected in (
        ({"model.width"}, (None, 8)),
        ({"batch_size"}, (16, 128)),
        ({"model.width", "batch_size"}, (None, 128)),
    ):
        made, flags = bench_sizes.cpu_sized(config, given, cost_at(32, 32))
        assert (made.model.width, made.batch_size) == expected and len(flags) == 2 - len(given)
    assert bench_sizes.cpu_sized(config, {"model.width", "batch_size"}, cost_at(32, 32)) == (config, [])


def test_a_method_with_indexed_labels_and_heads_is_measured():
    flags = ["--loss.clusters", "2", "5", "--attack.steps", "1", "--data.augment", "crop", "--data.weak", "crop"]
    found = bench_data.measure(configured(*flags, recipe="advcl"), rounds=1, say=lambda text: None)
    fed = [row for row in found["rows"] if "feeding" in row]
    assert len(fed) >= 2 and all(row["feeding"]["images_per_s"] for row in fed)


def test_views_are_those_of_the_step_and_as_many_more_as_asked_for():
    anchor = configured("--loss.views", "clean+aug+adv", recipe="anchor")
    assert bench_sizes.view_names(configured(), None) == ("aug",) and bench_sizes.view_names(configured(), 1) == ("aug",)
    assert bench_sizes.view_names(configured(), 2) == ("aug", "aug2") and bench_sizes.view_names(anchor, None) == (CLEAN, "aug")
    with pytest.raises(UserError, match=r"^--views = 1: must be 2, the recipe's step takes 2 \(clean, aug\)$"):
        bench_sizes.view_names(anchor, 1)


class Counted(TrainStep):
    made: list = []

    def __call__(self, *batch, progress):
        Counted.made.append((id(self), tuple((part.dtype, tuple(part.shape)) for part in batch)))
        super().__call__(*batch, progress=progress)


def measured(monkeypatch, *flags, **options):
    """A run of two short rounds, and the batches that the steps were given."""
    monkeypatch.setattr(bench_sizes, "TrainStep", Counted)
    monkeypatch.setattr(pipes, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(pipes, "MOST", 2)
    Counted.made, said = [], []
    before = set(multiprocessing.active_children())
    found = bench_data.measure(configured(*flags), given={"model.width", "batch_size"}, rounds=2, say=said.append, **options)
    assert set(multiprocessing.active_children()) == before
    return json.loads(json.dumps(found)), said


def test_every_backend_gives_batches_to_nothing_and_to_the_step(monkeypatch):
    found, said = measured(monkeypatch)
    names = [bench_data.CEILING, "resident", "dali", "torch, 0 workers", "torch, 1 worker"]
    assert [row["name"] for row in found["rows"]] == names
    assert (found["kind"], found["schema"], found["environment"]["device"][:3]) == ("bench-data", 1, "CPU")
    settings = found["settings"]
    assert (settings["images"], settings["image_size"], settings["batch_size"], settings["views"]) == (59, [32, 32], 8, ["aug"])
    assert settings["step"] == "resnet18 of width 4, PGD-1" and found["config"]["data"]["source"] == "synthetic"
    for row in found["rows"]:
        if row["name"] == "dali" and not DALI:
            assert "not installed" in row["left_out"] and "feeding" not in row
            continue
        for part in (row["alone"], row["feeding"]):
            assert part["rounds"] == 2 and part["images_per_s"] == pytest.approx(8e3 / part["ms"])
            assert part["ms_range"][0] <= part["ms"] <= part["ms_range"][1]
        low, high = row["feeding"]["cost_percent_range"]
        assert low <= row["feeding"]["cost_percent"] <= high
        assert row["within_target"] == (row["feeding"]["cost_percent"] < 2)
    assert found["rows"][0]["feeding"]["cost_percent"] == 0
    assert found["recommended"]["auto"] == "resident" and "in memory already" in found["recommended"]["why"]
    # Indices to one step; the ceiling's finished views, and what the other backends give, to another.
    kinds = dict.fromkeys(Counted.made)
    labels, stored, finished = (torch.int64, (8,)), (torch.uint8, (8, 32, 32, 3)), (torch.float32, (8, 3, 32, 32))
    assert {batch for _, batch in kinds} == {(labels,), (labels, stored), (labels, finished)}
    assert len({step for step, batch in kinds if batch == (labels,)}) == 1 and len({step for step, _ in kinds}) == 2
    assert any("synthetic: 59 training images, 32x32, decoded; CPU figures" in line for line in said)
    assert any("the step: resnet18 of width 4, PGD-1, batch size 8, fp32" in line for line in said)


@pytest.mark.skipif(not DALI, reason="DALI is not installed")
def test_two_views_with_colours_are_finished_alone_and_within_the_step(monkeypatch):
    finished = []
    view = bench_data._Run._view
    monkeypatch.setattr(bench_data._Run, "_view", lambda self, *given: finished.append(given[1]) or view(self, *given))
    found, _ = measured(monkeypatch, "--data.augment", "simclr", views_wanted=2)
    assert found["settings"]["views"] == ["aug", "aug2"] and not [row for row in found["rows"] if "left_out" in row]
    assert finished.count("aug2") == finished.count("aug") + len(Counted.made)
    # Labels and two views, and of each view five tensors of colours; but the ceiling's are finished.
    assert {len(batch) for _, batch in Counted.made} == {1, 3, 13}


@pytest.mark.parametrize("augment, name", [("crop_flip", "aug"), ("crop_flip", CLEAN), ("simclr", "aug"), ("none", "aug")])
def test_a_view_alone_is_the_view_that_the_step_makes(augment, name):
    config = configured("--data.augment", augment, "--loss.views", "clean+aug+adv", recipe="anchor")
    config = dataclasses.replace(config, batch_size=6)
    run = bench_data._Run(config, bench_data.load_images(config), CPU, (CLEAN, "aug"), 1, print)
    assert run.fused == (augment == "crop_flip" and decide("augment", "auto", CPU)[0])
    feed = feeds.open_feed("resident", run.split, run.spec)
    (batch,) = feed.epoch(torch.arange(6), 6, 0)
    step = run._step(feed.load)
    step.generators["augment"].manual_seed(3)
    run.generator.manual_seed(3)
    expected = step.make_views(*feed.load(*batch))[0]
    assert torch.equal(run._view(feed.load(*batch)[0], name, run.generator), expected[name])


def test_the_weights_stay_while_they_are_timed():
    run = bench_data._Run(configured(), bench_data.load_images(configured()), CPU, ("aug",), 1, print)
    ceiling, steps = run._steps(None)
    model = steps["stream"].args[0].model
    before = {name: value.clone() for name, value in model.named_parameters()}
    steps["stream"](*ceiling)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(value.grad is not None and value.grad.any() for name, value in model.named_parameters() if "classifier" in name)


def test_steps_are_captured_before_any_worker_is_there(monkeypatch):
    """On emulated graphs: one capture for each kind of batch, none of them while a turn is timed."""
    recorders, at_work = [], []
    decided = TrainStep._decide_graph
    monkeypatch.setattr(Counted, "_decide_graph", lambda self: (decided(self) and True, "emulated"))

    def make(*given):
        at_work.append(len(multiprocessing.active_children()))
        recorders.append(Emulator(*given))
        return recorders[-1]

    with use_recorder(make):
        found, _ = measured(monkeypatch)
    # Indices, stored views, finished views, which DALI's are too.
    assert len(recorders) == 3 and at_work == [0] * 3 and "feeding" in found["rows"][-1]


def write_folder(root, count=6, size=(40, 40)):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                coarse.resize(size, Image.Resampling.BICUBIC).save(root / part / name / f"{i}.jpg")


def test_a_folder_is_resident_decoded_and_stays_files_for_the_others(monkeypatch, tmp_path):
    write_folder(tmp_path)
    flags = ["--data.source", f"folder:{tmp_path}", "--data.limit", "12", "--batch-size", "4", "--data.image-size", "16"]
    opened = {}
    open_feed = feeds.open_feed
    monkeypatch.setattr(
        feeds, "open_feed", lambda name, split, spec: opened.update({name: split}) or open_feed(name, split, spec)
    )
    found, _ = measured(monkeypatch, *flags)
    names = [row["name"] for row in found["rows"] if "feeding" in row]
    assert names == [bench_data.CEILING, "resident", *["dali, cpu"] * DALI, "torch, 0 workers", "torch, 1 worker"]
    assert type(opened["resident"]).__name__ == "Split" and type(opened["torch"]).__name__ == "Encoded"
    assert found["settings"]["kept"] == "encoded" and found["recommended"]["auto"] == "resident"
    # On files that are damaged afterwards the run ends with the file's name.
    for path in (tmp_path / "train").glob("*/*.jpg"):
        whole = path.read_bytes()
        path.write_bytes(whole[:200])
        with pytest.raises(UserError, match=r"\.jpg'"):
            measured(monkeypatch, *flags)
        path.write_bytes(whole)
        break


def test_files_that_cannot_stay_files_leave_their_backends_out(monkeypatch, tmp_path):
    """Photographs that are no squares are decoded as they are, but made square where they are kept as files."""
    write_folder(tmp_path, size=(48, 40))
    found, _ = measured(monkeypatch, "--data.source", f"folder:{tmp_path}", "--data.limit", "12", "--batch-size", "4")
    left = {row["name"]: row["left_out"] for row in found["rows"] if "left_out" in row}
    assert list(left) == ["dali", "torch, 0 workers", "torch, 1 worker"] and all("image-size" in why for why in left.values())
    assert found["recommended"]["says"].startswith("use resident, as auto does")


def test_a_network_that_torch_computes_beyond_its_memory_is_refused(monkeypatch, tmp_path):
    write_folder(tmp_path, size=(64, 64))
    with pytest.raises(UserError, match="^channels_last = True: on a CPU torch's gradient"):
        measured(monkeypatch, "--data.source", f"folder:{tmp_path}", "--model.width", "8", "--batch-size", "4")


def test_a_set_that_does_not_fit_is_not_resident(monkeypatch):
    monkeypatch.setattr(feeds, "choose", lambda *args: ("torch", "9 GiB of images do not fit into the GPU's 8 GiB"))
    found, _ = measured(monkeypatch)
    resident = found["rows"][1]
    assert resident["name"] == "resident" and "do not fit" in resident["left_out"]
    assert found["recommended"]["auto"] == "torch"


def test_fewer_rounds_where_a_step_is_slow(clock):
    config = configured()
    run = bench_data._Run(config, bench_data.load_images(config), CPU, ("aug",), None, print)
    assert (
        run._fitting(1.0, 60.0) == (5, 5.0) and run._fitting(15.0, 60.0) == (4, 60.0) and run._fitting(100.0, 60.0) == (3, 300.0)
    )
    clock.spend(20.0)
    assert run._fitting(10.0, 60.0) == (4, 40.0)
    run.wanted_rounds = 9
    assert run._fitting(100.0, 60.0) == (9, 900.0)


# -- the command ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """The program's exit status, with short turns."""
    monkeypatch.setattr(pipes, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(pipes, "MOST", 2)
    return lambda *flags: cli.main(["bench-data", *flags])


SHORT = "--data synthetic --limit 60 --model.width 4 --attack.steps 1 --batch-size 8 --workers 0 --device cpu --rounds 1".split()


def test_the_command_prints_a_table_and_writes_json(command, capsys, tmp_path):
    out = tmp_path / "new" / "found.json"
    assert command(*SHORT, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "synthetic, batches of 8 at 32x32, crop_flip, 1 view" in printed and "(CPU figures); medians of 1 round," in printed
    assert "use resident, as auto does" in printed and f"figures: {out}" in printed
    # A pipe's table is never folded.
    (row,) = [line for line in printed.splitlines() if "torch, 0 workers" in line and "│" in line]
    assert row.count("(") == 3
    found = schema.load(out)
    documented = json.loads((schema.FOLDER / "bench-data.json").read_text())
    row, part = documented["$defs"]["row"]["properties"], documented["$defs"]["rates"]["properties"]
    assert set(found) == set(documented["properties"])
    assert set(found["settings"]) == set(documented["properties"]["settings"]["properties"])
    assert set().union(*found["rows"]) == set(row) - ({"left_out"} if DALI else set())
    assert set(found["rows"][0]["feeding"]) == set(part) | set(row["feeding"]["properties"])
    assert found["recipe"] == "pgd_at" and [row["name"] for row in found["rows"]][-1] == "torch, 0 workers"


def test_json_is_all_that_a_program_sees(command, capsys):
    assert command(*SHORT, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["kind"] == "bench-data" and "training images" in printed.err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "bench-data needs --data SOURCE"),
        (["--data", "nowhere"], "data source 'nowhere' is unknown"),
        (["--data", "synthetic", "--views", "3"], "--views = 3: must be 1 or 2"),
        (["--data", "synthetic", "--rounds", "0"], "--rounds = 0: must be a whole number >= 1"),
        (["--data", "synthetic", "--batch-size", "many"], "batch_size = many: must be a whole number"),
        (["--data", "synthetic", "--batch-size", "5000", "--device", "cpu"], "batch_size = 5000: must be at most 1960"),
        (["--data", "synthetic", "--augment", "crops"], "data.augment = crops: must be one of"),
        (["--data", "synthetic", "--modl.width", "3"], "unknown setting modl.width = 3; did you mean 'model.width'?"),
        (["--data", "synthetic", "--data.backend", "dali"], "data.backend = dali: leave it out, all backends are measured"),
        (["--data", "synthetic", "--recipe", "pgdat"], "recipe 'pgdat' is not known"),
        (["--data", "synthetic", "--out", "/"], "--out = /: is a folder, and must be a file"),
    ],
)
def test_bad_input_is_one_sentence(command, flags, sentence, capsys):
    assert command(*flags) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1


def test_a_narrow_terminal_has_ranges_below_their_medians():
    part = {"ms": 12.5, "ms_range": [12.0, 1300.0], "images_per_s": 123456.0, "images_per_s_range": [9.5, 200000.0], "rounds": 3}
    rows = [
        {"name": bench_data.CEILING, "backend": "none", "alone": part, "feeding": part},
        {"name": "dali, mixed", "backend": "dali", "alone": part, "host_mb": 1234.0, "device_mb": 55.4,
         "feeding": {**part, "cost_percent": 1.25, "cost_percent_range": [-0.5, 100.0]}},
        {"name": "torch, 16 workers", "backend": "torch", "left_out": "pip install [x] says why"},
    ]  # fmt: skip
    settings = {"source": "folder:a b", "batch_size": 512, "image_size": [20, 30], "augment": "simclr", "views": ["aug", "aug2"]}
    found = {"rows": rows, "settings": settings, "environment": {"device": "Some GPU"}, "recommended": {"says": "use dali"}}
    for width in (80, 120):
        text = io.StringIO()
        cli_bench.show(found, Console(file=text, width=width))
        shown = text.getvalue()
        assert max(map(len, shown.splitlines()[:-3])) <= width and "…" not in shown
        for words in ("123,456", "(9.5 to 200,000)", "(12 to 1,300)", "+1.2", "(-0.5 to +100.0)", "1,234 host", "55 GPU"):
            assert words in shown
        assert "folder:a b, batches of 512 at 30x20, simclr, 2 views" in shown and "CPU" not in shown
        assert "left out: torch, 16 workers: pip install [x] says why" in shown and shown.endswith("use dali\n")
