"""What bench.gpu makes of a failure and of an order to stop: the first is a result and the run goes on, the second ends it."""

import io
import json

import pytest
import torch
from rich.console import Console

from bench import gpu, gpu_tables
from bench.gpu_common import Bench
from bench.results import Results


@pytest.fixture
def bench(tmp_path):
    results = Results(tmp_path, {})
    return Bench(results, torch.device("cpu"), [8], quick=True, compile=False, cudnn_benchmark=False, data="")


def run(bench, monkeypatch, raised):
    """Parts `first`, in which an entry fails and then the part itself, and `second`."""

    def first(bench):
        with bench.results.entry("first", "an entry", batch=8):
            raise raised
        bench.results.add("first", "after it")
        raise raised

    parts = {"first": (first, 1), "second": (lambda bench: bench.results.add("second", "its turn"), 1)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    gpu.run_parts(bench, list(parts), budget=10.0)


def written(bench):
    """The results and how the parts ended, as they lie on the disk."""
    found = json.loads(bench.results.whole.read_text())
    assert found["results"] == [json.loads(line) for line in bench.results.lines.read_text().splitlines()]
    return found["results"], {name: part["status"] for name, part in found["parts"].items()}


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), AssertionError("wrong"), MemoryError("too large")])
def test_what_fails_is_a_result_with_its_traceback_and_the_run_goes_on(bench, monkeypatch, error):
    run(bench, monkeypatch, error)
    rows, ended = written(bench)
    assert [row["name"] for row in rows] == ["an entry", "after it", "the part itself", "its turn"]
    assert ended == {"first": "failed", "second": "done"} and rows[0]["batch"] == 8
    for row in (rows[0], rows[2]):
        lines = row["error"].strip().splitlines()
        assert lines[0].startswith("Traceback") and "in first" in row["error"] and lines[-1] == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
def test_an_order_to_stop_is_no_failure(bench, monkeypatch, order):
    with pytest.raises(order):
        run(bench, monkeypatch, order())
    assert written(bench) == ([], {"first": "stopped"})


@pytest.mark.parametrize("budget", ["0", "nan", "inf", "1e300"])
def test_a_budget_is_a_number_of_seconds_that_a_clock_takes(budget, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--budget", budget])
    assert f"--budget {float(budget):g}: must be > 0 and at most" in capsys.readouterr().err


def test_no_share_above_all_is_shown(bench, capsys):
    def tables(*shares):
        for share in shares:
            rates = {"batch": 8, "precision": "bf16", "cudnn_benchmark": False, "share_of_bf16_matmul": share}
            bench.results.add("attack", f"at {share}", ms=1.5, **rates)
            bench.results.add("training", f"epoch at {share}", epoch=1, share_of_bf16_matmul=share)
        file = io.StringIO()
        gpu_tables.show(bench.results, Console(width=170, file=file))
        return file.getvalue()

    text = tables(0.284)
    assert "1.50 28 %" in text and "passed" not in text and "share_of_bf16_matmul=28 %" in capsys.readouterr().out
    text = tables(1.41)
    assert "1.50 passed" in text and "1.4" not in text.replace("at 1.41", "")
    assert text.count("passed: the ceiling was measured low") == 1
    assert "share_of_bf16_matmul=passed" in capsys.readouterr().out
    assert bench.results.rows("attack")[1]["share_of_bf16_matmul"] == 1.41  # the files keep what was measured
