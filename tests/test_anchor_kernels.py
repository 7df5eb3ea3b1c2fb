"""ANCHOR's contrastive loss by the operator (`engine.kernels on`) and by plain autograd (`off`): on a CPU the same training."""

import pytest
import torch
from fastanchor.kernels.limits import MAX_BETA
from graph_emulator import Emulator
from test_step import make_config
from test_step_graphed import assert_same, make_step, run

from fastanchor import graphs
from fastanchor.errors import UserError
from fastanchor.methods import build_method
from fastanchor.methods.finetune import LinearStage


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--loss.beta-warmup-epochs", "2", "--attack.objective", "ce+hsc"],
        ["--attack.objective", "hsc"],
        ["--precision", "bf16"],
        ["--precision", "bf16", "--attack.objective", "ce+hsc"],
    ],
)
def test_the_operator_trains_as_plain_autograd_does(flags):
    """To the bit where the loss counts a power of two times: the operator multiplies its gradient last."""
    ours, plain = (make_step("--engine.kernels", "off", "--engine.graph", "off", *flags) for _ in range(2))
    ours.method.loss_backend = "triton"
    assert run(ours, sizes=(16, 16, 16), epochs=2) == run(plain, sizes=(16, 16, 16), epochs=2)
    assert_same(ours, plain)


def test_the_operator_is_captured_with_the_step():
    flags = ["--engine.kernels", "on", "--loss.beta-warmup-epochs", "2", "--attack.objective", "ce+hsc"]
    graphed, plain = make_step("--engine.graph", "on", *flags), make_step("--engine.graph", "off", *flags)
    with graphs.use_recorder(Emulator):
        assert run(graphed) == run(plain)
    assert_same(graphed, plain)
    assert graphed.graphed


@pytest.mark.parametrize("kernels, backend", [("auto", "auto"), ("on", "triton"), ("off", "torch")])
def test_the_switch_decides_the_backend(kernels, backend):
    method = build_method(make_config("--engine.kernels", kernels, "--loss.hsc-precision", "ieee"))
    loss = method.contrastive(torch.zeros(()))
    assert (loss.backend, loss.options["precision"]) == (backend, "ieee")
    stage2 = LinearStage(make_config("--engine.kernels", kernels, "--stage2.mode", "alf"))
    for each in (method, stage2):
        (adversary,) = each.adversaries(torch.nn.Identity(), torch.zeros(())).values()
        assert adversary.attack.kernels == kernels


def test_a_warm_up_beyond_what_the_kernels_hold_is_torch_or_an_error():
    """There beta is a tensor, which the loss does not look into."""
    beyond = ["--loss.beta", f"{MAX_BETA + 1:g}"]
    backends = [build_method(make_config(*beyond, *flags)).loss_backend for flags in ([], ["--loss.weight", "uniform"])]
    assert backends == ["torch", "auto"]
    with pytest.raises(UserError, match=r"engine.kernels = on: exp weights need \|beta\| <= 40, loss.beta = 41"):
        build_method(make_config(*beyond, "--engine.kernels", "on"))
