"""GPU run, SupCon kernels: right against fp64 in three data regimes, the same from run to run, small in memory, within bounds.

Truth is `supcon_truth.blockwise` in fp64, which is held against autograd of the dense reference first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch
from torch import Tensor

from bench import supcon_cases as cases
from bench.gpu_common import NEEDS_CUDA, Bench
from bench.timing import peak_memory_mb

PART, SANITIZER = "supcon", "sanitizer"
FEATURES = 128
LARGE = 32768
# N at which all options are tried: no multiple of any tile, and enough for a program to go over several column tiles.
RAGGED = 3001
# Rounding of a loss that is a mean of many rows is a matter of luck, its own and eager's; a gradient's is not.
ALLOWED_LOSS, ALLOWED_GRADIENT = 1e-5, 1e-6
# Of the promise: peak memory at N = 65,536.
MOST_MB = 500.0
SANITIZER_SECONDS = 120.0


def run(bench: Bench) -> None:
    """The usual loss in every precision and regime, then the largest N, then every option, then the rest in order of cost."""
    torch.set_float32_matmul_precision("highest")
    _check_truth(bench)
    reason = bench.no_kernels()
    if reason is not None:
        bench.results.add(PART, "kernels", left_out=reason)
        return
    sizes, large, d, small = ((RAGGED, 4096, 130), LARGE, FEATURES, RAGGED) if not bench.quick else ((66,), 130, 32, 66)
    for n in sizes:
        for regime in cases.REGIMES:
            _group(bench, "default", regime, n, d, cases.PRECISIONS)
    _repeats(bench, "default", small, d)
    for n in (large, 2 * large):
        _memory(bench, n, d)
    for regime in cases.REGIMES:
        _group(bench, "default", regime, large, d, ("fp16",))
    for name in list(cases.CASES)[1:]:
        for regime in ("random", "trained"):
            _group(bench, name, regime, small, d, ("fp16",))
    _repeats(bench, "attached", 4 * small, d)
    for regime in cases.REGIMES:
        _group(bench, "default", regime, large, d, ("tf32", "ieee"))
    for name in list(cases.CASES)[1:]:
        _group(bench, name, "mid", small, d, ("ieee", "tf32"))
    for name in ("attached", "tau 0.01", "topk", "pairwise", "hard negatives", "views", "keys", "selection hard"):
        for regime in ("trained", "random"):
            _group(bench, name, regime, large, d, ("fp16",))


def _check_truth(bench: Bench) -> None:
    """The closed form in blocks of rows against autograd of the dense reference, both in fp64, on this device."""
    for name in cases.CASES:
        with bench.results.entry(PART, "truth in blocks", case=name):
            u, y, arguments = cases.batch(name, "mid", 130, 32, bench.device)
            found, expected = cases.truth(u, y, arguments), cases.dense(u, y, arguments, torch.float64)
            largest = max(cases.relative(a, b) for a, b in zip(found, expected, strict=True))
            bench.results.add(PART, "truth in blocks", case=name, gradient_relative=largest, ok=largest < 1e-12)


def _group(bench: Bench, case: str, regime: str, n: int, d: int, precisions: tuple[str, ...]) -> None:
    """One truth for all precisions; a row each."""
    about = {"case": case, "regime": regime, "n": n, "d": d}
    with bench.results.entry(PART, "kernels", **about):
        u, y, arguments = cases.batch(case, regime, n, d, bench.device)
        expected = cases.truth(u, y, arguments)
        for precision in precisions:
            with bench.results.entry(PART, "kernels", **about, precision=precision):
                reason = cases.unsupported(u, arguments, precision)
                if reason is not None:
                    bench.results.add(PART, "kernels", **about, precision=precision, left_out=reason)
                    continue
                row = _errors(cases.kernels(u, y, arguments, precision), expected)
                bench.tidy()
                row |= _beside_eager(row, u, y, arguments, precision, expected)
                bench.results.add(PART, "kernels", **about, precision=precision, **row)
    bench.tidy()


def _errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    names = ("loss_relative", "gradient_relative", "keys_gradient_relative")
    return {name: cases.relative(a, b) for name, a, b in zip(names, found, expected, strict=False)}


def _beside_eager(row: dict, u: Tensor, y: Tensor, arguments: dict, precision: str, expected: tuple) -> dict:
    """Eager's errors and the verdict; where eager's matrices do not fit, the reason, and no verdict."""
    too_large = cases.dense_fits(len(u), len(arguments.get("ref_embeddings", u)), u.device)
    if too_large is not None:
        return {"eager_left_out": too_large}
    try:
        return _judge(row, _errors(cases.eager(u, y, arguments, precision), expected))
    except torch.OutOfMemoryError as error:
        return {"eager_left_out": f"out of memory: {error}"[:200]}


def _judge(ours: dict[str, float], eager: dict[str, float]) -> dict[str, float | bool]:
    """Eager's errors, and whether none of ours is more than twice as large. NaN is not."""
    allowed = {name: 2 * error + (ALLOWED_LOSS if name == "loss_relative" else ALLOWED_GRADIENT) for name, error in eager.items()}
    found: dict = {f"eager_{name}": error for name, error in eager.items()}
    return found | {"ok": all(ours[name] <= most for name, most in allowed.items())}


def _repeats(bench: Bench, case: str, n: int, d: int) -> None:
    """Bit by bit: two runs, and a third one in memory that was full of NaN before."""
    for precision in cases.PRECISIONS:
        about = {"case": case, "n": n, "d": d, "precision": precision}
        with bench.results.entry(PART, "repeats", **about):
            u, y, arguments = cases.batch(case, "trained", n, d, bench.device)
            first, second = (cases.kernels(u, y, arguments, precision) for _ in range(2))
            row = {"same": all(map(torch.equal, first, second))}
            if bench.cuda:
                bench.tidy()
                row["poisoned"] = poison(bench.device)
                row["same_in_poisoned_memory"] = all(map(torch.equal, first, cases.kernels(u, y, arguments, precision)))
            bench.results.add(PART, "repeats", **about, **row, ok=all(row.values()))


def poison(device: torch.device) -> bool:
    """Fill what torch's allocator will hand out next with NaN; whether a new tensor of each kind of block then is NaN.

    The cache must be empty before. Requests of up to 1 MiB are cut from blocks of 2 MiB, others from larger ones.
    """
    held = [torch.full((2**17,), float("nan"), device=device) for _ in range(64)]
    held += [torch.full((2**26,), float("nan"), device=device) for _ in range(2)]
    del held
    seen = [torch.empty(size, device=device).isnan().all() for size in (100, 2**16, 2**22)]
    return bool(torch.stack(seen).all())


def _memory(bench: Bench, n: int, d: int) -> None:
    """Peak memory of loss and gradient, the gradient itself included, beside the bytes of one N x N matrix in fp32."""
    with bench.results.entry(PART, "peak memory", n=n, d=d):
        u, y, arguments = cases.batch("default", "random", n, d, bench.device)
        cases.kernels(u, y, arguments, "fp16")
        bench.tidy()
        peak = peak_memory_mb(lambda: cases.kernels(u, y, arguments, "fp16"), bench.device)
        dense = 4 * n * n / 1e6
        judged = {} if peak is None else {"peak_memory_mb": peak, "ok": peak < min(MOST_MB, dense)}
        bench.results.add(PART, "peak memory", n=n, d=d, dense_matrix_mb=dense, **judged)


def run_sanitizer(bench: Bench) -> None:
    """compute-sanitizer's memcheck on one small case, in a process of its own; torch's allocator off, so that bounds are real."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not bench.cuda or tool is None:
        bench.results.add(SANITIZER, "memcheck", left_out=NEEDS_CUDA if not bench.cuda else "compute-sanitizer is not installed")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5"]
    command += [sys.executable, "-m", "bench.supcon_cases"]
    seconds = min(SANITIZER_SECONDS, bench.left() - 2)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    except subprocess.TimeoutExpired:
        bench.results.add(SANITIZER, "memcheck", left_out=f"it had not ended after {seconds:.0f} s")
        return
    said = (ended.stdout + ended.stderr).strip()
    row = {"ok": ended.returncode == 0 and "ERROR SUMMARY: 0 errors" in said, "exit_code": ended.returncode, "said": said[-2000:]}
    bench.results.add(SANITIZER, "memcheck", **row)
