"""`fastanchor compare`: the plan, its runs, the table, and going on after an interruption."""

import json

import pytest
import yaml

from fastanchor.cli import main
from fastanchor.compare import load_plan, plan_names
from fastanchor.errors import UserError
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


def test_two_runs_and_two_seeds_in_one_table(plan, tmp_path, capsys):
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
    assert "holds a run of other settings; choose another --out" in capsys.readouterr().err


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
        ({"data": {"limit": 60}}, [], "undefended twin: its data or eval.limit differ from ANCHOR's"),
    ],
)
def test_runs_that_would_not_be_judged_alike_are_refused(plan, tmp_path, capsys, change, overrides, says):
    values = yaml.safe_load(plan.read_text())
    values["runs"][1]["set"] = change
    plan.write_text(yaml.safe_dump(values))
    assert main(["compare", str(plan), "--out", str(tmp_path / "out"), *overrides]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_every_run_is_attacked_at_the_first_run_s_eps(plan, tmp_path):
    values = yaml.safe_load(plan.read_text())
    values |= {"attacks": ["pgd1"], "seeds": [0]}
    values["runs"][1]["set"] = {"attack": {"eps": 0.001}}
    plan.write_text(yaml.safe_dump(values))
    assert main(["compare", str(plan), "--out", str(tmp_path / "out")]) == 0
    for run in ("anchor-seed0", "undefended-twin-seed0"):
        (result,) = [json.loads(path.read_text()) for path in (tmp_path / "out" / run / "eval").glob("*.json")]
        assert result["attack"]["eps"] == 0.02


def test_packaged_plans_are_whole():
    assert plan_names() == ["demo"]
    plan = load_plan("demo")
    assert list(plan.runs) == ["ANCHOR", "PGD-AT (lambda 0)", "undefended"]
    ours, lambda_zero, undefended = plan.runs.values()
    assert ours.loss.hsc > 0 and lambda_zero.loss.hsc == 0 and undefended.method == "standard"
    assert len({(c.data, c.attack, c.optim, c.epochs, c.batch_size, c.seed) for c in plan.runs.values()}) == 1
    with pytest.raises(UserError, match="plan 'dmo' is not known; did you mean 'demo'"):
        load_plan("dmo")
