"""FLOPs of a training image against those of the real attack and backward, and the meter's arithmetic."""

import csv
import dataclasses
import functools
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastanchor.attacks import PGD
from fastanchor.ceilings import matmul_rate
from fastanchor.config import Config
from fastanchor.evaluate.learning import SPEED_KEYS
from fastanchor.methods import Adversary, Method, Runner, build_method
from fastanchor.models import build_model
from fastanchor.settings import with_method
from fastanchor.train import throughput
from fastanchor.train.progress import speed_line
from fastanchor.train.run import RunDir
from fastanchor.train.throughput import StepCost, Throughput, step_cost

SIZE = (16, 24)  # an image folder's pictures need not be square


def config_for(method="anchor", steps=3, stage2="none", objective="ce", **loss):
    config = with_method(Config(), method)
    return dataclasses.replace(
        config,
        attack=dataclasses.replace(config.attack, steps=steps, objective=objective, backend="reference"),
        loss=dataclasses.replace(config.loss, **loss),
        stage2=dataclasses.replace(config.stage2, mode=stage2),
    )


def network():
    """A narrow net with a wide projection, so that a projection too many or too few shows."""
    torch.manual_seed(0)
    return build_model("resnet18", num_classes=10, width=4, head_hidden=256, head_dim=8)


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of all that is dispatched; torch's own counter cannot follow autograd.grad to an input."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        return result


def counted(function):
    """FLOPs that torch dispatches while `function` runs."""
    with Counter() as counter:
        function()
    return counter.total


METHODS = {
    "undefended": (config_for("standard"), 1),
    "pgd-at": (config_for(hsc=0.0), 1),
    "pgd-at with clean loss": (config_for(hsc=0.0, ce_clean=1.0), 1),
    "anchor": (config_for(hsc=0.5), 1),
    "anchor, joint objective": (config_for(objective="ce+hsc", hsc=0.5), 1),
    "stage 2 on clean images": (config_for(stage2="slf"), 2),
    "stage 2 on adversarial images": (config_for(stage2="alf"), 2),
}


@pytest.mark.parametrize("config, stage", METHODS.values(), ids=METHODS)
def test_cost_is_that_of_the_real_attack_and_backward(config, stage):
    model, method, batch = network(), build_method(config, stage), 2
    images, labels = torch.rand(batch, 3, *SIZE), torch.tensor([1, 2])
    cost = step_cost(method, model, SIZE)
    assert cost.total == cost.attack + cost.training

    adversaries = method.adversaries(model, torch.zeros(()))
    assert set(adversaries) == {"adv"} & set(method.views)
    made = sum(counted(functools.partial(found.attack, found.model, images, labels)) for found in adversaries.values())
    # The joint objective's own products are not the model's: 4 embeddings of 8 dimensions.
    assert batch * cost.attack == pytest.approx(made, rel=1e-3 if method.embeds else 0)

    method.train_mode(model)
    run = Runner(config, method, model, adversaries, {}, torch.device("cpu"))

    def train():
        out = run.forward(dict.fromkeys(method.views, images))
        sum(value.sum() for part in (out.logits, out.embeddings) for value in part.values()).backward()

    features = model.classifier.in_features
    first_layer = 2 * 3 * 9 * 4 * SIZE[0] * SIZE[1]
    neglected = -first_layer if stage == 1 else 2 * features * 10
    assert batch * (cost.training + len(method.views) * neglected) == counted(train)


class Restarts(Method):
    """An adversary of several restarts, which judges each of them, and looks at the clean images once."""

    def adversaries(self, model, progress):
        return {"adv": Adversary(PGD(steps=2, restarts=3, objective="kl", backend="reference", check_inputs=False), model)}


def test_cost_of_restarts():
    model, method = network(), Restarts(Config())
    images, labels = torch.rand(2, 3, *SIZE), torch.tensor([1, 2])
    made = counted(lambda: method.adversaries(model, torch.zeros(()))["adv"].attack(model, images, labels))
    assert 2 * step_cost(method, model, SIZE).attack == made


def test_cost_leaves_the_model_as_it_is():
    model, method = network(), build_method(config_for(hsc=0.5))
    model.train()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    step_cost(method, model, SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and all(p.grad is None for p in model.parameters())


def test_published_cost_of_resnet18():
    """He et al.'s net with the CIFAR stem: 1.111 GFLOP forward; PGD-10 training 25.5 GFLOP an image."""
    with torch.device("meta"):
        model = build_model("resnet18", num_classes=10)
    cost = step_cost(build_method(config_for(steps=10, hsc=0.0)), model, (32, 32))
    assert cost.training / 3 == pytest.approx(1.111e9, rel=1e-3)
    assert cost.total == pytest.approx(25.5e9, rel=0.01)
    assert cost.attack == 20 / 3 * cost.training


@pytest.fixture
def meter(monkeypatch):
    """A meter on a CPU of 1 GFLOP/s, in a run that began at 10 s."""
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype: {torch.bfloat16: 1e9}[dtype])
    return Throughput(torch.device("cpu"), started=10.0)


def test_the_line_for_people_has_no_share_above_all(meter):
    """Of 1 GFLOP/s: a half, and twice as much as there is."""
    half, twice = (
        speed_line({**meter.epoch(images=100, seconds=s, cost=StepCost(4_000_000, 1_000_000)), "seconds": s}) for s in (1.0, 0.25)
    )
    assert "0.0005 model TFLOP/s, 50 % of this device's measured bf16 matmul rate; peak memory" in half
    assert "0.002 model TFLOP/s, bf16 matmul rate passed: the ceiling was measured low" in twice and "%" not in twice


def test_rates_of_an_epoch(meter):
    row = meter.epoch(images=100, seconds=2.0, cost=StepCost(attack=2_000_000, training=1_000_000))
    peak = row.pop("peak_memory_mb")
    assert row == pytest.approx({"images_per_s": 50, "tflops": 1.5e-4, "share_of_bf16_matmul": 0.15})
    status = Path("/proc/self/status")
    if status.exists():
        kibibytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        assert peak == pytest.approx(int(kibibytes) * 1024 / 1e6, rel=0.015)


def test_first_step_is_timed_once_and_reported_once(meter, monkeypatch):
    cost = StepCost(0, 1_000_000)
    for now in (12.5, 13.0, 14.0):
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        meter.step_done()
    row = meter.epoch(10, 1.0, cost)
    assert row["first_step_s"] == 2.5 and row.keys() == set(SPEED_KEYS)
    meter.step_done()
    assert "first_step_s" not in meter.epoch(10, 1.0, cost)


def test_ceiling_is_the_measured_bf16_rate():
    assert Throughput(torch.device("cpu"), 0.0).ceiling == matmul_rate("cpu", torch.bfloat16)


def test_rows_with_other_keys_than_the_first_one_s_share_one_table(tmp_path, meter):
    run = RunDir(tmp_path)
    meter.step_done()
    run.log({"stage": 1, "epoch": 1, "seconds": 3.0})  # a version that measured less
    for epoch in (2, 3):
        run.log({"stage": 1, "epoch": epoch, "seconds": 2.0} | meter.epoch(10, 2.0, StepCost(0, 1_000_000)))
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [row["images_per_s"] for row in rows] == ["", "5.0", "5.0"]
    assert [bool(row["first_step_s"]) for row in rows] == [False, True, False]
    assert all(None not in row and None not in row.values() for row in rows)


@pytest.mark.gpu
def test_meter_on_a_gpu_waits_for_the_first_step_and_counts_tensors():
    device = torch.device("cuda")
    started = time.perf_counter()
    meter = Throughput(device, started)
    before = torch.cuda.memory_allocated(device)
    held = torch.ones(2**26, device=device)
    torch.cuda._sleep(2_000_000_000)  # about a second of a GPU's clock
    launched = time.perf_counter() - started
    meter.step_done()
    row = meter.epoch(10, 1.0, StepCost(0, 1_000_000))
    assert row["first_step_s"] > launched + 0.2
    assert row["peak_memory_mb"] == pytest.approx((before + held.numel() * 4) / 1e6, rel=0.02)
