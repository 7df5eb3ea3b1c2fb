"""bench.record: a record holds its files, figures and a README of their numbers; what cannot be one is refused, nothing lost."""

import importlib
import json
import os
import platform
import shutil
import signal
from pathlib import Path

import bench_files
import pytest

from bench import plots, record, record_text, schema
from bench.program import run as run_program
from fastanchor import files
from fastanchor.errors import UserError

pytest.importorskip("matplotlib")
CPU = "CPU: fake, 2 threads"


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing has tests of its own, and takes a second a figure."""
    monkeypatch.setattr(plots, "write", lambda run, folder: ([], []))


def run(tmp_path, *arguments):
    return record.main([*map(str, arguments), "--into", str(tmp_path / "records")])


def records(tmp_path):
    folder = tmp_path / "records"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_record_of_two_files(tmp_path, capsys):
    ladder = bench_files.put(tmp_path, "ladder.json", bench_files.ladder_file(ceilings=False))
    bench = bench_files.put(tmp_path, "bench.json", bench_files.bench_file())
    log = tmp_path / "bench.log"
    log.write_text("rootdir: /home/someone/main\nhost secret-host says hello\nnaive 2.00\n")
    assert run(tmp_path, "cpu-trial", bench, ladder, "--log", log, "--note", "Shared hardware, at /home/someone/work.") == 0
    assert records(tmp_path) == ["2026-11-29_cpu-trial"]  # the day that bench.json says
    folder = tmp_path / "records" / "2026-11-29_cpu-trial"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md",
        "bench.json",
        "ladder.json",
        "bench.log",
        "bench-ladder.svg",
        "bench-epochs.svg",
        "ladder-ladder.svg",
    }
    assert not any(name.endswith(".png") for name in names)
    assert folder.stat().st_mode & 0o055 == 0o055
    text = (folder / "README.md").read_text()
    assert text.startswith(f"# cpu trial\n\n{CPU}. These are figures of a CPU.\n\nShared hardware, at work.\n")
    for line in (
        "| `bench.json` | make bench | 0123456789ab | python 3.12.1, torch 2.13.0+cpu | `gpu.py --out x` |",
        "| attack, PGD-2 [bf16] | engine | 250 (225 to 275) | 3 |  |",
        "|  | naive | 1000 (900 to 1100) |  | 4.00 (3.60 to 4.80) |",
        "| + bf16 | 25 (22.5 to 27.5) | 4.00 (3.60 to 4.40) | 1.00 | 0 | 0.01 |",
        "Log: `bench.log`.",
        "`bench.json`: the host's name (`machine_info.node`) is taken out.",
        "`bench.log`: absolute paths are cut to their last part, the host's name is replaced.",
        "* `ladder.json`: no roofline: the file holds no ceilings of its device",
    ):
        assert line in text.splitlines(), line
    section = text[text.index("## `ladder.json`") :]
    assert "](ladder-ladder.svg)" in section and "](bench-ladder.svg)" not in section
    assert (folder / "bench.log").read_text() == "rootdir: main\nhost HOST says hello\nnaive 2.00\n"
    for path in folder.iterdir():
        assert "secret-host" not in path.read_text() and "/home/someone" not in path.read_text(), path.name
    kept, given = schema.load(folder / "bench.json"), json.loads(bench.read_text())
    assert kept["benchmarks"] == given["benchmarks"] and "node" not in kept["machine_info"]
    assert str(folder) in capsys.readouterr().out


def test_a_gpus_record_names_it_and_labels_predictions(tmp_path, no_figures):
    failed = ("steps", "engine, bf16, compile", {"error": 'Traceback\n  File "/home/someone/x.py"\nRuntimeError: no'})
    left_out = ("small", "compiled", {"left_out": "12 s were left"})
    wrong = ("supcon", "kernels", {"case": "topk", "gradient_relative": 0.5, "ok": False})
    right = [("supcon", "kernels", {"case": "default", "gradient_relative": 1e-4, "ok": True})] * 3
    attacks = [*bench_files.attack_rows((128,))]
    attacks[0][2]["share_of_bf16_matmul"] = 1.41
    rows = [*attacks, *bench_files.step_rows((128,)), failed, left_out, wrong, *right]
    path = bench_files.put(tmp_path, "gpu.json", bench_files.run_file(rows))
    assert run(tmp_path, "fake", path) == 0
    text = (tmp_path / "records" / "2026-11-30_fake" / "README.md").read_text()
    assert "GPU: fake GPU. These are figures of this GPU." in text and "CPU" not in text
    assert "matmul bf16 400 and fp32 40 TFLOP/s, copy 2500 GB/s" in text
    assert "| graphed, aten | 128 | bf16 | no | 6.667 (6 to 7.333) | 6.00 (5.40 to 6.60) | 19,200 | 100 | 25 % | 900 |" in text
    assert text.count("| passed |") == text.count("\npassed: the ceiling was measured low") == 1
    assert "`predicted`: bench.cost's prediction from the ceilings above, not measured." in text
    assert "Left out: compiled: 12 s were left." in text and "FAILED: engine, bf16, compile: RuntimeError: no" in text
    assert "3 of 4 judged right; 0 without a verdict." in text and "| kernels | topk | 0.5 | no |" in text
    assert "/home/someone" not in (tmp_path / "records" / "2026-11-30_fake" / "gpu.json").read_text()
    assert "`gpu.json`: absolute paths are cut to their last part." in text


def test_kernels_compiled_ahead_of_time(tmp_path, no_figures, capsys):
    row = {"kernel": "k", "arch": 90, "variant": "default", "precision": "fp16", "D": 128, "tile": "64 x 64", "warps": 4, "stages": 2,
           "registers": 200, "spilled": 8, "shared": 1000, "wgmma": 4, "faults": ["8 bytes spilled"]}  # fmt: skip
    found = {
        "triton": "3.7.1",
        "torch": "2.13.0",
        "python": "3.11.7",
        "gpu": None,
        "rows": [row, {**row, "registers": 10, "faults": []}],
    }
    path = bench_files.put(tmp_path, "aot.json", found)
    assert run(tmp_path, "aot", path) == 2  # no day in the file
    for day in ("2026-11-31", "2026-13-45", "yesterday", ""):
        capsys.readouterr()
        assert run(tmp_path, "aot", path, "--date", day) == 2
        assert capsys.readouterr().err == f"bench.record: {day!r} is no date: must be YYYY-MM-DD\n"
    assert run(tmp_path, "aot", path, "--date", "2026-11-22") == 0
    text = (tmp_path / "records" / "2026-11-22_aot" / "README.md").read_text()
    assert "Ahead-of-time compilation, no GPU: nothing here was run or timed." in text
    assert "| sm_90 | 2 | 1 | 200 | 8 | 1000 |" in text and "median" not in text


def test_input_pipelines_and_agreement(tmp_path, no_figures):
    """Of the files that the repository has: what they measured, and what was left out."""
    found = json.loads((record.RECORDS / "2026-11-22_data-cpu" / "folder.json").read_text())
    found["rows"].append({**found["rows"][-1], "name": "torch, 9 workers", "left_out": "no room"})
    path = bench_files.put(tmp_path, "folder.json", found)
    assert run(tmp_path, "pipes", path, "--date", "2026-11-22") == 0
    text = (tmp_path / "records" / "2026-11-22_pipes" / "README.md").read_text()
    for line in (
        "folder:cifar10-jpeg: 49000 training images, 32 x 32 pixels, encoded; batches of 128, crop_flip, aug; fed to resnet18 of "
        "width 8, PGD-10, fp32.",
        "| ceiling: one batch again |  | 377.9 (363.1 to 441.5) |  |  |",
        "| dali, cpu | 16,935 (15,483 to 17,508) | 379.9 (365.9 to 404.2) | -0.8483 (-13.97 to 11.32) | 99.17 |",
        "Left out: torch, 9 workers: no room.",
        "use resident, as auto does: the images are in memory already.",
    ):
        assert line in text.splitlines(), line
    found = json.loads((record.RECORDS / "2026-11-22_agreement" / "agreement.json").read_text())
    failed = {**found["rows"][0], "agrees": False, "error": "ValueError: no such name", "known": "rounds otherwise"}
    path = bench_files.put(tmp_path, "agreement.json", {**found, "rows": [*found["rows"][1:3], failed]})
    assert run(tmp_path, "agreement", path, "--date", "2026-11-22") == 0
    text = (tmp_path / "records" / "2026-11-22_agreement" / "README.md").read_text()
    assert "2 of 3 checks agree." in text and "| 1e-09 | yes |" in text and "Known: rounds otherwise" in text
    assert f"FAILED: {failed['method']}, {failed['what']}: ValueError: no such name" in text


def test_what_a_speedrun_and_peers_have_is_shown(tmp_path, no_figures):
    seed = {"seed": 0, "seconds": 71.5, "preparation_s": 30.0, "cold_s": 101.5, "clean": 80.0, "robust": 50.25}
    claim = {"n": 1, "target": 50.0, "alpha": 0.01, "p": None, "holds": False, "verdict": "too few seeds", "seconds_all": [71.5],
             "robust_all": [50.25], "against": ["its seeds are chosen"]}  # fmt: skip
    speedrun = bench_files.run_file([("seeds", "seed 0", seed), ("summary", "track", claim)], kind="bench.speedrun")
    clone = {
        "peer": "Repo",
        "url": "https://github.com/a/repo",
        "commit": "abc",
        "written_for": "abd",
        "warning": "another commit",
    }
    peer = {"peer": "Repo: train", "what": "step", "batch": 8, "differs": ["reads the loss back"], "counterpart": "PGD-AT"}
    rows = [("peers", "Repo: the clone", clone), ("peers", "Repo: train", {**peer, **bench_files.timed(40.0, 1.0)})]
    files = [bench_files.put(tmp_path, "speedrun.json", speedrun)]
    files.append(bench_files.put(tmp_path, "peers.json", bench_files.run_file(rows, kind="bench.peers")))
    assert run(tmp_path, "both", *files) == 0
    text = (tmp_path / "records" / "2026-11-30_both" / "README.md").read_text()
    assert "| seed 0 | 0 | 71.5 | 30 | 101.5 | 80 | 50.25 |" in text and "too few seeds" in text
    assert "track counts as no record: its seeds are chosen." in text
    assert "* Repo: the clone: https://github.com/a/repo at abc; another commit" in text
    assert "* Repo: train: reads the loss back" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| Repo: train |"))
    assert "| 40 (36 to 44) | 1.00 (1.00 to 1.00) |" in row and "abc" not in row


def test_refused_and_nothing_written(tmp_path, no_figures, capsys):
    gpu = bench_files.put(tmp_path, "gpu.json", bench_files.run_file(bench_files.attack_rows((8,))))
    bench = bench_files.put(tmp_path, "bench.json", bench_files.bench_file())
    dirty = bench_files.put(tmp_path, "dirty.json", bench_files.run_file([], commit="0123456789ab+"))
    old = bench_files.put(
        tmp_path, "old.json", {**bench_files.bench_file(added=False), "commit_info": {"id": "f" * 40, "dirty": True}}
    )
    nameless = bench_files.put(tmp_path, "nameless.json", bench_files.run_file(bench_files.attack_rows((8,)), device=None))
    wrong = bench_files.put(tmp_path, "wrong.json", bench_files.run_file([("attack", "x", {"batch": 8})]))
    again = bench_files.put(tmp_path / "other", "gpu.json", json.loads(gpu.read_text()))
    readme = bench_files.put(tmp_path, "README.md", json.loads(gpu.read_text()))
    cases = [
        (("../out", gpu), "'../out': the name of a record"),
        (("a/b", gpu), "the name of a record"),
        (("a b", gpu), "the name of a record"),
        ((".hidden", gpu), "the name of a record"),
        (("", gpu), "the name of a record"),
        (("x", gpu, bench), "is of fake GPU"),
        (("x", dirty), "had changes beyond commit 0123456789ab; commit them"),
        (("x", old), "had changes beyond commit ffffffffffff;"),
        (("x", nameless), "does not name its device"),
        (("x", wrong), "'precision' is missing"),
        (("x", gpu, again), "have the same name"),
        (("x", gpu, "--log", again), "have the same name"),
        (("x", readme), "is no name for a file of a record"),
        (("x", tmp_path / "none.json"), "cannot be read"),
        (("x", gpu, "--log", tmp_path / "none.log"), "none.log: cannot be read"),
        (("x", gpu, "--date", "2026-11-22"), "the files say themselves"),
    ]
    for arguments, says in cases:
        assert run(tmp_path, *arguments) == 2, arguments
        captured = capsys.readouterr()
        assert says in captured.err and captured.err.count("\n") == 1 and captured.out == "", arguments
        assert records(tmp_path) == [], arguments
    assert run(tmp_path, "x", dirty, "--allow-dirty") == 0
    text = (tmp_path / "records" / "2026-11-30_x" / "README.md").read_text()
    assert "had changes that are in no commit (0123456789ab+)" in text


def test_a_record_is_never_overwritten(tmp_path, no_figures, capsys):
    gpu = bench_files.put(tmp_path, "gpu.json", bench_files.run_file(bench_files.attack_rows((8,))))
    assert run(tmp_path, "x", gpu) == 0
    readme = tmp_path / "records" / "2026-11-30_x" / "README.md"
    readme.write_text("mine")
    assert run(tmp_path, "x", gpu) == 2 and "none is overwritten" in capsys.readouterr().err
    assert readme.read_text() == "mine" and records(tmp_path) == ["2026-11-30_x"]
    shutil.rmtree(tmp_path / "records")
    (tmp_path / "records").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "records" / "2026-11-30_x")  # a link to nothing is there too
    assert run(tmp_path, "x", gpu) == 2 and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_no_half_record(tmp_path, monkeypatch, failure, capsys):
    def fail(run, folder):
        assert (folder / "gpu.json").exists() and folder.name.startswith(".record-")
        raise failure

    monkeypatch.setattr(plots, "write", fail)
    gpu = bench_files.put(tmp_path, "gpu.json", bench_files.run_file([]))
    if isinstance(failure, OSError):
        assert run(tmp_path, "x", gpu) == 2 and "No space left" in capsys.readouterr().err
    else:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "x", gpu)
    assert records(tmp_path) == [] and gpu.exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("gpu.py --out /home/jo/runs/a.json --quick", "gpu.py --out a.json --quick"),
        ('File "/srv/x/bench/gpu.py", line 3', 'File "gpu.py", line 3'),
        ("--peer-path=/home/jo/clone", "--peer-path=clone"),
        ("in /home/jo/ and /Users/jo", "in ~ and ~"),
        ("https://github.com/a/b and images/s, 3/4/5", "https://github.com/a/b and images/s, 3/4/5"),
        ("runs/a/b.json", "runs/a/b.json"),
        ("--data folder:/mnt/jo/images, ssh://host/a/b", "--data folder:images, ssh://host/a/b"),
        ("cc -I/home/jane/secret/x -L/Users/jo/lib -o y", "cc -Ix -Llib -o y"),
        ("PATH=/opt/a/bin:/home/jo/bin at file:///home/jo/x", "PATH=bin:bin at file://x"),
        ("(https://github.com/home/b/c, /home/jo/x)", "(https://github.com/home/b/c, x)"),
        ("on ip-10-0-0-1, not on ip-10-0-0-12", "on HOST, not on ip-10-0-0-12"),
    ],
)
def test_what_is_public(text, expected):
    assert record_text.public(text, ["ip-10-0-0-1"]) == expected


def test_the_hosts_name_is_taken_out_of_everything(tmp_path, monkeypatch, capsys):
    """Of JSON, note, log, README and figures, wherever it stands; a name that is a plain word is kept."""
    monkeypatch.setattr(platform, "node", lambda: "gpu-host-17")
    found = bench_files.run_file(
        [
            *bench_files.attack_rows((8,)),
            ("attack", "else", {"left_out": "gpu-host-17 has no room in /home/jo/x"}),
            ("attack", "naive on gpu-host-17", {"error": "Traceback\nOSError: gpu-host-17"}),
        ],
        command="gpu.py --data gpu-host-17:/home/jo/set",
    )
    other = bench_files.run_file([("attack", "x", {"left_out": "gpu-host-17 is busy"})], command="gpu.py")
    other["settings"]["out"] = "x"
    paths = [bench_files.put(tmp_path, "gpu.json", found), bench_files.put(tmp_path, "other.json", other)]
    log = tmp_path / "gpu.log"
    log.write_text("at gpu-host-17\n")
    assert run(tmp_path, "x", *paths, "--log", log, "--note", "Made on gpu-host-17, in /home/jo/work.") == 0
    folder = tmp_path / "records" / "2026-11-30_x"
    for path in folder.iterdir():
        assert "gpu-host-17" not in path.read_text() and "/home/jo" not in path.read_text(), path.name
    assert any(path.suffix == ".svg" for path in folder.iterdir())
    text = (folder / "README.md").read_text()
    for said in (
        "Made on HOST, in work.",
        "HOST has no room in x",
        "OSError: HOST",
        "`gpu.py --data HOST:set`",
        "`gpu.json`: absolute paths are cut to their last part, the host's name is replaced.",
        "`other.json`: the host's name is replaced.",
        "`gpu.log`: the host's name is replaced.",
    ):
        assert said in text, said
    monkeypatch.setattr(platform, "node", lambda: "room")
    shutil.rmtree(folder)
    assert run(tmp_path, "x", paths[0]) == 0 and "has no room in x" in (folder / "README.md").read_text()


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path, no_figures, capsys):
    gpu = bench_files.put(tmp_path, "gpu.json", bench_files.run_file([]))
    (tmp_path / "records").write_text("mine")
    assert run(tmp_path, "x", gpu) == 2
    assert capsys.readouterr().err == f"bench.record: {tmp_path / 'records'}: cannot be a folder to write into (File exists)\n"
    assert record.main(["x", str(gpu), "--into", str(tmp_path / "records" / "below")]) == 2
    assert "below: cannot be a folder to write into (Not a directory)" in capsys.readouterr().err
    assert (tmp_path / "records").read_text() == "mine"


# The program, the option that says where to, and what would be called first to measure.
MEASURING = [
    ("bench.gpu", ["--device", "cpu", "--quick"], "--out", "run_parts"),
    ("bench.peers.__main__", ["--device", "cpu", "--quick"], "--out", "measure_all"),
    ("bench.ladder", ["--device", "cpu"], "--json", "measure"),
    ("bench.aot", ["--arch", "90"], "--json", "supcon_cases"),
    ("bench.tune", ["--d", "64", "--n", "1024"], "--json", "run"),
]


@pytest.mark.parametrize("program, arguments, option, measures", MEASURING, ids=[case[0] for case in MEASURING])
def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, monkeypatch, program, arguments, option, measures, capsys):
    if program in ("bench.aot", "bench.tune"):
        pytest.importorskip("triton")
    module = importlib.import_module(program)
    monkeypatch.setattr(module, measures, lambda *_: pytest.fail("measured"))
    (tmp_path / "taken").write_text("mine")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    places = [tmp_path / "taken" / "below", *([closed / "x"] if not os.access(closed, os.W_OK) else [])]
    places.append(tmp_path / "taken" if option == "--out" else tmp_path)
    for place in places:
        name = program.removesuffix(".__main__")
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = run_program(name, lambda place=place: module.main([*arguments, option, str(place)]))
        except SystemExit as ended:
            status = ended.code
        signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        assert status == 2 and captured.err.startswith(f"{name}: {tmp_path}") and captured.err.count("\n") == 1, captured.err
        assert captured.out == "" and (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_takes_no_file_is_noticed(tmp_path, monkeypatch):
    """Without depending on who runs the tests: to root no folder is closed."""

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "kept").write_text("mine")
    files.make_place(tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "mine"
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    for check, path in ((files.make_folder, tmp_path), (files.make_place, tmp_path / "new")):
        with pytest.raises(UserError, match=f"{tmp_path}: cannot be a folder to write into .Permission denied."):
            check(path)


def test_a_committed_record_can_be_made_again(tmp_path):
    """The real files of this project's own record; its numbers stand in the README that is written anew."""
    folder = Path(__file__).parents[1] / "bench" / "records" / "2026-11-22_attack-engine-cpu"
    assert run(tmp_path, "again", folder / "bench.json", folder / "ladder.json", "--log", folder / "bench.log") == 0
    text = (tmp_path / "records" / "2026-11-22_again" / "README.md").read_text()
    assert "CPU: AMD EPYC, 2 threads. These are figures of a CPU." in text
    assert "4.31 (3.49 to 4.72)" in text and "4.37 (3.51 to 4.90)" in text
