"""Rows of the peers: ratios, fewer rounds, failures, what is left out; attacks of the package index beside ours."""

import dataclasses

import fake_clones
import pytest
import torch
from fake_clones import CPU, OURS, rows, write

from bench import cases, naive
from bench.peers import REPOSITORIES, attacks, measure
from bench.peers.adapter import Case, Variant, Work
from bench.peers.clones import Clone
from fastanchor.attacks import PGD
from fastanchor.models import mac_count

clone_of = pytest.fixture(fake_clones.clone_of)
run = pytest.fixture(fake_clones.run)


# -- rows --------------------------------------------------------------------------------------------------------------------


def counting(seconds: float, batches: int = 1):
    """A maker of work whose own clock counts `seconds` a call."""
    state = {"clock": 0.0, "calls": 0}

    def call():
        state["clock"] += seconds
        state["calls"] += 1

    return (lambda: Work(call, batches, clock=lambda: state["clock"])), state


def test_ratio_is_the_peers_time_over_ours_for_one_batch(run):
    peer, peer_state = counting(6.0, batches=2)
    ours, _ = counting(0.5)
    run.fill, run.ceiling = 14.0, 1e12
    measure.compare(
        run,
        "peer",
        {"peer": peer, "ours": ours},
        {"peer": {"peer": "peer"}, "ours": {"peer": "peer"}},
        flops=3e9,
        extrapolate=True,
    )
    first, second = run.results.rows("peers")
    assert (first["ms"], first["ratio"], first["batches"], first["clock"]) == (3000.0, 1.0, 2, "its own")
    assert (second["ms"], second["ratio"], second["ratio_range"], second["rounds"]) == (500.0, 6.0, [6.0, 6.0], 2)
    assert second["images_per_s"] == 4.0
    assert second["extrapolated_s_per_epoch"] == pytest.approx(0.5 * 50_000 / 2)
    assert (second["model_tflops"], second["share_of_bf16_matmul"]) == pytest.approx((0.012, 0.012))
    # One call when it is made, one to see how often a turn repeats (14 s of 6 s calls: twice), then two rounds.
    assert peer_state["calls"] == 1 + 1 + 2 * 2


def test_once_the_time_is_over_rounds_are_fewer_but_not_one(run, monkeypatch):
    run.rounds, run.deadline = 5, 0.0
    measure.compare(run, "peer", {"peer": counting(1.0)[0]}, {"peer": {"peer": "peer"}})
    assert run.results.rows("peers")[0]["rounds"] == measure.LEAST_ROUNDS


def test_a_failure_is_a_row_and_the_others_go_on(run):
    def failing(at):
        calls = []

        def call():
            calls.append(1)
            if len(calls) >= at:
                raise RuntimeError("gone wrong")

        return lambda: Work(call)

    names = ("peer", "at once", "later", "fine")
    makers = dict(zip(names, (counting(1.0)[0], failing(1), failing(3), counting(0.5)[0]), strict=True))
    measure.compare(run, "peer", makers, {name: {"peer": "peer"} for name in names})
    found = {row["name"]: row for row in run.results.rows("peers")}
    assert set(found) == set(names)
    for name in ("at once", "later"):
        assert found[name]["error"].strip().endswith("RuntimeError: gone wrong")
    assert found["fine"]["ratio"] == 2.0
    # Without the peer there is nothing to compare with.
    before = len(run.results.rows("peers"))
    for at in (1, 3):
        measure.compare(run, "peer", {"peer": failing(at), "ours": counting(1.0)[0]}, {"peer": {}, "ours": {}})
    later = run.results.rows("peers")[before:]
    assert [row["name"] for row in later] == ["peer", "peer"]
    assert all("gone wrong" in row["error"] for row in later)


def test_a_module_that_is_missing_leaves_out_and_a_broken_import_fails(run, tmp_path):
    folder = write(
        tmp_path / "clone",
        {"absent.py": "import ffcv_that_nobody_has\n", "broken.py": "raise ImportError('no such thing here')\n"},
    )
    made = [Variant(name, lambda session, case, name=name: session.module(name), {}) for name in ("absent", "broken")]
    needing = Variant("needing", made[0].make, {}, needs=("json", "nobody_has_this"))
    on_gpu = Variant("on a GPU", made[0].make, {}, needs_cuda=True)
    measure.measure_clone(run, Clone("TRADES", folder, None), (*made, needing, on_gpu))
    found = rows(run)
    assert found["TRADES: absent"]["left_out"] == "ffcv_that_nobody_has is not installed"
    assert "ImportError: no such thing here" in found["TRADES: broken"]["error"]
    assert found["TRADES: needing"]["left_out"] == "nobody_has_this is not installed"
    assert found["TRADES: on a GPU"]["left_out"] == "needs a CUDA device"
    run.deadline = 0.0
    measure.measure_clone(run, Clone("TRADES", folder, None), (made[0],))
    assert run.results.rows("peers")[-1]["left_out"] == "no time was left"


def test_with_a_gpu_that_is_not_asked_for_clones_are_left_out(run, clone_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    measure.measure_clone(run, Clone("TRADES", clone_of("TRADES"), None))
    assert "--device cpu" in run.results.rows("peers")[-1]["left_out"]


# -- attacks -----------------------------------------------------------------------------------------------------------------


def test_torchattacks_computes_what_ours_and_the_naive_loop_do():
    pytest.importorskip("torchattacks")
    model = cases.make_model(8, CPU)
    images_u8, labels = cases.make_batch(8, 16, CPU)
    images = images_u8.permute(0, 3, 1, 2).float().div(255).contiguous()
    torch.manual_seed(3)
    theirs = attacks.PEERS["torchattacks"].make(model, 4)(images, labels)
    torch.manual_seed(3)
    noise = torch.empty_like(images).uniform_(-cases.EPS, cases.EPS)
    numbers = {"eps": cases.EPS, "step_size": cases.STEP_SIZE, "steps": 4}
    for ours in (PGD(**numbers, start=noise)(model, images, labels), naive.attack(model, images, labels, noise, **numbers)):
        # Where a gradient is 0 to rounding its sign is anybody's.
        assert ((ours - theirs).abs() > 1e-5).float().mean() < 2e-3
        assert (ours - images).abs().max() <= cases.EPS + 1e-6
    assert not model.training


def test_our_evaluation_of_one_stage_is_the_peers_verdict():
    pytest.importorskip("pyautoattack")
    model = cases.make_model(4, CPU)
    case = Case(CPU, 12, 1, 1, pixels=16)
    (images, _), *_ = case.prepared()
    data = dataclasses.replace(case).data
    data.labels = attacks.judged_right(model, images)
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    theirs = attacks.PEERS["pyautoattack"].make(model, 2)(images, data.labels)
    hook.remove()
    assert len(forwards) < 20, "two iterations, not the standard's hundred"
    assert 0 < (theirs - images).abs().max() <= cases.EPS + 1e-6
    _, details = attacks.our_evaluation(model, data, 2)()
    assert details["stages"]["clean"] == 100.0
    assert set(details["stages"]) == {"clean", "apgd-ce"}
    expected = 100 * (model(theirs).argmax(1) == data.labels).float().mean().item()
    assert details["stages"]["apgd-ce"] == pytest.approx(expected)
    assert 0 < expected < 100


def test_a_turn_of_several_calls_by_the_peers_own_clock_is_shared_among_them(run):
    spent = []
    run.fill = 0.3
    work = Work(lambda: spent.append(0.1), batches=2, clock=lambda: sum(spent))
    assert measure.take_turns({"theirs": work}, run)["theirs"] == pytest.approx([0.05] * run.rounds)
    assert len(spent) == 1 + 3 * run.rounds


def test_the_share_of_the_ceiling_is_that_of_a_forward_and_an_input_gradient_a_step(run, monkeypatch):
    monkeypatch.setitem(attacks.PEERS, "torchattacks", attacks.PEERS["torchattacks"]._replace(
        needs="json", make=lambda model, steps: lambda images, labels: model(images)))  # fmt: skip
    run.ceiling = 1e12
    measure.measure_attack(run, "torchattacks")
    flops = 4 * run.steps * mac_count(cases.make_model(run.width, CPU), 32)
    for row in run.results.rows("peers"):
        assert row["share_of_bf16_matmul"] == pytest.approx(flops * row["images_per_s"] / run.ceiling)


def test_attacks_take_turns_or_say_what_is_missing(run, monkeypatch):
    fake = attacks.PEERS["torchattacks"]._replace(needs="json", make=lambda model, steps: lambda images, labels: model(images))
    monkeypatch.setitem(attacks.PEERS, "torchattacks", fake)
    monkeypatch.setitem(attacks.PEERS, "pyautoattack", fake._replace(needs="nobody_has_this"))
    measure.measure_all(run, {}, None)
    found = run.results.rows("peers")
    group = [row["name"] for row in found if row["peer"] == "torchattacks"]
    assert group[0] == "torchattacks"
    assert set(group[1:]) == OURS
    left_out = {row["name"]: row["left_out"] for row in found if "left_out" in row}
    assert left_out["pyautoattack"] == "nobody_has_this is not installed"
    assert set(left_out) == {"pyautoattack", *REPOSITORIES}
    assert left_out["TRADES"] == "no clone was given: --peer-path DIR, of https://github.com/yaodongyu/TRADES"
