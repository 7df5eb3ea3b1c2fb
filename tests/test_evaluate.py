"""Accuracy, full precision, AutoAttack with its stages and resume, adversarial images, and what results hold."""

import gc
import io
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastanchor.attacks import PGD
from fastanchor.data.encoded import Encoded
from fastanchor.data.judged import judged_split
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split, load
from fastanchor.errors import UserError
from fastanchor.evaluate import autoattack as module
from fastanchor.evaluate.accuracy import measure
from fastanchor.evaluate.adversarial import write_adversarial
from fastanchor.evaluate.autoattack import STAGES, autoattack
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.evaluate.results import evaluate, load_results
from fastanchor.precision import full_precision


class Linear(nn.Module):
    """Logits of a linear map of the pixels around mid-grey: the worst case in the ball is known in closed form."""

    def __init__(self, classes=10, size=8):
        super().__init__()
        self.map = nn.Linear(3 * size * size, classes, bias=False)

    def forward(self, images):
        return self.map((images - 0.5).flatten(1))


@pytest.fixture(scope="module")
def digits_split():
    images = load("digits").test.images[:, ::4, ::4].contiguous()
    return Split(images[:120], load("digits").test.labels[:120])


@pytest.fixture(scope="module")
def model(digits_split):
    torch.manual_seed(0)
    model = Linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    images = digits_split.images.permute(0, 3, 1, 2) / 255
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), digits_split.labels).backward()
        optimizer.step()
    return model


class Pngs:
    """A store of PNG images that counts how often each one is read."""

    def __init__(self, images):
        self.files, self.reads = [], Counter()
        for image in images.numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            self.files.append(file.getvalue())

    def __len__(self):
        return len(self.files)

    def read(self, index):
        self.reads[index] += 1
        return self.files[index]


def encoded(split):
    """The same images, still to be decoded."""
    count, size = len(split), split.image_shape[0]
    return Encoded(
        Pngs(split.images), np.arange(count), split.labels, torch.full((2, count), size), np.zeros(count, bool), image_size=size
    )


def test_clean_accuracy_overall_and_by_class(model, digits_split):
    data = ResidentSplit(digits_split, "cpu")
    score = measure(model, data, batch_size=50, num_classes=11)
    with torch.no_grad():
        right = model(digits_split.images.permute(0, 3, 1, 2) / 255).argmax(1) == digits_split.labels
    assert score.accuracy == pytest.approx(100 * right.double().mean().item())
    assert torch.equal(score.correct, right) and score.count == 120
    for c in range(10):
        mine = right[digits_split.labels == c]
        assert score.per_class[c] == pytest.approx(100 * mine.double().mean().item())
    assert score.per_class[10] is None


def test_robust_accuracy_of_a_two_class_linear_model_is_the_closed_form():
    """Of two classes the best attack moves every pixel by eps against the weight difference; the box does not bind here."""
    torch.manual_seed(0)
    model = Linear(classes=2)
    images = torch.randint(100, 156, (300, 8, 8, 3), dtype=torch.uint8)
    w = model.map.weight[1] - model.map.weight[0]
    x = (images.permute(0, 3, 1, 2) / 255 - 0.5).flatten(1)
    margin = (x @ w).detach()
    labels = (margin > 0).long()
    eps = 0.003
    expected = (margin.abs() > eps * w.abs().sum()).double().mean().item() * 100
    assert 10 < expected < 90
    score = measure(
        model, ResidentSplit(Split(images, labels), "cpu"), parse_attack(f"pgd20:eps={eps}", default_eps=eps), num_classes=2
    )
    assert score.accuracy == pytest.approx(expected, abs=0.4)  # an image on the edge


def test_every_restart_counts(model, digits_split, monkeypatch):
    """An image is robust only if it holds under each restart: here restarts fool different images in turn."""
    calls = []

    def alternate(self, model, images, labels, *, generator=None):
        calls.append(len(images))
        out = images.clone()
        out[len(calls) % 2 :: 2] = 1 - out[len(calls) % 2 :: 2]
        return out

    monkeypatch.setattr(PGD, "__call__", alternate)
    data = ResidentSplit(digits_split, "cpu")
    once, twice = (
        measure(model, data, parse_attack(f"pgd5:restarts={n}", default_eps=0.1), batch_size=200, num_classes=10).accuracy
        for n in (1, 2)
    )
    assert calls == [120] * 3 and twice < once - 20


def test_more_steps_and_restarts_never_help_the_model(model, digits_split):
    data = ResidentSplit(digits_split, "cpu")
    found = [
        measure(model, data, parse_attack(text, default_eps=0.1), seed=3, num_classes=10).accuracy
        for text in ("fgsm", "pgd40", "pgd40:restarts=3")
    ]
    assert found == sorted(found, reverse=True)
    assert measure(model, data, parse_attack("pgd20", default_eps=0.5), num_classes=10).accuracy == 0


def test_start_noise_is_reproducible(model, digits_split):
    data = ResidentSplit(digits_split, "cpu")
    spec = parse_attack("pgd1:step_size=0.001", default_eps=0.5)
    a, b, c = (measure(model, data, spec, seed=seed, num_classes=10).correct for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_model_without_finite_logits_is_not_judged(digits_split):
    broken = Linear()
    with torch.no_grad():
        broken.map.weight[3] = float("nan")
    with pytest.raises(UserError, match="logits on clean images are not all finite"):
        measure(broken, ResidentSplit(digits_split, "cpu"), num_classes=10)


def test_logits_that_become_infinite_under_attack_are_not_robust(digits_split):
    class Fragile(Linear):
        def forward(self, images):
            logits = super().forward(images)
            moved = (images * 255 - (images * 255).round()).abs().amax((1, 2, 3)) > 1e-3
            return torch.where(moved[:, None], logits + torch.tensor([float("inf")] + [0.0] * 9), logits)

    only_zeros = Split(digits_split.images, torch.zeros_like(digits_split.labels))
    score = measure(Fragile(), ResidentSplit(only_zeros, "cpu"), parse_attack("pgd1", default_eps=0.01), num_classes=10)
    assert score.accuracy == 0


def test_evaluation_leaves_flags_and_weights_alone(digits_split):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 10))
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, ResidentSplit(digits_split, "cpu"), parse_attack("pgd2", default_eps=0.1), num_classes=10)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_full_precision_undoes_autocast_and_tf32_and_restores_them():
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = (matmul.fp32_precision, conv.fp32_precision)
    matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(ZeroDivisionError), full_precision():
                assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
                raise ZeroDivisionError
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", before[1])
    finally:
        matmul.fp32_precision = before[0]


def test_results_are_stored_beside_the_table(model, digits_split, tmp_path):
    data = ResidentSplit(digits_split, "cpu")
    specs = [parse_attack(text, default_eps=0.1) for text in ("fgsm", "pgd3:eps=0.031,step_size=0.003")]
    about = {"checkpoint": "x/best.pt", "data": "digits"}
    results = evaluate(model, data, specs, num_classes=10, batch_size=64, seed=5, about=about, out=tmp_path / "eval")
    assert [result["description"] for result in results] == [
        "FGSM (eps 0.1, step 0.1, no random start, 1 restart)",
        "PGD-3 (eps 0.031, step 0.003, uniform start, 1 restart)",
    ]
    stored = load_results(tmp_path / "eval")
    assert {json.dumps(r, sort_keys=True) for r in stored} == {json.dumps(r, sort_keys=True) for r in results}
    assert stored[0]["count"] == 120 and stored[0]["seed"] == 5 and stored[0]["checkpoint"] == "x/best.pt"
    assert stored[0]["environment"]["packages"]["torch"] == torch.__version__


def test_autoattack_is_the_package_run_whole(model, digits_split):
    """Stage by stage and batch by batch gives the verdicts that one call of the package gives."""
    pyautoattack = pytest.importorskip("pyautoattack")
    few = Split(digits_split.images[:14], digits_split.labels[:14])
    spec = parse_attack("autoattack:eps=0.02", default_eps=0.1)
    score, more = autoattack(model, ResidentSplit(few, "cpu"), spec, num_classes=10, batch_size=10, seed=0)
    assert tuple(more["stages"]) == ("clean", *STAGES)
    accuracies = list(more["stages"].values())
    assert accuracies == sorted(accuracies, reverse=True) and score.accuracy == accuracies[-1] > 0
    images = (few.images.permute(0, 3, 1, 2) / 255).contiguous()
    whole = pyautoattack.AutoAttack(model, device="cpu", eps=0.02, norm="Linf", seed=0, version="standard")
    _, found = whole.run_standard_evaluation(images, few.labels, batch_size=10)
    assert torch.equal(score.correct, found == few.labels)


def test_autoattack_goes_on_where_it_stopped(model, digits_split, tmp_path, monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack")
    data = ResidentSplit(Split(digits_split.images[:24], digits_split.labels[:24]), "cpu")
    spec = parse_attack("autoattack:eps=0.05", default_eps=0.1)
    options = {"num_classes": 10, "batch_size": 20, "seed": 0}
    expected, _ = autoattack(model, data, spec, **options)
    state = tmp_path / "state.json"
    real, calls = pyautoattack.AutoAttack.run_standard_evaluation, []

    def interrupted(self, x, y, **more):
        calls.append((self.attacks_to_run[0], len(x)))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, x, y, **more)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        autoattack(model, data, spec, state_path=state, **options)
    resumed, _ = autoattack(model, data, spec, state_path=state, **options)
    assert [calls[0], calls[1]] == [("apgd-ce", 20), calls[2]]
    assert calls[2][0] == "apgd-ce" and calls[2][1] < 20  # the first batch was not run again
    assert torch.equal(resumed.correct, expected.correct)
    done = len(calls)
    autoattack(model, data, spec, state_path=state, **options)
    assert len(calls) == done
    with pytest.raises(UserError, match="belongs to another evaluation \\(different eps\\); remove it"):
        autoattack(model, data, parse_attack("autoattack:eps=0.06", default_eps=0.1), state_path=state, **options)
    state.write_text("{half")
    with pytest.raises(UserError, match="not a state of an AutoAttack evaluation"):
        autoattack(model, data, spec, state_path=state, **options)


class Halving:
    """An attacker that fools every second image it is given, and notes what that was."""

    def __init__(self, *args, **more):
        self.apgd_targeted, self.fab, self.given, self.alive = SimpleNamespace(), SimpleNamespace(), [], []

    def run_standard_evaluation(self, x, y, *, batch_size):
        assert x.is_contiguous() and x.dtype == torch.float32 and batch_size == len(x)
        held = {t.data_ptr(): len(t) for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[1:] == x.shape[1:]}
        self.alive.append(sum(held.values()))
        self.given.append((self.attacks_to_run[0], x.numpy().copy()))
        return x, torch.where(torch.arange(len(y)) % 2 == 0, y, y + 1)


@pytest.mark.parametrize("kind", ["resident", "encoded"])
def test_autoattack_holds_one_batch_in_fp32(digits_split, model, monkeypatch, tmp_path, kind):
    pytest.importorskip("pyautoattack")  # its version is part of the result
    few = Split(digits_split.images[:60], digits_split.labels[:60])
    attackers, converted = [], []
    monkeypatch.setattr(
        module, "require_autoattack", lambda classes: lambda *a, **m: attackers.append(Halving()) or attackers[-1]
    )
    real = module.to_float
    monkeypatch.setattr(module, "to_float", lambda images: converted.append(len(images)) or real(images))
    data = ResidentSplit(few, "cpu") if kind == "resident" else judged_split(encoded(few), "cpu")
    options = {"num_classes": 10, "batch_size": 10, "state_path": tmp_path / "state.json"}
    score, more = autoattack(model, data, parse_attack("autoattack:eps=0.02", default_eps=0.1), **options)
    (attacker,) = attackers
    given = attacker.given
    assert max(converted) == max(attacker.alive) == 10
    # What each stage is given, batch by batch: all images that were held before, in their order.
    images = few.images.permute(0, 3, 1, 2) / 255
    robust = model(images).argmax(1) == few.labels
    expected = []
    for stage in STAGES:
        for chunk in robust.nonzero().flatten().split(10):
            expected.append((stage, images[chunk]))
            robust[chunk[1::2]] = False
    assert [stage for stage, _ in given] == [stage for stage, _ in expected] and len(given) > 8
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(given, expected, strict=True))
    assert torch.equal(score.correct, robust) and more["stages"]["square"] == 100 * robust.sum().item() / 60


@pytest.mark.parametrize("kind", ["resident", "encoded"])
def test_the_fingerprint_of_an_evaluation_is_what_it_was(monkeypatch, tmp_path, kind):
    """Written down: a state that an earlier version has left is continued. It never depends on how images are stored."""
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(module, "require_autoattack", lambda classes: Halving)
    images = (torch.arange(23 * 8 * 8 * 3) * 7 % 256).to(torch.uint8).view(23, 8, 8, 3)
    split = Split(images, torch.arange(23) % 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with torch.no_grad():
        model[1].weight.copy_((torch.arange(1920) % 17 - 8).view(10, 192) / 64)
        model[1].bias.copy_(torch.arange(10) / 8)
    data = ResidentSplit(split, "cpu") if kind == "resident" else judged_split(encoded(split), "cpu")
    state, spec = tmp_path / "state.json", parse_attack("autoattack:eps=0.02", default_eps=0.1)
    autoattack(model, data, spec, num_classes=10, batch_size=10, state_path=state)
    assert json.loads(state.read_text())["identity"] == {
        "fingerprint": "bab2b504d2668ab14829fea594b8e326504381a6db04c22144491099d22291b1",
        "eps": 0.02,
        "norm": "linf",
        "batch_size": 10,
        "seed": 0,
    }


def test_adversarial_images_of_encoded_ones_are_decoded_once(model, digits_split, tmp_path):
    few = Split(digits_split.images[:12], digits_split.labels[:12])
    names = [str(c) for c in range(10)]
    config = SimpleNamespace(eval=SimpleNamespace(batch_size=5))
    trained = SimpleNamespace(model=model, config=config, class_names=names, path="x/best.pt")
    kept, spec = encoded(few), parse_attack("pgd2", default_eps=0.1)
    summaries = [
        write_adversarial(trained, split, spec, tmp_path / kind, device=torch.device("cpu"), seed=1)
        for kind, split in (("resident", few), ("encoded", kept))
    ]
    assert summaries[0] == summaries[1] and summaries[0]["count"] == 12
    assert kept.store.reads == Counter(range(12)) and "images" not in vars(kept)
    found, truth = (np.load(tmp_path / kind / "adversarial.npz") for kind in ("encoded", "resident"))
    assert all(np.array_equal(found[key], truth[key]) for key in truth.files)
    assert np.array_equal(found["clean"], few.images.numpy()) and found["clean"].dtype == np.uint8


def test_autoattack_missing_or_with_too_few_classes(model, digits_split, monkeypatch):
    data = ResidentSplit(digits_split, "cpu")
    spec = parse_attack("autoattack", default_eps=0.1)
    with pytest.raises(UserError, match="needs at least 4 classes, this model has 3"):
        autoattack(model, data, spec, num_classes=3)
    monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
    with pytest.raises(UserError, match=r'needs the package pyautoattack: pip install "fastanchor\[eval\]"'):
        autoattack(model, data, spec, num_classes=10)
