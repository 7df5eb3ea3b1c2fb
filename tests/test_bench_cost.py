"""The cost model: counts against closed forms, against the real step's operators and `step_cost`; scaling laws; the command line."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import cases, cost, cost_count
from fastanchor.data.views import Rows
from fastanchor.methods import build_method
from fastanchor.models import build_model, mac_count
from fastanchor.train.throughput import step_cost

CPU = torch.device("cpu")
RATES = cost.Rates(matmul=2e12, copy=1e11, source="made up")
SMALL = {"width": 8, "pixels": 16}


def totals(operations, *starts):
    """FLOPs and bytes of the operators whose part begins so; of all without `starts`."""
    chosen = [row for row in operations if not starts or row[0].startswith(starts)]
    return sum(row[1] for row in chosen), sum(row[2] for row in chosen)


@functools.cache
def step(method="anchor", steps=3, precision="fp32", gpu=True, **size):
    return cost_count.count_step(cost.make_config(method, steps, precision), gpu=gpu, **{"batch": 8, **SMALL, **size})


def counted(function, gpu=False):
    with cost_count.Counter(gpu) as counter:
        function()
    return totals(counter.operations)


# -- one operator, by hand ------------------------------------------------------------------------------------------------------


def test_a_convolution_forward_and_backward_by_hand():
    x, w, bias = torch.rand(2, 3, 8, 6), torch.rand(5, 3, 3, 3), torch.rand(5)
    products, image, weights, out = 2 * 2 * 8 * 6 * 5 * 27, 4 * 2 * 3 * 48, 4 * 5 * 27, 4 * 2 * 5 * 48
    assert counted(lambda: F.conv2d(x, w, padding=1)) == (products, image + weights + out)
    assert counted(lambda: F.conv2d(x, w, bias, padding=1)) == (products, image + weights + out + 20)
    # On a GPU the bias is read and added by a kernel of its own.
    assert counted(lambda: F.conv2d(x, w, bias, padding=1), gpu=True) == (products, image + weights + 3 * out + 20)

    def backward(*wanted):
        made = F.conv2d(x.requires_grad_(), w.requires_grad_(), padding=1)
        upstream = torch.ones_like(made)
        return counted(lambda: torch.autograd.grad(made, wanted, upstream))

    assert backward(x) == (products, out + weights + image)
    assert backward(w) == (products, out + image + weights)
    assert backward(x, w) == (2 * products, 2 * out + 2 * image + 2 * weights)


def test_elementwise_operators_by_hand():
    x, y = torch.rand(4, 5, 6, 2), torch.rand(4, 5, 6, 2)
    size = 4 * x.numel()
    assert counted(lambda: x + y) == (0, 3 * size)
    assert counted(lambda: x.add_(y)) == (0, 3 * size)
    assert counted(lambda: x.relu_()) == (0, 2 * size)
    assert counted(lambda: x.copy_(y)) == (0, 2 * size)
    assert counted(lambda: x.zero_()) == (0, size)
    assert counted(lambda: torch.add(x, y, out=torch.empty_like(x))) == (0, 3 * size)
    assert counted(lambda: x.to(torch.bfloat16)) == (0, size + size // 2)
    assert counted(lambda: (x.view(20, 12).t(), x.detach(), x.split(2), torch.empty_like(x))) == (0, 0)
    # An expanded tensor is read once, in its own memory.
    assert counted(lambda: x + torch.rand(1).expand(4, 5, 6, 2)) == (0, 2 * size + 4 + 4)
    assert counted(lambda: torch._foreach_add_([x, y], [y, x])) == (0, 6 * size)


def test_a_batchnorm_that_takes_statistics_passes_over_its_inputs_twice():
    x, norm = torch.rand(4, 3, 10, 10, requires_grad=True), nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    size, channels = 4 * x.numel(), 4 * 3
    assert counted(lambda: norm(x)) == (0, 3 * size + 2 * channels)  # twice read, written, mean and deviation kept
    made = norm(x)
    moved = counted(lambda: made.backward(torch.ones_like(x)))[1] - size  # the ones are written here
    assert moved == 5 * size + 2 * channels
    frozen = nn.BatchNorm2d(3, affine=False).eval()
    assert counted(lambda: frozen(x.detach())) == (0, 2 * size + 2 * channels)


def test_a_small_network_against_its_closed_form_and_mac_count():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 1, bias=False),
        nn.Flatten(),
        nn.Linear(96, 10),
    )
    macs = 64 * 4 * 27 + 16 * 6 * 36 + 96 * 10
    assert mac_count(net, 8) == macs
    images = torch.rand(5, 3, 8, 8)
    assert counted(lambda: net(images))[0] == 2 * 5 * macs
    assert counted(lambda: net(images).sum().backward())[0] == 2 * 5 * (3 * macs - 64 * 4 * 27)


def test_the_contrastive_loss_is_six_n_squared_d():
    flops, moved = cost.loss_work(64, 32)
    assert flops == 6 * 64 * 64 * 32
    assert moved >= 2 * 4 * 64 * 32 and moved < 5 * 4 * 64 * 32
    assert cost.loss_work(64, 32, gpu=False)[0] == flops  # autograd of the dense reference needs the same products
    assert cost.loss_work(128, 32)[0] == 4 * flops


# -- a whole step ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["anchor", "pgd-at"])
def test_the_count_is_that_of_the_real_step(method, precision):
    config = cost.make_config(method, 3, precision)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, kernels="off"))
    images, labels = cases.make_batch(8, 16, CPU)
    real = cases.make_step(config, cases.make_model(8, CPU), CPU, load=lambda index: (Rows(images, index), labels))
    index = torch.arange(8)
    real(index, progress=0.0)  # makes and checks the twin
    expected = counted(lambda: real(index, progress=0.0))
    found = totals(step(method, precision=precision, gpu=False))
    assert found[0] == expected[0]
    # The sums of the metrics are not counted, and without storage BatchNorm keeps its statistics in bf16: numbers a channel.
    assert found[1] == pytest.approx(expected[1], rel=2e-4)
    view = torch.rand(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert totals(step(method, precision=precision, gpu=False), "attack", "folding") == counted(
        lambda: real.attacks[0](real.model, view, labels)
    )


@pytest.mark.parametrize("method, views", [("anchor", 2), ("pgd-at", 1)])
def test_products_are_those_of_step_cost(method, views):
    needed = step_cost(
        build_method(cost.make_config(method, 3, "fp32")), build_model("resnet18", num_classes=10, width=8), (16, 16)
    )
    assert totals(step(method), "attack")[0] == 8 * needed.attack
    # step_cost neglects that training needs no input gradient of the first layer.
    first = 2 * 16 * 16 * 8 * 27
    assert totals(step(method), "training")[0] == 8 * (needed.training - views * first)
    forward = totals(step(method), "attack: forward")[0]
    assert forward == totals(step(method), "attack: input-gradient")[0] == 8 * needed.attack // 2
    assert totals(step(method), "training: forward")[0] == 8 * needed.training // 3


def test_kernels_move_less_than_plain_torch_and_a_gpu_adds_biases_apart():
    plain, kernels = step(gpu=False), step()
    assert {row[0] for row in kernels} == {row[0] for row in plain} == set(cost.PARTS)
    for part in ("augmentation", "losses", "folding of BatchNorm"):
        assert totals(kernels, part)[1] < totals(plain, part)[1]
    # Every one of the 20 convolutions' outputs is read and written once more in each of 3 steps, but pgd_step moves less.
    values = sum(count * pixels * channels for count, pixels, channels in ((5, 256, 8), (5, 64, 16), (5, 16, 32), (5, 4, 64)))
    biases, image = 3 * 2 * 4 * 8 * values, 4 * 8 * 3 * 16 * 16
    added = totals(kernels, "attack: elementwise")[1] - totals(plain, "attack: elementwise")[1]
    assert biases - 3 * 10 * image < added < biases


# -- how it grows ---------------------------------------------------------------------------------------------------------------


def test_steps_add_the_same_work_each():
    one, two, four, eight = (totals(step("pgd-at", steps=n), "attack") for n in (1, 2, 4, 8))
    assert [two[0], four[0], eight[0]] == [2 * one[0], 4 * one[0], 8 * one[0]]
    assert eight[1] - four[1] == 2 * (four[1] - two[1]) == 4 * (two[1] - one[1]) > 0
    rest = [totals(step("pgd-at", steps=n), "training", "update", "aug") for n in (1, 8)]
    assert rest[0] == rest[1]


def test_doubling_the_batch_doubles_flops_and_what_is_not_weights():
    parts = ("attack", "training", "augmentation", "update", "folding")
    four, eight, sixteen = (totals(step(batch=n), *parts) for n in (4, 8, 16))
    assert sixteen[0] == 2 * eight[0] == 4 * four[0]
    assert sixteen[1] - eight[1] == 2 * (eight[1] - four[1]) > 0
    fixed = [totals(step(batch=n), "update", "folding") for n in (4, 16)]
    assert fixed[0] == fixed[1]
    assert totals(step(batch=16), "losses")[0] == 4 * totals(step(batch=8), "losses")[0]


def test_flops_are_quadratic_and_elementwise_bytes_linear_in_the_width():
    flops = [totals(step("pgd-at", width=w), "attack", "training")[0] for w in (4, 8, 12, 16)]
    assert flops[3] - 3 * flops[2] + 3 * flops[1] - flops[0] == 0
    assert flops[2] - 2 * flops[1] + flops[0] > 0
    moved = [totals(step("pgd-at", width=w), "attack: elementwise")[1] for w in (4, 8, 16)]
    assert moved[2] - moved[1] == 2 * (moved[1] - moved[0]) > 0


def test_an_epoch_is_its_steps_and_its_bounds_hold():
    size = {"batch": 8, **SMALL}
    config = cost.make_config("anchor", 3, "fp32")
    found = cost.predict(config, RATES, images=100, **size)
    flops, moved = totals(step())
    assert found.steps_per_epoch == 12.5
    assert (found.flops, found.bytes) == (12.5 * flops, 12.5 * moved)
    assert found.compute_s == pytest.approx(12.5 * flops / 2e12) and found.memory_s == pytest.approx(12.5 * moved / 1e11)
    in_turn = 12.5 * sum(max(f / 2e12, b / 1e11) for _, f, b in step())
    assert found.in_turn_s == pytest.approx(in_turn)
    assert found.full_overlap_s == max(found.compute_s, found.memory_s)
    assert found.no_overlap_s == found.compute_s + found.memory_s
    assert found.full_overlap_s < found.in_turn_s < found.no_overlap_s
    assert sum(map(found.share, found.parts)) == pytest.approx(1)
    twice = cost.predict(config, cost.Rates(4e12, 2e11, ""), images=200, **size)
    assert twice.in_turn_s == pytest.approx(found.in_turn_s)


def test_nothing_of_torch_is_changed():
    before = torch.get_rng_state()
    cost_count.count_step(cost.make_config("anchor", 1, "bf16"), batch=4, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(torch.empty(1)) is torch.Tensor


# -- the command line -----------------------------------------------------------------------------------------------------------


def test_the_table_says_that_it_is_a_prediction_and_of_which_device(capsys):
    flags = "--model wrn10_1 --width 4 --pixels 8 --batch 4 --steps 2 --matmul 500 --copy 2000 --images 1000 --method anchor"
    assert cost.main(flags.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("predicted, not measured: anchor, wrn10_1, PGD-2, bf16, batch 4")
    assert "as a GPU runs" in out and "500 TFLOP/s, copying 2000 GB/s; given on the command line" in out
    for text in (*cost.PARTS, "predicted s/epoch", "views 3", "steps 4", "width 8", "classes 100", "batch 8", "N 16384, D 128"):
        assert text in out
    assert all(line.startswith("predicted") for line in out.splitlines() if "s/epoch" in line or " in turn" in line)


def test_ceilings_that_are_not_given_are_measured_here(capsys, monkeypatch):
    monkeypatch.setattr(cost, "matmul_rate", lambda device, dtype: {torch.float32: 7e10}[dtype])
    monkeypatch.setattr(cost, "copy_bandwidth", lambda device: 9e9)
    monkeypatch.setattr(cost, "scaling", lambda *given: iter(()))
    assert cost.main("--device cpu --precision fp32 --width 4 --pixels 8 --batch 4 --steps 1".split()) == 0
    out = capsys.readouterr().out
    assert "fp32 products 0.07 TFLOP/s, copying 9 GB/s; measured just now on" in out and "as a CPU runs" in out


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--batch 1", "--batch 1: must be at least 2"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--pixels 4", "--pixels 4: must be at least 8"),
        ("--classes 1", "--classes 1: must be at least 2"),
        ("--images 0", "--images 0: must be at least 1"),
        ("--width 0", "--width 0: must be at least 1"),
        ("--matmul 700", "--matmul and --copy: give both ceilings"),
        ("--copy 700", "--matmul and --copy: give both ceilings"),
        ("--matmul -1 --copy 5", "--matmul -1.0: must be a finite number > 0"),
        ("--matmul 5 --copy nan", "--copy nan: must be a finite number > 0"),
        ("--model resnet19", "'resnet19' is unknown"),
        ("--method trades", "invalid choice: 'trades'"),
    ],
)
def test_bad_flags_exit_2_with_a_sentence(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cost.main(flags.split())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
