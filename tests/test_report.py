"""The report: one self-contained page that says what the run's files and the model say."""

import base64
import dataclasses
import html
import io
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastanchor.config import Config
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.sources import Split, load
from fastanchor.errors import UserError
from fastanchor.evaluate import figures, inspection
from fastanchor.evaluate.learning import gap_sentence, seconds_an_epoch, speed_section, three_digits
from fastanchor.evaluate.page import clean_text, image
from fastanchor.evaluate.protocol import parse_attack
from fastanchor.evaluate.report import build_report
from fastanchor.evaluate.results import evaluate
from fastanchor.settings import to_dict, with_method
from fastanchor.train import checkpoint
from fastanchor.train.run import RunDir, load_trained, model_from_config

CPU = torch.device("cpu")
SECTIONS = ["Training curves", "Clean and adversarial images", "Accuracy against eps", "Accuracy by class", "Embedding map",
            "Configuration"]  # fmt: skip
HOSTILE = '<script>alert("x")</script> & $\\frac{1}$ \x00\ud800'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Headings, text, and every tag with its attributes; the parser fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.headings, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of four channels gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images():
    return load("synthetic", limit=60)


def config_for(method="anchor", head="mlp", stage2="none"):
    config = with_method(Config(device="cpu", epochs=4), method)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source="synthetic"),
        model=dataclasses.replace(config.model, width=4, head=head, head_hidden=16, head_dim=8),
        attack=dataclasses.replace(config.attack, steps=2),
        stage2=dataclasses.replace(config.stage2, mode=stage2),
        val=dataclasses.replace(config.val, attack="pgd2"),
        eval=dataclasses.replace(config.eval, attacks=("pgd3",)),
    )


def rows_for(config, stage=1, robust=(20, 40, 30, 25)):
    standard = config.method == "standard"
    rows = []
    for epoch, value in enumerate(robust, 1):
        lr = 0.1 if epoch < 3 else 0.001
        row = {"stage": stage, "epoch": epoch, "lr": lr, "loss": 2 / epoch, "grad_norm": 1.0, "seconds": 2.0}
        if standard:
            row |= {"loss_ce": 2 / epoch, "accuracy_aug": 0.2 * epoch}
        elif stage == 2:
            row |= {"loss_ce": 1 / epoch, "accuracy_adv": 0.1 * epoch}
        else:
            row |= {"loss_ce_adv": 1 / epoch, "loss_hsc": 1 / epoch, "accuracy_aug": 0.2 * epoch, "accuracy_adv": 0.15 * epoch,
                    "effective_positives": 9.0}  # fmt: skip
        if value is not None:
            row |= {"val_clean": 50.0 + epoch, "val_robust": float(value), "best": False, "val_seconds": 0.5}
        rows.append(row)
    return rows


def make_run(path, images, config, rows, *, class_names=None, stage=1, epoch=2, judged=True):
    """A run as the training loop leaves it, with an untrained model."""
    run = RunDir(path)
    run.create(config, CPU)
    for row in rows:
        run.log(row)
    names = list(class_names or images.class_names)
    torch.manual_seed(0)
    model = model_from_config(config, len(names), (0.5,) * 3, (0.25,) * 3)
    state = {"config": to_dict(config), "class_names": names, "mean": [0.5] * 3, "std": [0.25] * 3, "stage": stage,
             "epoch": epoch, "weights": model.state_dict()}  # fmt: skip
    checkpoint.save(run.checkpoints / "best.pt", state)
    if judged:
        specs = [parse_attack(text, default_eps=8 / 255) for text in config.eval.attacks]
        evaluate(model, ResidentSplit(images.test, CPU), specs, num_classes=len(names), batch_size=60, seed=0,
                 about={"stage": stage, "epoch": epoch}, out=run.path / "eval")  # fmt: skip
    return run


def report(run, images, limit=16):
    trained = load_trained(run.path, CPU)
    out = build_report(trained, run, images, out=run.path / "report.html", limit=limit, device=CPU)
    return out.read_text(encoding="utf-8"), trained


@pytest.fixture(scope="module")
def full(images, tmp_path_factory):
    config = config_for(stage2="alf")
    rows = rows_for(config) + rows_for(config, stage=2, robust=(30, None, 35))
    run = make_run(tmp_path_factory.mktemp("runs") / "two stages", images, config, rows, stage=2, epoch=3)
    text, trained = report(run, images)
    return SimpleNamespace(text=text, page=Page(text), run=run, trained=trained)


def test_page_has_all_sections_and_needs_nothing_from_outside(full):
    assert full.page.headings == SECTIONS
    assert "http" not in full.text.replace("http-equiv", "") and "//" not in re.sub(r"base64,[^\"]*", "", full.text)
    names = {tag for tag, _ in full.page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base"}
    for _, attributes in full.page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert len(full.text) < 2_500_000
    assert re.search(r"\bnan\b|\binf\b", full.text, re.IGNORECASE) is None
    assert not list(full.run.path.glob("*.tmp"))


def test_ids_are_unique_and_every_reference_has_its_target(full):
    ids = [attributes["id"] for _, attributes in full.page.tags if "id" in attributes]
    assert ids and len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', full.text))
    assert wanted and wanted <= set(ids)


def test_headline_states_each_attack_in_full(full):
    (result,) = [json.loads(path.read_text()) for path in (full.run.path / "eval").glob("*.json")]
    conditions = f"eps 8/255, step 2/255, uniform start, 1 restart, n = {result['count']}"
    assert f"PGD-3{result['robust_accuracy']:.1f} %{conditions}" in full.page.text
    assert f"clean{result['clean_accuracy']:.1f} %no attack" in full.page.text
    assert "best.pt: stage 2, epoch 3" in full.page.text
    medians = "median 2.00 s an epoch in stage 1, 2.00 s an epoch in stage 2"
    assert f"14.0 s for 7 epochs, {medians}; validation 3.0 s more" in full.page.text
    assert "two stages" in full.page.text
    assert "fastanchor train '" in html.unescape(full.text)  # the path has a space


def test_two_stages_are_told_apart(full, images):
    assert "chosen: stage 2, epoch 3" in full.page.text
    assert "Shaded: stage 2" in full.page.text
    assert gap_sentence(full.run.history(), 1, len(images.val)) in full.page.text
    assert "Stage 2: validation robust accuracy was highest after epoch 3, 35.0 %, the last one validated" in full.page.text


def test_figures_follow_the_pgd_at_the_recipe_s_eps_not_the_mildest(full, images, tmp_path):
    config = full.trained.config
    specs = [parse_attack(text, default_eps=config.attack.eps) for text in ("pgd2:eps=0.001", "pgd2", "pgd1")]
    out = shutil.copytree(full.run.path, tmp_path / "run")
    shutil.rmtree(out / "eval")
    about = {"stage": full.trained.state["stage"], "epoch": full.trained.state["epoch"]}
    data = ResidentSplit(images.test.subset(40), CPU)
    evaluate(full.trained.model, data, specs, num_classes=10, batch_size=40, seed=0, about=about, out=out / "eval")
    for spec, robust in zip(specs, (90.0, 30.0, 40.0), strict=True):  # figures as a trained model would have them
        path = out / "eval" / f"{spec.key()}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"robust_accuracy": robust}))
    text, _ = report(RunDir(out), images, limit=12)
    captions = [caption for caption in re.findall(r"Attack: (PGD[^)]*\))", text) if caption]
    assert captions and {caption.split(" (")[1] for caption in captions} == {specs[1].describe().split(" (")[1]}


def test_gap_sentence():
    rows = rows_for(config_for(), robust=(20, 50.4, 50.4, None, 38.25, math.nan))
    sentence = gap_sentence(rows, 1, 10_000)
    # Epochs 2 and 3 tie in robust accuracy, the later one has the higher clean accuracy
    assert "highest after epoch 3, 50.4 %, and 38.2 % after the last, epoch 5" in sentence
    assert sentence.endswith("a gap of 12.1 points, robust overfitting.")
    error = 100 * math.sqrt((0.504 * 0.496 + 0.3825 * 0.6175) / 20)
    assert f"within the noise of 20 images (standard error of the gap at most {error:.1f} points)" in gap_sentence(rows, 1, 20)
    assert gap_sentence(rows, 2, 20) is None
    assert gap_sentence(rows_for(config_for(), robust=(None, None)), 1, 20) is None


def speeds(rows, seconds, first_step=None):
    """The rows as measured by a version that meters them: epochs of the given seconds, of 3,000 images and 6 TFLOP each."""
    for epoch, (row, s) in enumerate(zip(rows, seconds, strict=True)):
        row |= {"seconds": s, "images_per_s": 3000 / s, "tflops": 6 / s, "share_of_bf16_matmul": 0.6 / s,
                "peak_memory_mb": 1234.4 + epoch}  # fmt: skip
        if epoch == first_step:
            row["first_step_s"] = 7.25
    return rows


def cells(section):
    """The table's text by its row's name."""
    rows = re.findall(r"<tr>(.*?)</tr>", section)
    return {found[0]: found[1:] for row in rows if (found := re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row))}


def test_speed_leaves_out_the_epochs_of_warming_up(full):
    rows = speeds(rows_for(config_for()), (9.0, 2.0, 1.5, 1.0), first_step=0)
    assert cells(speed_section(rows, "some device")) == {
        "": ["stage 1"],
        "time an epoch": ["1.50 s"],
        "images a second": ["2,000"],
        "model TFLOP/s": ["4.00"],
        "share of bf16 matmul": ["40 %"],
        "peak memory": ["1,237 MB"],
        "time to first step": ["7.25 s"],
    }
    assert "Device: some device." in speed_section(rows, "some device")
    assert seconds_an_epoch(rows) == "1.50 s an epoch"
    # Resumed for the second epoch, and again for the fourth: both warmed up anew.
    resumed = speeds(rows_for(config_for()), (9.0, 8.0, 1.5, 7.0), first_step=1)
    resumed[3]["first_step_s"] = 8.0
    assert cells(speed_section(resumed, ""))["time an epoch"] == ["1.50 s"]
    assert cells(speed_section(resumed, ""))["time to first step"] == ["7.25 s"]
    # One epoch is all there is, and better than none.
    assert cells(speed_section(rows[:1], ""))["time an epoch"] == ["9.00 s"]


def test_speed_of_two_stages():
    first = speeds(rows_for(config_for()), (9.0, 2.0, 1.5, 1.0), first_step=0)
    second = speeds(rows_for(config_for(), stage=2, robust=(30, 35)), (4.0, 0.75))
    table = cells(speed_section(first + second, "some device"))
    assert table[""] == ["stage 1", "stage 2"]
    assert table["time an epoch"] == ["1.50 s", "0.750 s"]
    assert table["time to first step"] == ["7.25 s", ""]
    # Of a machine that was busy while its ceiling was measured, the second stage goes past it.
    passed = speed_section(first + [row | {"share_of_bf16_matmul": 1.4} for row in second], "some device")
    assert cells(passed)["share of bf16 matmul"] == ["40 %", "passed"] and "Passed: the ceiling was" in passed
    assert "Passed" not in speed_section(first + second, "some device")
    assert seconds_an_epoch(first + second) == "1.50 s an epoch in stage 1, 0.750 s an epoch in stage 2"


def test_speed_of_runs_that_logged_less():
    old = rows_for(config_for())
    assert speed_section(old, "") == speed_section([], "") == ""
    partly = [row | {"tflops": value} for row, value in zip(old, (1.0, math.nan, 3.0, 3.0), strict=True)]
    assert cells(speed_section(partly, "")) == {"": ["stage 1"], "time an epoch": ["2.00 s"], "model TFLOP/s": ["3.00"]}


def test_report_shows_the_speed_where_it_was_logged(images, tmp_path):
    config = config_for()
    rows = speeds(rows_for(config), (9.0, 2.0, 1.5, 1.0), first_step=0)
    run = make_run(tmp_path / "run", images, config, rows, judged=False)
    env = json.loads((run.path / "env.json").read_text())
    (run.path / "env.json").write_text(json.dumps(env | {"device": "<b>a device"}))
    text = report(run, images)[0]
    page = Page(text)
    assert page.headings == [*SECTIONS[:-1], "Speed", SECTIONS[-1]]
    assert cells(text)["model TFLOP/s"] == ["4.00"] and "Device: <b>a device." in page.text
    assert "13.5 s for 4 epochs, median 1.50 s an epoch" in page.text


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.01234, "0.0123"), (1, "1.00"), (43.14, "43.1"), (999.4, "999"), (35.26, "35.3"), (12345.6, "12,346")],
)
def test_three_digits(value, text):
    assert three_digits(value) == text


def test_confidence_and_difference_are_those_of_the_model(full, images):
    spec = parse_attack("pgd3", default_eps=8 / 255)
    attacked = inspection.attack_images(full.trained.model, images.test, spec, limit=16, device=CPU)
    model = full.trained.model.eval()
    with torch.no_grad():
        expected = model(attacked.adversarial).softmax(1)
    torch.testing.assert_close(attacked.adversarial_probabilities, expected)
    assert (attacked.adversarial - attacked.clean).abs().max() <= spec.eps + 1e-6
    chosen = inspection.pick_examples(attacked, 8)
    assert len(set(chosen)) == 8
    factor = inspection.difference_factor(spec, attacked.adversarial - attacked.clean)
    assert factor == 15  # 0.5 / (8 / 255) = 15.9, rounded down to two digits
    pictures = [a["src"] for tag, a in full.page.tags if tag == "img"]
    assert len(pictures) == 24
    labels = re.findall(r"(✗ )?(template \d) · (\d+) %", full.page.text)
    for place, i in enumerate(chosen):
        for row, probabilities in enumerate((attacked.clean_probabilities[i], attacked.adversarial_probabilities[i])):
            wrong, name, percent = labels[2 * place + row]
            assert name == images.class_names[probabilities.argmax()]
            assert bool(wrong) == (int(probabilities.argmax()) != int(attacked.labels[i]))
            assert int(percent) == round(100 * float(probabilities.max()))
        data = base64.b64decode(pictures[3 * place + 2].partition(",")[2])
        shown = np.asarray(Image.open(io.BytesIO(data)))
        direct = 0.5 + factor * (attacked.adversarial[i] - attacked.clean[i])
        direct = (direct.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        assert shown.shape == (128, 128, 3)
        assert (shown == direct.repeat(4, 0).repeat(4, 1)).all()


def test_difference_factor_of_other_attacks():
    difference = torch.full((1, 3, 2, 2), -0.02)
    assert inspection.difference_factor(parse_attack("pgd3:norm=l2", default_eps=0.5), difference) == pytest.approx(25)
    assert inspection.difference_factor(parse_attack("pgd3", default_eps=0.1), difference) == pytest.approx(5)
    assert inspection.difference_factor(parse_attack("pgd3", default_eps=0.0), difference) == 1
    grey = inspection.difference_image(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), 0)
    assert (grey == 0.5).all()


def test_examples_mix_fooled_and_held_images_over_classes():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    right, wrong = torch.eye(3)[labels], torch.eye(3)[(labels + 1) % 3]
    held = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 1, 0]).bool()
    pixels = torch.zeros(10, 3, 2, 2)
    adversarial = torch.where(held[:, None], right, wrong)
    right[2] = wrong[2]  # misclassified already without an attack
    attacked = inspection.Attacked(pixels, pixels, pixels, labels, right, adversarial, parse_attack("pgd3", default_eps=0.1))
    assert inspection.pick_examples(attacked, 4) == [1, 5, 0, 4]
    assert inspection.pick_examples(attacked, 6) == [1, 5, 9, 0, 4, 8]
    assert sorted(inspection.pick_examples(attacked, 10)) == list(range(10))
    assert inspection.pick_examples(attacked, 10)[-1] == 2


def test_curve_agrees_with_attacks_run_one_by_one(full, images):
    model, attack = full.trained.model, parse_attack("pgd3", default_eps=8 / 255)
    attacked = inspection.attack_images(model, images.test, attack, limit=40, device=CPU)
    curve = inspection.accuracy_against_eps(model, attacked)
    assert curve.count == 40 and len(curve.eps) == 8
    assert curve.eps[3] == attack.eps and curve.eps[-1] == pytest.approx(32 / 255) and curve.limitless == 0.5
    assert list(curve.accuracy) == sorted(curve.accuracy, reverse=True)
    assert curve.accuracy[0] == pytest.approx(100 * attacked.clean_correct.double().mean())
    assert curve.accuracy[3] <= 100 * attacked.robust.double().mean() + 1e-9
    x_adv = attack.with_eps(32 / 255).build()(model, attacked.clean, attacked.labels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        held = attacked.clean_correct & (model(x_adv).argmax(1) == attacked.labels)
    assert curve.accuracy[-1] <= 100 * held.double().mean() + 1e-9


class Masked(torch.nn.Module):
    """Always right on these images, and flat: what gradient masking looks like in the extreme."""

    def forward(self, images):
        bright = images.mean(dim=(1, 2, 3)) > 0.5
        return torch.nn.functional.one_hot(bright.long(), 2) * 9.0 + (0 * images).sum(dim=(1, 2, 3))[:, None]


def test_masking_check_finds_a_model_without_gradients():
    labels = torch.arange(20) // 10
    pixels = (labels * 255).byte()[:, None, None, None].expand(20, 4, 4, 3)
    model, attack = Masked(), parse_attack("pgd3", default_eps=8 / 255)
    split = Split(pixels, labels)
    curve = inspection.accuracy_against_eps(model, inspection.attack_images(model, split, attack, limit=20, device=CPU))
    passed, sentence = inspection.masking_check(curve)
    assert curve.limitless_accuracy > 5 and not passed
    assert sentence.startswith(f"Warning: {curve.limitless_accuracy:.1f} % of the images still hold at eps = 0.5")
    assert inspection.masking_check(dataclasses.replace(curve, accuracy=(4.0,) * 8))[1].startswith("Nothing to check")
    passed, sentence = inspection.masking_check(dataclasses.replace(curve, limitless_accuracy=0.0))
    assert passed and sentence.startswith("Check passed")


def test_report_leaves_model_and_random_state_as_they_were(full, images, tmp_path):
    model = full.trained.model
    model.train()
    model.backbone.eval()
    flags = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    import matplotlib

    settings = dict(matplotlib.rcParams)
    build_report(full.trained, full.run, images, out=tmp_path / "a.html", limit=16, device=CPU)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    assert dict(matplotlib.rcParams) == settings
    model.eval()
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == full.text  # the same run, the same page


def test_hostile_names_are_escaped(images, tmp_path):
    names = [HOSTILE, "$\\bad{$", *(f"c{i}" for i in range(2, 10))]
    config = config_for()
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", images, config, rows_for(config), class_names=images.class_names)
    env = json.loads((run.path / "env.json").read_text())
    (run.path / "env.json").write_text(json.dumps(env | {"command": "x '</pre><script>'", "device": "</style><b>"}))
    trained = dataclasses.replace(load_trained(run.path, CPU), class_names=tuple(names))
    out = build_report(trained, run, images, out=tmp_path / "r.html", limit=20, device=CPU)
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and "<img src=x" not in text and "<b>0" not in text
    assert clean_text(HOSTILE) in page.text
    assert page.text.count("$\\bad{$") >= 3  # grid, bars and map: never read as a formula
    assert '<script>alert("x"…' in page.text  # the figures' short form
    assert "\x00" not in text and page.headings == SECTIONS


def test_standard_training_with_identity_head_and_no_evaluation(images, tmp_path):
    config = config_for(method="standard", head="identity")
    run = make_run(tmp_path / "run", images, config, rows_for(config, robust=(None, 3, None, 2)), judged=False)
    text, _ = report(run, images)
    page = Page(text)
    assert page.headings == SECTIONS
    assert "No evaluation of this checkpoint is stored yet" in page.text
    assert "robust, validation3.0 %PGD-2 (eps 8/255" in page.text
    assert "backbone's features" in page.text and "projection head's output" not in page.text
    assert "robust, train" not in page.text and "clean, train" in page.text
    assert "evaluated: eps 8/255" in page.text and "training and evaluation" not in page.text


def test_run_without_any_epoch_or_validation(images, tmp_path):
    config = config_for()
    run = make_run(tmp_path / "none", images, config, [], judged=False)
    assert "No epochs are logged." in Page(report(run, images)[0]).text
    run = make_run(tmp_path / "one", images, config, rows_for(config, robust=(None,)), judged=False)
    page = Page(report(run, images)[0])
    assert page.headings == SECTIONS and "highest after" not in page.text


def test_evaluations_of_another_checkpoint_are_not_shown(images, tmp_path):
    config = config_for()
    run = make_run(tmp_path / "run", images, config, rows_for(config))
    (path,) = (run.path / "eval").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epoch": 4}))
    assert "No evaluation of this checkpoint is stored yet" in Page(report(run, images)[0]).text


def test_bars_of_many_classes_show_the_best_and_worst_ten(images, tmp_path):
    many = dataclasses.replace(images, class_names=tuple(f"k{i:02d}." for i in range(30)))
    config = config_for()
    run = make_run(tmp_path / "run", many, config, rows_for(config))
    (path,) = (run.path / "eval").glob("*.json")
    result = json.loads(path.read_text())
    result["robust_per_class"] = [float(i) for i in range(29)] + [None]
    result["clean_per_class"] = [50.0] * 29 + [None]
    path.write_text(json.dumps(result))
    page = Page(report(run, many)[0])
    section = page.text[page.text.index("Best class") : page.text.index("Mean cosine")]
    shown = set(re.findall(r"k(\d\d)\. ?", section))
    assert shown == {f"{i:02d}" for i in [*range(10), *range(19, 29)]}
    assert "Best class: k28. at 28.0 % robust accuracy; worst: k00. at 0.0 %, 28.0 points apart." in section
    assert "The ten best and the ten worst of 29 classes" in section


def test_collapsed_embeddings_are_said(full, images):
    attack = parse_attack("pgd1", default_eps=0.1)
    attacked = inspection.attack_images(full.trained.model, images.test, attack, limit=16, device=CPU)

    class Collapsed(torch.nn.Module):
        def features(self, images):
            return torch.ones(len(images), 4)

    mapped = inspection.map_embeddings(Collapsed(), attacked, projected=False, augmentation="crop", pad=2)
    assert mapped.points is None and mapped.similarity["adversarial"] == pytest.approx(1)


def test_large_images_are_thinned_not_blurred():
    pixels = torch.rand(3, 300, 200)
    source = re.search(r"base64,([^\"]+)", image(pixels, "x")).group(1)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
    assert (shown == (pixels[:, ::3, ::3] * 255).round().byte().permute(1, 2, 0).numpy()).all()


def test_report_attack_keeps_radius_and_is_stated_in_full():
    long = parse_attack("pgd50:eps=0.031,step_size=0.001,restarts=5,start=zero", default_eps=1)
    assert inspection.report_attack(long).describe() == "PGD-10 (eps 0.031, step 0.00775, no random start, 1 restart)"
    short = parse_attack("pgd5:step_size=0.01", default_eps=8 / 255)
    assert inspection.report_attack(short) == short


def test_colours_follow_the_theme():
    drawn = figures.curves([figures.Line([1, 2], [10, 20], "a", figures.CLEAN)], title="t", xlabel="x", ylabel="y", name="n")
    assert "var(--clean)" in drawn and "var(--ink)" in drawn
    assert not re.search(r"#[0-9a-f]{6}", drawn)
    assert len(set(figures.LIGHT.values())) == len(figures.LIGHT)


def test_bad_input(full, images, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"limit = 0: must be >= 1"):
        build_report(full.trained, full.run, images, out=tmp_path / "r.html", limit=0, device=CPU)
    fewer = dataclasses.replace(images, class_names=images.class_names[:3])
    with pytest.raises(UserError, match=r"the model has 10 classes, synthetic has 3"):
        build_report(full.trained, full.run, fewer, out=tmp_path / "r.html", device=CPU)
    with pytest.raises(UserError, match=r"nowhere.*cannot be written \(No such file"):
        build_report(full.trained, full.run, images, out=tmp_path / "nowhere" / "r.html", limit=4, device=CPU)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'^figures need matplotlib: pip install "fastanchor\[plots\]"$'):
        build_report(full.trained, full.run, images, out=tmp_path / "r.html", device=CPU)
