"""What a device can do at most: the arithmetic on a clock of known speed, and that measuring leaves no trace."""

import dataclasses
import json
import math
import time

import pytest
import torch

from fastanchor import ceilings
from fastanchor.ceilings import copy_bandwidth, matmul_rate, measure_ceilings

SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)


@pytest.fixture(autouse=True)
def forget():
    """Every test measures anew."""
    for cached in (ceilings._matmul_rate, ceilings._copy_bandwidth):
        cached.cache_clear()


class Clock:
    """A CPU of known speeds: work of so many FLOPs takes FLOPs / rate; all rounds but every third of a size are disturbed."""

    def __init__(self, monkeypatch, product, convolution):
        self.rates, self.sizes, self.calls, self.rounds, self.spent = (
            {"p": product, "c": convolution},
            {"p": [], "c": []},
            {},
            {},
            0.0,
        )
        monkeypatch.setattr(ceilings, "_product", lambda device, dtype, size: self.work("p", size, 2 * size**3))
        monkeypatch.setattr(
            ceilings, "_convolution", lambda device, dtype, images: self.work("c", images, images * 2 * 8 * 8 * 3 * 3 * 256 * 256)
        )
        monkeypatch.setattr(ceilings, "_round", self.round)

    def work(self, kind, size, flops):
        self.sizes[kind].append(size)
        self.calls[kind] = self.rounds[kind] = 0
        return lambda: (kind, flops)

    def round(self, call, device, calls):
        kind, flops = call()
        self.rounds[kind], self.calls[kind] = self.rounds[kind] + 1, self.calls[kind] + calls
        taken = calls * flops / self.rates[kind] * (1 if self.rounds[kind] % 3 == 0 else 1.5)
        self.spent += taken
        return taken


@pytest.mark.parametrize(
    "rate, size, images", [(1e8, 128, None), (1e10, 256, 5), (1e11, 1024, 32), (3e12, 2048, 32), (1e15, 4096, 32)]
)
@pytest.mark.parametrize("convolution", [0.9, 2.5])
def test_rate_is_that_of_the_quickest_round_of_the_largest_work_that_there_is_time_for(
    monkeypatch, rate, size, images, convolution
):
    clock = Clock(monkeypatch, rate, convolution * rate)
    expected = rate if images is None else max(rate, convolution * rate)
    assert matmul_rate("cpu", torch.bfloat16, seconds=0.2) == pytest.approx(expected)
    assert clock.sizes["p"] == [128 * 2**i for i in range(len(clock.sizes["p"]))] and clock.sizes["p"][-1] == size
    assert clock.sizes["c"] == ([images] if images else [])
    assert clock.spent < 1.1  # an emulated bf16 too: at its smallest size a product takes 42 ms here, a convolution 755
    assert set(clock.rounds.values()) == {2 + ceilings.ROUNDS} and (rate < 1e15 or min(clock.calls.values()) > 300)


def test_copying_counts_the_read_and_the_write(monkeypatch):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1000)
    monkeypatch.setattr(ceilings, "_round", lambda call, device, calls: calls * 0.004)
    assert copy_bandwidth("cpu", seconds=0.2) == pytest.approx(2 * 1000 / 0.004)


def test_products_and_copies_are_done_as_often_as_the_clock_is_told():
    done = []
    taken = ceilings._round(lambda: done.append(time.sleep(0.002)), torch.device("cpu"), 5)
    assert len(done) == 5 and 0.01 <= taken < 1
    done.clear()
    assert ceilings._quickest(lambda: done.append(time.sleep(0.002)), torch.device("cpu"), 4, 2) >= 0.002
    assert len(done) == 9  # and one that is not timed


def test_the_convolution_timed_has_the_flops_that_are_counted():
    for dtype in (torch.bfloat16, torch.float32):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            ceilings._convolution(torch.device("cpu"), dtype, 3)()
        assert counter.get_total_flops() == 3 * 2 * (ceilings.CHANNELS * ceilings.KERNEL * ceilings.PIXELS) ** 2
        images, weight = ceilings._convolution(torch.device("cpu"), dtype, 3).args
        assert images.dtype == weight.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)
        assert images.float().std() == pytest.approx(1, abs=0.1)


def test_the_work_timed_is_a_product_of_random_matrices_of_the_dtype_and_a_whole_copy():
    for dtype in (torch.bfloat16, torch.float32):
        product = ceilings._product(torch.device("cpu"), dtype, 64)
        a, b = product.args
        result = product()
        assert {t.dtype for t in (a, b, result)} == {dtype} and result.shape == (64, 64)
        torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=0.02, atol=0.2)
        assert a.float().std() == pytest.approx(1, abs=0.1) and not torch.equal(a, b)


@pytest.mark.parametrize("surroundings", ["plain", "autocast and tf32"])
def test_measuring_gives_plausible_figures_in_full_precision_and_changes_nothing(surroundings, monkeypatch):
    rounds, seen = ceilings._round, []

    def spied(call, device, calls):
        if call.func in (torch.mm, torch.conv2d):
            seen.append((torch.is_autocast_enabled("cpu"), *(switch.fp32_precision for switch in SWITCHES)))
        return rounds(call, device, calls)

    monkeypatch.setattr(ceilings, "_round", spied)
    state, modes = torch.get_rng_state(), (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    before = [switch.fp32_precision for switch in SWITCHES]
    try:
        if surroundings == "plain":
            found = measure_ceilings("cpu", seconds=0.01)
        else:
            for switch in SWITCHES:
                switch.fp32_precision = "tf32"
            with torch.autocast("cpu", torch.bfloat16):
                found = measure_ceilings("cpu", seconds=0.01)
                assert torch.is_autocast_enabled("cpu")
            assert [switch.fp32_precision for switch in SWITCHES] == ["tf32"] * 4
    finally:
        for switch, value in zip(SWITCHES, before, strict=True):
            switch.fp32_precision = value
    assert set(seen) == {(False, "ieee", "ieee", "ieee", "ieee")}
    values = json.loads(json.dumps(dataclasses.asdict(found)))
    assert values.keys() == {"bf16_matmul", "fp32_matmul", "copy_bandwidth"}
    assert all(math.isfinite(value) and 1e6 < value < 1e15 for value in values.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()) == modes


def test_a_process_measures_a_device_once(monkeypatch):
    first = measure_ceilings("cpu", seconds=0.01)
    monkeypatch.setattr(ceilings, "_round", lambda *_: pytest.fail("measured again"))
    assert measure_ceilings(torch.device("cpu"), seconds=0.01) == first
    assert matmul_rate("cpu", torch.float32, seconds=0.01) == first.fp32_matmul != first.bf16_matmul


@pytest.mark.gpu
def test_ceilings_of_a_gpu_leave_its_memory_and_random_state():
    held, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    found = measure_ceilings("cuda")
    assert found == measure_ceilings(torch.device("cuda", torch.cuda.current_device()))
    assert all(math.isfinite(value) and value > 1e11 for value in dataclasses.astuple(found))
    # The libraries keep a workspace of some tens of MB; the matrices and buffers are gone.
    assert torch.cuda.memory_allocated() - held < 2**27
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_no_share_is_above_all():
    shown = {0.0: "0 %", 0.0031: "0.31 %", 0.404: "40 %", 1.0: "100 %", 1.004: "100 %"}
    assert {share: ceilings.share_text(share) for share in shown} == shown
    assert ceilings.share_text(1.006) == ceilings.share_text(1.41) == ceilings.PASSED
    assert ceilings.WHY_PASSED.startswith(ceilings.PASSED)
