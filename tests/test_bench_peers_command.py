"""`python -m bench.peers` and the part of bench.gpu that runs it: table, JSON, bad input, time."""

import importlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import fake_clones
import pytest
from fake_clones import CPU, variants_of
from rich.console import Console

from bench import gpu_peers, program
from bench.gpu_common import Bench
from bench.peers import __main__, attacks, tables
from bench.results import Results
from fastanchor.errors import UserError

clone_of = pytest.fixture(fake_clones.clone_of)


# -- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_writes_table_and_json_and_a_failing_clone_is_one_row(clone_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__.machine, "describe", lambda device: {"device": "a test"})
    good, bad = clone_of("TRADES"), clone_of("SupContrast")
    (bad / "losses.py").write_text("print('before the end')\nraise ValueError('this clone is broken')\n")
    adapter = importlib.import_module("bench.peers.trades")
    monkeypatch.setattr(adapter, "VARIANTS", variants_of("TRADES"))
    out = tmp_path / "out"
    arguments = ["--quick", "--device", "cpu", "--out", str(out), "--only", "SupContrast,TRADES"]
    assert __main__.main([*arguments, "--peer-path", str(bad), "--peer-path", f"TRADES={good}"]) == 1
    said = capsys.readouterr().out
    found = json.loads((out / "peers.json").read_text())
    assert (found["schema"], found["kind"]) == (1, "bench.peers")
    assert {part: end["status"] for part, end in found["parts"].items()} == {"environment": "done", "peers": "done"}
    assert found["settings"]["peer_path"] == ["SupContrast", "TRADES"]
    by_name = {row["name"]: row for row in found["results"]}
    assert by_name["device and ceilings"]["part"] == "environment"
    assert by_name["TRADES: train"]["ms"] > 0
    assert re.search(r"(?s)before the end.*ValueError: this clone is broken", by_name["SupContrast: train"]["error"])
    assert len((out / "peers.jsonl").read_text().splitlines()) == len(found["results"])
    table = said[said.index("peers: ms of one batch") :]
    assert "TRADES: train [step, batch 2]" in table
    assert re.search(r"\n +engine, bf16 .*\d \(\d", table), "our step stands below it, with its ratio"
    assert (
        "SupContrast: train: failed: bench.peers.clones.PeerFailed: ValueError: this clone is broken" not in table.splitlines()[0]
    )
    assert "this clone is broken" in table
    with pytest.raises(UserError, match="holds a run already"):
        __main__.main([*arguments[:-1], "TRADES", "--peer-path", str(good)])
    assert __main__.main([*arguments[:-1], "TRADES", "--peer-path", str(good), "--out", str(tmp_path / "again")]) == 0


def test_bad_input_is_one_sentence_and_exit_2(tmp_path, clone_of, capsys):
    for arguments, said in (
        (["--peer-path", str(tmp_path / "none")], "is no folder"),
        (["--only", "TRADSE"], "did you mean 'TRADES'"),
        (["--only", "TRADES"], "give its clone with --peer-path"),
        (["--only", ""], "--only : must be of"),
        (["--batch", "1"], "--batch 1: must be at least 2"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--device", "tpu"], "tpu"),
    ):
        assert __main__.main([*arguments, "--out", str(tmp_path / "out")]) == 2, arguments
        printed = capsys.readouterr()
        assert said in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_the_help_says_that_a_clone_is_executed(capsys):
    with pytest.raises(SystemExit):
        __main__.parse(["--help"])
    assert "is executed, with your rights" in " ".join(capsys.readouterr().out.split())


def test_the_table_shows_ratios_and_reasons():
    shown = [
        {"name": "X: train", "peer": "X: train", "what": "step", "batch": 8, "ms": 10.0, "ms_range": [9.0, 11.0], "images_per_s": 800.0, "ratio": 1.0, "ratio_range": [1, 1]},
        {"name": "engine, fp32", "peer": "X: train", "what": "step", "batch": 8, "ms": 4.0, "ms_range": [4.0, 4.0], "images_per_s": 2000.0, "ratio": 2.5, "ratio_range": [2.25, 2.75]},
        {"name": "Y", "peer": "Y", "left_out": "because"},
        {"name": "Z", "peer": "Z", "error": "Traceback\nValueError: bad"},
    ]  # fmt: skip
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    tables.show(shown, console)
    text = console.export_text()
    for said in (
        "X: train [step, batch 8]",
        "10 (9 to 11)",
        "2.50 (2.25 to 2.75)",
        "Y: left out: because",
        "Z: failed: ValueError: bad",
    ):
        assert said in text
    tables.show([], console)


# -- bench.gpu ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    made = Bench(Results(tmp_path / "gpu", {}), CPU, [8, 16], quick=True, compile=False, cudnn_benchmark=False, data="synthetic")
    made.peer_paths = []
    return made


def test_the_gpu_part_takes_over_what_the_other_process_has_written(bench, clone_of, monkeypatch):
    clone, other, commands = clone_of("TRADES"), clone_of("SupContrast"), []
    bench.peer_paths = [str(other), str(clone)]
    monkeypatch.setattr(attacks, "missing", lambda needs: f"{needs} is not installed")

    def fake(command, timeout):
        commands.append(command)
        if "TRADES" not in command:
            return 0
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"part": "environment", "name": "device and ceilings", "at_s": 1},
            {"part": "peers", "name": "TRADES: train", "at_s": 2, "ms": 3.0},
        ]
        (folder / "peers.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"part": "pee', encoding="utf-8")
        return code

    monkeypatch.setattr(program, "child", fake)
    bench.deadline = time.perf_counter() + 100
    for given, more in ((1, []), (2, ["bench.peers ended with 2"])):
        code = given
        bench.results.found["results"].clear()
        gpu_peers.run(bench)
        found = bench.results.rows("peers")
        assert [row["error"] for row in found if "error" in row] == more
        assert [(row["name"], row["ms"]) for row in found if "ms" in row] == [("TRADES: train", 3.0)]
        assert not bench.results.rows("environment")
    for command, name, path in zip(commands, ("SupContrast", "TRADES"), (other, clone), strict=False):
        assert command[1:5] == ["-m", "bench.peers", "--only", name]
        assert [command[i + 1] for i, flag in enumerate(command) if flag == "--peer-path"] == [str(path)]
        assert command[command.index("--batch") + 1] == "8" and "--quick" in command
    # An even share of the time for each, less what the last call may take.
    budgets = [int(command[command.index("--budget") + 1]) for command in commands[:2]]
    assert budgets == [pytest.approx(part - gpu_peers.LAST_PEER_SECONDS, abs=2) for part in (50, 100)]

    def late(command, timeout):
        fake(command, timeout)
        if "TRADES" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return 0

    monkeypatch.setattr(program, "child", late)
    bench.results.found["results"].clear()
    gpu_peers.run(bench)
    assert [row.get("left_out", row.get("ms")) for row in bench.results.rows("peers")][2:] == [
        "stopped at the end of this part's time",
        3.0,
    ]


def test_the_gpu_part_says_why_it_begins_nothing(bench, clone_of, monkeypatch):
    monkeypatch.setattr(program, "child", lambda *args: pytest.fail("a process was begun"))
    monkeypatch.setattr(attacks, "missing", lambda needs: f"{needs} is not installed")
    gpu_peers.run(bench)
    bench.peer_paths = [str(clone_of("TRADES"))]
    bench.deadline = 0.0
    gpu_peers.run(bench)
    bench.peer_paths = ["/nowhere/at/all"]
    gpu_peers.run(bench)
    said = [row["left_out"] for row in bench.results.rows("peers")]
    absent = ["torchattacks is not installed", "pyautoattack is not installed"]
    assert said[:5] == ["none was given with --peer-path", *absent, *absent]
    assert said[5].endswith("s were left") and "is no folder" in said[6]
