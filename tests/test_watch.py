"""The watch for catastrophic overfitting: its rule, what it measures, a real collapse, and training that is none."""

import copy
import json

import pytest
import torch
from torch import nn

from fastanchor.config import Config
from fastanchor.data import sources
from fastanchor.data.views import to_float
from fastanchor.reference import attacks as reference
from fastanchor.reference.objectives import cross_entropy
from fastanchor.settings import from_dict, parse_flags
from fastanchor.train import watch as watching
from fastanchor.train.loop import train
from fastanchor.train.optim import build_optimizer, load_optimizer
from fastanchor.train.run import RunDir
from fastanchor.train.stages import stage_method
from fastanchor.train.step import TrainStep
from fastanchor.train.watch import Watch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return sources.load("synthetic", limit=1200, val_fraction=0.1)


def watch_of(images, *flags, seed=5):
    config = parse_flags(["--watch.images", "128", *flags], Config())
    return Watch(config, images.train, images.num_classes, CPU, seed)


# -- the rule -------------------------------------------------------------------------------------------------------------------


def judged(watch, figures, first=1):
    """The epochs in which it warned, of (robust accuracy in percent, accuracy on the training adversary as a share or None)."""
    warned = []
    for epoch, (robust, adversary) in enumerate(figures, first):
        row = {"epoch": epoch} | ({} if adversary is None else {"accuracy_adv": adversary})
        warning, stop = watch.judge(robust, row)
        assert stop == (warning is not None and watch.config.stop)
        warned += [epoch] if warning else []
    return warned


@pytest.mark.parametrize(
    "figures, warned",
    [
        ([(30, 0.4), (45, 0.5), (2, 0.9), (1, 0.95)], [3]),  # once, not in every epoch of a collapse
        ([(30, 0.4), (45, 0.5), (25.1, 0.9)], []),  # 19.9 points are within the drop, 20 are, more are not
        ([(30, 0.4), (45, 0.5), (25, 0.9)], []),
        ([(30, 0.4), (45, 0.5), (24.9, 0.9)], [3]),
        ([(30, 0.4), (45, 0.5), (35, 0.6), (24, 0.9)], [4]),  # below its best, not below the epoch before
        ([(40, 0.5), (10, 0.34)], []),  # both fall: a worse network
        ([(40, 0.5), (10, 0.36)], [2]),  # 14 points against 30
        ([(40, 0.5), (10, 0.2), (9, 0.6)], [3]),  # only now
        ([(40, 0.5), (5, 0.9), (38, 0.6), (4, 0.9)], [2, 4]),  # it recovered in between
        ([(40, 0.5), (5, 0.9), (5, 0.2), (5, 0.9)], [2]),
        ([(40, None), (5, None)], []),
        ([(40, None), (5, 0.9)], []),
        ([(0, 0.9)], []),
        ([(15, 0.5), (0, 0.99)], []),  # never robust enough to lose 20 points
    ],
)
@pytest.mark.parametrize("stop", [False, True])
def test_the_rule(images, figures, warned, stop):
    assert judged(watch_of(images, *(["--watch.stop"] if stop else [])), figures) == warned


def test_the_drop_is_the_setting(images):
    assert judged(watch_of(images, "--watch.drop", "5"), [(40, 0.5), (34, 0.6)]) == [2]


@pytest.mark.parametrize("cut", range(5))
def test_a_resumed_watch_says_what_an_uninterrupted_one_says(images, cut):
    figures = [(30, 0.4), (45, 0.5), (2, 0.9), (1, 0.9), (44, 0.8), (3, 0.9)]
    whole, first, second = (watch_of(images) for _ in range(3))
    found = judged(first, figures[:cut])
    second.load(json.loads(json.dumps(first.state_dict())))
    assert found + judged(second, figures[cut:], first=cut + 1) == judged(whole, figures) == [3, 6]
    assert second.state_dict() == whole.state_dict()


def test_the_warning_names_everything(images):
    watch = watch_of(images, "--watch.attack", "pgd7", "--watch.stop")
    watch.judge(40.0, {"epoch": 3, "accuracy_adv": 0.5})
    warning, stop = watch.judge(2.5, {"epoch": 4, "accuracy_adv": 0.9})
    assert stop and warning == (
        "warning: catastrophic overfitting in epoch 4: robust accuracy on 128 training images, PGD-7 (eps 8/255, step 2/255, "
        "uniform start, 1 restart), is 2.5 %, after 40.0 % in epoch 3, while accuracy on the training adversary went from 50.0 to "
        "90.0 %; stopping"
    )


# -- what it measures -----------------------------------------------------------------------------------------------------------


def small_net(seed=0, width=64):
    """A perceptron that learns the synthetic images in seconds; its BatchNorm follows such short trainings."""
    torch.manual_seed(seed)
    layers = [nn.Flatten()]
    for inputs in (3072, width, width):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width, momentum=0.4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def test_it_measures_pgd_in_eval_mode_on_the_same_training_images_every_time(images):
    net = small_net().train()
    before = copy.deepcopy(net.state_dict())
    watch = watch_of(
        images, "--watch.attack", "pgd3", "--attack.eps", "0.02", "--precision", "bf16", "--data.augment", "crop_flip"
    )
    torch.manual_seed(9)
    state = torch.get_rng_state()
    entries, warning, stop = watch(net, {"epoch": 1, "accuracy_adv": 0.1})
    assert watch(net, {"epoch": 2, "accuracy_adv": 0.1})[0] == entries and warning is None and not stop
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    chosen = images.train.subset(128)
    known = {bytes(image.numpy()) for image in images.train.images}
    assert len(chosen) == 128 and all(bytes(image.numpy()) in known for image in chosen.images)
    x, y = to_float(chosen.images), chosen.labels
    start = torch.empty_like(x).uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(5))
    net.eval()
    made = reference.pgd(net, x, y, eps=0.02, step_size=0.005, steps=3, objective=cross_entropy, start=start)
    with torch.no_grad():
        right = (net(x).argmax(1) == y) & (net(made).argmax(1) == y)
    assert entries["train_robust"] == pytest.approx(100 * right.double().mean().item(), abs=1)


# -- a real collapse --------------------------------------------------------------------------------------------------------------

COMMON = "--model.head identity --data.augment none --batch-size 64 --optim.name adamw --optim.lr 0.003 --attack.eps 0.1".split()
MULTI_STEP = "--attack.steps 5 --attack.step-size 0.03 --attack.start uniform".split()
FGSM = "--attack.steps 1 --attack.step-size 0.1 --attack.start zero --attack.bn train".split()
ROBUST_EPOCHS = 5


def epochs_of(images, model, flags, watch, first, last, optimizer=None):
    """Train for some epochs under the watch; robust accuracies, warnings and the optimiser's state."""
    config = parse_flags([*COMMON, *flags], from_dict({"method": "pgd_at"}, "test"))
    method = stage_method(config, 1, images, model, CPU)
    step = TrainStep(config, method, model, build_optimizer(method.trainable(model), config.optim), None, CPU)
    if optimizer is not None:  # one that starts anew would disturb the network by itself
        load_optimizer(step.optimizer, optimizer)
    robust, warnings = [], []
    for epoch in range(first, last + 1):
        step.reset({"augment": epoch, "attack": 100 + epoch})
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(epoch))
        for part in order[: len(order) // 64 * 64].split(64):
            step(images.train.images[part], images.train.labels[part], progress=epoch - 0.5)
        entries, warning, _ = watch(model, {"epoch": epoch, **step.read()})
        robust.append(entries["train_robust"])
        warnings += [warning] if warning else []
    return robust, warnings, step.optimizer.state_dict()


@pytest.fixture(scope="module")
def robust(images):
    """A network that multi-step training has made robust, with its watch."""
    model, watch = small_net(), watch_of(images, "--attack.eps", "0.1")
    found, warnings, optimizer = epochs_of(images, model, MULTI_STEP, watch, 1, ROBUST_EPOCHS)
    assert max(found) > 45 and not warnings
    return model, watch.state_dict(), copy.deepcopy(optimizer)


@pytest.mark.parametrize("flags, collapses", [(FGSM, True), (MULTI_STEP, False)], ids=["FGSM, no random start", "PGD"])
def test_a_collapse_is_caught_and_robust_training_is_not_one(images, robust, flags, collapses):
    """FGSM of a big step without random start loses in an epoch what PGD has trained; PGD going on keeps it."""
    model, state, optimizer = robust
    model, watch = copy.deepcopy(model), watch_of(images, "--attack.eps", "0.1")
    watch.load(state)
    found, warnings, _ = epochs_of(images, model, flags, watch, ROBUST_EPOCHS + 1, ROBUST_EPOCHS + 2, optimizer)
    assert (min(found) < 30) == collapses and len(warnings) == collapses
    if collapses:
        assert "more attack.steps, a smaller step_size or a larger start_radius may prevent it" in warnings[0]


# -- in the loop ------------------------------------------------------------------------------------------------------------------

RUN = (
    "--model.width 4 --attack.steps 1 --attack.eps 0.02 --attack.step-size 0.02 --batch-size 40 --epochs 4 --val.attack pgd1 "
    "--watch.images 20 --watch.attack pgd1"
).split()


@pytest.mark.parametrize("stop", [False, True])
def test_the_loop_logs_warns_and_stops(tmp_path, monkeypatch, capsys, stop):
    images = sources.load("synthetic", limit=80)
    scripted = iter((40.0, 45.0, 3.0, 2.0))
    real = Watch.judge
    monkeypatch.setattr(
        watching.Watch, "judge", lambda self, robust, row: real(self, next(scripted), row | {"accuracy_adv": 0.9})
    )
    config = parse_flags([*RUN, *(["--watch.stop"] if stop else [])], from_dict({"method": "pgd_at"}, "test"))
    run = RunDir(tmp_path / "run")
    train(config, images, run)
    assert [row["epoch"] for row in run.history()] == ([1, 2, 3] if stop else [1, 2, 3, 4])
    assert all(0 <= row["train_robust"] <= 100 for row in run.history())
    assert capsys.readouterr().out.count("catastrophic overfitting in epoch 3") == 1
    assert (run.checkpoints / "best.pt").exists()
