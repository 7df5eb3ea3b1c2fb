"""Bad input on the command line: exit status 2 and one line on stderr that names what is wrong; and the commands that print."""

import json
import re
import shutil

import pytest
import torch

from fastanchor import __version__
from fastanchor.cli import COMMANDS, main
from fastanchor.precision import NO_FP16


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """A function that runs a command in an empty folder and returns its one line, without the `fastanchor: error: `."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*argv):
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert status == 2, (out, err)
        assert err.startswith("fastanchor: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert not list(work.iterdir())  # a refused command leaves nothing behind
        return err.removeprefix("fastanchor: error: ").rstrip("\n")

    return run


# -- commands and flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word, nearest", [("trian", "train"), ("evaluate", "eval"), ("docter", "doctor"), ("zzz", None)])
def test_unknown_command(refused, word, nearest):
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    assert refused(word, "x") == f"unknown command {word!r}{hint}; commands: {', '.join(COMMANDS)}"


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], f"the following arguments are required: {' | '.join(COMMANDS)} (see fastanchor --help)"),
        (["--frobnicate"], f"the following arguments are required: {' | '.join(COMMANDS)} (see fastanchor --help)"),
        (["train"], "train needs a RECIPE, or --resume RUN (see fastanchor train --help)"),
        (["train", "--epochs", "3"], "train needs a RECIPE, or --resume RUN (see fastanchor train --help)"),
        (["train", "anchor", "extra"], "unrecognized arguments: extra (see fastanchor --help)"),
        (["train", "anchor", "--out"], "argument --out: expected one argument (see fastanchor train --help)"),
        (["train", "anchor", "--attack.epz", "0.1"], "unknown setting attack.epz = 0.1; did you mean 'attack.eps'?"),
        (["train", "anchor", "--epoch=3"], "unknown setting epoch = 3; did you mean 'epochs'?"),
        (["train", "anchor", "--epochs", "x"], "epochs = x: must be a whole number"),
        (["train", "anchor", "--epochs", "0"], "epochs = 0: must be >= 1"),
        (["train", "anchor", "--limit", "0"], "data.limit = 0: must be >= 1"),
        (["train", "anchor", "--limit", "many"], "data.limit = many: must be a whole number or None"),
        (["train", "anchor", "--attack.eps", "8/0"], "attack.eps = 8/0: must be a number, such as 0.1 or 8/255"),
        (["train", "anchor", "--attack.eps=-1"], "attack.eps = -1: must be >= 0"),
        (["train", "anchor", "--skip-broken", "yes"], "data.skip_broken = yes: takes no value; "
                                                      "write --data.skip-broken or its no- form"),
        (["train", "anchor", "--precision", "fp16"], f"precision = fp16: must be one of fp32, bf16; {NO_FP16}"),
        (["train", "anchor", "--loss.hsc", "0", "--attack.objective", "hsc"],
         "attack.objective = hsc: needs loss.hsc > 0, the attack would have nothing to maximise"),
        (["train", "anchor", "--device", "gpu"], "device = 'gpu': must be auto, cpu, cuda or cuda:N"),
        (["train", "anchor", "--device", "mps"], "device = 'mps': must be auto, cpu, cuda or cuda:N"),
        (["train", "anchor", "--no-epochs"], "unknown setting no_epochs; did you mean 'epochs'?"),
        (["eval"], "the following arguments are required: RUN|CHECKPOINT (see fastanchor eval --help)"),
        (["eval", "x", "--atack", "fgsm"], "unrecognized arguments: --atack fgsm (see fastanchor --help)"),
        (["eval", "x", "--limit", "y"], "argument --limit: invalid int value: 'y' (see fastanchor eval --help)"),
        (["attack", "x"], "the following arguments are required: --out (see fastanchor attack --help)"),
        (["report"], "the following arguments are required: RUN (see fastanchor report --help)"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn (see fastanchor --help)"),
        (["compare"], "compare needs a PLAN (see fastanchor compare --help)"),
    ],
)  # fmt: skip
def test_bad_command_lines(refused, argv, message):
    assert refused(*argv) == message


def test_unknown_recipe(refused):
    message = refused("train", "ancor")
    assert message.startswith("recipe 'ancor' is not known; did you mean 'anchor'?; recipes: advcl_resnet18_cifar10, ")
    assert refused("train", "--help", "ancor") == message


def test_bad_recipe_file(refused, tmp_path):
    path = tmp_path / "own.yaml"
    assert refused("train", path) == f"{path}: no such file"
    path.write_text("epochs: many\n")
    assert refused("train", path) == f"{path}: epochs = many: must be a whole number"
    path.write_bytes(b"\x00\x01\x02")
    assert refused("train", path).startswith(f"{path}: not valid YAML: unacceptable character #x0000")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(refused):
    assert refused("train", "anchor", "--device", "cuda") == "device = 'cuda': this machine has 0 CUDA devices"


# -- train ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [["--epochs", "3"], ["--out", "x"], ["--data", "digits"]])
def test_resume_takes_no_settings(refused, tiny_run, extra):
    written = "--data.source" if extra[0] == "--data" else extra[0]
    assert refused("train", "--resume", tiny_run, *extra) == f"--resume takes everything from the run; leave out {written}"
    assert refused("train", "anchor", "--resume", tiny_run) == "--resume takes everything from the run; leave out anchor"


def test_resume_of_what_is_no_run(refused, tmp_path):
    assert refused("train", "--resume", tmp_path / "no") == f"{tmp_path / 'no'}: not a run: it has no config.yaml"
    assert refused("train", "--resume", tmp_path) == f"{tmp_path}: not a run: it has no config.yaml"
    (tmp_path / "config.yaml").write_text("epochs: [")
    assert refused("train", "--resume", tmp_path).startswith(f"{tmp_path / 'config.yaml'}: not valid YAML in line 1: ")


def test_train_never_overwrites(refused, tiny_run, tmp_path):
    argv = ["train", "standard", "--data", "synthetic", "--limit", "40", "--model.width", "4"]
    message = refused(*argv, "--out", tiny_run)
    assert message == (
        f"{tiny_run}: exists and is not empty, and a run never overwrites one; to go on with it: fastanchor train --resume {tiny_run}"
    )
    (tmp_path / "file").write_text("mine")
    assert refused(*argv, "--out", tmp_path / "file") == (
        f"{tmp_path / 'file'}: exists and is not empty, and a run never overwrites one"
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("cifar11", r"data source 'cifar11' is unknown, and must be one of digits, .*; did you mean 'cifar10'\?"),
        ("folder:{}/no", r"'.*/no/train' is not there: an image folder has train/CLASS/"),
        ("npz:{}/no.npz", r"'.*/no\.npz' cannot be read as \.npz data: No such file or directory"),
    ],
)
def test_data_errors_reach_the_command_line(refused, tmp_path, source, expected):
    assert re.match(expected, refused("train", "anchor", "--data", source.format(tmp_path)))


def test_missing_archive_and_settings_of_the_data(refused, tmp_path):
    assert str(tmp_path) in refused("train", "anchor", "--data", "cifar10", "--data.root", tmp_path)
    assert "image_size is 32" in refused("train", "anchor", "--data", "digits", "--data.image-size", "32")
    assert "limit is 3" in refused("train", "anchor", "--data", "synthetic", "--limit", "3")


# -- eval, attack, report ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["eval"], ["attack", "--out", "x"]])
def test_model_that_is_not_there(refused, tmp_path, command):
    name, *rest = command
    missing = tmp_path / "no"
    assert refused(name, missing, *rest) == f"{missing}: no such run or checkpoint"
    assert refused(name, tmp_path, *rest) == f"{tmp_path}: not a run: it has no config.yaml"
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    assert refused(name, tmp_path / "x.pt", *rest).startswith(f"{tmp_path / 'x.pt'}: not a whole checkpoint (16 bytes")


def test_run_without_a_checkpoint_yet(refused, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.pt"))
    assert refused("eval", tmp_path / "run") == f"{tmp_path / 'run' / 'checkpoints' / 'best.pt'}: no such run or checkpoint"


@pytest.mark.parametrize("command", [["eval"], ["attack", "--out", "x"]])
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--eps", "x"], "--eps = x: must be a number, such as 0.031 or 8/255"),
        (["--eps", "1/0"], "--eps = 1/0: must be a number, such as 0.031 or 8/255"),
        (["--eps=-0.1"], "--eps = -0.1: must be >= 0"),
        (["--eps", "inf"], "--eps = inf: must be >= 0"),
        (["--limit", "0"], "--limit = 0: must be >= 1"),
        (["--limit", "-5"], "--limit = -5: must be >= 1"),
        (["--device", "tpu"], "device = 'tpu': must be auto, cpu, cuda or cuda:N"),
        (["--data", "digit"], "data source 'digit' is unknown, and must be one of digits, cifar10, cifar100, cifar100:coarse, folder:PATH, packed:PATH, npz:PATH, "
                              "synthetic; did you mean 'digits'?"),
        (["--attack", "pgd20:eps=inf"], "attack 'pgd20:eps=inf': eps = inf: must be >= 0"),
        (["--attack", "pgd20:norm=l1"], "attack 'pgd20:norm=l1': norm = 'l1': must be one of linf, l2"),
    ],
)  # fmt: skip
def test_bad_flags_of_eval_and_attack(refused, tiny_run, command, flags, message):
    name, *rest = command
    assert refused(name, tiny_run, *rest, "--data", "synthetic", *flags) == message


def test_unknown_attack_names_the_nearest(refused, tiny_run):
    message = refused("eval", tiny_run, "--data", "synthetic", "--attack", "fgsm", "--attack", "pdg20")
    assert message.startswith("attack 'pdg20': 'pdg20' is not known; did you mean 'pgd20'?; write fgsm, pgdN, cwN (N steps)")
    message = refused("attack", tiny_run, "--data", "synthetic", "--out", "x", "--attack", "autoattack")
    assert message == "attack autoattack: it is an evaluation; use fastanchor eval, or pgdN, cwN, fgsm here"


def test_eval_flags_of_its_own(refused, tiny_run):
    assert refused("eval", tiny_run, "--data", "synthetic", "--batch-size", "0") == "--batch-size = 0: must be >= 1"


def test_data_of_other_classes(refused, tiny_run, tmp_path):
    import numpy as np

    images, labels = np.zeros((30, 8, 8, 3), np.uint8), np.arange(30) % 3
    np.savez(tmp_path / "three.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    message = refused("eval", tiny_run, "--data", f"npz:{tmp_path / 'three.npz'}")
    assert re.search(r"the model has 10 classes, npz:.*three\.npz has 3$", message)


def test_attack_writes_into_no_full_folder(refused, tiny_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    argv = ["attack", tiny_run, "--data", "synthetic", "--limit", "10", "--attack", "fgsm", "--out", tmp_path / "full"]
    assert refused(*argv) == f"{tmp_path / 'full'}: exists and is not empty"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_report_of_what_is_no_run(refused, tmp_path):
    assert refused("report", tmp_path) == f"{tmp_path}: not a run: it has no config.yaml"


# -- compare ----------------------------------------------------------------------------------------------------------------

RUN = "runs: [{name: a, recipe: standard}]"


@pytest.mark.parametrize(
    "plan, message",
    [
        ("", "must be a mapping with the keys title, attacks, seeds, set, runs"),
        ("- 1", "must be a mapping with the keys title, attacks, seeds, set, runs"),
        ("runs: [", "not valid YAML in line 1: "),
        ("runz: []", "unknown key 'runz'; did you mean 'runs'?; allowed: title, attacks, seeds, set, runs"),
        ("title: x", "lacks 'runs'"),
        ("runs: []", "lacks 'runs'"),
        ("runs: [a]", "runs: must be a mapping with the keys name, recipe, set"),
        ("runs: [{name: a}]", "runs: lacks 'recipe'"),
        ("runs: [{recipe: anchor}]", "runs: lacks 'name'"),
        (
            "runs: [{name: a, recipe: anchor, sett: {}}]",
            "runs: unknown key 'sett'; did you mean 'set'?; allowed: name, recipe, set",
        ),
        ("runs: [{name: a, recipe: anchor}, {name: a, recipe: standard}]", "two runs are named 'a'"),
        ("set: {epoch: 3}\n" + RUN, "unknown setting epoch = 3; did you mean 'epochs'?"),
        ("set: 3\n" + RUN, "a recipe is a mapping of settings, found int"),
        ("runs: [{name: a, recipe: standard, set: {epochs: 0}}]", "a: epochs = 0: must be >= 1"),
    ],
)
def test_bad_plans(refused, tmp_path, plan, message):
    path = tmp_path / "plan.yaml"
    path.write_text(plan)
    assert refused("compare", path, "--out", tmp_path / "out").startswith(f"{path}: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "plan",
    [
        b"seeds: 3\nruns: [{name: a, recipe: standard}]",
        b"seeds: [x]\nruns: [{name: a, recipe: standard}]",
        b"seeds: []\nruns: [{name: a, recipe: standard}]",
        b"attacks: pgd20\nruns: [{name: a, recipe: standard}]",
        b"attacks: []\nruns: [{name: a, recipe: standard}]",
        b"runs: 3",
        b"seeds: 2024-13-45",
        b"runs: [{name: 3, recipe: standard, sett: 1}]",
        b"\xff\xfe\x00\x81",
    ],
)  # fmt: skip
def test_plans_of_wrong_types(refused, tmp_path, plan):
    path = tmp_path / "plan.yaml"
    path.write_bytes(plan)
    assert str(path) in refused("compare", path, "--out", tmp_path / "out", "--data", "nope")


def test_unknown_plan_and_recipe_in_a_plan(refused, tmp_path):
    assert (
        refused("compare", "dema")
        == "plan 'dema' is not known; did you mean 'demo'?; plans: cifar10_methods, demo, digits_methods, or a .yaml file"
    )
    path = tmp_path / "plan.yaml"
    path.write_text("runs: [{name: a, recipe: standart}]")
    assert "a: recipe 'standart' is not known; did you mean 'standard'?" in refused("compare", path)
    path.write_text(RUN)
    assert refused("compare", path, "--epochs", "x") == "epochs = x: must be a whole number"
    path.write_text("attacks: [pdg20]\n" + RUN)
    assert "did you mean 'pgd20'?" in refused("compare", path)


# -- what prints ------------------------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code and capsys.readouterr().out == f"fastanchor {__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["eval", "--help"], ["attack", "-h"], ["report", "--help"], ["doctor", "--help"]])
def test_help_texts(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert not stop.value.code and out.startswith("usage: fastanchor") and not err


def test_help_of_train_and_compare(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "fastanchor train RECIPE" in out and "anchor_resnet18_cifar10" in out
    assert main(["compare", "--help"]) == 0
    assert "Plans: cifar10_methods, demo, digits_methods" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as stop:
        main(["train", "anchor", "--help"])
    out = capsys.readouterr().out
    assert not stop.value.code and "--attack.eps" in out and "--stage2.weight-decay" in out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"fastanchor {__version__}") and f"torch {torch.__version__}" in out.replace("\n", " ")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    assert {row["part"] for row in found["backends"]} >= {"data", "attack", "hard-positive SupCon", "evaluation"}
    assert all(row["why"] for row in found["backends"])
