"""The commands a user types, end to end on a small run: train, eval, attack, report, and what they leave."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastanchor.cli import main
from fastanchor.train.run import RunDir, load_trained

FLAGS = (
    "--data synthetic --limit 200 --data.augment none --model.width 4 --model.head-hidden 16 --model.head-dim 8 --attack.steps 1 "
    "--attack.eps 4/255 --epochs 6 --batch-size 16 --optim.milestones 5 --val.attack pgd2 --eval.attacks fgsm pgd3:eps=0.031 "
    "--eval.report-images 24 --stage2.mode slf --stage2.epochs 3 --stage2.batch-size 16 --stage2.lr 0.1"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands") / "run with spaces"
    assert main(["train", "anchor", "--out", str(path), *FLAGS]) == 0
    return path


def test_train_leaves_results_and_a_report(run):
    names = {path.name for path in (run / "eval").iterdir()}
    assert names == {"fgsm-linf-eps4_255-step4_255-zero-x1.json", "pgd3-linf-eps0.031-step0.00775-uniform-x1.json"}
    result = json.loads((run / "eval" / "fgsm-linf-eps4_255-step4_255-zero-x1.json").read_text())
    assert result["count"] == 200 and result["stage"] == 2 and result["data"] == "synthetic"
    assert result["clean_accuracy"] >= result["robust_accuracy"]
    page = (run / "report.html").read_text()
    assert f"{result['robust_accuracy']:.1f}" in page
    log = (run / "train.log").read_text()
    assert "synthetic: 196 train / 4 validation / 200 test images" in log and "stage 2  epoch 3/3" in log


def test_resume_of_a_finished_run_prints_the_same_table(run, capsys):
    assert main(["train", "--resume", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "finished already" in printed and "PGD-3 (eps 0.031, step 0.00775, uniform start, 1 restart)" in printed


def test_eval_of_other_images_does_not_replace_the_run_s_own_results(run, capsys):
    before = {path.name: path.read_bytes() for path in (run / "eval").glob("*.json")}
    assert main(["eval", str(run), "--attack", "fgsm", "--limit", "20", "--seed", "3"]) == 0
    assert "FGSM (eps 4/255, step 4/255, no random start, 1 restart)" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (run / "eval").glob("*.json")} == before
    stored = json.loads((run / "eval" / "limit20-seed3" / "fgsm-linf-eps4_255-step4_255-zero-x1.json").read_text())
    assert stored["count"] == 20 and stored["seed"] == 3


def test_eval_needs_neither_the_training_s_device_nor_its_extra_images(run, tmp_path):
    state = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    state["config"]["device"], state["config"]["data"]["extra"] = "cuda:7", str(tmp_path / "gone.npz")
    torch.save(state, tmp_path / "model.pt")
    assert main(["eval", str(tmp_path / "model.pt"), "--attack", "fgsm", "--limit", "20", "--device", "cpu"]) == 0


def test_eval_takes_a_checkpoint_other_data_and_eps(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "other.npz", **arrays, train_labels=np.arange(60) % 10, test_labels=np.arange(60) % 10)
    arguments = [
        "eval",
        str(run / "checkpoints" / "best.pt"),
        "--data",
        f"npz:{tmp_path / 'other.npz'}",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--attack", "pgd2", "--attack", "cw2:eps=0.05", "--eps", "2/255", "--batch-size", "7"]) == 0
    printed = capsys.readouterr().out
    assert "PGD-2 (eps 2/255" in printed and "CW-2 (eps 0.05" in printed and len(list((tmp_path / "out").glob("*.json"))) == 2


def test_a_model_of_other_classes_than_the_data_is_refused(run, tmp_path, capsys):
    np.savez(tmp_path / "two.npz", train_images=np.zeros((8, 32, 32, 3), np.uint8), train_labels=np.arange(8) % 2,
             test_images=np.zeros((4, 32, 32, 3), np.uint8), test_labels=np.arange(4) % 2)  # fmt: skip
    assert main(["eval", str(run), "--data", f"npz:{tmp_path / 'two.npz'}"]) == 2
    assert "the model has 10 classes" in capsys.readouterr().err


def test_attack_writes_exact_images_and_pictures(run, tmp_path, capsys):
    out = tmp_path / "adversarial"
    assert main(["attack", str(run), "--attack", "pgd5:eps=8/255", "--limit", "30", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    data = np.load(out / "adversarial.npz")
    assert data["adversarial"].dtype == np.float32 and data["adversarial"].shape == (30, 32, 32, 3)
    distance = np.abs(data["adversarial"] - data["clean"].astype(np.float32) / 255).max()
    assert 0.03 < distance <= 8 / 255 + 1e-6
    model = load_trained(run, torch.device("cpu")).model
    with torch.no_grad():
        again = model(torch.from_numpy(data["adversarial"]).permute(0, 3, 1, 2)).argmax(1).numpy()
    assert (again == data["adversarial_predictions"]).all()
    correct = data["clean_predictions"] == data["labels"]
    assert summary["correct"] == correct.sum() and summary["fooled"] == (correct & (again != data["labels"])).sum()
    pictures = sorted((out / "images").iterdir())
    assert len(pictures) == 30 and pictures[0].name.startswith("00000-true-template-")
    assert (np.asarray(Image.open(pictures[0])) == np.rint(data["adversarial"][0] * 255)).all()
    assert (
        f"{summary['fooled']} of {summary['correct']} correctly classified images fooled (30 images)" in capsys.readouterr().out
    )


def test_autoattack_that_cannot_be_run_is_told_before_training(tmp_path, capsys):
    np.savez(tmp_path / "two.npz", train_images=np.zeros((8, 32, 32, 3), np.uint8), train_labels=np.arange(8) % 2,
             test_images=np.zeros((4, 32, 32, 3), np.uint8), test_labels=np.arange(4) % 2)  # fmt: skip
    arguments = [
        "train",
        "anchor",
        "--data",
        f"npz:{tmp_path / 'two.npz'}",
        "--out",
        str(tmp_path / "run"),
        "--eval.attacks",
        "autoattack",
    ]
    assert main(arguments) == 2
    assert "needs at least 4 classes, this model has 2" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_folder_in_the_way_is_told_before_the_data_is_read(run, capsys):
    assert main(["train", "anchor", "--data", "npz:/nowhere", "--out", str(run)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_one_sentence(run, capsys):
    assert main(["eval", str(run), "--attack", "fgsm", "--limit", "10", "--out", "/proc/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("fastanchor: error: /proc/nowhere: ")


def test_two_processes_do_not_train_in_one_run(run, capsys):
    with RunDir(run).locked():
        assert main(["train", "--resume", str(run)]) == 2
    assert "another process is training here" in capsys.readouterr().err


def test_a_reader_that_goes_away_does_not_stop_the_training(tmp_path):
    flags = [*FLAGS[: FLAGS.index("--stage2.mode")], "--epochs", "2", "--limit", "60", "--stage2.mode", "none"]
    command = [sys.executable, "-m", "fastanchor.cli", "train", "anchor", "--out", str(tmp_path / "run"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE, process.stderr.read()
    process.stderr.close()
    assert len(list((tmp_path / "run" / "eval").glob("*.json"))) == 2 and (tmp_path / "run" / "report.html").exists()


def test_report_can_be_made_again_elsewhere(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "again.html"), "--limit", "12"]) == 0
    assert (tmp_path / "again.html").read_text().startswith("<!DOCTYPE html>")


def test_without_matplotlib_the_results_stand_and_the_way_to_a_report_is_told(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = [
        *FLAGS[: FLAGS.index("--epochs")],
        "--epochs",
        "1",
        "--batch-size",
        "64",
        "--eval.attacks",
        "fgsm",
        "--stage2.mode",
        "none",
    ]
    assert main(["train", "anchor", "--out", str(tmp_path / "run"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "no report: " in printed and 'pip install "fastanchor[plots]"' in printed and "FGSM" in printed


def test_a_checkpoint_of_another_kind_is_named(run, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    assert main(["eval", str(tmp_path / "foreign.pt")]) == 2
    assert "foreign.pt: not a checkpoint of fastanchor" in capsys.readouterr().err
    (tmp_path / "half.pt").write_bytes((run / "checkpoints" / "best.pt").read_bytes()[:999])
    assert main(["eval", str(tmp_path / "half.pt")]) == 2
    assert "half.pt: not a whole checkpoint (999 bytes" in capsys.readouterr().err


def shades(root, first, second):
    """Two classes of pictures, `first` dark and `second` bright."""
    for part, count in (("train", 12), ("test", 4)):
        for level, name in ((40, first), (200, second)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (level, level, number)).save(root / part / name / f"{number}.png")
    return root


def test_judging_refuses_the_classes_in_another_order(tmp_path, capsys):
    """By number they would be judged wrong, whatever the model knows."""
    root, listed = shades(tmp_path / "shades", "a dark", "b bright"), tmp_path / "classes.txt"
    listed.write_text("b bright\na dark\n")
    run = tmp_path / "run"
    flags = ("--model.width 4 --attack.steps 1 --epochs 1 --batch-size 8 --val.attack pgd1 --eval.attacks fgsm --eval.report-images 4 "
             "--stage2.mode none").split()  # fmt: skip
    assert main(["train", "pgd_at", "--data", f"folder:{root}", "--classes", str(listed), "--out", str(run), *flags]) == 0
    capsys.readouterr()
    other = ["--data", f"folder:{root}", "--classes", str(root / "none.txt")]
    assert main(["eval", str(run), "--attack", "fgsm"]) == 0
    assert main(["eval", str(run), "--attack", "fgsm", "--data", f"folder:{root}"]) == 0, "the run's list of classes is used"
    assert main(["eval", str(run), "--attack", "fgsm", *other]) == 2
    listed.write_text("a dark\nb bright\n")
    for command in (["eval", str(run)], ["report", str(run)], ["attack", str(run), "--out", str(tmp_path / "images")]):
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "class 0 of the model is 'b bright', of folder:" in said and "in another order" in said
    renamed = shades(tmp_path / "renamed", "0", "1")
    listed.write_text("0\n1\n")
    assert main(["eval", str(run), "--attack", "fgsm", "--data", f"folder:{renamed}"]) == 0
    assert "note: class 0 of the model is 'b bright'" in capsys.readouterr().out


def test_a_folder_of_other_sizes_is_judged_at_a_given_side(run, tmp_path):
    root = tmp_path / "large"
    for part in ("train", "test"):
        for name in range(10):
            (root / part / str(name)).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40 + name, 50), (20 * name, 0, 0)).save(root / part / str(name) / f"{number}.png")
    judge = ["eval", str(run), "--attack", "fgsm", "--data", f"folder:{root}"]
    assert main(judge) == 2
    assert main([*judge, "--image-size", "32"]) == 0


def test_doctor_shows_how_to_install_what_is_missing(monkeypatch, capsys):
    """Square brackets are markup for a table of rich."""
    from fastanchor import doctor

    monkeypatch.setattr(doctor, "find_dali", lambda: (False, 'not installed: pip install "fastanchor[dali]"'))
    assert main(["doctor"]) == 0
    assert "fastanchor[dali]" in "".join(capsys.readouterr().out.split())
