"""The kernels on a CUDA device: `pytest -m gpu`. Right in three regimes, repeatable, captured, compiled, and in the engine's attack."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from bench import gpu_small, gpu_supcon, supcon_cases
from bench.gpu_common import Bench
from bench.results import Results
from fastanchor.attacks import PGD
from fastanchor.graphs import Captured
from fastanchor.losses import HardSupConLoss
from fastanchor.models import build_model
from fastanchor.ops import folding, images
from fastanchor.ops import supcon as operator
from fastanchor.precision import full_precision
from fastanchor.reference import objectives

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
OBJECTIVES = {"ce": objectives.cross_entropy, "cw": objectives.cw_margin, "kl": objectives.kl_divergence}
N, D = 3001, 128  # no multiple of a tile, and enough for a program to go over several column tiles


@pytest.fixture(autouse=True)
def ieee_products():
    """fp32 is fp32 in what the kernels are compared with; by the switch that torch.compile understands."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def bench(tmp_path):
    settings = {"quick": True, "compile": False, "cudnn_benchmark": False, "data": "synthetic", "ceiling": 1e12}
    return Bench(Results(tmp_path, {}), DEVICE, [8], **settings)


def plain(name="default", regime="random", n=N, d=D):
    return supcon_cases.batch(name, regime, n, d, DEVICE)


# --- SupCon --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", supcon_cases.REGIMES)
@pytest.mark.parametrize("case", supcon_cases.CASES)
def test_every_option_in_fp16(bench, case, regime):
    gpu_supcon._group(bench, case, regime, N, D, ("fp16",))
    (row,) = bench.results.rows("supcon")
    assert row.get("ok"), row


@pytest.mark.parametrize("regime", supcon_cases.REGIMES)
@pytest.mark.parametrize("n, d", [(130, 64), (N, 128), (4096, 128), (4097, 256), (257, 512)])
def test_every_precision(bench, n, d, regime):
    gpu_supcon._group(bench, "default", regime, n, d, supcon_cases.PRECISIONS)
    rows = bench.results.rows("supcon")
    assert len(rows) == 3 and all(row.get("ok") or "do not fit" in row.get("left_out", "") for row in rows), rows


@pytest.mark.parametrize("case", ["default", "attached"])
def test_a_large_batch_in_little_memory(bench, case):
    gpu_supcon._group(bench, case, "trained", 32768, D, ("fp16",))
    gpu_supcon._memory(bench, 32768, D)
    rows = bench.results.rows("supcon")
    assert len(rows) == 2 and all(row.get("ok", "eager_left_out" in row) for row in rows), rows


@pytest.mark.parametrize("case", ["default", "attached", "topk", "pairwise", "views", "keys"])
def test_results_repeat_bit_for_bit_also_in_memory_full_of_nan(bench, case):
    gpu_supcon._repeats(bench, case, N, D)
    rows = bench.results.rows("supcon")
    assert len(rows) == 3 and all(row["ok"] and row["poisoned"] for row in rows), rows


def test_loss_and_gradient_are_captured_in_a_graph_and_wait_for_nothing():
    u, y, _ = plain()
    other, other_y, _ = plain(regime="trained")
    beta = torch.tensor(2.0, device=DEVICE)

    def function(u, y, beta):
        from fastanchor.kernels import supcon_launch

        return supcon_launch.loss_and_grad(u, y, supcon_launch.Options(), beta)[:2]

    captured = Captured(function, (u, y, beta))
    for inputs in ((u, y, beta), (other, other_y, beta / 2)):
        expected = [value.clone() for value in function(*inputs)]
        captured(*inputs)
        assert all(map(torch.equal, captured.result, expected))
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(u, y, beta)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_operator_passes_opcheck(monkeypatch):
    """With the arguments that the autograd function gives it."""
    given, call = [], operator._operator
    monkeypatch.setattr(operator, "_operator", lambda *arguments: given.append(arguments) or call(*arguments))
    u, y, arguments = plain("keys", n=130, d=32)
    operator.hard_supcon(u.requires_grad_(), y)
    operator.hard_supcon(u, y, **arguments)
    operator.hard_supcon(u, y, reduction="none").sum().backward()
    assert len(given) == 4
    for arguments in given:
        detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
        torch.library.opcheck(torch.ops.fastanchor.hard_supcon.default, tuple(detached))


def test_a_model_with_the_loss_compiles_without_a_break():
    torch.manual_seed(0)
    model = nn.Linear(64, D).to(DEVICE)
    loss = HardSupConLoss(backend="triton")
    x, y = torch.randn(256, 64, device=DEVICE), torch.arange(256, device=DEVICE) % 10

    def step(x, y):
        return loss(model(x), y)

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True)):
        model.zero_grad()
        value = function(x, y)
        value.backward()
        gradients.append((value.detach(), model.weight.grad.clone()))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_loss_takes_the_kernels_by_itself(monkeypatch):
    monkeypatch.setenv("FASTANCHOR_KERNELS", "auto")
    u, y, _ = plain()
    assert operator.serves(u) == (True, "checked against the reference on this device")
    u = u.requires_grad_()
    value, gradients = {}, {}
    for backend in ("auto", "triton", "torch"):
        value[backend] = HardSupConLoss(backend=backend)(u, y)
        (gradients[backend],) = torch.autograd.grad(value[backend], u)
    assert torch.equal(gradients["auto"], gradients["triton"]) and not torch.equal(gradients["auto"], gradients["torch"])
    assert supcon_cases.relative(gradients["auto"], gradients["torch"]) < 2e-3


# --- the small kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*images.CHECKS, *folding._CHECKS])
def test_the_operators_agree_with_plain_torch(name):
    (images.CHECKS | folding._CHECKS)[name](DEVICE)


@pytest.mark.parametrize("quick", [True, False])
def test_the_small_kernels_agree_with_their_truth(bench, quick):
    bench.quick = quick
    for case in gpu_small._cases(bench):
        gpu_small.check(bench, case)
    rows = bench.results.rows("small")
    assert len(rows) >= 7 and all(row["ok"] for row in rows), rows


def test_small_kernels_repeat_bit_for_bit(bench):
    for case in gpu_small._cases(bench):
        inputs = case.inputs(1)
        first = [x.clone() for x in gpu_small._first_tensors(case.kernel(*inputs))]
        assert all(map(torch.equal, first, gpu_small._first_tensors(case.kernel(*inputs)))), case.what


# --- the engine --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "graphed"])
@pytest.mark.parametrize("objective", ["ce", "cw", "kl"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_is_the_same_with_kernels_and_without(norm, objective, backend):
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, width=16, mean=(0.5,) * 3, std=(0.25,) * 3).to(DEVICE).eval()
    x, y = torch.rand(32, 3, 32, 32, device=DEVICE), torch.arange(32, device=DEVICE) % 10
    numbers = {"eps": 8 / 255, "step_size": 2 / 255} if norm == "linf" else {"eps": 0.5, "step_size": 0.1}
    found, reached = {}, {}
    with full_precision():
        for kernels in ("off", "on"):
            attack = PGD(**numbers, steps=3, norm=norm, objective=objective, backend=backend, kernels=kernels)
            found[kernels] = attack(copy.deepcopy(model), x, y, generator=torch.Generator(DEVICE).manual_seed(0)).clone()
            assert attack.engine.notes["kernels"].startswith("yes" if kernels == "on" else "no")
            with torch.no_grad():
                clean = (model(x),) if objective == "kl" else ()
                reached[kernels] = OBJECTIVES[objective](model(found[kernels]), y, *clean).mean()
    torch.testing.assert_close(reached["on"], reached["off"], rtol=1e-2, atol=0)
    if objective != "kl":  # whose gradient is a difference of two probabilities that are all but equal
        difference = (found["on"] - found["off"]).abs()
        # In linf they differ in pixels whose gradient is about zero.
        assert (difference > 1e-5).float().mean() < 5e-3 if norm == "linf" else difference.max() < 1e-3
