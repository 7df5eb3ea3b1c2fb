"""What only a CUDA device can show: `pytest -m gpu`. Parity with the CPU, no synchronisation in the step, training in bf16."""

import copy

import pytest
import torch

from fastanchor.attacks import PGD
from fastanchor.config import Config
from fastanchor.data import sources
from fastanchor.data.resident import ResidentSplit
from fastanchor.evaluate.accuracy import measure
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.methods import build_method
from fastanchor.models import build_model
from fastanchor.precision import full_precision
from fastanchor.settings import parse_flags
from fastanchor.train import checkpoint
from fastanchor.train.loop import train
from fastanchor.train.optim import build_optimizer
from fastanchor.train.run import RunDir, load_trained
from fastanchor.train.step import TrainStep

pytestmark = pytest.mark.gpu

FLAGS = (
    "--device cuda --data.source synthetic --data.limit 400 --model.width 16 --attack.steps 3 --attack.eps 0.02 "
    "--attack.step-size 0.01 --batch-size 64 --epochs 3 --optim.lr 0.05 --val.attack pgd3"
).split()


@pytest.fixture(scope="module")
def images():
    return sources.load("synthetic", limit=400)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    model.train()
    with torch.no_grad():
        model(torch.rand(64, 3, 32, 32))  # running statistics that are not the initial ones
    return model.eval()


def test_attack_agrees_with_the_cpu(model):
    """From one start the images agree but for pixels whose input gradient is about zero."""
    x, y = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    attack = PGD(eps=8 / 255, step_size=2 / 255, steps=3, start=torch.empty(32, 3, 32, 32).uniform_(-8 / 255, 8 / 255))
    expected = attack(model, x, y)
    with full_precision():
        found = attack(copy.deepcopy(model).cuda(), x.cuda(), y.cuda()).cpu()
    assert ((found - expected).abs() > 1e-5).float().mean() < 1e-3


def test_accuracy_agrees_with_the_cpu(model, images):
    spec = parse_attack("pgd5:eps=0.002", default_eps=0.002)
    scores = [
        measure(copy.deepcopy(model).to(device), ResidentSplit(images.test, device), attack, num_classes=10).accuracy
        for device in ("cpu", "cuda")
        for attack in (None, spec)
    ]
    assert scores[0] == pytest.approx(scores[2], abs=0.5) and scores[1] == pytest.approx(scores[3], abs=1.0)


@pytest.mark.parametrize(
    "flags",
    [[], ["--engine.graph", "off"], ["--precision", "bf16"], ["--attack.objective", "ce+hsc"], ["--optim.clip-grad-norm", "1"]],
)
def test_the_step_never_waits_for_the_device(model, images, flags):
    config = parse_flags([*FLAGS, *flags], Config())
    device = torch.device("cuda")
    model = model.to(device, memory_format=torch.channels_last)
    method = build_method(config)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, device)
    x, y = images.train.images[:64].to(device), images.train.labels[:64].to(device)
    step(x, y, progress=0.0)
    assert step.graphed == ("off" not in flags), step.describe()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y, progress=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.check_finite(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_and_resumes(images, tmp_path, precision):
    config = parse_flags([*FLAGS, "--precision", precision], Config())
    run = RunDir(tmp_path / "run")
    train(config, images, run)
    rows = run.history()
    assert rows[-1]["loss"] < rows[0]["loss"]
    last = run.checkpoints / "last.pt"
    last.write_bytes(last.read_bytes()[:100])
    train(config, images, run, resume=True)
    assert checkpoint.load(last)["epoch"] == 3
    trained = load_trained(run.path, torch.device("cuda"))
    assert next(trained.model.parameters()).is_cuda


def test_out_of_memory_is_explained(images, tmp_path):
    """A real allocation failure: the process is held to a sliver of the device's memory."""
    from fastanchor.errors import UserError

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 300 * 2**20) / total)
    try:
        config = parse_flags([*FLAGS, "--model.width", "64", "--batch-size", "300"], Config())
        with pytest.raises(
            UserError,
            match=r"batch_size = 300 with 2 views \(aug, adv\) does not fit.*batch_size = \d+ fits \(tried\).*out of memory",
        ):
            train(config, images, RunDir(tmp_path / "run"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
