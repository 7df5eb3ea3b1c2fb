"""`fastanchor compare`: the plan, its runs, the table and what goes with it, failures, going on after an interruption."""

import dataclasses
import json
import re
import sys

import pytest
import torch
import yaml

from fastanchor import compare, pipeline
from fastanchor.cli import main
from fastanchor.compare import load_plan, plan_names
from fastanchor.errors import UserError
from fastanchor.settings import load_recipe
from fastanchor.train.run import RunDir

PLAN = """
title: small
attacks: [pgd2, "fgsm:eps=0.1"]
seeds: [0, 1]
set:
  data: {source: synthetic, limit: 120, val_fraction: 0.2}
  model: {width: 2, head_hidden: 8, head_dim: 4}
  attack: {eps: 0.02, step_size: 0.01, steps: 1}
  optim: {lr: 0.05}
  epochs: 1
  batch_size: 32
  stage2: {mode: none}
  val: {attack: pgd1}
runs:
  - {name: ANCHOR, recipe: anchor, set: {loss: {hsc: 0.3}}}
  - {name: undefended twin, recipe: standard}
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


@pytest.fixture
def no_reports(monkeypatch):
    """The runs' own reports take longer than their training; they have tests of their own."""
    monkeypatch.setattr(pipeline, "build_report", lambda trained, run, images, *, out, **options: out)


def test_two_runs_and_two_seeds_in_one_table(plan, tmp_path, capsys, no_reports):
    out = tmp_path / "out"
    assert main(["compare", str(plan), "--out", str(out), "--optim.momentum", "0.8"]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in stored["rows"]] == ["ANCHOR", "undefended twin"]
    for row in stored["rows"]:
        assert row["count"] == 120 and len(row["runs"]) == 2 and list(row["robust"]) == [
            "PGD-2 (eps 0.02, step 0.005, uniform start, 1 restart)", "FGSM (eps 0.1, step 0.1, no random start, 1 restart)"]  # fmt: skip
        values = [json.loads((RunDir(run).path / "eval").glob("pgd2-*.json").__next__().read_text()) for run in row["runs"]]
        pgd = row["robust"]["PGD-2 (eps 0.02, step 0.005, uniform start, 1 restart)"]
        assert pgd["values"] == [value["robust_accuracy"] for value in values]
        assert pgd["mean"] == pytest.approx(sum(pgd["values"]) / 2)
        assert f"{pgd['mean']:.2f} ± {pgd['std']:.2f}" in printed
    for row in stored["rows"]:
        for run in row["runs"]:
            log = (RunDir(run).path / "train.log").read_text()
            assert f"-> {run}\n" in log and log.count("stage 1  epoch 1/1") == 1
    configs = [RunDir(run).open() for row in stored["rows"] for run in row["runs"]]
    assert [config.seed for config in configs] == [0, 1, 0, 1]
    assert {config.optim.momentum for config in configs} == {0.8}
    assert [config.loss.hsc for config in configs[:2]] == [0.3, 0.3]

    again = json.loads((out / "compare.json").read_text())
    assert main(["compare", str(plan), "--out", str(out), "--optim.momentum", "0.8"]) == 0
    assert capsys.readouterr().out.count("finished already") == 4
    assert json.loads((out / "compare.json").read_text()) == again
    assert main(["compare", str(plan), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "holds a run of other settings, optim.momentum = 0.8 and not 0.9; delete that folder to train it anew" in said

    # Other attacks, and only they, are judged anew: nothing is trained for them.
    values = yaml.safe_load(plan.read_text())
    plan.write_text(yaml.safe_dump(values | {"attacks": ["pgd3"]}))
    assert main(["compare", str(plan), "--out", str(out), "--optim.momentum", "0.8"]) == 0
    assert capsys.readouterr().out.count("finished already") == 4
    other = json.loads((out / "compare.json").read_text())
    assert [row["clean"] for row in other["rows"]] == [row["clean"] for row in again["rows"]]
    assert [list(row["robust"]) for row in other["rows"]] == [["PGD-3 (eps 0.02, step 0.005, uniform start, 1 restart)"]] * 2


@pytest.mark.parametrize(
    "text, says",
    [
        ("runs: []", "lacks 'runs'"),
        ("runs: [{name: a, recipe: anchr}]", "recipe 'anchr' is not known; did you mean 'anchor'?"),
        ("runs: [{name: a, recipe: anchor, sett: {}}]", "unknown key 'sett'; did you mean 'set'?"),
        ("runs: [{name: a}]", "lacks 'recipe'"),
        ("runs: [{name: a, recipe: anchor}, {name: a, recipe: standard}]", "two runs are named 'a'"),
        ("runs: [{name: a b, recipe: anchor}, {name: a-b, recipe: standard}]", "two runs are named 'a-b', or nearly so"),
        ("runs: [{name: a, recipe: anchor, set: {epoch: 3}}]", "a: unknown setting epoch = 3; did you mean 'epochs'?"),
        ("runs: {", "not valid YAML"),
        ("- 1", "must be a mapping with the keys title, attacks, seeds, set, runs"),
        ("{runs: [{name: a, recipe: anchor}], attacks: [pgdx]}", "attack 'pgdx'"),
        ("{runs: [{name: a, recipe: anchor}], seeds: [x]}", "seeds = ['x']: must be a list of whole numbers >= 0"),
        ("{runs: [{name: a, recipe: anchor}], attacks: []}", "attacks = []: must be a list of attacks"),
        (
            "{runs: [{name: a, recipe: anchor, set: {seed: 3}}]}",
            "a: seed = 3: the plan states it for all runs; change 'seeds' there",
        ),
        ("{runs: [{name: 7, recipe: anchor}]}", "name = 7: must be a text"),
        ("{runs: [{name: a, recipe: anchor}], title: [1]}", "title = [1]: must be a text"),
        ("{runs: [{name: a, recipe: anchor}], seeds: [0, 0]}", "seeds = [0, 0]: one of them stands there twice"),
    ],
)
def test_a_bad_plan_is_told_before_anything_runs(plan, text, says):
    plan.write_text(text)
    with pytest.raises(UserError) as caught:
        load_plan(str(plan))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, overrides, says",
    [
        ({}, ["--seed", "5"], "--seed: the plan states it for all runs; change 'seeds' there"),
        ({}, ["--eval.attacks", "fgsm"], "--eval.attacks: the plan states it for all runs; change 'attacks' there"),
        ({"data": {"limit": 60}}, [], "undefended twin: data.limit = 60, ANCHOR's is 120; the runs of a plan share their images"),
        ({"data": {"split_seed": 1}}, [], "undefended twin: data.split_seed = 1, ANCHOR's is 0"),
        ({"eval": {"limit": 60}}, [], "undefended twin: eval.limit = 60, ANCHOR's is None"),
        ({"val": {"attack": "pgdx"}}, [], "attack 'pgdx'"),
    ],
)
def test_runs_that_would_not_be_judged_alike_are_refused(plan, tmp_path, capsys, change, overrides, says):
    values = yaml.safe_load(plan.read_text())
    values["runs"][1]["set"] = change
    plan.write_text(yaml.safe_dump(values))
    assert main(["compare", str(plan), "--out", str(tmp_path / "out"), *overrides]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_every_run_is_attacked_at_the_first_run_s_eps(plan, tmp_path, no_reports):
    values = yaml.safe_load(plan.read_text())
    values |= {"attacks": ["pgd1"], "seeds": [0]}
    values["runs"][1]["set"] = {"attack": {"eps": 0.001}}
    plan.write_text(yaml.safe_dump(values))
    assert main(["compare", str(plan), "--out", str(tmp_path / "out")]) == 0
    for run in ("anchor-seed0", "undefended-twin-seed0"):
        (result,) = [json.loads(path.read_text()) for path in (tmp_path / "out" / run / "eval").glob("*.json")]
        assert result["attack"]["eps"] == 0.02


@pytest.fixture
def unrun(monkeypatch):
    """Runs that end at once with made-up figures; those named in `fails` raise, with what stands there."""
    fails = {}

    def train_and_judge(config, run, *, resume, reporter):
        if not resume:
            run.check_free()
            run.create(config, torch.device("cpu"))
        for epoch in (1, 2, 3) if not resume else ():
            run.log({"stage": 1, "epoch": epoch, "seconds": float(epoch), "val_seconds": 0.5, "peak_memory_mb": 700.0 + epoch})
        if not resume:
            run.log({"stage": 2, "epoch": 1, "seconds": 10.0})
        if error := fails.get(run.path.name):
            raise error
        shift = config.seed + (10 if config.method == "standard" else 0)
        return [
            {"clean_accuracy": 80.0 + shift, "robust_accuracy": robust - shift, "description": name, "count": 120, "seconds": 4.0}
            for name, robust in (("PGD-2 (eps 0.02, x)", 50.0), ("FGSM (eps 0.1, y)", 60.0))
        ]

    monkeypatch.setattr(compare, "train_and_judge", train_and_judge)
    monkeypatch.setattr(compare.parse_attack("fgsm", default_eps=1).__class__, "describe", lambda spec: DESCRIBED[spec.name])
    return fails


DESCRIBED = {"pgd2": "PGD-2 (eps 0.02, x)", "fgsm": "FGSM (eps 0.1, y)"}


def run(plan, tmp_path, *flags):
    status = main(["compare", str(plan), "--out", str(tmp_path / "out"), *flags])
    return status, json.loads((tmp_path / "out" / "compare.json").read_text())


def test_figures_of_the_table_are_those_of_the_runs(plan, tmp_path, unrun, capsys):
    status, stored = run(plan, tmp_path)
    ours, undefended = stored["rows"]
    assert status == 0
    assert (stored["runs"], stored["finished"], stored["seeds"]) == (4, 4, [0, 1])
    assert stored["attacks"] == ["PGD-2 (eps 0.02, x)", "FGSM (eps 0.1, y)"]
    assert (ours["title"], ours["method"], ours["seeds"], ours["failed"], ours["epochs"]) == ("ANCHOR", "anchor", [0, 1], [], 1)
    assert ours["clean"] == {"mean": 80.5, "std": pytest.approx(0.5**0.5), "values": [80.0, 81.0]}
    assert undefended["robust"]["FGSM (eps 0.1, y)"]["values"] == [50.0, 49.0]
    # The median epoch of stage 1; all epochs of both stages; the highest peak.
    assert ours["seconds_an_epoch"]["values"] == [2.0, 2.0]
    assert ours["training_seconds"]["values"] == [16.0, 16.0]
    assert ours["peak_memory_mb"]["values"] == [703.0, 703.0]
    said = capsys.readouterr().out
    assert "== run 1 of 4: ANCHOR, seed 0 -> " in said
    # 16 s of training, 1.5 s of validation and twice 4 s of evaluation a run.
    assert "== run 2 of 4 (about 76.5 s left): undefended twin" in said
    assert "== run 4 of 4 (about 25.5 s left): undefended twin" in said
    assert "Trained without an adversary: undefended twin." in said


def test_what_is_written_beside_the_json(plan, tmp_path, unrun):
    run(plan, tmp_path)
    out = tmp_path / "out"
    lines = (out / "compare.md").read_text().splitlines()
    assert lines[0] == "**small**"
    assert (
        lines[2] == "| run | method | clean % | PGD-2 % (eps 0.02, x) | FGSM % (eps 0.1, y) | s/epoch | training | peak memory |"
    )
    assert lines[4] == "| ANCHOR | ANCHOR | 80.50 ± 0.71 | 49.50 ± 0.71 | 59.50 ± 0.71 | 2.00 ± 0.00 | 16.0 s | 703 MB |"
    assert "* Trained without an adversary: undefended twin." in lines
    page = (out / "compare.html").read_text()
    assert page.count("<svg") == 2 and "80.50 ± 0.71" in page and "Trained without an adversary: undefended twin." in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    for name in ("robust-against-clean", "accuracy-against-time"):
        assert (out / f"compare-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_stands(plan, tmp_path, unrun, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, stored = run(plan, tmp_path)
    assert status == 0 and stored["finished"] == 4
    assert 'no page: figures need matplotlib: pip install "fastanchor[plots]"' in capsys.readouterr().out
    assert not (tmp_path / "out" / "compare.html").exists()


def test_a_run_that_fails_is_in_the_table_and_the_others_go_on(plan, tmp_path, unrun, capsys):
    unrun |= {
        "anchor-seed0": UserError("the loss is nan\n at step 12"), "undefended-twin-seed0": ValueError("a <bug>"),
        "undefended-twin-seed1": torch.OutOfMemoryError("no memory"),
    }  # fmt: skip
    status, stored = run(plan, tmp_path)
    said = capsys.readouterr()
    assert status == 1 and said.err == ""
    ours, undefended = stored["rows"]
    assert (ours["seeds"], ours["clean"]["values"], ours["clean"]["std"], len(ours["runs"])) == ([1], [81.0], None, 1)
    assert ours["failed"] == [{"seed": 0, "run": str(tmp_path / "out" / "anchor-seed0"), "error": "the loss is nan at step 12"}]
    assert (undefended["seeds"], undefended["clean"], undefended["robust"], undefended["count"]) == ([], None, {}, None)
    assert [lost["error"] for lost in undefended["failed"]] == ["ValueError: a <bug>", "OutOfMemoryError: no memory"]
    assert "Traceback" in said.out  # of a fault of the program, not of a divergence
    assert "Failed: ANCHOR, seed 0: the loss is nan at step 12" in said.out and "ANCHOR (1 of 2 seeds)" in said.out
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Failed: undefended twin, seed 0: ValueError: a &lt;bug&gt;" in page and ">failed</td>" in page
    assert "| undefended twin | undefended | failed |  |  |  |  |  |" in (tmp_path / "out" / "compare.md").read_text()
    # The same command tries again what has failed.
    unrun.clear()
    status, stored = run(plan, tmp_path)
    assert status == 0 and [row["failed"] for row in stored["rows"]] == [[], []] and stored["finished"] == 4


def test_a_plan_whose_first_run_cannot_begin_is_bad_input(plan, tmp_path, capsys):
    assert main(["compare", str(plan), "--out", str(tmp_path / "out"), "--data", "npz:nowhere.npz"]) == 2
    assert "nowhere.npz" in capsys.readouterr().err
    assert not (tmp_path / "out" / "compare.json").exists()


def test_ctrl_c_says_how_to_go_on_and_keeps_the_table_so_far(plan, tmp_path, unrun, capsys):
    unrun["undefended-twin-seed0"] = KeyboardInterrupt()
    assert main(["compare", str(plan), "--out", str(tmp_path / "out"), "--epochs", "2"]) == 130
    said = capsys.readouterr().err
    assert f"the same command goes on where it stopped: fastanchor compare {plan} --out {tmp_path / 'out'} --epochs 2" in said
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["name"] for row in stored["rows"]] == ["ANCHOR"] and stored["finished"] == 1
    assert "* Not complete: 1 of 4 runs are done." in (tmp_path / "out" / "compare.md").read_text()


def test_what_runs_do_not_have_in_common_is_said(plan):
    values = yaml.safe_load(plan.read_text())
    values["runs"] += [
        {"name": "b", "recipe": "anchor", "set": {"epochs": 3, "data": {"augment": "simclr"}, "attack": {"eps": "8/255"}}},
        {"name": "c", "recipe": "anchor", "set": {"attack": {"steps": 3}}},
    ]
    plan.write_text(yaml.safe_dump(values))
    said = list(compare._differences(load_plan(str(plan)).runs))
    assert said == [
        "data.augment differs: crop_flip, but simclr in b.",
        "epochs differs: 1, but 3 in b.",
        "attack.eps differs: 0.02, but 0.03137 in b.",
        "attack.steps differs: 1, but 3 in c.",
        "Trained without an adversary: undefended twin.",
    ]


def test_labels_of_the_figures_keep_apart():
    plots = pytest.importorskip("fastanchor.evaluate.compare_plots")
    size, frame = (20.0, 5.0), (0.0, 0.0, 380.0, 280.0)
    crowd = [[(100 + 9.0 * i, 100.0 + 3 * (i % 3))] for i in range(6)]
    places = plots._arranged(crowd, [[] for _ in crowd], [size] * len(crowd), frame, 1.0)
    boxes = [box for _, box, _ in places] + [plots._around(*found, plots.LARGE / 2) for found in crowd]
    assert not any(plots._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if (i < 6 or b in boxes[:6]))
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 380 and box[3] <= 280 for _, box, _ in places)
    # Alone, a label is beside its point.
    ((distance, _, at),) = plots._arranged([[(50.0, 50.0)]], [[]], [size], frame, 1.0)
    assert distance == 7 and at == (50.0, 50.0)


def test_figures_follow_the_theme_and_have_a_marker_a_seed_and_a_mean():
    plots = pytest.importorskip("fastanchor.evaluate.compare_plots")
    entries = [plots.Entry("one", [80, 81, 82], [50, 51, 52], [100, 110, 120]), plots.Entry("two <b>", [70], [40], [7000])]
    first = plots.robust_against_clean(entries, "PGD-20")
    second = plots.accuracy_against_time(entries, "PGD-20")
    # By the theme's colours: three seeds and their mean; one seed is its own mean.
    uses = [element for element in re.findall(r"<use [^>]*>", first.svg) if "--class0" in element]
    assert len(uses) == 4 and "two &lt;b&gt;" in first.svg
    assert "training time in all (min)" in second.svg and "robust accuracy (%), PGD-20" in first.svg
    assert first.png[:4] == b"\x89PNG"
    assert [plots.time_unit(seconds)[1] for seconds in (179, 180, 3 * 3600)] == ["s", "min", "h"]


def test_which_attack_the_figures_show():
    from fastanchor.evaluate.compare_page import plotted_attack

    auto, pgd, fgsm = "AutoAttack standard (eps 8/255, linf)", "PGD-20 (eps 8/255, a)", "FGSM (eps 8/255, b)"
    assert plotted_attack([fgsm, pgd, auto]) == auto
    assert plotted_attack([fgsm, pgd, "PGD-20 (eps 0.1, c)", "CW-10 (eps 0.1)"]) == pgd
    assert plotted_attack([fgsm]) == fgsm


def test_packaged_plans_are_whole():
    assert plan_names() == ["cifar10_methods", "demo", "digits_methods"]
    plan = load_plan("demo")
    assert list(plan.runs) == ["ANCHOR", "PGD-AT (lambda 0)", "undefended"]
    ours, lambda_zero, undefended = plan.runs.values()
    assert ours.loss.hsc > 0 and lambda_zero.method == "pgd_at" and undefended.method == "standard"
    assert ours.loss.beta_warmup_epochs == 2
    common = {(c.data, c.attack, c.optim, c.epochs, c.batch_size, c.seed) for c in plan.runs.values()}
    assert len(common) == 1
    with pytest.raises(UserError, match="plan 'dmo' is not known; did you mean 'demo'"):
        load_plan("dmo")


@pytest.mark.parametrize(
    "name, runs, seeds",
    [
        ("digits_methods", ["PGD-AT", "TRADES", "ANCHOR", "ASCL", "C-LEAD joint"], (0, 1)),
        ("cifar10_methods", ["PGD-AT", "TRADES", "ANCHOR", "ASCL", "C-LEAD joint", "NuAT"], (0,)),
    ],
)
def test_packaged_plans_of_methods_are_fair(name, runs, seeds):
    plan = load_plan(name)
    assert (list(plan.runs), plan.seeds, plan.attacks) == (runs, seeds, ("fgsm", "pgd20"))
    configs = list(plan.runs.values())
    assert len({config.method for config in configs}) == len(configs)
    # The schedule knows no milestones: they are what the recipes leave there.
    optims = {dataclasses.replace(config.optim, milestones=()) for config in configs}
    assert len(optims) == 1 and next(iter(optims)).schedule == "cyclic"
    assert len({(c.data, c.epochs, c.batch_size, c.precision, c.attack.eps, c.stage2.mode) for c in configs}) == 1
    compare._judged_alike(plan.runs, plan.attacks)
    for config in configs:
        compare.check_config(config)
    if name == "cifar10_methods":
        assert {(c.epochs, c.precision, c.model.name, c.model.width) for c in configs} == {(30, "bf16", "resnet18", None)}
        assert {c.attack.eps for c in configs} == {8 / 255}
        # What a method prescribes is its recipe's.
        assert {c.method: c.attack.steps for c in configs}["nuat"] == load_recipe("nuat").attack.steps
