"""When a kernel is trusted on a device: once checked there, never while a graph is captured, and as FASTANCHOR_KERNELS says."""

import warnings

import pytest
import torch
import torch.utils.checkpoint

from fastanchor.errors import UserError
from fastanchor.ops import verified as module
from fastanchor.ops.verified import verified

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.delenv("FASTANCHOR_KERNELS", raising=False)


class Check:
    """Counts its calls; raises `error` while there is one."""

    def __init__(self, error=None):
        self.error, self.devices = error, []

    def __call__(self, device):
        self.devices.append(device)
        if self.error is not None:
            raise self.error


def test_a_check_that_passes_runs_once_for_each_name_and_device(monkeypatch):
    monkeypatch.setattr(module, "_check_on", lambda device, check: check(device))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check = Check()
    for _ in range(2):
        assert verified("one", check, CPU) == (True, "checked against the reference on this device")
    assert len(check.devices) == 1
    assert verified("another", check, CPU)[0] and verified("one", check, torch.device("cuda:1"))[0]
    assert check.devices == [CPU, CPU, torch.device("cuda:1")]


def test_a_check_that_fails_is_said_once_and_not_run_again():
    check = Check(AssertionError("gradient is off by 1.0e-01\nand more"))
    with pytest.warns(RuntimeWarning, match="kernels for loss are not used on cpu, plain PyTorch is: .*off by 1.0e-01$") as said:
        good, reason = verified("loss", check, CPU)
    assert not good and reason == "check against the reference failed: AssertionError: gradient is off by 1.0e-01"
    assert len(said) == 1
    with warnings.catch_warnings(action="error"):
        assert verified("loss", check, CPU) == (good, reason)
    assert len(check.devices) == 1


@pytest.mark.parametrize("error", [RuntimeError(), ImportError("no triton"), ValueError("no tile")])
def test_any_exception_is_a_reason(error):
    with pytest.warns(RuntimeWarning, match=type(error).__name__):
        assert not verified("loss", Check(error), CPU)[0]


def test_full_memory_says_nothing_about_the_kernels():
    check = Check(torch.OutOfMemoryError("CUDA out of memory"))
    with warnings.catch_warnings(action="error"):
        assert verified("loss", check, CPU) == (False, "no memory left to check them against the reference")
    check.error = None
    assert verified("loss", check, CPU)[0]


def test_nothing_runs_while_a_graph_is_captured(monkeypatch):
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(module, "_check_on", lambda device, check: check(device))
    check, device = Check(), torch.device("cuda:0")
    good, reason = verified("loss", check, device)
    assert not good and "while a CUDA graph is captured" in reason and not check.devices
    capturing[0] = False
    assert verified("loss", check, device)[0]
    capturing[0] = True
    assert verified("loss", check, device)[0] and len(check.devices) == 1


def test_cuda_without_a_number_is_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(module, "_check_on", lambda device, check: check(device))
    check = Check()
    assert verified("loss", check, torch.device("cuda"))[0] and verified("loss", check, torch.device("cuda:1"))[0]
    assert check.devices == [torch.device("cuda:1")]


def test_the_switch(monkeypatch):
    check = Check(AssertionError("wrong"))
    monkeypatch.setenv("FASTANCHOR_KERNELS", "unchecked")
    assert verified("loss", check, CPU) == (True, "FASTANCHOR_KERNELS=unchecked")
    monkeypatch.setenv("FASTANCHOR_KERNELS", "OFF ")
    assert verified("loss", check, CPU) == (False, "FASTANCHOR_KERNELS=off")
    assert not check.devices
    monkeypatch.setenv("FASTANCHOR_KERNELS", "auto")
    with pytest.warns(RuntimeWarning):
        assert not verified("loss", check, CPU)[0]
    monkeypatch.setenv("FASTANCHOR_KERNELS", "of")
    with pytest.raises(
        UserError, match="^FASTANCHOR_KERNELS is 'of', but must be one of auto, unchecked, off; did you mean 'off'"
    ):
        verified("loss", check, CPU)


def test_a_check_sees_the_plain_state_of_a_fresh_process():
    """Whatever its first caller is in: autocast, no_grad, inference mode, a tracer's fake tensors, a transform, a checkpoint."""
    from torch._subclasses import FakeTensorMode

    def check(device):
        x = torch.ones(2, 2, device=device, requires_grad=True)
        product = x @ x
        assert product.dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
        (gradient,) = torch.autograd.grad(product.sum(), x)
        assert gradient.sum().item() == 16

    for name, state in (
        ("autocast", torch.autocast("cpu", torch.bfloat16)), ("no_grad", torch.no_grad()), ("inference", torch.inference_mode()),
        ("fake", FakeTensorMode()), ("default device", torch.device("meta")),
    ):  # fmt: skip
        with state:
            assert verified(name, check, CPU)[0]
    x = torch.ones(2, requires_grad=True)
    for name, transform in (("grad", torch.func.grad), ("vmap", torch.func.vmap), ("functionalize", torch.func.functionalize)):
        transform(lambda x, name=name: x.sum() * verified(name, check, CPU)[0])(x.detach())
        assert module._known[name, CPU][0]

    def inner(x):
        # The saved product makes the checkpoint run this once more while the check takes its gradient.
        return (x * x).exp() * verified("checkpoint", check, CPU)[0]

    torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False).sum().backward()
    assert module._known["checkpoint", CPU][0]
    torch.set_default_dtype(torch.float64)
    try:
        assert verified("default dtype", check, CPU)[0] and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.is_grad_enabled()


@pytest.mark.gpu
def test_a_check_may_wait_for_the_device_where_the_caller_must_not():
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert verified("loss", lambda device: torch.ones(1, device=device).item(), torch.device("cuda"))[0]
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
