"""What bench's programs share: exit statuses, SIGTERM as Ctrl-C, and children that are given the time to clean up."""

import signal
import subprocess
import sys

import pytest

from bench import program
from bench.results import Results
from fastanchor.errors import UserError


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def raising(error):
    def main():
        raise error

    return main


def test_bad_input_is_a_sentence_and_an_order_to_stop_no_traceback(capsys):
    assert program.run("bench.x", lambda: None) == 0 and program.run("bench.x", lambda: 1) == 1
    assert program.run("bench.x", raising(UserError("--a 0: must be at least 1"))) == 2
    assert program.run("bench.x", raising(KeyboardInterrupt)) == 130
    assert capsys.readouterr().err == "bench.x: --a 0: must be at least 1\nbench.x: stopped\n"
    assert program.run("bench.x", lambda: signal.raise_signal(signal.SIGTERM)) == 130
    with pytest.raises(ZeroDivisionError):  # a fault of ours is not hidden
        program.run("bench.x", lambda: 1 // 0)


CHILD = """
import pathlib, sys, time
from bench import program
here = pathlib.Path(sys.argv[1])
def main():
    (here / "begun").touch()
    try:
        time.sleep(60)
    finally:
        (here / "ended").touch()
sys.exit(program.run("child", main))
"""


def test_a_child_that_is_stopped_can_clean_up(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with pytest.raises(subprocess.TimeoutExpired):
        program.child(command, 8.0)
    assert (tmp_path / "begun").exists() and (tmp_path / "ended").exists()
    assert program.child([sys.executable, "-c", "import sys; print('unseen'); sys.exit(3)"], 60) == 3


def test_a_child_that_does_not_stop_is_killed(monkeypatch):
    monkeypatch.setattr(program, "GRACE", 0.2)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    made = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, _popen=subprocess.Popen, **k: made.append(_popen(*a, **k)) or made[-1])
    with pytest.raises(subprocess.TimeoutExpired):
        program.child([sys.executable, "-c", stubborn], 2.0)
    assert made[0].wait(timeout=10) == -signal.SIGKILL


def test_a_run_is_never_overwritten(tmp_path):
    Results(tmp_path, {}).add("a", "b", ms=1.0)
    before = (tmp_path / "gpu.json").read_text()
    with pytest.raises(UserError, match="holds a run already, and none is overwritten"):
        Results(tmp_path, {})
    assert (tmp_path / "gpu.json").read_text() == before and len((tmp_path / "gpu.jsonl").read_text().splitlines()) == 1
    Results(tmp_path, {}, kind="bench.peers")  # another program's files lie beside them
    (tmp_path / "plain").touch()
    with pytest.raises(UserError, match="plain"):
        Results(tmp_path / "plain", {})
