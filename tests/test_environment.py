"""What a result was made with: the command as it can be typed again, without this machine's folders."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastanchor import environment

SAYS = "from fastanchor import environment; print(environment.describe(environment.pick_device('cpu'))['command'])"


@pytest.mark.parametrize(
    "started, expected",
    [
        (["-m", "tool.run", "--a", "b c"], "python -m tool.run --a 'b c'"),
        (["-m", "tool", "--a"], "python -m tool --a"),
        (["tool/run.py", "--a"], "run.py --a"),
        (["-c", SAYS, "--a"], "-c --a"),
    ],
)
def test_the_command_is_the_one_that_was_typed(tmp_path, started, expected):
    (tmp_path / "tool").mkdir()
    for name in ("run.py", "__main__.py"):
        (tmp_path / "tool" / name).write_text(SAYS)
    command = [sys.executable, *started]
    root = Path(__file__).parents[1]
    ended = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": f".:{root}"}, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == expected


@pytest.mark.parametrize("threads, said", [(1, "1 thread"), (2, "2 threads")])
def test_the_processor_is_named_with_its_threads(monkeypatch, threads, said):
    monkeypatch.setattr(environment, "_processor", lambda: "X")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert environment.device_name(torch.device("cpu")) == f"CPU: X, {said}"
