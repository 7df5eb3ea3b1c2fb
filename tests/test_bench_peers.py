"""Adapters of public repositories: what they run and say, what of ours stands beside it, real clones if given.

The clones are stand-ins (fake_clones). FASTANCHOR_PEERS=DIR, a folder with clones of the real ones, runs their adapters too and
holds what they do beside what the adapter states.
"""

import importlib
import logging
import os
import re
import sys
from pathlib import Path

import fake_clones
import pytest
import torch
from fake_clones import CPU, ENGINE, OURS, rows, variants_of
from torch import nn

from bench import method_cases
from bench.peers import LOSSES, NAMES, REPOSITORIES, attacks, losses, measure
from bench.peers.adapter import Batches, Case, Work
from bench.peers.clones import Clone, Session, recognise
from fastanchor.attacks import PGD
from fastanchor.data.pseudo import read_pseudo_labels
from fastanchor.methods import METHODS
from fastanchor.settings import get

clone_of = pytest.fixture(fake_clones.clone_of)
run = pytest.fixture(fake_clones.run)


@pytest.fixture
def measured(run, clone_of, monkeypatch):
    """Measure a stand-in with its adapter and hold what every row must say: (its rows, configurations and BatchNorm modes of ours)."""

    def measure_all(name):
        configs, modes, costs = [], [], []
        make_step, variants, folder = method_cases.make_step, variants_of(name), clone_of(name)

        def spy(config, *rest):
            call, cost = make_step(config, *rest)
            configs.append(config)
            costs.append(cost.total)
            return call, cost

        monkeypatch.setattr(method_cases, "make_step", spy)
        monkeypatch.setattr(measure, "PGD", lambda *args, bn, **kwargs: modes.append(bn) or PGD(*args, bn=bn, **kwargs))
        listing = sorted(folder.rglob("*"))
        measure.measure_clone(run, Clone(name, folder, None), variants)
        assert sorted(folder.rglob("*")) == listing, "nothing is written into a clone"
        all_rows = run.results.rows("peers")
        assert [row["error"] for row in all_rows if "error" in row] == []
        assert "not known" in all_rows[0]["warning"]
        spent = iter(costs)
        for variant in variants:
            own, *ours = [row for row in all_rows if row.get("peer") == f"{name}: {variant.name}"]
            assert own["ms"] > 0
            assert own["what"] == variant.what
            assert own["computes"] == {**variant.computes, "differs": list(variant.differs)}
            if variant.counterpart is None:
                assert not ours
                assert (own["counterpart"], own["reason"]) == (None, variant.reason)
            else:
                assert {row["name"] for row in ours} == (OURS if variant.counterpart == "pgd_at" else ENGINE)
                assert {row["counterpart"] for row in (own, *ours)} == {METHODS[variant.counterpart].title}
                assert all(row["ratio"] > 0 for row in ours)
                if variant.what == "step":
                    # The peer's rate counts what the algorithm needs, not what its code does: the same as ours.
                    flops = [1e12 * row["model_tflops"] / row["images_per_s"] for row in (own, *ours)]
                    assert flops == pytest.approx([next(spent)] * len(flops))
                    assert next(spent) == pytest.approx(flops[0])
        return rows(run), configs, modes

    return measure_all


@pytest.mark.parametrize("name", ["TRADES", "AdvCL", "SupContrast"])
def test_adapters_run_what_looks_like_their_repository(measured, name):
    _, configs, _ = measured(name)
    (variant,) = variants_of(name)
    assert [(config.method, config.precision) for config in configs] == [
        (variant.counterpart, "fp32"),
        (variant.counterpart, "bf16"),
    ]
    assert {(config.batch_size, config.model.width, config.engine.graph) for config in configs} == {(2, 4, "off")}


def test_super_fast_is_beside_pgd_at_where_the_network_is_ours(measured):
    pytest.importorskip("tqdm")
    _, configs, _ = measured("Super-Fast-Adversarial-Training")
    assert [config.attack.eps for config in configs] == [0.03] * 2


def test_fastat_runs_by_its_own_clock_and_the_engine_does_what_it_does(measured):
    pytest.importorskip("PIL")
    found, configs, _ = measured("FastAT_Benchmark")
    assert not logging.getLogger("fake").handlers, "its log files went with the temporary folder"
    for name, row in found.items():
        assert row["ms"] == pytest.approx(500.0), name
        assert row["batches"] == (4 if "loader" in name else 1)
    seen = [(config.method, config.loss.label_smoothing, config.optim.ema_decay, config.attack.bn) for config in configs]
    plain = ("pgd_at", 0.4, 0.0, "eval")
    assert seen[0::2] == seen[1::2] == [plain, ("pgd_at", 0.4, 0.9995, "eval"), plain, plain]


def test_ascl_is_compared_with_the_engine_in_its_batchnorm_mode(measured):
    _, configs, modes = measured("ASCL")
    assert [(config.method, config.attack.bn) for config in configs] == [("ascl", "train")] * 2 + [("pgd_at", "train")] * 2
    assert modes == ["train"] * 2


# What the clones' scripts and defaults say, which their steps' cost or function depends on; a real clone's attack is held below.
SAME = {
    ("TRADES", "train"): {
        "attack.eps": 0.031, "attack.step_size": 0.007, "attack.objective": "kl", "attack.bn": "eval", "attack.start": "gaussian",
        "loss.beta": 6.0, "loss.label_smoothing": 0.0, "model.view_bn": "separate", "optim.weight_decay": 2e-4,
    },
    ("ASCL", "ascl_pgd"): {
        "attack.eps": 0.031, "attack.step_size": 0.007, "attack.objective": "ce", "attack.bn": "train", "loss.kl": 2.0,
        "loss.ce_clean": 0.0, "loss.temperature": 0.2, "loss.selection": "leaking", "loss.distance": "linf",
        "loss.two_transforms": False, "model.head": "linear", "model.head_dim": 128, "model.view_bn": "separate",
    },
    ("ASCL", "pgd_train"): {"attack.eps": 0.031, "attack.step_size": 0.007, "attack.bn": "train", "loss.ce_clean": 0.0},
    ("AdvCL", "train"): {
        "attack.eps": 8 / 255, "attack.step_size": 2 / 255, "attack.steps": 5, "attack.bn": "train", "loss.temperature": 0.5,
        "loss.contrastive": 0.5 / 0.07, "loss.pseudo": 0.2, "loss.radius": 8.0, "loss.clusters": (2, 10, 50, 100, 500),
        "model.head": "mlp_bn", "model.head_hidden": 512, "model.head_dim": 128, "model.view_bn": "separate",
    },
    ("SupContrast", "train"): {
        "loss.temperature": 0.07, "loss.scale": 1.0, "model.head": "mlp", "model.head_hidden": 512, "model.head_dim": 128,
        "model.view_bn": "mixed", "optim.lr": 0.05, "optim.weight_decay": 1e-4,
    },
}  # fmt: skip


def test_counterparts_are_configured_as_the_clones_are(tmp_path):
    images = method_cases.make_images(2, 8)
    for (name, wanted), same in SAME.items():
        variant = next(v for v in importlib.import_module(REPOSITORIES[name].adapter).VARIANTS if v.name == wanted)
        config = measure.configured(variant, Case(CPU, 2, variant.steps or 3, 1, width=4), tmp_path, images)
        assert {key: get(config, key) for key in same} == same, name
        assert (config.optim.momentum, config.optim.ema_decay, config.optim.awp_gamma) == (0.9, 0.0, 0.0)
    # AdvCL's pseudo-labels are drawn, as its clone's are.
    (advcl,) = importlib.import_module("bench.peers.advcl").VARIANTS
    config = measure.configured(advcl, Case(CPU, 2, 5, 1, width=4), tmp_path, images)
    labels = read_pseudo_labels(config.loss.pseudo_labels, config.loss.clusters, len(images.train))
    assert labels.amax(0)[:4].tolist() == [1, 9, 49, 99]


def test_airbenchs_loader_is_beside_our_resident_one(run, monkeypatch):
    monkeypatch.setattr(measure, "CIFAR_IMAGES", 9)
    case = Case(CPU, 2, 1, 1)
    work = measure.loader_makers(run, case)["resident"]()
    seen = []
    real = measure.views.augment
    monkeypatch.setattr(measure.views, "augment", lambda *args, **kwargs: seen.append(real(*args, **kwargs)))
    work.call()
    assert work.batches == 4
    assert [tuple(x.shape) for x in seen] == [(2, 3, 32, 32)] * 4


def test_each_adapter_says_what_it_computes():
    for name, known in REPOSITORIES.items():
        assert re.fullmatch(r"[0-9a-f]{7}", known.commit)
        assert known.url.startswith("https://github.com/")
        variants = importlib.import_module(known.adapter).VARIANTS
        assert len({variant.name for variant in variants}) == len(variants)
        for variant in variants:
            assert {"method", "precision"} <= set(variant.computes), (name, variant.name)
            assert variant.differs
            assert (variant.counterpart is None) == (variant.reason is not None)
            assert variant.counterpart in (None, *METHODS)
    assert set(NAMES) == {*REPOSITORIES, *attacks.PEERS}
    assert set(LOSSES) == {name for name in losses.PLAIN if not name.startswith("eager")}


def test_prepared_batches_are_what_a_loader_gives():
    batches = Case(CPU, 3, 1, 2, pixels=8).prepared()
    assert isinstance(batches, Batches)
    assert (len(batches), len(batches.dataset)) == (2, 6)
    for images, labels in batches:
        assert (images.dtype, tuple(images.shape), labels.dtype) == (torch.float32, (3, 3, 8, 8), torch.int64)
        assert images.is_contiguous()
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.std() > 0.2
    channels_last = Case(CPU, 3, 1, 2, pixels=8).prepared(channels_last=True)
    assert channels_last[0][0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, channels_last, strict=True))


# -- the real ones -----------------------------------------------------------------------------------------------------------

PEERS = os.environ.get("FASTANCHOR_PEERS")
REAL = [
    (name, variant.name) for name, known in REPOSITORIES.items() for variant in importlib.import_module(known.adapter).VARIANTS
]
BATCH, STEPS, CALLS = 8, 2, 6


@pytest.fixture(scope="module")
def torchvision():
    """Torchvision, with stand-ins for the compiled operators where its build does not fit the torch that is installed."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(50):
        try:
            yield importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            absent = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library.define(f"{absent[1]}(Tensor x) -> Tensor")


@pytest.mark.skipif(PEERS is None, reason="FASTANCHOR_PEERS names no folder with clones")
@pytest.mark.parametrize(("name", "variant"), REAL, ids=[" ".join(pair) for pair in REAL])
def test_a_real_clone_does_what_its_adapter_states(request, name, variant):
    folder = Path(PEERS) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    variant = next(v for v in importlib.import_module(REPOSITORIES[name].adapter).VARIANTS if v.name == variant)
    if variant.needs_cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    absent = [reason for module in variant.needs if (reason := attacks.missing(module))]
    if absent:
        pytest.skip(absent[0])
    if "torchvision" in variant.needs:
        request.getfixturevalue("torchvision")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = variant.steps or STEPS
    case = Case(device, BATCH, steps, 1, width=variant.width or 8)
    assert recognise(str(folder)).name == name
    torch.manual_seed(0)
    with Session(folder) as session:
        work = variant.make(session, case)
        if work.model is None:
            work.call()
            return
        seen = []
        hook = work.model.register_forward_pre_hook(
            lambda model, inputs: seen.append((model.training, inputs[0].detach().clone()))
        )
        before = [p.detach().clone() for p in work.model.parameters()]
        work.call()
        hook.remove()
        # Of another size are the two images that FastAT's trainer validates on.
        forwards = [(training, x) for training, x in seen if len(x) % BATCH == 0]
        for mode, training in (("eval", False), ("train", True)):
            each, besides = variant.forwards.get(mode, (0, 0))
            count = sum(t is training for t, _ in forwards)
            assert count == (each * steps + besides) * work.batches, f"{count} forwards in {mode} mode"
        if variant.what == "step" and variant.computes["attack"] and name != "AdvCL" and "loader" not in variant.name:
            (images, _), *_ = case.prepared()
            distances = [(x - images).abs().max().item() for _, x in forwards]
            # 0.031 and 8 / 255; TRADES starts from Gaussian noise that it does not clamp.
            assert 0.01 < max(distances) <= 8 / 255 + 1e-5
            assert all(-0.006 < x.min() and x.max() < 1.006 for _, x in forwards)
        assert work.clock is None or work.clock() > 0
        losses = [_loss(work, case, work.call()) for _ in range(CALLS)]
        changed = [not torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True)]
        if variant.what == "attack":
            assert not any(changed)
        else:
            assert any(changed)
            assert min(losses[1:]) < losses[0], losses


@torch.no_grad()
def _loss(work: Work, case: Case, returned: object) -> float:
    """What the peer's own function returned as its loss, else the cross-entropy of the training batch in train mode."""
    if isinstance(returned, tuple):
        returned = returned[0]
    if isinstance(returned, float):
        return returned
    (images, labels), *_ = case.prepared()
    kept = {key: value.clone() for key, value in work.model.state_dict().items()}
    try:
        return nn.functional.cross_entropy(work.model.train()(images).float(), labels).item()
    except NotImplementedError:  # AdvCL's network wants to be told which BatchNorm
        return float("nan")
    finally:
        work.model.load_state_dict(kept)
