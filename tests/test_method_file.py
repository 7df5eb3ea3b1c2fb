"""A method of one's own: the file of docs/adding-a-method.md, followed as it stands, and what may go wrong with such a file."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastanchor import cli, methods
from fastanchor.config import Config
from fastanchor.errors import UserError
from fastanchor.methods import build_method, method_class, title_of
from fastanchor.settings import from_dict, parse_flags, to_dict
from fastanchor.train import checkpoint
from fastanchor.train.checks import check_config
from fastanchor.train.run import RunDir, load_trained

DOCS = (Path(__file__).parent.parent / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
COMMAND = re.search(r"^fastanchor (train .*--method alp.py.*)$", DOCS, re.MULTILINE)[1].split()
SMALL = ["--data.limit", "60", "--attack.steps", "1", "--model.width", "4", "--batch-size", "20", "--val.attack", "pgd1",
         "--eval.attacks", "pgd1", "--eval.report-images", "8", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to stand in, with the documentation's file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "_files", {})
    (tmp_path / "alp.py").write_text(CODE, encoding="utf-8")
    return tmp_path


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


def test_the_documented_command_trains_resumes_and_is_judged_without_the_file(here, monkeypatch, capsys):
    assert cli.main([*COMMAND, *SMALL, "--out", "run"]) == 0
    rows = RunDir("run").history()
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all({"loss_ce_adv", "loss_pairing", "accuracy_aug", "accuracy_adv"} <= row.keys() for row in rows)
    config = RunDir("run").open()
    assert (config.method, config.loss.pairing, title_of(config)) == ("alp.py", 0.3, "ALP")

    whole = checkpoint.load(Path("run/checkpoints/last.pt"))["weights"]
    (here / "run/checkpoints/last.pt").unlink()  # what a kill after the first epoch leaves
    assert cli.main(["train", "--resume", "run"]) == 0
    again = checkpoint.load(Path("run/checkpoints/last.pt"))["weights"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    (here / "alp.py").unlink()
    monkeypatch.setattr(methods, "_files", {})
    assert load_trained("run", torch.device("cpu")).config.method == "alp.py"
    assert cli.main(["eval", "run", "--attack", "pgd1"]) == 0
    assert cli.main(["report", "run"]) == 0
    assert "ALP, resnet18" in (here / "run" / "report.html").read_text()
    assert cli.main(["train", "--resume", "run"]) == 2
    (here / "alp.py").write_text(CODE + "\n# another method\n")
    assert cli.main(["train", "--resume", "run"]) == 2
    assert "alp.py is not what the run began with, which is run/method.py" in capsys.readouterr().err


def test_its_loss_is_the_documented_formula(here):
    config = parse_flags(["--method", "alp.py", "--loss.pairing", "2"], Config())
    method = build_method(config)
    generator = torch.Generator().manual_seed(0)
    clean, adversarial = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 0, 1])
    terms = method.loss(methods.Outputs({"aug": clean, "adv": adversarial}, {}), labels, torch.zeros(()))
    crossed = paired = 0.0
    for x, z, y in zip(clean.tolist(), adversarial.tolist(), labels.tolist(), strict=True):
        total = sum(2.718281828459045**value for value in z)
        crossed -= torch.tensor(2.718281828459045 ** z[y] / total).log().item() / 5
        paired += 2 * sum((a - b) ** 2 for a, b in zip(x, z, strict=True)) / 5
    assert terms["ce_adv"].item() == pytest.approx(crossed, rel=1e-6)
    assert terms["pairing"].item() == pytest.approx(paired, rel=1e-12)


def test_settings_of_a_file_are_typed_and_ranged(here):
    config = parse_flags(["--method", "alp.py"], Config())
    assert message_of(parse_flags, ["--loss.pairing", "-1"], config) == "loss.pairing = -1: must be >= 0"
    message = message_of(parse_flags, ["--loss.beta", "1"], config)
    assert message == "unknown setting loss.beta = 1; the method alp.py has loss.pairing"
    assert from_dict(to_dict(config), "again") == config
    changed = dataclasses.replace(config, method="anchor")
    assert message_of(check_config, changed).startswith("method = anchor: loss holds another method's settings")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "method = my.py: no such file"),
        ("x = 1", "method = my.py: must define one subclass of fastanchor.methods.Method, has 0"),
        (CODE + "\n\nclass Second(LogitPairing):\n    pass\n",
         "method = my.py: must define one subclass of fastanchor.methods.Method, has 2"),
        ("import sys\nsys.exit(3)", "method = my.py: the file cannot be run: SystemExit: 3"),
        (CODE.replace("@dataclass(frozen=True)\n", ""), "method = my.py: Settings must be a frozen dataclass"),
        (CODE.replace("Number = 0.5", "Number"), "method = my.py: pairing of Settings must have a default"),
        (CODE.replace("def loss", "def lost"), "method = my.py: LogitPairing must define loss(self, out, labels, progress)"),
        ("def f(:", "method = my.py: the file cannot be run: SyntaxError: "),
        ("import nothing_of_this_name", "method = my.py: the file cannot be run: ModuleNotFoundError: "),
    ],
)  # fmt: skip
def test_bad_files_are_one_sentence(here, text, message):
    if text is not None:
        (here / "my.py").write_text(text, encoding="utf-8")
    assert message_of(method_class, "my.py").startswith(message)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('views = ("aug", "adv")', 'views = ("aug", "adv", "foo")', "nothing makes the view 'foo'; there are aug, adv"),
        ('"pairing": self', '"pairing": 0.5, "other": self', "the term 'pairing' of its loss is float, must be a 0-d tensor"),
        (".sum(1).mean()", ".sum(1)", "the term 'pairing' of its loss is a tensor of shape (20,), must be a 0-d tensor"),
        ("        return {\n            \"ce", "        if True:\n            return None\n        return {\n            \"ce",
         "loss returns NoneType, must be a dict of terms"),
    ],
)  # fmt: skip
def test_what_a_method_returns_is_looked_at_and_the_folder_is_free_again(here, capsys, old, new, message):
    assert old in CODE
    (here / "alp.py").write_text(CODE.replace(old, new, 1), encoding="utf-8")
    assert cli.main([*COMMAND, *SMALL, "--epochs", "1", "--out", "run"]) == 2
    assert f"method = alp.py: {message}" in capsys.readouterr().err
    assert RunDir("run").is_blank()


def test_help_shows_the_settings_of_the_method_that_is_asked_for(here, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "pgd_at", "--method", "alp.py", "--help"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "--loss.pairing" in text and "squared distance between" in text and "--loss.ce-adv" not in text


def test_a_wrong_name_is_told_with_the_nearest():
    message = message_of(method_class, "tradse")
    assert message.startswith("method = tradse: must be one of advcl, anchor, ") and message.endswith("did you mean 'trades'?")


def test_a_file_with_annotations_as_text_is_read(here):
    (here / "text.py").write_text(CODE.replace("from dataclasses", "from __future__ import annotations\n\nfrom dataclasses", 1))
    assert parse_flags(["--method", "text.py", "--loss.pairing", "3"], Config()).loss.pairing == 3


def test_more_views_than_a_feed_makes_are_refused(here):
    (here / "four.py").write_text(CODE.replace('views = ("aug", "adv")', 'views = ("clean", "weak", "aug", "aug2", "adv")'))
    message = message_of(check_config, parse_flags(["--method", "four.py"], Config()))
    assert message == "method = four.py: takes 4 views of the data (clean, weak, aug, aug2): 3 at most"


def test_a_checkpoint_cannot_name_a_file_to_run(tmp_path, tiny_run):
    """config.yaml is the user's own, checkpoints are handed around."""
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    state = checkpoint.load(path)
    state["config"] |= {"method": str(tmp_path / "evil.py")}
    checkpoint.save(path, state)
    load_trained(path, torch.device("cpu"))
    checkpoint.save(path.with_name("last.pt"), state | {"optimizer": {}})
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "ran").exists()
